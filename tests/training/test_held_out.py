"""The validation number is the mean over every window, or answer token, that was asked for, whatever the batches and
the processes.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from llama_lite import files
from llama_lite.data.dataset import Order, TokenWindows
from llama_lite.training import sft_trainer, validation
from llama_lite.training import trainer as training_trainer

pytestmark = pytest.mark.usefixtures("undrawn")

WINDOWS = 13


@pytest.fixture
def over_processes(monkeypatch):
    """What an evaluation of a trainer gives with so many windows in a batch, and as two processes one after the other
    would add it up.
    """

    def measured(trainer, size: int, processes: int = 1) -> float:
        sums = []
        with monkeypatch.context() as patch:
            patch.setattr(trainer.args, "per_device_eval_batch_size", size)
            patch.setattr(validation, "WORLD_SIZE", processes)
            patch.setattr(sft_trainer, "WORLD_SIZE", processes)
            patch.setattr(
                trainer, "sum_of_ranks", lambda values: sums.append(values) or [max(value, 1) for value in values]
            )
            for rank in range(processes):
                patch.setattr(type(trainer.args), "process_index", rank)
                trainer.model.eval()
                trainer.held_out_metrics()
        loss, tokens = (sum(values[i] for values in sums) for i in (0, 1))
        return loss / tokens

    return measured


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_every_window_is_measured_once_under_any_batch_and_number_of_processes(
    pretrain, settings, tmp_path, monkeypatch, over_processes, order
):
    from transformers import AutoModelForCausalLM

    found, evaluate = {}, training_trainer.PretrainTrainer.evaluate

    def spied(self, *args, **kwargs):
        found["logged"] = evaluate(self, *args, **kwargs)["eval_loss"]
        found.update(
            {(size, count): over_processes(self, size, count) for size in (1, 5, 8, 64) for count in (1, 2, 3)}
        )
        return {}

    monkeypatch.setattr(training_trainer.PretrainTrainer, "evaluate", spied)
    run = pretrain(
        tmp_path / "run",
        eval_windows=WINDOWS,
        eval_order=order,
        max_steps=1,
        sample_tokens=0,
        precision="float32",
        per_device_eval_batch_size=8,
    )
    ids = torch.from_numpy(np.load(Path(settings["prepared_dir"]) / "validation-00000.npy").astype(np.int64))
    folder = Path(settings["prepared_dir"])
    drawn = TokenWindows(folder, files.read_json(folder / "manifest.json"), "validation", 64, Order("shuffled", seed=0))
    indices = [drawn.window_of(i) if order == "shuffled" else i for i in range(WINDOWS)]
    rows = torch.stack([ids[i * 64 : i * 64 + 65] for i in indices])
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint-1", dtype=torch.float32).eval()
    with torch.no_grad():
        log_p = model(rows[:, :-1]).logits.log_softmax(-1)
    expected = -log_p.gather(2, rows[:, 1:, None]).double().mean().item()
    assert len(found) == WINDOWS and found == {key: pytest.approx(expected, abs=1e-5) for key in found}


def test_fewer_windows_than_a_batch_are_measured(pretrain, tmp_path):
    from llama_lite.files import read_jsonl

    run = pretrain(tmp_path / "run", eval_windows=4, max_steps=1, sample_tokens=0, per_device_eval_batch_size=8)
    assert [entry["eval_loss"] > 0 for entry in read_jsonl(run / "log.jsonl") if "eval_loss" in entry] == [True]


def test_a_tuning_runs_number_is_the_same_under_any_batch_and_number_of_processes(
    sft, tmp_path, monkeypatch, over_processes
):
    found, evaluate = {}, sft_trainer.TuningTrainer.evaluate

    def spied(self, *args, **kwargs):
        found["logged"] = evaluate(self, *args, **kwargs)["eval_loss"]
        found.update({(size, count): over_processes(self, size, count) for size in (1, 3, 64) for count in (1, 2, 3)})
        self.model.train()
        return {}

    monkeypatch.setattr(sft_trainer.TuningTrainer, "evaluate", spied)
    run = sft(tmp_path / "run", max_steps=1, precision="float32", sampled_answers=1, compared_prompts=1)
    expected = files.read_json(run / "before_after.json")["answer_loss"]["after"]
    assert len(found) == 10 and found == {key: pytest.approx(expected, abs=1e-5) for key in found}
