"""What users of earlier commits have on disk is still read: prepared tokens, a run, an adapter on it, and an evaluation
of both.

`compatibility/COMMIT` was made by the unmodified scripts of that commit (`compatibility/make.py`), of what lies in
`compatibility/inputs`. Stored numbers come back exactly. Computed ones come back to 1e-5: everything is float32, so
that any processor agrees that far.
"""

import csv
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import tensors_of

from llama_lite.commands import trace
from llama_lite.data.dataset import permuted
from llama_lite.errors import Refusal
from llama_lite.files import read_json, read_jsonl
from model_card.card import write

DATA = Path(__file__).parent / "compatibility"
OLDEST, BEFORE_MOVES = "cb29044", "f587f49"
TOLERANCE = 1e-5
MACHINE = (
    "mfu",
    "peak_memory_gib",
    "tokens_per_second",
)  # of a log: what another machine, or another day, gives otherwise
# of an evaluation: intervals and tests, which are today's also of answers that were kept
ESTIMATED = ("low", "high", "p", "p_holm", "detectable")
TABLES = (
    "scores.csv",
    "scores.json",
    "comparison.csv",
    "generalisation.json",
    "sensitivity.json",
    "contamination.json",
)


@pytest.fixture(params=[OLDEST, BEFORE_MOVES])
def made(request, tmp_path, monkeypatch, handlers) -> Path:
    """A copy of what a commit made, which is the working folder: its records name everything by relative paths, as its
    user did.
    """
    for name in ("inputs", request.param):
        shutil.copytree(DATA / name, tmp_path / name)
    monkeypatch.chdir(tmp_path / request.param)
    return tmp_path / request.param


def run(script: str, *argv: str) -> None:
    """The same command that made a folder, in this process."""
    __import__(f"run_{script}").main(["--config", f"{script}.yaml", *argv])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def close(found, stored, path: str = "") -> None:
    """Assert that JSON holds what is stored, floats to 1e-5 (above 10: of themselves), and maybe more."""
    if isinstance(stored, dict):
        assert stored.keys() <= found.keys(), path
        for name, value in stored.items():
            close(found[name], value, f"{path}.{name}")
    elif isinstance(stored, list):
        assert len(found) == len(stored), path
        for number, value in enumerate(stored):
            close(found[number], value, f"{path}[{number}]")
    elif isinstance(stored, float) and found is not None:
        assert found == pytest.approx(stored, rel=0, abs=TOLERANCE * max(1, abs(stored) / 10)), path
    else:
        assert found == stored, path


def logged(folder: Path) -> list[dict]:
    """log.jsonl without what depends on the machine; of samples, which are drawn, only that there were some."""
    rows = [
        {name: value for name, value in row.items() if name not in MACHINE} for row in read_jsonl(folder / "log.jsonl")
    ]
    return [{**row, "samples": len(row["samples"])} if "samples" in row else row for row in rows]


def check_weights(name: str, folder: Path, stored: Path) -> None:
    """Assert that the weights of a finished run are those that are stored (with other instruction sets they were 1.5e-8
    apart at most).
    """
    found, then = tensors_of(folder / name), tensors_of(stored / name)
    assert found.keys() == then.keys()
    assert max(float((found[key] - then[key]).abs().max()) for key in then) <= TOLERANCE


def check_changes(folder: Path) -> None:
    """Assert that a run which went on is the one that is stored, whoever gave its values: only machine, packages and
    code may be others.
    """
    changed = {
        event["kind"]: event["fields"] for event in read_jsonl(folder / "events.jsonl") if event["event"] == "changed"
    }
    assert changed.keys() <= {"environment", "layout"} and changed.get("layout", {}).keys() <= {"threads"}
    assert changed.get("environment", {}).keys() <= {"code_revision", "hardware", "packages"}


def test_prepared_tokens_are_accepted(made, capsys):
    before, manifest = contents(made / "prepared"), read_json(made / "prepared/manifest.json")
    run("pretrain", "--prepare_only")  # reads every byte, and would repair what is damaged
    said = capsys.readouterr().out
    assert {name: content for name, content in contents(made / "prepared").items() if name != ".lock"} == before
    for split, count in {"train": 13_224, "validation": 2_000}.items():
        ids = [np.load(path) for path in sorted((made / "prepared").glob(f"{split}-*.npy"))]
        assert sum(map(len, ids)) == manifest["splits"][split]["tokens"] == count and max(map(np.max, ids)) < 512
    assert (
        f"13,224 training and 2,000 validation tokens, vocabulary 512, fingerprint {manifest['fingerprint'][:12]}"
        in said
    )
    card = write(made / "prepared").read_text(encoding="utf-8")
    assert "13,224" in card and "2,000" in card and manifest["fingerprint"][:16] in card
    # The fingerprint of the first format counted where the text came from, too; of today's it is of the tokens alone.
    assert manifest["format"] == {OLDEST: "llama_lite.tokens/1", BEFORE_MOVES: "llama_lite.tokens/2"}[made.name]


def test_older_tokens_get_an_index_and_an_older_run_is_traced(made, capsys):
    before, data = read_json("prepared/manifest.json"), read_json("run/run.json")["identity"]["data"]
    with pytest.raises(Refusal, match=r"prepared has no index of documents .*--prepare_only --add_index"):
        trace.main(["run", "--step", "2"])
    shards = {path: path.stat().st_mtime_ns for path in Path("prepared").glob("*.npy")}
    run("pretrain", "--prepare_only", "--add_index")
    after = read_json("prepared/manifest.json")
    assert {key: after[key] for key in before if key != "digest"} == {
        key: before[key] for key in before if key != "digest"
    }
    assert {path: path.stat().st_mtime_ns for path in Path("prepared").glob("*.npy")} == shards
    capsys.readouterr()
    trace.main(["run", "--step", "2", "--json"])
    step = json.loads(capsys.readouterr().out)
    count = data["tokens_per_step"] // data["block_size"]
    epoch = (13_224 - 1) // data["block_size"] // count * count
    windows = range(count, 2 * count)
    if data["order"] == "shuffled":
        windows = [permuted(position, epoch, data["data_seed"]) for position in windows]
    assert [window["window"] for window in step["windows"]] == list(windows)
    assert all(window["documents"] for window in step["windows"])


def test_other_prepared_tokens_are_refused(made):
    """A run of earlier times is still told from another by its tokens."""
    shard = made / "prepared/train-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(Refusal, match=r"train-00000\.npy was altered"):
        run("pretrain")


def test_a_run_goes_on_from_its_middle(made, undrawn, capsys):
    """From step 5 of 10, between two logs: what its last checkpoint, which is not kept here, was made of comes
    again.
    """
    folder, stored = made / "run", DATA / made.name / "run"
    run("pretrain")
    said = capsys.readouterr().out
    assert "start     step 5, from run/checkpoint-5 in run" in said and "verified: probe loss" in said
    close(logged(folder), logged(stored))
    assert [row for row in read_jsonl(folder / "log.jsonl") if row["step"] < 5] == [
        row for row in read_jsonl(stored / "log.jsonl") if row["step"] < 5
    ]
    record = read_json(folder / "run.json")
    record.pop("last_start", None)  # of today's command
    assert record == read_json(stored / "run.json")
    assert read_json(folder / "status.json")["status"] == "finished" and (folder / "checkpoint-10").is_dir()
    check_weights("model.safetensors", folder, stored)
    check_changes(folder)


def test_an_adapter_goes_on_from_its_middle(made, undrawn, capsys):
    folder, stored = made / "adapter", DATA / made.name / "adapter"
    shutil.rmtree(folder / "checkpoint-6")
    run("sft")
    assert "start     step 3, from adapter/checkpoint-3 in adapter" in capsys.readouterr().out
    close(logged(folder), logged(stored))
    check_weights("adapter_model.safetensors", folder, stored)
    record = read_json(folder / "run.json")
    record.pop("last_start", None)  # of today's command
    assert record == read_json(stored / "run.json")
    check_changes(folder)


def test_a_finished_adapter_is_loaded_over_its_base(made, undrawn, capsys):
    """It is finished; where its model is lost, it is written again from the last checkpoint, and what it does with
    held-out rows is measured again.
    """
    folder, stored = made / "adapter", DATA / made.name / "adapter"
    run("sft")
    assert "adapter is finished (6 steps): nothing to do." in capsys.readouterr().out
    for name in ("adapter_model.safetensors", "before_after.json"):
        (folder / name).unlink()
    run("sft")
    assert contents(folder)["adapter_model.safetensors"] == contents(stored)["adapter_model.safetensors"]
    found, then = (read_json(place / "before_after.json") for place in (folder, stored))
    for name in ("answer_loss", "end_of_text_loss"):
        close(*(without(record[name], ESTIMATED) for record in (found, then)))
    assert found["answer_loss"]["after"] == pytest.approx(
        read_jsonl(stored / "log.jsonl")[-1]["eval_loss"], abs=TOLERANCE
    )


def without(value, names: tuple[str, ...]):
    """JSON without the entries of these names, at any depth."""
    if isinstance(value, list):
        return [without(one, names) for one in value]
    if isinstance(value, dict):
        return {name: without(one, names) for name, one in value.items() if name not in names}
    return value


def table(path: Path) -> list[dict]:
    """The rows of a table, numbers as numbers, without the day and what is ESTIMATED."""

    def value(text: str):
        try:
            return float(text)
        except ValueError:
            return text

    if path.suffix == ".json":
        rows = read_json(path)
    else:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]
    return without(rows, ("date", *ESTIMATED))


def test_an_evaluation_is_kept_or_made_again(made, undrawn, capsys):
    folder, stored = made / "evaluation", DATA / made.name / "evaluation"
    before = contents(folder)
    for name in TABLES:
        (folder / name).unlink()
    run("eval")
    said, after = capsys.readouterr().out, contents(folder)
    records = {name: content for name, content in before.items() if name.startswith(("results/", "samples/"))}
    assert records.items() <= after.items(), "nothing that is stored is lost"
    assert len(records) == 2 * (3 * 3 + 13)
    assert len(table(stored / "scores.csv")) == 3 * (2 + 2 + 1) + 13 * 2
    if made.name == BEFORE_MOVES:
        assert (
            said.count(", as before") == 3 * 3
            and {name for name in after if name.startswith(("results/", "samples/"))} == records.keys()
        )
        for name in TABLES:
            close(table(folder / name), table(stored / name), name)
        for part in ("results", "samples"):
            shutil.rmtree(folder / part)
        run("eval")
        said = capsys.readouterr().out
    # By design no record of cb29044 is kept: since 7d176b1 the key counts the model's config, too, and since 45c0ff8 a
    # record is sealed. They stay beside.
    assert ", as before" not in said and len(list((folder / "results").iterdir())) == (3 * 3 + 13) * (
        2 if made.name == OLDEST else 1
    )
    for name in TABLES:
        close(table(folder / name), table(stored / name), name)
    for row in read_json(folder / "scores.json"):  # stored ones of 10 items reach below 0
        assert row["metric"] == "bits_per_byte" or 0 <= row["low"] < row["high"] <= 1
    for row in csv.DictReader((folder / "comparison.csv").open()):
        assert row["family"] == "exploratory" and row["p_fdr"] and not row["p_holm"]


@pytest.mark.parametrize("folder", ["run", "adapter", "evaluation"])
def test_a_card_is_rendered_again(made, folder):
    """Its measured numbers, which have a decimal point, are those of the card that was written then. 0.5 was of the words
    on AUROC, which a card has no more where the model did not read the kind of text that it is compared with."""
    stored = (DATA / made.name / folder / "README.md").read_text(encoding="utf-8")
    card = write(Path(folder)).read_text(encoding="utf-8")
    number = re.compile(r"\d[\d,]*\.\d+")
    pairs = re.compile(
        r"^\|.* → .*$", re.MULTILINE
    )  # then from the first model to the last; now a base and its tuned one
    then, now = Counter(number.findall(pairs.sub("", stored))), Counter(number.findall(card))
    assert len(then) > 20 and not then - now - Counter({"0.5": 1})
