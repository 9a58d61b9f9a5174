"""Validation sets of a pretraining run: losses, perplexities and bits per byte of each, and what they cost."""

import dataclasses
import math

import torch

from ..data.dataset import Order, TokenWindows
from ..data.prepared import PreparedTokens
from ..distributed import WORLD_SIZE
from ..kernels.probe import without_router_loss
from .data_plan import probe_counts


@dataclasses.dataclass(frozen=True)
class ValidationSet:
    """Held-out windows that are measured at each evaluation.

    name: "" of a run's only text, whose loss is `eval_loss` alone. weight: part of `eval_loss`; 0 of further sets.
    """

    name: str
    windows: TokenWindows
    bytes_per_token: float
    weight: float


def validation_sets(tokens: PreparedTokens, run) -> list[ValidationSet]:
    """The sets of a run: the held-out slice of each folder, then those of --validation.

    run: the run's arguments, of which `eval_windows` is the most windows of each (None: all), and `eval_order` says
    which: the first ones, or the first ones of a permutation that follows from the prepared folder alone.
    """
    sets, order = [], Order(run.eval_order)
    for part in (*tokens.folders, *tokens.validation):
        name = part.name if tokens.is_mixture or part.weight == 0 else ""
        windows = TokenWindows(part.folder, part.manifest, "validation", run.block_size, order)
        windows.length = min(windows.length, run.eval_windows or windows.length)
        sets.append(ValidationSet(name, windows, part.bytes_per_token, part.weight))
    return sets


def probe_windows(sets: list[ValidationSet], count: int) -> list:
    """The windows whose loss a checkpoint records: the first ones of the folders that are trained on."""
    own = [one for one in sets if one.weight]
    counts = probe_counts([one.weight for one in own], count)
    return [
        one.windows.window(i) for one, n in zip(own, counts, strict=True) for i in range(min(n, one.windows.windows))
    ]


def held_out_metrics(trainer, sets: list[ValidationSet]) -> dict[str, float]:
    """`eval_loss` (nats per token), perplexity and bits per byte, and the same of each named set.

    `eval_loss` is the mean over the folders of a mixture by their weights, and within a folder over its tokens; bits
    per byte are of as many bytes as such tokens hold.
    """
    losses = [mean_loss(trainer, one.windows) for one in sets]
    weighted = [(one.weight, loss, one.bytes_per_token) for one, loss in zip(sets, losses, strict=True) if one.weight]
    loss = math.fsum(weight * loss for weight, loss, _ in weighted)
    found = metrics_of("eval", loss, math.fsum(weight * size for weight, _, size in weighted))
    for one, loss in zip(sets, losses, strict=True):
        found |= metrics_of(f"eval_{one.name}", loss, one.bytes_per_token) if one.name else {}
    return found


def metrics_of(prefix: str, loss: float, bytes_per_token: float) -> dict[str, float]:
    """{PREFIX_loss, PREFIX_perplexity, PREFIX_bits_per_byte} of a loss in nats per token."""
    return {
        f"{prefix}_loss": loss,
        f"{prefix}_perplexity": math.exp(min(loss, 700)),
        f"{prefix}_bits_per_byte": loss / math.log(2) / bytes_per_token,
    }


@torch.no_grad()
def mean_loss(trainer, windows: TokenWindows) -> float:
    """Mean loss in nats over the tokens of all windows, each measured once; ranks share the windows out.

    Every rank makes as many forward passes (a sharded model needs them): one that has run out of windows repeats the
    first, and does not count it. A router's loss is of no token, and left out.
    """
    size = trainer.args.per_device_eval_batch_size
    begins, losses, counted = range(0, len(windows), size), [], []
    for first in range(0, len(begins), WORLD_SIZE):
        own = first + trainer.args.process_index
        begin = begins[own] if own < len(begins) else 0
        rows = [windows[i] for i in range(begin, min(begin + size, len(windows)))]
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        with without_router_loss(trainer.accelerator.unwrap_model(trainer.model)):
            loss = trainer.compute_loss(trainer.model, dict(batch)).item()
        if own < len(begins):
            counted.append(int((batch["labels"] != -100).sum()))
            losses.append(loss * counted[-1])
    loss, tokens = trainer.sum_of_ranks([math.fsum(losses), sum(counted)])
    return loss / tokens
