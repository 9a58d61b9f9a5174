"""Which documents a training step read, at which steps a document was read, and which documents hold a passage.

    python -m llama_lite trace runs/mine --step 1234              # the documents of each window of a step
    python -m llama_lite trace runs/mine --step 1200..1234        # ... or of several
    python -m llama_lite trace runs/mine --document doc-17        # every step that read a document
    python -m llama_lite trace runs/mine --text "some words ..."  # the documents that hold a text, and their steps
    python -m llama_lite trace runs/mine --spikes                 # the documents of each spike of the loss
    python -m llama_lite trace you/name@step-001000 --step 900 --prepared_hub_id you/tokens

RUN is the folder of a run of run_pretrain.py, one of its checkpoints, or a published revision. Orders, epochs and
resumes are those that its records tell. A document counts as read where a window holds a token of its text.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from ..errors import Refusal


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    made = argparse.ArgumentParser(
        "python -m llama_lite trace",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("run", metavar="RUN", help="folder of a run or a checkpoint, or owner/name@step-N")
    question = made.add_mutually_exclusive_group(required=True)
    question.add_argument("--step", metavar="N", help="a step, or a range of steps A..B")
    question.add_argument(
        "--document", nargs="+", metavar="ID", help="documents, by id, by URL, or by file and row (FILE:ROW)"
    )
    question.add_argument("--text", metavar="TEXT", help="a passage, exactly as it is in a document")
    question.add_argument("--spikes", action="store_true", help="every spike of the loss in events.jsonl")
    made.add_argument(
        "--prepared_dir", nargs="+", default=[], metavar="FOLDER", help="the prepared tokens, where they are elsewhere"
    )
    made.add_argument(
        "--prepared_hub_id",
        nargs="+",
        default=[],
        metavar="OWNER/NAME",
        help="the prepared tokens on the Hub: downloaded, into --prepared_dir or data/NAME",
    )
    made.add_argument("--limit", type=int, default=100, metavar="N", help="at most N places of --text (default: 100)")
    made.add_argument(
        "--characters", type=int, default=200, metavar="N", help="characters of a text to show (default: 200; 0: all)"
    )
    made.add_argument("--json", action="store_true", help="one JSON object per line, with all of the texts")
    return made


def main(argv: list[str]) -> None:
    """Answer one question about a run. Raises Refusal."""
    arguments = parser().parse_args(argv)
    steps = _steps(arguments.step)
    if min(arguments.limit, arguments.characters + 1) < 1:
        raise Refusal("--limit takes a number above 0, and --characters one of at least 0.")
    if arguments.text is not None and not arguments.text.strip():
        raise Refusal("--text is empty: give some words as they are in a document.")
    with contextlib.redirect_stdout(sys.stderr):  # what a download says is no answer
        trace = Trace(arguments.run, arguments.prepared_dir, arguments.prepared_hub_id)
    if steps:
        answers = trace.steps(*steps)
    elif arguments.document:
        answers = trace.documents(arguments.document)
    elif arguments.spikes:
        answers = trace.spikes()
    else:
        answers = trace.text(arguments.text, arguments.limit)
    show = functools.partial(json.dumps, ensure_ascii=False) if arguments.json else _Lines(arguments.characters)
    try:
        for answer in answers:
            print(show(answer), flush=True)
    except BrokenPipeError:  # of `trace ... | head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _steps(value: str | None) -> tuple[int, int] | None:
    """(first, last) of `N` or `A..B`. Raises Refusal."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]+)(?:\.\.([0-9]+))?", value.replace(",", ""))
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise Refusal(f"--step {value}: give a step from 1 on, such as 1234, or a range such as 1200..1234.")
    return first, last


class Trace:
    """A run and its tokens. Each answer is one JSON value.

    name: a folder or a reference of the Hub. prepared_dirs, prepared_hub_ids: where its tokens are, if not where its
    record says. Raises Refusal.
    """

    def __init__(self, name: str, prepared_dirs: list[str], prepared_hub_ids: list[str]):
        from ..data.document_reads import DocumentReads, fingerprints_of
        from ..training.run_records import find_prepared, read_run

        self.name, record = name, read_run(name)
        self.order = record.order
        stretches = [*self.order.stretches, *(spike.stretch for spike in self.order.spikes)]
        self.prepared = find_prepared(record, fingerprints_of(stretches), prepared_dirs, prepared_hub_ids)
        self.reads = DocumentReads(self.prepared, self.order.stretches, record.removal)
        self.searches: dict = {}
        self.tokenizer = self._read_tokenizer(next(iter(self.prepared.values()))[0])

    def _read_tokenizer(self, folder: Path):
        """The tokenizer of a prepared folder, as far as decoding needs it."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))

    def folder_of(self, fingerprint: str) -> str:
        """The prepared folder with a fingerprint."""
        return str(self.prepared[fingerprint][0])

    # ---- answers ----

    def steps(self, first: int, last: int) -> Iterator[dict]:
        """The windows of each step, with their documents."""
        if last > self.order.reached:
            raise Refusal(
                f"--step {first if first == last else f'{first}..{last}'}: {self.name} has reached step"
                f" {self.order.reached:,}."
            )
        for step in range(first, last + 1):
            yield {"step": step, "windows": self._windows(step)}

    def spikes(self) -> Iterator[dict]:
        """The windows of the step of each spike, with their documents."""
        if not self.order.spikes:
            print(f"events.jsonl of {self.name} has no spikes: the loss never jumped.", file=sys.stderr)
        for spike in self.order.spikes:
            event = {key: spike.event[key] for key in ("loss", "sigmas", "time") if key in spike.event}
            step = spike.event["at_step"]
            yield {"step": step, "spike": event, "windows": self._windows(step, spike.stretch)}

    def documents(self, names: list[str]) -> Iterator[dict]:
        """The reads of each document. Raises Refusal for a document that is in none of the folders."""
        found = {fingerprint: index.find(names) for fingerprint, index in self.reads.indexes.items()}
        for name in names:
            places = [(fingerprint, span) for fingerprint, spans in found.items() for span in spans[name]]
            places = places or self._only_document(name)
            if not places:
                raise Refusal(self._no_document(name))
            for fingerprint, span in places:
                yield {
                    "document": self._document(span),
                    "folder": self.folder_of(fingerprint),
                    "reads": self._reads_of(fingerprint, span, span.text_first, span.last),
                }

    def _only_document(self, name: str) -> list[tuple]:
        """(fingerprint, span) of the document of the one file with this name, where it holds no second one."""
        found = []
        for fingerprint, index in self.reads.indexes.items():
            files = [] if name.rpartition(":")[2].isdigit() else index.files_named(name)
            rows = [f"{file}:{row}" for file in files for row in (1, 2)]
            spans = index.find(rows)
            found += [(fingerprint, row, span) for row in rows for span in spans[row]]
        return [(fingerprint, span) for fingerprint, _, span in found] if len({row for _, row, _ in found}) == 1 else []

    def _no_document(self, name: str) -> str:
        """What to say of a document that is in none of the folders."""
        folders = ", ".join(str(folder) for folder, _ in self.prepared.values())
        files = sorted({file for index in self.reads.indexes.values() for file in index.files_named(name)})
        message = f"--document {name}: no document of {folders} has this id, URL, or file and row."
        if files:
            shown = ", ".join(f"{file}:1" for file in files[:3]) + (" ..." if len(files) > 3 else "")
            return f"{message} Its file is there, and is named with a row: {shown}"
        return (
            f"{message} A name is given as the source has it, that of a file with its row (FILE:1 is the first)."
            " Curation can have dropped it (curation.json). --text finds a document by its words."
        )

    def text(self, passage: str, limit: int) -> Iterator[dict]:
        """The places that hold a passage, and their reads."""
        from tqdm import tqdm

        count = 0
        for fingerprint, (folder, _) in self.prepared.items():
            search = self._search_of(fingerprint)
            fast = search.is_fast(passage)
            if not fast:
                print(
                    "slow      this text is shorter than about three words, or the tokenizer is not of GPT-2's kind:"
                    " every document is decoded",
                    file=sys.stderr,
                )
            with tqdm(
                total=search.tokens, desc=f"searching {folder}", unit="tok", unit_scale=True, disable=None
            ) as bar:
                for match in search.search(passage, bar.update):
                    if count == limit:
                        print(f"limit     there may be more: --limit {limit} was reached", file=sys.stderr)
                        return
                    count += 1
                    yield {
                        "document": self._document(match.document),
                        "folder": self.folder_of(fingerprint),
                        "match": [match.first, match.last],
                        "method": "tokens" if fast else "decoding",
                        "reads": self._reads_of(fingerprint, match.document, match.first, match.last),
                    }
        if not count:
            print(
                "none      no document holds this text exactly: case, blanks and line breaks count (--json shows them)",
                file=sys.stderr,
            )

    # ---- parts of answers ----

    def _search_of(self, fingerprint: str):
        """The search of a prepared folder, made once."""
        from transformers import PreTrainedTokenizerFast

        from ..data.text_search import TextSearch

        if fingerprint not in self.searches:
            folder, manifest = self.prepared[fingerprint]
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer", trust_remote_code=False)
            self.searches[fingerprint] = TextSearch(folder, manifest, tokenizer)
        return self.searches[fingerprint]

    def _windows(self, step: int, stretch=None) -> list[dict]:
        """The windows of a step, each with its documents and their text in it."""
        reads = self.reads.reads(step, stretch)
        documents = self.reads.documents([window for window, _ in reads])
        slices = [
            ids[max(span.text_first - window.first, 0) : span.last - window.first].tolist()
            for (window, ids), spans in zip(reads, documents, strict=True)
            for span in spans
        ]
        texts = iter(self.tokenizer.decode_batch(slices, skip_special_tokens=False))
        return [
            {
                "position": window.position,
                "folder": self.folder_of(window.fingerprint),
                "window": window.window,
                "tokens": [window.first, window.last],
                "documents": [{**self._document(span), "text": next(texts)} for span in spans],
            }
            for (window, _), spans in zip(reads, documents, strict=True)
        ]

    def _document(self, span) -> dict:
        """What a document is called and where it is."""
        record = dataclasses.asdict(span)
        return {
            "name": span.name,
            **{key: record[key] for key in ("id", "url", "file", "row", "split")},
            "tokens": [span.first, span.last],
        }

    def _reads_of(self, fingerprint: str, span, first: int, last: int) -> list[dict]:
        """The reads of tokens [first, last) of a document; none for one that is held out."""
        if span.split != "train":
            return []
        return [
            {"step": read.step, "position": read.position, "window": read.window, "tokens": [read.first, read.last]}
            for read in self.reads.reads_of(fingerprint, first, last)
        ]


class _Lines:
    """An answer as lines for people. characters: of a text that are shown (0: all)."""

    def __init__(self, characters: int):
        self.characters = characters

    def __call__(self, answer: dict) -> str:
        return "\n".join(self._of_step(answer) if "step" in answer else self._of_document(answer))

    def _of_step(self, answer: dict) -> Iterator[str]:
        spike = answer.get("spike")
        jump = f": loss {spike['loss']:.4f}, {spike['sigmas']:g} deviations above the mean" if spike else ""
        yield f"step {answer['step']:,}{jump}"
        for window in answer["windows"]:
            yield f"  window {window['window']:,} of {window['folder']}, tokens {_span(window['tokens'])}"
            for document in window["documents"]:
                yield f"    {_called(document)}"
                yield textwrap.indent(self._shortened(document["text"]), "      ")

    def _of_document(self, answer: dict) -> Iterator[str]:
        document = answer["document"]
        yield f"{_called(document)}"
        yield f"  tokens {_span(document['tokens'])} of {document['split']} in {answer['folder']}"
        if "match" in answer:
            yield f"  the text is in tokens {_span(answer['match'])}"
        if document["split"] != "train":
            yield "  held out for validation: never trained on"
        elif not answer["reads"]:
            yield "  not read so far"
        for read in answer["reads"]:
            yield f"  step {read['step']:,}: window {read['window']:,}, tokens {_span(read['tokens'])}"

    def _shortened(self, text: str) -> str:
        shown = text if not self.characters or len(text) <= self.characters else f"{text[: self.characters]} ..."
        return shown if not self.characters else " ".join(shown.split())


def _span(tokens: list[int]) -> str:
    return f"{tokens[0]:,} to {tokens[1] - 1:,}"


def _called(document: dict) -> str:
    """A document in one line: its names, each once."""
    location = f"{document['file']}:{document['row']}"
    return "  ".join(dict.fromkeys(filter(None, (document["id"], document["url"], location))))
