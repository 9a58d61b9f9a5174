"""The documents of a step and the steps of a document agree with reading every window of the run."""

from pathlib import Path

import numpy as np
import pytest
from helpers import jsonl, prepare

from llama_lite.data.document_reads import DocumentReads, OrderStretch, document_reads, fingerprints_of
from llama_lite.files import read_json


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """Two prepared folders with one tokenizer, by fingerprint."""
    found = {}
    for number, count in enumerate((400, 150)):
        place = tmp_path_factory.mktemp(f"folder{number}")
        texts = [f"Document {i} of folder {number}: {i * i} words, {i} times. " * (1 + i % 7) for i in range(count)]
        tokenizer = "train" if not number else str(next(iter(found.values()))[0] / "tokenizer")
        settings = {"tokenizer": tokenizer, "shard_tokens": 3_000, "validation_tokens": 500, "vocab_size": 300}
        manifest = prepare(place, dataset=str(jsonl(place / f"{number}.jsonl", texts)), **settings)
        found[manifest["fingerprint"]] = (place / "tokens", manifest)
    return found


def stretches_of(folders, kind: str) -> list[OrderStretch]:
    first, second = folders
    data = {"order": "shuffled", "block_size": 32, "tokens_per_step": 256, "data_seed": 7, "seed": 1, "data": first}
    mixture = {name: {"data": one, "weight": w} for name, one, w in (("a", first, 0.6), ("b", second, 0.4))}
    mixed = {name: value for name, value in data.items() if name != "data"} | {"mixture": mixture, "order_version": 2}
    weights = {"step": 0, "weights": {first: 0.6, second: 0.4}}
    return {
        "one folder, several epochs": [OrderStretch(1, 200, data, ({"step": 0},))],
        "an order begun again, then another seed and other steps": [
            OrderStretch(1, 20, data, ({"step": 0},)),
            OrderStretch(21, 40, data, ({"step": 20},)),
            OrderStretch(41, 60, {**data, "data_seed": 8, "tokens_per_step": 512}, ({"step": 20},)),
        ],
        "a mixture": [OrderStretch(1, 60, mixed, (weights,))],
        "one folder that became a mixture": [
            OrderStretch(1, 20, data, ({"step": 0},)),
            OrderStretch(21, 50, mixed, ({"step": 0, "weights": {first: 1.0}}, {**weights, "step": 20}, {"step": 30})),
        ],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "one folder, several epochs",
        "an order begun again, then another seed and other steps",
        "a mixture",
        "one folder that became a mixture",
    ],
)
def test_every_step_and_every_document_agree(folders, kind):
    stretches = stretches_of(folders, kind)
    reads = DocumentReads(folders, stretches)
    assert set(fingerprints_of(stretches)) <= set(folders) and reads.last_step == stretches[-1].last
    by_document: dict = {}
    for step in range(1, reads.last_step + 1):
        of_step = reads.reads(step)
        assert len(of_step) == reads.stretch_of(step).windows_per_step
        for (window, ids), spans in zip(of_step, reads.documents([window for window, _ in of_step]), strict=True):
            folder, manifest = folders[window.fingerprint]
            names = [shard["name"] for shard in manifest["splits"]["train"]["shards"]]
            stream = np.concatenate([np.load(folder / name) for name in names])
            assert np.array_equal(stream[window.first : window.last], ids)
            for span in spans:
                by_document.setdefault((window.fingerprint, span), []).append(window)
    unread = 0
    for fingerprint, index in reads.indexes.items():
        total = folders[fingerprint][1]["splits"]["train"]["tokens"]
        [spans] = index.documents("train", [(0, total)])
        for span in spans:
            found = list(reads.reads_of(fingerprint, span.text_first, span.last))
            assert found == by_document.get((fingerprint, span), [])
            unread += not found
    assert len(by_document) > 100 and (unread or "epochs" in kind)


def test_the_documents_of_a_step_are_named(folders):
    [stretch] = stretches_of(folders, "one folder, several epochs")
    reads = document_reads(folders, stretch.data, 200, [{"step": 0}])
    names = reads.names_of_step(3)
    windows = reads.documents([window for window, _ in reads.reads(3)])
    assert set(names) == {span.location for spans in windows for span in spans} and len(names) >= 8
    bare = {one: (folder, {**manifest, "index": None}) for one, (folder, manifest) in folders.items()}
    for _, manifest in bare.values():
        del manifest["index"]
    assert document_reads(bare, stretch.data, 200, [{"step": 0}]) is None
    assert read_json(next(iter(folders.values()))[0] / "manifest.json")["index"]


@pytest.mark.parametrize("kind", ["one folder, several epochs", "a mixture"])
def test_a_step_reads_its_windows_without_read_ahead(folders, kind):
    """The kernel marks a mapping that was advised so with `rr`."""
    reads = DocumentReads(folders, stretches_of(folders, kind))
    ids = [ids for _, ids in reads.reads(3)]
    mappings, advised, name = Path("/proc/self/smaps").read_text().splitlines(), {}, ""
    for line in mappings:
        if line.startswith("VmFlags:"):
            advised[name] = "rr" in line.split()
        elif "-" in line.split()[0]:
            name = line.split()[-1]
    shards = [
        str(folder / shard["name"])
        for folder, manifest in folders.values()
        for shard in manifest["splits"]["train"]["shards"]
    ]
    assert ids and any(shard in advised for shard in shards)
    assert [shard for shard in shards if not advised.get(shard, True)] == []
