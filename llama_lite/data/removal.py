"""Training without some documents: the windows that hold them are replaced by others of the same folder.

A window that holds a listed document is replaced by one that is drawn by a hash of (seed, position, try) until it
holds none. So every other position keeps its window, and when the list grows, a position changes only if its window
holds a document that is new in the list.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from ..errors import Refusal
from ..files import read_json
from .dataset import MixedWindows, TokenWindows, count_windows
from .document_index import DocumentIndex

FILE = "removal.json"  # in the folder of a run: the windows that it does not read
FIELD = "without_documents"  # of `identity["data"]` of such a run
LEAST_LEFT = 0.1  # of the windows of a folder
EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Removal:
    """The windows that a run does not read: {fingerprint of a prepared folder: ascending windows}.

    documents: how many listed documents the training tokens hold.
    """

    documents: int
    windows: dict[str, list[int]]

    def identity(self) -> dict:
        """What of a run's identity says which windows it does not read. Names no document."""
        digest = hashlib.sha256(json.dumps(self.windows, sort_keys=True).encode()).hexdigest()
        return {"documents": self.documents, "windows": sum(map(len, self.windows.values())), "sha256": digest}

    def record(self) -> dict:
        """JSON of FILE."""
        return dataclasses.asdict(self)

    def includes(self, other: "Removal") -> bool:
        """Whether every window of another removal is one of this."""
        return all(set(windows) <= set(self.windows.get(name, ())) for name, windows in other.windows.items())


def read_list(path: str) -> list[str]:
    """The names in a file, one per line: ids, URLs, or `FILE:ROW`. Raises Refusal."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise Refusal(f"--without_documents {path} cannot be read: {reason}.") from None
    if names := list(dict.fromkeys(line.strip() for line in lines if line.strip())):
        return names
    raise Refusal(f"--without_documents {path} lists nothing: give an id, a URL or FILE:ROW of a document per line.")


def find_removal(
    path: str, prepared: Mapping[str, tuple[Path, dict]], block_size: int
) -> tuple[Removal, dict[str, int | list[str]]]:
    """(the removal of the documents that a file lists, what was found of them).

    prepared: {fingerprint: (prepared folder, its manifest)}. Found: how many names there are, how many are in the
    validation slices, which stay as they are, and the names that are nowhere. Raises Refusal for folders without an
    index of documents, a list of which nothing is there, and one that leaves too little.
    """
    names, documents, windows, held_out = read_list(path), set(), {}, 0
    absent = dict.fromkeys(names)
    for fingerprint, (folder, manifest) in prepared.items():
        removed: set[int] = set()
        for name, spans in DocumentIndex(folder, manifest).find(names).items():
            for span in spans:
                absent.pop(name, None)
                if span.split == "train":
                    documents.add((fingerprint, span.location))
                    # Window w holds tokens w * size to w * size + size, its last target included.
                    first = max(0, -(-span.text_first // block_size) - 1)
                    removed |= set(range(first, (span.last - 1) // block_size + 1))
                else:
                    held_out += 1
        count = count_windows(manifest, "train", block_size)
        windows[fingerprint] = sorted(window for window in removed if window < count)
        check_left(windows[fingerprint], count, folder)
    if not documents:
        where = "only in validation slices, which are never trained on" if held_out else "in none of the tokens"
        raise Refusal(
            f"--without_documents {path}: its {len(names):,} documents are {where}, so there is nothing to leave out."
            " Names are ids, URLs, or FILE:ROW, as `python -m llama_lite trace` shows them."
        )
    found = {"names": len(names), "held_out": held_out, "absent": list(absent)}
    return Removal(len(documents), {name: one for name, one in windows.items() if one}), found


def read_removal(folder: Path, data: dict) -> Removal | None:
    """What a run does not read, from its folder; None for a run that reads everything. data: `identity["data"]` of the
    run. Raises Refusal where the folder does not say it.
    """
    if FIELD not in data:
        return None
    record = read_json(folder / FILE)
    if record and (found := Removal(**record)).identity() == data[FIELD]:
        return found
    raise Refusal(
        f"the run in {folder} left out {data[FIELD]['documents']:,} documents, and {folder / FILE}, which says where"
        " they were, is not there or was altered: only the folder that the run was trained in has it."
    )


def removal_lines(removal: Removal, found: dict) -> list[str]:
    """What a removal leaves out, for a person. found: as `find_removal` returns it."""
    identity = removal.identity()
    lines = [
        f"without   {identity['documents']:,} listed documents: {identity['windows']:,} windows that hold them are"
        " replaced by others"
    ]
    if found["held_out"]:
        lines.append(
            f"WARNING   {found['held_out']:,} listed documents are in validation slices, which stay: the model is"
            " measured on them, and never trained."
        )
    if absent := found["absent"]:
        shown = ", ".join(absent[:EXAMPLES]) + (" ..." if len(absent) > EXAMPLES else "")
        lines.append(f"WARNING   {len(absent):,} of {found['names']:,} names are no document of these tokens: {shown}")
    return lines


class Replacement:
    """Which window is read in place of each that is removed, in one folder. windows: those that are removed. seed: of
    the order. count: windows that can be drawn. Raises Refusal where too few are left.
    """

    def __init__(self, windows: list[int], seed: int, fingerprint: str, count: int):
        self.removed, self.seed, self.fingerprint, self.count = frozenset(windows), seed, fingerprint, count
        self.drawn: tuple[object, dict[int, list[int]]] = (None, {})
        check_left(windows, count, fingerprint[:12])

    def window(self, window: int, position: int) -> int:
        """The window at a position whose order gives `window`. position: of the folder's own order."""
        tried = 0
        while window in self.removed:
            window = self._draw(position, tried)
            tried += 1
        return window

    def _draw(self, position: int, tried: int) -> int:
        digest = hashlib.sha256(f"without {self.seed} {self.fingerprint} {position} {tried}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.count

    def positions(self, window: int, train: TokenWindows) -> list[int]:
        """Every position at which a window is read, ascending: its own, unless it is removed, and those at which it
        was drawn.
        """
        own = [] if window in self.removed else train.ordered_positions(window)
        state = (tuple(train.starts), train.length)
        if self.drawn[0] != state:
            drawn: dict[int, list[int]] = {}
            for removed in self.removed:
                for position in train.ordered_positions(removed):
                    drawn.setdefault(self.window(removed, position), []).append(position)
            self.drawn = (state, drawn)
        return sorted(own + self.drawn[1].get(window, []))


def check_left(windows: list[int], count: int, folder: object) -> None:
    """Raise Refusal where too few of the `count` windows of a folder are left without `windows`."""
    removed = sum(window < count for window in windows)
    if removed > (1 - LEAST_LEFT) * count:
        raise Refusal(
            f"--without_documents: {removed:,} of the {count:,} windows of {folder} hold a listed document, which"
            " leaves too few. Remove the documents from the text and prepare it again."
        )


def exclude(train: TokenWindows | MixedWindows, removal: Removal) -> None:
    """Replace the windows of a removal in the windows of a run. Raises Refusal where too few are left."""
    for folder in train.folders if isinstance(train, MixedWindows) else [train]:
        if folder is not None and (windows := removal.windows.get(folder.fingerprint)):
            folder.replacement = Replacement(windows, folder.order.seed, folder.fingerprint, folder.epoch_windows)


def first_use(train: TokenWindows | MixedWindows, removal: Removal) -> int | None:
    """The first position of a run at which one of the windows of a removal is read; None where none is."""
    if isinstance(train, MixedWindows):
        places = (
            train.positions_of(number, window)
            for number, folder in enumerate(train.folders)
            if folder is not None
            for window in removal.windows.get(folder.fingerprint, ())
        )
    else:
        places = (train.positions_of(window) for window in removal.windows.get(train.fingerprint, ()))
    return min((found[0] for found in places if found), default=None)
