"""A study as its YAML says it: arms, seeds, what they share, and every run that follows from it."""

import dataclasses
import difflib
import re
from pathlib import Path

from ..config.eval import pairs, parse_eval
from ..config.pretrain import parse_pretrain
from ..config.ranges import range_problems
from ..config.sft import parse_sft
from ..config.study import read_study
from ..errors import Refusal
from ..paths import ROOT, expand_home
from ..training.plan import saved_steps

PARSERS = {"run_pretrain.py": parse_pretrain, "run_sft.py": parse_sft, "run_eval.py": parse_eval}

FIELDS = {
    "title",
    "question",
    "script",
    "config",
    "seeds",
    "prepare",
    "set",
    "reference",
    "measure",
    "evaluate",
    "arms",
}

ARM_FIELDS = {"set", "from", "at", "against", "about"}


@dataclasses.dataclass(frozen=True)
class Arm:
    """Arguments over the shared ones; `source`, `at`: the arm and the step of the checkpoint that it begins from (None:
    from nothing).

    against: the arm that it is compared with.
    """

    name: str
    set: dict
    source: str | None = None
    at: int | None = None
    about: str = ""
    against: str = ""


@dataclasses.dataclass(frozen=True)
class Study:
    """A study file as it is meant. `arms`: the reference first, then what begins from other arms after those.

    prepare: command lines that come before the runs. evaluate: arguments of run_eval.py over all of them ({}: none).
    measures: what is compared, by the names of the log, of the evaluation (`task metric`) and of a tuning's before and
    after.
    """

    title: str
    question: str
    script: str
    config: str
    seeds: list[int]
    prepare: list[str]
    shared: dict
    reference: str
    measures: list[str]
    evaluate: dict
    arms: list[Arm]


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """One arm with one seed: its folder, its command's arguments, and what it rests on: the command of the run that it
    begins from, and `prepare`.
    """

    arm: Arm
    seed: int
    folder: Path
    argv: list[str]
    source: list[str]
    prepared: list[str]


def load(path: str) -> Study:
    """A study from its YAML file. Raises Refusal with everything that is wrong in it."""
    raw = read_study(path)
    problems = [f"`{name}` is no field of a study{_near(name, FIELDS)}." for name in raw if name not in FIELDS]
    problems += [
        f"`{name}` is missing."
        for name in ("title", "script", "config", "seeds", "reference", "arms")
        if name not in raw
    ]
    problems += [
        f"`{name}` is empty: give a value, or leave it out." for name in raw if raw[name] is None and name != "question"
    ]
    for name, kind in (("seeds", list), ("set", dict), ("arms", dict), ("prepare", list), ("evaluate", dict)):
        if raw.get(name) is not None and not isinstance(raw[name], kind):
            problems.append(f"`{name}` must be a {'list' if kind is list else 'mapping'}, not {raw[name]!r}.")
    if problems:
        raise Refusal(f"{path}: {' '.join(problems)}")
    for where, values in [("`set`", raw.get("set") or {}), ("`evaluate`", raw.get("evaluate") or {})]:
        problems += _empty(where, values) + _own(where, values)
    arms = []
    raw["arms"], raw["reference"] = {str(name): fields for name, fields in raw["arms"].items()}, str(raw["reference"])
    for name, fields in raw["arms"].items():
        fields = {} if fields is None else fields
        if (
            not isinstance(fields, dict)
            or not isinstance(fields.get("set") or {}, dict)
            or not isinstance(fields.get("at") or [], list)
        ):
            problems.append(f"arm {name} must be a mapping, its `set` a mapping and its `at` a list of steps.")
            continue
        fields |= {field: str(fields[field]) for field in ("from", "against") if fields.get(field) is not None}
        where, values = f"`set` of arm {name}", fields.get("set") or {}
        problems += _empty(where, values) + _own(where, values, fields.get("from") is not None)
        if (
            not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name)
            or sum(name.lower() == str(other).lower() for other in raw["arms"]) > 1
        ):
            problems.append(
                f"arm {name!r}: a name is of letters, digits, dots, dashes and underscores, another one whatever the"
                " case, since folders are called so."
            )
        if (fields.get("from") is None) != (not fields.get("at")):
            problems.append(f"arm {name}: `from` (an arm) and `at` (steps of its checkpoints) go together.")
        problems += [
            f"`{field}` of arm {name} is no field of an arm{_near(field, ARM_FIELDS)}."
            for field in fields
            if field not in ARM_FIELDS
        ]
        if fields.get("from") is not None and fields["from"] not in raw["arms"]:
            problems.append(f"arm {name} begins from {fields['from']}, which is no arm.")
        elif fields.get("from") is not None and (raw["arms"][fields["from"]] or {}).get("from") is not None:
            problems.append(
                f"arm {name} begins from {fields['from']}, which itself begins from another: begin from an arm that"
                " begins from nothing."
            )
        against = raw["reference"] if fields.get("against") is None else fields["against"]
        if against not in raw["arms"]:
            problems.append(
                f"arm {name} is to be compared with {against}, which is no arm: {', '.join(map(str, raw['arms']))}."
            )
        problems += [
            f"arm {name}: at {at!r} is no step." for at in fields.get("at") or [] if type(at) is not int or at < 1
        ]
        for at in fields.get("at") or [None]:
            arms.append(
                Arm(str(name), fields.get("set") or {}, fields.get("from"), at, fields.get("about") or "", str(against))
            )
    if raw["reference"] not in raw["arms"]:
        problems.append(f"reference {raw['reference']} is no arm: {', '.join(map(str, raw['arms']))}.")
    elif any(arm.source for arm in arms if arm.name == str(raw["reference"])):
        problems.append(f"reference {raw['reference']} begins from another arm: take one that begins from nothing.")
    for command in raw.get("prepare") or []:
        if not (ROOT / str(command).partition(" ")[0]).is_file():
            problems.append(
                f"`prepare` {command!r}: a command begins with a script of this repository, such as run_pretrain.py."
            )
    if raw["script"] not in PARSERS:
        problems.append(f"script {raw['script']}: one of {', '.join(PARSERS)} is wanted.")
    if raw["script"] == "run_eval.py" and (raw.get("evaluate") or any(arm.source for arm in arms)):
        problems.append("arms of run_eval.py are evaluations: they have no `evaluate` and begin from nothing.")
    if odd := [seed for seed in raw["seeds"] if type(seed) is not int]:
        problems.append(f"seeds {odd[0]!r}: a whole number is wanted.")
    elif len(set(raw["seeds"])) < len(raw["seeds"]) or not raw["seeds"]:
        problems.append(f"seeds {raw['seeds']}: at least one, each once.")
    problems += [problem for seed in raw["seeds"] for problem in range_problems({"seed": seed})]
    measures = raw.get("measure", "eval_loss")
    measures = list(map(str, measures if isinstance(measures, list) else [measures]))
    if problems:
        raise Refusal(f"{path}: {' '.join(problems)}")
    arms.sort(key=lambda arm: (arm.name != raw["reference"], arm.source is not None))
    config = expand_home(raw["config"])
    config = config if Path(config).exists() else str(ROOT / config)
    study = Study(
        raw["title"],
        raw.get("question") or "",
        raw["script"],
        config,
        raw["seeds"],
        list(map(str, raw.get("prepare") or [])),
        raw.get("set") or {},
        raw["reference"],
        measures,
        raw.get("evaluate") or {},
        arms,
    )
    every = runs(study, Path("unused"))
    for one in every:
        PARSERS[study.script](one.argv)  # an unknown key, a wrong value: refused before anything is run
    if problems := [
        problem
        for one in every
        if one.seed == study.seeds[0] and one.source
        for problem in _beginning(one, study.script)
    ]:
        raise Refusal(f"{path}: {' '.join(problems)}")
    if study.evaluate:
        parse_eval(evaluation_argv(study, every, Path("unused")))
    if study.script != "run_eval.py":
        asked = [*map(str, study.evaluate.get("tasks", ())), *pairs(study.evaluate.get("texts", []))]
        for measure in measures:
            task, of, _ = measure.partition(" ")
            if of and task not in asked:
                raise Refusal(f"{path}: measure {measure}: `evaluate` asks for no {task}{_near(task, asked)}.")
    return study


def _beginning(one: StudyRun, script: str) -> list[str]:
    """What keeps a run from the checkpoint that it begins from, by the arguments of both: a step without one, rotated
    away, or not before the end.
    """
    (*_, source_args, source), (*_, training) = PARSERS[script](one.source), PARSERS[script](one.argv)
    name, at, found = one.arm.name, one.arm.at, []
    if 0 < training.max_steps <= at:
        found.append(
            f"arm {name}: at {at} is not before its own end (max_steps {training.max_steps}), so it would train"
            " nothing."
        )
    if source.max_steps < 1 or ("save_steps" not in source_args.given and source.save_strategy == "steps"):
        if 0 < source.max_steps < at:
            found.append(
                f"arm {name}: at {at} is beyond the end of arm {one.arm.source} (max_steps {source.max_steps})."
            )
        return found  # how often it saves is derived when it begins
    saved = saved_steps(source, source.max_steps)
    kept = (
        saved
        if source.save_total_limit is None or "save_total_limit" not in source_args.given
        else saved[-max(source.save_total_limit, 1) :]
    )
    if at not in kept:
        why = (
            f"keeps none of step {at} (save_total_limit {source.save_total_limit})"
            if at in saved
            else f"saves none at step {at}"
        )
        there = [step for step in kept if step < training.max_steps or training.max_steps < 1]
        shown = ", ".join(map(str, there[:8] + (["..."] if len(there) > 8 else []))) or "none"
        found.append(f"arm {name}: at {at}: arm {one.arm.source} {why}; checkpoints to begin from: {shown}.")
    return found


def _empty(where: str, values: dict) -> list[str]:
    """What of an arm's, or the evaluation's, arguments is left empty: a command line cannot say so."""
    return [
        f"{where}: `{name}` is empty: give a value, or leave it out." for name, value in values.items() if value is None
    ]


def _near(name: str, known) -> str:
    """The likeliest of the known names, else all of them."""
    near = difflib.get_close_matches(str(name), known, 1, 0.5)
    return f": did you mean `{near[0]}`?" if near else f": {', '.join(sorted(known)) or 'nothing'}"


def _own(where: str, values: dict, begins: bool = False) -> list[str]:
    """What of the settings the study gives itself, one sentence each. begins: whether the runs begin from another arm's
    checkpoint.
    """
    own = {"seed": "the seeds are `seeds`", "output_dir": "runs lie in the study's folder"}
    own |= {"resume_from_checkpoint": "`from` and `at` say where it begins"} if begins else {}
    return [f"{where}: `{name}` is the study's own: {why}." for name, why in own.items() if name in values]


def runs(study: Study, out: Path) -> list[StudyRun]:
    """Every run of a study, in the order in which they are made."""
    found = []
    for seed in study.seeds:
        commands: dict[str, list[str]] = {}
        for arm in study.arms:
            folder = out / "runs" / f"{arm.name}{'' if arm.at is None else f'-at-{arm.at}'}-seed-{seed}"
            values = {**study.shared, **arm.set, "seed": seed, "output_dir": str(folder)}
            if arm.source is not None:
                values["resume_from_checkpoint"] = str(
                    out / "runs" / f"{arm.source}-seed-{seed}" / f"checkpoint-{arm.at}"
                )
            argv = ["--config", study.config]
            for name, value in values.items():
                argv += _words(name, value)
            if arm.source is None:
                commands[arm.name] = argv
            found.append(
                StudyRun(arm, seed, folder, argv, [] if arm.source is None else commands[arm.source], study.prepare)
            )
    return found


def _words(name: str, value) -> list[str]:
    """`--name value` as the scripts' parser reads it."""
    if isinstance(value, bool):
        return [f"--{name}", str(value)]
    return [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}", str(value)]


def replace_values(argv: list[str], values: dict) -> list[str]:
    """A command line with these arguments instead of its own."""
    kept, own = [], True
    for word in argv:
        own = word.removeprefix("--") not in values if word.startswith("--") else own
        kept += [word] if own else []
    return kept + [word for name, value in values.items() for word in _words(name, value)]


def base_of(study: Study, one: StudyRun) -> str | None:
    """The base model of a tuning run, else None."""
    return parse_sft(one.argv)[0].model_name_or_path if study.script == "run_sft.py" else None


def evaluation_argv(study: Study, made: list[StudyRun], out: Path) -> list[str]:
    """Arguments of run_eval.py: every run and, of tuning, every base."""
    models = [*dict.fromkeys(base for one in made if (base := base_of(study, one))), *(str(one.folder) for one in made)]
    argv = ["--models", *models, "--output_dir", str(out / "evaluation")]
    for name, value in study.evaluate.items():
        argv += _words(name, value)
    return argv
