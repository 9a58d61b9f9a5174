"""A row of an instruction set: a conversation, and which of its answers are trained on."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """One conversation. Answers before message `learn_from`, and those with an index in `untrained`, are context.

    Rows of one `document` are never split between training and held-out.
    """

    name: str
    document: str
    messages: tuple[dict, ...]
    learn_from: int = 0
    untrained: tuple[int, ...] = ()


class NoRow(Exception):
    """Why a record is not a conversation to train on; it is counted and named."""
