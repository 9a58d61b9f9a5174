"""From text to a prepared folder: curated once, tokenised once, each kept by what it was made from.

`data/NAME-HASH` holds tokens, `data/curated/NAME-HASH` the curated text they were made of: another vocabulary, or
another validation slice, makes other tokens of the same curated text. A command that is refused leaves nothing that
would refuse the corrected one.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from pathlib import Path

from tqdm import tqdm

from ..distributed import print_main
from ..errors import Refusal, disk_full_as_refusal
from ..files import FolderLock, read_json, write_json
from ..folder_kinds import check_folder
from . import formats, sources
from .curation import active, curate
from .formats import Skipped, skipped_lines
from .ngram_baselines import baselines
from .shards import (
    FORMAT,
    ShardWriter,
    add_fingerprint,
    altered,
    digest_of,
    file_records,
    find_damage,
    fingerprint,
    read_manifest,
    read_progress,
    read_tokenizer_record,
    tokenize,
)
from .sources import Source
from .text_facts import TextFacts, look
from .tokenizer import END_OF_TEXT, load_tokenizer, tokenizer_record, train_tokenizer, vocabulary_size

ROOT = Path("data")

DIGESTS = ROOT / ".digests.json"  # of large files, by size and time

OF_TEXT = (
    "dataset",
    "dataset_config",
    "dataset_split",
    "dataset_revision",
    "text_column",
    "encoding",
    "document_separator",
    "file_types",
    "max_bytes",
)

OF_TOKENS = ("tokenizer", "vocab_size", "shard_tokens", "validation_tokens", "max_tokens")


class Text:
    """The text that a command names, looked at when it is first needed (rank 0). `data`: DataArguments."""

    def __init__(self, data):
        self.data, self.digest = data, None

    @functools.cached_property
    def source(self) -> Source:
        """Its files; says how many of which endings are read. Raises Refusal."""
        data = self.data
        where = (data.dataset, data.dataset_config, data.dataset_split, data.dataset_revision)
        found = sources.resolve(
            *where, data.text_column, data.encoding, data.file_types, data.max_bytes, separator=self.separator
        )
        print_main(f"text      {sources.inventory(found)}")
        none_holds_it = found.record.get("divided", {"files": 0})["files"] == 0 and "endings" in found.record
        if data.document_separator != "auto" and self.separator is not None and none_holds_it:
            print_main(
                f"text      no file of plain text holds {self.separator!r} (--document_separator): nothing is divided"
            )
        return found

    @functools.cached_property
    def separator(self) -> str | None:
        """What divides a file of plain text into documents: what somebody asked for, else the tokenizer's end-of-text;
        None for nothing. Raises Refusal.
        """
        asked, tokenizer = self.data.document_separator, self.data.tokenizer
        if asked != "auto":
            return None if asked == "none" else asked.replace("\\n", "\n").replace("\\t", "\t")
        if tokenizer in (None, "train", "gpt2"):
            return END_OF_TEXT
        prepared = Path(self.data.prepared_dir or "", "tokenizer")
        return load_tokenizer(str(prepared) if (prepared / "tokenizer.json").exists() else tokenizer).eos_token

    def undivided(self) -> None:
        """Read every file of plain text as one document, as earlier versions did."""
        self.source = dataclasses.replace(
            self.source, files=tuple(dataclasses.replace(file, separator=None) for file in self.source.files)
        )

    def every_name(self) -> None:
        """Read a file that has several names (links) once for each of them, as earlier versions did."""
        self.source, self.digest = dataclasses.replace(self.source, files=self.source.names), None
        if self.data.max_bytes is not None:
            self.source = sources.cut(self.source, self.data.max_bytes)

    def cut(self, max_bytes: int) -> None:
        """Read no more than the first files of so many bytes."""
        self.source = sources.cut(self.source, max_bytes)
        self.__dict__.pop("facts", None)

    @functools.cached_property
    def facts(self) -> TextFacts:
        """How much of it there is, by a sample."""
        return look(self.source)

    @property
    def content(self) -> str:
        """What tells it from any other text: `sources.content`."""
        if self.digest is None:
            self.digest = sources.content(self.source, DIGESTS, trust=not self._hashes)
        return self.digest

    @property
    def _hashes(self) -> bool:
        """Whether every byte is hashed again, whatever sizes and times say."""
        return self.data.verify_data == "hashes"

    @property
    def has_content(self) -> bool:
        """Whether `content` is to be had without reading more than CACHE_ABOVE bytes."""
        return self.source.bytes <= sources.CACHE_ABOVE or (
            not self._hashes and sources.has_digests(self.source, DIGESTS)
        )

    @property
    def is_local(self) -> bool:
        """Whether it lies in files of this machine, which can change under the same name."""
        return os.path.exists(os.path.expanduser(self.data.dataset)) or any(c in self.data.dataset for c in "*?[")


def name_of(path: str) -> str:
    """A short name of a dataset, model or folder, fit for a folder's name: `../My text/` -> `My-text`."""
    base = os.path.basename(os.path.abspath(os.path.expanduser(path)))
    for _ in range(2):  # a.jsonl.zst
        stem, suffix = os.path.splitext(base)
        base = stem if suffix.lower() in (*formats.COMPRESSED, *formats.KINDS, ".txt", ".md") else base
    return re.sub(r"[^\w.-]+", "-", base, flags=re.ASCII).strip(".-") or "text"


def recipe_of_text(data, rules: dict, content: str | None) -> dict:
    """What decides every byte of a curated text."""
    given = {key: getattr(data, key) for key in OF_TEXT}
    if data.document_separator == "auto":
        del given["document_separator"]  # it follows from the tokenizer, and older recipes do not say it
    recipe = given | {"content": content, "curation": active(rules)}
    if active(rules).get("min_score") is not None:
        recipe["curation"]["score_column"] = rules["score_column"]
    if os.path.exists(os.path.expanduser(data.dataset)):
        recipe["dataset"] = Path(data.dataset).name
    return recipe


def build_recipe(data, rules: dict, content: str | None) -> dict:
    """What decides every byte of a prepared folder."""
    recipe = recipe_of_text(data, rules, content) | {key: getattr(data, key) for key in OF_TOKENS}
    if data.tokenizer not in (None, "train", "gpt2") and os.path.exists(os.path.expanduser(data.tokenizer)):
        recipe["tokenizer"] = Path(data.tokenizer).name
        recipe["tokenizer_record"] = tokenizer_record(
            load_tokenizer(os.path.expanduser(data.tokenizer))
        )  # other content may have the same name
    if data.tokenizer != "train":
        recipe["vocab_size"] = None
    return recipe


def default_folder(data, rules: dict, content: str, root: Path = ROOT) -> str:
    """The folder of the tokens that these arguments make, when nobody names one."""
    return str(root / f"{name_of(data.dataset)}-{_short(build_recipe(data, rules, content))}")


def _short(recipe: dict) -> str:
    return hashlib.sha256(json.dumps({**recipe, "dataset": None}, sort_keys=True).encode()).hexdigest()[:8]


def differences(there: dict, recipe: dict, claimed: set[str]) -> list[str]:
    """What of a folder's recipe is not what was asked for, one phrase each. Only what somebody `claimed` counts, and
    what a folder's recipe tells.
    """
    there = {"document_separator": "auto", **there}
    claimed = (
        claimed
        | ({"curation"} if claimed & set(recipe["curation"]) else set())
        | ({"tokenizer_record"} if "tokenizer" in claimed else set())
    )
    keys = {key for key in recipe if key in there and key in claimed}
    return [
        f"{key} was {there[key]!r}, now {recipe[key]!r}" for key in recipe if key in keys and there[key] != recipe[key]
    ]


def check_recipe(folder: Path, there: dict | None, recipe: dict, claimed) -> None:
    """Raise Refusal when a folder was prepared from other text, by other rules, or with another tokenizer than somebody
    asked for.
    """
    if there is None:
        if (folder / "manifest.json").exists():
            raise Refusal(
                f"--prepared_dir {folder} has a manifest.json but no recipe.json: it was not made by this project."
            )
        return
    if found := differences(there, recipe, set(claimed)):
        raise Refusal(
            f"--prepared_dir {folder} was prepared otherwise: {'; '.join(found)}. Choose another --prepared_dir, ask"
            " for what is there, or delete the folder to prepare it again."
        )


def check_content(folder: Path, there: dict, text: Text) -> None:
    """Raise Refusal when the files of a text are not those that a folder was prepared from. `there`: its recipe."""
    if there["content"] != text.content and text.source.names:
        text.every_name()
        if there["content"] == text.content:
            print_main(
                f"WARNING   {folder} was prepared by a version that read linked files once for each of their names:"
                " delete it to prepare it again"
            )
    if there["content"] != text.content:
        before, now = (read_manifest(folder) or {}).get("source", {}), text.source.record
        message = (
            f"{before['files']:,} files of {before['bytes']:,} bytes then, {now['files']:,} of {now['bytes']:,} now"
            if "bytes" in before
            else "then and now"
        )
        raise Refusal(
            f"the text in {text.data.dataset} is not what {folder} was prepared from ({message}; or the same size and"
            " other words). Bring it back, leave out --dataset to go on with the prepared tokens (--prepared_dir"
            f" {folder}), or begin another run: another --output_dir, without --prepared_dir."
        )


def prepare(data, rules: dict, text: Text, claimed, repair: bool = False) -> dict:
    """Make the prepared folder, or go on with it from its last whole shard; returns its manifest.

    claimed: names of the arguments that somebody gave, which a folder that is there must agree with. repair: verify
    every byte of it, and make what is damaged again, or say that it is beyond repair. Memory does not grow with the
    corpus, and the bytes do not depend on the number of workers. Raises Refusal, also for a full disk.
    """
    folder = Path(data.prepared_dir)
    check_folder("prepared_dir", folder, "prepared")
    with disk_full_as_refusal(folder):
        return _found_or_made(folder, data, rules, text, claimed, repair)


def _found_or_made(folder: Path, data, rules: dict, text: Text, claimed, repair: bool) -> dict:
    manifest, there = read_manifest(folder), _read_recipe(folder)
    problems = [] if manifest or not (folder / "manifest.json").exists() else ["manifest.json was altered"]
    if problems and not repair:
        raise altered(folder)
    if manifest:
        there = manifest.get("recipe", there)
    elif problems:
        there = _recipe_of_repair(folder, data, rules, text)
    if manifest or problems:
        problems += find_damage(folder, manifest, hashes=True) if manifest and repair else []
        lost = [
            problem for problem in problems if not problem.startswith("recipe.json ")
        ]  # the recipe is in the manifest
        if problems:
            print_main(f"repairing {folder}: {'; '.join(problems)}")
        if problems and manifest:
            write_json(folder / "recipe.json", there)
        by_content = bool((there or {}).get("content")) and (
            text.is_local or bool(lost)
        )  # the same text may lie elsewhere, or have another name
        recorded = (
            there and manifest and {"tokenizer_record": manifest["tokenizer"], **there}
        )  # which recipes of earlier versions do not hold
        check_recipe(
            folder,
            recorded or there,
            build_recipe(data, rules, None),
            set(claimed) - ({"dataset"} if by_content else set()),
        )
        if lost:
            return _repair(folder, data, rules, text, there, manifest, lost)
        if by_content and "dataset" in claimed:
            check_content(folder, there, text)
            divided = text.source.record.get("divided", {"files": 0})
            if divided["files"] and "divided" not in manifest["source"]:
                print_main(
                    f"WARNING   {folder} was prepared before files were divided: {divided['files']:,} that hold"
                    f" {divided['separator']!r} are one document each. Delete it to prepare it again."
                )
        return manifest
    recipe = build_recipe(data, rules, text.content)
    lock = FolderLock(folder, "prepare")
    lock.acquire()
    try:
        begun, progress = _read_recipe(folder), read_progress(folder)
        if begun != recipe and progress.get("marks", progress):
            if progress.get("stamp", {}).get("recipe") != digest_of(recipe):  # else recipe.json was altered since
                check_recipe(folder, begun, recipe, recipe)
        elif begun != recipe:
            _withdraw(folder)
        write_json(folder / "recipe.json", recipe)
        return _prepare(folder, data, rules, text, recipe, "vocab_size" in claimed)
    finally:
        lock.release()


def _read_recipe(folder: Path) -> dict | None:
    recipe = read_json(folder / "recipe.json")
    return recipe if isinstance(recipe, dict) else None


def _recipe_of_repair(folder: Path, data, rules: dict, text: Text) -> dict:
    """What a folder without a whole manifest was made from: its recipe.json, if that is what was written, else what is
    asked for now, if it is the same.
    """
    there, stamp = _read_recipe(folder), read_progress(folder).get("stamp")
    if there and (stamp is None or digest_of(there) == stamp["recipe"]):
        return there
    if stamp and digest_of(asked := build_recipe(data, rules, text.content)) == stamp["recipe"]:
        return asked
    raise Refusal(
        f"prepared tokens in {folder} are beyond repair: neither manifest.json nor recipe.json is what was written, so"
        " nobody can say what they were made from. Delete the folder to prepare it again, or ask for exactly what it"
        " was made from."
    )


def _repair(
    folder: Path, data, rules: dict, text: Text, recipe: dict, manifest: dict | None, problems: list[str]
) -> dict:
    """Make what is damaged again, of the same text by the same recipe; what comes out must be what was there. Raises
    Refusal where it cannot be.
    """
    lock = FolderLock(folder, "prepare")
    lock.acquire()
    try:
        try:
            if recipe.get("content"):
                check_content(folder, recipe, text)
            text.source  # noqa: B018 (raises where there is none)
            if (
                manifest and "divided" not in manifest["source"]
            ):  # made by a version that divided no file, or of a text that has none
                text.undivided()
        except Refusal as refusal:
            raise Refusal(
                f"prepared tokens in {folder} are damaged ({'; '.join(problems)}) and cannot be repaired without the"
                f" text that they were made from. {refusal} Or delete the folder, and prepare or pull it anew."
            ) from None
        if any(problem.startswith("tokenizer/") for problem in problems):
            shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        write_json(folder / "recipe.json", recipe)
        return _prepare(folder, data, rules, text, recipe, False, manifest)
    finally:
        lock.release()


def _withdraw(folder: Path) -> None:
    """Remove what was made by arguments that can never make a whole folder."""
    for name in ("recipe.json", "progress.json", "curation.json"):
        (folder / name).unlink(missing_ok=True)
    for shard in folder.glob("*.npy"):
        shard.unlink()
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)


def _prepare(
    folder: Path, data, rules: dict, text: Text, recipe: dict, exact: bool, before: dict | None = None
) -> dict:
    """Tokens of a text, from where a ShardWriter left off. before: the manifest of a folder that is repaired, whose
    tokens must come out again.
    """
    source = text.source
    if active(rules):
        source = _curated(
            Path(data.curated_dir or folder.parent / "curated"), data, rules, text, bool(data.curated_dir)
        )
        shutil.copyfile(Path(source.files[0].path).parent.parent / "curation.json", folder / "curation.json")
    known = before["tokenizer"] if before else read_progress(folder).get("stamp", {}).get("tokenizer")
    tokenizer = _tokenizer_for(folder, data, source, exact, known)
    if before and tokenizer_record(tokenizer) != known:
        raise _beyond_repair(folder, "its tokenizer comes out as another one")
    identified = tokenizer_record(
        tokenizer
    )  # before it is used: a call forgets the truncation that a tokenizer.json asks for
    began = time.monotonic()
    stamp = {"recipe": digest_of(recipe), "tokenizer": identified}
    writer = ShardWriter(
        folder, vocabulary_size(tokenizer), data.shard_tokens, data.validation_tokens, data.max_tokens, stamp
    )
    with tqdm(
        total=data.max_tokens, initial=writer.total, desc="tokenising", unit="tok", unit_scale=True, disable=None
    ) as bar:
        for batch in () if writer.full else tokenize(source, tokenizer, writer.position, data.prepare_workers):
            bar.update(writer.add(batch))
            if writer.full:
                break
    writer.finish(len(source.files))
    print_main(
        f"tokenised {writer.total:,} tokens of {writer.counts['documents']:,} documents in"
        f" {time.monotonic() - began:.0f} s"
    )
    for line in skipped_lines(writer.skipped):
        print_main(f"not read  {line}")
    if line := special_line(writer.counts):
        print_main(line)
    if not writer.total:
        _refuse_empty(folder, data, writer.skipped)
    if not writer.splits["train"]:
        _withdraw(folder)
        raise Refusal(
            f"--validation_tokens {data.validation_tokens:,} takes all {writer.total:,} tokens of {data.dataset}:"
            " nothing is left to train on. Make it smaller, leave it out, or bring more text."
        )
    manifest = {
        "format": FORMAT,
        "recipe": recipe,
        "source": source.record,
        "tokenizer": identified,
        "dtype": writer.dtype.name,
        "splits": {
            name: {
                "tokens": sum(s["tokens"] for s in shards),
                "bytes": sum(s["text_bytes"] for s in shards),
                "shards": shards,
            }
            for name, shards in writer.splits.items()
        },
        **writer.counts,
        "skipped": writer.skipped,
        "files": file_records(folder),
    }
    if before and fingerprint(manifest) != before["fingerprint"]:
        raise _beyond_repair(folder, "the text gives other tokens now")
    manifest = add_fingerprint({**manifest, "baselines": baselines(folder, manifest)})
    write_json(folder / "manifest.json", manifest)
    return manifest


def special_line(counts: dict) -> str | None:
    """What to say of documents that spell out a special token of the tokenizer; None where there are none."""
    spelled, as_ids = counts["special_text_documents"], counts["special_id_documents"]
    if as_ids:
        return (
            f"WARNING   {as_ids:,} of {counts['documents']:,} documents spell out a special token, and this tokenizer"
            " gives it the special id itself: to the model it is a real one. Take it out of the text, or choose"
            " another tokenizer."
        )
    return (
        f"special   {spelled:,} of {counts['documents']:,} documents spell out a special token: it is read as ordinary"
        " text"
        if spelled
        else None
    )


def _beyond_repair(folder: Path, why: str) -> Refusal:
    return Refusal(
        f"prepared tokens in {folder} are beyond repair: {why} (another version of a library, or another source of the"
        " tokenizer). Delete the folder to prepare it again; runs that were trained on it will not go on with it."
    )


def _refuse_empty(folder: Path, data, skipped: dict) -> None:
    _withdraw(folder)
    raise Refusal(f"--dataset {data.dataset} holds no text: {'; '.join(skipped_lines(skipped)) or 'no documents'}.")


def _curated(path: Path, data, rules: dict, text: Text, explicit: bool) -> Source:
    """The curated text of a source, made once for all that is tokenised of it."""
    recipe = recipe_of_text(data, rules, text.content)
    if data.document_separator == "auto" and any(
        file.separator not in (None, END_OF_TEXT) for file in text.source.files
    ):
        recipe["document_separator"] = text.separator  # a tokenizer's, of which curated text knows nothing else
    folder = path if explicit else path / f"{name_of(data.dataset)}-{_short(recipe)}"
    check_folder("curated_dir", folder, "curated")
    lock = FolderLock(folder, "curate into")
    lock.acquire()
    try:
        there = read_json(folder / "recipe.json")
        if there not in (None, recipe):
            found = differences(there, recipe, set(recipe)) or ["its text was another"]
            raise Refusal(
                f"--curated_dir {folder} holds another curated text: {'; '.join(found)}. Choose another, or delete it."
            )
        write_json(folder / "recipe.json", recipe)
        with disk_full_as_refusal(folder):
            return curate(text.source, rules, folder, data.prepare_workers)
    finally:
        lock.release()


def _tokenizer_for(folder: Path, data, source: Source, exact: bool, known: dict | None):
    """The tokenizer saved in the prepared folder; where there is none, or not the `known` one, it is loaded or learnt,
    and saved.

    `exact`: with as many ids as was asked for. known: its `tokenizer_record`, None where nothing was made with it yet.
    """
    from transformers import AutoTokenizer

    path = folder / "tokenizer"
    found = read_tokenizer_record(path) if (path / "tokenizer.json").exists() else None
    if found and found == (known or found):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if path.is_symlink():
        path.unlink()  # what it points to is somebody's
    shutil.rmtree(path, ignore_errors=True)
    if data.tokenizer == "train":
        skipped = Skipped()
        documents = source.documents(skipped)
        first = next(documents, None)
        if first is None:
            _refuse_empty(folder, data, skipped.reasons)
        tokenizer = train_tokenizer(
            (document.text for document in itertools.chain([first], documents)), data.vocab_size
        )
        if exact and len(tokenizer) != data.vocab_size:
            _withdraw(folder)
            raise Refusal(
                f"--vocab_size {data.vocab_size}: this text gives a vocabulary of {len(tokenizer)}. Leave it out, ask"
                " for that, or bring more text."
            )
    else:
        tokenizer = load_tokenizer(data.tokenizer)
    aside = folder / ".tokenizer.tmp"
    tokenizer.save_pretrained(aside)
    os.replace(aside, path)
    return tokenizer
