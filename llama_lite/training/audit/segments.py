"""Which steps are audited: the segments that a command names or draws, what they need, and what they cost."""

import dataclasses
import hashlib
import re

from ...checkpoint.identity import differences
from ...data import removal
from ...errors import Differs, Refusal
from ...formatting import duration, size
from ..trainer import TIMINGS
from .compare import lines_of
from .sources import FolderSource, HubSource, State

RANGE = re.compile(
    r"(?P<where>.+)@(?:step-)?(?P<first>\d+)(?:-(?P<n1>\d+))?\.\.(?:step-)?(?P<last>\d+)(?:-(?P<n2>\d+))?"
)
FORM = "WHERE@step-1000..step-2000, where WHERE is owner/name or the folder of a run"


@dataclasses.dataclass
class Segment:
    """Steps `first` + 1 to `last` of a run. start: its state at `first`; None at step 0. end: its state at `last`; None
    where there is none. holder: the state whose log and arguments count: the end, or the next state after it.
    """

    first: int
    last: int
    start: State | None
    end: State | None
    holder: State

    @property
    def tokens(self) -> int:
        """Tokens that its steps read."""
        return (self.last - self.first) * self.holder.tokens_per_step

    @property
    def has_end_state(self) -> bool:
        """Whether weights and moments at its end can be compared."""
        return self.end is not None and self.end.checkpoint is not None

    def recorded_lines(self) -> dict:
        """The lines of the published log in this segment (`compare.lines_of`): those after the start's own log."""
        return lines_of(self.holder.log[len(self.start.log) if self.start else 0 :], self.first, self.last)

    def changes(self) -> dict[str, dict[str, tuple]]:
        """What changed in the run's identity from the start to the state that holds the log."""
        there = self.holder.manifest["identity"]
        return differences(self.start.manifest["identity"] if self.start else there, there)


# ---- what a command asks for ----


def parse(text: str, is_random: bool) -> tuple[str, tuple[int, int] | None, tuple[int, int] | None]:
    """(where, (step, number of its tag) of the start, the same of the end) of `--audit`; None where segments are drawn.
    Raises Refusal.
    """
    match = RANGE.fullmatch(text)
    if is_random:
        if match:
            raise Refusal(f"--audit {text} names steps, and --audit_random draws them: give one of the two.")
        return text, None, None
    if match is None:
        raise Refusal(f"--audit {text}: give {FORM}; or draw segments with --audit_random 3 --audit_seed N.")
    first, last = (int(match["first"]), int(match["n1"] or 1)), (int(match["last"]), int(match["n2"] or 1))
    if first[0] >= last[0]:
        raise Refusal(f"--audit {text}: step {first[0]:,} is not before step {last[0]:,}: give the earlier one first.")
    return match["where"], first, last


def named_segment(source: HubSource | FolderSource, first: tuple[int, int], last: tuple[int, int]) -> Segment:
    """The segment between two steps. Raises Refusal, and Differs where the records of its states contradict each
    other.
    """
    start = None
    if first[0]:
        name = source.name_of(*first)
        if name is None:
            raise Refusal(f"--audit: {source.where} has no state at step {first[0]:,}, so nothing can begin there.")
        start = source.open(name)
        if start.checkpoint is None:
            raise Refusal(
                f"--audit: {source.where}@{start.name} was published without training state, so its steps cannot be"
                " made again. Choose another start, or step-0."
            )
    name = source.name_of(*last)
    end = source.open(name) if name else None
    return complete(source, Segment(first[0], last[0], start, end, end))


def complete(source: HubSource | FolderSource, segment: Segment) -> Segment:
    """The segment with the state that holds its log, and checked. Raises Refusal or Differs."""
    if not segment.has_end_state:
        later = (source.open(name) for name in source.later_names(segment.last))
        segment.holder = next((state for state in later if state.checkpoint), None)
        if segment.holder is None:
            raise Refusal(
                f"--audit: {source.where} has no training state at or after step {segment.last:,}, which would hold the"
                " log of these steps. Audit earlier ones."
            )
    for state in (segment.start, segment.end):
        if state and state.run != segment.holder.run:
            raise Refusal(
                f"--audit: {source.where} holds two runs: {state.name} is of {state.run}, {segment.holder.name} of"
                f" {segment.holder.run}. Audit steps of one run."
            )
    if removal.FIELD in segment.holder.manifest["identity"]["data"]:
        raise Refusal(
            f"--audit: {source.where} left out documents (--without_documents), and their list is not published, so its"
            " steps cannot be made again."
        )
    record = segment.holder.manifest.get("rerun")
    if segment.start is None and isinstance(record, dict) and record.get("init_from"):
        raise Refusal(
            f"--audit: this run began from other weights ({record['init_from']}), not from its seed: begin at its first"
            " published state."
        )
    check_logs(segment)
    return segment


def check_logs(segment: Segment) -> None:
    """Raise Differs where the log that the start holds is not the beginning of the later log."""
    if segment.start is None:
        return

    def without_times(entry: dict) -> dict:
        return {name: value for name, value in entry.items() if name not in TIMINGS}

    begin, later = segment.start.log, segment.holder.log
    for number, entry in enumerate(begin):
        if number >= len(later) or without_times(entry) != without_times(later[number]):
            raise Differs(
                f"step {entry['step']:,}: the log of {segment.holder.name} is not the continuation of that of"
                f" {segment.start.name}"
            )


# ---- drawing ----


def drawn_segments(
    source: HubSource | FolderSource, count: int, most_tokens: float | None, seed: int
) -> tuple[list[Segment], int]:
    """(`count` segments, in the order of their steps, of how many they were drawn). They lie between neighboring states
    with training state, and are ranked by a hash of the seed, the run's id and their start, so that anybody can draw
    the same. Raises Refusal or Differs.
    """
    states = [source.open(name) for name in source.later_names(0)]
    states = [state for state in states if state.checkpoint]
    if not states:
        raise Refusal(f"--audit {source.where}: no state of it has training state, so nothing can be made again.")
    from_seed = not (states[0].manifest.get("rerun") or {}).get("init_from")
    begins = [None, *states[:-1]] if from_seed else states[:-1]
    pairs = list(zip(begins, states[-len(begins) :], strict=True))

    def rank(pair: tuple[State | None, State]) -> str:
        return hashlib.sha256(f"{seed}|{pair[1].run}|{pair[0].step if pair[0] else 0}".encode()).hexdigest()

    chosen = sorted(sorted(pairs, key=rank)[:count], key=lambda pair: pair[1].step)
    return [complete(source, _shortened(*pair, most_tokens)) for pair in chosen], len(pairs)


def _shortened(start: State | None, end: State, most_tokens: float | None) -> Segment:
    """The segment between two states, cut to `most_tokens` at a logged step (the first one at least)."""
    first = start.step if start else 0
    segment = Segment(first, end.step, start, end, end)
    if most_tokens is None or segment.tokens <= most_tokens:
        return segment
    logged = sorted({step for step, _ in segment.recorded_lines() if step > first})
    within = [step for step in logged if (step - first) * end.tokens_per_step <= most_tokens]
    last = within[-1] if within else logged[0] if logged else end.step
    return Segment(first, last, start, end if last == end.step else None, end)


# ---- cost ----


def cost_lines(source: HubSource | FolderSource, segment: Segment, elsewhere: list[str]) -> list[str]:
    """What an audit of a segment reads, computes and compares, for the person who decides to run it. elsewhere: in what
    this machine differs from the run's.
    """
    lines = segment.recorded_lines()
    evaluations = sum(is_evaluation for _, is_evaluation in lines)
    states = [state for state in (segment.start, segment.end, segment.holder) if state]
    num_bytes = sum({state.name: source.num_bytes(state) for state in states}.values())
    seconds = recorded_seconds(segment)
    took = f"; the run needed {duration(seconds / 86400)} for them" if seconds and seconds > 3 else ""
    compared = f"{len(lines)} lines of the log" + (", weights and moments" if segment.has_end_state else "")
    found = [
        f"segment   steps {segment.first + 1:,} to {segment.last:,} of {source.where}: {segment.tokens:,} tokens,"
        f" {evaluations} evaluation{'s' if evaluations != 1 else ''}{took}"
        + (f"; {size(num_bytes)} are downloaded and verified" if num_bytes else "")
        + f"; {compared} are compared"
    ]
    if not segment.has_end_state:
        found.append(f"          there is no training state at step {segment.last:,}: logged values alone are compared")
    if elsewhere:
        found.append(
            f"          the run was made with another {', '.join(elsewhere)}: where bits differ, the steps are made a"
            " second time, with another micro-batch, for the noise"
        )
    return found


def recorded_seconds(segment: Segment) -> float | None:
    """Wall seconds of the run for the steps of a segment, by the lines of its log around it; None without times."""
    walls = {
        entry["step"]: entry["wall_seconds"]
        for entry in segment.holder.log
        if isinstance(entry.get("wall_seconds"), int | float) and entry["step"] <= segment.last
    }
    begin = max((step for step in walls if step <= segment.first), default=min(walls, default=0))
    end = max(walls, default=0)
    if end <= begin:
        return None
    return (walls[end] - walls[begin]) / (end - begin) * (segment.last - segment.first)
