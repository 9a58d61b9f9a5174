"""What an evaluation says on the terminal: scores as they come, and at the end what changed between models and with the
prompt. The tables and the card in its folder have all numbers.
"""

from model_card.formatting import probability
from model_card.records import metric_key, shown_metric, shown_pairs

from ..distributed import print_main
from . import estimates
from .forecast import Progress

MOST_PAIRS = 4  # pairs of models whose differences are printed; the others are in the card
SIGNIFICANT = 0.05


# ---- while it runs ----


class ScoreLines:
    """Prints the scores above the progress bar: a line for each task, and for the variants of a task that change the
    same factor of the prompt one line with their range. Call `close` at the end.
    """

    def __init__(self, progress: Progress):
        self.progress, self.variants = progress, []

    def add(self, number: int, task: int, record: dict, fresh: bool) -> None:
        """The record of a model and a task, by their positions; variants count if they are `fresh`, computed now."""
        if self.variants and _kind_of(record) != _kind_of(self.variants[0]):
            self.close()
        self.progress.finish(number, task)
        if not record["factor"]:
            metric, left = shown_metric(record["metrics"]), self.progress.left_in_words() if fresh else ", as before"
            self._write([record], record["task"], f"{metric} {format_metric(record['metrics'][metric])}", left)
        elif fresh:
            self.variants.append(record)

    def close(self) -> None:
        """Print the variants of the last factor."""
        if records := self.variants:
            metric = shown_metric(records[0]["metrics"])
            values = [record["metrics"][metric]["value"] for record in records]
            among = f"{min(values):.4f} to {max(values):.4f}" if min(values) < max(values) else f"{values[0]:.4f}"
            variants = f" ({len(records)} variants)" if len(records) > 1 else ""
            name, items = records[0]["base"], records[0]["metrics"][metric]["n"]
            shown = f"{metric} {among}, {items} items"
            self._write(records, f"{name}, {records[0]['factor']}{variants}", shown, self.progress.left_in_words())
        self.variants = []

    def _write(self, records: list[dict], name: str, shown: str, left: str) -> None:
        truncated = sum(record["truncated"] for record in records)
        cut = f", {truncated} requests longer than the context" if truncated else ""
        self.progress.bar.write(f"{records[0]['model']}  {name}  {shown}{cut}{left}")


def _kind_of(record: dict) -> tuple:
    return record["model"], record["base"], record["factor"]


def format_metric(value: dict) -> str:
    """A value with its 95 % interval."""
    interval = "no interval" if value["low"] is None else f"{value['low']:.3f} to {value['high']:.3f}"
    return f"{value['value']:.4f} ({interval}), {value['n']} items"


# ---- at the end ----


def print_summary(records: list[dict], comparison: list[dict], results: dict) -> None:
    """What a person wants to know at once: what tells apart the models that belong together, and how far prompts move
    them. records: of the tasks without variants; comparison, results: rows of the tables.
    """
    print_changes(shown_pairs(records), comparison)
    for name in ("sensitivity", "robustness"):
        for row in results[name]:
            if row["factor"] == "all" and "spread" in row:
                print_main(f"{name:12}{row['model']} {row['task']}: {format_sensitivity(row)}")
    for row in results.get("contamination", ()):
        print_main(
            f"contamination  {row['task']}: {row['contaminated']} of {row['judged']} items share 13 words with the"
            " training text"
        )


def print_changes(pairs: list[tuple[str, str]], comparison: list[dict]) -> None:
    """The differences of the declared pairs of models, and of MOST_PAIRS of `pairs`, each under the names of both."""
    groups: dict[tuple[str, str], list[dict]] = {pair: [] for pair in pairs[:MOST_PAIRS]}
    for row in comparison:
        pair = row["first"], row["second"]
        if row["low"] is not None and (row["family"] == "primary" or pair in groups):
            groups.setdefault(pair, []).append(row)
    shown = {pair: rows for pair, rows in groups.items() if rows}
    for (first, second), rows in shown.items():
        print_main(f"change    {first} -> {second}")
        for row in rows:
            print_main(f"          {format_change(row)}")
    exploratory = sum("p_fdr" in row for row in comparison)
    if any("p_fdr" in row for rows in shown.values() for row in rows):
        print_main(f"          p: adjusted for the {exploratory} comparisons in comparison.csv (false discovery rate)")


def format_change(row: dict) -> str:
    """A row of `comparison.csv` in words."""
    is_primary = row["family"] == "primary"
    p = row.get("p_holm" if is_primary else "p_fdr")
    judged = "" if p is None else f", p {probability(p)}{' (primary, Holm)' if is_primary else ''}, {_judge(row, p)}"
    return (
        f"{row['task']}: {metric_key(row['metric'], row['filter'])} {row['difference']:+.4f} ({row['low']:+.4f} to"
        f" {row['high']:+.4f}){judged}"
    )


def _judge(row: dict, p: float) -> str:
    """Whether the second model is better or worse than the first, by the adjusted p."""
    if p >= SIGNIFICANT:
        return "not significant" + (f" (detectable from {row['detectable']:.4f} on)" if row["detectable"] else "")
    is_lower_better = row["metric"] in (*estimates.PERPLEXITIES, *estimates.COUNTED)
    if not is_lower_better and row["metric"] not in estimates.FRACTIONS:
        return "different"
    return "better" if (row["difference"] < 0) == is_lower_better else "worse"


def format_sensitivity(row: dict) -> str:
    """A row of `sensitivity.json` or `robustness.json` in words."""
    flips, spread = row["flips"], row["spread"]
    random = f" ({flips['blind']:.0%} by random guessing)" if flips["blind"] is not None else ""
    return (
        f"{row['metric']} {row['lowest']['value']:.3f} to {row['highest']['value']:.3f} with {row['k']} prompts"
        f" (equally good prompts differ as much with p {spread['p']:.2g}); {flips['value']:.0%} of answers change with"
        f" the prompt{random}, {row['worst_of_k']['value']:.0%} of items are right with every prompt"
    )
