"""Windows of L + 1 ids, across shards, in an order that can be computed from anywhere."""

from pathlib import Path

import numpy as np
import pytest
from helpers import prepare

from llama_lite.data import dataset
from llama_lite.data.dataset import MixedWindows, Order, TokenWindows, permuted, unpermuted


def test_windows_are_l_plus_one_and_cross_shards(tmp_path, text):
    manifest = prepare(tmp_path, dataset=str(text))
    whole = np.concatenate([np.load(p) for p in sorted((tmp_path / "tokens").glob("train-*.npy"))])
    train = dataset.TokenWindows(tmp_path / "tokens", manifest, "train", 64)
    assert len(train) == (len(whole) - 1) // 64
    for i in (0, 311, 312, 313, len(train) - 1):  # 312 crosses the first shard's end at 20,000
        assert (train[i] == whole[i * 64 : i * 64 + 65]).all()


def test_shuffled_order_is_a_permutation_each_epoch_and_a_function_of_the_position(tmp_path, text):
    manifest = prepare(tmp_path, dataset=str(text))
    train = dataset.TokenWindows(
        tmp_path / "tokens", manifest, "train", 64, Order("shuffled", 7), epoch_windows=1000, length=2000
    )
    first, second = ([train.window_of(p) for p in range(start, start + 1000)] for start in (0, 1000))
    assert sorted(first) == sorted(second) == list(range(1000)) and first != second != list(range(1000))
    again = dataset.TokenWindows(
        tmp_path / "tokens", manifest, "train", 64, Order("shuffled", 7), epoch_windows=1000, length=2000
    )
    assert again.window_of(1234) == second[234]
    other = dataset.TokenWindows(
        tmp_path / "tokens", manifest, "train", 64, Order("shuffled", 8), epoch_windows=1000, length=2000
    )
    assert [other.window_of(p) for p in range(1000)] != first


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 1025])
def test_permutation_of_any_size(size):
    assert sorted(dataset.permuted(place, size, 3) for place in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 1025])
@pytest.mark.parametrize("key", [0, 3, 2**62 - 1])
def test_permutation_has_an_exact_inverse(size, key):
    assert [unpermuted(permuted(place, size, key), size, key) for place in range(size)] == list(range(size))


def windows(name: str, count: int, order: Order, length: int | None = None, epoch_windows: int | None = None):
    """TokenWindows of `count` windows of 4 predictions, whose shards are not there."""
    manifest = {"fingerprint": name, "splits": {"train": {"tokens": 4 * count + 1, "shards": []}}}
    return TokenWindows(Path("absent"), manifest, "train", 4, order, epoch_windows, length)


def test_orders_of_earlier_runs_stay_what_they_are():
    """Their key is seed + epoch, computed here by the formula of those versions."""
    old = windows("text", 100, Order("shuffled", 7, version=1), 250)
    assert [old.window_of(p) for p in range(250)] == [permuted(p % 100, 100, 7 + p // 100) for p in range(250)]
    assert [old.window_of(p) for p in (0, 1, 2, 100, 101)] == [37, 22, 61, 45, 86]


def test_orders_of_new_runs_differ_by_seed_epoch_and_folder():
    orders = {
        (name, seed, epoch): tuple(
            windows(name, 100, Order("shuffled", seed)).window_of(100 * epoch + i) for i in range(100)
        )
        for name in ("web", "code")
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == len(orders)  # version 1: seed 0 in epoch 1 is seed 1 in epoch 0
    assert all(sorted(order) == list(range(100)) for order in orders.values())


@pytest.mark.parametrize("order", [Order(), Order("shuffled", 3), Order("shuffled", 3, version=1)])
def test_positions_of_a_window_are_all_at_which_it_is_read(order):
    train = windows("text", 23, order, 100, epoch_windows=20)
    train.restart_order_at(33)
    train.restart_order_at(70)
    read = [train.window_of(position) for position in range(100)]
    assert read[33:53] == read[70:90]
    for window in range(23):
        assert train.positions_of(window) == [p for p in range(100) if read[p] == window]
    assert train.positions_of(22) == []  # an epoch of whole steps leaves it out


def mixed(length: int = 1000) -> MixedWindows:
    """Three folders, of which one is read several times and one begins later."""
    folders = [windows(name, count, Order("shuffled", 5)) for name, count in (("web", 700), ("code", 90), ("math", 80))]
    train = MixedWindows(folders, [0.7, 0.3, 0.0], length)
    train.change_weights_at(400, [0.5, 0.0, 0.5])
    train.restart_order_at(601)
    train.change_weights_at(800, [0.1, 0.4, 0.5])
    return train


def test_a_mixture_is_addressed_from_both_sides():
    train = mixed()
    read = [train.locate(position) for position in range(1000)]
    for folder, count in enumerate((700, 90, 80)):
        for window in range(count):
            found = train.positions_of(folder, window)
            assert found == [p for p in range(1000) if read[p] == (folder, window)]
    assert [train.counts(p)[1] for p in (0, 400, 800, 1000)] == [0, 120, 120, 200]
    for position in (1, 399, 400, 555, 800, 999):
        assert train.counts(position) == [sum(f == i for f, _ in read[:position]) for i in range(3)]


def test_each_folder_goes_on_where_it_stopped_when_weights_change():
    train = mixed()
    for folder in range(3):
        own = [window for i, window in map(train.locate, range(601)) if i == folder]
        expected = train.folders[folder]
        assert own == [expected.window_of(n) for n in range(len(own))] and len(set(own)) == min(
            len(own), expected.windows
        )


def test_a_mixture_reads_the_windows_of_its_folders(tmp_path, text):
    manifest = prepare(tmp_path, dataset=str(text))
    folders = [TokenWindows(tmp_path / "tokens", manifest, "train", 64, Order("shuffled", seed)) for seed in (1, 2)]
    train = MixedWindows(folders, [0.25, 0.75], 400)
    for position in (0, 1, 17, 399):
        folder, window = train.locate(position)
        whole = TokenWindows(tmp_path / "tokens", manifest, "train", 64)
        assert len(train) == 400 and (train.__getitems__([position])[0] == whole[window]).all()
        assert folders[folder].window_of(train.counts(position)[folder]) == window


def test_collate_gives_every_prediction():
    import torch

    batch = dataset.collate([np.arange(5, dtype=np.uint16), np.arange(5, 10, dtype=np.uint16)])
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]] and batch["shift_labels"].tolist() == [
        [1, 2, 3, 4],
        [6, 7, 8, 9],
    ]
    assert batch["input_ids"].dtype == torch.int64
