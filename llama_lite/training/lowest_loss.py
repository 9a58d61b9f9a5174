"""Where the validation loss of a run was lowest, if that was clearly before its end."""

from pathlib import Path

from ..files import read_jsonl

CLEARLY = 0.02  # nats


def warnings(folder: Path) -> list[str]:
    """The line that warns of a loss that rose again, for a finished run; none where it did not by more than CLEARLY."""
    losses = {entry["step"]: entry["eval_loss"] for entry in read_jsonl(folder / "log.jsonl") if "eval_loss" in entry}
    if not losses:
        return []
    best, last = min(losses, key=losses.get), max(losses)
    if losses[last] - losses[best] <= CLEARLY:
        return []
    kept = (folder / f"checkpoint-{best}").is_dir()
    there = f"; that model is {folder}@step-{best}" if kept else ""
    return [
        f"WARNING   the validation loss was lowest at step {best:,} ({losses[best]:.4f}), and is {losses[last]:.4f} at"
        f" the end: the model begins to know its text by heart{there}. Train fewer steps (--config {folder}"
        f" --max_steps {best} --output_dir OTHER), or on more text."
    ]
