"""A run that goes on without some documents ends as one that never read them, or is refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import log_of, same_tensors

from llama_lite.commands.trace import main as trace_main
from llama_lite.data.document_index import DocumentIndex
from llama_lite.data.removal import Removal
from llama_lite.data.run_windows import windows_of_run
from llama_lite.errors import Refusal
from llama_lite.files import read_json, read_jsonl, write_json
from llama_lite.training.removal import check_removal
from llama_lite.training.trainer import ResumePoint

pytestmark = pytest.mark.usefixtures("undrawn")

PER_STEP = 16  # windows


@pytest.fixture(scope="module")
def reads(whole_run, settings):
    """A function from a step of `whole_run` to the documents that it reads for the first time, and no validation
    window.
    """
    folder = Path(settings["prepared_dir"])
    manifest, data = read_json(folder / "manifest.json"), read_json(whole_run / "run.json")["identity"]["data"]
    train = windows_of_run({manifest["fingerprint"]: (folder, manifest)}, data, 12)
    index, size = DocumentIndex(folder, manifest), data["block_size"]
    ranges = [(window * size, window * size + size + 1) for window in map(train.window_of, range(12 * PER_STEP))]
    spans, seen, first = index.documents("train", ranges), set(), {}
    for position, found in enumerate(spans):
        for span in found:
            if span.location not in seen and span.first > 0:
                first.setdefault(position // PER_STEP + 1, []).append(span.location)
            seen.add(span.location)
    return first


def listed(folder: Path, *names: str) -> str:
    path = folder / f"list-{len(names)}-{abs(hash(names))}.txt"
    path.write_text("\n".join(names))
    return str(path)


@pytest.mark.slow
def test_a_run_that_goes_on_without_documents_ends_as_one_that_never_read_them(
    pretrain, whole_run, reads, tmp_path, capsys
):
    names = listed(tmp_path, reads[11][0], reads[12][0])
    start = {"resume_from_checkpoint": str(whole_run / "checkpoint-10"), "without_documents": names}
    pretrain(tmp_path / "planned", "--dry_run", **start)
    assert "without   2 listed documents: " in capsys.readouterr().out and not (tmp_path / "planned").exists()
    resumed = pretrain(tmp_path / "resumed", **start)
    assert "without   2 listed documents: " in capsys.readouterr().out
    fresh = pretrain(tmp_path / "fresh", without_documents=names)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert same_tensors(resumed / "checkpoint-12" / name, fresh / "checkpoint-12" / name), name
        assert not same_tensors(resumed / "checkpoint-12" / name, whole_run / "checkpoint-12" / name), name
    assert log_of(resumed) == log_of(fresh)
    identities = [read_json(run / "run.json")["identity"]["data"] for run in (resumed, fresh)]
    assert identities[0] == identities[1] and identities[0]["without_documents"]["documents"] == 2
    assert read_json(resumed / "run.json")["id"] != read_json(whole_run / "run.json")["id"]
    (changed,) = [entry for entry in read_jsonl(resumed / "events.jsonl") if entry["event"] == "changed"]
    assert changed["fields"]["without_documents"][0] is None
    assert (
        "2 documents" in (resumed / "README.md").read_text() and reads[11][0] not in (resumed / "README.md").read_text()
    )

    capsys.readouterr()
    trace_main([str(resumed), "--document", reads[11][0], "--json"])
    (found,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert found["document"]["name"] == reads[11][0] and not found["reads"], found
    trace_main([str(resumed), "--step", "12", "--json"])
    assert reads[12][0] not in capsys.readouterr().out

    # the same command again goes on in its own folder; a list that grew starts from a checkpoint of its own
    pretrain(resumed, **start)
    out = capsys.readouterr().out
    assert (
        "has saved checkpoints since this command last started it, and goes on from the newest" in out
        and "nothing to do" in out
    )
    more = listed(tmp_path, reads[11][0], reads[12][0], reads[12][-1])
    with pytest.raises(Refusal, match=r"goes on as it began.*Give the new one an --output_dir"):
        pretrain(fresh, without_documents=more)
    with pytest.raises(Refusal, match="a list can only grow"):
        fewer = listed(tmp_path, reads[12][0])
        pretrain(tmp_path / "fewer", resume_from_checkpoint=str(fresh / "checkpoint-10"), without_documents=fewer)


def test_a_checkpoint_after_the_first_use_is_refused_with_the_one_to_start_from(pretrain, whole_run, reads, tmp_path):
    start = {"resume_from_checkpoint": str(whole_run / "checkpoint-12")}
    with pytest.raises(Refusal) as refused:
        pretrain(tmp_path / "run", **start, without_documents=listed(tmp_path, reads[11][0]))
    assert str(refused.value) == (
        f"--resume_from_checkpoint {whole_run}/checkpoint-12: step 11 of its run read a listed document, so its weights"
        f" hold it. Start from {whole_run}/checkpoint-10."
    )
    with pytest.raises(Refusal, match=r"step 2 of its run .* of step 1 or before, or from step 0"):
        pretrain(tmp_path / "run", **start, without_documents=listed(tmp_path, reads[11][0], reads[2][0]))
    with pytest.raises(Refusal, match="takes everything from the checkpoint"):
        pretrain(
            tmp_path / "run", **start, resume_without="optimizer", without_documents=listed(tmp_path, reads[12][0])
        )
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_revision_of_the_hub_becomes_another_run_or_is_removed_again(tmp_path):
    data = {
        "data": "w",
        "order": "shuffled",
        "order_version": 2,
        "data_seed": 7,
        "block_size": 4,
        "tokens_per_step": 40,
    }
    prepared = {"w": (Path("absent"), {"fingerprint": "w", "splits": {"train": {"tokens": 4 * 98 + 1, "shards": []}}})}
    train, run = windows_of_run(prepared, data, 9), SimpleNamespace(path=tmp_path)
    pulled = tmp_path / "checkpoint-4"
    start = ResumePoint(pulled, {"step": 4, "identity": {"data": data}})
    for position, refused in ((39, True), (40, False)):
        pulled.mkdir()
        write_json(tmp_path / "run.json", {"kind": "pretrain", "id": "theirs", "resumed_from": "you/name@step-000004"})
        removal = Removal(1, {"w": [train.window_of(position)]})
        if refused:
            with pytest.raises(Refusal, match="a checkpoint or a revision of step 3 or before"):
                check_removal(removal, prepared, run, start)
        else:
            assert check_removal(removal, prepared, run, start) == ("without_documents",)
        assert pulled.exists() != refused and ("id" in read_json(tmp_path / "run.json")) == refused
    with pytest.raises(Refusal, match="read other tokens"):
        check_removal(removal, {"x": prepared["w"]}, run, start)
