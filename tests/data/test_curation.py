"""Each rule drops what it says, counts it, and the outcome does not depend on workers or stops."""

import json
import os
import signal
import sys

import pytest
from helpers import ROWS, source_of, texts_of

from llama_lite import files
from llama_lite.config.pretrain import CurationArguments
from llama_lite.data import curation, sources
from llama_lite.errors import Refusal

RULES = CurationArguments().__dict__


def curated(tmp_path, rows, workers=2, **rules):
    path = tmp_path / "in"
    path.mkdir(parents=True)
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        (path / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    out = tmp_path / "out"
    kept = curation.curate(source_of(path), {**RULES, **rules}, out, workers)
    return texts_of(kept), json.loads((out / "curation.json").read_text())


def test_each_rule_on_columns_and_length(tmp_path):
    texts, report = curated(tmp_path, ROWS, min_score=3, language="en", min_characters=70)
    assert texts == [
        row["text"] for row in ROWS if row["score"] >= 3 and row["language"] == "en" and len(row["text"]) >= 70
    ]
    rules = {rule["rule"]: rule for rule in report["rules"]}
    assert list(rules) == ["language = en", "score >= 3", "at least 70 characters"]
    assert rules["language = en"]["documents_seen"] == 200 and rules["language = en"]["documents_dropped"] == 29
    assert rules["score >= 3"]["documents_seen"] == 171
    dropped = [row for row in ROWS if row["language"] == "fr"]
    assert rules["language = en"]["characters_dropped"] == sum(len(row["text"]) for row in dropped)
    assert (
        rules["language = en"]["examples"][0]["text"] == dropped[0]["text"]
        and len(rules["language = en"]["examples"]) == 3
    )
    assert report["kept"] == {"documents": len(texts), "characters": sum(map(len, texts))}


PROSE = (
    "The least squares method finds the line that lies closest to all of the measured points at once. It adds up the"
    " squares of the vertical distances and looks for the slope and the intercept that make this sum as small as it can"
    " be. Large errors count more than small ones, so that a single outlier is able to pull the whole line towards"
    " itself and spoil the fit. "
)


def test_exact_and_near_duplicates(tmp_path):
    near = PROSE.replace("a single outlier", "one single outlier")
    rows = [{"text": PROSE}, *ROWS[:9], {"text": PROSE}, {"text": near}, *ROWS[9:20]]
    texts, report = curated(tmp_path, rows, exact_dedup=True, minhash_dedup=True)
    assert sum(text in (PROSE, near) for text in texts) == 1
    dropped = {rule["rule"]: rule["documents_dropped"] for rule in report["rules"]}
    assert dropped["exact duplicates"] == 1 and dropped["near duplicates"] >= 1
    assert report["kept"]["documents"] == len(texts)


def test_web_filters_drop_web_rubbish_and_keep_prose(tmp_path):
    rubbish = [
        "buy now " * 60,
        "| | |\n" * 50,
        "lorem ipsum dolor sit amet " * 10 + "{",
        "Home\nAbout\nContact\nLogin\n" * 8,
    ]
    good = PROSE + "Nobody would call the result robust. A median of the slopes is. " * 1
    texts, report = curated(
        tmp_path,
        [{"text": text} for text in (*rubbish, good)],
        gopher_repetition=True,
        gopher_quality=True,
        c4_quality=True,
        fineweb_quality=True,
    )
    assert len(texts) == 1 and texts[0].startswith(PROSE[:60])
    assert len(report["rules"]) == 4 and sum(rule["documents_dropped"] for rule in report["rules"]) == 4


def test_curation_does_not_depend_on_workers_and_goes_on_after_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(curation, "TASK_BYTES", 2000)  # several tasks
    expected, report = curated(tmp_path / "a", ROWS, workers=1, min_score=2, exact_dedup=True)
    original = files.write_json

    def killed(path, value):
        if path.name == "00001.json" and "exact" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, value)

    monkeypatch.setattr(curation, "write_json", killed)
    with pytest.raises(Refusal, match=r"one of 2 worker processes was killed.*run the same command again"):
        curated(tmp_path / "b", ROWS, workers=3, min_score=2, exact_dedup=True)
    monkeypatch.setattr(curation, "write_json", original)
    out = tmp_path / "b" / "out"
    kept = curation.curate(source_of(tmp_path / "b" / "in"), {**RULES, "min_score": 2, "exact_dedup": True}, out, 3)
    assert texts_of(kept) == expected
    assert json.loads((out / "curation.json").read_text())["rules"] == report["rules"]


def test_a_task_that_keeps_nothing_moves_no_other(tmp_path, monkeypatch):
    """Of three tasks the second keeps no document: what a rule finds in the third one's must not be dropped from
    another's.
    """
    monkeypatch.setattr(curation, "TASK_BYTES", 100)
    long = [
        "the first text of all of them " * 4,
        "another text with other words in it " * 4,
        "a third text which comes twice " * 4,
    ]
    folder = tmp_path / "in"
    folder.mkdir()
    for name, texts in (("a", [long[0], long[2]]), ("b", ["short"] * 30), ("c", [long[1], long[2], long[1]])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = source_of(folder)
    assert len(curation.task_bounds(source)) == 4
    kept = curation.curate(
        source, {**RULES, "min_characters": 50, "exact_dedup": True, "minhash_dedup": True}, tmp_path / "out", 1
    )
    assert sorted(texts_of(kept)) == sorted(long)


def test_a_score_of_zero_is_a_score_and_what_is_none_is_counted_and_named(tmp_path, capsys):
    scores = [0, None, 3, "3", "N/A", float("nan"), -2, "3,5", [4], True, ""]
    rows = [{"text": f"row {i}", "score": score} for i, score in enumerate(scores)]
    texts, report = curated(tmp_path / "below", rows, min_score=-1)
    assert texts == ["row 0", "row 2", "row 3"]
    told = report["read"]["skipped"]["score is not a number"]
    assert told == {"rows": 4, "first": ["0.jsonl:5", "1.jsonl:3", "1.jsonl:4"]}
    assert report["rules"][0]["documents_dropped"] == 4 and report["settings"] == {"min_score": -1}
    assert "not read  4 score is not a number (0.jsonl:5, 1.jsonl:3, 1.jsonl:4 ...)" in capsys.readouterr().out
    assert curated(tmp_path / "zero", rows, min_score=0.0)[0] == ["row 0", "row 2", "row 3"]
    assert curation.active({**RULES, "min_score": 0, "min_language_score": 0.0}) == {
        "min_score": 0,
        "min_language_score": 0.0,
    }
    with pytest.raises(
        Refusal, match=r"curation received no documents: 2 score is not a number \(0.jsonl:1, 1.jsonl:1\)"
    ):
        curated(tmp_path / "none", [{"text": "a", "score": "N/A"}, {"text": "b", "score": "3,5"}], min_score=1)


def test_scores_of_an_export_are_numbers(tmp_path):
    """Decimals of parquet, which JSON does not know; numbers beyond float; and what only Python calls a number."""
    import decimal

    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "text"
    folder.mkdir()
    scores = pyarrow.array([decimal.Decimal(n) for n in (1, 3, 5)], pyarrow.decimal128(5, 2))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["one", "three", "five"], "score": scores}), folder / "a.parquet"
    )
    (folder / "b.jsonl").write_text(
        json.dumps({"text": "large", "score": 10**400}) + "\n" + json.dumps({"text": "odd", "score": "3_0"}) + "\n"
    )
    kept = curation.curate(source_of(folder), {**RULES, "min_score": 3, "score_column": "score"}, tmp_path / "out", 1)
    assert texts_of(kept) == ["three", "five", "large"]
    assert json.loads((tmp_path / "out" / "curation.json").read_text())["read"]["skipped"]["score is not a number"][
        "first"
    ] == ["b.jsonl:2"]


def test_text_without_scores_is_dropped_and_ends_nothing(tmp_path):
    source = sources.resolve("installed-docs", max_bytes=200_000)
    with pytest.raises(Refusal, match=r"curation keeps none of the \d+ documents; 'score >= 0' drops most"):
        curation.curate(source, {**RULES, "min_score": 0}, tmp_path / "out", 1)


def test_keeping_nothing_is_refused_with_the_rule_that_drops_most(tmp_path):
    with pytest.raises(Refusal, match=r"keeps none of the 200 documents; 'at least 100000 characters' drops most"):
        curated(tmp_path, ROWS, min_characters=100_000)


def test_a_rule_whose_column_is_missing(tmp_path):
    with pytest.raises(Refusal, match=r"has no column 'score'"):
        curated(tmp_path, [{"text": "words"}] * 4, min_score=1)


def test_two_kinds_of_text_share_what_is_held_out(tmp_path, monkeypatch):
    """The corpora of the study `curation`: they begin alike, and no place of which something is held out is learnt
    from, of either kind.
    """
    from benchmarks import curation_text

    for kind, size in (("curated", 300), ("raw", 700)):
        rows = [{"text": f"{kind} {i} " + "x" * size, "id": f"package/module{i // 2}.py:{i}"} for i in range(2000)]
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "--curated",
        str(tmp_path / "curated.jsonl"),
        "--raw",
        str(tmp_path / "raw.jsonl"),
        "--output",
        str(tmp_path / "out"),
    ]

    def made(*more):
        monkeypatch.setattr(sys, "argv", ["curation_text.py", *argv, *more])
        curation_text.main()

    made("--characters", "200000", "--held_out", "6000")

    def rows_of(name):
        return [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]

    held = rows_of("held-out-curated") + rows_of("held-out-raw")
    corpora = {name: rows_of(name) for name in ("curated", "raw", "half")}
    for rows in corpora.values():
        assert rows[: len(held)] == corpora["curated"][: len(held)] and sorted(map(str, rows[: len(held)])) == sorted(
            map(str, held)
        )
        assert not {row["id"].split(":")[0] for row in rows[len(held) :]} & {row["id"].split(":")[0] for row in held}
    share = {
        kind: sum(len(row["text"]) for row in corpora["half"][len(held) :] if row["text"].startswith(kind))
        for kind in ("curated", "raw")
    }
    assert abs(share["curated"] - share["raw"]) < 1500 and share["curated"] > 99_000
    with pytest.raises(SystemExit, match=r"there are only [\d,]+ characters of text, and 9,000,000 are wanted"):
        made("--characters", "9000000", "--held_out", "6000")
