"""A study as its YAML file defines it: arms, seeds, what they share, and every run that follows from it."""

import dataclasses
import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from ..config.eval import pairs, parse_eval
from ..config.pretrain import parse_pretrain
from ..config.ranges import range_problems
from ..config.sft import parse_sft
from ..config.study import read_study
from ..errors import Refusal
from ..evaluation.resolve import model_name
from ..paths import ROOT, expand_home
from ..training.plan import saved_steps
from .contrasts import Contrasts, contrast_problems, is_margin, read_contrasts
from .stopping import fewest_seeds

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
    "margin",
    "outcomes",
    "contrasts",
    "primary",
    "registered",
    "deviations",
    "stop_early",
}

ARM_FIELDS = {"set", "from", "at", "against", "about", "seeds"}


@dataclasses.dataclass(frozen=True)
class Arm:
    """Arguments that override the shared ones. `source`, `at`: arm and step of the checkpoint that it begins from
    (None: it begins from scratch).

    against: the name of the arm that it is compared with (`Study.against_of`). seeds: those that it runs with (None:
    all of the study).
    """

    name: str
    set: dict
    source: str | None = None
    at: int | None = None
    about: str = ""
    against: str = ""
    seeds: list[int] | None = None

    @property
    def label(self) -> str:
        """The name, with the step that it begins from."""
        return self.name if self.at is None else f"{self.name} at {self.at}"


@dataclasses.dataclass(frozen=True)
class Study:
    """A checked study file. `arms`: the reference first; arms that begin from another arm come last.

    prepare: command lines that are run before the runs. evaluate: arguments of run_eval.py over all runs ({}: none).
    measures: the metrics that are compared, by their names in the log, in the evaluation (`task metric`) and in a
    tuning run's before and after. margins: {measure: a difference that counts as none}. contrasts: the planned
    analysis. registered: whether the study file must be committed alone before the first run; deviations: what was done
    otherwise than registered, in words. stop_early: whether it ends with the seed after which every primary contrast is
    decided (`studies/stopping.py`); the seeds are the most that it takes.
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
    margins: dict[str, float] = dataclasses.field(default_factory=dict)
    contrasts: Contrasts = Contrasts()
    registered: bool = False
    deviations: list[str] = dataclasses.field(default_factory=list)
    stop_early: bool = False

    def seeds_of(self, arm: Arm) -> list[int]:
        """The seeds of an arm, in the order of the study."""
        return [seed for seed in self.seeds if arm.seeds is None or seed in arm.seeds]

    @property
    def begins(self) -> dict[str, int | None]:
        """{label of an arm: the step of the checkpoint that it begins from}; an arm of one `at` by its name, too."""
        return _begins(self.arms)

    def against_of(self, arm: Arm) -> Arm:
        """The arm that an arm is compared with."""
        return _against(self.arms, arm)


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """One arm with one seed: its folder and the arguments of its command.

    source: arguments of the run that it begins from ([]: it begins from scratch). prepared: the study's `prepare`.
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
    check_fields(path, raw)
    raw["arms"], raw["reference"] = {str(name): fields for name, fields in raw["arms"].items()}, str(raw["reference"])
    problems = _argument_problems("`set`", raw.get("set") or {})
    problems += _argument_problems("`evaluate`", raw.get("evaluate") or {})
    arms: list[Arm] = []
    for name, fields in raw["arms"].items():
        fields = {} if fields is None else fields
        if _is_arm(fields):
            fields |= {field: str(fields[field]) for field in ("from", "against") if fields.get(field) is not None}
            problems += _arm_problems(name, fields, raw)
            arms += _arms_of(name, fields, raw["reference"])
        else:
            problems.append(f"arm {name} must be a mapping, its `set` a mapping and its `at` a list of steps.")
    problems += _reference_problems(raw, arms) + _script_problems(raw, arms) + _seed_problems(raw["seeds"])
    problems += _analysis_problems(raw, arms)
    if problems:
        raise Refusal(f"{path}: {' '.join(problems)}")
    study = _build_study(raw, arms)
    check_runs(path, study)
    return study


def check_fields(path: str, raw: dict) -> None:
    """Raise Refusal for fields of a study file that are unknown, missing, empty or of another type."""
    problems = [f"`{name}` is not a field of a study{_near(name, FIELDS)}." for name in raw if name not in FIELDS]
    problems += [
        f"`{name}` is missing."
        for name in ("title", "script", "config", "seeds", "reference", "arms")
        if name not in raw
    ]
    problems += [
        f"`{name}` is empty: give a value, or leave it out." for name in raw if raw[name] is None and name != "question"
    ]
    kinds = {
        **dict.fromkeys(("seeds", "prepare", "deviations"), list),
        **dict.fromkeys(("set", "arms", "evaluate", "margin", "outcomes", "contrasts", "primary"), dict),
    }
    for name, kind in kinds.items():
        if raw.get(name) is not None and not isinstance(raw[name], kind):
            problems.append(f"`{name}` must be a {'list' if kind is list else 'mapping'}, not {raw[name]!r}.")
    if problems:
        raise Refusal(f"{path}: {' '.join(problems)}")


def _is_arm(fields) -> bool:
    """Whether an arm of the file, its `set` and its `at` have the right types."""
    return (
        isinstance(fields, dict)
        and isinstance(fields.get("set") or {}, dict)
        and isinstance(fields.get("at") or [], list)
        and isinstance(fields.get("seeds") or [], list)
    )


def _arms_of(name: str, fields: dict, reference: str) -> list[Arm]:
    """The arms of one entry of the file: one per step of its `at`, or one that begins from scratch."""
    against = reference if fields.get("against") is None else fields["against"]
    return [
        Arm(
            name,
            fields.get("set") or {},
            fields.get("from"),
            at,
            fields.get("about") or "",
            against,
            fields.get("seeds"),
        )
        for at in fields.get("at") or [None]
    ]


def _arm_problems(name: str, fields: dict, raw: dict) -> list[str]:
    """What is wrong with the arm `name` of the study file `raw`."""
    source = fields.get("from")
    problems = _argument_problems(f"`set` of arm {name}", fields.get("set") or {}, source is not None)
    if (
        not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name)
        or sum(name.lower() == str(other).lower() for other in raw["arms"]) > 1
    ):
        problems.append(
            f"arm {name!r}: a name has letters, digits, dots, dashes and underscores, and differs from the other names"
            " by more than case, since folders are named after it."
        )
    if (source is None) != (not fields.get("at")):
        problems.append(f"arm {name}: `from` (an arm) and `at` (steps of its checkpoints) go together.")
    problems += [
        f"`{field}` of arm {name} is not a field of an arm{_near(field, ARM_FIELDS)}."
        for field in fields
        if field not in ARM_FIELDS
    ]
    if source is not None and source not in raw["arms"]:
        problems.append(f"arm {name} begins from {source}, which is not an arm.")
    elif source is not None and (raw["arms"][source] or {}).get("from") is not None:
        problems.append(
            f"arm {name} begins from {source}, which has a `from` of its own: begin from an arm without `from`."
        )
    against = raw["reference"] if fields.get("against") is None else fields["against"]
    if against not in raw["arms"]:
        problems.append(f"arm {name} is to be compared with {against}, which is not an arm: {', '.join(raw['arms'])}.")
    problems += [
        f"arm {name}: at {at!r} is not a step." for at in fields.get("at") or [] if type(at) is not int or at < 1
    ]
    return problems


def _reference_problems(raw: dict, arms: list[Arm]) -> list[str]:
    """What is wrong with the reference of a study file."""
    if raw["reference"] not in raw["arms"]:
        return [f"reference {raw['reference']} is not an arm: {', '.join(raw['arms'])}."]
    if any(arm.source for arm in arms if arm.name == raw["reference"]):
        return [f"reference {raw['reference']} has a `from`: use an arm without `from`."]
    return []


def _script_problems(raw: dict, arms: list[Arm]) -> list[str]:
    """What is wrong with `prepare` and `script` of a study file."""
    problems = []
    for command in raw.get("prepare") or []:
        if not (ROOT / str(command).partition(" ")[0]).is_file():
            problems.append(
                f"`prepare` {command!r}: a command begins with a script of this repository, such as run_pretrain.py."
            )
    if raw["script"] not in PARSERS:
        problems.append(f"script {raw['script']}: expected one of {', '.join(PARSERS)}.")
    if raw["script"] == "run_eval.py" and (raw.get("evaluate") or any(arm.source for arm in arms)):
        problems.append("arms of run_eval.py are evaluations: they take neither `evaluate` nor `from`.")
    return problems


def _seed_problems(seeds: list) -> list[str]:
    """What is wrong with the seeds of a study file."""
    problems = []
    if odd := [seed for seed in seeds if type(seed) is not int]:
        problems.append(f"seeds {odd[0]!r}: expected a whole number.")
    elif len(set(seeds)) < len(seeds) or not seeds:
        problems.append(f"seeds {seeds}: give at least one, and each only once.")
    return problems + [problem for seed in seeds for problem in range_problems({"seed": seed})]


def _begins(arms: list[Arm]) -> dict[str, int | None]:
    """{label: step}, and {name: step} of arms that begin at one step."""
    alone = {arm.name: arm.at for arm in arms if sum(other.name == arm.name for other in arms) == 1}
    return {arm.label: arm.at for arm in arms} | alone


def _against(arms: list[Arm], arm: Arm) -> Arm | None:
    """The arm that an arm is compared with: of those of that name the one that begins at the same step, else the only
    one; None where there are several, and none at that step.
    """
    named = [other for other in arms if other.name == arm.against]
    return next((other for other in named if other.at == arm.at), named[0] if len(named) == 1 else None)


def _analysis_problems(raw: dict, arms: list[Arm]) -> list[str]:
    """What is wrong with the seeds of arms, the margins and the contrasts of a study file."""
    problems = []
    by_name = {arm.name: arm for arm in arms}
    seeds = raw["seeds"]
    for arm in by_name.values():
        own = seeds if arm.seeds is None else arm.seeds
        if arm.seeds is not None and (not own or any(seed not in seeds for seed in own)):
            problems.append(f"arm {arm.name}: `seeds` {own} must be some of the study's {seeds}.")
        for kind, name in (("begins from", arm.source), ("is compared with", arm.against)):
            other = by_name.get(name)
            if other is not None and other.seeds is not None and set(own) - set(other.seeds):
                problems.append(f"arm {arm.name} {kind} {name}, which does not have all of its seeds.")
    for arm in arms:
        if arm.against in by_name and _against(arms, arm) is None:
            steps = ", ".join(str(other.at) for other in arms if other.name == arm.against)
            problems.append(
                f"arm {arm.label} is to be compared with {arm.against}, which begins at {steps}: give both the same"
                " steps in `at`, or compare with an arm that begins at one step."
            )
    for measure, margin in (raw.get("margin") or {}).items():
        if not is_margin(margin):
            problems.append(f"`margin` of {measure}: {margin!r}: a number above 0 is wanted.")
    for name in ("registered", "stop_early"):
        if type(raw.get(name, False)) is not bool:
            problems.append(f"`{name}` {raw[name]!r}: true or false is wanted.")
    if raw.get("stop_early") is True:
        problems += _stop_problems(raw)
    return problems + contrast_problems(raw, _begins(arms))


def _stop_problems(raw: dict) -> list[str]:
    """What is wrong with a study file that stops early."""
    if not raw.get("contrasts"):
        return ["`stop_early` needs `outcomes`, `contrasts` and `primary`: it stops when the primary ones are decided."]
    metrics = [str(fields.get("metric")) for fields in raw["outcomes"].values() if isinstance(fields, dict)]
    if tasks := [metric for metric in metrics if " " in metric and raw["script"] != "run_eval.py"]:
        return [f"`stop_early`: {tasks[0]} is evaluated after all runs; outcomes that the runs log are wanted."]
    primary = raw.get("primary") or {}
    tests = len(primary.get("outcomes") or []) * len(primary.get("contrasts") or [])
    if isinstance(raw["seeds"], list) and tests and len(raw["seeds"]) < (fewest := fewest_seeds(tests)):
        return [f"`stop_early` with {tests} primary tests can decide nothing before {fewest} seeds: give more `seeds`."]
    return []


def _build_study(raw: dict, arms: list[Arm]) -> Study:
    """The study of a checked file. Its config is found in this repository, too."""
    measures = raw.get("measure", "eval_loss")
    config = expand_home(raw["config"])
    return Study(
        title=raw["title"],
        question=raw.get("question") or "",
        script=raw["script"],
        config=config if Path(config).exists() else str(ROOT / config),
        seeds=raw["seeds"],
        prepare=list(map(str, raw.get("prepare") or [])),
        shared=raw.get("set") or {},
        reference=raw["reference"],
        measures=list(map(str, measures if isinstance(measures, list) else [measures])),
        evaluate=raw.get("evaluate") or {},
        arms=sorted(arms, key=lambda arm: (arm.name != raw["reference"], arm.source is not None)),
        margins={str(measure): float(margin) for measure, margin in (raw.get("margin") or {}).items()},
        contrasts=read_contrasts(raw),
        registered=raw.get("registered", False),
        stop_early=raw.get("stop_early", False),
        deviations=list(map(str, raw.get("deviations") or [])),
    )


def check_runs(path: str, study: Study) -> None:
    """Raise Refusal for runs whose arguments their script refuses, that cannot begin from their checkpoint, or whose
    measures are not evaluated.
    """
    every = runs(study, Path("unused"))
    first_seed = [run for run in every if run.seed == study.seeds_of(run.arm)[0]]  # others differ by the seed alone
    for run in first_seed:
        PARSERS[study.script](run.argv)  # an unknown key, a wrong value: refused before anything is run
    resumed = [run for run in first_seed if run.source]
    if problems := [problem for run in resumed for problem in _source_problems(run, study.script)]:
        raise Refusal(f"{path}: {' '.join(problems)}")
    if study.evaluate:
        parse_eval(evaluation_argv(study, every, Path("unused")))
    if study.script != "run_eval.py":
        tasks = [*map(str, study.evaluate.get("tasks", ())), *pairs(study.evaluate.get("texts", []))]
        for measure in study.measures:
            task, metric, _ = measure.partition(" ")
            if metric and task not in tasks:
                raise Refusal(f"{path}: measure {measure}: `evaluate` does not list {task}{_near(task, tasks)}.")


def _source_problems(run: StudyRun, script: str) -> list[str]:
    """Why a run cannot begin from its checkpoint, by the arguments of both runs: no checkpoint is saved at that step,
    it is rotated away, or the step is not before the end.
    """
    (*_, source_args, source), (*_, training) = PARSERS[script](run.source), PARSERS[script](run.argv)
    name, at, problems = run.arm.name, run.arm.at, []
    if 0 < training.max_steps <= at:
        problems.append(
            f"arm {name}: at {at} is not before its own end (max_steps {training.max_steps}), so it would train"
            " nothing."
        )
    if source.max_steps < 1 or ("save_steps" not in source_args.explicit_args and source.save_strategy == "steps"):
        if 0 < source.max_steps < at:
            problems.append(
                f"arm {name}: at {at} is beyond the end of arm {run.arm.source} (max_steps {source.max_steps})."
            )
        return problems  # how often it saves is derived when it begins
    saved = saved_steps(source, source.max_steps)
    kept = (
        saved
        if source.save_total_limit is None or "save_total_limit" not in source_args.explicit_args
        else saved[-max(source.save_total_limit, 1) :]
    )
    if at not in kept:
        why = (
            f"keeps none of step {at} (save_total_limit {source.save_total_limit})"
            if at in saved
            else f"saves none at step {at}"
        )
        usable = [step for step in kept if step < training.max_steps or training.max_steps < 1]
        shown = ", ".join(map(str, usable[:8] + (["..."] if len(usable) > 8 else []))) or "none"
        problems.append(f"arm {name}: at {at}: arm {run.arm.source} {why}; checkpoints to begin from: {shown}.")
    return problems


def _argument_problems(setting: str, values: dict, has_source: bool = False) -> list[str]:
    """What is wrong with the arguments of a `set` or `evaluate`: empty values, which a command line cannot express, and
    arguments that the study sets itself. has_source: whether the runs begin from another arm's checkpoint.
    """
    problems = [
        f"{setting}: `{name}` is empty: give a value, or leave it out."
        for name, value in values.items()
        if value is None
    ]
    reserved = {"seed": "the seeds are `seeds`", "output_dir": "runs lie in the study's folder"}
    reserved |= {"resume_from_checkpoint": "`from` and `at` say where it begins"} if has_source else {}
    return problems + [
        f"{setting}: `{name}` is set by the study: {why}." for name, why in reserved.items() if name in values
    ]


def _near(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest known name, else all of them."""
    closest = difflib.get_close_matches(str(name), known, 1, 0.5)
    return f": did you mean `{closest[0]}`?" if closest else f": {', '.join(sorted(known)) or 'nothing'}"


def runs(study: Study, out: Path) -> list[StudyRun]:
    """Every run of a study, in the order in which they are run. `out`: the study's folder."""
    every = []
    for seed in study.seeds:
        commands: dict[str, list[str]] = {}
        for arm in (arm for arm in study.arms if seed in study.seeds_of(arm)):
            folder = out / "runs" / f"{arm.name}{'' if arm.at is None else f'-at-{arm.at}'}-seed-{seed}"
            values = {**study.shared, **arm.set, "seed": seed, "output_dir": str(folder)}
            if arm.source is not None:
                values["resume_from_checkpoint"] = str(
                    out / "runs" / f"{arm.source}-seed-{seed}" / f"checkpoint-{arm.at}"
                )
            argv = ["--config", study.config]
            for name, value in values.items():
                argv += _argument_words(name, _of_seed(value, seed))
            if arm.source is None:
                commands[arm.name] = argv
            every.append(
                StudyRun(arm, seed, folder, argv, [] if arm.source is None else commands[arm.source], study.prepare)
            )
    return every


def _of_seed(value, seed: int):
    """A value of `set` for one seed: `{seed}` in a text stands for it."""
    if isinstance(value, list):
        return [_of_seed(one, seed) for one in value]
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else value


def _argument_words(name: str, value) -> list[str]:
    """`--name value` as the scripts' parser reads it: a list by its items, an empty one as `[]`."""
    items = value if isinstance(value, list) and value else [value]
    return [f"--{name}", *map(str, items)]


def base_of(study: Study, run: StudyRun) -> str | None:
    """The base model of a tuning run, by its name in an evaluation, else None."""
    return model_name(parse_sft(run.argv)[0].model_name_or_path) if study.script == "run_sft.py" else None


def evaluation_argv(study: Study, finished: list[StudyRun], out: Path) -> list[str]:
    """Arguments of run_eval.py: the model of every run and, in a tuning study, every base."""
    bases = dict.fromkeys(base for run in finished if (base := base_of(study, run)))
    argv = ["--models", *bases, *(str(run.folder) for run in finished), "--output_dir", str(out / "evaluation")]
    for name, value in study.evaluate.items():
        argv += _argument_words(name, value)
    return argv
