"""What an evaluation of several sets says, from known losses."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama_lite.data.dataset import TokenWindows
from llama_lite.data.prepared import PreparedFolder, PreparedTokens
from llama_lite.training import validation
from llama_lite.training.callbacks.progress import is_beside_loss
from llama_lite.training.validation import ValidationSet, held_out_metrics, probe_windows, validation_sets

SAMPLE = [13, 62, 72, 59, 69, 17, 48, 33]  # of 100 windows


def held(name: str, bytes_per_token: float, weight: float, windows: int = 5) -> ValidationSet:
    manifest = {"fingerprint": name, "splits": {"validation": {"tokens": 4 * windows + 1, "shards": []}}}
    return ValidationSet(name, TokenWindows(Path("absent"), manifest, "validation", 4), bytes_per_token, weight)


def test_the_loss_is_the_mean_by_weight_and_bits_are_of_as_many_bytes(monkeypatch):
    losses = {"web": 3.0, "code": 1.0, "other": 9.0}
    monkeypatch.setattr(validation, "mean_loss", lambda trainer, windows: losses[windows.fingerprint])
    found = held_out_metrics(None, [held("web", 4.0, 0.75), held("code", 2.0, 0.25), held("other", 1.0, 0.0)])
    assert found["eval_loss"] == 2.5 and found["eval_perplexity"] == pytest.approx(math.exp(2.5))
    assert found["eval_bits_per_byte"] == pytest.approx(2.5 / math.log(2) / 3.5)
    assert [found[f"eval_{name}_loss"] for name in losses] == [3.0, 1.0, 9.0]
    assert found["eval_other_bits_per_byte"] == pytest.approx(9 / math.log(2))


def test_a_run_of_one_text_has_one_loss(monkeypatch):
    monkeypatch.setattr(validation, "mean_loss", lambda trainer, windows: 2.1)
    one = ValidationSet("", held("text", 4.0, 1.0).windows, 4.0, 1.0)
    assert held_out_metrics(None, [one]).keys() == {"eval_loss", "eval_perplexity", "eval_bits_per_byte"}
    assert held_out_metrics(None, [one])["eval_loss"] == 2.1


def test_the_probe_comes_from_the_folders_that_are_trained_on(monkeypatch):
    monkeypatch.setattr(TokenWindows, "window", lambda self, i: (self.fingerprint, i))
    sets = [held("web", 4.0, 0.75), held("code", 2.0, 0.25), held("other", 1.0, 0.0)]
    assert probe_windows(sets, 4) == [("web", 0), ("web", 1), ("web", 2), ("code", 0)]
    assert probe_windows([held("web", 4.0, 1.0, windows=2)], 8) == [("web", 0), ("web", 1)]


@pytest.mark.parametrize(
    "order, windows, measured",
    [
        ("shuffled", 5, SAMPLE[:5]),
        ("shuffled", 8, SAMPLE),  # more windows: the same ones first
        ("sequential", 5, [0, 1, 2, 3, 4]),
    ],
)
def test_the_sample_of_a_text_is_the_same_in_every_run(order, windows, measured):
    split = {"tokens": 4 * 100 + 1, "bytes": 1000, "shards": []}
    tokens = PreparedTokens([PreparedFolder("", Path("absent"), {"fingerprint": "0", "splits": {"validation": split}})])
    run = SimpleNamespace(block_size=4, eval_windows=windows, eval_order=order)
    (one,) = validation_sets(tokens, run)
    assert [one.windows.window_of(i) for i in range(len(one.windows))] == measured


def test_a_line_of_progress_shows_the_loss_of_a_set_alone():
    logs = dict.fromkeys(("eval_web_loss", "eval_web_perplexity", "eval_web_bits_per_byte", "eval_docs_bits_per_byte"))
    assert [name for name in logs if not is_beside_loss(name, logs)] == ["eval_web_loss", "eval_docs_bits_per_byte"]
