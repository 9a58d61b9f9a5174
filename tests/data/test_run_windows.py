"""The windows of a run from its records: one folder or a mixture, restarted or mixed otherwise on the way."""

from pathlib import Path

from llama_lite.data.dataset import permuted
from llama_lite.data.run_windows import weights_of, windows_of_run


def folder(name: str, windows: int) -> tuple[Path, dict]:
    return Path("absent"), {"fingerprint": name, "splits": {"train": {"tokens": 4 * windows + 1, "shards": []}}}


DATA = {"order": "shuffled", "block_size": 4, "tokens_per_step": 40, "data_seed": 7, "seed": 1}
MIXTURE = {"web": {"data": "w", "weight": 0.7}, "code": {"data": "c", "weight": 0.3}}
MIXED = {**DATA, "order_version": 2, "mixture": MIXTURE}


def counts(train, position: int) -> dict[str, int]:
    return dict(zip(train.fingerprints, train.counts(position), strict=True))


def test_a_run_of_earlier_versions_reads_its_own_order():
    train = windows_of_run({"w": folder("w", 98)}, {**DATA, "data": "w"}, 20)
    assert [train.window_of(p) for p in range(200)] == [permuted(p % 90, 90, 7 + p // 90) for p in range(200)]


def test_a_run_that_lost_its_data_position_begins_the_order_again():
    train = windows_of_run({"w": folder("w", 98)}, {**DATA, "data": "w", "order_version": 2}, 20, [{"step": 3}])
    assert [train.window_of(p) for p in range(30)] == [train.window_of(p) for p in range(30, 60)]


def test_a_mixture_is_made_of_its_records():
    train = windows_of_run({"w": folder("w", 98), "c": folder("c", 33)}, MIXED, 20)
    assert len(train) == 200 and counts(train, 200) == {"w": 140, "c": 60}
    assert {one.fingerprint: one.epoch_windows for one in train.folders} == {"w": 98, "c": 33}
    again = [{"step": 0, "weights": weights_of(MIXED)}, {"step": 5}]
    restarted = windows_of_run({"w": folder("w", 98), "c": folder("c", 33)}, MIXED, 20, again)
    read = [restarted.locate(p) for p in range(100)]
    assert read[:50] == read[50:] == [train.locate(p) for p in range(50)]


def test_a_run_of_one_folder_that_becomes_a_mixture_goes_on_in_that_folder():
    history = [{"step": 0, "weights": {"w": 1.0}}, {"step": 5, "weights": {"w": 0.7, "c": 0.3}}]
    prepared = {"w": folder("w", 98), "c": folder("c", 33)}
    train = windows_of_run(prepared, MIXED, 20, history)
    alone = windows_of_run(prepared, {**DATA, "order_version": 2, "data": "w"}, 20)
    own = [window for i, window in map(train.locate, range(200)) if train.fingerprints[i] == "w"]
    assert len(own) == 50 + 105 and own == [alone.window_of(p) for p in range(len(own))]


def test_the_order_of_a_mixtures_folders_in_a_record_does_not_matter():
    """JSON of a record may be sorted."""
    prepared = {"w": folder("w", 98), "c": folder("c", 33)}
    one, other = (
        windows_of_run(prepared, {**MIXED, "mixture": dict(parts)}, 20)
        for parts in (MIXTURE.items(), reversed(MIXTURE.items()))
    )
    assert [one.locate(p) for p in range(200)] == [other.locate(p) for p in range(200)]


def test_a_folder_that_left_the_mixture_needs_not_be_there():
    history = [{"step": 0, "weights": {"gone": 0.5, "w": 0.5}}, {"step": 5, "weights": {"w": 0.7, "c": 0.3}}]
    train = windows_of_run({"w": folder("w", 98), "c": folder("c", 33)}, MIXED, 20, history)
    assert counts(train, 200) == {"gone": 25, "w": 25 + 105, "c": 45}
    first, last = train.fingerprints.index("gone"), train.fingerprints.index("w")
    assert train.folders[first] is None
    assert [train.locate(p) for p in range(200) if train._position_in_folder(p)[0] == last] == [
        (last, train.folders[last].window_of(n)) for n in range(130)
    ]
