"""The index of documents: where each begins and what it is called, the same bytes however it was prepared, damage
named, and added to the folders of earlier versions.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import flip, prepare

from llama_lite.data import content_digest, cutting, document_index, parsing, shards
from llama_lite.data.document_index import DocumentIndex, DocumentSpan
from llama_lite.data.tokenizer import load_tokenizer
from llama_lite.errors import Refusal
from llama_lite.files import read_json, write_json

TEXTS = [f"Document {i} tells of {i * i} things. " * (1 + i % 9 * (40 if i % 50 == 0 else 1)) for i in range(1500)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """1,500 rows: every third with an id, every third with a URL, the others with neither; one without text."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = []
    for i, text in enumerate(TEXTS):
        names = ({"id": f"doc-{i}", "url": f"https://a.b/{i}"}, {"url": f"https://a.b/{i}"}, {})[i % 3]
        lines += [json.dumps({"text": text, **names})] + ([json.dumps({"text": None})] if i == 700 else [])
    path.write_text("\n".join(lines) + "\n")
    return path


def row_of(i: int) -> int:
    return i + 1 + (i > 700)


@pytest.fixture(scope="module")
def prepared(rows, tmp_path_factory) -> Path:
    """The rows in shards of 2,000 tokens, some documents over several of them; read only."""
    place = tmp_path_factory.mktemp("prepared")
    prepare(place, dataset=str(rows), shard_tokens=2_000)
    return place / "tokens"


def index_of(folder: Path) -> DocumentIndex:
    return DocumentIndex(folder, read_json(folder / "manifest.json"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted((folder / "index").iterdir())} | {
        "manifest.json": (folder / "manifest.json").read_bytes()
    }


def tokens_of(folder: Path, split: str) -> np.ndarray:
    manifest = read_json(folder / "manifest.json")
    return np.concatenate([np.load(folder / shard["name"]) for shard in manifest["splits"][split]["shards"]])


def expected_spans(folder: Path) -> list[DocumentSpan]:
    """Every span, by the end-of-text tokens of the whole stream."""
    held, train = (tokens_of(folder, split) for split in ("validation", "train"))
    begins = np.append(np.flatnonzero(np.concatenate([held, train]) == 0), len(held) + len(train))
    spans = []
    for i in range(len(TEXTS)):
        names = ((f"doc-{i}", f"https://a.b/{i}"), (None, f"https://a.b/{i}"), (None, None))[i % 3]
        for split, begin, end in (("validation", 0, len(held)), ("train", len(held), len(held) + len(train))):
            first, last = max(begin, int(begins[i])) - begin, min(end, int(begins[i + 1])) - begin
            if first < last:
                spans.append(
                    DocumentSpan(split, first, last, *names, "rows.jsonl", row_of(i), begins=begins[i] >= begin)
                )
    return spans


def test_every_range_of_tokens_has_its_documents(prepared):
    index, spans = index_of(prepared), expected_spans(prepared)
    assert sum(span.last - span.first > 2_000 for span in spans) == 3  # over whole shards
    rng = np.random.default_rng(0)
    for split in ("validation", "train"):
        total = len(tokens_of(prepared, split))
        ranges = [(0, total), (total - 1, total), (5, 5)]
        ranges += [(first, min(total, first + 1 + first % 5_000)) for first in map(int, rng.integers(0, total, 60))]
        for (first, last), found in zip(ranges, index.documents(split, ranges), strict=True):
            assert found == [
                s for s in spans if s.split == split and s.first < last and s.last > first and first < last
            ]


def test_a_document_is_found_by_its_id_its_url_and_its_location(prepared, monkeypatch):
    index, spans = index_of(prepared), expected_spans(prepared)
    by_row = {}
    for span in spans:
        by_row.setdefault(span.row, []).append(span)
    assert any(len(found) == 2 for found in by_row.values())  # the document over the end of the validation slice
    for few in (16, 0):
        monkeypatch.setattr(document_index, "FEW", few)
        for numbers in ([0, 1, 2], [700, 701, 705], range(0, 1500, 7)):
            ids = {f"doc-{i}": by_row[row_of(i)] for i in numbers if i % 3 == 0}
            urls = {f"https://a.b/{i}": by_row[row_of(i)] for i in numbers if i % 3 < 2}
            places = {f"rows.jsonl:{row_of(i)}": by_row[row_of(i)] for i in numbers}
            wanted = ids | urls | places
            assert index.find([*wanted, "doc-1", "rows.jsonl:702", "other.jsonl:1", "x:99999999999", ""]) == wanted | {
                "doc-1": [],
                "rows.jsonl:702": [],
                "other.jsonl:1": [],
                "x:99999999999": [],
                "": [],
            }


def test_an_index_of_an_earlier_version_is_read_by_its_own_hash(prepared, tmp_path):
    """Those have no `hash` in their records, and BLAKE2b of the names."""
    shutil.copytree(prepared, tmp_path / "tokens")
    manifest = read_json(prepared / "manifest.json")
    for record in manifest["index"].values():
        assert record.pop("hash") == "xxh3_64"
        entries, names = (tmp_path / "tokens" / name for name in sorted(record["files"]))
        table = pyarrow.parquet.read_table(names).to_pylist()
        array = np.load(entries)
        called = [one["id"] or one["url"] or f"{one['file']}:{row}" for one, row in zip(table, array[3], strict=True)]
        digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in called)
        array[:2] = np.frombuffer(digests, "<u4").reshape(-1, 2).T
        np.save(entries, array)
    old, new = DocumentIndex(tmp_path / "tokens", manifest), index_of(prepared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DocumentIndex, "_find_locations", None)  # the slow way is not taken
        wanted = ["doc-3", "doc-300", "https://a.b/4", "rows.jsonl:3"]
        found = old.find(wanted)
    assert found == new.find(wanted) and all(found.values())


def test_an_entry_takes_16_bytes_and_names_are_in_parquet(prepared):
    manifest = read_json(prepared / "manifest.json")
    entries = sum(record["entries"] for record in manifest["index"].values())
    arrays = [np.load(path) for path in sorted((prepared / "index").glob("*.npy"))]
    assert sum(array.nbytes for array in arrays) == 16 * entries and entries > manifest["documents"] == 1500
    tables = [pyarrow.parquet.read_table(path) for path in sorted((prepared / "index").glob("*.parquet"))]
    assert sum(table.num_rows for table in tables) == entries
    assert {file for table in tables for file in table["file"].to_pylist()} == {"rows.jsonl"}


def die_after(count: int, writer: type, patch) -> None:
    """Let a writer be interrupted after so many shards."""
    write, calls = writer._write, []

    def dies(self, name):
        calls.append(name)
        if len(calls) > count:
            raise KeyboardInterrupt
        return write(self, name)

    patch.setattr(writer, "_write", dies)


def test_the_index_depends_neither_on_workers_nor_on_parts_nor_on_interruptions(rows, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(document_index, "ROW_GROUP", 7)
    found, settings = [], {"dataset": str(rows), "shard_tokens": 2_000}
    for workers, size, stop in ((1, 1_000_000, None), (3, 3_000, None), (2, 10_000, 4), (1, 100, 9)):
        monkeypatch.setattr(cutting, "PART_BYTES", size)
        place = tmp_path / str(size)
        place.mkdir()
        if stop:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                die_after(stop, shards.ShardWriter, patch)
                prepare(place, prepare_workers=workers, **settings)
        prepare(place, prepare_workers=workers, **settings)
        found.append(files(place / "tokens"))
        assert index_of(place / "tokens").documents("train", [(0, 3_000)]) == index_of(prepared).documents(
            "train", [(0, 3_000)]
        )
    assert found[0] == found[1] == found[2] == found[3]


@pytest.mark.parametrize(
    "name, harm", [("index/train-00001.npy", flip), ("index/validation-00000.parquet", Path.unlink)]
)
def test_a_damaged_index_is_named_and_repaired_as_a_shard_is(prepared, rows, tmp_path, name, harm):
    shutil.copytree(prepared, tmp_path / "tokens")
    folder, settings = tmp_path / "tokens", {"dataset": str(rows), "shard_tokens": 2_000}
    before, manifest = files(folder), read_json(folder / "manifest.json")
    harm(folder / name)
    with pytest.raises(Refusal, match=rf"{name} .*--prepare_only: it repairs"):
        shards.verify_prepared(folder, manifest, "hashes")
    prepare(tmp_path, repair=True, **settings)
    assert files(folder) == before
    (folder / name).write_bytes(b"no index")
    with pytest.raises(Refusal, match=rf"{name} is damaged .*--prepare_only, repairs"):
        index_of(folder).find(["doc-0"]), index_of(folder).documents("validation", [(0, 5_000)])


def test_rows_of_parquet_and_files_of_text_are_named(tmp_path):
    place = tmp_path / "parquet"
    place.mkdir()
    ids = [i if i % 2 else None for i in range(900)]
    table = pyarrow.table({"text": TEXTS[:900], "id": ids, "url": [["no", "text"]] * 900, "other": ids})
    pyarrow.parquet.write_table(table, place / "a.parquet")
    prepare(tmp_path, dataset=str(place), validation_tokens=500)
    found = index_of(tmp_path / "tokens").find(["7", "a.parquet:9", "a.parquet:8"])
    assert [(span.id, span.url, span.file, span.row) for span in found["7"]] == [("7", None, "a.parquet", 8)]
    assert found["a.parquet:8"] == found["7"] and found["a.parquet:9"][0].id is None
    files = tmp_path / "files"
    files.mkdir()
    for i in range(40):
        (files / f"{i}.txt").write_text(TEXTS[i] * 20)
    prepare(tmp_path, dataset=str(files), prepared_dir=str(tmp_path / "text"), validation_tokens=500, vocab_size=300)
    [span] = index_of(tmp_path / "text").find(["7.txt:1"])["7.txt:1"]
    ids = tokens_of(tmp_path / "text", span.split)[span.first : span.last]
    assert load_tokenizer(str(tmp_path / "text/tokenizer")).decode(ids[1:]) == TEXTS[7] * 20


def test_curated_documents_are_named_by_the_text_that_was_curated(rows, tmp_path):
    prepare(tmp_path, dataset=str(rows), exact_dedup=True, min_characters=40)
    index = index_of(tmp_path / "tokens")
    assert read_json(tmp_path / "tokens/manifest.json")["documents"] < 1500
    found = index.find(["doc-705", f"rows.jsonl:{row_of(706)}", "https://a.b/705"])
    assert [(s.id, s.url, s.file, s.row) for s in found["doc-705"]] == [
        ("doc-705", "https://a.b/705", "rows.jsonl", row_of(705))
    ]
    assert found["https://a.b/705"] == found["doc-705"]
    assert [span.url for span in found[f"rows.jsonl:{row_of(706)}"]] == ["https://a.b/706"]


def test_values_that_are_no_names_name_nothing():
    rows = [{"id": True, "url": 1.5}, {"id": "", "url": "x" * 2001}, {"id": "\ud800", "url": b"\xff"}, {}]
    assert [parsing.own_names(row) for row in rows] == [{}] * 4
    assert parsing.own_names({"id": 7, "url": b"http://a"}) == {"id": "7", "url": "http://a"}


# ---- folders of earlier versions ----


def without_index(folder: Path) -> None:
    """Make a prepared folder as an earlier version left it."""
    manifest = {name: value for name, value in read_json(folder / "manifest.json").items() if name != "index"}
    progress = read_json(folder / "progress.json")
    progress["marks"] = [{key: mark[key] for key in mark if key != "index"} for mark in progress["marks"]]
    progress["digest"] = shards.digest_of(progress)
    write_json(folder / "progress.json", progress)
    write_json(
        folder / "manifest.json",
        shards.add_fingerprint({name: value for name, value in manifest.items() if name != "digest"}),
    )
    shutil.rmtree(folder / "index")


def test_a_folder_without_an_index_is_valid_and_gets_one_by_a_command(prepared, rows, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "tokens")
    folder, before = tmp_path / "tokens", files(prepared)
    settings = {"dataset": str(rows), "shard_tokens": 2_000}
    without_index(folder)
    old = read_json(folder / "manifest.json")
    assert old["fingerprint"] == read_json(prepared / "manifest.json")["fingerprint"]
    assert prepare(tmp_path, repair=True, **settings) == old and not (folder / "index").exists()
    shards.verify_prepared(folder, old, "hashes")
    with pytest.raises(Refusal, match=r"has no index of documents.*--prepare_only --add_index --prepared_dir"):
        DocumentIndex(folder, old)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_after(5, shards.ShardIndexer, patch)
        prepare(tmp_path, repair=True, add_index=True, prepare_only=True, **settings)
    assert read_json(folder / "manifest.json") == old
    prepare(tmp_path, repair=True, add_index=True, prepare_only=True, **settings)
    assert files(folder) == before
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")} == times
    shards.verify_prepared(folder, read_json(folder / "manifest.json"), "hashes")


def test_an_index_is_added_only_from_the_same_text(prepared, rows, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "tokens")
    without_index(tmp_path / "tokens")
    before = read_json(tmp_path / "tokens/manifest.json")
    add = {"repair": True, "add_index": True, "prepare_only": True, "shard_tokens": 2_000}
    other = tmp_path / "rows.jsonl"
    other.write_text(rows.read_text().replace("Document 900", "Document 009"))
    with pytest.raises(Refusal, match=r"--add_index needs the text .* has changed since"):
        prepare(tmp_path, dataset=str(other), **add)
    monkeypatch.setattr(content_digest, "content", lambda *_, **__: before["recipe"]["content"])
    with pytest.raises(Refusal, match=r"the text now gives other tokens than train-\d+\.npy .*stays as it is"):
        prepare(tmp_path, dataset=str(other), **add)
    assert read_json(tmp_path / "tokens/manifest.json") == before
    shards.verify_prepared(tmp_path / "tokens", before, "hashes")


def test_a_begun_folder_of_an_earlier_version_goes_on_without_an_index(prepared, rows, tmp_path):
    shutil.copytree(prepared, tmp_path / "tokens")
    folder = tmp_path / "tokens"
    without_index(folder)
    (folder / "manifest.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    manifest = prepare(tmp_path, dataset=str(rows), shard_tokens=2_000)
    assert "index" not in manifest and not (folder / "index").exists()
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")} == times
