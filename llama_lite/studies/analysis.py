"""Results of a study: the controlled variables, every measured value, and differences of arms, paired by seed."""

import collections
import csv
import dataclasses
import math
import re
from pathlib import Path

from model_card.records import metric_key

from ..checkpoint.identity import differences
from ..checkpoint.store import checkpoints
from ..checkpoint.verify import read_manifest
from ..config.fields import names
from ..config.pretrain import CurationArguments, DataArguments, ModelArguments
from ..config.sft import AdapterArguments, BaseArguments, RowArguments
from ..digests import sha256, sha256_of
from ..errors import Refusal
from ..evaluation.statistics import holm
from ..files import read_json, read_jsonl, write_json
from ..training import loss_trends
from . import contrasts, inference, items
from .runner import is_done, launch, seconds_of
from .spec import Arm, Study, StudyRun, base_of, evaluation_argv

RUN_COLUMNS = ("arm", "at", "seed", "step", "tokens", "metric", "value")
AFTER = 10  # logged losses after a resume in which a spike is searched, and over which recovery is averaged

BACK = 0.005  # nats: a mean excess below this counts as recovered


def arguments_of(*groups: type) -> set[str]:
    """Names of the arguments of some dataclasses."""
    return {field.name for group in groups for field in dataclasses.fields(group)}


DATA_ARGUMENTS = arguments_of(DataArguments, CurationArguments, RowArguments)
MODEL_ARGUMENTS = arguments_of(ModelArguments, BaseArguments, AdapterArguments)
LENGTH_ARGUMENTS = {"max_steps", "num_train_epochs", "tokens_per_step", "sequences_per_step"}


def last_manifest(folder: Path) -> dict:
    """The manifest of a finished run's last checkpoint."""
    return read_manifest(checkpoints(folder)[0][1])


def check_controlled_variables(study: Study, finished: list[StudyRun]) -> dict:
    """What all finished runs share, {kind: {name: value}}, from their manifests. Raises Refusal where runs of one seed
    differ in something that no arm sets.

    Arms that set the source of the text may differ in the data's fingerprint; arms that set the model or the adapter,
    in the model. The tokenizer and the number of tokens must be equal unless an arm sets them.
    """
    shared: dict | None = None
    for seed in study.seeds:
        runs = [run for run in finished if run.seed == seed]
        if not runs:
            continue
        first = runs[0]
        for run in runs:
            reference, conditions = (_conditions(study, run.folder) for run in (first, run))
            changed = {
                name: values for kind in differences(reference, conditions).values() for name, values in kind.items()
            }
            if unnamed := _unnamed(changed, set(first.arm.set) | set(run.arm.set)):
                raise Refusal(
                    f"{run.folder.name} differs from {first.folder.name} in settings that the study does not vary:"
                    f" {'; '.join(f'{name} {changed[name][0]} -> {changed[name][1]}' for name in unnamed)}. Run the"
                    " arms again under equal conditions, or set them in the arms."
                )
            same = {kind: conditions[kind] for kind in ("data", "hyperparameters", "environment", "layout")}
            shared = (
                same
                if shared is None
                else {k: {n: v for n, v in values.items() if same[k].get(n) == v} for k, values in shared.items()}
            )
    return shared


def _unnamed(changed: dict, named: set[str]) -> list[str]:
    """Names of changed conditions that do not follow from the arguments `named` by the arms."""
    free = set(named) | ({"eval_windows"} if named else set())  # where it is derived, from several arguments
    free |= {"data", "held_out"} if named & DATA_ARGUMENTS else set()
    free |= {"tokens"} if named & LENGTH_ARGUMENTS else set()
    free |= {"weights"} if "models" in named else set()
    model_may_differ = bool(named & MODEL_ARGUMENTS)
    return sorted(name for name in changed if name not in free and not (model_may_differ and name.startswith("model.")))


def _conditions(study: Study, folder: Path) -> dict:
    """The identity of a run, with its tokens, its tokenizer and the validation windows that it measures as further
    facts of its data; of an evaluation, its arguments and the weights of its models.
    """
    if study.script == "run_eval.py":
        run = read_json(folder / "run.json")
        arguments = {name: value for group in run["arguments"] for name, value in group.items()}
        environment = {name: run[name] for name in ("code_revision", "hardware", "packages")}
        return {
            "model": {},
            "hyperparameters": arguments,
            "data": {"weights": run["weights"]},
            "layout": {},
            "environment": environment,
        }
    manifest = last_manifest(folder)
    tokenizer = (read_json(folder / "data.json") or {}).get("tokenizer", {}).get("sha256")
    further = {"tokens": manifest["tokens"], **({"tokenizer": tokenizer} if tokenizer else {})}
    settings = (read_json(folder / "run.json") or {}).get("settings") or {}
    if "eval_windows" in settings:
        further["eval_windows"] = settings["eval_windows"]
        further["eval_order"] = settings.get("eval_order", "sequential")  # not recorded by earlier versions
    return {**manifest["identity"], "data": {**manifest["identity"]["data"], **further}}


# ---- every value ----


def collect(study: Study, finished: list[StudyRun]) -> list[dict]:
    """Logged losses and evaluations of the runs, and what a tuning run measured before (step 0) and after: rows of
    RUN_COLUMNS.

    Of an evaluation: its scores, with the name of the model before the task where there are several.
    """
    rows = []
    for run in finished:
        if study.script == "run_eval.py":
            table = _scores(run.folder)
            for model, scores in table.items():
                rows += [
                    _row(run, 0, 0, f"{model} {metric}" if len(table) > 1 else metric, value)
                    for metric, value in scores
                ]
            continue
        log = read_jsonl(run.folder / "log.jsonl")
        for entry in log:
            for metric in sorted(entry):
                if metric == "loss" or (metric.startswith("eval_") and isinstance(entry[metric], float)):
                    rows.append(_row(run, entry["step"], entry["tokens"], metric, entry[metric]))
        for metric, before, after in _before_after(run.folder):
            rows += [_row(run, 0, 0, metric, before), _row(run, log[-1]["step"], log[-1]["tokens"], metric, after)]
    return rows


def _row(run: StudyRun, step: int, tokens: int, metric: str, value: float) -> dict:
    return dict(zip(RUN_COLUMNS, (run.arm.name, run.arm.at or "", run.seed, step, tokens, metric, value), strict=True))


def _before_after(folder: Path) -> list[tuple[str, float, float]]:
    """(metric, before, after) of a tuning run; nothing of other runs."""
    record = read_json(folder / "before_after.json") or {}
    metrics = [
        (name, record[name]["before"], record[name]["after"])
        for name in ("answer_loss", "end_of_text_loss")
        if record.get(name)  # None: every held-out answer is cut
    ]
    for decoding in ("greedy", "sampled"):
        if decoding in record:
            metrics += [
                (f"{decoding}_{name}", record[decoding]["before"][name], record[decoding]["after"][name])
                for name in ("stopped", "kept_format", "loops")
            ]
    return metrics


def evaluate(study: Study, finished: list[StudyRun], out: Path) -> list[dict]:
    """Scores by run_eval.py of every finished run, and of the base that it was tuned from (step 0): rows of
    RUN_COLUMNS. Raises Refusal, Interrupted.
    """
    if not study.evaluate:
        return []
    argv = evaluation_argv(study, finished, out)
    call = {"argv": argv, "weights": [weights_of(run) for run in finished]}
    if read_json(out / "evaluation.json") != call:
        launch("run_eval.py", argv, out / "evaluation.log")
        write_json(out / "evaluation.json", call)
    table, rows = _scores(out / "evaluation"), []
    for run in finished:
        last = last_manifest(run.folder)
        base = base_of(study, run)
        rows += [_row(run, 0, 0, metric, value) for metric, value in (table[base] if base else ())]
        rows += [_row(run, last["step"], last["tokens"], metric, value) for metric, value in table[str(run.folder)]]
    return rows


def _scores(folder: Path) -> dict[str, list[tuple[str, float]]]:
    """{model: [(`task metric`, value)]} of an evaluation, prompt variants left out. Raises Refusal for a table that was
    altered since.
    """
    scores: dict[str, list[tuple[str, float]]] = {}
    recorded = (read_json(folder / "status.json") or {}).get("files", {}).get("scores.csv")
    if recorded not in (None, sha256(folder / "scores.csv")):
        raise Refusal(
            f"{folder}/scores.csv was altered since its evaluation: remove {folder}/status.json and"
            f" {folder.parent}/evaluation.json, and run again."
        )
    with open(folder / "scores.csv", encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if not line["variant"]:
                metric = metric_key(line["metric"], line.get("filter"))
                scores.setdefault(line["model"], []).append((f"{line['task']} {metric}", float(line["value"])))
    return scores


def check_measures(study: Study, run: StudyRun) -> None:
    """Raise Refusal for measures of the study that a finished run did not log, before the other runs are made."""
    logged = {row["metric"] for row in collect(study, [run])}
    for measure in study.measures:
        if measure not in logged and (" " not in measure or study.script == "run_eval.py"):
            raise Refusal(
                f"measure {measure} was not logged by {run.folder.name}; logged: {', '.join(sorted(logged))}. Finished"
                " runs are kept."
            )


def points(rows: list[dict], arm: Arm, seed: int, metric: str) -> dict[int, tuple[int, float]]:
    """{step: (tokens, value)} of one run."""
    return {
        r["step"]: (r["tokens"], r["value"])
        for r in rows
        if (r["arm"], r["at"] or None, r["seed"], r["metric"]) == (arm.name, arm.at, seed, metric)
    }


def curve(rows: list[dict], arm: Arm, seed: int, metric: str) -> dict[int, float]:
    """{step: value} of one run."""
    return {step: value for step, (_, value) in points(rows, arm, seed, metric).items()}


# ---- differences ----


def compare(study: Study, rows: list[dict], equal: dict[str, int], squares: list[dict]) -> list[dict]:
    """Paired differences, one pair per seed: an arm minus the arm that it is compared with, of each measure at equal
    tokens; what tuning changed of its base; and for arms that begin from a checkpoint and read the same windows, spike
    and recovery.

    A row: {arm, at, against (label of the other arm), what, unit, margin, seeds: [...], equal: number of seeds whose
    finished weights are those of the other arm, p_holm, verdict, items} and what `inference.summarize` gives. Holm's
    correction is over the rows of one measure. equal: `equal_weights`. squares: `items.squares_of`, by which the error
    of a row covers other items, too (`items`: their number). Raises Refusal for measures that were not logged, or not
    at equal tokens.
    """
    of_items = {(one["arm"], one["against"], one["what"]): one for one in squares}
    comparison = []
    for arm in study.arms:
        other = study.against_of(arm)
        pairs: dict[tuple, list[float]] = {}  # {(against, what, unit): difference of each seed}
        for seed in study.seeds_of(arm):
            seed_pairs = _measure_differences(study, arm, other, seed, rows)
            if arm.source and same_windows(arm.set):
                seed_pairs |= _recovery_differences(arm, other, seed, rows)
            for key, value in seed_pairs.items():
                pairs.setdefault(key, []).append(value)
        for (against, what, value_unit), values in pairs.items():
            row = {"arm": arm.name, "at": arm.at, "against": against, "what": what, "unit": value_unit}
            row |= _tested(values, study.margins.get(what), of_items.get((arm.label, against, what)))
            comparison.append({**row, "equal": equal.get(arm.label) if against == other.label else None})
    _adjust(comparison)
    return comparison


def _tested(values: list[float], margin: float | None, squares: dict | None) -> dict:
    """The fields of a comparison that follow from its differences, one per seed, infinite where there is none."""
    seeds = [value if math.isfinite(value) else None for value in values]
    if None in seeds:
        empty = dict.fromkeys(("value", "low", "high", "low90", "high90", "p", "p_equal"))
        return {**empty, "n": len(values), "margin": margin, "items": None, "seeds": seeds}
    found = inference.crossed(sum(values) / len(values), squares) if squares else inference.estimate(values)
    result = {**inference.summarize(found, margin), "margin": margin, "seeds": seeds}
    return {**result, "items": squares["items"] if squares else None}


def _adjust(comparison: list[dict]) -> None:
    """Set `p_holm`, over the rows of one measure (those against `its base` apart), and `verdict`."""
    families: dict[tuple, list[dict]] = {}
    for row in comparison:
        row["p_holm"] = None
        if row["p"] is not None:
            families.setdefault((row["what"], row["against"] == "its base"), []).append(row)
    for family in families.values():
        for row, adjusted in zip(family, holm([row["p"] for row in family]), strict=True):
            row["p_holm"] = adjusted
    for row in comparison:
        if row["value"] is None:
            censored = sum(value is None for value in row["seeds"])
            row["verdict"] = f"not within the run for {censored} of {row['n']} seeds"
        elif row["p"] is None:
            row["verdict"] = "one seed: no interval" if row["n"] == 1 else "the same for every seed"
        else:
            row["verdict"] = inference.verdict(row["p_holm"], row["p_equal"])


def _measure_differences(study: Study, arm: Arm, other: Arm, seed: int, rows: list[dict]) -> dict[tuple, float]:
    """{(against, what, unit): difference at equal tokens} of an arm's measures, for one seed. Raises Refusal for
    measures that were not logged.
    """
    pairs = {}
    for measure in study.measures:
        curves = {each.label: points(rows, each, seed, measure) for each in (arm, other)}
        if missing := [label for label, logged in curves.items() if not logged]:
            metrics = ", ".join(sorted({row["metric"] for row in rows}))
            raise Refusal(f"measure {measure} was not logged by {missing[0]}, seed {seed}; available: {metrics}.")
        values = {step: value for step, (_, value) in curves[arm.label].items()}
        if study.script == "run_sft.py" and 0 in values:
            pairs["its base", measure, contrasts.unit_of(measure)] = values[max(values)] - values[0]
        if arm is not other:
            ends = contrasts.at_equal_tokens(curves, measure)
            pairs[other.label, measure, contrasts.unit_of(measure)] = ends[arm.label] - ends[other.label]
    return pairs


def _recovery_differences(arm: Arm, other: Arm, seed: int, rows: list[dict]) -> dict[tuple, float]:
    """{(against, what, unit): value} of a resumed arm, for one seed: the highest excess of its training loss, and
    tokens until it is back (infinite where that is not seen within the run).
    """
    tokens_at = {row["step"]: row["tokens"] for row in rows}
    excess = after_resume(curve(rows, arm, seed, "loss"), curve(rows, other, seed, "loss"), arm.at)
    back = recovery(excess, arm.at)
    return {
        (other.label, "highest excess of the training loss after the stop", "nats"): max(list(excess.values())[:AFTER]),
        (other.label, "tokens until back", "tokens"): math.inf if back is None else tokens_at[back] - tokens_at[arm.at],
    }


def equal_weights(study: Study, finished: list[StudyRun]) -> dict[str, int]:
    """{arm: number of seeds whose finished weights are exactly those of the arm that it is compared with}."""
    if study.script == "run_eval.py":
        return {}
    weights = {(run.arm.label, run.seed): weights_of(run) for run in finished}
    others = {arm.label: study.against_of(arm).label for arm in study.arms}
    return {
        label: sum(sha == weights[other, seed] for (name, seed), sha in weights.items() if name == label)
        for label, other in others.items()
        if label != other
    }


def same_windows(settings: dict) -> bool:
    """Whether an arm with these settings reads the same windows as the run that it resumes; else their training losses
    cannot be compared.
    """
    return "data" not in names(str(settings.get("resume_without", "")))


def after_resume(losses: dict[int, float], reference: dict[int, float], at: int) -> dict[int, float]:
    """{step: loss minus the reference's, in nats} at the logged steps after a resume at step `at`."""
    return {step: losses[step] - reference[step] for step in sorted(losses) if step > at and step in reference}


def recovery(excess: dict[int, float], at: int) -> int | None:
    """The first logged step from which the mean excess of the next AFTER logged losses stays below BACK: `at` itself
    where that holds immediately, None where it never holds. A mean of fewer losses, at the end, shows nothing.
    """
    steps, values = list(excess), list(excess.values())
    means = [sum(values[i : i + AFTER]) / AFTER for i in range(len(values) - AFTER + 1)]
    above = [index for index, mean in enumerate(means) if mean > BACK]
    if not any(values) or (means and not above):  # the same run, or back at once
        return at
    return steps[above[-1] + 1] if above and above[-1] + 1 < len(means) else None


def weights_of(run: StudyRun) -> str:
    """sha256 of the files of a run's finished weights."""
    manifest = last_manifest(run.folder)
    folder, files = run.folder / f"checkpoint-{manifest['step']}", manifest["files"]
    names = sorted(name for name in files if re.fullmatch(r"(adapter_)?model.*\.safetensors", name))
    return " ".join(sha256_of(folder / name, files[name]) for name in names)


def health(logs: dict[str, list[list[dict]]]) -> dict[str, dict[str, dict[str, int]]]:
    """{arm: {"saturation", "overfitting": {answer: number of runs}}}, as training/loss_trends.py defines them, with
    what `cannot tell` needs; {} where no run has the evaluations that these need. logs: the log of every run of an arm.
    """
    verdicts = {arm: [loss_trends.judge(log) for log in runs] for arm, runs in logs.items()}
    if not any(one.slope for runs in verdicts.values() for judged in runs for one in judged.values()):
        return {}
    return {
        arm: {
            name: dict(collections.Counter(_answer(judged[name]) for judged in runs))
            for name in ("saturation", "overfitting")
        }
        for arm, runs in verdicts.items()
    }


def _answer(verdict: loss_trends.Verdict) -> str:
    """The answer of a verdict; of `cannot tell`, what is needed, without the numbers of one run."""
    if verdict.answer != loss_trends.CANNOT_TELL:
        return verdict.answer
    needed = verdict.needed if verdict.needed in loss_trends.RATE_NEEDED.values() else "more evaluations"
    return f"{verdict.answer} (needed: {needed})"


def logs_of(finished: list[StudyRun]) -> dict[str, list[list[dict]]]:
    """{arm: the log entries of each of its runs}."""
    logs: dict[str, list[list[dict]]] = {}
    for run in finished:
        logs.setdefault(run.arm.label, []).append(read_jsonl(run.folder / "log.jsonl"))
    return logs


def records_of(study: Study, finished: list[StudyRun], out: Path) -> dict:
    """What a report needs besides the measured values and the controlled variables: equal weights, mean squares over
    items, health and wall time of the runs. JSON.
    """
    return {
        "equal_weights": equal_weights(study, finished),
        "squares": items.squares_of(study, finished, out),
        "health": health(logs_of(finished)) if study.script != "run_eval.py" else {},
        "cost": {
            "runs": len(finished),
            "minutes": round(sum(filter(None, map(seconds_of, finished))) / 60, 1),
            "not_counted": sum(seconds_of(run) is None for run in finished),
        },
    }


def results_of(study: Study, rows: list[dict], records: dict) -> dict:
    """{comparison, contrasts}: every difference of arms, and every planned contrast, from the measured values `rows`
    and the `records_of` the runs. Raises Refusal.
    """
    return {
        "comparison": compare(study, rows, records["equal_weights"], records["squares"]),
        "contrasts": planned_contrasts(study, rows),
    }


def planned_contrasts(study: Study, rows: list[dict]) -> list[dict]:
    """`contrasts.compute` of a study."""
    series = contrasts.series_of(rows)
    return contrasts.compute(study.contrasts, study.seeds, study.begins, series, study.stop_early)


def until_decided(study: Study, every: list[StudyRun]) -> tuple[Study, list[StudyRun]]:
    """A study that stops early, and its runs, up to the seed after which every primary contrast is decided; all of it
    where none is, yet. Raises Refusal.
    """
    for count in range(1, len(study.seeds) + 1):
        part = dataclasses.replace(study, seeds=study.seeds[:count])
        runs = [run for run in every if run.seed in part.seeds]
        if not all(map(is_done, runs)):
            break
        if all(
            row["verdict"] != "cannot tell" for row in planned_contrasts(part, collect(part, runs)) if row["primary"]
        ):
            return part, runs
    return study, every
