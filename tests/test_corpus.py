"""Text from every kind of source, wrong input named, and curation that says what it dropped."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from llama_lite import corpus
from llama_lite.arguments import Refusal

ROWS = [
    {
        "text": f"Row {i} explains something about the number {i} in plain English words.",
        "id": str(i),
        "score": i % 5,
        "language": "en" if i % 7 else "fr",
    }
    for i in range(200)
]


def source_of(path, column="text"):
    return corpus.resolve(str(path), None, "train", None, column)


def texts_of(source, columns=()):
    skipped = corpus.Skipped()
    return [document.text for index in range(len(source.files)) for document in corpus.read(source, index, skipped, columns)]


def write(folder, kind, rows=ROWS):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=2))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == "jsonl.zst":
        path.write_bytes(zstandard.compress(lines))
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize("kind", ["parquet", "json", "jsonl", "jsonl.gz", "jsonl.zst"])
def test_each_format_gives_the_same_documents(tmp_path, kind):
    assert texts_of(source_of(write(tmp_path, kind))) == [row["text"] for row in ROWS]


def test_a_zst_file_of_several_frames_is_read_to_its_end(tmp_path):
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(json.dumps(row).encode() + b"\n") for row in ROWS))
    assert texts_of(source_of(path)) == [row["text"] for row in ROWS]


def test_folders_globs_and_txt(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"the text of {name}")
    assert texts_of(source_of(tmp_path)) == texts_of(source_of(tmp_path / "*.txt")) == ["the text of a.txt", "the text of b.txt"]


def test_installed_files_are_every_text_file_as_it_is():
    source = corpus.resolve("installed-files", None, "train", None, "text")
    documented = corpus.resolve("installed-docs", None, "train", None, "text").files
    assert set(documented) < set(source.files) and any(not name.endswith(".py") for name in source.files)
    assert [name for name in source.files if name in set(documented)] == list(documented)  # one order: what is held out of both is the same
    module = corpus.package_root("numpy") + "/linalg/__init__.py"
    library = next(name for name in source.files if name.startswith("numpy/") and name.endswith(".so"))
    chosen, skipped = corpus.Source("installed-files", ("numpy/linalg/__init__.py", library), "text", {}), corpus.Skipped()
    found = [document for index in range(2) for document in corpus.read(chosen, index, skipped)]
    assert [(d.id, d.text) for d in found] == [("numpy/linalg/__init__.py:1", Path(module).read_text())]
    assert skipped.reasons == {"no text, or too large": {"rows": 1, "first": [library]}}


def test_installed_docs_is_a_large_english_text_in_a_fixed_order():
    source = corpus.resolve("installed-docs", None, "train", None, "text")
    assert source.files == corpus.resolve("installed-docs", None, "train", None, "text").files
    assert {"python", "torch", "transformers", "scipy"} <= source.record["packages"].keys() and len(source.files) > 5000
    assert "the" in " ".join(texts_of(corpus.Source("installed-docs", ("python/json/__init__.py",), "text", {}))).split()


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz", "jsonl.zst"])
def test_a_truncated_file_is_refused_by_name(tmp_path, kind):
    path = write(tmp_path, kind)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(Refusal, match=rf"rows\.{kind} is (not a whole parquet file|damaged after row)"):
        texts_of(source_of(path))


def test_a_damaged_page_of_parquet_is_refused_by_name(tmp_path):
    path = write(tmp_path, "parquet")
    content = bytearray(path.read_bytes())
    content[40:400] = bytes(360)
    path.write_bytes(bytes(content))
    with pytest.raises(Refusal, match=r"rows\.parquet is not a whole parquet file"):
        texts_of(source_of(path))


def test_a_broken_row_is_refused_with_file_and_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "broken\n')
    with pytest.raises(Refusal, match=r"rows\.jsonl, row 2 is not JSON"):
        texts_of(source_of(path))
    path.write_text('{"text": "fine"}\n["a list"]\n')
    with pytest.raises(Refusal, match=r"row 2 is not a JSON object"):
        texts_of(source_of(path))
    path.write_text('{"text": 5}\n')
    with pytest.raises(Refusal, match=r"row 1: column 'text' holds int, not text"):
        texts_of(source_of(path))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_missing_column_is_refused_with_those_there_are(tmp_path, kind):
    with pytest.raises(Refusal, match=r"has no column 'content'; its columns are 'text', 'id', 'score', 'language'"):
        texts_of(source_of(write(tmp_path, kind), "content"))


@pytest.mark.parametrize("name", ["./nothing.jsonl", "/nowhere/at/all", "x/*.parquet", "folder"])
def test_a_dataset_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(Refusal, match=r"no \.parquet, .* file .* is there"):
        source_of(name)


def test_a_hub_that_does_not_answer_is_one_paragraph():
    with pytest.raises(Refusal, match=r"neither a local file nor a dataset that the Hub gives \(revision main\)") as refusal:
        source_of("someone/some-dataset")
    assert "\n" not in str(refusal.value)
