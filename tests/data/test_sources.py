"""Text from every kind of source, wrong input named, and curation that says what it dropped."""

import ast
import bz2
import csv
import dataclasses
import gzip
import json
import lzma
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from helpers import ROWS, source_of, texts_of

from llama_lite.data import (
    content_digest,
    cutting,
    formats,
    given_text,
    hub_files,
    installed,
    local_files,
    parsing,
    row_formats,
    sources,
    text_source,
)
from llama_lite.errors import Refusal

COMPRESSORS = {
    "jsonl.gz": gzip.compress,
    "jsonl.zst": zstandard.compress,
    "jsonl.bz2": bz2.compress,
    "jsonl.xz": lzma.compress,
}


def write(folder, kind, rows=ROWS):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=2))
    elif kind in ("csv", "tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind in COMPRESSORS:
        path.write_bytes(COMPRESSORS[kind](lines))
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize("kind", ["parquet", "json", "jsonl", *COMPRESSORS, "csv", "tsv"])
def test_each_format_gives_the_same_documents(tmp_path, kind):
    assert texts_of(source_of(write(tmp_path, kind))) == [row["text"] for row in ROWS]


def test_a_zst_file_of_several_frames_is_read_to_its_end(tmp_path):
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(json.dumps(row).encode() + b"\n") for row in ROWS))
    assert texts_of(source_of(path)) == [row["text"] for row in ROWS]


def test_folders_globs_and_txt(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"the text of {name}")
    expected = ["the text of a.txt", "the text of b.txt"]
    assert sorted(texts_of(source_of(tmp_path))) == sorted(texts_of(source_of(tmp_path / "*.txt"))) == expected


def test_installed_files_are_every_text_file_as_it_is():
    names, documented = (
        [file.name for file in sources.resolve(dataset).files] for dataset in ("installed-files", "installed-docs")
    )
    assert set(documented) < set(names) and any(not name.endswith(".py") for name in names)
    assert [name for name in names if name in set(documented)] == list(
        documented
    )  # one order: what is held out of both is the same
    module = installed.package_root("numpy") + "/linalg/__init__.py"
    library = next(name for name in names if name.startswith("numpy/") and name.endswith(".so"))
    skipped = formats.Skipped()
    found = [
        d
        for name in ("numpy/linalg/__init__.py", library)
        for d in parsing.read(formats.TextFile(name, name, "installed-files"), skipped)
    ]
    assert [(d.id, d.text) for d in found] == [("numpy/linalg/__init__.py:1", Path(module).read_text())]
    assert skipped.reasons == {"no text, or too large": {"rows": 1, "first": [library]}}


def test_installed_docs_is_a_large_english_text_in_a_fixed_order():
    source = sources.resolve("installed-docs")
    assert source.files == sources.resolve("installed-docs").files
    assert {"python", "torch", "transformers", "scipy"} <= source.record["packages"].keys() and len(source.files) > 5000
    module = formats.TextFile("python/json/__init__.py", "python/json/__init__.py", "installed-docs")
    found = list(parsing.read(module, formats.Skipped()))
    tree = ast.parse(Path(json.__file__).read_text())
    named = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    ]
    assert [d.text for d in found] == [ast.get_docstring(node) for node in named]


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz", "jsonl.zst"])
def test_a_truncated_file_is_refused_by_name(tmp_path, kind):
    path = write(tmp_path, kind)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(Refusal, match=rf"rows\.{kind} is (not a complete parquet file|damaged after row)"):
        texts_of(source_of(path))


def test_a_damaged_page_of_parquet_is_refused_by_name(tmp_path):
    path = write(tmp_path, "parquet")
    content = bytearray(path.read_bytes())
    content[40:400] = bytes(360)
    path.write_bytes(bytes(content))
    with pytest.raises(Refusal, match=r"rows\.parquet is not a complete parquet file"):
        texts_of(source_of(path))


def test_a_broken_row_is_refused_with_file_and_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "broken\n')
    with pytest.raises(Refusal, match=r"rows\.jsonl, row 2 is not JSON"):
        texts_of(source_of(path))
    path.write_text('{"text": "fine"}\n["a list"]\n')
    with pytest.raises(Refusal, match=r"row 2 is not a JSON object with a column 'text': fix or remove that row\.$"):
        texts_of(source_of(path))
    path.write_text('{"text": 5}\n')
    with pytest.raises(Refusal, match=r"row 1: column 'text' holds int, not text"):
        texts_of(source_of(path))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_missing_column_is_refused_with_those_there_are(tmp_path, kind):
    with pytest.raises(Refusal, match=r"has no column 'content'; its columns are 'text', 'id', 'score', 'language'"):
        texts_of(source_of(write(tmp_path, kind), "content"))


@pytest.mark.parametrize("name", ["./nothing.jsonl", "/nowhere/at/all", "x/*.parquet", "folder", "mytext"])
def test_a_dataset_that_is_not_there(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        Refusal,
        match=(
            r"--dataset .*(no file or folder has that name|holds no file that is not hidden).*Give a file, a folder, a"
            r" glob"
        ),
    ):
        source_of(name)


def test_names_beside_a_misspelt_one_are_told(tmp_path):
    (tmp_path / "mytext").mkdir()
    with pytest.raises(Refusal, match=rf"no file or folder has that name\. Nearest: {tmp_path}/mytext\. Give a file"):
        source_of(str(tmp_path / "mytxt/"))


@pytest.mark.parametrize("name", ["installed-docs", "installed-files", "owner/name", "*.txt", "."])
def test_only_what_can_be_nothing_but_a_missing_path_is_refused_at_once(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("words")
    sources.check_there(name)
    with pytest.raises(Refusal, match="no file or folder has that name"):
        sources.check_there(f"./{name}" if name[0] in "io" else "*.md")


def test_a_hub_that_does_not_answer_is_one_paragraph():
    with pytest.raises(
        Refusal, match=r"neither a local file or folder nor a dataset on the Hub \(revision main\)"
    ) as refusal:
        source_of("someone/some-dataset")
    assert "\n" not in str(refusal.value)


# ---- a folder of somebody's own ----


def fill(folder: Path, files: dict) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


PAGE = (
    "<html><head><title>t</title><script>var x = 1;</script></head><body><nav>Home |"
    " About</nav><article><h1>Rivers</h1><p>{}</p></article></body></html>"
)
LONG = (
    "The river rises in the hills and flows for a hundred miles through fields and small towns until it reaches the"
    " sea. " * 4
)


def test_every_file_that_is_text_is_a_document_and_the_rest_is_named(tmp_path):
    folder = fill(
        tmp_path / "mytext",
        {
            "notes.md": "# Notes\nof mine",
            "guide.rst": "Guide\n=====",
            "paper.tex": "\\section{One}",
            "src/main.py": "print('hello')",
            "Makefile": "all:\n\ttrue",
            "page.html": PAGE.format(LONG),
            "old.txt.gz": gzip.compress(b"packed text"),
            "settings.json": json.dumps({"indent": 2, "name": "no row of text"}, indent=2),
            "book.ipynb": json.dumps(
                {
                    "cells": [
                        {"cell_type": "markdown", "source": ["# Title\n", "words"]},
                        {"cell_type": "code", "source": "1 + 1"},
                    ]
                }
            ),
            "letter.eml": "Subject: Greetings\nContent-Type: text/plain; charset=utf-8\n\nDear reader,\nall is well.\n",
            "box.mbox": (
                "From a@b Thu Jan  1 00:00:00 2026\nSubject: One\n\nFirst mail.\n\nFrom a@b Thu Jan  1 00:00:00"
                " 2026\nSubject: Two\n\nSecond mail.\n"
            ),
            "mark.txt": "\ufeffwith a mark",
            "windows.txt": "sixteen bits".encode("utf-16"),
            "latin.txt": "caf\xe9 na\xefve".encode("latin-1"),
            "scan.pdf": b"%PDF-1.7\n\0\1",
            "photo.png": b"\x89PNG\0",
            "pack.tar.gz": gzip.compress(b"a.txt\0\0\0"),
            "empty.txt": "",
            ".git/config": "hidden",
            "node_modules/x/index.js": "passed over",
            "src/__pycache__/main.txt": "passed over",
        },
    )
    source = source_of(folder, None)
    texts = dict(zip([file.name for file in source.files if file.kind != "mbox"], [], strict=False))
    for file in source.files:
        texts[file.name] = [document.text for document in parsing.read(file, formats.Skipped())]
    assert texts == {
        "notes.md": ["# Notes\nof mine"],
        "guide.rst": ["Guide\n====="],
        "paper.tex": ["\\section{One}"],
        "src/main.py": ["print('hello')"],
        "Makefile": ["all:\n\ttrue"],
        "page.html": ["Rivers\n" + LONG.strip()],
        "old.txt.gz": ["packed text"],
        "settings.json": ['{\n  "indent": 2,\n  "name": "no row of text"\n}'],
        "book.ipynb": ["# Title\nwords\n\n1 + 1"],
        "letter.eml": ["Greetings\n\nDear reader,\nall is well."],
        "box.mbox": ["One\n\nFirst mail.", "Two\n\nSecond mail."],
        "mark.txt": ["with a mark"],
        "windows.txt": ["sixteen bits"],
    }
    line = sources.inventory(source)
    assert line.startswith("13 files") and "1 .md" in line and "1 without ending" in line
    assert [source.record["endings"][ending]["files"] for ending in (".txt", ".txt.gz")] == [2, 1]
    for told in (
        "1 .pdf (`pdftotext` makes text of them)",
        "1 .png (images",
        "1 .tar.gz (unpack them first)",
        "1 .txt (empty)",
        "1 .txt (not UTF-8, such as latin.txt: --encoding ",
    ):
        assert told in line
    assert source.record["not_read"]["files"] == 5


def test_an_encoding_is_for_files_that_are_not_utf8(tmp_path):
    folder = fill(
        tmp_path / "t",
        {
            "a.txt": "caf\xe9".encode("latin-1"),
            "b.txt": "caf\xe9".encode(),
            "c.csv": "text\ncaf\xe9\n".encode("latin-1"),
        },
    )
    assert texts_of(source_of(folder, None, encoding="latin-1")) == ["caf\xe9"] * 3
    skipped = formats.Skipped()
    assert [d.text for d in source_of(folder, None).documents(skipped)] == ["caf\xe9"] and skipped.reasons["not UTF-8"][
        "first"
    ] == ["c.csv:2"]
    with pytest.raises(Refusal, match="--encoding latin1000: Python knows no such encoding"):
        source_of(folder, None, encoding="latin1000")


def test_file_types_choose_and_an_unreadable_choice_is_refused(tmp_path):
    folder = fill(tmp_path / "t", {"a.md": "one", "b.py": "two", "c.pdf": b"%PDF\0"})
    assert (
        texts_of(source_of(folder, None, file_types=["md"]))
        == texts_of(source_of(folder, None, file_types=[".md"]))
        == ["one"]
    )
    assert "1 .py (not among --file_types)" in sources.inventory(source_of(folder, None, file_types=["md"]))
    with pytest.raises(Refusal, match=r"c\.pdf holds no text: 1 \.pdf \(`pdftotext` makes text of them\)"):
        source_of(folder / "c.pdf", None)
    with pytest.raises(Refusal, match=r"holds no text: .*1 \.pdf \(`pdftotext`"):
        source_of(folder, None, file_types=[".pdf"])


def test_what_exists_by_that_name_is_that(tmp_path):
    folder = fill(tmp_path, {"shard[12]/a.txt": "right", "shard1/a.txt": "wrong", "my data [v2].txt": "also right"})
    assert texts_of(source_of(folder / "shard[12]", None)) == ["right"]
    assert texts_of(source_of(folder / "my data [v2].txt", None)) == ["also right"]
    assert texts_of(source_of(folder / "shard[12]/*.txt", None)) == ["right"]
    assert sorted(texts_of(source_of(folder / "shard[0-9]", None))) == ["wrong"]  # a glob that means a folder
    assert sorted(texts_of(source_of(folder / "s*/*.txt", None))) == ["right", "wrong"]


def test_folders_that_a_glob_matches_beside_files_are_named(tmp_path):
    """They used to be passed over silently."""
    folder = fill(tmp_path, {"a.txt": "one", "b.txt": "two", "more/c.txt": "three", "old/d/e.txt": "four"})
    source = source_of(folder / "*", None)
    assert sorted(texts_of(source)) == ["one", "two"]
    assert (
        "; not read: 2 folder (not entered, since the glob matches files too: more, old; --dataset with the folder above"
        " reads all of it)" in sources.inventory(source)
    )
    assert source.record["not_read"]["files"] == 2
    assert sorted(texts_of(source_of(folder / "[mo]*", None))) == ["four", "three"]  # folders alone are entered
    (folder / "empty").mkdir()
    every = source_of(folder / "**", None)  # the files in folders match, too
    assert len(texts_of(every)) == 4 and "not_read" not in every.record
    (folder / "a.txt").write_bytes(b"\0")
    with pytest.raises(
        Refusal, match=r"holds no text: .*1 folder \(not entered, since the glob matches files too: more"
    ):
        source_of(folder / "[am]*", None)


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """Put files into `someone/texts` on the Hub: `on_the_hub({path: content})` returns their folder."""

    def put(files: dict) -> Path:
        folder, address = fill(tmp_path / "t", files), "hf://datasets/someone/texts@0123abc/"
        config = SimpleNamespace(name="default", data_files={"train": [address + path for path in files]})
        monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: SimpleNamespace(config=config))
        monkeypatch.setattr(hub_files, "_hub_sizes", lambda *_: {})
        monkeypatch.setattr(cutting, "open_file", lambda path: open(folder / path.removeprefix(address), "rb"))
        return folder

    return put


def test_an_encoding_is_for_files_on_the_hub_too(on_the_hub):
    on_the_hub({"a.txt": "caf\xe9".encode("latin-1"), "b.csv": "text\ncaf\xe9\n".encode("latin-1")})
    skipped = formats.Skipped()
    assert not [*sources.resolve("someone/texts").documents(skipped)] and skipped.reasons["not UTF-8"]["rows"] == 2
    options = text_source.ReadOptions(encoding="latin-1")
    assert texts_of(sources.resolve("someone/texts", options=options)) == ["caf\xe9"] * 2


def test_documents_of_files_with_equal_names_have_ids_of_their_own(on_the_hub, tmp_path, monkeypatch):
    """The files of a dataset on the Hub used to be known by their last names."""
    paths = ("de/train.jsonl", "en/train.jsonl", "train.jsonl")
    folder = on_the_hub({path: row(f"words of {path}") for path in paths})
    source = sources.resolve("someone/texts")
    found = {document.id: document.text for document in source.documents(formats.Skipped())}
    assert found == {f"{path}:1": f"words of {path}" for path in paths}
    earlier = dataclasses.replace(
        source, files=tuple(dataclasses.replace(file, name="train.jsonl") for file in source.files)
    )
    digests = {content_digest.content(of, tmp_path / "cache.json") for of in (source, earlier)}
    assert len(digests) == 1  # what earlier versions prepared is still the same text
    monkeypatch.undo()
    for path, count in ((folder, 3), (folder / "*/train.jsonl", 2), (folder / "[de]*", 2)):
        assert len({document.id for document in source_of(path).documents(formats.Skipped())}) == count


@pytest.mark.parametrize("change", ["longer", "other words", "shorter", "replaced"])
@pytest.mark.parametrize("when", ["before it is read", "while it is read"])
def test_a_file_that_changes_after_it_was_listed_is_refused(tmp_path, monkeypatch, change, when):
    """Its tokens used to be recorded with the digest of another text."""
    monkeypatch.setattr(cutting, "PART_BYTES", 1000)
    path, lines = tmp_path / "rows.jsonl", "".join(row(f"words {number}") for number in range(500))
    path.write_text(lines)
    os.utime(path, ns=(10**18, 10**18))
    documents = source_of(path).documents(formats.Skipped())
    if when == "while it is read":
        assert next(documents).text == "words 0"
    if change == "replaced":  # as editors write
        (tmp_path / "new").write_text(lines)
        (tmp_path / "new").rename(path)
    else:
        path.write_text({"longer": lines + row("more"), "other words": lines.upper(), "shorter": lines[:-20]}[change])
    with pytest.raises(Refusal, match=r"^rows.jsonl changed while this command read it: .* Run the command again when"):
        list(documents)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456789\n"


@pytest.mark.parametrize("name", ["a.txt", "rows.jsonl", "rows.jsonl.gz", "rows.parquet", "page.html", "rows.arrow"])
@pytest.mark.parametrize("as_glob", [False, True])
def test_what_stands_in_place_of_a_file_is_refused_by_name(tmp_path, name, as_glob):
    whole = {"other.txt": "real text", "lfs.md": POINTER + b"is how a pointer begins. " * 50}
    folder = fill(tmp_path / "lfs", {**whole, name: POINTER})
    with pytest.raises(
        Refusal,
        match=rf"^--dataset .*: {re.escape(name)} is a pointer to a file that Git LFS has not fetched: `git lfs pull`",
    ):
        source_of(folder / "*" if as_glob else folder, None)
    (folder / name).unlink()
    assert len(texts_of(source_of(folder, None))) == 2  # a text about pointers is one
    (folder / name).symlink_to("nowhere")
    with pytest.raises(Refusal, match=rf": {re.escape(name)} is a broken link\. Fetch the content, remove the files"):
        source_of(folder / "*" if as_glob else folder, None)
    with pytest.raises(Refusal, match=rf": {re.escape(name)} is a broken link"):
        source_of(folder / name, None)
    assert texts_of(source_of(folder, None, file_types=[".md"])) == [whole["lfs.md"].decode()]


def test_what_is_no_file_is_named_and_never_waited_for(tmp_path, monkeypatch):
    folder = fill(tmp_path / "t", {"a.txt": "one", "closed/b.txt": "two"})
    os.mkfifo(folder / "pipe.txt")
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("three")
    walk = os.scandir

    def scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return walk(path)

    monkeypatch.setattr(os, "scandir", scandir)  # the tests may run as root, who may read everything
    source = source_of(folder, None)
    assert {file.name for file in source.files} == {"a.txt", r"caf\xe9.txt"} and sorted(texts_of(source)) == [
        "one",
        "three",
    ]
    line = sources.inventory(source)
    assert "1 closed (this user may not read it)" in line and "1 .txt (a pipe, a socket or a device)" in line
    assert content_digest.content(source, tmp_path / "cache.json")
    with pytest.raises(Refusal, match=r"pipe.txt holds no text: 1 .txt \(a pipe, a socket or a device\)"):
        source_of(folder / "pipe.txt", None)


def row(text):
    return json.dumps({"text": text}) + "\n"


@pytest.mark.parametrize(
    "files, train, test",
    [
        (("train.jsonl", "test.jsonl"), {"train.jsonl"}, {"test.jsonl"}),
        (
            ("a/train-00000-of-00002.jsonl", "a/train-00001-of-00002.jsonl", "a/test-00000-of-00001.jsonl"),
            {"a/train-00000-of-00002.jsonl", "a/train-00001-of-00002.jsonl"},
            {"a/test-00000-of-00001.jsonl"},
        ),
        (
            ("train/1.jsonl", "Test/1.jsonl", "valid/1.jsonl", "LICENSE.txt"),
            {"train/1.jsonl", "LICENSE.txt"},
            {"Test/1.jsonl"},
        ),
        (("wiki.train.raw", "wiki.test.raw", "wiki.valid.raw"), {"wiki.train.raw"}, {"wiki.test.raw"}),
        (
            ("en/training.txt", "en/eval.txt", "de/training.txt", "de/eval.txt"),
            {"en/training.txt", "de/training.txt"},
            {"en/eval.txt", "de/eval.txt"},
        ),
    ],
)
@pytest.mark.parametrize("as_glob", [False, True])
def test_splits_are_told_apart(tmp_path, files, train, test, as_glob):
    folder = fill(tmp_path / "t", {name: row(name) for name in files})

    def names(split="train"):
        source = sources.resolve(str(folder / "**") if as_glob else str(folder), split=split)
        return {os.path.relpath(file.path, folder) for file in source.files}, sources.inventory(source)

    assert (
        names()[0] == train
        and "(of the split test, which --dataset_split test reads; --dataset_split all reads every file)" in names()[1]
    )
    assert names("test")[0] == test
    assert names("all")[0] == set(files)
    with pytest.raises(Refusal, match=r"--dataset_split other: .* is a local text, and its splits are test, train"):
        names("other")


@pytest.mark.parametrize(
    "files",
    [("train.py", "test.py"), ("train.txt", "notes.txt"), ("test.txt", "notes.txt"), ("train_test.txt", "test.txt")],
)
def test_what_is_not_divided_into_splits_is_read_whole(tmp_path, files):
    folder = fill(tmp_path / "t", dict.fromkeys(files, "words"))
    assert {file.name for file in source_of(folder, None).files} == set(files)
    with pytest.raises(
        Refusal, match=r"--dataset_split dev: .* is a local text, and its files are not divided into splits"
    ):
        source_of(folder, None, split="dev")


def test_a_folder_of_save_to_disk_is_its_rows(tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data, test=data.select(range(3))).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        assert texts_of(source_of(tmp_path / name, None)) == [row["text"] for row in ROWS]
    assert texts_of(source_of(tmp_path / "two", None, split="test")) == [row["text"] for row in ROWS[:3]]
    assert "2 .json (a record of `save_to_disk`)" in sources.inventory(source_of(tmp_path / "one", None))


# ---- documents within a file ----

STORIES = [f"Story {i} of a small dog.\n\nIt ran {i} times." for i in range(40)]


@pytest.mark.parametrize("part_bytes", [1, 300, 1_000_000])
@pytest.mark.parametrize("divider", ["\n{}\n", "{}", "\r\n{}\r\n"])
@pytest.mark.parametrize("last", [False, True])
def test_a_file_is_divided_at_the_end_of_text_wherever_it_is_cut(tmp_path, monkeypatch, part_bytes, divider, last):
    monkeypatch.setattr(cutting, "PART_BYTES", part_bytes)
    divider = divider.format("<|endoftext|>")
    path = tmp_path / "stories.txt"
    path.write_bytes((divider.join(STORIES) + (divider if last else "")).encode())
    source = source_of(path, None, separator="<|endoftext|>")
    skipped = formats.Skipped()
    found = list(source.documents(skipped))
    assert [document.text for document in found] == STORIES and not skipped.reasons
    assert [document.id for document in found] == [f"stories.txt:{i}" for i in range(1, 41)]
    assert "1 divided into documents at '<|endoftext|>' (--document_separator" in sources.inventory(source)
    whole = source_of(path, None)
    assert len(texts_of(whole)) == 1 and "divided" not in sources.inventory(whole)


def test_only_plain_text_is_divided_and_what_is_not_utf8_costs_one_document(tmp_path):
    end = "<|endoftext|>"
    folder = fill(
        tmp_path / "t",
        {
            "a.txt": b"one" + end.encode() + b"caf\xe9" + end.encode() + b"three",
            "b.txt": ("\ufefffour" + end + "five").encode(),
            "c.jsonl": row("six" + end),
        }
        | {
            "d.txt": ("seven" + end + "eight").encode("utf-16"),
            "e.txt.gz": gzip.compress(f"nine{end}ten".encode()),
            "f.txt": "eleven",
        },
    )
    skipped = formats.Skipped()
    found = {document.id: document.text for document in source_of(folder, None, separator=end).documents(skipped)}
    assert sorted(found.values()) == sorted(
        ["one", "three", "four", "five", "six" + end, "seven", "eight", "nine", "ten", "eleven"]
    )
    assert found["a.txt:3"] == "three" and skipped.reasons == {"not UTF-8": {"rows": 1, "first": ["a.txt:2"]}}
    assert "caf\xe9" in texts_of(source_of(folder, None, separator=end, encoding="latin-1"))


# ---- rows that are none, and columns that are two ----


def test_a_column_twice_is_refused_where_it_is_read(tmp_path):
    table = pyarrow.table(
        [pyarrow.array(["right"]), pyarrow.array(["wrong"]), pyarrow.array(["x"])], names=["text", "text", "id"]
    )
    pyarrow.parquet.write_table(table, tmp_path / "two.parquet")
    fill(tmp_path, {"two.jsonl": '{"text": "a", "text": "b"}\n', "two.csv": "text,id,text\na,1,b\n"})
    for kind in ("parquet", "jsonl", "csv"):
        with pytest.raises(Refusal, match=rf"two\.{kind} holds the column 'text' twice: rename or remove"):
            texts_of(source_of(tmp_path / f"two.{kind}", None))
    pyarrow.parquet.write_table(
        table.select([0]).append_column("id", table["id"]).append_column("id", table["id"]), tmp_path / "other.parquet"
    )
    assert texts_of(source_of(tmp_path / "other.parquet")) == ["right"]


def test_values_that_cannot_be_read_cost_their_row_and_only_where_they_are_wanted(tmp_path):
    def raw(values):
        return pyarrow.Array.from_buffers(
            pyarrow.string(), len(values), pyarrow.array(values, pyarrow.binary()).buffers()
        )

    texts = raw([b"good", b"caf\xe9", b"fine"])
    columns = {
        "text": texts,
        "when": pyarrow.array([0, 316516204800, 0], pyarrow.timestamp("s")),
        "zone": pyarrow.array([0] * 3, pyarrow.timestamp("s", "Mars/X")),
    }
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    skipped = formats.Skipped()
    assert [document.text for document in source_of(path, None).documents(skipped)] == ["good", "fine"]
    assert skipped.reasons == {"not UTF-8": {"rows": 1, "first": ["t.parquet:2"]}}
    assert texts_of(source_of(path, encoding="latin-1")) == ["good", "caf\xe9", "fine"]
    (part,) = cutting.parts(formats.TextFile(str(path), "t.parquet", "parquet"))
    values = [record["when"] for _, record in row_formats.rows(part)]
    assert isinstance(values[1], formats.Unreadable) and not isinstance(values[0], formats.Unreadable)


@pytest.mark.parametrize("kind", ["jsonl", "json", "JSONL.ZST"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_rows_with_a_byte_order_mark(tmp_path, kind, encoding):
    rows = [{"text": f"caf\xe9 {i}"} for i in range(3)]
    text = json.dumps(rows) if kind == "json" else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    raw = text.encode(encoding)
    path = fill(tmp_path, {f"t.{kind}": zstandard.compress(raw) if kind.endswith("ZST") else raw}) / f"t.{kind}"
    assert texts_of(source_of(path, None)) == [row["text"] for row in rows]


def test_what_is_wrong_with_a_file_of_json_is_its_cause(tmp_path):
    fill(
        tmp_path,
        {
            "cr.jsonl": '{"text": "a"}\r{"text": "b"}\r',
            "object.json": json.dumps({"data": [{"text": "a"}]}),
            "cut.jsonl": b"\xff\xfea",
        },
    )
    with pytest.raises(
        Refusal, match=r"cr.jsonl, row 1 is not JSON .* its rows end with carriage returns, convert them with `tr"
    ):
        texts_of(source_of(tmp_path / "cr.jsonl"))
    with pytest.raises(
        Refusal, match=r"object.json holds no text: 1 .json \(neither an array of JSON objects nor one per line\)"
    ):
        source_of(tmp_path / "object.json", None)
    with pytest.raises(Refusal, match=r"cut.jsonl begins as utf-16 and is not: fix it"):
        texts_of(source_of(tmp_path / "cut.jsonl"))


def test_rows_of_another_type_or_encoding_are_counted_and_named(tmp_path):
    lines = [
        b'{"text": "one"}',
        b'{"text": 5}',
        b'{"text": ["a"]}',
        b'{"text": "caf\xe9"}',
        b'{"text": "\\ud83d"}',
        b'{"text": "six", "note": "caf\xe9"}',
    ]
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\n".join(lines))
    skipped = formats.Skipped()
    assert [document.text for document in source_of(path).documents(skipped)] == ["one", "six"]
    assert {reason: entry["first"] for reason, entry in skipped.reasons.items()} == {
        "int instead of text": ["t.jsonl:2"],
        "list instead of text": ["t.jsonl:3"],
        "not UTF-8": ["t.jsonl:4", "t.jsonl:5"],
    }
    assert texts_of(source_of(path, encoding="latin-1")) == ["one", "caf\xe9", "six"]  # and not the whole line
    path = tmp_path / "t.json"
    path.write_bytes(b"[" + b",\n".join(lines) + b"]")
    assert texts_of(source_of(path)) == ["one", "six"] and texts_of(source_of(path, encoding="latin-1")) == [
        "one",
        "caf\xe9",
        "six",
    ]


@pytest.mark.parametrize(
    "row, column",
    [
        ({"title": "long enough title for a row", "text": "t"}, "text"),
        ({"id": "7", "content": "c", "url": "http://somewhere.example/long"}, "content"),
        ({"id": "7", "remark": "the longest of all the columns", "n": 5}, "remark"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_the_column_of_text_is_found_and_said(tmp_path, kind, row, column):
    source = source_of(write(tmp_path, kind, [row] * 3), None)
    assert [file.column for file in source.files] == [column] and texts_of(source) == [row[column]] * 3
    assert (column == "text") == ("--text_column" not in sources.inventory(source))


def test_rows_without_text_are_refused_with_their_columns(tmp_path):
    with pytest.raises(Refusal, match=r"holds no text: 1 \.jsonl \(rows without a column of text \('a'\)\)"):
        source_of(write(tmp_path, "jsonl", [{"a": 1}]), None)


def test_a_table_with_quotes_line_breaks_and_semicolons(tmp_path):
    path = fill(tmp_path, {"t.csv": '\ufeffid;text\n1;"a ""quoted"" word\nand a second line"\n2;\n3;last\n'}) / "t.csv"
    skipped = formats.Skipped()
    assert [d.text for d in source_of(path, None).documents(skipped)] == ['a "quoted" word\nand a second line', "last"]
    assert skipped.reasons["empty"]["rows"] == 1


def test_documents_come_in_an_order_that_mixes_folders_and_rows_in_theirs(tmp_path):
    folder = fill(tmp_path / "t", {f"{a}/{i}.txt": f"{a}{i}" for a in "abc" for i in range(20)})
    texts = texts_of(source_of(folder, None))
    assert sorted(texts) == sorted(f"{a}{i}" for a in "abc" for i in range(20)) and {
        text[0] for text in texts[:12]
    } == set("abc")
    rows = fill(tmp_path / "r", {f"{i}.jsonl": json.dumps({"text": str(i)}) for i in range(9)})
    assert texts_of(source_of(rows)) == [str(i) for i in range(9)]


def test_max_bytes_reads_the_first_files_and_the_last_of_them_to_there(tmp_path):
    folder = fill(
        tmp_path / "t",
        {f"{i}.jsonl": "".join(json.dumps({"text": f"{i} {j}"}) + "\n" for j in range(1000)) for i in range(3)},
    )
    size = (folder / "0.jsonl").stat().st_size
    assert len(texts_of(source_of(folder, max_bytes=10 * size))) == 3000
    assert texts_of(source_of(folder, max_bytes=size)) == [f"0 {j}" for j in range(1000)]
    words = fill(tmp_path / "w", {"one.txt": "several words " * 5000}) / "one.txt"
    (text,) = texts_of(source_of(words, None, max_bytes=1003))
    assert 1000 < len(text) < 1020 and text.endswith((" ", "words", "several"))
    assert "of these the first 1.0 KB" in sources.inventory(source_of(words, None, max_bytes=1003))
    docs = sources.resolve("installed-docs", max_bytes=2_000_000)
    assert docs.files == sources.resolve("installed-docs").files[: len(docs.files)] and 5 < len(docs.files) < 1000


def test_content_is_what_the_files_say_and_not_where_they_lie(tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache.json"
    first, second = (fill(tmp_path / name / "t", {"a.md": "one", "b/c.md": "two"}) for name in ("x", "y"))

    def content(folder):
        return content_digest.content(source_of(folder, None), cache)

    before = content(first)
    assert before == content(second) and not cache.exists()
    (second / "b/c.md").write_text("owt")
    assert content(second) != before
    (first / "d.md").write_text("three")
    assert content(first) != before
    monkeypatch.setattr(content_digest, "CACHE_ABOVE", 3)
    before = content(first)
    capsys.readouterr()
    monkeypatch.setattr(content_digest, "sha256", lambda *args: pytest.fail("hashed again"))
    assert content(first) == before
    assert "TRUSTED   3 of 3 files of text by their size and modification time" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(content_digest, "CACHE_ABOVE", 3)
    (first / "d.md").write_text("threE")
    os.utime(first / "d.md", ns=(1, 1))
    assert content(first) != before
    before, times = content(first), os.stat(first / "d.md")
    (first / "d.md").write_text("THREE")
    os.utime(first / "d.md", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content(first) == before and content_digest.content(source_of(first, None), cache, trust=False) != before


def test_a_page_gives_the_same_text_wherever_it_stands(tmp_path):
    folder = fill(tmp_path / "t", {f"{i}.html": PAGE.format(LONG) for i in range(4)})
    assert len(set(texts_of(source_of(folder, None)))) == 1


def test_quotes_that_do_not_pair_swallow_no_row(tmp_path):
    texts = [
        ('"starts with a quote {}', '"Quoted" word {}', "plain {}")[number % 3].format(number) for number in range(30)
    ]
    (tmp_path / "a.tsv").write_text("id\ttext\n" + "".join(f"{number}\t{text}\n" for number, text in enumerate(texts)))
    assert texts_of(sources.resolve(str(tmp_path / "a.tsv"))) == texts
    (tmp_path / "b.tsv").write_text('id\ttext\n1\t"two\nlines"\n2\t"a ""word"""\n')
    assert texts_of(sources.resolve(str(tmp_path / "b.tsv"))) == ["two\nlines", 'a "word"']
    for rows in ('7,"UNCLOSED quote here,1\n8,after,1\n', '7,"Quoted" word,1\n8,after,1\n'):
        (tmp_path / "c.csv").write_text("id,text,score\n6,before,1\n" + rows)
        with pytest.raises(
            Refusal, match=r"^c.csv, row 3: its quotes do not pair \(.*\); put a field that holds a quote into quotes"
        ):
            texts_of(sources.resolve(str(tmp_path / "c.csv")))


def test_rows_with_more_fields_than_the_heading_are_counted(tmp_path):
    (tmp_path / "a.csv").write_text("id,text,score\n4,whole,1\n5,too,many,fields\n6,ends with a comma,1,\n")
    skipped = formats.Skipped()
    found = list(sources.resolve(str(tmp_path / "a.csv")).documents(skipped))
    assert [document.text for document in found] == ["whole", "ends with a comma"]
    assert skipped.reasons == {"with more fields than the heading": {"rows": 1, "first": ["a.csv:3"]}}


def test_a_json_array_of_lists_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "rows.json").write_text('[{"text": "fine"}, [1, 2]]')
    with pytest.raises(
        Refusal, match=r"rows\.json, row 2 is not a JSON object with a column 'text': fix or remove that row\.$"
    ):
        texts_of(source_of(tmp_path / "rows.json"))


def test_line_breaks_of_a_separator_are_those_of_the_file(tmp_path):
    text = "one\nline\n---\ntwo\n---\nthree"
    files = {
        "a": text.encode(),
        "b": text.replace("\n", "\r\n").encode(),
        "c": text.replace("\n", "\r\n").encode("utf-16"),
    }
    for name, raw in {**files, "d": b"no such line\n"}.items():
        (tmp_path / f"{name}.txt").write_bytes(raw)
    source = sources.resolve(str(tmp_path), options=text_source.ReadOptions(separator="\n---\n"))
    found = sorted(text.replace("\r\n", "\n") for text in texts_of(source))
    assert found == sorted(3 * ["one\nline", "two", "three"] + ["no such line\n"])
    assert (
        "; 3 divided into documents at '\\n---\\n' (--document_separator; none: not divided), 1 of plain text"
        " without it;" in sources.inventory(source)
    )


def test_of_a_large_text_the_line_says_that_only_beginnings_were_searched(tmp_path, monkeypatch, capsys):
    (tmp_path / "late.txt").write_text("word " * 20_000 + "###" + "word")
    data = SimpleNamespace(
        **dict.fromkeys(("dataset_config", "dataset_revision", "text_column", "encoding", "max_bytes", "tokenizer")),
        **{"dataset": str(tmp_path), "dataset_split": "train", "file_types": [], "document_separator": "###"},
    )
    for above, said in ((2**30, "; 1 divided into documents at '###'"), (0, "'###' in its first 64 KiB (--document")):
        monkeypatch.setattr(local_files, "CACHE_ABOVE", above)
        source = given_text.Text(data).source
        assert said in (printed := capsys.readouterr().out) and "nothing is divided" not in printed
        assert len(texts_of(source)) == 2
    (tmp_path / "early.txt").write_text("one###two")
    assert "; 1 divided into documents at '###', 1 of plain text without it in their first 64 KiB" in sources.inventory(
        given_text.Text(data).source, hints=False
    )


@pytest.mark.parametrize("only_rows", [False, True])
def test_a_file_that_several_names_lead_to_is_read_once(tmp_path, only_rows):
    folder, ending = tmp_path / "text", ".jsonl" if only_rows else ".txt"
    folder.mkdir()
    for name in ("mine", "other", "../outside"):
        (folder / f"{name}{ending}").write_text(
            json.dumps({"text": f"words of {name}"}) if only_rows else f"words of {name}"
        )
    (folder / f"a-link{ending}").symlink_to(f"mine{ending}")
    os.link(folder / f"mine{ending}", folder / f"second{ending}")
    for name in ("from", "to"):
        (folder / f"{name}{ending}").symlink_to(f"../outside{ending}")
    for path in (folder, f"{folder}/*{ending}"):
        source = source_of(path, None, only_rows=only_rows)
        assert sorted(file.name for file in source.files) == [f"from{ending}", f"mine{ending}", f"other{ending}"]
        assert f"; not read: 3 {ending} (another name, by a link, of a file that is read)" in sources.inventory(source)
        if not only_rows:
            assert sorted(texts_of(source)) == ["words of ../outside", "words of mine", "words of other"]
