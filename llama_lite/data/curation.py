"""Curation: which documents are kept, and why the others are dropped, as a chain of datatrove blocks.

`stages()` lists the chain; `curate()` runs it, in processes of this machine or on a Ray cluster (ray_cluster.py).
A bad document never stops a run (it is counted and named).
"""

import contextlib
import functools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import as_completed
from decimal import Decimal
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from tqdm import tqdm

from ..distributed import print_main
from ..errors import Refusal
from ..files import write_json
from ..processes import worker_pool
from .formats import EXAMPLES, Skipped, TextFile, merge_skipped, skipped_lines
from .installed import INSTALLED
from .parsing import read
from .text_source import Source, size_of

TASK_BYTES, MOST_TASKS = 4_000_000, 512

# Tasks with equally many files. Which of several near-duplicates is kept depends on this division, and published
# studies use it.
INSTALLED_TASKS = 16
EXAMPLE_CHARACTERS = 200


class Reader(PipelineStep):
    """datatrove block: the documents of this task's files, in order, and a record of the rows without text, or without
    a number in the columns `scores`.

    bounds: `task_bounds` of the source. columns: further columns of rows, as metadata. report: folder of the record.
    """

    name = "source"

    def __init__(
        self,
        source: Source,
        bounds: list[int],
        report: Path,
        columns: tuple[str, ...] = (),
        scores: tuple[str, ...] = (),
    ):
        super().__init__()
        self.source, self.bounds, self.report, self.columns, self.scores = source, bounds, report, columns, scores

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """The documents of task `rank`. Writes the record at the end."""
        skipped, count = Skipped(), {"documents": 0, "characters": 0}
        for file in self.source.files[self.bounds[rank] : self.bounds[rank + 1]]:
            for document in read(file, skipped, self.columns, self.source.encoding):
                if column := next(
                    (column for column in self.scores if not _is_score(document.metadata.get(column))), None
                ):
                    skipped.add(f"{column} is not a number", document.id)
                    continue
                for column in self.scores:
                    value = document.metadata.get(column)
                    # datatrove's JSON does not hold these.
                    if isinstance(value, Decimal) or (isinstance(value, int) and abs(value) >= 2**63):
                        document.metadata[column] = score_of(value)
                count["documents"] += 1
                count["characters"] += len(document.text)
                yield document
        self.report.mkdir(parents=True, exist_ok=True)
        write_json(self.report / f"{rank:05d}.json", {**count, "skipped": skipped.reasons})


def _is_score(value) -> bool:
    try:
        score_of(value)
    except ValueError:
        return False
    return True


def task_bounds(source: Source) -> list[int]:
    """Index of the first file of each task, and the number of files: about TASK_BYTES per task, at most MOST_TASKS; a
    function of the source alone.
    """
    if source.kind in INSTALLED:
        return sorted({task * len(source.files) // INSTALLED_TASKS for task in range(INSTALLED_TASKS + 1)})
    sizes = [TASK_BYTES if (size := size_of(file)) is None else size for file in source.files]
    bytes_per_task = max(TASK_BYTES, sum(sizes) / MOST_TASKS)
    bounds, task_bytes = [0], 0
    for index, size in enumerate(sizes):
        if task_bytes and task_bytes + size / 2 > bytes_per_task:
            bounds.append(index)
            task_bytes = 0
        task_bytes += size
    return [*bounds, len(sizes)]


class Rule(PipelineStep):
    """datatrove block: wraps a filter and records what it saw, what it dropped, and three dropped examples.

    name: of the rule in the record. step: the filter. report: folder of the record.
    """

    def __init__(self, name: str, step: PipelineStep, report: Path):
        super().__init__()
        self.name, self.step, self.report = name, step, report

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """The documents that the filter keeps. Writes the record at the end."""
        count = {key: 0 for key in ("documents_seen", "characters_seen", "documents_dropped", "characters_dropped")}
        examples, pending = [], []

        def drop_pending() -> None:
            """Count the pending documents as dropped."""
            for name, text, length in pending:
                count["documents_dropped"] += 1
                count["characters_dropped"] += length
                if len(examples) < EXAMPLES:
                    examples.append({"id": name, "text": text})
            pending.clear()

        def observed() -> Iterator[Document]:
            """The documents, each pending until the filter yields it."""
            for document in data:
                drop_pending()
                count["documents_seen"] += 1
                count["characters_seen"] += len(document.text)
                pending.append((document.id, document.text[:EXAMPLE_CHARACTERS], len(document.text)))
                yield document

        for document in self.step.run(observed(), rank, world_size):
            pending.clear()  # the filter kept it
            yield document
        drop_pending()
        self.report.mkdir(parents=True, exist_ok=True)
        write_json(self.report / f"{rank:05d}.json", {**count, "examples": examples})


def score_of(value: object) -> float:
    """The number in a column of scores; minus infinity where it is empty. Raises ValueError for other values."""
    if value is None or value == "":
        return -math.inf
    # Python's float would accept `1_000`.
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal) or "_" in str(value):
        raise ValueError(f"{value!r} is not a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def filters(rules: dict) -> list[tuple[str, PipelineStep]]:
    """(name, datatrove filter) of the active rules that look at one document at a time. rules: CurationArguments as a
    dict.
    """
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
        LambdaFilter,
    )

    def at_least(column: str, least: float) -> LambdaFilter:
        """A filter by a column of scores."""
        return LambdaFilter(lambda document: score_of(document.metadata.get(column)) >= least)

    chosen = []
    if rules["language"] is not None:
        chosen.append(
            (
                f"language = {rules['language']}",
                LambdaFilter(lambda d, want=rules["language"]: d.metadata.get("language") == want),
            )
        )
    if rules["min_language_score"] is not None:
        chosen.append(
            (
                f"language_score >= {rules['min_language_score']}",
                at_least("language_score", rules["min_language_score"]),
            )
        )
    if rules["min_score"] is not None:
        chosen.append(
            (f"{rules['score_column']} >= {rules['min_score']}", at_least(rules["score_column"], rules["min_score"]))
        )
    if rules["min_characters"] is not None:
        chosen.append(
            (
                f"at least {rules['min_characters']} characters",
                LambdaFilter(lambda d, n=rules["min_characters"]: len(d.text) >= n),
            )
        )
    if rules["max_characters"] is not None:
        chosen.append(
            (
                f"at most {rules['max_characters']} characters",
                LambdaFilter(lambda d, n=rules["max_characters"]: len(d.text) <= n),
            )
        )
    web = {
        "gopher_repetition": GopherRepetitionFilter,
        "gopher_quality": GopherQualityFilter,
        "c4_quality": C4QualityFilter,
        "fineweb_quality": FineWebQualityFilter,
    }
    return chosen + [(name.replace("_", " "), block()) for name, block in web.items() if rules[name]]


def active(rules: dict) -> dict:
    """The rules that are set. rules: CurationArguments as a dict."""
    return {
        name: value
        for name, value in rules.items()
        if value is not None and value is not False and name != "score_column"
    }


def _text_of(document: Document) -> str:
    return document.text


def stages(source: Source, rules: dict, folder: Path) -> list[tuple[str, list[PipelineStep], int]]:
    """(name, pipeline, number of tasks) of each curation stage, to be run in order by any datatrove executor.

    The kept documents are written to `folder/kept/*.jsonl.zst`, all other files to `folder/curation`. Each stage reads
    what the one before it wrote.
    """
    bounds = task_bounds(source)
    tasks = len(bounds) - 1
    duplicates = folder / "curation" / "duplicates"
    thresholds = {
        "language": rules["language"],
        "language_score": rules["min_language_score"],
        rules["score_column"]: rules["min_score"],
    }
    columns = tuple(column for column, setting in thresholds.items() if setting is not None)
    scores = tuple(column for column in columns if column != "language")
    outputs = ["judged"] + [name for name in ("exact", "minhash") if rules[f"{name}_dedup"]]
    folders = dict(zip(outputs, [folder / "curation" / name for name in outputs[:-1]] + [folder / "kept"], strict=True))

    judges = [_rule(folder, index, name, step) for index, (name, step) in enumerate(filters(rules), 1)]
    reader = Reader(source, bounds, folder / "curation" / "reports" / "00 read", columns, scores)
    chain, plan, last = [reader, *judges, _writer(folders["judged"])], [], folders["judged"]
    if rules["exact_dedup"]:
        found, dropper = _exact_dedup(chain, duplicates, tasks)
        plan += found
        chain = [
            _own_file_reader(last),
            _rule(folder, 90, "exact duplicates", dropper),
            _writer(folders["exact"]),
        ]
        last = folders["exact"]
    if rules["minhash_dedup"]:
        found, dropper = _minhash_dedup(chain, duplicates, tasks)
        plan += found
        chain = [_own_file_reader(last), _rule(folder, 91, "near duplicates", dropper), _writer(folders["minhash"])]
    return [*plan, ("keep", chain, tasks)]


def _rule(folder: Path, index: int, name: str, step: PipelineStep) -> Rule:
    """A block with its report; `index` orders the reports."""
    return Rule(name, step, folder / "curation" / "reports" / f"{index:02d} {name.replace('/', ' ')}")


def _writer(folder: Path) -> PipelineStep:
    """Writes the documents of each task into a file of its own."""
    from datatrove.pipeline.writers import JsonlWriter

    return JsonlWriter(str(folder), output_filename="${rank}.jsonl", compression="zstd")


def _hash_config():
    """datatrove 0.10.1 passes str to xxhash, which version 4 of xxhash refuses; hence sha1."""
    from datatrove.utils.hashing import HashConfig

    return HashConfig(hash_fc="sha1")


def _exact_dedup(chain: list[PipelineStep], duplicates: Path, tasks: int) -> tuple[list, PipelineStep]:
    """(the stages that find equal texts, with `chain` before them; the block that drops all but one of each)."""
    from datatrove.pipeline.dedup import ExactDedupFilter, ExactDedupSignature, ExactFindDedups
    from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig

    config = ExactDedupConfig(_text_of, hash_config=_hash_config())
    signatures, found = str(duplicates / "exact-signatures"), str(duplicates / "exact")
    plan = [
        ("judge", [*chain, ExactDedupSignature(signatures, config)], tasks),
        ("find-exact", [ExactFindDedups(signatures, found, config)], 1),
    ]
    return plan, ExactDedupFilter(found, config)


def _minhash_dedup(chain: list[PipelineStep], duplicates: Path, tasks: int) -> tuple[list, PipelineStep]:
    """(the stages that find near-duplicates, with `chain` before them; the block that drops all but one of each).

    MinHash over 5-grams of the words that are left after lower-casing and dropping punctuation, 14 buckets x 8 hashes
    (FineWeb's), in two passes over the disk.
    """
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )

    config, words = MinhashConfig(hash_config=_hash_config()), _blank_separated_words()
    signatures, buckets, remove = (str(duplicates / f"minhash-{name}") for name in ("signatures", "buckets", "remove"))
    plan = [
        ("sign", [*chain, MinhashDedupSignature(signatures, config, language=words)], tasks),
        ("find-near", [MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets),
        ("cluster", [MinhashDedupCluster(buckets, remove, config=config)], 1),
    ]
    return plan, MinhashDedupFilter(remove)


def _own_file_reader(folder: Path) -> PipelineStep:
    """A reader of the file that the same task of the stage before wrote; there is none where the task kept nothing.

    datatrove's own reader assigns the existing files to tasks by position: after a task without a file, every task
    would read the file of the next one, and apply to it what a rule found in its own documents.
    """
    from datatrove.pipeline.readers import JsonlReader

    class OwnFileReader(JsonlReader):
        """Reads one file per task."""

        def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
            """The documents of the file of task `rank`."""
            name = f"{rank:05d}.jsonl.zst"
            for document in self.read_files_shard([name] if self.data_folder.exists(name) else []):
                document.metadata.pop("file_path", None)  # the same text is the same file in any folder
                yield document

    return OwnFileReader(str(folder), compression="zstd", doc_progress=False, file_progress=False)


def _blank_separated_words():
    """A tokenizer of words at blanks. MinHash removes case and punctuation first, so it needs no language model."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class BlankSeparatedWords(WordTokenizer):
        """Words are separated by blanks; a text is one sentence."""

        def word_tokenize(self, text: str) -> list[str]:
            """The words of a text."""
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            """The text."""
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            """The span of the text."""
            return [(0, len(text))]

    return BlankSeparatedWords("en")


def curate(source: Source, rules: dict, folder: Path, workers: int, run_stage: Callable | None = None) -> Source:
    """Apply the active rules and return the kept documents as a Source. Restartable: finished tasks are not run again.

    `folder/curation.json` records for each rule how many documents and characters it saw and dropped, with examples.
    workers: number of processes of this machine. run_stage: runs the tasks of a stage elsewhere
    (`Cluster.run_stage`). Raises Refusal when no document is left.
    """
    from loguru import logger

    logger.disable("datatrove")
    start = time.monotonic()
    plan = stages(source, rules, folder)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tqdm(total=sum(tasks for _, _, tasks in plan), desc="curating", unit="task", disable=None) as bar:
        for name, pipeline, tasks in plan:
            records = folder / "curation" / "stages" / name
            (run_stage or functools.partial(_run_stage, workers))(pipeline, tasks, records, bar)
    report = _report(source, rules, folder)
    write_json(folder / "curation.json", report)
    for line in skipped_lines(report["read"]["skipped"]):
        print_main(f"not read  {line}")
    if not report["read"]["documents"]:
        why = "; ".join(skipped_lines(report["read"]["skipped"])) or "there is no text"
        raise Refusal(f"curation received no documents: {why}.")
    if not report["kept"]["documents"]:
        worst = max(report["rules"], key=lambda rule: rule["documents_dropped"], default={"rule": "no rule"})
        raise Refusal(
            f"curation keeps none of the {report['read']['documents']} documents; {worst['rule']!r} drops most"
            f" ({folder / 'curation.json'} has examples). Relax that rule, or use other text."
        )
    counts = [
        f"{report[name]['documents']:,} documents, {report[name]['characters']:,} characters"
        for name in ("read", "kept")
    ]
    print_main(
        f"curated   {counts[0]} -> {counts[1]} kept, in {time.monotonic() - start:.0f} s (why:"
        f" {folder / 'curation.json'})"
    )
    for name in ("judged", "exact", "duplicates"):
        shutil.rmtree(folder / "curation" / name, ignore_errors=True)
    kept = sorted((folder / "kept").glob("*.jsonl.zst"))
    return Source(
        "files",
        tuple(TextFile(str(path), path.name, "jsonl", path.stat().st_size, "text", curated=True) for path in kept),
        source.record,
    )


def _run_stage(workers: int, pipeline: list[PipelineStep], tasks: int, records: Path, bar) -> None:
    """Run the tasks of a stage that are not done yet, in processes of this machine."""
    from datatrove.executor import LocalPipelineExecutor

    executor = LocalPipelineExecutor(pipeline, tasks, logging_dir=str(records))
    ranks = executor.get_incomplete_ranks()
    bar.update(tasks - len(ranks))
    with worker_pool(min(workers, tasks), _start_worker, executor) as pool:
        for task in as_completed([pool.submit(_run_task, rank) for rank in ranks]):
            task.result()
            bar.update()


_worker: dict = {}


def _start_worker(executor) -> None:
    _worker["executor"] = executor  # inherited by fork: its rules need no pickling


def _run_task(rank: int) -> None:
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):  # hides a progress bar per task
        _worker["executor"]._run_for_rank(rank)


def _report(source: Source, rules: dict, folder: Path) -> dict:
    """The content of `curation.json`: the sums of the tasks' records, with rules in the order of the chain."""
    totals = {}
    for report_folder in sorted((folder / "curation" / "reports").iterdir()):
        records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(report_folder.glob("*.json"))]
        counts = [key for key, value in records[0].items() if isinstance(value, int)]
        examples = [example for record in records for example in record.get("examples", [])]
        totals[report_folder.name[3:]] = {key: sum(record[key] for record in records) for key in counts} | {
            "examples": examples[:EXAMPLES]
        }
        if report_folder.name == "00 read":
            skipped = merge_skipped(record["skipped"] for record in records)
    read_counts = totals.pop("read")
    read_counts.pop("examples")
    kept = {"documents": read_counts["documents"], "characters": read_counts["characters"]}
    for record in totals.values():
        kept = {key: record[f"{key}_seen"] - record[f"{key}_dropped"] for key in kept}
    return {
        "source": source.record,
        "settings": active(rules),
        "read": {**read_counts, "skipped": skipped},
        "rules": [{"rule": name, **record} for name, record in totals.items()],
        "kept": kept,
    }
