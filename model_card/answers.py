"""The answers behind the scores of an evaluation's folder, which keeps those of other settings and steps, too."""

import json
from pathlib import Path

# what a row of scores.json has in common with the stored result that it comes from, besides model and task
SAME = ("limit", "n_shot", "seed", "dtype", "version", "chat_template", "commit", "step", "tokens")


class StoredAnswers:
    """The stored results of an evaluation. folder: holds `results/` and `samples/`."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.records: dict[tuple, list[dict]] = {}  # (model, task): its results, the newest last
        for path in sorted((self.folder / "results").glob("*.json"), key=lambda path: path.stat().st_mtime):
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                self.records.setdefault((record["model"], record["task"]), []).append(record)
            except (ValueError, KeyError, TypeError):  # a damaged one: evaluated again by the next call
                continue

    def of(self, row: dict) -> list[dict]:
        """The answers behind a row of scores.json; [] where they are not there."""
        for record in reversed(self.records.get((row["model"], row["task"]), [])):
            path = self.folder / "samples" / f"{record['key']}.jsonl"
            if path.exists() and all(record.get(name) == row.get(name) for name in SAME):
                return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return []
