"""How rows of a model go together in one batch: side by side without padding where the model keeps them apart, else
padded.
"""

import dataclasses

import torch

from ..chat_format.packing import Example
from ..kernels import probe

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

    @property
    def measured(self) -> int:
        """Rows of a batch whose losses are measured, laid side by side."""
        return 8 if self.packs else 1

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
    with probe.evaluating(model):
        alone = model(input_ids=second[None], use_cache=False).logits
        for name, inputs in ways.items():
            try:
                found[name] = probe.close(model(**inputs, use_cache=False).logits[:, -len(second) :], alone, MIXED)
            except (TypeError, ValueError, RuntimeError):
                found[name] = False
    return Batches(**found)


def flatten_batch(rows: list[Example], device) -> dict:
    """Rows as one flat batch (1, T), each with positions of its own, so that none sees another."""
    columns = {
        "input_ids": [token for row in rows for token in row.input_ids],
        "labels": [label for row in rows for label in row.labels],
        "position_ids": [position for row in rows for position in range(len(row.input_ids))],
    }
    return {name: torch.tensor([values], device=device) for name, values in columns.items()}
