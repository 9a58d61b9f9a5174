"""In which order a run read its data, over all of its starts, from the records in its folder."""

import dataclasses
from pathlib import Path

from ..data.document_reads import OrderStretch
from ..data.run_windows import weights_of
from ..files import read_jsonl


@dataclasses.dataclass(frozen=True)
class Spike:
    """A spike of the loss: its event, and the stretch of the run that it was in."""

    event: dict
    stretch: OrderStretch


@dataclasses.dataclass(frozen=True)
class ReadingOrder:
    """The stretches of a run that count, without steps that were made again; the last step reached; the spikes of all
    starts.
    """

    stretches: list[OrderStretch]
    reached: int
    spikes: list[Spike]

    def up_to(self, step: int) -> "ReadingOrder":
        """The order without what came after a step."""
        stretches = [
            dataclasses.replace(stretch, last=min(step, stretch.last))
            for stretch in self.stretches
            if stretch.first <= step
        ]
        spikes = [spike for spike in self.spikes if spike.event["at_step"] <= step]
        return ReadingOrder(stretches, min(step, self.reached), spikes)


def reading_order(folder: Path, run: dict) -> ReadingOrder:
    """The order in which a run read its data. folder, run: of the run, and its `run.json`.

    Every start counts from the step that it began at; what an earlier start did beyond that step was lost. A start that
    changed the data, the order or its seed, or began the order again, begins a new stretch.
    """
    events = read_jsonl(Path(folder) / "events.jsonl")
    current = _Start(1, run["identity"]["data"], _first_history(run["identity"]["data"], 0))
    starts, spikes, changed, begun = [current], [], {}, 0
    for event in events:
        if event["event"] == "changed" and event.get("kind") == "data":
            changed = {name: new for name, (_, new) in event["fields"].items()}
        elif event["event"] in ("started", "resumed"):
            begun = event["step"]
            current = _next_start(starts, event, changed, run["identity"]["data"])
            changed = {}
        elif event["event"] == "spike":
            last = max(event["at_step"], current.first)
            spikes.append(Spike(event, OrderStretch(current.first, last, current.data, tuple(current.history))))
    log = read_jsonl(Path(folder) / "log.jsonl")
    after = events[max((i for i, event in enumerate(events) if event["event"] in ("started", "resumed")), default=0) :]
    steps = [
        entry.get("at_step", 0) if entry.get("event") == "spike" else entry.get("step", 0) for entry in after + log
    ]
    reached = max([begun, *steps])
    ends = [start.first - 1 for start in starts[1:]] + [reached]
    stretches = [
        OrderStretch(start.first, end, start.data, tuple(start.history))
        for start, end in zip(starts, ends, strict=True)
        if end >= start.first
    ]
    return ReadingOrder(stretches, reached, spikes)


@dataclasses.dataclass
class _Start:
    """Steps from `first` on, until the next one."""

    first: int
    data: dict
    history: list[dict]


def _first_history(data: dict, data_start: int) -> list[dict]:
    """The history of the order of a run that begins with this data."""
    if "mixture" not in data:
        return [{"step": data_start}]
    return [{"step": 0, "weights": weights_of(data)}, *([{"step": data_start}] if data_start else [])]


def _next_start(starts: list[_Start], event: dict, changed: dict, first_data: dict) -> _Start:
    """The start that an event records; `starts` is cut where it began, and it is appended where its order is another.

    changed: {field: new value} of the data since the checkpoint.
    """
    step, data_start = event["step"], event.get("data_start", 0)
    while len(starts) > 1 and starts[-1].first > step:
        starts.pop()
    if step == 0:  # a run from no checkpoint, whose record `run.json` is
        starts[:] = [_Start(1, first_data, _first_history(first_data, 0))]
        return starts[-1]
    before = starts[-1]
    data = {name: value for name, value in {**before.data, **changed}.items() if value is not None}
    data = {name: value for name, value in data.items() if not name.startswith("model.")}
    if "mixture" not in data:
        history = [{"step": data_start}]
    else:
        history = list(before.history)
        if "mixture" not in before.data:
            history = _first_history(
                {"mixture": {"": {"data": before.data["data"], "weight": 1.0}}}, history[0]["step"]
            )
        if weights_of(before.data) != weights_of(data):
            history.append({"step": step, "weights": weights_of(data)})
        if data_start == step:
            history.append({"step": step})
    if (data, history) != (before.data, before.history):
        # A run that was begun elsewhere can have begun its order again before the step at which it was taken over.
        first = data_start + 1 if data == before.data and 0 < data_start < step else step + 1
        starts.append(_Start(first, data, history))
    return starts[-1]


def order_of_checkpoint(data: dict, step: int, progress: dict) -> ReadingOrder:
    """The order of a run up to a checkpoint. data: `identity["data"]`; progress: `progress.json` of the checkpoint; {}
    where it is not known, and the order is taken to have begun at step 0.
    """
    first = _first_history(data, progress.get("data_start", 0))
    history = tuple(progress.get("order_history") or first)
    before = []
    if "mixture" not in data and (start := history[0]["step"]):
        before = [OrderStretch(1, start, data, ({"step": 0},))]
    return ReadingOrder([*before, OrderStretch(before[0].last + 1 if before else 1, step, data, history)], step, [])
