"""One function says what a folder is, and no command writes into one that belongs to something else."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from llama_lite.errors import Refusal
from llama_lite.files import write_json
from llama_lite.folder_kinds import KINDS, check_apart, check_folder, kind_of_folder

MADE = {  # kind: a folder's files
    "pretrain": {
        "run.json": {"kind": "pretrain", "id": "x"},
        "status.json": {"status": "finished"},
        "README.md": "a card",
    },
    "sft": {"run.json": {"kind": "sft", "id": "x"}, "adapter_config.json": {}},
    "eval": {"run.json": {"kind": "eval"}, "results/a.json": {}},
    "study": {"study.json": {"study": {"title": "T"}}},
    "audit": {"audit.json": {"format": "llama_lite.audit/1"}},
    "prepared": {
        "manifest.json": {"format": "llama_lite.tokens/2"},
        "recipe.json": {"tokenizer": "train"},
        "train-00000.npy": "x",
    },
    "curated": {"recipe.json": {"dataset": "x", "curation": {}}, "kept/00000.jsonl.zst": "x"},
    "checkpoint": {"manifest.json": {"format": "llama_lite.checkpoint/1"}, "model.safetensors": "x"},
    "revision": {"revision.json": {"format": "llama_lite.revision/1"}, "config.json": {}},
    "model": {"config.json": {}, "model.safetensors": "x", "README.md": "a person's own card"},
    "unknown run": {"run.json": "{", "checkpoint-4/manifest.json": {}},
    "foreign": {"cat.jpg": "meow"},
}
TAKES = {"pretrain": {"pretrain"}, "sft": {"sft"}, "eval": {"eval"}, "study": {"study"}, "prepare": {"prepared"}}


def make(folder: Path, kind: str) -> Path:
    for name, content in MADE[kind].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def content(folder: Path) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def commands(pretrain, sft, settings, base, tmp_path):
    """{command: a function of its output folder} of every command that writes."""
    import run_eval
    import run_study

    study = {
        "title": "T",
        "script": "run_pretrain.py",
        "reference": "a",
        "seeds": [1],
        "arms": {"a": {"set": {"max_grad_norm": 1}}},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**study, "config": str(tmp_path / "base.yaml")}))
    return {
        "pretrain": pretrain,
        "sft": sft,
        "eval": lambda folder: run_eval.main(
            ["--models", str(base), "--tasks", "embedded_docs", "--output_dir", str(folder)]
        ),
        "study": lambda folder: run_study.main(
            ["--config", str(tmp_path / "study.yaml"), "--prepare_only", "--output_dir", str(folder)]
        ),
        "prepare": lambda folder: pretrain(tmp_path / "unused", "--prepare_only", prepared_dir=str(folder)),
    }


@pytest.mark.parametrize("kind", MADE)
def test_no_command_touches_what_is_not_its_own(commands, tmp_path, kind):
    folder = make(tmp_path / "there", kind)
    before = content(folder)
    assert kind_of_folder(folder) == kind
    for name, command in commands.items():
        if kind not in TAKES[name]:
            with pytest.raises(Refusal, match=f"{folder} .*: choose another one") as refusal:
                command(folder)
            assert content(folder) == before, (name, str(refusal.value))
    assert not (tmp_path / "unused").exists()


def test_what_a_folder_is_is_told(tmp_path):
    for kind, words in KINDS.items():
        folder = make(tmp_path / kind, kind)
        with pytest.raises(Refusal) as refusal:
            check_folder("output_dir", folder, "study" if kind != "study" else "eval")
        assert (
            str(refusal.value) == f"--output_dir {folder} is {words}, and cannot become"
            f" {KINDS['study' if kind != 'study' else 'eval']}: choose another one."
        )


def test_an_empty_folder_and_what_a_refused_command_left_can_be_taken(tmp_path):
    assert kind_of_folder(tmp_path / "none") == kind_of_folder(tmp_path) == "empty"
    (tmp_path / ".lock").write_text("")
    check_folder("output_dir", tmp_path, "eval")
    (tmp_path / "status.json").write_text("{}")
    check_folder("output_dir", tmp_path, "sft")  # a run that ended before its run.json
    with pytest.raises(Refusal, match="holds files, but is not the folder of an evaluation"):
        check_folder("output_dir", tmp_path, "eval")
    make(tmp_path / "p" / "curated", "curated")
    check_folder(
        "prepared_dir", tmp_path / "p", "prepared"
    )  # its curated text lies in it, and nothing else was prepared
    with pytest.raises(Refusal, match="is a file, not a folder"):
        check_folder("output_dir", tmp_path / "status.json", "eval")


@pytest.mark.parametrize(
    "outer, inner, kind, refused",
    [
        ("pretrain", "evaluation/mine", "eval", True),  # where scripts hand a run its evaluations, and delete them
        ("pretrain", "checkpoint-4", "eval", True),
        ("pretrain", "mine", "eval", False),
        ("eval", "samples", "eval", True),
        ("checkpoint", "x/y", "eval", True),
        ("prepared", "x", "pretrain", True),  # would be published with the tokens
        ("prepared", "curated", "curated", False),
        ("study", "evaluation", "eval", False),
        ("study", "runs/a-seed-1", "pretrain", False),
    ],
)
def test_folders_within_folders(tmp_path, outer, inner, kind, refused):
    folder = make(tmp_path / "outer", outer)
    (tmp_path / "link").symlink_to(folder)
    for path in (folder / inner, tmp_path / "link" / inner):
        if not refused:
            check_folder("output_dir", path, kind)
            continue
        with pytest.raises(Refusal, match=rf"--output_dir {path} lies inside {folder}, .*{KINDS[outer][:12]}"):
            check_folder("output_dir", path, kind)


def test_a_run_and_its_text_have_folders_of_their_own(pretrain, tmp_path):
    with pytest.raises(
        Refusal, match=r"--output_dir .*/x and --prepared_dir .*/x are the same folder: give each a folder of its own"
    ):
        pretrain(tmp_path / "x", prepared_dir=str(tmp_path / "x"))
    with pytest.raises(Refusal, match=r"--output_dir .*/x and --prepared_dir .*/x/data overlap"):
        pretrain(tmp_path / "x", prepared_dir=str(tmp_path / "x" / "data"))
    assert not (tmp_path / "x").exists()
    check_apart(str(tmp_path / "x"), {"prepared_dir": str(tmp_path / "y"), "curated_dir": None})


def test_a_file_in_the_way_and_a_place_that_cannot_be_written_to(commands, tmp_path):
    (tmp_path / "file").write_text("")
    for command in commands.values():
        with pytest.raises(Refusal, match=r"file/x: .*file is a file, not a folder"):
            command(tmp_path / "file" / "x")
        with pytest.raises(Refusal, match=r"--(output|prepared)_dir /proc/nothing: nothing can be written to /proc"):
            command(Path("/proc/nothing"))


def test_an_evaluation_of_a_run_into_its_own_folder_loses_nothing(commands, whole_run, tmp_path):
    """It used to replace run.json and card, and to delete status.json: the run could not go on."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    before = content(run)
    with pytest.raises(
        Refusal, match=r"run is the folder of a pretraining run, and cannot become the folder of an evaluation"
    ):
        commands["eval"](run)
    assert content(run) == before
    write_json(run / "run.json", {"kind": "eval"})
    with pytest.raises(
        Refusal, match="is the folder of an evaluation, and cannot become the folder of a pretraining run"
    ):
        commands["pretrain"](run)


def test_a_suggestion_is_not_written_over_anything(sft, pretrain, tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    for command in (sft, pretrain):
        with pytest.raises(Refusal, match=r"--suggest .*mine.yaml: that file already exists"):
            command(tmp_path / "run", "--suggest", str(tmp_path / "mine.yaml"))
    assert (tmp_path / "mine.yaml").read_text() == "mine"
