"""The committed reports of studies again, from their measured values, by today's rules.

    python -m benchmarks.render_studies           # every folder of benchmarks/studies
    python -m benchmarks.table                    # then the tables of docs/

Reads `results.csv` and `records.json` (controlled variables, equal weights, mean squares over items, health, cost) and the
study file of the same name in configs/studies/; writes `comparison.json`, `contrasts.json`, `report.md` and the figures.
"""

import csv
import dataclasses
import sys
from pathlib import Path

from llama_lite.files import read_json, write_json
from llama_lite.studies import analysis, spec
from model_card.study import write_report

ROOT = Path(__file__).resolve().parent.parent


def read_rows(path: Path) -> list[dict]:
    """Rows of `results.csv`, as `analysis.collect` made them."""
    with open(path, encoding="utf-8", newline="") as file:
        return [
            {
                **row,
                **{name: int(row[name]) for name in ("seed", "step", "tokens")},
                "at": int(row["at"]) if row["at"] else "",
                "value": float(row["value"]),
            }
            for row in csv.DictReader(file)
        ]


def render(folder: Path) -> None:
    """Write everything of one committed study that follows from its values."""
    study = spec.load(str(ROOT / "configs" / "studies" / f"{folder.name}.yaml"))
    rows, records = read_rows(folder / "results.csv"), read_json(folder / "records.json")
    results = analysis.results_of(study, rows, records)
    for name, value in results.items():
        if value:
            write_json(folder / f"{name}.json", value)
    write_report(folder, dataclasses.asdict(study), rows, results, records)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else sorted((ROOT / "benchmarks" / "studies").iterdir()):
        render(path.resolve())
        print(path)
