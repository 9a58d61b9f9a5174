"""Token shards: the right ids, the same bytes for any number of workers and after any interruption, damage named."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import HARD, ROOT, data_args, flip, jsonl, prepare

from llama_lite import digests, files
from llama_lite.data import cutting, given_text, local_files, preparation, recipes, shards
from llama_lite.data.tokenizer import gpt2_tokenizer
from llama_lite.errors import Refusal
from llama_lite.files import FolderLock, read_json, write_json


def stream(folder: Path) -> np.ndarray:
    manifest = read_json(folder / "manifest.json")
    return np.concatenate(
        [np.load(folder / s["name"]) for split in ("validation", "train") for s in manifest["splits"][split]["shards"]]
    )


def digest(folder: Path) -> dict:
    return {path.name: digests.sha256(path) for path in folder.glob("*.npy")} | {
        "manifest": digests.sha256(folder / "manifest.json")
    }


def test_end_of_text_stands_before_each_document_and_nowhere_else(tmp_path):
    source = jsonl(tmp_path / "hard.jsonl", [*HARD, *(f"Document number {i} is about {i * i}." for i in range(1500))])
    manifest = prepare(tmp_path, dataset=str(source), tokenizer="gpt2", prepare_workers=2)
    ids = stream(tmp_path / "tokens")
    assert ids.dtype == np.uint16 and ids[0] == 50256
    assert int((ids == 50256).sum()) == manifest["documents"] == 1505
    assert manifest["slow_documents"] == 1  # the million blanks
    text = gpt2_tokenizer().decode(ids[ids != 50256])
    assert "says <|endoftext|> in the middle" in text


SPELT = [
    "It ends with <|endoftext|>, twice: <|endoftext|>.",
    "<|im_start|>user",
    "<|im_start|>user <|endoftext|>",
    "Nothing | special <|>.",
    "</s>",
]


def with_chat_markers(folder: Path) -> str:
    from tokenizers import AddedToken

    tokenizer = gpt2_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True)])
    tokenizer.save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


def unigram(folder: Path) -> str:
    """A vocabulary of pieces, among them `</s>`, as SentencePiece makes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*SPELT, Path(__file__).read_text()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(
        folder / "tokenizer"
    )
    return str(folder / "tokenizer")


@pytest.mark.parametrize(
    ("tokenizer", "spelled", "as_ids", "said"),
    [
        (
            lambda folder: "gpt2",
            2,
            0,
            "special   2 of 305 documents spell out a special token: it is read as ordinary text",
        ),
        (lambda folder: "train", 2, 0, "special   2 of 305 documents"),
        (with_chat_markers, 3, 0, "special   3 of 305 documents"),
        (
            unigram,
            1,
            1,
            "WARNING   1 of 305 documents spell out a special token, and this tokenizer gives it the special id itself",
        ),
    ],
    ids=["gpt2", "learnt", "chat markers", "unigram"],
)
def test_documents_that_spell_out_a_special_token_are_counted_and_told(
    tokenizer, spelled, as_ids, said, tmp_path, capsys
):
    """Over several shards and parts that are taken whole or by their documents."""
    source = jsonl(tmp_path / "spelt.jsonl", [*SPELT, *(f"Document number {i} is about {i * i}." for i in range(300))])
    shape = {"vocab_size": 300, "shard_tokens": 1000, "validation_tokens": 100, "prepare_workers": 1}
    shape["tokenizer"] = tokenizer(tmp_path)
    manifest = prepare(tmp_path, dataset=str(source), **shape)
    assert (manifest["special_text_documents"], manifest["special_id_documents"], manifest["documents"]) == (
        spelled,
        as_ids,
        305,
    )
    assert capsys.readouterr().out.count(said) == 1
    ends = int((stream(tmp_path / "tokens") == manifest["tokenizer"]["end_of_text_id"]).sum())
    assert ends == 305 + as_ids
    earlier = {
        key: value
        for key, value in manifest.items()
        if key not in ("special_text_documents", "special_id_documents", "digest")
    }
    write_json(tmp_path / "tokens/manifest.json", shards.add_fingerprint(earlier))
    again = prepare(tmp_path, dataset=str(source), **shape)
    assert again["fingerprint"] == manifest["fingerprint"] and "special_text_documents" not in again


def test_a_text_without_special_tokens_has_a_count_of_none_and_no_line(tmp_path, capsys):
    source = jsonl(tmp_path / "plain.jsonl", [f"Document <|{i}|> is about endoftext." for i in range(300)])
    manifest = prepare(tmp_path, dataset=str(source), tokenizer="gpt2", validation_tokens=100, prepare_workers=1)
    assert (manifest["special_text_documents"], manifest["special_id_documents"]) == (0, 0)
    assert "special " not in capsys.readouterr().out


@pytest.fixture
def odd_text(text, tmp_path) -> Path:
    """Real text with rows that hold none here and there: first, last, alone and in a row."""
    lines = text.read_text(encoding="utf-8").splitlines()
    for place in (len(lines), len(lines), 230, 120, 119, 50, 0):
        lines.insert(place, '{"text": null}' if place % 2 else '{"text": " "}')
    path = tmp_path / "odd-text.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_bytes_depend_neither_on_the_number_of_workers_nor_on_how_files_are_cut(tmp_path, odd_text, monkeypatch):
    digests = []
    for workers, size in ((1, 1_000_000), (3, 10_000), (2, 100)):
        monkeypatch.setattr(cutting, "PART_BYTES", size)
        (tmp_path / str(workers)).mkdir()
        prepare(tmp_path / str(workers), dataset=str(odd_text), prepare_workers=workers)
        digests.append(digest(tmp_path / str(workers) / "tokens"))
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_preparation_goes_on_from_its_last_whole_shard(tmp_path, odd_text, monkeypatch, stop_after):
    text = odd_text
    monkeypatch.setattr(cutting, "PART_BYTES", 30_000)
    (tmp_path / "whole").mkdir()
    prepare(tmp_path / "whole", dataset=str(text))
    flush, calls = shards.ShardWriter._flush, []

    def dies(self):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(1)
        flush(self)

    (tmp_path / "stopped").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "_flush", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "stopped", dataset=str(text))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped" / "tokens").glob("*.npy")}
    assert len(before) == stop_after
    prepare(tmp_path / "stopped", dataset=str(text))
    assert digest(tmp_path / "stopped" / "tokens") == digest(tmp_path / "whole" / "tokens")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())  # whole shards are not made again


def test_odd_rows_are_counted_and_named_and_stop_nothing(tmp_path):
    path = tmp_path / "odd.jsonl"
    good = [json.dumps({"text": f"A good row, number {i}, with some words in it."}) for i in range(2000)]
    odd = ['{"text": null}', '{"text": ""}', '{"text": "   "}', '{"text": "\\ud800 half a pair"}']
    lines = [*good[:3], *odd, *good[3:], '{"text": null}']
    path.write_bytes(
        "\n".join(lines).encode() + b'\n{"text": "caf\xe9"}\n' + json.dumps({"text": "long " * 30_000}).encode() + b"\n"
    )
    manifest = prepare(tmp_path, dataset=str(path))
    assert manifest["documents"] == 2001
    assert {reason: entry["rows"] for reason, entry in manifest["skipped"].items()} == {
        "null text": 2,
        "empty": 2,
        "not UTF-8": 2,
    }
    assert manifest["skipped"]["null text"]["first"] == ["odd.jsonl:4", "odd.jsonl:2005"]


@pytest.mark.parametrize("damage", ["truncated", "altered", "deleted"])
def test_damaged_shards_are_named_and_repaired(tmp_path, text, damage):
    manifest = prepare(tmp_path, dataset=str(text))
    folder = tmp_path / "tokens"
    whole = digest(folder)
    shard = folder / "train-00002.npy"
    if damage == "truncated":
        os.truncate(shard, shard.stat().st_size - 10)
    elif damage == "altered":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(bytes(content))
    else:
        shard.unlink()
    with pytest.raises(Refusal, match=r"train-00002\.npy .*--prepare_only: it repairs"):
        shards.verify_prepared(folder, manifest, "hashes")
    prepare(tmp_path, repair=True, dataset=str(text))
    assert digest(folder) == whole


def test_an_altered_manifest_is_refused(tmp_path, text):
    manifest = prepare(tmp_path, dataset=str(text))
    manifest["source"]["dataset"] = "other"
    with pytest.raises(Refusal, match="its fingerprint does not match"):
        shards.verify_prepared(tmp_path / "tokens", manifest, "sizes")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 600}, "vocab_size was 512, now 600"),
        ({"tokenizer": "gpt2"}, "tokenizer was 'train', now 'gpt2'"),
        ({"shard_tokens": 10_000}, "shard_tokens was 20000, now 10000"),
        ({"min_characters": 10}, r"curation was \{\}, now \{'min_characters': 10\}"),
        ({"dataset": "installed-docs"}, r"dataset was 'text\.jsonl', now 'installed-docs'"),
    ],
)
def test_a_folder_prepared_otherwise_is_refused(tmp_path, text, changes, message):
    prepare(tmp_path, dataset=str(text))
    with pytest.raises(Refusal, match=message):
        prepare(tmp_path, **{"dataset": str(text), **changes})


def test_nothing_to_train_on_is_refused(tmp_path, text):
    with pytest.raises(Refusal, match=r"takes all .* tokens of .*nothing is left"):
        prepare(tmp_path, dataset=str(text), validation_tokens=10_000_000)
    assert (
        prepare(tmp_path, dataset=str(text))["splits"]["train"]["tokens"] > 0
    )  # what was refused leaves nothing that refuses
    with pytest.raises(Refusal, match=r"holds no text: .*null text"):
        prepare(
            tmp_path,
            dataset=str(jsonl(tmp_path / "null.jsonl", [None])),
            tokenizer="gpt2",
            prepared_dir=str(tmp_path / "other"),
        )
    with pytest.raises(Refusal, match=r"--vocab_size 5000: this text gives a vocabulary of \d+"):
        prepare(
            tmp_path,
            dataset=str(jsonl(tmp_path / "few.jsonl", ["few words"])),
            vocab_size=5000,
            prepared_dir=str(tmp_path / "third"),
        )
    assert not list((tmp_path / "third").glob("[!.]*"))


@pytest.mark.parametrize("rows", [[None] * 3, [" "], ["\\ud83d"]], ids=["null", "blank", "half a pair"])
@pytest.mark.parametrize("tokenizer", ["train", "gpt2"])
def test_a_text_without_text_is_refused_as_such(tmp_path, rows, tokenizer):
    path = tmp_path / "t.jsonl"
    path.write_text("".join('{"text": null}\n' if row is None else f'{{"text": "{row}"}}\n' for row in rows))
    reason = {None: "3 null text", " ": "1 empty"}.get(rows[0], "1 not UTF-8")
    with pytest.raises(Refusal, match=rf"^--dataset .* holds no text: {reason} \(t.jsonl:1"):
        prepare(tmp_path, dataset=str(path), tokenizer=tokenizer)


def rewrite(folder: Path, change) -> None:
    """Make a prepared folder as an earlier version would have left it."""
    manifest = read_json(folder / "manifest.json")
    change(manifest)
    files.write_json(folder / "recipe.json", manifest["recipe"])
    files.write_json(
        folder / "manifest.json",
        shards.add_fingerprint({name: value for name, value in manifest.items() if name != "digest"}),
    )


STORIES = [f"Story {i}: a dog of {i} years ran {i * i} times around the house." for i in range(300)]


def test_the_documents_of_a_file_are_those_between_its_end_of_text_tokens(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cutting, "PART_BYTES", 1000)
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES) + "\n<|endoftext|>\n")
    common = {"dataset": str(path), "validation_tokens": 1000, "shard_tokens": 3000}
    manifest = prepare(tmp_path, **common, tokenizer="gpt2", prepare_workers=2)
    ids, tokenizer = stream(tmp_path / "tokens"), gpt2_tokenizer()
    assert [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == 50256)[1:])] == [
        f"<|endoftext|>{story}" for story in STORIES
    ]
    assert manifest["documents"] == 300 and manifest["source"]["divided"] == {"separator": "<|endoftext|>", "files": 1}
    assert "1 divided into documents at '<|endoftext|>'" in capsys.readouterr().out
    whole = prepare(tmp_path, **common, document_separator="none", prepared_dir=str(tmp_path / "whole"))
    assert (
        whole["documents"] == 1
        and whole["recipe"]["document_separator"] == "none"
        and "document_separator" not in manifest["recipe"]
    )
    assert (
        prepare(tmp_path, **common, document_separator="\\nStory ", prepared_dir=str(tmp_path / "own"))["documents"]
        == 300
    )
    capsys.readouterr()
    assert prepare(tmp_path, **common, document_separator="###", prepared_dir=str(tmp_path / "none"))["documents"] == 1
    assert "no file of plain text holds '###' (--document_separator): nothing is divided" in capsys.readouterr().out
    curated = prepare(tmp_path, **common, min_characters=60, prepared_dir=str(tmp_path / "curated-tokens"))
    assert curated["documents"] == sum(len(story) >= 60 for story in STORIES) and 0 < curated["documents"] < 300
    rewrite(tmp_path / "tokens", lambda manifest: manifest["source"].pop("divided"))
    capsys.readouterr()
    prepare(tmp_path, **common, tokenizer="gpt2")
    assert (
        "was prepared before files were divided: 1 that hold '<|endoftext|>' are one document each"
        in capsys.readouterr().out
    )
    with pytest.raises(Refusal, match="document_separator was 'auto', now 'none'"):
        prepare(tmp_path, **common, tokenizer="gpt2", document_separator="none")
    with pytest.raises(Refusal, match=r"document_separator: .* empty; give a value"):
        prepare(tmp_path, **common, document_separator="")


def test_the_beginning_of_a_divided_file_goes_on_where_it_stopped_also_after_an_earlier_version(tmp_path, monkeypatch):
    """Which read it as one part, so that the positions of its shards are those of documents in that part."""
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES))
    common = {"dataset": str(path), "max_bytes": 15_000, "validation_tokens": 500, "shard_tokens": 1000}
    common["vocab_size"] = 300
    monkeypatch.setattr(cutting, "PART_BYTES", 1000)
    prepare(tmp_path, **common, prepared_dir=str(tmp_path / "whole"))
    flush, calls = shards.ShardWriter._flush, []

    def dies(self):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        flush(self)

    for version, part_bytes in (("now", 1000), ("earlier", 1_000_000)):
        folder = tmp_path / version
        with monkeypatch.context() as patch:
            calls.clear()
            patch.setattr(cutting, "PART_BYTES", part_bytes)
            patch.setattr(shards.ShardWriter, "_flush", dies)
            with pytest.raises(KeyboardInterrupt):
                prepare(tmp_path, **common, prepared_dir=str(folder))
        progress = read_json(folder / "progress.json")
        if version == "earlier":
            progress["stamp"].pop("parts", None)
            write_json(folder / "progress.json", {**progress, "digest": digests.digest_of(progress)})
        first = (folder / "validation-00000.npy").stat().st_mtime_ns
        prepare(tmp_path, **common, prepared_dir=str(folder))
        assert digest(folder) == digest(tmp_path / "whole")
        assert ((folder / "validation-00000.npy").stat().st_mtime_ns == first) == (version == "now")


def test_a_file_that_is_written_to_while_it_is_prepared_is_refused(tmp_path, text, monkeypatch):
    path = shutil.copy(text, tmp_path / "growing.jsonl")
    make = preparation.train_tokenizer

    def grows(*arguments):
        tokenizer = make(*arguments)
        with open(path, "a") as file:
            file.write('{"text": "one more line"}\n')
        return tokenizer

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "train_tokenizer", grows)
        with pytest.raises(Refusal, match=r"^growing\.jsonl changed while this command read it"):
            prepare(tmp_path, dataset=str(path))
    assert not (tmp_path / "tokens" / "manifest.json").exists()
    again = prepare(tmp_path, dataset=str(path))  # the corrected command
    assert again["documents"] == len(Path(path).read_text().splitlines())


def test_a_folder_that_was_prepared_undivided_is_repaired_so(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("<|endoftext|>".join(STORIES))
    common = {"dataset": str(path), "validation_tokens": 1000, "shard_tokens": 3000, "tokenizer": "gpt2"}
    prepare(tmp_path, **common, document_separator="none")

    def change(manifest):
        manifest["recipe"].pop("document_separator")
        manifest["source"].pop("divided", None)

    rewrite(tmp_path / "tokens", change)
    whole = stream(tmp_path / "tokens")
    (tmp_path / "tokens" / "train-00001.npy").unlink()
    assert prepare(tmp_path, repair=True, **common)["documents"] == 1 and (stream(tmp_path / "tokens") == whole).all()


def test_linked_text_is_learnt_once_and_older_tokens_of_it_are_used(tmp_path, text, monkeypatch, capsys):
    """Earlier versions read a file once for each of its names; what they prepared fits that text, and no other."""
    folder = tmp_path / "text"
    folder.mkdir()
    shutil.copy(text, folder / "mine.jsonl")
    (folder / "again.jsonl").symlink_to("mine.jsonl")
    once = prepare(tmp_path, dataset=str(text), prepared_dir=str(tmp_path / "once"))["documents"]
    assert prepare(tmp_path, dataset=str(folder), prepared_dir=str(tmp_path / "linked"))["documents"] == once
    with monkeypatch.context() as earlier:
        earlier.setattr(local_files, "_other_names", lambda files: set())
        twice = prepare(tmp_path, dataset=str(folder))["documents"]
    assert prepare(tmp_path, dataset=str(folder))["documents"] == twice == 2 * once
    assert "read linked files once for each of their names: delete it to prepare it again" in capsys.readouterr().out
    jsonl(folder / "new.jsonl", ["Other words, which nobody has prepared."])
    with pytest.raises(Refusal, match=r"has changed since .* was prepared"):
        prepare(tmp_path, dataset=str(folder))
    (tmp_path / "other").mkdir()
    jsonl(tmp_path / "other" / "new.jsonl", ["Other words, which nobody has prepared."])
    with pytest.raises(Refusal, match=rf"was prepared from another text: {folder.name}, not .*other"):
        prepare(tmp_path, dataset=str(tmp_path / "other"))


def test_a_file_is_divided_at_its_tokenizers_own_end_of_text(tmp_path):
    tokenizer = gpt2_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.save_pretrained(tmp_path / "other")
    path = tmp_path / "stories.txt"
    path.write_text("</s>".join(STORIES) + "<|endoftext|>")
    manifest = prepare(
        tmp_path, dataset=str(path), validation_tokens=1000, tokenizer=str(tmp_path / "other"), min_characters=1
    )
    assert manifest["documents"] == 300 and int((stream(tmp_path / "tokens") == tokenizer.eos_token_id).sum()) == 300


def test_a_tokenizer_folder_of_the_same_name_with_other_content_is_refused(tmp_path, text, monkeypatch):
    from llama_lite.data.tokenizer import train_tokenizer

    def learn(size):
        train_tokenizer(iter([STORIES[0] + " abc " * 30] * 3), size).save_pretrained(tmp_path / "mine")

    learn(280)
    common = {"dataset": str(text), "tokenizer": str(tmp_path / "mine")}
    prepare(tmp_path, **common)
    assert prepare(tmp_path, **common)["tokenizer"]["vocab_size"] == 280
    first = recipes.default_folder(*data_args(tmp_path, **common)[:2], "content")
    learn(270)
    assert recipes.default_folder(*data_args(tmp_path, **common)[:2], "content") != first
    for record in (True, False):
        if not record:
            rewrite(tmp_path / "tokens", lambda manifest: manifest["recipe"].pop("tokenizer_record"))
        with pytest.raises(
            Refusal,
            match=r"prepared with other settings: tokenizer_record was .*'vocab_size': 280.*, now .*'vocab_size': 270",
        ):
            prepare(tmp_path, **common)


def test_a_text_of_the_same_name_and_size_with_other_content_is_refused(tmp_path, text):
    path = tmp_path / "t.jsonl"
    path.write_text(text.read_text())
    times = os.stat(path)
    prepare(tmp_path, dataset=str(path))
    path.write_text(text.read_text().replace("e", "a"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(Refusal, match=r"t.jsonl has changed since .* was prepared"):
        prepare(tmp_path, dataset=str(path))


def test_a_tokenizer_that_truncates_is_the_one_that_is_saved(tmp_path, text):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from llama_lite.data.tokenizer import tokenizer_record, train_tokenizer

    definition = train_tokenizer(iter(["some words " * 30]), 300).backend_tokenizer
    definition.enable_truncation(16)
    PreTrainedTokenizerFast(
        tokenizer_object=definition, eos_token="<|endoftext|>", model_max_length=16
    ).save_pretrained(tmp_path / "short")
    manifest = prepare(tmp_path, dataset=str(text), tokenizer=str(tmp_path / "short"))
    assert tokenizer_record(AutoTokenizer.from_pretrained(tmp_path / "tokens" / "tokenizer")) == manifest["tokenizer"]
    assert prepare(tmp_path, dataset=str(text), tokenizer=str(tmp_path / "short")) == manifest


def test_no_text_at_all_is_refused_before_anything_is_derived_from_it(pretrain, tmp_path):
    path = tmp_path / "null.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(50)}), path)
    for argv in (["--prepare_only"], ["--dry_run"]):
        with pytest.raises(Refusal, match=r"^--dataset null.parquet holds no text: 50 null text \(null.parquet:1, "):
            pretrain(tmp_path / "run", *argv, dataset=str(path), prepared_dir=str(tmp_path / "none"), vocab_size=None)


def test_ids_above_what_uint16_holds_are_kept(tmp_path, text):
    from helpers import with_end_at

    with_end_at(70_000, tmp_path / "hole")
    manifest = prepare(tmp_path, dataset=str(text), tokenizer=str(tmp_path / "hole"))
    ids = stream(tmp_path / "tokens")
    assert ids.dtype == np.uint32 and ids[0] == 70_000 and int((ids == 70_000).sum()) == manifest["documents"]
    assert manifest["tokenizer"]["vocab_size"] == 70_001


def test_max_tokens_cuts_the_stream(tmp_path, text):
    (tmp_path / "all").mkdir()
    prepare(tmp_path / "all", dataset=str(text))
    manifest = prepare(tmp_path, dataset=str(text), max_tokens=33_333)
    assert [manifest["splits"][name]["tokens"] for name in ("validation", "train")] == [5_000, 28_333]
    assert (stream(tmp_path / "tokens") == stream(tmp_path / "all" / "tokens")[:33_333]).all()


HELD_OUT = "held out  the first rows, of {} files (to {})"


@pytest.mark.parametrize("rules", [{}, {"min_characters": 1}, {"min_characters": 60}])
def test_a_slice_that_is_not_of_all_files_of_rows_is_announced(tmp_path, capsys, rules):
    """By the files of the source, also where the text is curated."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for number, words in enumerate(("code", "short", "web")):
        text = " ".join([words] * (1 if words == "short" else 20))
        jsonl(folder / f"{number}-{words}.jsonl", [f"{text} {i}" for i in range(2_000 if words == "web" else 60)])
    small = {"dataset": str(folder), "tokenizer": "gpt2", "shard_tokens": 50_000, **rules}
    for tokens, held in ((500, ("1 of 3", "0-code.jsonl")), (2_000, None)):
        prepare(tmp_path, **small, validation_tokens=tokens, prepared_dir=str(tmp_path / f"{tokens}"))
        said = capsys.readouterr().out
        assert (HELD_OUT.format(*held) in said) if held else ("held out " not in said)
    (folder / "plain.txt").write_text("A file that is one document.")  # all files in the order of a hash
    prepare(tmp_path, **small, validation_tokens=500, prepared_dir=str(tmp_path / "hashed"))
    assert "held out " not in capsys.readouterr().out


def test_baselines_against_plain_counting(tmp_path, text):
    manifest = prepare(tmp_path, dataset=str(text))
    folder = tmp_path / "tokens"
    train = np.concatenate([np.load(p) for p in sorted(folder.glob("train-*.npy"))]).astype(int)
    held = np.load(folder / "validation-00000.npy").astype(int)
    counts = np.bincount(train[:-1], minlength=512)
    unigram = (counts + 1) / (counts.sum() + 512)
    assert manifest["baselines"]["unigram"] == pytest.approx(-np.log(unigram[held[1:]]).mean(), abs=1e-3)
    table = np.zeros((512, 512))
    np.add.at(table, (train[:-1], train[1:]), 1)
    prior = manifest["baselines"]["bigram_prior"]
    bigram = (table + prior * unigram) / (table.sum(1, keepdims=True) + prior)
    assert manifest["baselines"]["bigram"] == pytest.approx(-np.log(bigram[held[:-1], held[1:]]).mean(), abs=1e-3)


def test_two_preparations_of_one_folder(tmp_path, text):
    data, _, _ = data_args(tmp_path, dataset=str(text))
    code = (
        f"import time; from llama_lite.files import FolderLock; lock = FolderLock({data.prepared_dir!r}, 'prepare');"
        " lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        other.stdout.readline()
        with pytest.raises(Refusal, match=r"is in use by process \d+"):
            FolderLock(Path(data.prepared_dir), "prepare", patience=0.3).acquire()
    finally:
        other.kill()
        other.wait()
    shutil.rmtree(data.prepared_dir)


@pytest.mark.parametrize("end", ["finished", "killed"])
def test_a_preparation_waits_for_another_one_of_the_same_folder(tmp_path, text, monkeypatch, end):
    """What the other has made is used; where it ends without a manifest, this one prepares the folder."""
    wanted, said = prepare(tmp_path, dataset=str(text)), []
    folder, made = Path(data_args(tmp_path, dataset=str(text))[0].prepared_dir), tmp_path / "made"
    folder.rename(made)
    code = (
        "import shutil, sys; from llama_lite.files import FolderLock\n"
        f"with FolderLock({str(folder)!r}, 'prepare'):\n"
        "    print('held', flush=True); sys.stdin.readline()\n"
        f"    shutil.copytree({str(made)!r}, {str(folder)!r}, dirs_exist_ok=True, ignore=lambda *_: ['.lock'])\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)

    def print_main(message):
        said.append(message)
        other.kill() if end == "killed" else print("go", file=other.stdin, flush=True)

    monkeypatch.setattr(files, "print_main", print_main)
    calls, original = [], preparation._prepare
    monkeypatch.setattr(preparation, "_prepare", lambda *args: calls.append(args) or original(*args))
    try:
        assert other.stdout.readline() == "held\n"
        assert prepare(tmp_path, dataset=str(text)) == wanted
    finally:
        other.kill()
        other.communicate()
    (line,) = said
    assert line.startswith(f"waiting   {folder} is in use by process {other.pid} on ") and "this one waits" in line
    assert len(calls) == (end == "killed")


def test_a_signal_ends_the_waiting_for_another_preparation(tmp_path):
    code = (
        "from llama_lite.files import FolderLock; from llama_lite.processes import StopSignals\n"
        f"StopSignals(lambda: None); FolderLock({str(tmp_path)!r}, 'prepare', waits=True).acquire()\n"
    )
    with FolderLock(tmp_path, "prepare"):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        waiting = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
        try:
            assert f"in use by process {os.getpid()} on" in waiting.stdout.readline()
            time.sleep(0.5)
            assert waiting.poll() is None
            waiting.send_signal(signal.SIGINT)
            assert "Interrupted: SIGINT before the first step" in waiting.communicate(timeout=60)[1]
        finally:
            waiting.kill()
            waiting.wait()


@pytest.mark.parametrize("which", ["np.save", "os.fsync"])
def test_a_disk_that_is_full_while_text_is_prepared(tmp_path, text, monkeypatch, which):
    """The sizes are told, and the same command goes on when there is room."""

    def full(*_):
        raise OSError("16384 requested and 0 written") if which == "np.save" else OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.np if which == "np.save" else os, which.split(".")[1], full)
        with pytest.raises(
            Refusal, match=rf"no space left on the disk of {tmp_path}.*: [\d.]+ \w+ of [\d.]+ \w+ are free"
        ):
            prepare(tmp_path, dataset=str(text))
    assert prepare(tmp_path, dataset=str(text))["documents"] > 100


# ---- damage, found and repaired alike by training and by preparing ----


def everything(folder: Path) -> dict:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name[0] != "."
    }


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> Path:
    """A folder in which `tokens` is prepared of curated text; read only."""
    place = tmp_path_factory.mktemp("whole")
    prepare(place, dataset=str(text), min_characters=100)
    return place


def older(folder: Path) -> None:
    """Make a prepared folder one of an earlier version: no digests of small files, none of the progress."""
    manifest = {
        name: value for name, value in read_json(folder / "manifest.json").items() if name not in ("files", "digest")
    }
    write_json(folder / "manifest.json", shards.add_fingerprint(manifest))
    write_json(
        folder / "progress.json",
        {name: value for name, value in read_json(folder / "progress.json").items() if name not in ("stamp", "digest")},
    )


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "manifest cut": ("manifest.json", cut, "manifest.json was altered"),
    "manifest altered": ("manifest.json", flip, "manifest.json was altered"),
    "manifest of another form": ("manifest.json", lambda path: path.write_text("[1]"), "manifest.json was altered"),
    "recipe missing": ("recipe.json", Path.unlink, "recipe.json is missing"),
    "recipe cut": ("recipe.json", cut, "recipe.json was altered"),
    "recipe of another form": ("recipe.json", lambda path: path.write_text("[1]"), "recipe.json was altered"),
    "recipe altered": (
        "recipe.json",
        lambda path: path.write_text(path.read_text().replace("512", "513")),
        "recipe.json was altered",
    ),
    "tokenizer missing": ("tokenizer/tokenizer.json", Path.unlink, "tokenizer/tokenizer.json is missing"),
    "tokenizer cut": ("tokenizer/tokenizer.json", cut, "tokenizer/tokenizer.json has "),
    "tokenizer altered": (
        "tokenizer/tokenizer.json",
        lambda path: flip(path, 0.999),
        "tokenizer/tokenizer.json was altered",
    ),
    "configuration missing": (
        "tokenizer/tokenizer_config.json",
        Path.unlink,
        "tokenizer/tokenizer_config.json is missing",
    ),
    "configuration cut": ("tokenizer/tokenizer_config.json", cut, "tokenizer/tokenizer_config.json has "),
    "record of curation altered": ("curation.json", flip, "curation.json was altered"),
    "shard": ("train-00001.npy", flip, "train-00001.npy was altered"),
}
OLDER = [
    name for name in DAMAGE if "configuration missing" not in name and "curation" not in name
]  # what an older manifest can tell


@pytest.mark.parametrize("version, damage", [*(("now", name) for name in DAMAGE), *(("older", name) for name in OLDER)])
def test_damage_is_refused_by_training_and_repaired_by_preparing(whole, text, tmp_path, version, damage):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    folder, changes = tmp_path / "tokens", {"dataset": str(text), "min_characters": 100}
    if version == "older":
        older(folder)
    before = everything(folder)
    name, harm, told = DAMAGE[damage]
    harm(folder / name)
    with pytest.raises(Refusal) as refusal:
        shards.verify_prepared(folder, prepare(tmp_path, **changes), "hashes")
    told = told if version == "now" or not name.startswith("tokenizer") else "tokenizer/"
    assert told in str(refusal.value) and "--prepare_only: it repairs" in str(refusal.value)
    manifest = prepare(tmp_path, repair=True, **changes)
    assert prepare(tmp_path, **changes) == manifest and shards.verify_prepared(folder, manifest, "hashes") is None
    after = everything(folder)
    if version == "now":
        assert after == before
    else:
        assert {name: after[name] for name in after if name.endswith((".npy", "tokenizer.json"))} == {
            name: before[name] for name in before if name.endswith((".npy", "tokenizer.json"))
        }
        assert manifest["fingerprint"] == json.loads(before["manifest.json"])["fingerprint"]


def test_every_flipped_bit_of_the_records_is_found(whole, tmp_path):
    """Of the manifest's values: a bit that only changes how a value is written changes nothing."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "tokens"
    for name, read in (("manifest.json", shards.read_manifest), ("progress.json", shards.read_progress)):
        content, value = (folder / name).read_bytes(), read(folder)
        assert value
        for place in range(0, 8 * len(content), 97):
            altered = bytearray(content)
            altered[place // 8] ^= 1 << place % 8
            (folder / name).write_bytes(bytes(altered))
            found = read(folder)
            assert not found or json.loads(bytes(altered)) == value, (name, place)
        (folder / name).write_bytes(content)


def test_what_is_beyond_repair_is_said(whole, text, tmp_path):
    for name in "abcd":
        shutil.copytree(whole, tmp_path / name)
    changes = {"dataset": str(text), "min_characters": 100}
    for name in ("manifest.json", "recipe.json"):
        cut(tmp_path / "a" / "tokens" / name)
    with pytest.raises(Refusal, match=r"cannot be repaired: manifest\.json and recipe\.json were both altered"):
        prepare(tmp_path / "a", repair=True, **changes, vocab_size=300)
    assert prepare(tmp_path / "a", repair=True, **changes) == read_json(
        whole / "tokens" / "manifest.json"
    )  # exactly what it was made from
    flip(tmp_path / "b" / "tokens" / "train-00001.npy")
    gone = (
        r"are damaged \(train-00001.npy was altered .*\) and cannot be repaired without the text .*nowhere.jsonl:"
        r" no file or folder has that name"
    )
    with pytest.raises(Refusal, match=gone):
        prepare(tmp_path / "b", repair=True, dataset=str(tmp_path / "nowhere.jsonl"), min_characters=100)
    other = jsonl(
        tmp_path / "other.jsonl",
        ["Another text, which is long enough to be kept by the rule for characters, and not the one. " * 9] * 300,
    )
    with pytest.raises(Refusal, match=r"cannot be repaired without the text .*was prepared from another text"):
        prepare(tmp_path / "b", repair=True, dataset=str(other), min_characters=100)
    manifest = read_json(tmp_path / "c" / "tokens" / "manifest.json")
    write_json(
        tmp_path / "c" / "tokens" / "manifest.json",
        shards.add_fingerprint({**manifest, "tokenizer": {**manifest["tokenizer"], "sha256": "0" * 64}}),
    )
    (tmp_path / "c" / "tokens" / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(Refusal, match=r"cannot be repaired: the tokenizer is now a different one"):
        prepare(tmp_path / "c", repair=True, **changes)
    (tmp_path / "d" / "tokens" / "recipe.json").unlink()  # the manifest holds it: no text is needed
    data, rules, claimed = data_args(tmp_path / "d", dataset=str(tmp_path / "nowhere.jsonl"), min_characters=100)
    assert (
        preparation.prepare(data, rules, given_text.Text(data), claimed - {"dataset"}, True)["fingerprint"]
        == manifest["fingerprint"]
    )
    assert read_json(tmp_path / "d" / "tokens" / "recipe.json") == manifest["recipe"]


@pytest.mark.parametrize(
    "name, harm",
    [
        ("recipe.json", "altered"),
        ("recipe.json", "cut"),
        ("tokenizer/tokenizer.json", "altered"),
        ("tokenizer/tokenizer_config.json", "cut"),
        ("progress.json", "altered"),
    ],
)
def test_damage_before_the_manifest_is_written(text, tmp_path, monkeypatch, name, harm):
    """Of a preparation that was stopped: it ends with the same bytes."""
    (tmp_path / "whole").mkdir()
    prepare(tmp_path / "whole", dataset=str(text))
    flush = shards.ShardWriter._flush

    def dies(self):
        if len(self.marks) == 2:
            raise KeyboardInterrupt
        flush(self)

    (tmp_path / "stopped").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "_flush", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "stopped", dataset=str(text))
    path = tmp_path / "stopped" / "tokens" / name
    if harm == "cut":
        cut(path)
    elif name == "progress.json":
        path.write_text(path.read_text().replace('"documents": ', '"documents": 7', 1))
    else:
        path.write_text(
            path.read_text().replace("512", "513", 1)
            if name == "recipe.json"
            else path.read_text().replace("the", "eht")
        )
    prepare(tmp_path / "stopped", dataset=str(text))
    assert digest(tmp_path / "stopped" / "tokens") == digest(tmp_path / "whole" / "tokens")


def test_prepare_only_repairs_what_a_run_refuses(pretrain, settings, text, tmp_path):
    """Through the script, which decides what nobody gave by the folder: recipe and manifest both of another form, then
    a run.
    """
    folder = tmp_path / "tokens"
    given = {"prepared_dir": str(folder), "vocab_size": None, "validation_tokens": None, "shard_tokens": 60_000}
    pretrain(tmp_path / "run", "--prepare_only", **given)
    before = everything(folder)
    for name in ("manifest.json", "recipe.json", "tokenizer/tokenizer.json"):
        cut(folder / name)
        for argv in ([], ["--dry_run"]):
            with pytest.raises(Refusal, match=r"--prepare_only: it repairs"):
                pretrain(tmp_path / "run", *argv, **given)
        pretrain(tmp_path / "run", "--prepare_only", **given)
        assert everything(folder) == before
    (folder / "tokenizer").rename(tmp_path / "elsewhere")
    (folder / "tokenizer").symlink_to(tmp_path / "elsewhere")
    cut(folder / "tokenizer/tokenizer.json")
    pretrain(tmp_path / "run", "--prepare_only", **given)
    assert everything(folder) == before and not (folder / "tokenizer").is_symlink()
