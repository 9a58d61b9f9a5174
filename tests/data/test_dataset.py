"""Windows of L + 1 ids, across shards, in an order that can be computed from anywhere."""

import numpy as np
import pytest
from helpers import prepare

from llama_lite.data import dataset


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
        tmp_path / "tokens", manifest, "train", 64, "shuffled", 7, epoch_windows=1000, length=2000
    )
    first, second = ([train.window_of(p) for p in range(start, start + 1000)] for start in (0, 1000))
    assert sorted(first) == sorted(second) == list(range(1000)) and first != second != list(range(1000))
    again = dataset.TokenWindows(
        tmp_path / "tokens", manifest, "train", 64, "shuffled", 7, epoch_windows=1000, length=2000
    )
    assert again.window_of(1234) == second[234]
    other = dataset.TokenWindows(
        tmp_path / "tokens", manifest, "train", 64, "shuffled", 8, epoch_windows=1000, length=2000
    )
    assert [other.window_of(p) for p in range(1000)] != first


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 1025])
def test_permutation_of_any_size(size):
    assert sorted(dataset.permuted(place, size, 3) for place in range(size)) == list(range(size))


def test_collate_gives_every_prediction():
    import torch

    batch = dataset.collate([np.arange(5, dtype=np.uint16), np.arange(5, 10, dtype=np.uint16)])
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]] and batch["shift_labels"].tolist() == [
        [1, 2, 3, 4],
        [6, 7, 8, 9],
    ]
    assert batch["input_ids"].dtype == torch.int64
