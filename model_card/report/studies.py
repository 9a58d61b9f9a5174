"""What a page shows of a study: the curves of its arms, with their mean and interval over seeds, and every
difference.
"""

import csv
import json
import re
from pathlib import Path

import numpy as np

from ..study import interval, name_of, shown, verdict
from .curves import group_of
from .values import short, shorts

TABLES = ("results.csv", "comparison.json", "report.md")


def is_study(folder: Path) -> bool:
    """Whether a folder holds the results of a study."""
    return all((folder / name).exists() for name in TABLES)


def read_study(folder: Path, lines: int) -> dict:
    """{title, arms: [{name, grids, series}], differences, text} of a study. lines: points of the curves of all arms
    that are kept. text: its report, in Markdown, without figures.
    """
    text = (folder / "report.md").read_text(encoding="utf-8")
    text = re.sub(r"^!\[[^\n]*\n", "", text, flags=re.MULTILINE)
    title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), folder.name)
    comparison = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    curves: dict[tuple, dict] = {}  # {(arm, metric): {seed: {step: (tokens, value)}}}
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["at"] and int(row["step"]) < int(row["at"]):  # before it began to be another run
                continue
            arm = f"{row['arm']} at {row['at']}" if row["at"] else row["arm"]
            by_seed = curves.setdefault((arm, row["metric"]), {})
            by_seed.setdefault(row["seed"], {})[int(row["step"])] = (float(row["tokens"]), float(row["value"]))
    arms: dict[str, dict] = {}
    every = max(1, -(-sum(len(steps) for seeds in curves.values() for steps in seeds.values()) // lines))
    for (arm, metric), seeds in curves.items():
        if any(len(steps) > 1 for steps in seeds.values()):
            _add(arms.setdefault(arm, {"name": arm, "grids": [], "series": []}), metric, seeds, every)
    return {
        "title": title,
        "text": text.partition("\n")[2],
        "arms": list(arms.values()),
        "differences": [_difference(row) for row in comparison],
    }


def _add(arm: dict, metric: str, seeds: dict[str, dict], every: int) -> None:
    """Add a metric to an arm: its mean over seeds at the steps that all have, with the 95 % interval (Student's t)."""
    from scipy import stats

    steps = sorted(set.intersection(*map(set, seeds.values())))
    steps = [step for index, step in enumerate(steps) if index % every == 0 or step == steps[-1]]
    table = np.array([[curve[step][1] for step in steps] for curve in seeds.values()])  # (seeds, steps)
    tokens = np.array([[curve[step][0] for step in steps] for curve in seeds.values()]).mean(0)
    grid = {"step": steps, "tokens": [round(value) for value in tokens], "seconds": None}
    if grid not in arm["grids"]:
        arm["grids"].append(grid)
    series = {
        "name": metric,
        "group": group_of(metric),
        "grid": arm["grids"].index(grid),
        "values": shorts(table.mean(0)),
    }
    if len(table) > 1 and steps:
        half = stats.t.ppf(0.975, len(table) - 1) * table.std(0, ddof=1) / np.sqrt(len(table))
        series |= {"low": shorts(table.mean(0) - half), "high": shorts(table.mean(0) + half)}
    arm["series"].append(series)


def _difference(row: dict) -> dict:
    """A difference as the page draws it: numbers, and the words of the report."""
    scale = 1000 if row["unit"] == "tokens" else 1
    return {
        "arm": name_of(row),
        "against": row["against"],
        "what": row["what"] + (" (thousands)" if scale == 1000 else ""),
        "numbers": [None if row[key] is None else short(row[key] / scale) for key in ("value", "low", "high")],
        "seeds": [None if value is None else short(value / scale) for value in row["seeds"]],
        "words": f"{shown(row, row['value'])} ({interval(row)}); {verdict(row)}",
        "differs": row["verdict"].startswith("differs"),
    }
