"""What came of a study: what was held equal, every measured value, and the arms' differences, paired by seed."""

import csv
import dataclasses
import math
from pathlib import Path

from ..checkpoint.identity import differences
from ..checkpoint.store import checkpoints
from ..checkpoint.verify import read_manifest
from ..config.fields import names
from ..config.pretrain import CurationArguments, DataArguments, ModelArguments
from ..config.sft import AdapterArguments, BaseArguments, RowArguments
from ..distributed import print_main
from ..errors import Refusal
from ..evaluation import statistics
from ..files import read_json, read_jsonl, sha256, write_json
from ..hub.client import nothing_private, translated
from .runner import launch
from .spec import Arm, Study, StudyRun, base_of, evaluation_argv

RUN_COLUMNS = ("arm", "at", "seed", "step", "tokens", "metric", "value")

AFTER = 10  # logged losses after a resume in which its spike is looked for, and over which recovery is averaged

REPORT_HEAD = (  # a dataset card's
    "---\ntags: [llama-lite, study]\nconfigs:\n- config_name: results\n  data_files: results.csv\n---\n\n"
)

BACK = 0.005  # nats: closer than that to the reference, on average, is back


def arguments_of(*groups) -> set[str]:
    return {field.name for group in groups for field in dataclasses.fields(group)}


OF_DATA = arguments_of(DataArguments, CurationArguments, RowArguments)

OF_MODEL = arguments_of(ModelArguments, BaseArguments, AdapterArguments)

OF_LENGTH = {"max_steps", "num_train_epochs", "tokens_per_step", "sequences_per_step"}


def last_manifest(folder: Path) -> dict:
    """The manifest of a finished run's last checkpoint."""
    return read_manifest(checkpoints(folder)[0][1])


def check_controlled_variables(study: Study, made: list[StudyRun]) -> dict:
    """What the finished runs share, {kind: {name: value}}, from their manifests. Raises Refusal where runs of one seed
    differ in what no arm sets.

    Arms that set where text comes from may differ in the data's fingerprint, those that set the model or adapter, in
    the model; the tokenizer and the number of tokens are equal unless they are named themselves.
    """
    shared: dict | None = None
    for seed in study.seeds:
        own = [one for one in made if one.seed == seed]
        first = own[0]
        for one in own:
            then, now = (_conditions(study, run.folder) for run in (first, one))
            named = set(first.arm.set) | set(one.arm.set)
            found = differences(then, now)
            rows = {name: row for kind in found.values() for name, row in kind.items()}
            free = (
                named
                | ({"data", "held_out"} if named & OF_DATA else set())
                | ({"tokens"} if named & OF_LENGTH else set())
            )
            free |= {"weights"} if "models" in named else set()
            wrong = sorted(
                name for name in rows if name not in free and not (name.startswith("model.") and named & OF_MODEL)
            )
            if wrong:
                raise Refusal(
                    f"{one.folder.name} differs from {first.folder.name} in what the study does not name:"
                    f" {'; '.join(f'{name} {rows[name][0]} -> {rows[name][1]}' for name in wrong)}. Run the arms again"
                    " under equal conditions, or name it."
                )
            same = {kind: now[kind] for kind in ("data", "hyperparameters", "environment", "layout")}
            shared = (
                same
                if shared is None
                else {k: {n: v for n, v in kept.items() if same[k].get(n) == v} for k, kept in shared.items()}
            )
    return shared


def _conditions(study: Study, folder: Path) -> dict:
    """A run's identity, with the tokens that it learnt from and the tokenizer, as further facts of its data; of an
    evaluation, its arguments, and the models' weights.
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
    return {**manifest["identity"], "data": {**manifest["identity"]["data"], **further}}


# ---- every value ----


def collect(study: Study, made: list[StudyRun]) -> list[dict]:
    """Logged losses and evaluations of the runs, and what a tuning measured before (step 0) and after: rows of
    RUN_COLUMNS.

    Of an evaluation its scores, with the model's name before the task's where there are several.
    """
    rows = []
    for one in made:
        if study.script == "run_eval.py":
            table = _scores(one.folder)
            for model, values in table.items():
                rows += [
                    _row(one, 0, 0, f"{model} {metric}" if len(table) > 1 else metric, value)
                    for metric, value in values
                ]
            continue
        log = read_jsonl(one.folder / "log.jsonl")
        for entry in log:
            for metric in sorted(entry):
                if metric == "loss" or (metric.startswith("eval_") and isinstance(entry[metric], float)):
                    rows.append(_row(one, entry["step"], entry["tokens"], metric, entry[metric]))
        for metric, before, after in _before_after(one.folder):
            rows += [_row(one, 0, 0, metric, before), _row(one, log[-1]["step"], log[-1]["tokens"], metric, after)]
    return rows


def _row(one: StudyRun, step: int, tokens: int, metric: str, value: float) -> dict:
    return dict(zip(RUN_COLUMNS, (one.arm.name, one.arm.at or "", one.seed, step, tokens, metric, value), strict=True))


def _before_after(folder: Path) -> list[tuple[str, float, float]]:
    record = read_json(folder / "before_after.json") or {}
    found = [
        (name, record[name]["before"], record[name]["after"])
        for name in ("answer_loss", "end_of_text_loss")
        if record.get(name)  # None: every held-out answer is cut
    ]
    for how in ("greedy", "sampled"):
        if how in record:
            found += [
                (f"{how}_{share}", record[how]["before"][share], record[how]["after"][share])
                for share in ("stopped", "kept_format", "loops")
            ]
    return found


def evaluate(study: Study, made: list[StudyRun], out: Path) -> list[dict]:
    """What run_eval.py says of every finished run, and of the base that it was tuned from (step 0): rows of
    RUN_COLUMNS. Raises Refusal, Interrupted.
    """
    if not study.evaluate:
        return []
    argv = evaluation_argv(study, made, out)
    call = {"argv": argv, "weights": [weights_of(one) for one in made]}
    if read_json(out / "evaluation.json") != call:
        launch("run_eval.py", argv, out / "evaluation.log")
        write_json(out / "evaluation.json", call)
    table, rows = _scores(out / "evaluation"), []
    for one in made:
        last = last_manifest(one.folder)
        base = base_of(study, one)
        rows += [_row(one, 0, 0, metric, value) for metric, value in (table[base] if base else ())]
        rows += [_row(one, last["step"], last["tokens"], metric, value) for metric, value in table[str(one.folder)]]
    return rows


def _scores(folder: Path) -> dict[str, list[tuple[str, float]]]:
    """{model: [(`task metric`, value)]} of an evaluation, as the tasks ask, without variants. Raises Refusal for a
    table that was altered since.
    """
    found: dict[str, list[tuple[str, float]]] = {}
    sealed = (read_json(folder / "status.json") or {}).get("files", {}).get("scores.csv")
    if sealed not in (None, sha256(folder / "scores.csv")):
        raise Refusal(
            f"{folder}/scores.csv was altered since its evaluation: remove {folder}/status.json and"
            f" {folder.parent}/evaluation.json, and run again."
        )
    with open(folder / "scores.csv", encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if not line["variant"]:
                found.setdefault(line["model"], []).append((f"{line['task']} {line['metric']}", float(line["value"])))
    return found


def check_measures(study: Study, one: StudyRun) -> None:
    """Raise Refusal where the study measures what its runs do not log; of one finished run, so that not all are made in
    vain.
    """
    logged = {row["metric"] for row in collect(study, [one])}
    for measure in study.measures:
        if measure not in logged and (" " not in measure or study.script == "run_eval.py"):
            raise Refusal(
                f"measure {measure} was not logged by {one.folder.name}; there is {', '.join(sorted(logged))}. What is"
                " finished stays."
            )


def curve(rows: list[dict], arm: Arm, seed: int, metric: str) -> dict[int, float]:
    """{step: value} of one run."""
    return {
        r["step"]: r["value"]
        for r in rows
        if (r["arm"], r["at"] or None, r["seed"], r["metric"]) == (arm.name, arm.at, seed, metric)
    }


# ---- differences ----


def compare(study: Study, made: list[StudyRun], rows: list[dict]) -> list[dict]:
    """Differences in pairs of one seed: each arm's measures at the end less those of the arm that it is compared with;
    what tuning changed of its base; and for arms that begin from a checkpoint and read the same windows, spike and
    recovery.

    A row: {arm, at, against, what, unit, value, low, high, n, seeds: [...], equal: finished weights that are the
    other's, bit for bit}.
    """
    found = []
    tokens_at = {row["step"]: row["tokens"] for row in rows}
    for arm in study.arms:
        other = next(one for one in study.arms if one.name == arm.against)
        pairs = {}
        for seed in study.seeds:
            for measure in study.measures:
                ours, theirs = (curve(rows, one, seed, measure) for one in (arm, other))
                if missing := [one.name for one, values in ((arm, ours), (other, theirs)) if not values]:
                    logged = ", ".join(sorted({row["metric"] for row in rows}))
                    raise Refusal(f"measure {measure} was not logged by {missing[0]}, seed {seed}; there is {logged}.")
                if study.script == "run_sft.py" and 0 in ours:
                    pairs.setdefault(("its base", measure, unit(measure)), []).append(ours[max(ours)] - ours[0])
                if arm is not other:
                    pairs.setdefault((other.name, measure, unit(measure)), []).append(
                        ours[max(ours)] - theirs[max(theirs)]
                    )
            if arm.source and same_windows(arm.set):
                excess = after_resume(curve(rows, arm, seed, "loss"), curve(rows, other, seed, "loss"), arm.at)
                pairs.setdefault((other.name, "highest excess of the training loss after the stop", "nats"), []).append(
                    max(list(excess.values())[:AFTER])
                )
                back = recovery(excess, arm.at)
                pairs.setdefault((other.name, "tokens until back", "tokens"), []).append(
                    math.inf if back is None else tokens_at[back] - tokens_at[arm.at]
                )
        equal = None
        if arm is not other and study.script != "run_eval.py":
            weights = {(one.arm.name, one.arm.at, one.seed): weights_of(one) for one in made if one.arm in (arm, other)}
            equal = sum(weights[arm.name, arm.at, seed] == weights[other.name, other.at, seed] for seed in study.seeds)
        for (against, what, name), values in pairs.items():
            whole = [value for value in values if math.isfinite(value)]
            stated = (
                statistics.ratio(whole) if len(whole) == len(values) else {"value": None, "low": None, "high": None}
            )
            row = {"arm": arm.name, "at": arm.at, "against": against, "what": what, "unit": name}
            row |= {key: stated[key] for key in ("value", "low", "high")} | {"n": len(values)}
            found.append(
                {**row, "seeds": [value if math.isfinite(value) else None for value in values], "equal": equal}
            )
    return found


def same_windows(settings: dict) -> bool:
    """Whether an arm with these settings reads the windows of the run that it goes on with; of others, the training
    loss says nothing of it.
    """
    return "data" not in names(str(settings.get("resume_without", "")))


def unit(measure: str) -> str:
    """Of a measure's values: nats, bits a byte, or a share ("")."""
    return (
        "bits a byte"
        if measure.endswith(("bits_per_byte", "bits_per_token"))
        else "nats"
        if measure.endswith("loss")
        else ""
    )


def after_resume(ours: dict[int, float], theirs: dict[int, float], at: int) -> dict[int, float]:
    """{step: loss above the reference's} at the logged steps after a resume."""
    return {step: ours[step] - theirs[step] for step in sorted(ours) if step > at and step in theirs}


def recovery(excess: dict[int, float], at: int) -> int | None:
    """The first logged step from which the mean excess of the next AFTER logged losses stays below BACK: `at` itself
    where it is so at once, None where it never is.
    """
    steps, values = list(excess), list(excess.values())
    means = [sum(values[i : i + AFTER]) / len(values[i : i + AFTER]) for i in range(len(values))]
    far = [index for index, mean in enumerate(means) if mean > BACK]
    if not far:
        return at
    return steps[far[-1] + 1] if far[-1] + 1 < len(steps) else None


def weights_of(one: StudyRun) -> str:
    """sha256 of a run's finished weights."""
    files = last_manifest(one.folder)["files"]
    return files.get("model.safetensors", files.get("adapter_model.safetensors"))["sha256"]


def health(made: list[StudyRun]) -> dict[str, dict[str, int]]:
    """{arm: {"saturated" or "overfitting": in how many runs their health said so}}, as trends.py defines them."""
    found: dict[str, dict[str, int]] = {}
    for one in made:
        events = {event["event"] for event in read_jsonl(one.folder / "events.jsonl")}
        for name in events & {"saturated", "overfitting"}:
            of_arm = found.setdefault(one.arm.name, {})
            of_arm[name] = of_arm.get(name, 0) + 1
    return found


def push(out: Path, repo: str) -> None:
    """Report, results and figures of a study as a dataset repository on the Hub, one commit. Raises Refusal."""
    from huggingface_hub import CommitOperationAdd, HfApi

    report = REPORT_HEAD + (out / "report.md").read_text(encoding="utf-8")
    there = {
        str(path.relative_to(out)): path
        for path in (out / "results.csv", out / "comparison.json", *sorted((out / "figures").glob("*.png")))
    }
    nothing_private({"README.md": out / "report.md", **there})
    files = [
        CommitOperationAdd("README.md", report.encode()),
        *(CommitOperationAdd(name, str(path)) for name, path in there.items()),
    ]
    try:
        HfApi().create_repo(repo, repo_type="dataset", exist_ok=True)
        HfApi().create_commit(repo, files, commit_message="Report of a study", repo_type="dataset")
    except Exception as error:  # the client raises its own, httpx2's and OSError
        raise Refusal(
            f"--hub_model_id {repo}: {translated(error)}. The report stays; run the same command again."
        ) from None
    print_main(f"hub       {repo} holds the report")
