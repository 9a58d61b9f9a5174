"""Arguments that the user did not give, decided one after the other, each with its reason. Given values stay."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..machine import precision

DEFAULT_HOURS = 1 / 6  # of a run without a given length
TO_BE_DERIVED = (("precision", "auto"), ("max_steps", -1))  # given values that ask for a derived one
TUNED_LENGTH = 256  # tokens that hold a usual row of instructions in the chat format: system prompt, question, answer


class Decisions:
    """The arguments of a run, and which of them were decided. `fixed`: names of the explicit ones, which stay, but for
    those with a value of TO_BE_DERIVED.

    groups: the dataclasses of arguments, in which values are set. explicit_args: {argument: value} that the user gave.
    """

    def __init__(self, groups: Sequence, explicit_args: dict):
        self.groups, self.reasons = groups, {}
        self.fixed = {name for name, value in explicit_args.items() if (name, value) not in TO_BE_DERIVED}
        self.owner = {field.name: group for group in groups for field in dataclasses.fields(group)}

    def __getitem__(self, name: str):
        return getattr(self.owner[name], name)

    def decide(self, name: str, value: object, reason: str) -> Any:
        """Set an argument that is not settled yet; returns its value. A callable `value` is called where it is
        needed.
        """
        if name not in self.fixed and name not in self.reasons:
            setattr(self.owner[name], name, value() if callable(value) else value)
            self.reasons[name] = reason
        return self[name]

    def settled(self, name: str) -> bool:
        """Whether an argument was given or decided."""
        return name in self.fixed or name in self.reasons

    def values(self) -> dict:
        """{name: value} of the decided arguments, for the other processes and the record."""
        return {name: self[name] for name in self.reasons}


def decide_precision(decisions: Decisions, recorded: str | None, device: torch.device) -> None:
    """Decide the number format: the given one, the one `recorded` for the run, or the device's. Raises Refusal for one
    in which the device cannot train.
    """
    requested = decisions["precision"] if decisions.settled("precision") else "auto"
    decisions.decide("precision", *precision.choose(requested, recorded, device))
    precision.check_device(decisions["precision"], device)


def lines(values: dict, reasons: dict) -> list[str]:
    """One line per decided argument, with its value and reason; arguments without a reason are left out."""
    shown = [
        (name, _format_value(values[name]), reason) for name, reason in reasons.items() if reason and name in values
    ]
    width = max((len(name) for name, _, _ in shown), default=0)
    value_width = min(24, max((len(value) for _, value, _ in shown), default=0))
    return [f"{name:<{width}}  {value:<{value_width}}  {reason}".rstrip() for name, value, reason in shown]


def _format_value(value: object) -> str:
    """A value as text, numbers with separators or three digits."""
    return (
        f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else f"{value:.3g}"
        if isinstance(value, float)
        else str(value)
    )


def set_values(groups: Sequence, values: dict) -> None:
    """Set arguments in the groups that have them."""
    for group in groups:
        for field in dataclasses.fields(group):
            if field.name in values:
                setattr(group, field.name, values[field.name])


def nice(value: float) -> int:
    """The nearest of 1, 2, 5, 10, 20, 50 ..., at least 1."""
    if value <= 1:
        return 1
    power = 10 ** math.floor(math.log10(value))
    return int(min((power, 2 * power, 5 * power, 10 * power), key=lambda step: abs(math.log(step / value))))


def given_accumulation(decisions: Decisions) -> int:
    """The --gradient_accumulation_steps that the user gave; 1, their default, asks for no number."""
    name = "gradient_accumulation_steps"
    return decisions[name] if decisions.settled(name) else 1


def micro_batch(share: int, accumulation: int, most: int) -> int:
    """Windows or sequences per micro-batch, of `share` of a process in a step: as many as `accumulation` micro-batches
    need; where it is 1, the most that divides the share, up to `most`.
    """
    if accumulation > 1:
        return max(1, share // accumulation)
    return max(n for n in range(1, most + 1) if share % n == 0)


def whole_interval(every: float, steps: int) -> int:
    """An interval in steps: a share (below 1) is of `steps`, rounded up, as Trainer does."""
    return math.ceil(every * steps) if every < 1 else int(every)


def revision_interval(decisions: Decisions) -> int | None:
    """Steps between revisions, or between those with training state, that the user gave; a checkpoint is due at each of
    them. None where nobody gave any.
    """
    state = str(decisions["publish_training_state"])
    return decisions["publish_steps"] or (int(state) if state.isdigit() else None)


def save_interval(every: int, revisions: int | None) -> tuple[int, str]:
    """(steps between checkpoints, reason): the interval of evaluations, or the nearest divisor of `revisions`, the
    steps between revisions.
    """
    if revisions is None or revisions % every == 0:
        return every, "as often as evaluations"
    divisors = [number for number in range(1, revisions + 1) if revisions % number == 0]
    return (
        min(divisors, key=lambda number: abs(math.log(number / every))),
        f"{revisions} steps, between revisions, are a multiple of it",
    )
