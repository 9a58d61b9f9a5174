"""The wall time of a run by what it was spent on: steps, saves, evaluations, restarts, waiting. `model_card/goodput.py`
says what each kind is, and reads it back from the events.
"""

import contextlib
import time

from model_card import goodput
from model_card.goodput import KINDS

# events of a session that trains; others can be of a command that was refused, or published what had waited
OF_SESSIONS = ("started", "resumed", "saved", "spike", "trained", "finished", "interrupted", "unhealthy")


class WallClock:
    """Adds wall time to one kind at any moment, so that the kinds add up to the whole.

    seconds: {kind: seconds} of what was before. The first kind is `other`.
    """

    def __init__(self, seconds: dict | None = None):
        self.seconds = dict.fromkeys(KINDS, 0.0) | (seconds or {})
        self.kind, self.since = "other", time.monotonic()

    def switch(self, kind: str) -> str:
        """From now on, time is of this kind. Returns the kind before."""
        now, before = time.monotonic(), self.kind
        self.seconds[before] += now - self.since
        self.kind, self.since = kind, now
        return before

    @contextlib.contextmanager
    def during(self, kind: str):
        """The time of a block is of this kind."""
        before = self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    def read(self) -> dict[str, float]:
        """{kind: seconds} until now, to a millisecond."""
        self.switch(self.kind)
        return {kind: round(seconds, 3) for kind, seconds in self.seconds.items()}

    def recorded(self) -> dict:
        """What an event says: `seconds` by kind, and the two numbers of the card, goodput in percent and the total."""
        seconds = self.read()
        return {
            "seconds": seconds,
            "goodput": round(goodput.percentage(seconds), 2),
            "wall_seconds": round(sum(seconds.values()), 3),
        }

    def logged(self) -> dict[str, float]:
        """What a log entry says: `goodput` in percent, and seconds, all since the run began."""
        recorded = self.recorded()
        seconds = recorded.pop("seconds")
        names = {"saves": "save", "evaluations": "evaluation", "restarts": "restart", "waiting": "waiting"}
        return {**recorded, **{f"{name}_seconds": seconds[kind] for kind, name in names.items()}}


def seconds_before(events: list[dict], step: int, since_start: float, last_seen: float | None) -> dict[str, float]:
    """{kind: seconds} of a run up to now, where a session is about to train from `step`.

    events: of earlier sessions. since_start: seconds since this session's process began. last_seen: when the session
    before was last seen, in seconds since 1970. What was done after the checkpoint is lost, and counts as a restart.
    Time after the run's end, until it is made longer, counts as nothing; what is published after a session, and
    commands that were refused, do not make it longer.
    Sessions of earlier versions, whose events carry no seconds, are not counted.
    """
    before = goodput.seconds_at(events, step)
    if before is None:
        return dict.fromkeys(KINDS, 0.0) | {"other": since_start}
    seconds, then = before
    passed = max(0.0, time.time() - then)
    began = time.time() - min(since_start, passed)
    events = [event for event in events if event["event"] in OF_SESSIONS]
    ended = max([then, *([last_seen] if last_seen else []), *(goodput.time_of(event) for event in events[-1:])])
    waiting = max(0.0, began - ended)
    starts_and_ends = [event["event"] for event in events if event["event"] in ("started", "resumed", "finished")]
    if starts_and_ends[-1:] != ["finished"]:
        seconds["waiting"] += waiting
    seconds["restarts"] += passed - waiting
    return seconds


def line(seconds: dict) -> str:
    """The line about goodput at the end of a run."""
    return (
        f"goodput   {goodput.percentage(seconds):.1f} % of {sum(seconds.values()):,.0f} s were training steps whose"
        f" result is kept; {goodput.rest(seconds)}"
    )
