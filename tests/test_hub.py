"""What is read from the Hub, with the unmodified clients against tests/hub_server.py."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from llama_lite import corpus
from llama_lite.arguments import Refusal
from llama_lite.runs import read_json


@pytest.fixture
def fineweb(hub, text, tmp_path) -> tuple[str, str]:
    """(id, commit) of a dataset repository with FineWeb-Edu's columns, in two parquet files."""
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    name = f"org/text-{len(hub.repos)}"
    HfApi().create_repo(name, repo_type="dataset")
    operations = []
    for part in range(2):
        texts = rows[part::2]
        columns = {
            "text": texts,
            "id": [f"<urn:uuid:{part}-{row}>" for row in range(len(texts))],
            "dump": ["CC-MAIN-2024-10"] * len(texts),
            "language": ["en"] * len(texts),
            "language_score": [0.9] * len(texts),
            "token_count": [len(one) // 4 for one in texts],
            "score": [3.1] * len(texts),
            "int_score": [3 + row % 2 for row in range(len(texts))],
        }
        path = tmp_path / f"{part}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        operations.append(CommitOperationAdd(f"sample/10BT/{part:03d}_00000.parquet", path))
    card = "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n---\n"
    operations.append(CommitOperationAdd("README.md", card.encode()))
    return name, HfApi().create_commit(name, operations, commit_message="text", repo_type="dataset").oid


def test_a_dataset_of_the_hub_is_read_at_its_commit(fineweb, text):
    name, commit = fineweb
    rows = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    HfApi().delete_file("sample/10BT/001_00000.parquet", name, repo_type="dataset")
    for revision, expected in ((commit, rows[::2] + rows[1::2]), ("main", rows[::2])):
        source = corpus.resolve(name, "sample-10BT", "train", revision, "text")
        assert source.record["revision"] == (commit if revision == commit else HfApi().dataset_info(name).sha)
        assert [d.text for index in range(len(source.files)) for d in corpus.read(source, index, corpus.Skipped())] == expected


def test_a_dataset_of_the_hub_is_curated_and_prepared(fineweb, pretrain, tmp_path):
    name, commit = fineweb
    hub_data = {"dataset": name, "dataset_config": "sample-10BT", "dataset_revision": commit, "prepared_dir": str(tmp_path / "tokens")}
    pretrain(tmp_path / "run", "--prepare_only", **hub_data, min_score=4, score_column="int_score", language="en", min_language_score=0.65)
    manifest, curation = (read_json(tmp_path / "tokens" / f"{name}.json") for name in ("manifest", "curation"))
    assert manifest["source"]["revision"] == commit
    assert 0 < manifest["documents"] == curation["kept"]["documents"] < curation["read"]["documents"]


@pytest.mark.parametrize(
    ("fault", "changes", "message"),
    [
        ("absent", {"dataset": "org/nothing"}, "neither a local file nor a dataset that the Hub gives"),
        ("revision", {"dataset_revision": "v9"}, r"\(revision v9\)"),
        ("split", {"dataset_split": "test"}, "--dataset_split test: .* has train"),
        ("config", {"dataset_config": "nope"}, "nope"),
        ("column", {"text_column": "body"}, "no column 'body'; its columns are 'text', 'id'"),
        ("down", {}, r"neither a local file nor a dataset that the Hub gives \(revision main\)"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_the_hub_does_not_give_is_refused(hub, fineweb, pretrain, tmp_path, fault, changes, message):
    if fault == "down":
        hub.down()
    chosen = {"dataset": fineweb[0], "dataset_config": "sample-10BT", "prepared_dir": str(tmp_path / "tokens"), **changes}
    with pytest.raises((Refusal, SystemExit), match=message) as refusal:
        pretrain(tmp_path / "run", "--prepare_only", **chosen)
    assert "Traceback" not in str(refusal.value) and hub.environment()["HF_TOKEN"] not in str(refusal.value)
