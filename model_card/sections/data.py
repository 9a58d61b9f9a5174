"""Data: what was read, what was left out, and how much of it a tuning has seen."""

import itertools
import re

from ..facts import Facts
from ..formatting import number
from ..sources import mixture_rows, validation_rows

CUT = re.compile(r": (answer|later turns) cut\b")  # a reason in `skipped` of a row that stays


class Data:
    """Values of the section Data."""

    def __init__(self, facts: Facts):
        self.f, self.r = facts, facts.r

    def curation(self) -> list[list]:
        """Documents and characters that each curation rule dropped."""
        report = self.r.data.get("curation") or {"rules": []}
        return [
            [rule["rule"], number(rule["documents_dropped"]), number(rule["characters_dropped"])]
            for rule in report["rules"]
        ]

    def mixture(self) -> list[list]:
        """`sources.mixture_rows` of these records."""
        return mixture_rows(self.r)

    def validation_sets(self) -> list[list]:
        """`sources.validation_rows` of these records."""
        return validation_rows(self.r)

    def skipped(self) -> list[list]:
        """Documents or rows that were left out, by reason; rows that were cut are not."""
        found = {**(self.r.data.get("skipped") or {}), **(self.r.run.get("skipped") or {})}
        return [[reason, number(entry["rows"])] for reason, entry in found.items() if not CUT.search(reason)]

    def tuned_on(self) -> str:
        """The rows that a tuning has read, or packs of them: an epoch is cut to whole steps, and a run may end within
        one.
        """
        plan = self.r.run["plan"]
        read, rows = self.sequences_read(), f"{number(plan['rows'])} rows"
        if read == plan["sequences"]:
            return rows
        if plan["sequences"] == plan["rows"]:
            return f"{number(read)} of {rows}"
        return f"{number(read)} of {number(plan['sequences'])} packs ({rows} in all)"

    def sequences_read(self) -> int:
        """Sequences that a tuning read at least once. Each begin of its order (a run resumed without its data position)
        reads the same ones again.
        """
        plan = self.r.run["plan"]
        resumed = (event.get("data_start", 0) for event in self.r.events if event["event"] == "resumed")
        begins = sorted({0, *resumed})
        longest = max(b - a for a, b in itertools.pairwise([*begins, self.steps_done]))
        return min(longest, plan["steps_per_epoch"]) * plan["sequences_per_step"]

    @property
    def steps_done(self) -> int:
        if self.r.step is not None:
            return self.r.step
        return max(self.r.status.get("step", 0), self.r.reached["step"])

    def rows(self) -> str:
        """What a tuning learnt from and what it did not, in sentences."""
        plan, found = self.r.run["plan"], self.r.run.get("skipped") or {}
        sentences = [
            f"{number(plan['rows'])} rows to learn from ({number(plan['learnt_tokens'])} tokens of answers),"
            f" {number(plan['held_rows'])} rows held out of the tuning by whole documents (the base may have"
            " read them)."
        ]
        if most := self.f.source.get("max_rows"):
            sentences.append(
                f"No more than {number(most)} rows were taken (`--max_rows`); what comes after them was not read."
            )
        if left := sum(entry["rows"] for reason, entry in found.items() if not CUT.search(reason)):
            sentences.append(f"Rows that were left out, as the table says: {number(left)}.")
        for reason, entry in found.items():
            if CUT.search(reason):
                sentences.append(f"Of the rows, those held out among them, {number(entry['rows'])} are {reason}.")
        all_read = self.sequences_read() == plan["sequences"]
        times = f", {self.steps_done / plan['steps_per_epoch']:.2f} times" if all_read else ""
        return " ".join([*sentences, f"The tuning has read {self.tuned_on()}{times}."])
