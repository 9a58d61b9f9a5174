"""How rows form a batch: packed without padding where the model keeps packed rows separate, else padded."""

import dataclasses
from collections.abc import Iterator

import torch

from ..chat_format.packing import Example
from ..kernels import probe
from ..kernels.probe import context_of

# relative to the largest logit: bases that keep rows separate differ by 1.1e-6 at most, others by 2.7e-3 at least
# (measured on 20 architectures)
LOGITS_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Batches:
    """How rows of a base can be batched. packs: several in one row without attending to each other. pads: padded on the
    left, for generation.
    """

    packs: bool = True
    pads: bool = True
    max_tokens: int | None = None  # tokens of all rows side by side, where the base sets an end to them (GPT-Neo)

    @property
    def loss_batch_size(self) -> int:
        """Rows per batch when losses are measured, packed into one row."""
        return 8 if self.packs else 1

    def fits(self, tokens: int) -> bool:
        """Whether rows of so many tokens in all can lie side by side."""
        return self.packs and tokens <= (self.max_tokens or tokens)

    @property
    def generation_batch_size(self) -> int:
        """Rows per batch when answers are generated, padded on the left."""
        return 16 if self.pads else 1


@torch.no_grad()
def batches_of(model: torch.nn.Module) -> Batches:
    """How a base's rows can be batched, by its own logits in float32: those of a row after another row, and after
    padding, are compared with those of the row alone.
    """
    first, second = probe.probe_ids(model)
    positions = torch.arange(len(first), device=first.device)
    attention_mask = torch.ones(len(first) + 8, dtype=torch.long, device=first.device)
    attention_mask[:8] = 0
    inputs_by_property = {
        "packs": {
            "input_ids": torch.cat([first, second])[None],
            "position_ids": torch.cat([positions, positions])[None],
        },
        "pads": {"input_ids": torch.cat([first[:8], second])[None], "attention_mask": attention_mask[None]},
    }
    supported = {}
    max_tokens = None
    with probe.evaluating(model):
        separate_logits = model(input_ids=second[None], use_cache=False).logits
        for name, inputs in inputs_by_property.items():
            try:
                supported[name] = probe.close(
                    model(**inputs, use_cache=False).logits[:, -len(second) :], separate_logits, LOGITS_TOLERANCE
                )
            except (TypeError, ValueError, RuntimeError, IndexError):
                supported[name] = False
        if supported["packs"]:
            max_tokens = find_max_tokens(model, inputs_by_property["packs"])
    return Batches(**supported, max_tokens=max_tokens)


def find_max_tokens(model, flat_inputs: dict) -> int | None:
    """Tokens of a row, whatever their positions, where attention is cut out of a square mask of a fixed size; None
    where it is not.

    Tried with masks smaller than `flat_inputs`, which costs less than a row of the model's context.
    """
    masks = [
        mask
        for mask in model.buffers()
        if mask.dim() >= 2 and mask.shape[-1] == mask.shape[-2] == context_of(model.config)
    ]
    if not masks:
        return None
    full_masks, few = [mask.data for mask in masks], flat_inputs["input_ids"].shape[1] - 1
    try:
        for mask in masks:
            mask.data = mask.data[..., :few, :few]
        model(**flat_inputs, use_cache=False)
    except RuntimeError:
        return full_masks[0].shape[-1]
    finally:
        for mask, data in zip(masks, full_masks, strict=True):
            mask.data = data
    return None


def group_rows(rows: list[Example], max_rows: int, max_tokens: int | None) -> Iterator[list[Example]]:
    """Consecutive groups of at most `max_rows` rows and, where a limit is given, `max_tokens` tokens."""
    group: list[Example] = []
    for row in rows:
        tokens = sum(len(other.input_ids) for other in [*group, row])
        if group and (len(group) == max_rows or (max_tokens and tokens > max_tokens)):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def flatten_batch(rows: list[Example], device: torch.device | str) -> dict[str, torch.Tensor]:
    """Rows as one flat batch: input_ids, labels and position_ids of shape (1, total tokens). Positions restart at each
    row, so that no row attends to another.
    """
    columns = {
        "input_ids": [token for row in rows for token in row.input_ids],
        "labels": [label for row in rows for label in row.labels],
        "position_ids": [position for row in rows for position in range(len(row.input_ids))],
    }
    return {name: torch.tensor([values], device=device) for name, values in columns.items()}
