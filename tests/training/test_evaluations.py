"""A run saves before it evaluates: what an evaluation meets costs no step, and a resumed run makes what is due."""

import random
import shutil

import numpy as np
import pytest
import torch
from helpers import log_of, same_tensors

from llama_lite.checkpoint.verify import find_corruption
from llama_lite.data.dataset import TokenWindows
from llama_lite.evaluation import lm, store
from llama_lite.files import read_json, read_jsonl
from llama_lite.run_folder import RunFolder
from llama_lite.training import loss_trends, validation
from llama_lite.training.callbacks import samples, task_scores
from llama_lite.training.callbacks.health import Health
from llama_lite.training.callbacks.progress import Progress
from llama_lite.training.trainer import PretrainTrainer, VerifiedTraining

pytestmark = pytest.mark.usefixtures("undrawn")


class Killed(BaseException):
    """What no code of the run catches."""


def test_a_run_killed_in_its_evaluation_ends_as_the_one_that_was_not(pretrain, whole_run, tmp_path, monkeypatch):
    """Between the validation loss and the samples of the last step. Evaluations draw numbers here, and those of the
    whole run did not: the random state stays as it was.
    """
    held_out_metrics, on_evaluate = PretrainTrainer.held_out_metrics, samples.Samples.on_evaluate

    def drawing(self):
        random.random(), np.random.rand(), torch.rand(1)
        return held_out_metrics(self)

    def killed(self, args, state, control, **kwargs):
        if state.global_step == 12:
            raise Killed
        on_evaluate(self, args, state, control, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "held_out_metrics", drawing)
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(samples.Samples, "on_evaluate", killed)
        pretrain(run)
    last = run / "checkpoint-12"
    assert find_corruption(last) == [] and read_json(last / "progress.json")["evaluation_due"]
    assert not (run / "model.safetensors").exists() and log_of(run) == log_of(whole_run)[:-1]
    pretrain(run)
    assert log_of(run) == log_of(whole_run) and read_json(run / "status.json")["status"] == "finished"
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert same_tensors(last / name, whole_run / "checkpoint-12" / name), name
    assert (last / "rng_state.pth").read_bytes() == (whole_run / "checkpoint-12/rng_state.pth").read_bytes()


PLACES = [  # (owner, name, error): step N of the run meets the N-th in its evaluation
    (PretrainTrainer, "held_out_metrics", RuntimeError),
    (PretrainTrainer, "compute_loss", torch.OutOfMemoryError),
    (VerifiedTraining, "sum_of_ranks", ValueError),
    (PretrainTrainer, "_prepare_inputs", AttributeError),
    (TokenWindows, "__getitem__", OSError),
    (validation, "without_router_loss", TypeError),
    (PretrainTrainer, "log", OverflowError),
    (Progress, "on_log", UnicodeEncodeError),
    (RunFolder, "log", PermissionError),
    (Health, "on_evaluate", ZeroDivisionError),
    (loss_trends, "saturation", FloatingPointError),
    (samples.Samples, "on_evaluate", RuntimeError),
    (samples, "context_of", AttributeError),
    ("model", "generate", torch.OutOfMemoryError),
    ("tokenizer", "decode", KeyError),
    (task_scores.TaskScores, "on_evaluate", RuntimeError),
    (lm, "SharedContextLM", ImportError),
    (lm, "run", MemoryError),
    (store, "samples_of", IndexError),
    (store, "metrics_of", AssertionError),
    (task_scores, "shown_metric", StopIteration),
]


def test_whatever_fails_in_an_evaluation_its_step_is_saved(pretrain, tmp_path, monkeypatch):
    """Each step evaluates, and fails at another place; training goes on, and the failure is recorded."""
    now = {}
    evaluate = PretrainTrainer.evaluate

    def failing(self, *args, **kwargs):
        owner, name, kind = PLACES[self.state.global_step - 1]
        owner = {"model": type(self.model), "tokenizer": type(self.processing_class)}.get(owner, owner)
        error = kind("utf-8", "x", 0, 1, "no") if kind is UnicodeEncodeError else kind("broken")

        def fail(*_, **__):
            step = self.state.global_step  # saved, or being written by the thread
            folders = {path.name for path in self.run.path.iterdir()}
            now[step] = bool(folders & {f"checkpoint-{step}", f".staging-{step}"})
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "evaluate", failing)
    steps = len(PLACES)
    every = {"eval_steps": 1, "save_steps": 1, "logging_steps": 1, "max_steps": steps, "save_total_limit": None}
    few = {"tokens_per_step": 512, "eval_windows": 4, "sample_tokens": 2, "eval_task_limit": 1, "probe_windows": 1}
    run = pretrain(tmp_path / "run", **every, **few, eval_tasks=["embedded_next_sentence"])
    assert now == dict.fromkeys(range(1, steps + 1), True)  # the place was met, and the save had begun by then
    saved = [event["step"] for event in read_jsonl(run / "events.jsonl") if event["event"] == "saved"]
    assert saved == list(range(1, steps + 1))
    failures = [event for event in read_jsonl(run / "events.jsonl") if event["event"] == "evaluation failed"]
    assert {event["at_step"] for event in failures} == set(now)
    assert all(event["part"] and event["reason"] for event in failures)
    assert [event["part"] for event in failures if event["at_step"] in (1, 10, 14, 18)] == [
        "validation loss",
        "Health",
        "Samples",
        "TaskScores",
    ]
    log = read_jsonl(run / "log.jsonl")
    assert {entry["step"] for entry in log if "samples" in entry} >= {1, 2, 3, 16, 17, 18}  # the other parts are made
    assert read_json(run / "status.json")["step"] == steps
    shutil.rmtree(run)
