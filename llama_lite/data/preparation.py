"""From text to a prepared folder: curated once, tokenized once, each stored under a hash of its recipe.

`data/NAME-HASH` holds tokens, `data/curated/NAME-HASH` the curated text they were made from: another vocabulary, or
another validation slice, gives other tokens of the same curated text. A refused command leaves no files that would make
the corrected command fail.
"""

import functools
import itertools
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..distributed import print_main
from ..errors import Refusal, disk_full_as_refusal
from ..files import FolderLock, read_json, write_json
from ..folder_kinds import check_folder
from .curation import active, curate
from .document_index import FOLDER as INDEX_FOLDER
from .document_index import DocumentIndex
from .formats import ROW_KINDS, Skipped, skipped_lines
from .given_text import Text, check_content
from .ngram_baselines import baselines
from .recipes import build_recipe, check_recipe, differences, name_of, recipe_of_text, short_digest
from .shards import (
    FORMAT,
    ShardIndexer,
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
from .text_source import Source
from .tokenizer import END_OF_TEXT, load_tokenizer, tokenizer_record, train_tokenizer, vocabulary_size

if TYPE_CHECKING:
    from ..config.pretrain import DataArguments
    from .ray_cluster import Cluster


def prepare(data: "DataArguments", rules: dict, text: Text, explicit_args: Iterable[str], repair: bool = False) -> dict:
    """Prepare the folder, or continue after its last whole shard, and return its manifest.

    rules: CurationArguments as a dict. explicit_args: the arguments that the user gave, which must match an existing
    folder. repair: verify every byte of it, and make damaged files again. Memory does not grow with the corpus, and the
    bytes do not depend on the number of workers. While another process prepares the folder, this one waits, and then
    uses what it has made. Raises Refusal, also for a full disk.
    """
    folder = Path(data.prepared_dir)
    check_folder("prepared_dir", folder, "prepared")
    with disk_full_as_refusal(folder):
        return _find_or_make(folder, data, rules, text, explicit_args, repair)


def _find_or_make(folder: Path, data, rules: dict, text: Text, explicit_args, repair: bool) -> dict:
    """The manifest of a folder that exists (checked, and repaired where requested) or is made now."""
    manifest, recorded = read_manifest(folder), _read_recipe(folder)
    problems = [] if manifest or not (folder / "manifest.json").exists() else ["manifest.json was altered"]
    if problems and not repair:
        raise altered(folder)
    if manifest:
        recorded = manifest.get("recipe", recorded)
    elif problems:
        recorded = _recipe_of_repair(folder, data, rules, text)
    if manifest or problems:
        problems += find_damage(folder, manifest, hashes=True) if manifest and repair else []
        lost = [problem for problem in problems if not problem.startswith("recipe.json ")]  # which the manifest holds
        if problems:
            print_main(f"repairing {folder}: {'; '.join(problems)}")
        if problems and manifest:
            write_json(folder / "recipe.json", recorded)
        # Text is compared by content, because its folder may have been moved or renamed.
        by_content = bool((recorded or {}).get("content")) and (text.is_local or bool(lost))
        # Recipes of earlier versions have no tokenizer_record.
        with_tokenizer = recorded and manifest and {"tokenizer_record": manifest["tokenizer"], **recorded}
        check_recipe(
            folder,
            with_tokenizer or recorded,
            build_recipe(data, rules, None),
            set(explicit_args) - ({"dataset"} if by_content else set()),
        )
        if lost:
            return _repair(folder, data, rules, text, recorded, manifest, lost)
        if repair and data.add_index:
            return _add_index(folder, data, rules, text, recorded, manifest)
        if by_content and "dataset" in explicit_args:
            check_content(folder, recorded, text)
            divided = text.source.record.get("divided", {"files": 0})
            if divided["files"] and "divided" not in manifest["source"]:
                print_main(
                    f"WARNING   {folder} was prepared before files were divided: {divided['files']:,} that hold"
                    f" {divided['separator']!r} are one document each. Delete it to prepare it again."
                )
        return manifest
    if data.prepare_on == "ray":
        from .ray_cluster import cluster_address

        cluster_address()  # refused before anything is written
    recipe = build_recipe(data, rules, text.content)
    with FolderLock(folder, "prepare", waits=True):
        if not (folder / "manifest.json").exists():
            begun, progress = _read_recipe(folder), read_progress(folder)
            if begun != recipe and progress.get("marks", progress):
                if progress.get("stamp", {}).get("recipe") != digest_of(recipe):  # else recipe.json was altered since
                    check_recipe(folder, begun, recipe, recipe)
            elif begun != recipe:
                _withdraw(folder)
            write_json(folder / "recipe.json", recipe)
            return _prepare(folder, data, rules, text, recipe, "vocab_size" in explicit_args)
    return _find_or_make(folder, data, rules, text, explicit_args, repair)  # another process has made it meanwhile


def _read_recipe(folder: Path) -> dict | None:
    recipe = read_json(folder / "recipe.json")
    return recipe if isinstance(recipe, dict) else None


def _recipe_of_repair(folder: Path, data, rules: dict, text: Text) -> dict:
    """The recipe of a folder without a valid manifest: its recipe.json if it is unaltered, else the requested recipe if
    it is the same. Raises Refusal.
    """
    recorded, stamp = _read_recipe(folder), read_progress(folder).get("stamp")
    if recorded and (stamp is None or digest_of(recorded) == stamp["recipe"]):
        return recorded
    if stamp and digest_of(requested := build_recipe(data, rules, text.content)) == stamp["recipe"]:
        return requested
    raise Refusal(
        f"prepared tokens in {folder} cannot be repaired: manifest.json and recipe.json were both altered, so their"
        " source is not known. Delete the folder to prepare it again, or run the exact command that prepared it."
    )


def _repair(
    folder: Path, data, rules: dict, text: Text, recipe: dict, manifest: dict | None, problems: list[str]
) -> dict:
    """Make damaged files again, from the same text by the same recipe; the tokens must be the same. Raises Refusal
    where that is not possible.
    """
    with FolderLock(folder, "prepare"):
        try:
            _read_as_before(folder, text, recipe, manifest)
        except Refusal as refusal:
            raise Refusal(
                f"prepared tokens in {folder} are damaged ({'; '.join(problems)}) and cannot be repaired without the"
                f" text that they were made from. {refusal} Or delete the folder, and prepare or download it again."
            ) from None
        if any(problem.startswith("tokenizer/") for problem in problems):
            shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        write_json(folder / "recipe.json", recipe)
        return _prepare(folder, data, rules, text, recipe, False, manifest)


def _read_as_before(folder: Path, text: Text, recipe: dict, manifest: dict | None) -> None:
    """Let a text be read as it was for a folder with this recipe and manifest. Raises Refusal where it is another."""
    if recipe.get("content"):
        check_content(folder, recipe, text)
    text.source  # noqa: B018 (raises where there is none)
    # Made by a version that did not divide files, or from a text that has no separator.
    if manifest and "divided" not in manifest["source"]:
        text.undivided()


def _add_index(folder: Path, data, rules: dict, text: Text, recipe: dict, manifest: dict) -> dict:
    """Write the index of documents of a whole folder that has none, and return its manifest, whose fingerprint stays.

    The text is read and encoded again, and compared with the tokens. Raises Refusal where it is another.
    """
    if "index" in manifest:
        print_main(f"index     {folder} has an index of its documents already")
        return manifest
    with FolderLock(folder, "prepare"):
        try:
            _read_as_before(folder, text, recipe, manifest)
        except Refusal as refusal:
            raise Refusal(f"--add_index needs the text that {folder} was made from. {refusal}") from None
        shards = {shard["name"]: shard for split in manifest["splits"].values() for shard in split["shards"]}
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
        stamp = {"recipe": digest_of(recipe), "tokenizer": manifest["tokenizer"]}
        make = functools.partial(ShardIndexer, shards=shards)
        writer = _write_shards(folder, data, _text_to_encode(folder, data, rules, text), tokenizer, stamp, make=make)
        if writer.index_records.keys() != shards.keys():
            raise Refusal(f"--add_index: the text in {data.dataset} gives fewer tokens than {folder} holds.")
        manifest = {name: value for name, value in manifest.items() if name != "digest"}
        manifest = add_fingerprint({**manifest, "index": writer.index_records})
        write_json(folder / "manifest.json", manifest)
        return manifest


def _withdraw(folder: Path) -> None:
    """Remove the files of a folder that these arguments cannot complete."""
    for name in ("recipe.json", "progress.json", "curation.json"):
        (folder / name).unlink(missing_ok=True)
    for shard in folder.glob("*.npy"):
        shard.unlink()
    for name in ("tokenizer", INDEX_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)


def _prepare(
    folder: Path, data, rules: dict, text: Text, recipe: dict, exact: bool, before: dict | None = None
) -> dict:
    """Curate and tokenize a text, from the last whole shard on, and write the manifest, which is returned.

    exact: whether --vocab_size was given. before: the manifest of a folder that is repaired, whose tokens must be
    reproduced. Raises Refusal.
    """
    if data.prepare_on == "local":
        return _prepare_on(None, folder, data, rules, text, recipe, exact, before)
    from .ray_cluster import absolute, connect

    text.source = absolute(text.source)
    with connect() as cluster:
        curated = [Path(data.curated_dir or folder.parent / "curated")] if active(rules) else []
        cluster.check([folder, *curated], text.source, bool(curated))
        return _prepare_on(cluster, folder, data, rules, text, recipe, exact, before)


def _prepare_on(
    cluster: "Cluster | None",
    folder: Path,
    data,
    rules: dict,
    text: Text,
    recipe: dict,
    exact: bool,
    before: dict | None,
) -> dict:
    """As `_prepare`, on a cluster or in processes of this machine (None)."""
    source = _text_to_encode(folder, data, rules, text, cluster)
    if active(rules):
        shutil.copyfile(Path(source.files[0].path).parent.parent / "curation.json", folder / "curation.json")
    known = before["tokenizer"] if before else read_progress(folder).get("stamp", {}).get("tokenizer")
    tokenizer = _tokenizer_for(folder, data, source, exact, known)
    if before and tokenizer_record(tokenizer) != known:
        raise _beyond_repair(folder, "the tokenizer is now a different one")
    identified = tokenizer_record(tokenizer)  # before its first call, which drops the truncation of a tokenizer.json
    stamp = {"recipe": digest_of(recipe), "tokenizer": identified}
    writer = _write_shards(folder, data, source, tokenizer, stamp, cluster)
    _check_amount(folder, data, writer)
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
        **({"index": writer.index_records} if writer.index else {}),
    }
    if before and fingerprint(manifest) != before["fingerprint"]:
        raise _beyond_repair(folder, "the text now gives different tokens")
    manifest = add_fingerprint({**manifest, "baselines": baselines(folder, manifest)})
    write_json(folder / "manifest.json", manifest)
    if line := held_out_line(folder, manifest, text.source):
        print_main(line)
    return manifest


def _text_to_encode(folder: Path, data, rules: dict, text: Text, cluster: "Cluster | None" = None) -> Source:
    """The text as it is encoded: curated, where there are rules."""
    if not active(rules):
        return text.source
    path = Path(data.curated_dir or folder.parent / "curated")
    return _curated(path.absolute() if cluster else path, data, rules, text, bool(data.curated_dir), cluster)


def _write_shards(
    folder: Path, data, source: Source, tokenizer, stamp: dict, cluster: "Cluster | None" = None, make=ShardWriter
) -> ShardWriter:
    """Tokenize a source into shards, from the last whole shard with this `stamp` on, and print what was read. make: the
    kind of writer.
    """
    start = time.monotonic()
    if any(file.separator is not None and file.limit is not None for file in source.files):
        stamp = {**stamp, "parts": 2}  # earlier versions read such a file as one part: their positions are others
    writer = make(folder, vocabulary_size(tokenizer), data.shard_tokens, data.validation_tokens, data.max_tokens, stamp)
    with tqdm(
        total=data.max_tokens, initial=writer.total, desc="tokenizing", unit="tok", unit_scale=True, disable=None
    ) as bar:
        encoded = (
            cluster.tokenize(source, tokenizer, writer.position)
            if cluster
            else tokenize(source, tokenizer, writer.position, data.prepare_workers)
        )
        for batch in () if writer.full else encoded:
            bar.update(writer.add(batch))
            if writer.full:
                break
    writer.finish(len(source.files))
    print_main(
        f"tokenized {writer.total:,} tokens of {writer.counts['documents']:,} documents in"
        f" {time.monotonic() - start:.0f} s"
    )
    for line in skipped_lines(writer.skipped):
        print_main(f"not read  {line}")
    if line := special_line(writer.counts):
        print_main(line)
    return writer


def _check_amount(folder: Path, data, writer: ShardWriter) -> None:
    """Raise Refusal where the text gave no tokens, or none to train on; the folder can then be prepared otherwise."""
    if not writer.total:
        _refuse_empty(folder, data, writer.skipped)
    if not writer.splits["train"]:
        _withdraw(folder)
        raise Refusal(
            f"--validation_tokens {data.validation_tokens:,} takes all {writer.total:,} tokens of {data.dataset}:"
            " nothing is left to train on. Make it smaller, leave it out, or add more text."
        )


def held_out_line(folder: Path, manifest: dict, source: Source) -> str | None:
    """The line about a validation slice that is of the first files of rows alone, which are read in their order; None
    where it is of all files, or where files come in the order of a hash. source: the text before curation.
    """
    held = manifest["splits"]["validation"]["tokens"]
    if not held or "index" not in manifest or any(file.kind not in ROW_KINDS for file in source.files):
        return None
    [[last]] = DocumentIndex(folder, manifest).documents("validation", [(held - 1, held)])
    names = [file.name for file in source.files]
    if last.file not in names[:-1]:
        return None
    return (
        f"held out  the first rows, of {names.index(last.file) + 1:,} of {len(names):,} files (to {last.file}): where"
        " the files are of different kinds of text, the validation loss is not of all of them. Shuffle the rows, or"
        " prepare each kind by itself (--mixture)."
    )


def special_line(counts: dict) -> str | None:
    """The line about documents that spell out a special token of the tokenizer; None where there are none."""
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
        f"prepared tokens in {folder} cannot be repaired: {why} (another version of a library, or another source of the"
        " tokenizer). Delete the folder to prepare it again; runs that were trained on it cannot be resumed with it."
    )


def _refuse_empty(folder: Path, data, skipped: dict) -> None:
    _withdraw(folder)
    raise Refusal(f"--dataset {data.dataset} holds no text: {'; '.join(skipped_lines(skipped)) or 'no documents'}.")


def _curated(path: Path, data, rules: dict, text: Text, explicit: bool, cluster: "Cluster | None") -> Source:
    """The curated text of a source, made once for all tokenizations of it. explicit: whether `path` is the folder
    itself.
    """
    recipe = recipe_of_text(data, rules, text.content)
    if data.document_separator == "auto" and any(
        file.separator not in (None, END_OF_TEXT) for file in text.source.files
    ):
        recipe["document_separator"] = text.separator  # which depends on the tokenizer
    folder = path if explicit else path / f"{name_of(data.dataset)}-{short_digest(recipe)}"
    check_folder("curated_dir", folder, "curated")
    with FolderLock(folder, "curate into", waits=True):
        recorded = read_json(folder / "recipe.json")
        if recorded not in (None, recipe):
            found = differences(recorded, recipe, set(recipe)) or ["its text was another"]
            raise Refusal(
                f"--curated_dir {folder} holds a different curated text: {'; '.join(found)}. Choose another folder, or"
                " delete this one."
            )
        write_json(folder / "recipe.json", recipe)
        with disk_full_as_refusal(folder):
            return curate(text.source, rules, folder, data.prepare_workers, cluster and cluster.run_stage)


def _tokenizer_for(folder: Path, data, source: Source, exact: bool, known: dict | None):
    """The tokenizer of the prepared folder. Where there is none, or not the `known` one, it is loaded or trained, and
    saved.

    exact: whether the vocabulary must have --vocab_size ids. known: the expected `tokenizer_record`, None where nothing
    was tokenized yet.
    """
    from transformers import AutoTokenizer

    path = folder / "tokenizer"
    found = read_tokenizer_record(path) if (path / "tokenizer.json").exists() else None
    if found and found == (known or found):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if path.is_symlink():
        path.unlink()  # not the folder that it points to
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
                f"--vocab_size {data.vocab_size}: this text gives a vocabulary of {len(tokenizer)}. Leave it out, use"
                " that size, or add more text."
            )
    else:
        tokenizer = load_tokenizer(data.tokenizer)
    temporary = folder / ".tokenizer.tmp"
    tokenizer.save_pretrained(temporary)
    os.replace(temporary, path)
    return tokenizer
