"""How rows of a model go together in one batch: side by side without padding where the model keeps them apart, else
padded.
"""

import dataclasses
from collections.abc import Iterator

import torch

from ..chat_format.packing import Example
from ..kernels import probe
from .presets import context_of

# of the largest logit: clean bases differ by 1.1e-6 at most, those whose rows see each other by 2.7e-3 at least
# (measured, 20 kinds)
MIXED = 1e-4


@dataclasses.dataclass(frozen=True)
class Batches:
    """How rows of a base go together: side by side in one row without seeing each other, and padded on the left for
    answers.
    """

    packs: bool = True
    pads: bool = True
    longest: int | None = None  # tokens of all rows side by side, where the base sets an end to them (GPT-Neo)

    @property
    def measured(self) -> int:
        """Rows of a batch whose losses are measured, laid side by side."""
        return 8 if self.packs else 1

    def fits(self, tokens: int) -> bool:
        """Whether rows of so many tokens in all can lie side by side."""
        return self.packs and tokens <= (self.longest or tokens)

    @property
    def answered(self) -> int:
        return 16 if self.pads else 1


@torch.no_grad()
def batches_of(model) -> Batches:
    """How rows go together in a base, by its own logits, in float32: a row's behind another one, and behind padding,
    against its own alone.
    """
    first, second = probe.probe_ids(model)
    positions = torch.arange(len(first), device=first.device)
    filled = torch.ones(len(first) + 8, dtype=torch.long, device=first.device)
    filled[:8] = 0
    ways = {
        "packs": {
            "input_ids": torch.cat([first, second])[None],
            "position_ids": torch.cat([positions, positions])[None],
        },
        "pads": {"input_ids": torch.cat([first[:8], second])[None], "attention_mask": filled[None]},
    }
    found = {}
    longest = None
    with probe.evaluating(model):
        alone = model(input_ids=second[None], use_cache=False).logits
        for name, inputs in ways.items():
            try:
                found[name] = probe.close(model(**inputs, use_cache=False).logits[:, -len(second) :], alone, MIXED)
            except (TypeError, ValueError, RuntimeError, IndexError):
                found[name] = False
        if found["packs"]:
            longest = longest_row(model, ways["packs"])
    return Batches(**found, longest=longest)


def longest_row(model, side_by_side: dict) -> int | None:
    """Tokens of a row, whatever their positions, where attention is cut out of a square mask of a fixed size; None
    where it is not.

    Tried with masks smaller than `side_by_side`, which costs less than a row of the model's context.
    """
    masks = [
        mask
        for mask in model.buffers()
        if mask.dim() >= 2 and mask.shape[-1] == mask.shape[-2] == context_of(model.config)
    ]
    if not masks:
        return None
    whole, few = [mask.data for mask in masks], side_by_side["input_ids"].shape[1] - 1
    try:
        for mask in masks:
            mask.data = mask.data[..., :few, :few]
        model(**side_by_side, use_cache=False)
    except RuntimeError:
        return whole[0].shape[-1]
    finally:
        for mask, data in zip(masks, whole, strict=True):
            mask.data = data
    return None


def groups(rows: list[Example], most: int, longest: int | None) -> Iterator[list[Example]]:
    """Rows in their order, as many at once as `most`, and as `longest` tokens in all, where there is an end."""
    group: list[Example] = []
    for row in rows:
        tokens = sum(len(other.input_ids) for other in [*group, row])
        if group and (len(group) == most or (longest and tokens > longest)):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def flatten_batch(rows: list[Example], device) -> dict:
    """Rows as one flat batch (1, T), each with positions of its own, so that none sees another."""
    columns = {
        "input_ids": [token for row in rows for token in row.input_ids],
        "labels": [label for row in rows for label in row.labels],
        "position_ids": [position for row in rows for position in range(len(row.input_ids))],
    }
    return {name: torch.tensor([values], device=device) for name, values in columns.items()}
