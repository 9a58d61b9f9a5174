"""Figures come from records alone, the same records give the same bytes, and torch is not needed."""

import subprocess
import sys

from helpers import ROOT

from llama_lite.files import read_jsonl
from model_card import figures


def test_curves_are_deterministic(whole_run, tmp_path):
    log = read_jsonl(whole_run / "log.jsonl")
    for name in ("a", "b"):
        figures.training_curves(log, {"unigram": 5.0, "bigram": 4.0}, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_a_log_that_ended_early_still_gives_a_figure(tmp_path):
    figures.training_curves(
        [{"loss": 5.0, "tokens": 10, "learning_rate": 1e-3, "grad_norm": 1.0}], {}, tmp_path / "a.png"
    )
    assert (tmp_path / "a.png").exists()


def test_model_card_never_imports_torch():
    code = "import sys, model_card.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_curation_figure(tmp_path):
    report = {"read": {"documents": 10, "characters": 1000}, "rules": [], "kept": {"documents": 1, "characters": 50}}
    report["rules"] = [{"rule": "at least 5 characters", "documents_dropped": 9, "characters_dropped": 950}]
    figures.curation(report, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 5_000


def test_each_validation_set_has_a_line(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        figures,
        "save",
        lambda figure, path: drawn.update({line.get_label(): line for line in figure.axes[0].get_lines()}),
    )
    log = [
        {"step": step, "tokens": step * 10**6, "eval_loss": 5 - step, "eval_web_loss": 4 - step, "eval_s_loss": 3.0}
        for step in (1, 2)
    ]
    figures.training_curves(log, {}, tmp_path / "a.png", sets=["web", "s"])
    assert {"validation", "validation: web", "validation: s"} <= drawn.keys()
    assert list(drawn["validation: web"].get_ydata()) == [3, 2] and list(drawn["validation: web"].get_xdata()) == [1, 2]
