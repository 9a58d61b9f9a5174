"""What a folder holds, read and held against itself: a run, prepared tokens, or an evaluation. Needs no torch and no
network.
"""

import csv
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from .audits import read_audits
from .metadata import CardError

SESSION_EVENTS = ("started", "resumed", "finished", "interrupted", "unhealthy")
STEP = "@step-"  # in the name of a model: one of the steps of its run
# the metric by which a task is shown and compared
PREFERRED = ("acc_norm", "acc", "exact_match", "pass@1", "word_f1", "bits_per_byte")


@dataclasses.dataclass
class Evaluation:
    """The tables of one evaluation. `own`: names of the models in it that are this run's; None in an evaluation's own
    folder.
    """

    name: str
    scores: list[dict]
    comparison: list[dict]
    results: dict[str, list[dict]]
    run: dict
    own: list[str] | None

    def shown(self, models: list[str] | None = None) -> list[dict]:
        """One row a model and task, variants left out: that of the metric by which the task is shown."""
        rows: dict[tuple, dict] = {}
        for row in self.scores:
            if not row["factor"] and (models is None or row["model"] in models):
                rows.setdefault((row["model"], row["task"]), {})[metric_key(row["metric"], row.get("filter"))] = row
        return [metrics[shown_metric(metrics)] for metrics in rows.values()]


@dataclasses.dataclass
class Records:
    """`kind`: pretrain, adapter, tuned (all weights), merged, tokens or evaluation."""

    folder: Path
    kind: str
    run: dict
    status: dict
    log: list[dict]
    events: list[dict]
    data: dict
    tuning: dict
    evaluations: list[Evaluation]
    published: list[dict]
    step: int | None = None  # of a revision's records, which end there
    dashboards: dict[str, dict] = dataclasses.field(default_factory=dict)  # {name of --report_to: where to look}
    audits: list[dict] = dataclasses.field(default_factory=list)  # that the owner put there

    @property
    def steps(self) -> int:
        """Steps that the run is to have, as it was last changed."""
        return self.settings("hyperparameters")["max_steps"]

    def settings(self, kind: str) -> dict:
        """A table of the run's identity, with what changed on resumes."""
        table = dict(self.run["identity"][kind])
        for event in self.events:
            if event["event"] == "changed" and event["kind"] == kind:
                known = {*table, "mixture"}  # a run of one text can become one of a mixture
                table |= {name: new for name, (_, new) in event["fields"].items() if name in known}
        return table

    def mine(self, evaluation: Evaluation) -> list[str]:
        """Names of this run's models in the order of their steps; of an evaluation's own card all of them."""
        rows = evaluation.shown()
        if evaluation.own is None:
            return list(dict.fromkeys(row["model"] for row in rows))
        steps = {
            row["model"]: row["step"] or 0
            for row in rows
            if row["model"] in evaluation.own and bool(row["adapter"]) == self.tuned
        }
        return sorted(steps, key=steps.get)

    @property
    def tuned(self) -> bool:
        """Whether its models are adapters on a base, merged or not."""
        return self.kind in ("adapter", "merged")

    @property
    def trained(self) -> list[dict]:
        """Entries of the log with a training loss."""
        return [entry for entry in self.log if "loss" in entry]

    @property
    def evaluated(self) -> list[dict]:
        """Entries of the log with a validation loss."""
        return [entry for entry in self.log if "eval_loss" in entry]

    @property
    def end(self) -> str | None:
        """How the last session of a run ended: finished, interrupted or unhealthy; None while it goes on, or where it
        ended without a word. A command that was refused is no session, though `status.json` may be its own.
        """
        status = self.status.get("status")
        if status != "refused":
            return status
        ends = [event["event"] for event in self.events if event["event"] in SESSION_EVENTS]
        return ends[-1] if ends and ends[-1] not in ("started", "resumed") else None

    @property
    def task_scores(self) -> bool:
        """Whether tasks were scored at the evaluations of the run (`--eval_tasks`)."""
        return any("eval_loss" not in entry and any(key.startswith("eval_") for key in entry) for entry in self.log)

    @property
    def reached(self) -> dict:
        """{step, tokens} of the last entry of the log."""
        return self.log[-1] if self.log else {"step": 0, "tokens": 0}

    def wall_seconds(self) -> float:
        """Seconds from each start or resume to its last save or end, in all."""
        sessions: list[list[float]] = []
        for event in self.events:
            if event["event"] in ("started", "resumed"):
                sessions.append([])
            if sessions and event["event"] in ("started", "resumed", "saved", "finished", "interrupted", "unhealthy"):
                sessions[-1].append(datetime.fromisoformat(event["time"]).timestamp())
        return sum(times[-1] - times[0] for times in sessions)


def run_of(model: str) -> str:
    """What the names of the steps of one run have in common: `runs/demo` of `runs/demo@step-250`."""
    return model.partition("@")[0]


def metric_key(metric: str, filter_name: str | None) -> str:
    """The key of a score in a record: `metric`, or `metric,filter` where answers went through a filter of lm-eval."""
    return metric if filter_name in (None, "", "none") else f"{metric},{filter_name}"


def metric_and_filter(key: str) -> tuple[str, str]:
    """(metric, filter) of a key of `metric_key`; the filter is "none" where there is none."""
    metric, _, filter_name = key.partition(",")
    return metric, filter_name or "none"


def shown_metric(metrics: Iterable[str]) -> str:
    """The key of the score by which a task is shown: of several filters, the task's first."""
    keys = list(metrics)
    by_name = {metric_and_filter(key)[0]: key for key in reversed(keys)}
    return next((by_name[name] for name in PREFERRED if name in by_name), min(keys))


def shown_pairs(rows: Iterable[dict]) -> list[tuple[str, str]]:
    """(first, second) of the models that readers compare first, each pair in the order of the rows: a run's first step
    with its last, a tuned model with its base, and any other with the first run. rows: of scores, with model, step,
    adapter and base_model.
    """
    models: dict[str, dict] = {}
    for row in rows:
        models.setdefault(row["model"], row)
    runs: dict[str, list[str]] = {}
    for name, row in models.items():
        runs.setdefault(run_of(row.get("adapter") or name), []).append(name)
    runs = {run: sorted(names, key=lambda name: models[name].get("step") or 0) for run, names in runs.items()}
    pairs = []
    for steps in runs.values():
        first, last = steps[0], steps[-1]
        other = next(iter(runs.values()))[-1]
        if models[last].get("adapter"):
            base = models[last].get("base_model") or last.partition("+")[0]  # earlier versions kept no base
            other = base if base in models else runs.get(run_of(base), [other])[-1]
        pairs += [pair for pair in ((first, last), (other, last)) if pair[0] != pair[1]]
    order = list(models)
    return list(dict.fromkeys(tuple(sorted(pair, key=order.index)) for pair in pairs))


def read(folder: Path, step: int | None = None, kind: str | None = None) -> Records:
    """The records of a folder, up to `step` where one is given. Raises CardError for a folder that is none, or
    contradicts itself.

    `kind` "merged" asks for the merged model of a tuning run; `RUN/merged` means it, too.
    """
    folder = Path(folder)
    run_folder = folder.parent if folder.name == "merged" and (folder.parent / "run.json").exists() else folder
    run = _json(run_folder / "run.json")
    manifest = _json(run_folder / "manifest.json")
    if not run and str((manifest or {}).get("format", "")).startswith("llama_lite.tokens"):
        data = {**manifest, "curation": _json(run_folder / "curation.json"), "card": _json(run_folder / "card.json")}
        return Records(folder, "tokens", {}, {}, [], [], data, {}, [], [])
    if not run or run.get("kind") not in ("pretrain", "sft", "eval"):
        raise CardError(
            f"{folder} is not a run: give the folder of a run (runs/demo), of prepared tokens (data/demo), or of an"
            " evaluation (runs/demo-eval)."
        )
    if run["kind"] == "eval":
        return Records(folder, "evaluation", run, {}, [], [], {}, {}, [_evaluation(run_folder, run)], [])
    if "identity" not in run:
        raise CardError(f"{folder}/run.json only says where the run is from: it has not started. Start it first.")
    if run["kind"] == "sft":
        kind = kind or (
            "merged"
            if run_folder != folder
            else "adapter"
            if run["identity"]["model"]["adapter"]["use_lora"]
            else "tuned"
        )
    records = Records(
        folder,
        kind or run["kind"],
        run,
        _json(run_folder / "status.json") or {},
        _until(_jsonl(run_folder / "log.jsonl"), step),
        _until(_jsonl(run_folder / "events.jsonl"), step),
        _json(run_folder / "data.json") or {},
        (_json(run_folder / "before_after.json") or {}) if step is None else {},
        (
            [_evaluation(path.parent, _json(path)) for path in sorted(run_folder.glob("evaluation/*/run.json"))]
            if step is None
            else []
        ),
        _jsonl(run_folder / ("published-merged.jsonl" if kind == "merged" else "published.jsonl")),
        step,
        (_json(run_folder / "dashboards.json") or {}).get("links", {}),
    )
    check(records)
    records.audits = read_audits(run_folder, run.get("id")) if step is None else []
    return records


def check(records: Records) -> None:
    """Raise CardError where records of one run contradict each other."""
    where, run = records.folder, records.run
    steps = [entry["step"] for entry in records.log]
    if fall := next(((a, b) for a, b in itertools.pairwise(steps) if b < a), None):
        raise CardError(f"{where}/log.jsonl contradicts itself: step {fall[1]} comes after step {fall[0]}.")
    if records.step is None and records.status.get("status") == "finished" and steps:
        last_step, gaps = records.status["step"], [b - a for a, b in itertools.pairwise(sorted({0, *steps}))]
        if steps[-1] > last_step or last_step - steps[-1] >= max(gaps) * 2:
            raise CardError(
                f"{where}: status.json says finished at step {last_step}, and log.jsonl ends at step {steps[-1]}."
            )
    wanted = records.settings("data").get("data")
    if mixture := records.settings("data").get("mixture"):
        _check_mixture(records, mixture)
    elif records.data and records.data["fingerprint"] != wanted:
        raise CardError(
            f"{where}: data.json is of the data {records.data['fingerprint'][:12]}, but run.json says that it was"
            f" trained on {str(wanted)[:12]}."
        )
    tokens = {entry["step"]: entry["tokens"] for entry in records.log if "tokens" in entry}
    for evaluation in records.evaluations:
        of = evaluation.run.get("of", {}).get("id")
        if of != run.get("id"):
            raise CardError(
                f"{where}/evaluation/{evaluation.name} has the scores of another run ({of}, this is {run.get('id')}):"
                " remove that folder."
            )
        for row in evaluation.scores:
            mine = row["model"] in evaluation.own and bool(row["adapter"]) == records.tuned
            if mine and row["step"] in tokens and row["tokens"] != tokens[row["step"]]:
                raise CardError(
                    f"{where}/evaluation/{evaluation.name}: {row['model']} was evaluated after {row['tokens']:,}"
                    f" tokens, and log.jsonl has {tokens[row['step']]:,} at step {row['step']:,}: these are scores of"
                    " another revision; evaluate again."
                )


def _check_mixture(records: Records, mixture: dict) -> None:
    """Raise CardError where `data.json` is of other folders than the run's identity (`mixture`)."""
    there = {part["name"]: part["fingerprint"] for part in records.data.get("mixture", [])}
    if records.data and there != {name: part["data"] for name, part in mixture.items()}:
        raise CardError(
            f"{records.folder}: data.json is of the folders {', '.join(there) or '(none)'}, but run.json says that it"
            f" was trained on {', '.join(mixture)}, or on other tokens of theirs."
        )


def _evaluation(folder: Path, run: dict) -> Evaluation:
    results = {
        name: _json(folder / f"{name}.json") or []
        for name in ("sensitivity", "robustness", "generalisation", "contamination")
    }
    for name, digest in run.get("of", {}).get("files", {}).items():
        if not (folder / name).exists() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise CardError(f"{folder / name} was altered since its evaluation: evaluate again, or remove {folder}.")
    own = run.get("of", {}).get("models") if "of" in run else None
    return Evaluation(
        folder.name, _json(folder / "scores.json") or [], _csv(folder / "comparison.csv"), results, run, own
    )


def _until(entries: list[dict], step: int | None) -> list[dict]:
    return entries if step is None else [entry for entry in entries if entry.get("step", 0) <= step]


def _json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CardError(f"{path} is not readable JSON: {error}.") from None


def _jsonl(path: Path) -> list[dict]:
    """Whole lines; one that is being written, or that a crash cut, is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [entry for entry in found if isinstance(entry, dict)]


def _csv(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: _number(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _number(text: str):
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text or None
