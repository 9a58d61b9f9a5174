"""Which documents a run read at which step, and at which steps it read a document."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from .dataset import MixedWindows, TokenWindows
from .document_index import DocumentIndex, DocumentSpan
from .removal import Removal, exclude
from .run_windows import weights_of, windows_of_run


@dataclasses.dataclass(frozen=True)
class OrderStretch:
    """Steps first to last of a run, which have one order. data: `identity["data"]`; history: as of `windows_of_run`."""

    first: int
    last: int
    data: dict
    history: tuple[dict, ...]

    @property
    def windows_per_step(self) -> int:
        return self.data["tokens_per_step"] // self.data["block_size"]


@dataclasses.dataclass(frozen=True)
class WindowRead:
    """One window of a step: tokens [first, last) of the training split of the folder with this fingerprint.

    position: of the run, from 0. window: its index in the folder.
    """

    step: int
    position: int
    fingerprint: str
    window: int
    first: int
    last: int


class DocumentReads:
    """The reads of a run. A document counts as read where a window holds a token of its text.

    prepared: {fingerprint: (prepared folder, its manifest)} of all folders that the run read. stretches: the run's, in
    order. removal: the windows that it did not read. Raises Refusal where a folder has no index of documents.
    """

    def __init__(
        self,
        prepared: Mapping[str, tuple[Path, dict]],
        stretches: Sequence[OrderStretch],
        removal: Removal | None = None,
    ):
        self.prepared, self.stretches, self.removal = prepared, list(stretches), removal
        self.indexes = {name: DocumentIndex(*folder) for name, folder in prepared.items()}
        self._windows: list[tuple[OrderStretch, TokenWindows | MixedWindows]] = []

    @property
    def last_step(self) -> int:
        """The last step that is known to have been read; 0 where none is."""
        return max((stretch.last for stretch in self.stretches), default=0)

    def windows_of(self, stretch: OrderStretch) -> TokenWindows | MixedWindows:
        """The windows at the positions of a stretch of the run."""
        for known, windows in self._windows:
            if known == stretch:
                return windows
        windows = windows_of_run(self.prepared, stretch.data, stretch.last, stretch.history)
        if self.removal is not None:
            exclude(windows, self.removal)
        for folder in windows.folders if isinstance(windows, MixedWindows) else [windows]:
            if folder is not None:
                folder.reads_ahead = False
        self._windows.append((stretch, windows))
        return windows

    def stretch_of(self, step: int) -> OrderStretch:
        """The stretch that a step belongs to. Raises KeyError where there is none."""
        for stretch in self.stretches:
            if stretch.first <= step <= stretch.last:
                return stretch
        raise KeyError(step)

    def reads(self, step: int, stretch: OrderStretch | None = None) -> list[tuple[WindowRead, np.ndarray]]:
        """(window, its token ids) of every window of a step, in order. stretch: that the step is taken to belong to."""
        stretch = stretch or self.stretch_of(step)
        windows, count, found = self.windows_of(stretch), stretch.windows_per_step, []
        for position in range((step - 1) * count, step * count):
            fingerprint, window = _locate(windows, position)
            first = window * windows.block_size
            read = WindowRead(step, position, fingerprint, window, first, first + windows.block_size + 1)
            found.append((read, windows[position]))
        return found

    def documents(self, windows: Iterable[WindowRead]) -> list[list[DocumentSpan]]:
        """The documents of each window."""
        windows = list(windows)
        found: list[list[DocumentSpan]] = [[] for _ in windows]
        for fingerprint, index in self.indexes.items():
            numbers = [i for i, window in enumerate(windows) if window.fingerprint == fingerprint]
            spans = index.documents("train", [(windows[i].first, windows[i].last) for i in numbers])
            for number, documents in zip(numbers, spans, strict=True):
                window = windows[number]
                found[number] = [
                    one for one in documents if max(one.text_first, window.first) < min(one.last, window.last)
                ]
        return found

    def names_of_step(self, step: int) -> list[str]:
        """What the documents of a step are called, each once, in the order of its windows."""
        documents = self.documents([window for window, _ in self.reads(step)])
        return list(dict.fromkeys(document.name for window in documents for document in window))

    def reads_of(self, fingerprint: str, first: int, last: int) -> Iterator[WindowRead]:
        """Every read of tokens [first, last) of a folder's training split, in the order of the run."""
        for stretch in self.stretches:
            windows, size = self.windows_of(stretch), stretch.data["block_size"]
            count, found = stretch.windows_per_step, []
            # Window w holds tokens w * size to w * size + size, its last target included.
            for window in range(max(0, -(-first // size) - 1), (last - 1) // size + 1 if last > first else 0):
                for position in _positions(windows, fingerprint, window):
                    step = position // count + 1
                    if stretch.first <= step <= stretch.last:
                        begin = window * size
                        found.append(WindowRead(step, position, fingerprint, window, begin, begin + size + 1))
            yield from sorted(found, key=lambda read: read.position)


def document_reads(
    prepared: Mapping[str, tuple[Path, dict]],
    data: dict,
    steps: int,
    history: Sequence[dict],
    removal: Removal | None = None,
) -> DocumentReads | None:
    """The reads of a run of `steps` steps in its present order; None where a folder has no index of documents.
    Arguments as of `windows_of_run` and DocumentReads.
    """
    if not all("index" in manifest for _, manifest in prepared.values()):
        return None
    return DocumentReads(prepared, [OrderStretch(1, steps, data, tuple(history))], removal)


def _locate(windows: TokenWindows | MixedWindows, position: int) -> tuple[str, int]:
    """(fingerprint of the folder, window) at a position of the run."""
    if not isinstance(windows, MixedWindows):
        return windows.fingerprint, windows.window_of(position)
    number, window = windows.locate(position)
    return windows.fingerprints[number], window


def _positions(windows: TokenWindows | MixedWindows, fingerprint: str, window: int) -> list[int]:
    """The positions of the run at which a window of a folder is read."""
    if not isinstance(windows, MixedWindows):
        return windows.positions_of(window) if windows.fingerprint == fingerprint else []
    if fingerprint not in windows.fingerprints:
        return []
    return windows.positions_of(windows.fingerprints.index(fingerprint), window)


def fingerprints_of(stretches: Iterable[OrderStretch]) -> list[str]:
    """The fingerprints of the folders that a run read, each once."""
    found = []
    for stretch in stretches:
        found += [*weights_of(stretch.data), *(name for entry in stretch.history for name in entry.get("weights", {}))]
    return list(dict.fromkeys(found))
