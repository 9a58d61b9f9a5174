"""Learning-rate schedules: which of transformers' choices are supported, and their arguments."""

import inspect
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import SchedulerType, TrainingArguments

FLOOR = {"min_lr_rate": 0.1}  # the paper's: a tenth of the peak
FLOORED = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")  # the schedules whose floor is an argument
BY_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")
CONSTANT = ("constant", "constant_with_warmup")  # transformers ignores the arguments of these
SCHEDULE_OWN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")

RATE_RATIOS = ("min_lr_rate", "min_lr_ratio", "warmup_lr_rate")  # of the peak rate, among lr_scheduler_kwargs
CHECKED_STEPS = 1000  # at most, at which the rate is computed before the run


def default_kwargs(schedule: "SchedulerType | str") -> dict | None:
    """The default `lr_scheduler_kwargs` of a schedule."""
    return dict(FLOOR) if getattr(schedule, "value", schedule) in FLOORED else None


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


def plan_problems(training: "TrainingArguments", steps: int, cut_short: bool = False) -> list[str]:
    """What is wrong with the schedule of a run of `steps` steps: a warm-up longer than the run (unless the run was
    `cut_short`), or a computed rate outside 0 to the peak.
    """
    import torch
    from transformers import get_scheduler

    warmup = training.get_warmup_steps(steps)
    if warmup > steps and not cut_short:
        return [
            f"--warmup_steps {warmup:,} is longer than the run of {steps:,} steps, which would end before the peak"
            " rate: give fewer, or a share below 1."
        ]
    flags = (
        f"--lr_scheduler_type {training.lr_scheduler_type.value} with --lr_scheduler_kwargs"
        f" {training.lr_scheduler_kwargs}"
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=training.learning_rate)
    try:
        schedule = get_scheduler(
            training.lr_scheduler_type, optimizer, warmup, steps, dict(training.lr_scheduler_kwargs or {})
        )
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
