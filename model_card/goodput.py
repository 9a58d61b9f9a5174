"""Goodput: what share of a run's wall time was training steps, and what took the rest, from the run's events.

Events that carry `seconds` hold the wall time of the run up to them, by kind, over all of its sessions.
"""

from datetime import datetime

# steps: training steps of which the result is kept. saves, evaluations: while no step is made. restarts: starting
# again, and steps that were lost since the last checkpoint. waiting: no process of the run was there (stopped, or in a
# queue), but for a run that had finished. other: the first start, preparation of text, and what follows the last step.
KINDS = ("steps", "saves", "evaluations", "restarts", "waiting", "other")


def seconds_at(events: list[dict], step: int | None = None) -> tuple[dict, float] | None:
    """({kind: seconds}, time in seconds since 1970) of the last event that carries them, of a `step` at most; None
    where there is none.
    """
    for event in reversed(events):
        if "seconds" in event and (step is None or event["step"] <= step):
            return {kind: float(event["seconds"].get(kind, 0)) for kind in KINDS}, time_of(event)
    return None


def time_of(event: dict) -> float:
    """The time of an event in seconds since 1970."""
    return datetime.fromisoformat(event["time"]).timestamp()


def percentage(seconds: dict) -> float:
    """Steps in percent of the wall time."""
    return 100 * seconds["steps"] / (sum(seconds.values()) or 1.0)


def rest(seconds: dict) -> str:
    """What was not steps, in words."""
    return ", ".join(f"{kind} {seconds[kind]:,.0f} s" for kind in KINDS[1:])
