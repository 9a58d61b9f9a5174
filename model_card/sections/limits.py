"""Limits of a model that its records show."""

from ..facts import Facts
from ..formatting import number, spread
from ..records import Evaluation as Tables
from ..sources import read_again
from .evaluation import Evaluation


class Limits:
    """Values of the section Limits."""

    def __init__(self, facts: Facts):
        self.f, self.r, self.evaluation = facts, facts.r, Evaluation(facts)

    def limits(self) -> list[str]:
        """Limits of the model that its records show."""
        sentences = [*self._end(), *self._training(), *self._measured()]
        for evaluation in self.r.evaluations:
            sentences += self._scores(evaluation)
        if found := self.r.tuning.get("greedy", {}).get("after"):
            sentences.append(
                "Whether answers are right was not measured: only their loss, their form, and whether they stop."
            )
            sentences += [f"{found['loops']:.0%} of greedy answers end in a loop."] if found["loops"] else []
        return sentences

    def _end(self) -> list[str]:
        """That a run is not finished, and how its last session ended; commands that were refused are no session."""
        r = self.r
        if r.step is not None or self.f.finished:
            return []
        how = r.end or "it goes on, or ended without a word"
        return [f"The run is not finished: it stands at step {number(r.reached['step'])} of {number(r.steps)} ({how})."]

    def _training(self) -> list[str]:
        """What the kind of training, its losses and its length leave open."""
        r, sentences = self.r, []
        if r.kind == "pretrain" and self.f.initial_weights is None:
            sentences.append("It was trained to predict text alone: no step taught it to be truthful or harmless.")
        bigram = r.data.get("baselines", {}).get("bigram")
        if r.kind == "pretrain" and bigram and r.evaluated and r.evaluated[-1]["eval_loss"] > bigram:
            said = f" (it is of {self.f.measured}, that of counts of {self.f.counted})" if self.f.measured else ""
            sentences.append(f"Validation loss is above that of bigram counts, which know one token before each{said}.")
        events = {event["event"]: event for event in reversed(r.events)}
        if found := events.get("saturated"):
            slope = spread({"value": found["slope"], "low": found["low"], "high": found["high"]}, 4, "+")
            sentences.append(
                f"Validation loss was saturated at {number(found['tokens'])} tokens: {slope} nats per doubling of"
                " tokens."
            )
        elif judged := events.get("trends", {}).get("saturation"):
            sentences.append(
                "Validation loss had not saturated when training ended."
                if judged["answer"] == "no"
                else f"Whether validation loss had saturated cannot be told; needed: {judged['needed']}."
            )
        if found := events.get("overfitting"):
            sentences.append(
                f"Validation loss rose while training loss fell, from {found['best_eval_loss']:.4f} to"
                f" {found['eval_loss']:.4f}, at {number(found['tokens'])} tokens."
            )
        if r.kind == "pretrain" and (sentence := read_again(r)):
            sentences.append(sentence)
        return sentences

    def _measured(self) -> list[str]:
        """That no task was evaluated, or that no other was than those of the card."""
        if not self.f.finished:
            return []
        if self.r.evaluations:
            return ["Only what is under Evaluation was measured."]
        return [] if self.r.tuning or self.r.task_scores else ["No task was evaluated: only losses are known."]

    def _scores(self, evaluation: Tables) -> list[str]:
        """What the scores of an evaluation cannot show, and what tuning made worse."""
        sentences = []
        rows = evaluation.shown(self.r.mine(evaluation)[-1:])
        level = [
            row["task"]
            for row in rows
            if row.get("chance") and row["low"] is not None and row["low"] <= row["chance"] <= row["high"]
        ]
        if level:
            sentences.append(f"Not distinguished from chance, which the interval includes: {', '.join(level)}.")
        if cut := [f"{row['task']} ({number(row['truncated'])})" for row in rows if row["truncated"]]:
            sentences.append(
                f"Requests longer than the context, of which the beginning was left out: {', '.join(cut)}."
            )
        worse = [
            row
            for row in evaluation.comparison
            if self.r.tuned and (row["first"], row["second"]) in self.evaluation.pairs(evaluation)
        ]
        worse = [row for row in worse if row["metric"] == "bits_per_byte" and row["low"] is not None and row["low"] > 0]
        if worse:
            raised = ", ".join(f"{row['task']} by {row['difference']:.4f}" for row in worse)
            sentences.append(f"Tuning raised the bits per byte of {raised}.")
        return sentences
