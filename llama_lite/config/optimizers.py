"""Optimizers: which of transformers' choices are supported, and their arguments."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Optimizers that were tested (started, saved, resumed exactly), with the --optim_args that transformers reads for each
OPTIMIZERS = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "adafactor": (),
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
}


def optimizer_problems(training: "TrainingArguments") -> list[str]:
    """What is wrong with --optim and --optim_args."""
    name = training.optim.value
    if name not in OPTIMIZERS:
        return [f"--optim {name} has not been tested for exact resume. Supported: {', '.join(OPTIMIZERS)}."]
    problems = []
    for pair in (training.optim_args or "").replace(" ", "").split(","):
        key, equals, value = pair.partition("=")
        if pair and key not in OPTIMIZERS[name]:
            supported = f"it takes {', '.join(OPTIMIZERS[name])}" if OPTIMIZERS[name] else "leave it out: it takes none"
            problems.append(f"--optim_args {pair}: --optim {name} does not read {key}; {supported}.")
        elif pair and not (equals and _is_value(key, value)):
            problems.append(f"--optim_args {pair}: expected NAME=NUMBER (nesterov and centered: true or false).")
    return problems or _constructor_problems(training)


def _constructor_problems(training) -> list[str]:
    """The error that the optimizer raises for its arguments, constructed with one parameter."""
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
