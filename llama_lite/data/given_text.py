"""The text of a command: its files, its digest, and whether it is the one that a folder was prepared from."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..distributed import print_main
from ..errors import Refusal
from ..files import read_json
from . import content_digest, sources, text_source
from .recipes import ROOT
from .shards import read_manifest
from .text_facts import TextFacts, look
from .text_source import Source
from .tokenizer import END_OF_TEXT, load_tokenizer

if TYPE_CHECKING:
    from ..config.pretrain import DataArguments

DIGESTS = ROOT / ".digests.json"  # cache of digests of large files, by size and time


class Text:
    """The text of a command, examined when it is first needed (rank 0). data: DataArguments. run: the folder of the run
    that reads it, if there is one.
    """

    def __init__(self, data: "DataArguments", run: str | None = None):
        self.data, self.run, self.digest = data, run, None

    @functools.cached_property
    def source(self) -> Source:
        """The files of the text; prints how many of which endings are read. Raises Refusal."""
        data = self.data
        options = text_source.ReadOptions(data.text_column, data.encoding, data.file_types, separator=self.separator)
        found = sources.resolve(
            data.dataset, data.dataset_config, data.dataset_split, data.dataset_revision, data.max_bytes, options
        )
        print_main(f"text      {sources.inventory(found)}")
        divided = found.record.get("divided", {"files": 0})
        never_found = divided["files"] == 0 and "endings" in found.record
        if data.document_separator != "auto" and self.separator is not None and never_found:
            # of a large text, only the beginnings of files were searched
            where, result = (" in its first 64 KiB", "") if "searched" in divided else ("", ": nothing is divided")
            print_main(
                f"text      no file of plain text holds {self.separator!r}{where} (--document_separator){result}"
            )
        return found

    @functools.cached_property
    def separator(self) -> str | None:
        """What divides a plain text file into documents: --document_separator, else the tokenizer's end-of-text; None
        for nothing. Raises Refusal.
        """
        requested, tokenizer = self.data.document_separator, self.data.tokenizer
        if requested != "auto":
            return None if requested == "none" else requested.replace("\\n", "\n").replace("\\t", "\t")
        if tokenizer in (None, "train", "gpt2"):
            return END_OF_TEXT
        prepared = Path(self.data.prepared_dir or "", "tokenizer")
        return load_tokenizer(str(prepared) if (prepared / "tokenizer.json").exists() else tokenizer).eos_token

    def undivided(self) -> None:
        """Read every plain text file as one document, as earlier versions did."""
        self.source = dataclasses.replace(
            self.source, files=tuple(dataclasses.replace(file, separator=None) for file in self.source.files)
        )

    def every_name(self) -> None:
        """Read a file that has several names (links) once for each of them, as earlier versions did."""
        self.source, self.digest = dataclasses.replace(self.source, files=self.source.names), None
        if self.data.max_bytes is not None:
            self.source = text_source.cut(self.source, self.data.max_bytes)

    def cut(self, max_bytes: int) -> None:
        """Read only the first `max_bytes` bytes of the files."""
        self.source = text_source.cut(self.source, max_bytes)
        self.__dict__.pop("facts", None)

    @functools.cached_property
    def facts(self) -> TextFacts:
        """The size of the text, estimated from a sample."""
        return look(self.source)

    @property
    def content(self) -> str:
        """The digest of the text (`content_digest.content`)."""
        if self.digest is None:
            self.digest = content_digest.content(self.source, DIGESTS, trust=not self._hashes)
        return self.digest

    @property
    def _hashes(self) -> bool:
        """Whether every byte is hashed again, whatever sizes and times are."""
        return self.data.verify_data == "hashes"

    @property
    def has_content(self) -> bool:
        """Whether `content` can be computed without reading more than CACHE_ABOVE bytes."""
        return self.source.bytes <= content_digest.CACHE_ABOVE or (
            not self._hashes and content_digest.has_digests(self.source, DIGESTS)
        )

    @property
    def is_local(self) -> bool:
        """Whether the text is in files of this machine, which can change under the same name."""
        return os.path.exists(os.path.expanduser(self.data.dataset)) or any(c in self.data.dataset for c in "*?[")


def check_content(folder: Path, recorded: dict, text: Text) -> None:
    """Raise Refusal when the files of a text are not those that a folder was prepared from. recorded: the recipe of the
    folder.
    """
    if recorded["content"] != text.content and text.source.names:
        text.every_name()
        if recorded["content"] == text.content:
            print_main(
                f"WARNING   {folder} was prepared by a version that read linked files once for each of their names:"
                " delete it to prepare it again"
            )
    if recorded["content"] != text.content:
        given, was = text.data.dataset, recorded.get("dataset")
        if was not in (None, given, Path(given).name):
            raise Refusal(
                f"{folder} was prepared from another text: {was}, not {given}. Choose another --output_dir, if it is"
                " that of a run which was trained on it; otherwise another --prepared_dir."
            )
        before, now = (read_manifest(folder) or {}).get("source", {}), text.source.record
        message = (
            f"{before['files']:,} files of {before['bytes']:,} bytes then, {now['files']:,} of {now['bytes']:,} now"
            if "bytes" in before and any(before[key] != now[key] for key in ("files", "bytes"))
            else "the same size, other content"
        )
        run = text.run and read_json(Path(text.run) / "run.json") and text.run
        ways = (
            f"go on with the tokens as they were prepared: --config {run} --output_dir {run} (in place of --config and"
            f" --dataset). Another run with the values of this one, on the text as it is: --config {run} --dataset"
            f" {given} --output_dir OTHER; it can begin with the weights: --init_from {run} --tokenizer {run}."
            if run
            else f"leave out --dataset (and a --config with it) to use the tokens in it (--prepared_dir {folder}), or"
            " give another --prepared_dir, or none, to prepare it as it is."
        )
        raise Refusal(f"the text in {given} has changed since {folder} was prepared ({message}). Restore it, or {ways}")
