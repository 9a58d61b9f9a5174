"""A controlled experiment: arms that differ in what the study names and in nothing else, run with several seeds, compared in pairs.

An arm is a set of arguments over a shared config, times seeds; each of them is a run folder of its own, made by the script's own command. An arm
may begin from checkpoints of another one (`from`, `at`). What was held equal is read from the manifests of the finished runs.
"""

import dataclasses
import difflib
import math
import subprocess
import sys
from pathlib import Path

import yaml

from . import scores
from .arguments import ROOT, Refusal, parse_pretrain
from .checkpoints import checkpoints, differences, read_manifest
from .runs import Interrupted, read_json, read_jsonl, write_json
from .sft_arguments import parse_sft

PARSERS = {"run_pretrain.py": parse_pretrain, "run_sft.py": parse_sft}
FIELDS = {"title", "question", "script", "config", "seeds", "set", "reference", "measure", "arms"}
ARM_FIELDS = {"set", "from", "at", "about"}
RUN_COLUMNS = ("arm", "at", "seed", "step", "tokens", "metric", "value")
AFTER = 10  # logged losses after a resume in which its spike is looked for, and over which recovery is averaged
BACK = 0.005  # nats: closer than that to the reference, on average, is back


class UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that comes twice is an error, not the last one's win."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{sorted(map(str, twice))[0]} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


@dataclasses.dataclass(frozen=True)
class Arm:
    """Arguments over the shared ones; `source`, `at`: the arm and the step of the checkpoint that it begins from (None: from nothing)."""

    name: str
    set: dict
    source: str | None = None
    at: int | None = None
    about: str = ""


@dataclasses.dataclass(frozen=True)
class Study:
    """A study file as it is meant. `arms`: the reference first, then what begins from other arms after those."""

    title: str
    question: str
    script: str
    config: str
    seeds: list[int]
    shared: dict
    reference: str
    measure: str
    arms: list[Arm]


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """One arm with one seed: its folder, its command's arguments, and those of the run that it begins from (none: [])."""

    arm: Arm
    seed: int
    folder: Path
    argv: list[str]
    source: list[str]


def load(path: str) -> Study:
    """A study from its YAML file. Raises Refusal with everything that is wrong in it."""
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeys)
        if not isinstance(raw, dict):
            raise Refusal(f"--config {path} must hold `key: value` lines, not a {type(raw).__name__}.")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"--config {path}: no study can be read there ({error}).") from None
    except yaml.YAMLError as error:
        raise Refusal(f"--config {path}: {' '.join(str(error).split())}.") from None
    problems = [f"`{name}` is no field of a study{_near(name, FIELDS)}." for name in raw if name not in FIELDS]
    problems += [f"`{name}` is missing." for name in ("title", "script", "config", "seeds", "reference", "arms") if name not in raw]
    for name, kind in (("seeds", list), ("set", dict), ("arms", dict)):
        if not isinstance(raw.get(name, kind()), kind):
            problems.append(f"`{name}` must be a {'list' if kind is list else 'mapping'}, not {raw[name]!r}.")
    if problems:
        raise Refusal(f"{path}: {' '.join(problems)}")
    arms = []
    for name, fields in raw["arms"].items():
        fields = fields or {}
        if not isinstance(fields, dict) or not isinstance(fields.get("set") or {}, dict) or not isinstance(fields.get("at") or [], list):
            problems.append(f"arm {name} must be a mapping, its `set` a mapping and its `at` a list of steps.")
            continue
        if bool(fields.get("from")) != bool(fields.get("at")):
            problems.append(f"arm {name}: `from` (an arm) and `at` (steps of its checkpoints) go together.")
        problems += [f"`{field}` of arm {name} is no field of an arm{_near(field, ARM_FIELDS)}." for field in fields if field not in ARM_FIELDS]
        if fields.get("from") is not None and fields["from"] not in raw["arms"]:
            problems.append(f"arm {name} begins from {fields['from']}, which is no arm.")
        elif fields.get("from") and (raw["arms"][fields["from"]] or {}).get("from"):
            problems.append(f"arm {name} begins from {fields['from']}, which itself begins from another: begin from an arm that begins from nothing.")
        for at in fields.get("at") or [None]:
            arms.append(Arm(str(name), fields.get("set") or {}, fields.get("from"), at, fields.get("about", "")))
    if raw["reference"] not in raw["arms"]:
        problems.append(f"reference {raw['reference']} is no arm: {', '.join(map(str, raw['arms']))}.")
    if raw["script"] not in PARSERS:
        problems.append(f"script {raw['script']}: one of {', '.join(PARSERS)} is wanted.")
    if len(set(raw["seeds"])) < len(raw["seeds"]) or not raw["seeds"]:
        problems.append(f"seeds {raw['seeds']}: at least one, each once.")
    if problems:
        raise Refusal(f"{path}: {' '.join(problems)}")
    arms.sort(key=lambda arm: (arm.name != raw["reference"], arm.source is not None))
    config = str(ROOT / raw["config"]) if not Path(raw["config"]).exists() else raw["config"]
    study = Study(
        raw["title"],
        raw.get("question", ""),
        raw["script"],
        config,
        raw["seeds"],
        raw.get("set") or {},
        raw["reference"],
        raw.get("measure", "eval_loss"),
        arms,
    )
    for one in runs(study, Path("unused")):
        PARSERS[study.script](one.argv)  # an unknown key, a wrong value: refused before anything is run
    return study


def _near(name: str, known) -> str:
    near = difflib.get_close_matches(str(name), known, 1, 0.5)
    return f": did you mean `{near[0]}`?" if near else f": {', '.join(sorted(known))}"


def runs(study: Study, out: Path) -> list[StudyRun]:
    """Every run of a study, in the order in which they are made."""
    found = []
    for seed in study.seeds:
        commands: dict[str, list[str]] = {}
        for arm in study.arms:
            folder = out / "runs" / f"{arm.name}{'' if arm.at is None else f'-at-{arm.at}'}-seed-{seed}"
            values = {**study.shared, **arm.set, "seed": seed, "output_dir": str(folder)}
            if arm.source:
                values["resume_from_checkpoint"] = str(out / "runs" / f"{arm.source}-seed-{seed}" / f"checkpoint-{arm.at}")
            argv = ["--config", study.config]
            for name, value in values.items():
                argv += _words(name, value)
            if arm.source is None:
                commands[arm.name] = argv
            found.append(StudyRun(arm, seed, folder, argv, commands[arm.source] if arm.source else []))
    return found


def _words(name: str, value) -> list[str]:
    """`--name value` as the scripts' parser reads it."""
    if isinstance(value, bool):
        return [f"--{name}", str(value)]
    return [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}", str(value)]


def _command_file(one: StudyRun) -> Path:
    """Beside the run's folder, which is the script's own."""
    return one.folder.parent / f"{one.folder.name}.json"


def _command(one: StudyRun) -> dict:
    return {"argv": one.argv, "source": one.source}


def is_done(one: StudyRun) -> bool:
    """Whether a run is finished, by the very command that the study now means. A run of another command is not of this study."""
    status = read_json(one.folder / "status.json")
    return read_json(_command_file(one)) == _command(one) and bool(status) and status["status"] == "finished"


def is_other(one: StudyRun) -> bool:
    """Whether the folder holds a run of another command: the arm, or the one that it begins from, was changed since."""
    return read_json(_command_file(one)) not in (None, _command(one))


def make(study: Study, one: StudyRun) -> None:
    """Run one arm with one seed, as a user would; what a kill left of it goes on. Raises Refusal, Interrupted."""
    one.folder.parent.mkdir(parents=True, exist_ok=True)
    write_json(_command_file(one), _command(one))
    argv = one.argv
    if checkpoints(one.folder):  # what it left out when it began is not left out again
        argv = [*argv, "--resume_from_checkpoint", "auto", "--resume_without", ""]
    with open(one.folder.with_suffix(".log"), "a", encoding="utf-8") as log:
        code = subprocess.run([sys.executable, str(ROOT / study.script), *argv], stdout=log, stderr=subprocess.STDOUT).returncode
    if code == 75:
        raise Interrupted(f"{one.folder.name} was interrupted. Run the same command again.")
    if code:
        last = one.folder.with_suffix(".log").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise Refusal(f"{one.folder.name} ended with status {code}: {' '.join(last)[-500:]} (all of it: {one.folder.with_suffix('.log')})")


# ---- what came of it ----


def last_manifest(folder: Path) -> dict:
    """The manifest of a finished run's last checkpoint."""
    return read_manifest(checkpoints(folder)[0][1])


def held_equal(study: Study, made: list[StudyRun]) -> dict:
    """What the finished runs of each seed share, from their manifests. Raises Refusal where they differ in what no arm sets.

    An arm that sets where text comes from may differ in the data's fingerprint; one that resumes without a state, in nothing.
    """
    of_data = {"dataset", "prepared_dir", "max_tokens", "min_score", "min_characters", "exact_dedup", "minhash_dedup"}
    for seed in study.seeds:
        own = [one for one in made if one.seed == seed]
        base = last_manifest(own[0].folder)["identity"]
        for one in own[1:]:
            found = differences(base, last_manifest(one.folder)["identity"])
            allowed = set(one.arm.set) | set(own[0].arm.set) | ({"data"} if of_data & (set(one.arm.set) | set(own[0].arm.set)) else set())
            rows = {**found["hyperparameters"], **found["data"], **found["environment"], **found["layout"]}
            if "model_config" in allowed:
                rows = {name: row for name, row in rows.items() if not name.startswith("model.")}
            if wrong := sorted(set(rows) - allowed):
                raise Refusal(
                    f"{one.folder.name} differs from {own[0].folder.name} in what the study does not name: "
                    f"{'; '.join(f'{name} {rows[name][0]} -> {rows[name][1]}' for name in wrong)}. Run the arms again under equal conditions, or name it."
                )
    identity = last_manifest(made[0].folder)["identity"]
    return {name: identity[name] for name in ("data", "hyperparameters", "environment", "layout")}


def collect(made: list[StudyRun]) -> list[dict]:
    """Every logged loss and evaluation of the runs: rows of RUN_COLUMNS."""
    rows = []
    for one in made:
        for entry in read_jsonl(one.folder / "log.jsonl"):
            for metric in sorted(entry):
                if metric == "loss" or (metric.startswith("eval_") and isinstance(entry[metric], float)):
                    place = (one.arm.name, one.arm.at or "", one.seed, entry["step"], entry["tokens"])
                    rows.append(dict(zip(RUN_COLUMNS, (*place, metric, entry[metric]), strict=True)))
    return rows


def curve(rows: list[dict], arm: Arm, seed: int, metric: str) -> dict[int, float]:
    """{step: value} of one run."""
    return {r["step"]: r["value"] for r in rows if (r["arm"], r["at"] or None, r["seed"], r["metric"]) == (arm.name, arm.at, seed, metric)}


def compare(study: Study, made: list[StudyRun], rows: list[dict]) -> list[dict]:
    """Each arm against the reference, seed by seed: the measure at the end; for arms that begin from a checkpoint, spike and recovery too.

    A row: {arm, at, what, unit, value, low, high, n, seeds: [...], equal: finished weights that are the reference's, bit for bit}.
    """
    reference, found = study.arms[0], []
    tokens_at = {row["step"]: row["tokens"] for row in rows}
    for arm in study.arms[1:]:
        pairs = {}
        for seed in study.seeds:
            ours, theirs = (curve(rows, one, seed, study.measure) for one in (arm, reference))
            if not (ours and theirs):
                logged = ", ".join(sorted({row["metric"] for row in rows}))
                raise Refusal(f"measure {study.measure} was not logged by {arm.name} and {reference.name}, seed {seed}; there is {logged}.")
            pairs.setdefault(("final " + study.measure, "nats"), []).append(ours[max(ours)] - theirs[max(theirs)])
            if arm.source:
                excess = after_resume(curve(rows, arm, seed, "loss"), curve(rows, reference, seed, "loss"), arm.at)
                pairs.setdefault(("highest excess training loss after it", "nats"), []).append(max(list(excess.values())[:AFTER]))
                back = recovery(excess)
                pairs.setdefault(("tokens until back", "tokens"), []).append(math.inf if back is None else tokens_at[back] - tokens_at[arm.at])
        equal = sum(weights_of(study, made, arm, seed) == weights_of(study, made, reference, seed) for seed in study.seeds)
        for (what, unit), values in pairs.items():
            whole = [value for value in values if math.isfinite(value)]
            stated = scores.ratio(whole) if len(whole) == len(values) else {"value": None, "low": None, "high": None}
            row = {"arm": arm.name, "at": arm.at, "what": what, "unit": unit, **{name: stated[name] for name in ("value", "low", "high")}}
            found.append({**row, "n": len(values), "seeds": [value if math.isfinite(value) else None for value in values], "equal": equal})
    return found


def after_resume(ours: dict[int, float], theirs: dict[int, float], at: int) -> dict[int, float]:
    """{step: loss above the reference's} at the logged steps after a resume."""
    return {step: ours[step] - theirs[step] for step in sorted(ours) if step > at and step in theirs}


def recovery(excess: dict[int, float]) -> int | None:
    """The first logged step from which the mean excess of the next AFTER logged losses stays below BACK; None where it never does."""
    steps, values = list(excess), list(excess.values())
    means = [sum(values[i : i + AFTER]) / len(values[i : i + AFTER]) for i in range(len(values))]
    for place in range(len(means) - 1, -1, -1):
        if means[place] > BACK:
            return steps[place + 1] if place + 1 < len(steps) else None
    return steps[0] if steps else None


def weights_of(study: Study, made: list[StudyRun], arm: Arm, seed: int) -> str:
    """sha256 of a run's finished weights."""
    folder = next(one.folder for one in made if (one.arm, one.seed) == (arm, seed))
    return last_manifest(folder)["files"]["model.safetensors" if study.script == "run_pretrain.py" else "adapter_model.safetensors"]["sha256"]


def seconds_of(one: StudyRun) -> float:
    """Seconds of training, by the speeds in the log; what evaluations, saves and starts took is not in it."""
    before, seconds = 0, 0.0
    for entry in read_jsonl(one.folder / "log.jsonl"):
        if "tokens_per_second" in entry and entry["step"] > (one.arm.at or 0):
            seconds += (entry["tokens"] - before) / entry["tokens_per_second"]
        before = entry["tokens"] if "loss" in entry else before
    return round(seconds, 1)


def planned(study: Study, every: list[StudyRun]) -> list[str]:
    """The runs, as --dry_run shows them: steps, and which are there."""
    lines = []
    for one in every:
        state = "finished" if is_done(one) else "changed since it was run: will be run again" if is_other(one) else "to run"
        training = PARSERS[study.script](one.argv)[-1]
        steps = f"{training.max_steps - (one.arm.at or 0):,} steps" if training.max_steps > 0 else f"{training.num_train_epochs:g} epochs"
        lines.append(f"{one.folder.name:42} {steps:>14}   {state}")
    return lines


def line_of(row: dict) -> str:
    """A difference as a person reads it."""
    name = row["arm"] if row["at"] is None else f"{row['arm']} at {row['at']}"
    if row["value"] is None:
        back = sum(value is None for value in row["seeds"])
        return f"{name}: {row['what']}: not within the run for {back} of {row['n']} seeds"
    shown = "{:+,.0f}" if row["unit"] == "tokens" else "{:+.4f}"
    if row["low"] is None:
        return f"{name}: {row['what']} {shown.format(row['value'])} {row['unit']} ({'one seed: no interval' if row['n'] == 1 else 'the same for every seed'})"
    verdict = "" if row["low"] > 0 or row["high"] < 0 else "; no difference found"
    return f"{name}: {row['what']} {shown.format(row['value'])} ({shown.format(row['low'])} to {shown.format(row['high'])}) {row['unit']}, {row['n']} seeds{verdict}"
