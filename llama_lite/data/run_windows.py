"""The training windows of a run, at every position of it, from what its records say."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from .dataset import MixedWindows, Order, TokenWindows, count_windows


def windows_of_run(
    prepared: Mapping[str, tuple[Path, dict]], data: dict, steps: int, history: Iterable[dict] = ()
) -> TokenWindows | MixedWindows:
    """The windows that a run of `steps` reads, for every position of it.

    prepared: {fingerprint: (prepared folder, its manifest)}; of a mixture, folders that are not at hand may be left
    out, and their windows cannot be found. data: `identity["data"]` of the run. history: what happened to its order, as
    `progress.json` of a checkpoint holds it (`order_history`): the step, and either nothing, where the orders began
    again, or the `weights` by fingerprint that count from there.
    """
    block_size, per_step = data["block_size"], data["tokens_per_step"] // data["block_size"]
    order = Order(data["order"], data["data_seed"], data.get("order_version", 1))
    history, length = list(history), steps * per_step

    def windows(fingerprint: str, whole_steps: bool) -> TokenWindows | None:
        """The windows of one folder; whole_steps: whether its epochs are cut to whole steps."""
        if fingerprint not in prepared:
            return None
        folder, manifest = prepared[fingerprint]
        epoch = count_windows(manifest, "train", block_size) // per_step * per_step if whole_steps else None
        return TokenWindows(folder, manifest, "train", block_size, order, epoch, length)

    if "mixture" not in data:
        train = windows(data["data"], True)
        for entry in history:
            train.restart_order_at(entry["step"] * per_step)
        return train
    first, *later = history or [{"step": 0, "weights": weights_of(data)}]
    names = sorted({name for entry in (first, *later) for name in entry.get("weights", ())})  # as `in_order`
    # a run that began with one folder goes on with that folder's epochs
    folders = [windows(name, first["weights"].keys() == {name}) for name in names]
    train = MixedWindows(folders, [first["weights"].get(name, 0.0) for name in names], length, names)
    for entry in later:
        position, weights = entry["step"] * per_step, entry.get("weights")
        if weights is None:
            train.restart_order_at(position)
        else:
            train.change_weights_at(position, [weights.get(name, 0.0) for name in names])
    return train


def weights_of(data: dict) -> dict[str, float]:
    """{fingerprint: weight} of the folders of a run's identity (`identity["data"]`)."""
    mixture = data.get("mixture")
    return {part["data"]: part["weight"] for part in mixture.values()} if mixture else {data["data"]: 1.0}


def describe_windows(train: TokenWindows | MixedWindows, names: list[str], positions: range) -> str:
    """The windows at some positions of a run, for a person to look at. names: of the folders of a mixture."""
    shown, more = positions[:8], " ..." if len(positions) > 8 else ""
    if isinstance(train, MixedWindows):
        found = [train.locate(position) for position in shown]
        return f"windows {', '.join(f'{names[folder]} {window}' for folder, window in found)}{more}"
    if train.order.kind == "sequential":
        return f"windows {train.window_of(positions[0])} to {train.window_of(positions[-1])}"
    return f"windows {', '.join(str(train.window_of(position)) for position in shown)}{more}"
