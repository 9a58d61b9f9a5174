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


def score(model: str, tokens: int | None, value: float, **changes) -> dict:
    row = {"task": "t", "metric": "acc", "value": value, "low": value - 0.1, "high": value + 0.1, "chance": 0.25}
    return {**row, "model": model, "tokens": tokens, "adapter": None, **changes}


def drawn(rows: list[dict], tmp_path, monkeypatch) -> tuple[list, list, list]:
    """(lines of (color, x, y), levels, names in the legend) of a trajectory of one task."""
    found = []
    monkeypatch.setattr(figures, "save", lambda figure, path: found.append(figure))
    figures.trajectory(rows, tmp_path / "a.png")
    (panel,), legends = found[0].axes, found[0].legends
    curves = [line for line in panel.get_lines() if line.get_marker() == "o"]
    lines = [(line.get_color(), list(line.get_xdata()), list(line.get_ydata())) for line in curves]
    levels = [line.get_ydata()[0] for line in panel.get_lines() if line not in curves]
    return lines, levels, [text.get_text() for legend in legends for text in legend.get_texts()]


def test_each_run_has_a_line_and_other_models_are_levels(tmp_path, monkeypatch):
    first = [score(f"runs/a@step-{step}", step * 10**6, step / 10) for step in (2, 1, 3)]
    second = [score(f"you/b@step-{step}", step * 10**6, step / 20) for step in (1, 2)]
    others = [
        score("runs/c", 9 * 10**6, 0.9),  # of its run no other step
        score("runs/a+runs/a-sft", 3 * 10**6, 0.8, adapter="runs/a-sft"),
        score("gpt2", None, 0.7, low=None, high=None),
    ]
    a, b = ([1.0, 2.0, 3.0], [0.1, 0.2, 0.3]), ([1.0, 2.0], [0.05, 0.1])
    lines, levels, legend = drawn([*first, *second, *others], tmp_path, monkeypatch)
    assert lines == [(figures.BLUE, *a), (figures.ORANGE, *b)]
    assert levels == [0.9, 0.8, 0.7, 0.25] and legend == ["a", "b"]
    assert drawn([*first, others[0]], tmp_path, monkeypatch) == ([(figures.BLUE, *a)], [0.9, 0.25], [])
    assert drawn([first[0], second[0]], tmp_path, monkeypatch) == ([], [0.2, 0.05, 0.25], [])
    renamed = [{**row, "model": row["model"].replace("you/b", "you/a")} for row in second]
    assert drawn([*first, *renamed], tmp_path, monkeypatch)[2] == ["runs/a", "you/a"]


def test_every_model_of_many_is_drawn(tmp_path, monkeypatch):
    """More of them than colors: they begin again. The 55th used to be no color, and the evaluation had no card."""
    rows = [score(f"m{number}", None, 0.5) for number in range(60)]
    assert len(drawn(rows, tmp_path, monkeypatch)[1]) >= 60
