"""Files of other people, read as documents: beginnings of large files, tables, encodings, notebooks."""

import gzip
import json

import pytest
import zstandard

from llama_lite.data import cutting, formats, parsing


def documents_of(path, kind, skipped=None, encoding=None, **more) -> list[str]:
    file = formats.TextFile(str(path), path.name, kind, **more)
    return [document.text for document in parsing.read(file, skipped or formats.Skipped(), encoding=encoding)]


def test_the_beginning_of_an_array_is_whole_elements(tmp_path):
    """A sample of a large file, or --max_bytes, used to be refused as an incomplete array."""
    rows = [{"text": f"row {number} é ] , }}"} for number in range(1000)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    for limit, most in ((500, 20), (path.stat().st_size, 1000), (10, 1000)):
        found = documents_of(path, "json", column="text", limit=limit)
        assert found == [row["text"] for row in rows[: len(found)]] and 0 < len(found) <= most, limit
    assert len(found) == 1000  # the first element alone is longer than that


@pytest.mark.parametrize("limit", [10, 4_000, 50_001, 123_456])
@pytest.mark.parametrize("read_bytes", [2**12, 2**20])
def test_the_beginning_of_a_divided_text_is_read_in_parts(tmp_path, monkeypatch, limit, read_bytes):
    """With --max_bytes, a file of any size used to be one part, in memory as a whole."""
    monkeypatch.setattr(cutting, "PART_BYTES", 2_000)
    monkeypatch.setattr(cutting, "READ_BYTES", read_bytes)
    path, end = tmp_path / "stories.txt", "<|endoftext|>"
    content = f"\n{end}\n".join(f"Story {number} of a dog.\nIt ran {number} times." for number in range(5000))
    path.write_text(content)
    file = formats.TextFile(str(path), path.name, "text", limit=limit, separator=end)
    beginning = content[: content.index("\n", limit) + 1]  # to the end of the line
    stories = [story for story in beginning.split(f"\n{end}\n") if story]
    assert documents_of(path, "text", limit=limit, separator=end) == stories
    raw = [part.raw for part in cutting.parts(file)]
    assert b"".join(raw).decode() == beginning and all(len(part) < 2_200 for part in raw)
    assert len(raw) >= limit // 2_200


def test_the_beginning_of_a_text_without_lines_ends_with_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, "READ_BYTES", 64)
    path = tmp_path / "words.txt"
    for tail, expected in (("y" * 70_000, "word " * 20), ("y" * 10 + " z", "word " * 20 + "y" * 10 + " ")):
        path.write_text("word " * 20 + tail)
        assert documents_of(path, "text", limit=103) == [expected]


def test_a_table_with_an_unnamed_column_is_read(tmp_path):
    """As pandas writes its index: every row used to be counted as one with too many fields."""
    path, skipped = tmp_path / "rows.csv", formats.Skipped()
    path.write_text(",text\n0,first\n1,second\n2,third,more\n")
    assert documents_of(path, "csv", skipped, column="text") == ["first", "second"]
    assert "with more fields than the heading" in str(vars(skipped))


def test_the_beginning_of_a_compressed_table_is_read(tmp_path):
    path = tmp_path / "rows.csv.zst"
    path.write_bytes(zstandard.compress(("text\n" + "".join(f"row {number}\n" for number in range(9000))).encode()))
    assert 0 < len(documents_of(path, "csv", column="text", limit=1000)) < 9000


def test_an_encoding_is_for_the_documents_that_are_not_utf_8(tmp_path):
    """One document in Latin-1 used to garble all others of its part."""
    path = tmp_path / "docs.txt"
    path.write_bytes("naïve 中文<|endoftext|>".encode() + "café".encode("latin-1") + "<|endoftext|>schön".encode())
    assert documents_of(path, "text", encoding="latin-1", separator="<|endoftext|>") == ["naïve 中文", "café", "schön"]


def test_half_a_character_of_a_notebook_costs_that_notebook_alone(tmp_path):
    path, skipped = tmp_path / "a.ipynb", formats.Skipped()
    path.write_text('{"cells": [{"cell_type": "markdown", "source": ["half \\ud83d"]}], "nbformat": 4}')
    assert documents_of(path, "notebook", skipped) == []
    assert "not UTF-8" in str(vars(skipped))


def test_a_compressed_mail_box_is_read(tmp_path):
    """It used to be read as one without a mail."""
    path = tmp_path / "mails.mbox.gz"
    mail = "From someone Thu Jan  1 00:00:00 2026\nSubject: {0}\nFrom: a@b\n\nThe text of {0}.\n\n"
    path.write_bytes(gzip.compress("".join(map(mail.format, ("one", "two"))).encode()))
    found = documents_of(path, "mbox")
    assert len(found) == 2 and "The text of one." in found[0] and "The text of two." in found[1]
