"""A row of an instruction set: a conversation and which of its answers are learnt."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """One conversation. Answers before `learn_from`, and those of the messages `unlearnt`, are context.

    Rows of one `document` are never split between training and held-out.
    """

    name: str
    document: str
    messages: tuple[dict, ...]
    learn_from: int = 0
    unlearnt: tuple[int, ...] = ()


class NoRow(Exception):
    """Why a record is no conversation that can be learnt from: it is counted, and named."""
