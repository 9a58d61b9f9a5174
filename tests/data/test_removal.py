"""Windows that hold a listed document are replaced, all others stay, and the inverse knows it."""

import random
from pathlib import Path

import pytest
from helpers import jsonl, prepare

from llama_lite.data import removal
from llama_lite.data.document_index import DocumentIndex
from llama_lite.data.removal import Removal, exclude, find_removal, first_use
from llama_lite.data.run_windows import windows_of_run
from llama_lite.errors import Refusal

DATA = {"order": "shuffled", "order_version": 2, "block_size": 4, "tokens_per_step": 40, "data_seed": 7, "data": "w"}
MIXTURE = {"web": {"data": "w", "weight": 0.7}, "code": {"data": "c", "weight": 0.3}}
MIXED = {**{name: value for name, value in DATA.items() if name != "data"}, "mixture": MIXTURE}


def folder(name: str, windows: int) -> tuple[Path, dict]:
    return Path("absent"), {"fingerprint": name, "splits": {"train": {"tokens": 4 * windows + 1, "shards": []}}}


PREPARED = {"w": folder("w", 98), "c": folder("c", 33)}


def order_of(data: dict, windows: dict, steps: int = 30) -> tuple:
    """(the windows of a run without some, what each position reads)."""
    train = windows_of_run(PREPARED, data, steps)
    exclude(train, Removal(1, windows))
    return train, [(train.locate if "mixture" in data else train.window_of)(p) for p in range(len(train))]


@pytest.mark.parametrize("kind", ["shuffled", "sequential"])
def test_only_positions_of_removed_windows_change_also_when_the_list_grows(kind):
    rng, data = random.Random(3), {**DATA, "order": kind}
    removed, (_, before) = [], order_of(data, {})
    assert sorted(before[:90]) == list(range(90))
    for _ in range(8):
        removed = sorted({*removed, *rng.sample(range(90), 6)})
        _, after = order_of(data, {"w": removed})
        assert not set(after) & set(removed)
        assert all(new == old for new, old in zip(after, before, strict=True) if old not in removed)
        assert sum(new != old for new, old in zip(after, before, strict=True)) >= 6
        before = after
    assert order_of(data, {"w": removed})[1] == after != order_of({**data, "data_seed": 8}, {"w": removed})[1]


@pytest.mark.parametrize("data", [DATA, MIXED], ids=["folder", "mixture"])
def test_the_positions_of_a_window_are_known_with_replacements(data):
    windows = {"w": [1, 2, 50, 95], "c": [0, 7]}
    train, read = order_of(data, windows)
    folders = [one.fingerprint for one in train.folders] if data is MIXED else ["w"]
    for number, name in enumerate(folders):
        for window in range({"w": 98, "c": 33}[name]):
            found = train.positions_of(number, window) if data is MIXED else train.positions_of(window)
            entry = (number, window) if data is MIXED else window
            assert found == [position for position, one in enumerate(read) if one == entry]
            assert found == [] or window not in windows[name]
    train, read = order_of(data, {})
    removed = {(n, w) for n, name in enumerate(folders) for w in windows[name]} if data is MIXED else {1, 2, 50}
    assert first_use(train, Removal(1, windows)) == next(p for p, one in enumerate(read) if one in removed)
    beyond = Removal(1, {"w": [97]})  # an epoch of one folder is cut to whole steps
    assert first_use(train, beyond) == (None if data is DATA else read.index((folders.index("w"), 97)))


def test_a_list_that_leaves_too_little_is_refused():
    with pytest.raises(Refusal, match="85 of the 90 windows of w hold a listed document, which leaves too few"):
        order_of(DATA, {"w": list(range(85))})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, dict]:
    """A folder of 400 documents, over several shards, with a validation slice."""
    folder = tmp_path_factory.mktemp("prepared")
    text = jsonl(
        folder / "text.jsonl", [f"Document number {i} counts up to {i}: " + "and on, " * (i % 9) for i in range(400)]
    )
    manifest = prepare(folder, dataset=str(text), shard_tokens=1000, validation_tokens=500)
    return folder / "tokens", manifest


def names_file(folder: Path, names) -> str:
    path = folder / "names.txt"
    path.write_text("".join(f"{name}\n" for name in names))
    return str(path)


def test_every_window_that_holds_a_token_of_a_listed_document_is_removed(prepared, tmp_path):
    import numpy

    path, manifest = prepared
    index, rng = DocumentIndex(path, manifest), random.Random(1)
    total = manifest["splits"]["train"]["tokens"]
    (spans,) = index.documents("train", [(0, total)])
    for block_size in (16, 64):
        chosen = rng.sample(spans, 3)
        listed = numpy.zeros(total, bool)
        for span in chosen:
            listed[span.first + 1 : span.last] = True  # without the end-of-text before it
        names = names_file(tmp_path, [span.location for span in chosen])
        found, told = find_removal(names, {manifest["fingerprint"]: prepared}, block_size)
        expected = [w for w in range((total - 1) // block_size) if listed[w * block_size :][: block_size + 1].any()]
        assert found.windows == {manifest["fingerprint"]: expected} and found.documents == 3
        assert told == {"names": 3, "held_out": 0, "absent": []}
        assert found.identity()["windows"] == len(expected)


def test_what_is_held_out_or_nowhere_is_told(prepared, tmp_path):
    path, manifest = prepared
    index = DocumentIndex(path, manifest)
    ((held,), (trained,)) = (index.documents(split, [(200, 201)]) for split in ("validation", "train"))
    names = names_file(tmp_path, [held[0].location, trained[0].location, "nowhere", "", "nowhere"])
    found, told = find_removal(names, {manifest["fingerprint"]: prepared}, 64)
    assert told == {"names": 3, "held_out": 1, "absent": ["nowhere"]} and found.documents == 1
    lines = removal.removal_lines(found, told)
    assert lines[0].startswith("without   1 listed documents:") and "1 of 3 names are no document" in lines[2]
    assert "1 listed documents are in validation slices, which stay" in lines[1]


def test_lists_that_cannot_be_applied_are_refused(prepared, tmp_path):
    path, manifest = prepared
    parts = {manifest["fingerprint"]: prepared}
    ((held,),) = (DocumentIndex(path, manifest).documents("validation", [(200, 201)]),)
    for content, message in (
        ("", "lists nothing: give an id, a URL or FILE:ROW"),
        ("nobody\nnothing\n", "its 2 documents are in none of the tokens"),
        (held[0].location, "its 1 documents are only in validation slices"),
        ("".join(f"text.jsonl:{row}\n" for row in range(1, 401)), "windows of .* which leaves too few"),
    ):
        (tmp_path / "list").write_text(content)
        with pytest.raises(Refusal, match=message):
            find_removal(str(tmp_path / "list"), parts, 64)
    with pytest.raises(Refusal, match="absent cannot be read: No such file"):
        find_removal(str(tmp_path / "absent"), parts, 64)
    (tmp_path / "list").write_bytes(b"\xff\xfe\xe4")
    with pytest.raises(Refusal, match="it is not UTF-8"):
        find_removal(str(tmp_path / "list"), parts, 64)
    without = {name: value for name, value in manifest.items() if name != "index"}
    with pytest.raises(Refusal, match="has no index of documents"):
        find_removal(names_file(tmp_path, ["x"]), {manifest["fingerprint"]: (path, without)}, 64)
