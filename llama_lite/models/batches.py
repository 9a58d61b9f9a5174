"""How rows form a batch: packed without padding where the model keeps packed rows separate, else padded."""

import dataclasses

import torch

from ..chat_format.packing import Example
from ..kernels import probe

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

    @property
    def loss_batch_size(self) -> int:
        """Rows per batch when losses are measured, packed into one row."""
        return 8 if self.packs else 1

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
    with probe.evaluating(model):
        separate_logits = model(input_ids=second[None], use_cache=False).logits
        for name, inputs in inputs_by_property.items():
            try:
                supported[name] = probe.close(
                    model(**inputs, use_cache=False).logits[:, -len(second) :], separate_logits, LOGITS_TOLERANCE
                )
            except (TypeError, ValueError, RuntimeError):
                supported[name] = False
    return Batches(**supported)


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
