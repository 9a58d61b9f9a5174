"""Token shards as a dataset of windows, in an order that is a function of seed and position alone."""

import math
from pathlib import Path

import numpy as np


class TokenWindows:
    """Map-style dataset: window i is tokens [i*L, i*L + L + 1), L + 1 ids for L predictions.

    `row_order` says which windows the run reads: item k of the dataset is what position k of the whole run reads, over
    `length` items; epochs are cut to `epoch_windows` (whole steps) and each has its own seeded permutation where
    `row_order` is "shuffled". So the order is a function of (seed, position) alone, and nothing of that size is in
    memory.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict,
        split: str,
        block_size: int,
        order: str = "sequential",
        seed: int = 0,
        epoch_windows: int | None = None,
        length: int | None = None,
        start: int = 0,
    ):
        self.paths = [Path(folder) / shard["name"] for shard in manifest["splits"][split]["shards"]]
        self.ends = np.cumsum([shard["tokens"] for shard in manifest["splits"][split]["shards"]])
        self.block_size, self.order, self.seed = block_size, order, seed
        self.windows = count_windows(manifest, split, block_size)
        self.epoch_windows = epoch_windows or self.windows
        self.length = self.epoch_windows if length is None else length
        self.start = start  # positions before it count from 0 again: a run resumed without its data position
        self.maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self.length

    def window_of(self, position: int) -> int:
        """Number of the window that is read at a position of the run."""
        epoch, index = divmod(position - self.start, self.epoch_windows)
        return index if self.order == "sequential" else permuted(index, self.epoch_windows, self.seed + epoch)

    def __getitem__(self, position: int) -> np.ndarray:
        first = self.window_of(position) * self.block_size
        return self._tokens(first, first + self.block_size + 1)

    def __getitems__(self, positions: list[int]) -> list[np.ndarray]:
        return [self[position] for position in positions]

    def _tokens(self, first: int, last: int) -> np.ndarray:
        """Tokens [first, last) of the split, across shards."""
        parts = []
        while first < last:
            shard = int(np.searchsorted(self.ends, first, side="right"))
            begin = int(self.ends[shard - 1]) if shard else 0
            upto = min(last, int(self.ends[shard]))
            parts.append(self._map(shard)[first - begin : upto - begin])
            first = upto
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self.maps:
            self.maps[shard] = np.load(self.paths[shard], mmap_mode="r")
        return self.maps[shard]


def count_windows(manifest: dict, split: str, block_size: int) -> int:
    """Windows of block_size predictions in a split."""
    return max(0, (manifest["splits"][split]["tokens"] - 1) // block_size)


def permuted(index: int, size: int, seed: int) -> int:
    """Place of `place` in a pseudo-random permutation of range(size), without a table of it.

    A four-round Feistel network on the next even number of bits, walked until it lands inside (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002).
    """
    half = max(1, math.ceil(math.log2(max(size, 2)) / 2))
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (_mix(right, seed * 4 + turn) & mask)
        index = (left << half) | right
        if index < size:
            return index


def _mix(value: int, key: int) -> int:
    """SplitMix64's finaliser."""
    value = (value + (key + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def collate(windows: list[np.ndarray]) -> dict:
    """Batch of windows of L + 1 ids as int64 tensors (batch, L): inputs, and the same shifted by one as targets.

    `shift_labels` makes Llama's loss use all L predictions; with `labels` alone it would drop the last one.
    """
    import torch

    tokens = torch.from_numpy(np.stack(windows).astype(np.int64))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return {"input_ids": inputs, "labels": targets, "shift_labels": targets}


def row_order(count: int, steps: int, per_step: int, seed: int, start: int = 0) -> list[int]:
    """Which row each position of the run reads: every epoch is a permutation of its own, cut to whole steps.

    From step `start` on the order begins again: a run resumed without its data position.
    """

    epoch = count // per_step * per_step
    positions = (
        position - start * per_step if position >= start * per_step else 0 for position in range(steps * per_step)
    )
    return [permuted(index % epoch, epoch, seed + index // epoch) for index in positions]
