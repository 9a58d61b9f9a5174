"""Preparing on a Ray cluster gives the bytes of one process, also when a node is killed, and refuses what would not."""

import json
import threading
import time
from pathlib import Path

import pytest
import zstandard
from helpers import HARD, ROOT, ROWS, jsonl, prepare, source_of

from llama_lite.config.pretrain import parse_pretrain
from llama_lite.data import cutting, ray_cluster
from llama_lite.data.tokenizer import Encoder, gpt2_tokenizer, train_tokenizer
from llama_lite.errors import Refusal

RULES = {"min_characters": 20, "exact_dedup": True, "minhash_dedup": True}


@pytest.fixture(scope="module")
def cluster():
    """A cluster of this machine with one CPU at its head; nodes are added to it."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        head = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
        cluster.shutdown()


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a prepared and a curated folder, but the logs and times of datatrove's stages."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "stages" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_a_cluster_gives_the_bytes_of_one_process_also_when_a_node_is_killed(cluster, text, tmp_path, monkeypatch):
    lines, folder = text.read_text(encoding="utf-8").splitlines(keepends=True), tmp_path / "text"
    folder.mkdir()
    for number in range(4):  # with equal and nearly equal texts of one another
        again = [line.replace(" the ", " a ", 1) for line in lines[number + 4 : 200 : 8]]
        (folder / f"{number}.jsonl").write_text("".join([*lines[number::4], *lines[:20], *again]), encoding="utf-8")
    common = {"dataset": str(folder), **RULES, "shard_tokens": 20_000}
    monkeypatch.setattr("llama_lite.data.curation.TASK_BYTES", 30_000)  # of the driver, which divides the text
    monkeypatch.setattr(ray_cluster, "TASK_BYTES", 50_000)
    here = prepare(tmp_path, **common, prepared_dir=str(tmp_path / "here" / "tokens"))
    node = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    there = tmp_path / "there"

    def kill() -> None:
        """Kill the second node when the first task of curation is done."""
        while not list(there.glob("curated/*/curation/stages/*/completions/*")):
            time.sleep(0.01)
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    found = prepare(tmp_path, **common, prepared_dir=str(there / "tokens"), prepare_on="ray")
    killer.join()
    assert found == here and found["documents"] > 100 and len(found["splits"]["train"]["shards"]) > 2
    assert files_of(there) == files_of(tmp_path / "here")


@pytest.mark.slow
@pytest.mark.parametrize("rules", [{}, RULES], ids=["encoding", "curating"])
def test_what_a_task_refuses_the_command_refuses(cluster, tmp_path, rules):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.compress(lines)[:-40])
    with pytest.raises(Refusal, match=r"^rows.jsonl.zst is damaged"):
        prepare(tmp_path, **rules, dataset=str(tmp_path / "rows.jsonl.zst"), tokenizer="gpt2", prepare_on="ray")


def write_divided(path: Path, end: str) -> Path:
    path.write_bytes(end.join(f"{row['text']}{end}{row['id']}" for row in ROWS).encode())
    return path


KINDS = {
    "jsonl": lambda path: jsonl(path, [row["text"] for row in ROWS]),
    "jsonl.zst": lambda path: path.write_bytes(zstandard.compress(jsonl(path, [r["text"] for r in ROWS]).read_bytes())),
    "csv": lambda path: path.write_text("text\n" + "".join(f"{row['text']}\n" for row in ROWS)),
    "txt": lambda path: write_divided(path, "\n###\n"),
    "crlf.txt": lambda path: write_divided(path, "\r\n###\r\n"),
    "utf-16.jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-16"),
}


@pytest.mark.parametrize(("kind", "limit"), [*((kind, None) for kind in KINDS), ("jsonl", 5000)])
def test_a_file_that_is_read_from_a_part_on_is_the_rest_of_it(tmp_path, monkeypatch, kind, limit):
    monkeypatch.setattr(cutting, "PART_BYTES", 100)
    monkeypatch.setattr(cutting, "PART_ROWS", 2)
    path = tmp_path / f"rows.{kind}"
    KINDS[kind](path)
    (file,) = source_of(path, max_bytes=limit, separator="\n###\n").files
    whole = list(cutting.parts(file))
    found = ray_cluster.part_starts(file)
    assert sum(count for _, count in found) == len(whole) and len(found) > 1
    assert [start.part for start, _ in found] == list(range(0, len(whole), ray_cluster.PARTS_PER_TASK))
    assert (found[-1][0].offset is None) == (not file.is_seekable)
    assert file.is_seekable == (kind.endswith("txt") or kind.endswith("jsonl"))
    for start, count in found:
        assert list(cutting.parts(file, start=start))[:count] == whole[start.part : start.part + count]
    assert [piece.start.part for piece in ray_cluster.cut(0, file, found, first=17)] == [
        start.part for start, _ in found[1:]
    ]


@pytest.mark.parametrize("dataset", ["installed-docs", "text"])
def test_small_files_are_encoded_together_each_once_and_in_order(tmp_path, monkeypatch, dataset):
    for number in range(30):
        jsonl(tmp_path / f"{number:02d}.jsonl", ["word " * 100 * number])
    source = source_of(tmp_path if dataset == "text" else dataset)
    monkeypatch.setattr(ray_cluster, "TASK_BYTES", 20_000 if dataset == "text" else 3_000_000)
    cluster = object.__new__(ray_cluster.Cluster)  # which no large file is searched on
    cluster.cpus = 2
    groups = list(cluster.pieces(source, {"file": 5, "part": 2}))
    pieces = [piece for group in groups for piece in group]
    assert [(piece.index, piece.file) for piece in pieces] == list(enumerate(source.files))[5:]
    assert len(groups) > 3 and [piece.start.part for piece in pieces] == [2, *[0] * (len(pieces) - 1)]
    sizes = [sum(ray_cluster.size_of(piece.file) for piece in group) for group in groups]
    assert all(size <= ray_cluster.TASK_BYTES or len(group) == 1 for size, group in zip(sizes, groups, strict=True))


def test_an_encoder_travels_without_transformers_and_gives_the_same_ids():
    import pickle

    texts = [text for text in HARD if len(text) < 10_000]  # a million blanks take their time
    for tokenizer in (gpt2_tokenizer(), train_tokenizer(iter(HARD), 400)):
        encoder = Encoder(tokenizer)
        packed = pickle.dumps(encoder.without_transformers())
        assert b"transformers" not in packed and b"transformers" in pickle.dumps(encoder)
        found = pickle.loads(packed)
        expected, ids = encoder.batch(texts), found.batch(texts)
        assert all((a == b).all() for a, b in zip(expected[:2], ids[:2], strict=True)) and expected[2] == ids[2]
        found.fast = None
        assert [found(text).tolist() for text in texts] == [encoder._slow_ids(text) for text in texts]


def test_a_node_that_does_not_see_the_same_is_named(tmp_path):
    here, path = ray_cluster.code_versions(), tmp_path / ".seen"
    path.write_text("x")
    text = jsonl(tmp_path / "text.jsonl", ["one"])
    (file,) = source_of(text).files
    files = ray_cluster._sample((file,))
    assert ray_cluster.node_problem([(str(path), "x")], files, here) == ""
    assert f"does not see {tmp_path}: use folders" in ray_cluster.node_problem([(str(path), "y")], files, here)
    assert "does not see" in ray_cluster.node_problem([(str(tmp_path / ".other"), "x")], files, here)
    other = ray_cluster.node_problem([], files, {**here, "tokenizers": "0.1"})
    assert f"tokenizers {here['tokenizers']} instead of 0.1" in other
    text.write_text("longer than before, so another text")
    assert f"does not see the text: {text} of" in ray_cluster.node_problem([], files, here)
    package = source_of("installed-docs").files[:2]
    assert ray_cluster.node_problem([], ray_cluster._sample(package), here) == ""


def test_a_folder_that_was_made_for_the_check_is_removed_again(tmp_path):
    with ray_cluster._marker(tmp_path / "a" / "b") as (path, content):
        assert Path(path).read_text() == content
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("address", [None, "ray://127.0.0.1:10001", "127.0.0.1:9"])
def test_a_cluster_that_is_not_named_is_refused_before_anything_is_written(tmp_path, monkeypatch, address):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    text = jsonl(tmp_path / "text.jsonl", ["one"] * 9)
    message = f"RAY_ADDRESS is {address or 'not set'}. Run the command on a node"
    if address == "127.0.0.1:9":
        message = r"no Ray cluster answers at RAY_ADDRESS=127.0.0.1:9 \(.*refused"
    with pytest.raises(Refusal, match=message):
        prepare(tmp_path, dataset=str(text), prepare_on="ray")
    assert not (tmp_path / "tokens").exists()


def test_a_missing_ray_is_refused_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        Refusal, match=r"--prepare_on ray needs the package ray.*pip install -r requirements-extras.txt"
    ):
        parse_pretrain(["--prepare_on", "ray"])


def test_a_dry_run_says_the_tasks_and_writes_nothing(settings, pretrain, tmp_path, capsys):
    folder = tmp_path / "run"
    new = {"prepared_dir": str(tmp_path / "tokens"), "prepare_on": "ray", **RULES}
    pretrain(folder, "--dry_run", **new)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("prepares on Ray"))
    assert line.endswith("19 tasks in 6 stages curate the text, then at most 1 task of 16 MB encodes it")
    assert not folder.exists() and not (tmp_path / "tokens").exists()
