"""Arguments that all training scripts share, and their checks."""

import dataclasses
from pathlib import Path
from typing import Literal

from transformers import TrainingArguments

from model_card.metadata import CardError, check_metadata, languages_of

from ..errors import Problems
from ..machine.precision import PRECISIONS
from .arguments import REPOSITORY
from .fields import KEPT, accelerator_problems, names, unknown_fields
from .optimizers import optimizer_problems
from .schedules import default_kwargs, schedule_problems, schedule_steps_problems

RESUME_HELP = (
    "auto: the newest verified checkpoint in the run folder, otherwise in the run's Hub repository, otherwise a new"
    " run. must (or true): refused if there is no checkpoint. never (or false): refused if there is one. Or a"
    " checkpoint folder, or owner/name@step-N on the Hub."
)

SCHEDULE_HELP = (
    'Arguments of the schedule (default: {"min_lr_rate": 0.1}, a floor of 0.1 of the peak rate, for the schedules that'
    " have a floor)."
)


def arg(default: object, help: str):
    """A dataclass field with its help text. A list as default is copied for each instance."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass
class HubArguments:
    """What is published, besides --push_to_hub, --hub_model_id and --hub_private_repo (transformers' own)."""

    _argument_group_name = "Hub"

    publish_steps: int | None = arg(
        None, "Steps between published checkpoints (default: every checkpoint); the last one is always published."
    )
    publish_training_state: str = arg(
        "all",
        "Which revisions include optimizer and random state, so that anyone can resume from them (6 times the size of"
        " the model): all, final, none, or a number of steps (the multiples of it, and the final one).",
    )
    publish_queue_limit: float | None = arg(
        None,
        "GiB that revisions may take while they wait to be published (default: half of the disk's free space). Beyond"
        " it, training state of waiting revisions is dropped, oldest first; models and the final revision are kept.",
    )
    publish_only: bool = arg(False, "Publish the checkpoints in the run folder's queue, and stop.")
    hub_required: bool = arg(
        False, "Refuse to train if publishing to the Hub would fail (default: train, and publish later)."
    )
    hub_drain_timeout: float = arg(
        600, "Seconds that a finished run, or --publish_only, waits for its last revisions to be published."
    )
    card_license: str | None = arg(
        None,
        "License of the model on its card, as the Hub names it (apache-2.0, mit, other ...; default: the card names"
        " none).",
    )
    card_language: str | None = arg(
        None,
        "Language of the text on the card, as ISO 639 (en; of several: en,de; default: en for the text inside the"
        " installed packages, else the card names none).",
    )
    card_data_license: str | None = arg(
        None,
        "License of the text or the rows on the card, as the Hub names it (odc-by, cc-by-sa-4.0, other ...; default:"
        " the card names none); with --prepare_only, that of the published tokens.",
    )

    @property
    def card(self) -> dict:
        """What was said for the card, as `run.json` records it."""
        return {"license": self.card_license, "language": self.card_language, "data_license": self.card_data_license}


@dataclasses.dataclass
class CommonRunArguments:
    """What any verified run needs besides transformers' TrainingArguments."""

    _argument_group_name = "Run"

    precision: Literal["auto", *PRECISIONS] = arg(
        "auto",
        "auto: bfloat16 (autocast over float32 weights) if this device computes it natively and faster than float32,"
        " otherwise float32; a resumed run keeps its precision. --bf16, --no_bf16 and --fp16 mean bfloat16, float32"
        " and float16.",
    )
    schedule_steps: int | None = arg(
        None,
        "Steps after which the learning rate is at its floor and stays there, by the authors' formula (default:"
        " max_steps, by transformers' formula).",
    )
    hours: float | None = arg(
        None,
        "Hours for the whole run on this machine, from preparation to evaluation; other arguments are derived from it.",
    )
    suggest: str | None = arg(
        None,
        "Write the arguments derived from text, machine and --hours to this YAML file, each with its reason, and stop.",
    )
    cpu_threads: int | None = arg(
        None,
        "Threads per process on a CPU (default: the cores that may be used here, divided by the processes on them)."
        " OMP_NUM_THREADS is ignored: accelerate launch sets it to 1.",
    )
    keep_memory: bool = arg(
        True,
        "On a CPU, keep freed memory for the next step (faster steps; up to an eighth more memory).",
    )
    async_save: bool = arg(
        True,
        "Write a checkpoint while training goes on, from a copy of weights and optimizer state in this machine's"
        " memory. Where memory does not hold the copy, training waits.",
    )
    step_timeout: float = arg(
        1800,
        "Seconds without a micro-batch, in training steps, after which the run ends with status 3 (at least 5 times the"
        " slowest before; evaluating, saving, preparing and publishing do not count; 0: never).",
    )
    deterministic: bool = arg(
        False,
        "On a GPU, use only algorithms of torch that give the same bits every time (slower). Without it a resumed run"
        " equals an uninterrupted one within a tolerance there; on a CPU it is equal bit for bit either way.",
    )
    stop_after_step: int | None = arg(
        None,
        "Save a checkpoint after this step and stop, as after an interruption; schedule and length of the run stay.",
    )
    dry_run: bool = arg(
        False, "Print the plan and write nothing. It plans the run in the folder, or with --hours a new run."
    )
    allow_changes: str = arg(
        "", "Differences from the checkpoint to accept on resume: comma-separated names from the table of the refusal."
    )
    resume_without: str = arg(
        "", "State to leave out on resume: `optimizer`, `scheduler`, `rng` or `data` (position); comma-separated."
    )
    # {argument: value} of YAML and command line
    explicit_args: dict = dataclasses.field(init=False, default_factory=dict)
    typed: frozenset = dataclasses.field(init=False, default=frozenset())  # the arguments of the command line
    values_of: str | None = dataclasses.field(init=False, default=None)  # the run that --config names


def before_transformers(training: TrainingArguments) -> None:
    """Set defaults that depend on other arguments, before transformers checks them: the floor of the schedule, the CPU
    where there is no GPU.
    """
    if training.lr_scheduler_kwargs is None:
        training.lr_scheduler_kwargs = default_kwargs(training.lr_scheduler_type)
    use_cpu_without_gpu(training)


def use_cpu_without_gpu(training: TrainingArguments) -> None:
    """Set `use_cpu` where there is no GPU; otherwise transformers' check of bf16 looks for one."""
    import torch

    if not torch.cuda.is_available() and not training.use_cpu:
        training.use_cpu = not torch.backends.mps.is_available()


RESUMABLE_PARTS = ("optimizer", "scheduler", "rng", "data")


def check_training(
    run: CommonRunArguments, hub: HubArguments, training: TrainingArguments, kept: dict, publishes: bool = True
) -> Problems:
    """What is wrong in the arguments that every verified run has. Normalizes `resume_from_checkpoint`.

    kept: further fields of the script that must keep their value, as fields.KEPT. publishes: whether --push_to_hub
    publishes the run (and not prepared tokens).
    """
    _normalize_resume(training)
    problems = Problems()
    for name in ("dataloader_multiprocessing_context", "dataloader_persistent_workers"):
        value = getattr(training, name)
        problems.add_if(
            value and not training.dataloader_num_workers,
            f"--{name} {value} needs --dataloader_num_workers of at least 1, or leave it out.",
        )
    unknown = [name for name in names(run.resume_without) if name not in RESUMABLE_PARTS]
    problems.add_if(
        unknown, f"--resume_without {','.join(unknown)}: only {', '.join(RESUMABLE_PARTS)} can be left out."
    )
    problems += _field_problems(run, training, {**KEPT, **kept})
    problems += _length_problems(run, training)
    problems.add_if(
        run.explicit_args.get("do_train") is False,
        "--do_train false: this script always trains. Use --dry_run to plan, or run_eval.py to evaluate a finished"
        " model.",
    )
    problems += _hub_problems(run, hub, training, publishes)
    problems.add_if(
        run.suggest and Path(run.suggest).exists(),
        f"--suggest {run.suggest}: that file already exists and is not overwritten: choose another name.",
    )
    problems.add_if(
        str(training.save_strategy.value) not in ("steps", "no"),
        "--save_strategy must be steps (or no): an epoch is not a whole number of steps.",
    )
    for name in ("eval_strategy", "logging_strategy"):
        problems.add_if(
            getattr(training, name).value == "epoch",
            f"--{name} must be steps (or no): an epoch is not a whole number of steps.",
        )
    return problems


def _normalize_resume(training: TrainingArguments) -> None:
    """Make `resume_from_checkpoint` must (for true), never (false), auto (none), or a path as it is."""
    resume = str(training.resume_from_checkpoint).lower()
    training.resume_from_checkpoint = {"true": "must", "false": "never", "none": "auto"}.get(
        resume, resume if resume in ("auto", "must", "never") else training.resume_from_checkpoint
    )


def _field_problems(run: CommonRunArguments, training: TrainingArguments, kept: dict) -> list[str]:
    """What is wrong in the fields of transformers: those that must keep their value, unknown ones, accelerator,
    schedule and optimizer.
    """
    problems = Problems()
    for name, (value, why) in kept.items():
        differs = name in run.explicit_args and getattr(training, name) != value
        problems.add_if(differs, f"--{name} must stay {value}: {why}.")
    for name in unknown_fields(training, kept):
        problems.append(
            f"--{name} is new in the installed transformers or TRL, and its effect on a verified run has not been"
            " checked: leave it out."
        )
    return (
        problems
        + accelerator_problems(training.accelerator_config)
        + (
            schedule_problems(training)
            or schedule_steps_problems(run.schedule_steps, training, "warmup_steps" in run.explicit_args)
        )
        + optimizer_problems(training)
    )


def _length_problems(run: CommonRunArguments, training: TrainingArguments) -> list[str]:
    """What is wrong where --hours and another argument both set the length of the run."""
    problems = Problems()
    lengths = [
        name
        for name in ("max_steps", "hours", "num_train_epochs")
        if name in run.explicit_args and (name != "max_steps" or training.max_steps > 0)
    ]
    problems.add_if(
        "hours" in lengths and len(lengths) > 1,
        f"{' and '.join(f'--{name}' for name in lengths)} both set the length of the run: give one of them.",
    )
    return problems


def _hub_problems(
    run: CommonRunArguments, hub: HubArguments, training: TrainingArguments, publishes: bool
) -> list[str]:
    """What is wrong in the arguments about publishing."""
    problems = Problems()
    problems.add_if(
        training.push_to_hub and publishes and not REPOSITORY.fullmatch(training.hub_model_id or ""),
        f"--push_to_hub needs --hub_model_id owner/name, not {training.hub_model_id!r}.",
    )
    try:
        check_metadata({**hub.card, "language": languages_of(hub.card_language)})
    except CardError as error:
        problems.append(str(error))
    problems.add_if(
        hub.publish_only and not training.push_to_hub,
        "--publish_only needs --push_to_hub and the --hub_model_id of the run.",
    )
    state = str(hub.publish_training_state)
    problems.add_if(
        state not in ("all", "final", "none") and not (state.isascii() and state.isdigit() and int(state)),
        f"--publish_training_state {state}: must be all, final, none, or a number of steps of at least 1.",
    )
    problems.add_if(
        hub.publish_steps is not None
        and "save_steps" in run.explicit_args
        and training.save_steps >= 1
        and hub.publish_steps % training.save_steps,
        f"--publish_steps {hub.publish_steps} is not a multiple of --save_steps {training.save_steps:g}: only saved"
        " checkpoints can be published.",
    )
    return problems
