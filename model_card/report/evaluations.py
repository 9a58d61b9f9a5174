"""What a page shows of an evaluation: scores along training, items, calibration, and variants of prompts."""

import json
from pathlib import Path

from ..facts import Facts
from ..records import Evaluation, metric_key, run_of
from ..sections.evaluation import Evaluation as Scores
from . import items
from .values import short


def evaluation_page(facts: Facts, evaluation: Evaluation) -> dict:
    """{name, models, tasks, grids, sensitivity, robustness} of an evaluation.

    A model is {name, run, step, tokens}; `run` is None of a model that is no step of a training run. A task is {task,
    metric, chance, scores: [value, low, high, items] per model}.
    """
    rows = evaluation.shown()
    asked = list(dict.fromkeys(row["model"] for row in rows))
    first = {row["model"]: row for row in reversed(rows)}
    models = sorted(asked, key=lambda name: _order(first[name], asked))
    tasks = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = {row["model"]: row for row in rows if row["task"] == task}
        any_row = next(iter(of_task.values()))
        tasks.append(
            {
                "task": task,
                "metric": metric_key(any_row["metric"], any_row.get("filter")),
                "chance": short(any_row.get("chance")),
                "scores": [
                    [short(of_task[name][key]) for key in ("value", "low", "high", "n")] if name in of_task else None
                    for name in models
                ],
            }
        )
    return {
        "name": evaluation.name,
        "models": [
            {
                "name": Scores(facts).called(evaluation, name),
                "run": None if first[name]["adapter"] or first[name]["step"] is None else run_of(name),
                "step": first[name]["step"],
                "tokens": first[name]["tokens"],
            }
            for name in models
        ],
        "tasks": tasks,
        "grids": [_arranged(grid, models) for grid in grids_of(facts.r.folder, evaluation)],
        **{kind: _variants(facts, evaluation, kind) for kind in ("sensitivity", "robustness")},
    }


def _order(row: dict, models: list[str]) -> tuple:
    """Steps of a run by their step, runs in the order that was asked for, all that is no step of a run behind."""
    runs = list(dict.fromkeys(map(run_of, models)))
    is_step = row["step"] is not None and not row["adapter"]
    return (not is_step, runs.index(run_of(row["model"])), row["step"] or 0, models.index(row["model"]))


def grids_of(folder: Path, evaluation: Evaluation) -> list[dict]:
    """The items of an evaluation: of its own folder from its answers, in the folder of a run from the copy."""
    if evaluation.own is None:
        return items.grids(folder, evaluation.scores)
    run = folder if (folder / "run.json").exists() else folder.parent  # RUN/merged has its records in RUN
    path = run / "evaluation" / evaluation.name / items.NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _arranged(grid: dict, models: list[str]) -> dict:
    """A grid with its columns in the order of `models`, and without their names."""
    order = [grid["models"].index(name) if name in grid["models"] else None for name in models]

    def row(values):
        return [None if index is None else values[index] for index in order]

    found = {name: value for name, value in grid.items() if name not in ("models", "right")}
    for name in {"p", "values"} & set(grid):
        found[name] = [row(values) for values in grid[name]]
    for metric, texts in grid.get("right", {}).items():
        found.setdefault("right", {})[metric] = ["".join(one or "-" for one in row(text)) for text in texts]
    return found | {"calibration": [grid["calibration"].get(name) for name in models]}


def _variants(facts: Facts, evaluation: Evaluation, kind: str) -> list[dict]:
    """[{model, task, metric, items, factors: [{factor, flips, spread, changes: [[variant, change, low, high]]}]}] of
    `sensitivity.json` or `robustness.json`.
    """
    found: dict[tuple, dict] = {}
    for row in evaluation.results[kind]:
        if "spread" not in row:
            continue
        part = found.setdefault(
            (row["model"], row["task"]),
            {
                "model": Scores(facts).called(evaluation, row["model"]),
                "task": row["task"],
                "metric": row["metric"],
                "items": row["n"],
                "factors": [],
            },
        )
        changes = zip(row["variants"][1:], row["changes"], strict=False) if row["factor"] != "all" else ()
        part["factors"].append(
            {
                "factor": row["factor"],
                "k": row["k"],
                **{name: _share(row.get(name)) for name in ("mean", "spread", "worst_of_k", "flips", "consistency")},
                "p": short(row["spread"].get("p")),
                "changes": [
                    [name, *(short(change[key]) for key in ("value", "low", "high"))] for name, change in changes
                ],
            }
        )
    return list(found.values())


def _share(measure: dict | None) -> list | None:
    """[value, low, high, what blind answers give] of a measure of variants."""
    return measure and [short(measure.get(key)) for key in ("value", "low", "high", "blind")]
