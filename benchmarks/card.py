"""How long the card of a long run takes: 20,000 log lines, 10 evaluated revisions, 8 tasks with variants, figures
included.

python benchmarks/card.py RUN_FOLDER          # a finished and evaluated run, e.g. runs/demo
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LINES, REVISIONS, TASKS = 20_000, 10, 8


def stretch(run: Path, place: Path) -> None:
    """A copy of a run whose log has LINES lines, and whose evaluation has REVISIONS models and TASKS tasks."""
    shutil.copytree(run, place, ignore=shutil.ignore_patterns("checkpoint-*", "*.safetensors", "queue*"))
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    trained, others = [entry for entry in log if "loss" in entry], [entry for entry in log if "loss" not in entry]
    last = trained[-1]["step"]
    lines = others + [
        {**trained[i * len(trained) // LINES], "step": 1 + i * (last - 1) // LINES} for i in range(LINES - len(others))
    ]
    each = trained[-1]["tokens"] // last
    lines = [{**line, "tokens": each * line["step"]} for line in sorted(lines, key=lambda entry: entry["step"])]
    (place / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for folder in (place / "evaluation").iterdir():
        rows = json.loads((folder / "scores.json").read_text())
        tasks = list(dict.fromkeys(row["task"] for row in rows if not row["factor"]))
        extra = [
            {**row, "task": f"{row['task']}_{i}"}
            for i in range(TASKS - len(tasks))
            for row in rows
            if row["task"] == tasks[0]
        ]
        (folder / "scores.json").write_text(json.dumps(rows + extra))
        models = {row["model"] for row in rows if not row["adapter"]}
        assert len(models) >= REVISIONS, f"{run} was evaluated at {len(models)} revisions, {REVISIONS} are wanted"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        stretch(arguments.run, place)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "model_card", str(place)], cwd=ROOT, check=True, capture_output=True)
            times.append(time.perf_counter() - began)
        size = len((place / "README.md").read_text())
        figures = len(list((place / "figures").glob("*.png")))
    result = {
        "log_lines": LINES,
        "revisions": REVISIONS,
        "tasks": TASKS,
        "seconds": round(sorted(times)[1], 1),
        "characters": size,
        "figures": figures,
    }
    print(json.dumps(result))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
