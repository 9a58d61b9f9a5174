"""Token shards as a dataset of windows, in an order that depends on seed and position alone."""

import bisect
import dataclasses
import functools
import hashlib
import math
import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .mixture import Schedule

ORDER_VERSION = 2  # of new runs; runs whose identity has no `order_version` have 1


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of windows: sequential, or shuffled by a seeded permutation of each epoch.

    version: how an epoch's key follows from the seed. 1: seed + epoch, so that seed 0 in epoch 1 and seed 1 in epoch 0
    give one permutation. 2: a hash of seed, fingerprint of the prepared folder, and epoch.
    """

    kind: str = "sequential"
    seed: int = 0
    version: int = ORDER_VERSION

    def key(self, fingerprint: str, epoch: int) -> int:
        """The key of an epoch's permutation."""
        return self.seed + epoch if self.version == 1 else _hashed_key(self.seed, fingerprint, epoch)


@functools.lru_cache(maxsize=1024)
def _hashed_key(seed: int, fingerprint: str, epoch: int) -> int:
    digest = hashlib.sha256(f"{seed} {fingerprint} {epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2  # `permuted` multiplies it by 4, within 64 bits


class TokenWindows:
    """Map-style dataset: window i is tokens [i*L, i*L + L + 1), L + 1 ids for L predictions.

    Item k is the window at position k of the whole run, for `length` positions (None: one epoch). An epoch has
    `epoch_windows` windows (None: all), and with a shuffled order its own permutation. The order is a function of
    (seed, position) alone, and no table of it is held in memory.

    folder, manifest: a prepared folder and its manifest. split: train or validation. block_size: L.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict,
        split: str,
        block_size: int,
        order: Order = Order(),
        epoch_windows: int | None = None,
        length: int | None = None,
    ):
        self.paths = [Path(folder) / shard["name"] for shard in manifest["splits"][split]["shards"]]
        self.ends = np.cumsum([shard["tokens"] for shard in manifest["splits"][split]["shards"]])
        self.fingerprint = manifest["fingerprint"]
        self.block_size, self.order = block_size, order
        self.windows = count_windows(manifest, split, block_size)
        self.epoch_windows = epoch_windows or self.windows
        self.length = self.epoch_windows if length is None else length
        self.starts = [0]
        self.replacement = None  # of windows that the run does not read (removal.py)
        self.maps: dict[int, np.memmap] = {}
        self.reads_ahead = True  # False: the disk reads the windows alone, for a few of them from many shards

    def restart_order_at(self, position: int) -> None:
        """Begin the order again at a position of the run: for a run that is resumed without its data position. Earlier
        positions keep their windows.
        """
        self.starts = [start for start in self.starts if start < position] + [position]

    def __len__(self) -> int:
        return self.length

    def window_of(self, position: int) -> int:
        """Index of the window at a position of the run."""
        start = self.starts[-1]
        if position < start:
            start = self.starts[bisect.bisect_right(self.starts, position) - 1]
        epoch, index = divmod(position - start, self.epoch_windows)
        if self.order.kind != "sequential":
            index = permuted(index, self.epoch_windows, self.order.key(self.fingerprint, epoch))
        return index if self.replacement is None else self.replacement.window(index, position)

    def positions_of(self, window: int) -> list[int]:
        """Every position of the run at which a window is read, ascending; none for a window that no epoch has."""
        if self.replacement is None:
            return self.ordered_positions(window)
        return self.replacement.positions(window, self)

    def ordered_positions(self, window: int) -> list[int]:
        """As `positions_of`, by the order alone, without replacements."""
        found = []
        if window >= self.epoch_windows:
            return found
        for start, end in zip(self.starts, [*self.starts[1:], self.length], strict=True):
            for epoch in range(-((start - end) // self.epoch_windows)):
                key = self.order.key(self.fingerprint, epoch)
                index = window if self.order.kind == "sequential" else unpermuted(window, self.epoch_windows, key)
                found.append(start + epoch * self.epoch_windows + index)
            if found and found[-1] >= end:
                found.pop()
        return found

    def __getitem__(self, position: int) -> np.ndarray:
        return self.window(self.window_of(position))

    def window(self, index: int) -> np.ndarray:
        """A window by its index in the split."""
        first = index * self.block_size
        return self._tokens(first, first + self.block_size + 1)

    def __getitems__(self, positions: list[int]) -> list[np.ndarray]:
        return [self[position] for position in positions]

    def _tokens(self, first: int, last: int) -> np.ndarray:
        """Tokens [first, last) of the split, across shards."""
        parts = []
        while first < last:
            shard = int(np.searchsorted(self.ends, first, side="right"))
            begin = int(self.ends[shard - 1]) if shard else 0
            end = min(last, int(self.ends[shard]))
            parts.append(self._map(shard)[first - begin : end - begin])
            first = end
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self.maps:
            self.maps[shard] = np.load(self.paths[shard], mmap_mode="r")
            if not self.reads_ahead and hasattr(mmap, "MADV_RANDOM"):  # Linux reads read_ahead_kb around each window
                self.maps[shard].base.madvise(mmap.MADV_RANDOM)
        return self.maps[shard]


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Positions of a run with one mixture: from `start` on, when `read[i]` windows of folder i had been read."""

    start: int
    schedule: Schedule
    read: list[int]


class MixedWindows:
    """Map-style dataset over several TokenWindows: item k is the window at position k of the whole run.

    `epoch_windows` are the positions that the present weights can take before any folder is read a second time.

    Which folder a position takes follows from the weights and the position (`Schedule`). The n-th window that is taken
    from a folder is that of the folder's own position n, so its order and epochs are its own.

    folders: of one block size; their `length` is set here. None: a folder that is not at hand, whose windows cannot be
    read or found. weights: shares that sum to 1. length: positions of the run. fingerprints: those of the folders.
    """

    def __init__(
        self,
        folders: Sequence[TokenWindows | None],
        weights: Sequence[float],
        length: int,
        fingerprints: Sequence[str] = (),
    ):
        self.folders, self.length, self.fingerprints = list(folders), length, list(fingerprints)
        self.block_size = next(folder.block_size for folder in folders if folder is not None)
        self.stretches = [Stretch(0, Schedule(weights), [0] * len(self.folders))]
        self._set_lengths()

    def change_weights_at(self, position: int, weights: Sequence[float]) -> None:
        """Mix by other weights from a position of the run on. Each folder goes on where it stopped; a weight of 0 stops
        it.
        """
        read = self.counts(position)
        self.stretches = [stretch for stretch in self.stretches if stretch.start < position]
        self.stretches.append(Stretch(position, Schedule(weights), read))
        self._set_lengths()

    def restart_order_at(self, position: int) -> None:
        """Begin the orders of all folders again at a position of the run, with the same weights."""
        weights = self._stretch(position).schedule.weights
        self.change_weights_at(position, weights)
        for folder, read in zip(self.folders, self.stretches[-1].read, strict=True):
            if folder is not None:
                folder.restart_order_at(read)

    def _set_lengths(self) -> None:
        for folder, count in zip(self.folders, self.counts(self.length), strict=True):
            if folder is not None:
                folder.length = count
        reach = self.stretches[-1].schedule.reach
        self.epoch_windows = min(
            reach(i, folder.windows) for i, folder in enumerate(self.folders) if folder is not None
        )

    def _stretch(self, position: int) -> Stretch:
        """The mixture of a position of the run."""
        return self.stretches[bisect.bisect_right(self.stretches, position, key=lambda stretch: stretch.start) - 1]

    def _position_in_folder(self, position: int) -> tuple[int, int]:
        """(folder, the folder's own position) of a position of the run."""
        stretch = self.stretches[-1]
        if position < stretch.start:
            stretch = self._stretch(position)
        folder, n = stretch.schedule.locate(position - stretch.start)
        return folder, stretch.read[folder] + n

    def __len__(self) -> int:
        return self.length

    def locate(self, position: int) -> tuple[int, int]:
        """(index of the folder, index of its window) at a position of the run."""
        folder, n = self._position_in_folder(position)
        return folder, self.folders[folder].window_of(n)

    def positions_of(self, folder: int, window: int) -> list[int]:
        """Every position of the run at which a window of a folder is read, ascending."""
        ends, found = [*(stretch.read[folder] for stretch in self.stretches[1:]), math.inf], []
        for n in self.folders[folder].positions_of(window):
            stretch = self.stretches[bisect.bisect_right(ends, n)]
            found.append(stretch.start + stretch.schedule.position(folder, n - stretch.read[folder]))
        return found

    def counts(self, position: int) -> list[int]:
        """Windows of each folder before a position of the run; times `block_size`, its tokens."""
        stretch = self._stretch(position)
        counted = (stretch.schedule.count(i, position - stretch.start) for i in range(len(self.folders)))
        return [read + count for read, count in zip(stretch.read, counted, strict=True)]

    def __getitem__(self, position: int) -> np.ndarray:
        folder, n = self._position_in_folder(position)
        return self.folders[folder][n]

    def __getitems__(self, positions: list[int]) -> list[np.ndarray]:
        return [self[position] for position in positions]


def in_order(parts: list[dict]) -> list[dict]:
    """The folders of a mixture's manifest in the order of their schedule, which is that of their fingerprints: the
    windows of a run do not depend on the order in which a command names the folders.
    """
    return sorted(parts, key=lambda part: part["fingerprint"])


def count_windows(manifest: dict, split: str, block_size: int) -> int:
    """Number of windows of block_size predictions in a split; of a mixture's manifest, those that can be trained on
    before any folder is read a second time, and the most that one folder holds out.
    """
    if "mixture" in manifest:
        parts = in_order(manifest["mixture"])
        counts = [count_windows(part, split, block_size) for part in parts]
        schedule = Schedule([part["weight"] for part in parts])
        return min(map(schedule.reach, range(len(parts)), counts)) if split == "train" else max(counts)
    return max(0, (manifest["splits"][split]["tokens"] - 1) // block_size)


def permuted(index: int, size: int, key: int) -> int:
    """The image of `index` under a pseudo-random permutation of range(size), computed without a table.

    A four-round Feistel network on the next even number of bits, walked until it lands inside (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002). key: a whole number.
    """
    half = _half_bits(size)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for cipher_round in range(4):
            left, right = right, left ^ (_mix(right, key * 4 + cipher_round) & mask)
        index = (left << half) | right
        if index < size:
            return index


def unpermuted(image: int, size: int, key: int) -> int:
    """The index whose image under `permuted` is `image`: the rounds backwards, the same walk."""
    half = _half_bits(size)
    mask = (1 << half) - 1
    while True:
        left, right = image >> half, image & mask
        for cipher_round in reversed(range(4)):
            left, right = right ^ (_mix(left, key * 4 + cipher_round) & mask), left
        image = (left << half) | right
        if image < size:
            return image


def _half_bits(size: int) -> int:
    """Bits of one half of the Feistel network."""
    return max(1, math.ceil(math.log2(max(size, 2)) / 2))


def _mix(value: int, key: int) -> int:
    """SplitMix64's finalizer."""
    value = (value + (key + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def collate(windows: list[np.ndarray]) -> dict:
    """A batch of windows of L + 1 ids: input_ids, labels and shift_labels, int64 tensors [batch, L]. Targets are the
    inputs shifted by one.

    With `shift_labels` Llama's loss uses all L predictions; with `labels` alone it drops the last one.
    """
    import torch

    tokens = torch.from_numpy(np.stack(windows).astype(np.int64))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return {"input_ids": inputs, "labels": targets, "shift_labels": targets}


def row_order(count: int, steps: int, per_step: int, seed: int, start: int = 0) -> list[int]:
    """The row at each position of the run, for steps x per_step positions. Each epoch has its own permutation, cut to
    whole steps.

    start: step at which the order begins again, for a run that is resumed without its data position.
    """
    epoch = count // per_step * per_step
    positions = (
        position - start * per_step if position >= start * per_step else 0 for position in range(steps * per_step)
    )
    return [permuted(index % epoch, epoch, seed + index // epoch) for index in positions]
