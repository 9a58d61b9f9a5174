"""Learning-rate schedules: which of transformers' choices are supported, and their arguments."""

import functools
import inspect
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import SchedulerType, TrainingArguments

FLOOR = {"min_lr_rate": 0.1}  # the paper's: a tenth of the peak
FLOORED = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")  # the schedules whose floor is an argument
PAPERS = "cosine_warmup_with_min_lr"  # the schedule that --schedule_steps belongs to
BY_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")
CONSTANT = ("constant", "constant_with_warmup")  # transformers ignores the arguments of these
SCHEDULE_OWN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")

RATE_RATIOS = ("min_lr_rate", "min_lr_ratio", "warmup_lr_rate")  # of the peak rate, among lr_scheduler_kwargs
CHECKED_STEPS = 1000  # at most, at which the rate is computed before the run


def default_kwargs(schedule: "SchedulerType | str") -> dict | None:
    """The default `lr_scheduler_kwargs` of a schedule."""
    return dict(FLOOR) if getattr(schedule, "value", schedule) in FLOORED else None


def cosine_factor(step: int, warmup: int, steps: int, floor: float) -> float:
    """The paper's schedule as the authors' code has it: the fraction of the peak rate at `step`, counted from 0.

    Linear warm-up over `warmup` steps; then a cosine in (step - warmup) / (steps - warmup) down to `floor`, a fraction
    of the peak; from `steps` on, the floor.
    """
    if step < warmup:
        return (step + 1) / warmup
    if step >= steps:
        return floor
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def make_scheduler(
    training: "TrainingArguments", optimizer: "Optimizer", steps: int, schedule_steps: int | None
) -> "LRScheduler":
    """The schedule of a run of `steps` steps. With `schedule_steps`: `cosine_factor` over them, whatever the length of
    the run. Without: transformers' over `steps`, whose cosine is one step ahead of the authors' and would rise again
    beyond its end.
    """
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import get_scheduler

    kwargs = dict(training.lr_scheduler_kwargs or {})
    if schedule_steps is None:
        return get_scheduler(training.lr_scheduler_type, optimizer, training.get_warmup_steps(steps), steps, kwargs)
    floor = kwargs["min_lr"] / training.learning_rate if "min_lr" in kwargs else kwargs["min_lr_rate"]
    warmup = training.get_warmup_steps(schedule_steps)
    return LambdaLR(optimizer, functools.partial(cosine_factor, warmup=warmup, steps=schedule_steps, floor=floor))


def schedule_steps_problems(
    schedule_steps: int | None, training: "TrainingArguments", warmup_given: bool = True
) -> list[str]:
    """What is wrong with --schedule_steps, whatever the length of the run. warmup_given: whether the warm-up is the
    user's; one that is to be derived fits into the schedule.
    """
    if schedule_steps is None:
        return []
    name, kwargs = training.lr_scheduler_type.value, training.lr_scheduler_kwargs or {}
    if name != PAPERS:
        return [f"--schedule_steps {schedule_steps} belongs to --lr_scheduler_type {PAPERS}, not {name}: leave it out."]
    if not isinstance(kwargs, dict) or sum(kwargs.get(key) is not None for key in ("min_lr", "min_lr_rate")) != 1:
        return [f"--schedule_steps needs one floor in --lr_scheduler_kwargs: min_lr_rate or min_lr, not {kwargs}."]
    if further := [key for key, value in kwargs.items() if key not in ("min_lr", "min_lr_rate") and value is not None]:
        return [f"--lr_scheduler_kwargs {', '.join(further)}: the schedule of --schedule_steps has no such argument."]
    return _short_schedule_problems(schedule_steps, training) if warmup_given else []


def _short_schedule_problems(schedule_steps: int, training: "TrainingArguments") -> list[str]:
    """What is wrong with a schedule that ends within the warm-up."""
    if (warmup := training.get_warmup_steps(schedule_steps)) < schedule_steps:
        return []
    return [
        f"--schedule_steps {schedule_steps:,} ends within the warm-up of {warmup:,} steps: give more, or fewer"
        " --warmup_steps."
    ]


def schedule_problems(training: "TrainingArguments") -> list[str]:
    """What is wrong with --lr_scheduler_type and --lr_scheduler_kwargs, whatever the length of the run."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    name, kwargs = training.lr_scheduler_type.value, training.lr_scheduler_kwargs or {}
    if name in BY_EVALUATIONS:
        return [
            f"--lr_scheduler_type {name}: its rate depends on evaluation results, so --eval_steps would change the"
            " training. Use another schedule."
        ]
    if not isinstance(kwargs, dict):
        return [f"--lr_scheduler_kwargs {kwargs}: expected a mapping, such as '{{\"min_lr_rate\": 0.1}}'."]
    parameters = dict(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[training.lr_scheduler_type]).parameters)
    parameters = (
        {} if name in CONSTANT else {key: value for key, value in parameters.items() if key not in SCHEDULE_OWN}
    )
    problems = []
    if unsupported := [key for key in kwargs if key not in parameters]:
        supported = f"it takes {', '.join(parameters)}" if parameters else "it takes none: --lr_scheduler_kwargs '{}'"
        problems.append(
            f"--lr_scheduler_kwargs {', '.join(unsupported)}: --lr_scheduler_type {name} has no such argument;"
            f" {supported}."
        )
    for key in kwargs.keys() & parameters.keys():
        value, rule = (
            kwargs[key],
            "from 0 to 1: a share of the peak rate" if key in RATE_RATIOS else "a number from 0 on",
        )
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        is_valid = (
            value is None
            or isinstance(parameters[key].default, str)
            or (number and 0 <= value <= (1 if key in RATE_RATIOS else math.inf))
        )
        if not is_valid:
            problems.append(f"--lr_scheduler_kwargs {key} {value} must be {rule}.")
    needed = [
        key for key, value in parameters.items() if value.default is inspect.Parameter.empty and key not in kwargs
    ]
    if needed:
        example = ", ".join(f'"{key}": N' for key in needed)
        problems.append(f"--lr_scheduler_type {name} needs --lr_scheduler_kwargs '{{{example}}}'.")
    return problems


def plan_problems(
    training: "TrainingArguments", steps: int, cut_short: bool = False, schedule_steps: int | None = None
) -> list[str]:
    """What is wrong with the schedule of a run of `steps` steps: a warm-up longer than the run (unless the run was
    `cut_short`) or than the schedule, or a computed rate outside 0 to the peak.
    """
    import torch

    warmup = training.get_warmup_steps(schedule_steps or steps)
    if warmup > steps and not cut_short:
        return [
            f"--warmup_steps {warmup:,} is longer than the run of {steps:,} steps, which would end before the peak"
            " rate: give fewer, or a share below 1."
        ]
    if schedule_steps and (problems := _short_schedule_problems(schedule_steps, training)):
        return problems
    flags = (
        f"--lr_scheduler_type {training.lr_scheduler_type.value} with --lr_scheduler_kwargs"
        f" {training.lr_scheduler_kwargs}"
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=training.learning_rate)
    try:
        schedule = make_scheduler(training, optimizer, steps, schedule_steps)
        rates = {
            step: schedule.lr_lambdas[0](step) for step in [*range(0, steps, max(1, steps // CHECKED_STEPS)), steps - 1]
        }
    except (TypeError, ValueError, ArithmeticError) as error:
        return [f"{flags}, over {steps:,} steps of which {warmup:,} are warm-up: {' '.join(str(error).split())}."]
    invalid_step = next(
        (step for step, rate in rates.items() if isinstance(rate, complex) or not 0 <= rate <= 1 + 1e-6), None
    )
    return (
        []
        if invalid_step is None
        else [
            f"{flags} gives {rates[invalid_step]} of the peak rate at step {invalid_step + 1}: the rate must stay"
            " between 0 and the peak."
        ]
    )
