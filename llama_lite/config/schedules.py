"""Learning-rate schedules and optimizers: which of transformers' choices train here, and what each of them takes."""

import inspect
import math

FLOOR = {"min_lr_rate": 0.1}  # the paper's: a tenth of the peak

FLOORED = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")  # the schedules that have a floor to be given

BY_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")

CONSTANT = ("constant", "constant_with_warmup")  # transformers passes over what these are given

SCHEDULE_OWN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")

# those that were tried: started, saved, resumed bit for bit; and the --optim_args that transformers reads for each
OPTIMIZERS = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "adafactor": (),
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
}

SHARES = ("min_lr_rate", "min_lr_ratio", "warmup_lr_rate")  # of the peak rate, among lr_scheduler_kwargs

TRIED_POINTS = 1000  # steps at which a schedule is computed before the run


def default_kwargs(schedule) -> dict | None:
    """`lr_scheduler_kwargs` where nobody gave any."""
    return dict(FLOOR) if getattr(schedule, "value", schedule) in FLOORED else None


def schedule_problems(training) -> list[str]:
    """What is wrong with --lr_scheduler_type and --lr_scheduler_kwargs, whatever the length of the run."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    name, given = training.lr_scheduler_type.value, training.lr_scheduler_kwargs or {}
    if name in BY_EVALUATIONS:
        return [
            f"--lr_scheduler_type {name}: its rate follows the evaluations, so that --eval_steps would decide what is"
            " learnt. Use another one."
        ]
    if not isinstance(given, dict):
        return [f"--lr_scheduler_kwargs {given}: a mapping is wanted, such as '{{\"min_lr_rate\": 0.1}}'."]
    taken = dict(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[training.lr_scheduler_type]).parameters)
    taken = {} if name in CONSTANT else {key: value for key, value in taken.items() if key not in SCHEDULE_OWN}
    problems = []
    if other := [key for key in given if key not in taken]:
        there = f"it takes {', '.join(taken)}" if taken else "it takes none: --lr_scheduler_kwargs '{}'"
        problems.append(
            f"--lr_scheduler_kwargs {', '.join(other)}: --lr_scheduler_type {name} has no such argument; {there}."
        )
    for key in given.keys() & taken.keys():
        value, words = given[key], "from 0 to 1: a share of the peak rate" if key in SHARES else "a number from 0 on"
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        fits = (
            value is None
            or isinstance(taken[key].default, str)
            or (number and 0 <= value <= (1 if key in SHARES else math.inf))
        )
        if not fits:
            problems.append(f"--lr_scheduler_kwargs {key} {value} must be {words}.")
    needed = [key for key, value in taken.items() if value.default is inspect.Parameter.empty and key not in given]
    if needed:
        shown = ", ".join(f'"{key}": N' for key in needed)
        problems.append(f"--lr_scheduler_type {name} needs --lr_scheduler_kwargs '{{{shown}}}'.")
    return problems


def optimizer_problems(training) -> list[str]:
    """What is wrong with --optim and --optim_args."""
    name = training.optim.value
    if name not in OPTIMIZERS:
        return [f"--optim {name}: that it resumes is not known here. Those that do: {', '.join(OPTIMIZERS)}."]
    problems = []
    for pair in (training.optim_args or "").replace(" ", "").split(","):
        key, equals, value = pair.partition("=")
        if pair and key not in OPTIMIZERS[name]:
            there = f"it takes {', '.join(OPTIMIZERS[name])}" if OPTIMIZERS[name] else "leave it out: it takes none"
            problems.append(f"--optim_args {pair}: --optim {name} does not read {key}; {there}.")
        elif pair and not (equals and _is_value(key, value)):
            problems.append(f"--optim_args {pair}: NAME=NUMBER is wanted (nesterov and centered: true or false).")
    return problems or _tried(training)


def _tried(training) -> list[str]:
    """What the optimizer itself says of its arguments, over one parameter."""
    import torch
    from transformers import Trainer

    try:
        make, kwargs = Trainer.get_optimizer_cls_and_kwargs(training)
        make([torch.zeros(1, requires_grad=True)], **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        return [
            f"--optim {training.optim.value} with --optim_args {training.optim_args}: {' '.join(str(error).split())}."
        ]
    return []


def _is_value(key: str, value: str) -> bool:
    if key in ("nesterov", "centered"):
        return value.lower() in ("true", "false")
    try:
        return math.isfinite(float(value)) and float(value) >= 0
    except ValueError:
        return False


def plan_problems(training, steps: int, cut_short: bool = False) -> list[str]:
    """What is wrong with the schedule of a run of so many steps: a warm-up longer than the run (unless that was
    `cut_short`), a rate that is none.

    It is computed.
    """
    import torch
    from transformers import get_scheduler

    warmup = training.get_warmup_steps(steps)
    if warmup > steps and not cut_short:
        return [
            f"--warmup_steps {warmup:,} is longer than the run of {steps:,} steps, which would end before the peak"
            " rate: give fewer, or a share below 1."
        ]
    asked = (
        f"--lr_scheduler_type {training.lr_scheduler_type.value} with --lr_scheduler_kwargs"
        f" {training.lr_scheduler_kwargs}"
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=training.learning_rate)
    try:
        schedule = get_scheduler(
            training.lr_scheduler_type, optimizer, warmup, steps, dict(training.lr_scheduler_kwargs or {})
        )
        rates = {
            step: schedule.lr_lambdas[0](step) for step in [*range(0, steps, max(1, steps // TRIED_POINTS)), steps - 1]
        }
    except (TypeError, ValueError, ArithmeticError) as error:
        return [f"{asked}, over {steps:,} steps of which {warmup:,} are warm-up: {' '.join(str(error).split())}."]
    wrong = next((step for step, rate in rates.items() if isinstance(rate, complex) or not 0 <= rate <= 1 + 1e-6), None)
    return (
        []
        if wrong is None
        else [f"{asked} gives {rates[wrong]} of the peak rate at step {wrong + 1}: a rate is from 0 to the peak."]
    )
