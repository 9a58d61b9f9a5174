"""Evaluation: scores, differences, variants and kinds of text, and the entries of model-index."""

import re

from huggingface_hub import EvalResult

from ..facts import Facts
from ..formatting import beside_random, interval, items_of, number, probability, spread
from ..records import Evaluation as Tables
from ..records import metric_key, shown_pairs

HARNESS = "https://github.com/EleutherAI/lm-evaluation-harness"


class Evaluation:
    """Values of the sections Evaluation, Prompt sensitivity, Robustness and Other kinds of text."""

    def __init__(self, facts: Facts):
        self.f, self.r = facts, facts.r

    def model(self, row: dict) -> str:
        """The name of a model for readers: its step in this run, its id on the Hub, or the name of its folder."""
        if (
            self.r.kind != "evaluation"
            and row["model"] in self._own_models(row)
            and not row["adapter"]
            and row["step"] is not None
        ):
            return f"step {row['step']:,}"
        if row["commit"]:
            return row["model"]
        return "+".join(part.split("/")[-1] for part in row["model"].split("+"))

    def _own_models(self, row: dict) -> list[str]:
        """Names of the run's own models in the evaluation that `row` belongs to."""
        return [name for evaluation in self.r.evaluations if row in evaluation.scores for name in evaluation.own or []]

    def called(self, evaluation: Tables, name: str) -> str:
        """The name of a model of an evaluation for readers."""
        return next((self.model(row) for row in evaluation.scores if row["model"] == name), name)

    def scores(self, evaluation: Tables) -> list[list]:
        """One row per task and model: the last model of this run, and the models of others."""
        mine = self.r.mine(evaluation)
        others = {
            row["model"].split("@step-")[0]: row["model"]
            for row in evaluation.shown()
            if row["model"] not in (evaluation.own or ())
        }
        wanted = mine if evaluation.own is None else mine[-1:] + list(others.values())  # of another run its last
        rows = evaluation.shown(wanted)
        return [
            [
                row["task"],
                self.model(row),
                metric_key(row["metric"], row.get("filter")),
                spread(row, 3),
                number(row.get("chance"), 3),
                items_of(row),
                number(row["n_shot"]),
                str(row["version"]),
                "chat" if row["chat_template"] else "plain",
            ]
            for row in sorted(rows, key=lambda row: [one["task"] for one in evaluation.shown()].index(row["task"]))
        ]

    def described(self, evaluation: Tables) -> list[str]:
        """Descriptions of the tasks that are this project's own."""
        return [f"`{name}`: {text}" for name, text in evaluation.run.get("descriptions", {}).items()]

    def adjustment(self, evaluation: Tables) -> str:
        """What the p-values of `changes` are adjusted for; in tables of earlier versions, for the pairs of a task."""
        rows = evaluation.comparison
        if not any(row.get("family") for row in rows):
            most = max(sum(row["task"] == task for row in rows) for task in {row["task"] for row in rows})
            return (
                "p: McNemar's exact test for accuracies, a normal test for the rest, after Holm's correction over all"
                f" {number(most)} pairs of models of a task."
            )
        sizes = {family: sum(row["family"] == family for row in rows) for family in ("primary", "exploratory")}
        parts = []
        if sizes["primary"]:
            parts.append(f"primary: declared before the evaluation, Holm's correction over {number(sizes['primary'])}")
        if sizes["exploratory"]:
            parts.append(f"exploratory: false discovery rate over {number(sizes['exploratory'])} comparisons")
        return (
            "p: a score test for right and wrong answers, a t test for the rest, both by cluster, adjusted within the"
            f" family of the row ({'; '.join(parts)})."
        )

    def settings_of(self, evaluation: Tables) -> str:
        """Harness, number format and seed, which all rows share."""
        return (
            "; ".join(
                ", ".join(dict.fromkeys(str(row[key]) for row in evaluation.scores)) for key in ("harness", "dtype")
            )
            + f"; seed {', '.join(dict.fromkeys(str(row['seed']) for row in evaluation.scores))}"
        )

    def pairs(self, evaluation: Tables) -> list[tuple[str, str]]:
        """The pairs of models to compare: of an evaluation those of `shown_pairs`; of a run its first step and its
        last; of a tuned one its base and itself.
        """
        found, mine = shown_pairs(evaluation.shown()), self.r.mine(evaluation)
        if evaluation.own is None:
            return found
        if self.r.tuned:
            return [(first, second) for first, second in found if first not in mine and second in mine[-1:]]
        return [pair for pair in found if set(pair) <= set(mine)]

    def changes(self, evaluation: Tables) -> list[list]:
        """Paired differences of those pairs."""
        of_pair: dict[tuple, list[dict]] = {}
        for row in evaluation.comparison:
            if not row["variant"]:
                of_pair.setdefault((row["first"], row["second"]), []).append(row)
        return [
            [
                row["task"],
                " → ".join(self.called(evaluation, name) for name in pair),
                metric_key(row["metric"], row.get("filter")),
                spread({"value": row["difference"], "low": row["low"], "high": row["high"]}, 4, "+"),
                probability(row.get("p_fdr") if row.get("family") == "exploratory" else row["p_holm"]),
                row.get("family") or "",
                number(row["detectable"], 4),
            ]
            for pair in self.pairs(evaluation)
            for row in of_pair.get(pair, ())
        ]

    def variants(self, evaluation: Tables, kind: str) -> dict[str, list[list]]:
        """{task, metric and model: one row per factor}."""
        found: dict[str, list[list]] = {}
        for row in evaluation.results[kind]:
            if "spread" in row and row["model"] in self.r.mine(evaluation):
                names = ("mean", "spread", "worst_of_k", "flips", "consistency")
                measures = [beside_random(row[name], 2) for name in names]
                measures.insert(2, probability(row["spread"].get("p")))
                name = (
                    f"`{row['task']}`, {row['metric']}, {number(row['n'])} items,"
                    f" {self.called(evaluation, row['model'])}"
                )
                found.setdefault(name, []).append([row["factor"], str(row["k"]), *measures])
        return found

    def domains(self, evaluation: Tables) -> list[list]:
        """Bits per byte of each kind of text, for the last model of the run or all of an evaluation."""
        mine = self.r.mine(evaluation)
        wanted = mine if evaluation.own is None else mine[-1:]
        return [
            [row["task"], self.called(evaluation, row["model"]), spread({**row, "value": row["bits_per_byte"]}, 4)]
            + [number(row.get(key), digits) for key, digits in (("gap", 4), ("auroc", 3), ("auroc_two_sided", 3))]
            for row in evaluation.results["generalisation"]
            if row["model"] in wanted
        ]

    def inside(self, evaluation: Tables) -> str | None:
        """The text task with which the other kinds of text were compared; None where none was."""
        rows = evaluation.results["generalisation"]
        others = {row["task"] for row in rows if "gap" in row}
        return next((row["task"] for row in rows if others and row["task"] not in others), None)

    def contamination(self, evaluation: Tables) -> list[list]:
        """Items of each task that share text with the training text."""
        return [
            [row["task"], number(row["judged"]), number(row["contaminated"])]
            for row in evaluation.results["contamination"]
        ]

    def index(self) -> list[EvalResult]:
        """model-index of this run's finished model."""
        found = []
        for evaluation in self.r.evaluations if self.f.finished else []:
            for row in evaluation.shown(self.r.mine(evaluation)[-1:]):
                if row["step"] in (None, self.r.reached["step"]):  # not of a step before the end
                    found.append(index_entry(row, row["task"]))
        return found


def is_own_result(result: EvalResult) -> bool:
    """Whether this project wrote a result of a card's model-index, and not a person."""
    return result.source_url == HARNESS and bool(re.fullmatch(r"lm-eval [\w.+]+", result.source_name or ""))


def index_entry(row: dict, dataset: str) -> EvalResult:
    """An entry of a card's model-index; its name says the interval and the items. row: as of `scores.csv`."""
    metric = metric_key(row["metric"], row.get("filter"))
    size = f"{row['n']} items" + (f" (--limit {row['limit']})" if row.get("limit") else "")
    limits = {name: None if row.get(name) is None else round(row[name], 6) for name in ("low", "high")}
    shown = "no 95 % interval" if row.get("low") is None else f"95 % interval {interval(row, 4)}"
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=row["task"],
        metric_type=metric,
        metric_value=round(row["value"], 6),
        metric_name=f"{metric}, {shown}, {size}",
        metric_args={"confidence": 0.95, **limits, "items": row["n"], "limit": row.get("limit")},
        source_name=row["harness"],
        source_url=HARNESS,
    )
