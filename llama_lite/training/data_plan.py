"""How much of each folder of a mixture a run reads, and what its validation sets cost. Pure arithmetic."""

import math
from collections.abc import Sequence

from ..config.pairs import epoch_limits, mixture_weights
from ..data.dataset import count_windows, in_order
from ..data.mixture import Schedule
from ..errors import Refusal

FORWARD = 3  # a window that is evaluated is a third of the work of one that is trained on


def source_rows(manifest: dict, block_size: int, positions: int, read: list[int] | None = None) -> list[dict]:
    """{name, weight, tokens, epochs} of each folder of a mixture after so many windows of a run; nothing of one text.

    manifest: of the mixture. read: windows that were read of each folder, where the weights did not always count.
    """
    parts = manifest.get("mixture", [])
    if not parts:
        return []
    ordered = in_order(parts)
    schedule = Schedule([part["weight"] for part in ordered])
    counts = read or [schedule.count(ordered.index(part), positions) for part in parts]
    return [
        {
            "name": part["name"],
            "weight": part["weight"],
            "tokens": count * block_size,
            "epochs": count / max(1, count_windows(part, "train", block_size)),
        }
        for part, count in zip(parts, counts, strict=True)
    ]


def source_lines(rows: list[dict]) -> list[str]:
    """The part of each folder, as lines of a plan."""
    width = max((len(row["name"]) for row in rows), default=0)
    return [
        f"{'mixture' if number == 0 else '':<20}{row['name']:<{width}}  {row['weight']:.4f}  {row['tokens']:,} tokens,"
        f" {row['epochs']:.2f} epochs"
        for number, row in enumerate(rows)
    ]


def most_positions(manifest: dict, block_size: int, mixture: list[str], allow_epochs: bool, limits: list[str]) -> float:
    """Windows that a run may read before a folder of a mixture is read more often than `check_epochs` allows; infinite
    for one text. manifest: of the mixture; the other arguments as those of `check_epochs`.
    """
    parts = manifest.get("mixture", [])
    if not parts:
        return math.inf
    allowed, default = epoch_limits(limits), math.inf if allow_epochs else 1.0
    ordered = in_order(parts)
    schedule = Schedule([part["weight"] for part in ordered])
    most = math.inf
    for part, folder in zip(parts, mixture_weights(mixture), strict=True):
        windows = allowed.get(folder, default) * count_windows(part, "train", block_size)
        if windows < math.inf:
            most = min(most, schedule.reach(ordered.index(part), int(windows)))
    return most


def check_epochs(rows: list[dict], mixture: list[str], allow_epochs: bool, limits: list[str]) -> None:
    """Raise Refusal where a folder of a mixture would be read more often than is allowed.

    rows: of `source_rows`, in the order of `mixture`. mixture, allow_epochs, limits: --mixture, --allow_epochs and
    --allow_epochs_of.
    """
    allowed, default = epoch_limits(limits), math.inf if allow_epochs else 1.0
    too_often = [
        (folder, row["epochs"], allowed.get(folder, default))
        for row, folder in zip(rows, mixture_weights(mixture) if rows else (), strict=True)
        if row["epochs"] > allowed.get(folder, default)
    ]
    if too_often:
        shown = "; ".join(
            f"{folder} would be read {epochs:.2f} times (allowed: {limit:g})" for folder, epochs, limit in too_often
        )
        raise Refusal(
            f"{shown}: lower --max_steps or its share in --mixture, add text to it, or allow it with --allow_epochs_of"
            f" {' '.join(folder for folder, _, _ in too_often)} (--allow_epochs: every folder)."
        )


def set_rows(manifest: dict, block_size: int, eval_windows: int | None, probe: int) -> list[dict]:
    """{name, windows, held_out, probe} of each validation set of a run, in its order: the slice of each folder, "" of
    one text, then those of --validation. windows: that an evaluation measures, of those `held_out`. manifest: with its
    `validation_sets`. probe: windows that verify a checkpoint.
    """
    own = [(part["name"], part) for part in manifest.get("mixture", [])] or [("", manifest)]
    found = [*own, *manifest.get("validation_sets", {}).items()]
    counts = [(name, count_windows(part, "validation", block_size)) for name, part in found]
    probes = probe_counts([part["weight"] for part in manifest.get("mixture", [])] or [1.0], probe)
    probes += [0] * (len(counts) - len(probes))
    return [
        {"name": name, "windows": min(count, eval_windows or count), "held_out": count, "probe": min(count, number)}
        for (name, count), number in zip(counts, probes, strict=True)
    ]


def probe_counts(weights: Sequence[float], count: int) -> list[int]:
    """How many of `count` probe windows come from each folder: by its weight, and at least one."""
    schedule = Schedule(weights)
    return [max(1, schedule.count(i, count)) for i in range(len(weights))]


def cost_lines(sets: list[dict], sources: list[dict], block_size: int, evaluations: int, trained: int) -> list[str]:
    """What the evaluations of several sets cost, and what `eval_loss` is, as lines of a plan; nothing of one set.

    sets, sources: of `set_rows` and `source_rows`. trained: tokens that the run trains on.
    """
    if len(sets) < 2:
        return []
    tokens = sum(row["windows"] for row in sets) * block_size
    share = 100 * evaluations * tokens / FORWARD / trained
    probes = ", ".join(f"{row['name']} {row['probe']}" for row in sets if row["probe"])
    own = sources and (
        f"{'':<20}eval_loss is the mean of {', '.join(row['name'] for row in sources)} by their shares; probe windows:"
        f" {probes}"
    )
    shown = ", ".join(f"{row['name'] or 'its own'} {row['windows']:,}" for row in sets)
    return [
        (
            f"validation          {len(sets)} sets, {tokens:,} tokens per evaluation ({shown} windows), {evaluations:,}"
            f" evaluation{'s' if evaluations > 1 else ''}: {share:.1f} % of the computation of training"
        ),
        *([own] if own else []),
    ]
