"""Preparing text on a Ray cluster (`--prepare_on ray`): the tasks of curation's stages, and encoding, as Ray tasks.

The cluster is that of RAY_ADDRESS. Nodes read the text and write curated text on a disk that all of them see; encoded
parts come back to the one ordered writer of this process, so the bytes are those of one machine. The loss of a node
costs the tasks that ran there, which run again elsewhere. Refused: a node that does not see a folder, or that has other
code or packages.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import math
import os
import signal
import socket
import threading
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep

from ..distributed import print_main
from ..errors import Refusal, no_space
from ..provenance import package_versions
from . import shards
from .curation import active, stages
from .cutting import PART_BYTES, PartStart, parts
from .formats import TextFile
from .installed import INSTALLED, package_root
from .shards import IN_FLIGHT, EncodedPart, id_dtype
from .text_source import Source, size_of
from .tokenizer import Encoder, vocabulary_size

PARTS_PER_TASK = 16  # of a large file that one task encodes; small files are encoded together up to as many bytes
TASK_BYTES = PARTS_PER_TASK * PART_BYTES
RETRIES = 10  # of a task whose node or worker was lost
ANSWER_SECONDS = 10.0  # in which the head of the cluster accepts a connection
COMPARED_FILES = 1000  # of the text whose sizes each node compares

# packages on which the bytes of curated text and tokens depend
PACKAGES = "datatrove ftfy numpy orjson pyarrow regex tiktoken tokenizers trafilatura xxhash zstandard".split()


# ---- the cluster ----


def cluster_address() -> str:
    """RAY_ADDRESS. Raises Refusal where it names no cluster, or nobody answers there: Ray would try for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if address != "auto" and not (host and port.isdigit() and "://" not in address):
        raise Refusal(
            f"--prepare_on ray: RAY_ADDRESS is {address or 'not set'}. Run the command on a node of the cluster, with"
            " RAY_ADDRESS=HOST:6379 as `ray start --head` prints it, or start both with configs/slurm/prepare.sbatch."
        )
    try:
        if address != "auto":
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except OSError as error:
        raise Refusal(f"--prepare_on ray: no Ray cluster answers at RAY_ADDRESS={address} ({error}).") from None
    return address


@contextlib.contextmanager
def connect() -> Iterator["Cluster"]:
    """The cluster of RAY_ADDRESS, for the block. Raises Refusal where none answers."""
    import ray

    address = cluster_address()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Refusal(f"--prepare_on ray: no Ray cluster answers at RAY_ADDRESS={address} ({reason}).") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray sets its own
    try:
        yield Cluster()
    finally:
        ray.shutdown()


class Cluster:
    """The Ray cluster that this process is connected to. Raises Refusal where it has no CPUs."""

    def __init__(self):
        import ray

        self.nodes = list(_alive(ray.nodes()).values())
        self.cpus = int(sum(node["Resources"]["CPU"] for node in self.nodes))
        if not self.nodes:
            raise Refusal("--prepare_on ray: no node of the cluster has a CPU for tasks (`ray status` lists them).")

    def __str__(self) -> str:
        return f"Ray, {len(self.nodes)} node{'s' * (len(self.nodes) > 1)} with {self.cpus} CPUs"

    def check(self, folders: list[Path], source: Source, is_curated: bool) -> None:
        """Raise Refusal where a node does not see one of the folders, which this process writes to, or the files of a
        text with absolute paths, or has other code or packages; and for tokens straight from files of the Hub.
        is_curated: whether the text is curated first.
        """
        if not is_curated and any(_path(file) is None for file in source.files):
            raise Refusal(
                f"--prepare_on ray: {source.record['dataset']} is on the Hub, and each task would download its file"
                " again. Download it (`hf download NAME --repo-type dataset --local-dir FOLDER`), and give"
                " --dataset FOLDER, or curate it: each file is then read once."
            )
        print_main(f"cluster   {self}")
        with contextlib.ExitStack() as stack:
            markers = [stack.enter_context(_marker(folder.absolute())) for folder in folders]
            problems = self.on_every_node(node_problem, markers, _sample(source.files), code_versions())
        if problems:
            host, problem = next(iter(problems.items()))
            others = f" (and {len(problems) - 1} more nodes)" if len(problems) > 1 else ""
            raise Refusal(f"--prepare_on ray: node {host}{others} {problem}")

    def on_every_node(self, function, *arguments) -> dict[str, str]:
        """{host: what a function returned there}, where that is not empty. A task that fails is a problem, too, unless
        its node was lost.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        tasks, hosts, found = {}, {}, {}
        for node in self.nodes:
            pinned = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(function).options(num_cpus=0, scheduling_strategy=pinned, max_retries=RETRIES)
            tasks[node["NodeID"]] = task.remote(*arguments)
            hosts[node["NodeID"]] = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node, task in tasks.items():
            try:
                result = ray.get(task)
            except ray.exceptions.RayError as error:
                if node not in _alive(ray.nodes()):
                    continue
                reason = " ".join(str(error).split())[-300:]
                result = (
                    f"cannot run the code of this command ({reason}). Start its Ray in the same environment, with this"
                    f" checkout at {Path(__file__).parents[2]}."
                )
            found |= {hosts[node]: result} if result else {}
        return found

    # ---- curation ----

    def run_stage(self, pipeline: list[PipelineStep], tasks: int, folder: Path, bar) -> None:
        """Run the tasks of a curation stage that are not done yet. folder: of the stage's records. bar: a tqdm of
        tasks. Raises the Refusal of a task.

        datatrove's RayPipelineExecutor starts an actor, which forks, for each task or few: seconds each, and it waits
        for ever where a node is lost while an actor starts. Ray tasks share workers and are tried again.
        """
        import ray
        from datatrove.executor import LocalPipelineExecutor

        stage = LocalPipelineExecutor(pipeline, tasks, logging_dir=str(folder.absolute()))
        ranks = stage.get_incomplete_ranks()
        bar.update(tasks - len(ranks))
        shared = ray.put(stage)
        task = ray.remote(run_rank).options(max_retries=RETRIES, scheduling_strategy="SPREAD")
        waiting = [task.remote(shared, rank) for rank in ranks]
        while waiting:
            done, waiting = ray.wait(waiting)
            for reference in done:
                _result(reference, f"a task of the curation stage {folder.name}")
            bar.update(len(done))

    # ---- encoding ----

    def tokenize(self, source: Source, tokenizer, position: dict) -> Iterator[EncodedPart]:
        """As `shards.tokenize`: the documents of a source in order, from the part of `position` on, encoded on the
        cluster. At most IN_FLIGHT tasks per CPU exist at once. Raises the Refusal of a task.
        """
        import ray

        encoder = ray.put(Encoder(tokenizer).without_transformers())
        settings = ([encoder], id_dtype(vocabulary_size(tokenizer)), source.encoding)
        task = ray.remote(encode_pieces).options(max_retries=RETRIES, scheduling_strategy="SPREAD")
        waiting: deque = deque()

        def result() -> list[EncodedPart]:
            """The parts of the first task, once it is done, without those before the position."""
            first = (position["file"], position["part"])
            return [part for part in _result(waiting.popleft(), "encoding") if (part.file, part.part) >= first]

        for pieces in self.pieces(source, position):
            waiting.append(task.remote(settings, pieces))
            while len(waiting) >= self.cpus * IN_FLIGHT:
                yield from result()
        while waiting:
            yield from result()

    def pieces(self, source: Source, position: dict) -> Iterator[list["Piece"]]:
        """What each task encodes, in order: some small files, or parts of a large one, whose starts are found on the
        cluster, for as many files ahead as there are CPUs.
        """
        import ray

        files = list(enumerate(source.files))[position["file"] :]
        large = (file for _, file in files if _is_large(file))
        finding: deque = deque()

        def look_ahead() -> None:
            """Begin to search for the starts in the next large files."""
            for file in itertools.islice(large, self.cpus - len(finding)):
                finding.append(ray.remote(part_starts).options(max_retries=RETRIES).remote(file))

        group, size = [], 0
        look_ahead()
        for index, file in files:
            first = position["part"] if index == position["file"] else 0
            if _is_large(file):
                yield from [group] if group else []
                group, size = [], 0
                found = _result(finding.popleft(), "cutting a file")
                look_ahead()
                yield from ([piece] for piece in cut(index, file, found, first))
            else:
                more = size_of(file) or 0
                if group and size + more > TASK_BYTES:
                    yield group
                    group, size = [], 0
                group.append(Piece(index, file, PartStart(first)))
                size += more
        yield from [group] if group else []


def _alive(nodes: list[dict]) -> dict[str, dict]:
    """{id: node} of those nodes of `ray.nodes()` that can run tasks."""
    return {node["NodeID"]: node for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1}


def _result(reference, name: str):
    """What a task returned. Raises the Refusal that it raised, or one about its failure. name: of the task."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Refusal):
            raise error.cause from None
        raise Refusal(full) if (full := no_space(error.cause)) else _failed(name, repr(error.cause)) from None
    except ray.exceptions.RayError as error:
        raise _failed(name, str(error)) from None


def _failed(name: str, reason: str) -> Refusal:
    return Refusal(
        f"--prepare_on ray: {name} failed on the cluster: {' '.join(reason.split())[:400]}. Run the same command again:"
        " finished work is kept."
    )


def absolute(source: Source) -> Source:
    """A source whose local files have absolute paths: nodes work in other folders."""
    return dataclasses.replace(
        source,
        files=tuple(
            dataclasses.replace(file, path=os.path.abspath(file.path)) if os.path.exists(file.path) else file
            for file in source.files
        ),
    )


def task_line(source: Source, rules: dict) -> str:
    """How many tasks preparing takes, for --dry_run. rules: CurationArguments as a dict."""
    encoding = sum(math.ceil(file.size / TASK_BYTES) for file in source.files if file.size and _is_large(file))
    encoding += math.ceil(sum(size_of(file) or 0 for file in source.files if not _is_large(file)) / TASK_BYTES)
    plan = stages(source, rules, Path("curated")) if active(rules) else []
    curating = sum(tasks for _, _, tasks in plan)
    phrase = f"{curating:,} tasks in {len(plan)} stages curate the text, then at most" if plan else "about"
    phrase += f" {max(1, encoding):,} task{'s' * (encoding > 1)} of {TASK_BYTES // 10**6} MB"
    phrase += " encode it" if encoding > 1 else " encodes it"
    return f"prepares on Ray     {phrase}"


# ---- what runs on nodes ----


def run_rank(stage: PipelineExecutor, rank: int) -> None:
    """One task of a curation stage (a Ray task). It leaves a mark in the folder of the stage's records."""
    stage._run_for_rank(rank)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Parts of a file: from a start on, `count` of them (None: to the end). index: of the file in its source."""

    index: int
    file: TextFile
    start: PartStart
    count: int | None = None


def part_starts(file: TextFile) -> list[tuple[PartStart, int]]:
    """[(start, number of parts from it to the next start)] of a file: every PARTS_PER_TASK parts."""
    found, offset, seekable = [], 0, file.is_seekable
    for number, part in enumerate(parts(file)):
        if number % PARTS_PER_TASK == 0:
            found.append([PartStart(number, part.first_row, offset if seekable else None), 0])
        found[-1][1] += 1
        offset += len(part.raw) if seekable else 0
    return [tuple(entry) for entry in found]


def cut(index: int, file: TextFile, found: list[tuple[PartStart, int]], first: int) -> Iterator[Piece]:
    """The pieces of a large file that end after part `first`. found: what `part_starts` returned."""
    for start, count in found:
        if start.part + count > first:
            yield Piece(index, file, start, count)


def encode_pieces(settings: tuple, pieces: list[Piece]) -> list[EncodedPart]:
    """The encoded parts of some pieces, in order (a Ray task). settings: [reference to an Encoder], dtype, encoding."""
    _start(*settings[0], *settings[1:])
    return [
        EncodedPart(piece.index, number, *shards._encode_part(part))
        for piece in pieces
        for number, part in itertools.islice(
            enumerate(parts(piece.file, start=piece.start), piece.start.part), piece.count
        )
    ]


@functools.lru_cache(1)
def _start(encoder, dtype, encoding: str | None) -> None:
    """Prepare this worker for `_encode_part`, once."""
    import ray

    shards._start_worker(ray.get(encoder), dtype, encoding)


def _is_large(file: TextFile) -> bool:
    return file.kind not in INSTALLED and (file.size is None or file.size > TASK_BYTES)


# ---- what nodes see ----


@contextlib.contextmanager
def _marker(folder: Path) -> Iterator[tuple[str, str]]:
    """(path, content) of a hidden file in a folder, for the block; a folder that was not there is removed again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    content = uuid.uuid4().hex
    path = folder / f".seen-{content}"
    try:
        path.write_text(content)
        yield str(path), content
    finally:
        path.unlink(missing_ok=True)
        for parent in made:
            with contextlib.suppress(OSError):  # another process wrote into it meanwhile
                parent.rmdir()


def _sample(files: tuple[TextFile, ...]) -> list[tuple[tuple[str, ...], int]]:
    """[(path, size)] of at most COMPARED_FILES files of this machine, evenly spread."""
    step = max(1, math.ceil(len(files) / COMPARED_FILES))
    return [(path, size_of(file)) for file in files[::step] if (path := _path(file)) is not None]


def _path(file: TextFile) -> tuple[str, ...] | None:
    """(package, path inside it) of an installed file, (path,) of another; None for a file of the Hub."""
    if file.kind in INSTALLED:
        return tuple(file.name.split("/", 1))
    return (file.path,) if os.path.exists(file.path) else None


def code_versions() -> dict[str, str]:
    """What the bytes of curated text and tokens depend on: this package's code, and versions of others."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        code.update(path.read_bytes())
    return {"llama_lite": code.hexdigest()[:12], **package_versions(PACKAGES)}


def node_problem(
    markers: list[tuple[str, str]], files: list[tuple[tuple[str, ...], int]], versions: dict[str, str]
) -> str:
    """What keeps this node from preparing (the end of a sentence about it), empty where nothing does."""
    for path, content in markers:
        if not os.path.exists(path) or Path(path).read_text() != content:
            return (
                f"does not see {os.path.dirname(path)}: use folders on a disk that every node mounts at the same path,"
                " or take the node out of the cluster."
            )
    for path, size in files:
        full = os.path.join(package_root(path[0]) or "", path[1]) if len(path) > 1 else path[0]
        if not os.path.exists(full) or os.path.getsize(full) != size:
            return (
                f"does not see the text: {full} of {size:,} bytes is not there. Move it to a disk that every node"
                " mounts at the same path, or take the node out of the cluster."
            )
    here = code_versions()
    if different := [name for name in {**versions, **here} if versions.get(name) != here.get(name)]:
        listed = ", ".join(f"{name} {here.get(name)} instead of {versions.get(name)}" for name in different)
        return f"has other code, which may give other bytes ({listed}): start its Ray in the same environment."
    return ""
