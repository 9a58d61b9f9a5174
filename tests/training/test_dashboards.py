"""Dashboards: one dashboard run through all resumes, no step twice, and everything of the log arrives."""

import json
import os
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState

from llama_lite.files import read_json, read_jsonl, write_text
from llama_lite.run_folder import RunFolder
from llama_lite.training import dashboards, saving, trainer

BOTH = {"report_to": ["trackio", "tensorboard"], "eval_tasks": ["embedded_next_sentence"], "eval_task_limit": 4}


class Killed(BaseException):
    """What no code of the run catches."""


def rows_of_trackio(name: str) -> list[dict]:
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage.get_logs("huggingface", name)


def scalars_of_tensorboard(folder) -> tuple[dict[str, list[int]], list[str]]:
    """({tag: its steps}, tags of texts) of the event files in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in tags["scalars"]}
    return steps, [tag for tag in tags["tensors"] if "sample" in tag]


@pytest.fixture(scope="module")
def killed_and_resumed(settings, tmp_path_factory):
    """The folder of a run of 12 steps that reports to both, was killed at step 8, went on at 5, and was interrupted
    again at 7 before it finished.
    """
    from helpers import config_file, without_figures

    from run_pretrain import main

    place = tmp_path_factory.mktemp("dashboards")
    path = config_file(place, settings, output_dir=str(place / "run"), **BOTH)
    step = trainer.PretrainTrainer.training_step
    with pytest.MonkeyPatch.context() as patch, without_figures():
        for fatal in (8, 7):

            def dies(self, *args, fatal=fatal):
                if self.state.global_step == fatal:
                    raise Killed
                return step(self, *args)

            patch.setattr(trainer.PretrainTrainer, "training_step", dies)
            with pytest.raises(Killed):
                main(["--config", str(path)])
    with without_figures():
        main(["--config", str(path)])
    return place / "run"


def test_trackio_has_every_entry_of_the_log_once_in_one_run(killed_and_resumed):
    log, record = read_jsonl(killed_and_resumed / "log.jsonl"), read_json(killed_and_resumed / "dashboards.json")
    from trackio.sqlite_storage import SQLiteStorage

    name = record["links"]["trackio"]["name"]
    assert name == f"run-{record['id']}"
    assert [row for row in SQLiteStorage.get_runs("huggingface") if row.startswith("run-")] == [name]
    rows = rows_of_trackio(name)
    assert [row["step"] for row in rows if "train/loss" in row] == [e["step"] for e in log if "loss" in e]
    assert [row["step"] for row in rows if "eval/loss" in row] == [6, 12]
    assert [row["eval/loss"] for row in rows if "eval/loss" in row] == [e["eval_loss"] for e in log if "eval_loss" in e]
    assert [row["step"] for row in rows if "eval/embedded_next_sentence_acc_norm" in row] == [6, 12]
    texts = [row["eval/sample_1"] for row in rows if "eval/sample_1" in row]
    assert len(texts) == 2 and texts[0]["_type"] == "trackio.markdown"
    assert texts[1]["_value"] == f"```text\n{[e for e in log if 'samples' in e][-1]['samples'][0]}\n```"
    assert all("train/tokens_per_second" in row for row in rows if "train/loss" in row and row["step"] > 3)
    assert not any("train/resumed_from" in row for row in rows)


def test_tensorboards_files_are_in_the_run_folder_and_hold_no_step_twice(killed_and_resumed):
    steps, texts = scalars_of_tensorboard(killed_and_resumed / "tensorboard")
    assert steps["train/loss"] == [3, 6, 9, 12] and steps["eval/loss"] == [6, 12]
    assert steps["eval/embedded_next_sentence_acc_norm"] == [6, 12] and texts == ["eval/sample_1/text_summary"]
    assert [path.name for path in killed_and_resumed.iterdir() if path.is_dir() and "run" in path.name] == []


def test_what_a_changed_run_sends_again_is_marked(tmp_path):
    """The values differ then, so that they are sent, and the first entry says from where the run went on."""
    sent = []

    class Service(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            sent.append((state.global_step, logs))

    with RunFolder(tmp_path / "run") as run:
        write_text(run.path / "log.jsonl", "".join(f'{{"loss": 1.0, "step": {step}}}\n' for step in (3, 6)))
        start = trainer.ResumePoint(tmp_path, {"step": 3}, changed={"hyperparameters": {"learning_rate": [1, 2]}})
        assert dashboards.continuation(run, start, [], "id", None) is None
        changed = dashboards.continuation(run, start, ["service"], "id", None)
        start.changed.clear()
        again = dashboards.continuation(run, start, ["service"], "id", None)
        run.record_end = False
    assert changed.sent == {"service": {}} and again.id == changed.id
    assert again.sent["service"] == {"train": 6, "eval": 0, "samples": 0, "scores": 0}
    state = TrainerState(global_step=6)
    for found in (changed, again):
        service = type("Ours", (dashboards.Reported, Service), {"name": "service", "found": found})()
        for state.global_step in (6, 9):
            service.on_log(None, state, TrainerControl(), logs={"loss": 2.0, "samples": ["a"]})
    assert sent == [(6, {"loss": 2.0, "resumed_from": 3}), (9, {"loss": 2.0}), (9, {"loss": 2.0})]


@pytest.mark.parametrize("name", ["trackio", "tensorboard"])
def test_training_does_not_wait_for_saves_because_of_a_dashboard(name):
    """It reads no checkpoint; a callback of a user may."""
    assert not saving.reads_checkpoint(dashboards.OWN[name]())
    own = type("Own", (dashboards.OWN[name],), {"on_save": lambda self, *args, **kwargs: None})
    assert saving.reads_checkpoint(own())


def test_a_dashboard_that_fails_does_not_end_the_run_and_says_so_once(tmp_path, capsys):
    class Service(TrainerCallback):
        def on_log(self, *args, **kwargs):
            raise ConnectionError("no route to host")

    found = dashboards.Continuation(tmp_path, "id", {"service": {}}, {}, None)
    service = type("Ours", (dashboards.Reported, Service), {"name": "service", "found": found})()
    for step in (1, 2):
        service.on_log(None, TrainerState(global_step=step), TrainerControl(), logs={"loss": 1.0})
    said = capsys.readouterr().out
    assert said.count("--report_to service failed") == 1 and "ConnectionError: no route to host" in said


def test_wandb_and_mlflow_are_continued_by_the_ids_that_they_read(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RESUME", "must")
    for name in ("WANDB_RUN_ID", "WANDB_DIR", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    found = dashboards.Continuation(tmp_path / "mine", "0a1b2c3d", {}, {"mlflow": {"id": "f00"}}, 5)
    training = SimpleNamespace(run_name=None, report_to=["wandb", "mlflow"])
    with dashboards.environment(found, training):
        assert os.environ["WANDB_RUN_ID"] == "0a1b2c3d" and os.environ["WANDB_RESUME"] == "must"
        assert os.environ["MLFLOW_RUN_ID"] == "f00" and os.environ["WANDB_DIR"] == str(tmp_path / "mine")
        assert training.run_name == "mine-0a1b2c3d"
    assert "WANDB_RUN_ID" not in os.environ and "MLFLOW_RUN_ID" not in os.environ
    named = SimpleNamespace(run_name="my name", report_to=["tensorboard"])
    with dashboards.environment(found, named):
        assert named.run_name == "my name" and "WANDB_RUN_ID" not in os.environ


def test_a_run_that_publishes_finds_its_dashboard_run_from_another_machine(tmp_path):
    found = []
    for place in ("one", "two"):
        with RunFolder(tmp_path / place) as run:
            start = trainer.ResumePoint(tmp_path, {"step": 3})
            found.append(dashboards.continuation(run, start, ["wandb"], "id", "you/demo"))
            found.append(dashboards.continuation(run, trainer.ResumePoint(), ["wandb"], "id", None))
            run.record_end = False
    assert found[0].id == found[2].id and len({one.id for one in found}) == 3
    assert json.loads((tmp_path / "one/dashboards.json").read_text())["id"] == found[1].id
