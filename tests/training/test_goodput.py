"""What a run says of its wall time: kinds that add up, over all sessions."""

import time

import pytest

from llama_lite.training import goodput
from llama_lite.training.goodput import WallClock, line, seconds_before
from model_card.goodput import KINDS, percentage, rest, seconds_at


def at(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def test_each_moment_is_of_one_kind(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])
    clock = WallClock({"waiting": 5.0})
    for kind, seconds in (("steps", 8.0), ("other", 2.0)):
        clock.switch(kind)
        now[0] += seconds
    with pytest.raises(KeyError), clock.during("evaluations"):
        now[0] += 3.0
        with clock.during("saves"):
            now[0] += 1.0
            assert clock.read()["saves"] == 1.0  # the running part counts
        raise KeyError
    now[0] += 1.0
    expected = {"steps": 8.0, "saves": 1.0, "evaluations": 3.0, "restarts": 0.0, "waiting": 5.0, "other": 3.0}
    assert clock.read() == expected and clock.kind == "other"
    logged = clock.logged()
    assert logged["goodput"] == 40.0 and logged["wall_seconds"] == 20.0
    assert [logged[f"{name}_seconds"] for name in ("save", "evaluation", "restart", "waiting")] == [1.0, 3.0, 0.0, 5.0]


def test_what_was_lost_is_a_restart_and_what_nobody_ran_is_waiting(monkeypatch):
    """Killed 300 s after its last save, and started again 100 s later; the start takes 40 s."""
    begin = 1_800_000_000
    monkeypatch.setattr(goodput.time, "time", lambda: begin + 1440.0)
    kept = {**dict.fromkeys(KINDS, 0.0), "steps": 900.0, "saves": 60.0, "other": 40.0}
    events = [
        {"event": "started", "step": 0, "time": at(begin), "seconds": {"other": 40.0}},
        {"event": "saved", "step": 5, "time": at(begin + 500), "seconds": {"steps": 460.0, "other": 40.0}},
        {"event": "saved", "step": 10, "time": at(begin + 1000), "seconds": kept},
        {"event": "spike", "step": 11, "time": at(begin + 1100)},
    ]
    found = seconds_before(events, 10, since_start=40.0, last_seen=begin + 1300.0)
    assert found == {**kept, "restarts": 340.0, "waiting": 100.0}
    # without a heartbeat, the last event is the last that is known of the session before
    assert seconds_before(events, 10, 40.0, None) == {**kept, "restarts": 140.0, "waiting": 300.0}
    # from step 5 again: what came after it is lost
    older = seconds_before(events, 5, 40.0, begin + 1300.0)
    assert older["steps"] == 460.0 and older["restarts"] == 800.0 + 40.0 and older["waiting"] == 100.0
    assert sum(found.values()) == sum(older.values()) == 1440.0
    # a run that had finished, and is made longer after a command that was refused
    finished = [*events[:3], {"event": "finished", "step": 10, "time": at(begin + 1010)}]
    refused = {"event": "refused", "step": 0, "time": at(begin + 1390)}
    published = {"event": "published", "step": 10, "time": at(begin + 1380)}  # by --publish_only
    for ends in (finished, [*finished, refused], [*finished, published]):
        assert seconds_before(ends, 10, 40.0, None) == {**kept, "restarts": 50.0}
    for outside in (refused, published):
        assert seconds_before([*events, outside], 10, 40.0, begin + 1300.0) == found
    events = [{"event": "saved", "step": 10, "time": at(begin)}]  # of a version that recorded no seconds
    assert seconds_at(events) is None and seconds_before(events, 10, 40.0, None)["other"] == 40.0


def test_a_finished_run_says_it_in_log_and_card(whole_run):
    """The log entry, the event of the end and the card agree, and its kinds make the whole wall time."""
    from llama_lite.files import read_jsonl

    events = read_jsonl(whole_run / "events.jsonl")
    seconds, _ = seconds_at(events)
    assert [event["event"] for event in events if "seconds" in event] == ["started", *["saved"] * 3, "trained"]
    assert all(seconds[kind] > 0 for kind in ("steps", "saves", "evaluations", "other"))
    assert seconds["restarts"] == seconds["waiting"] == 0
    logged = [entry for entry in read_jsonl(whole_run / "log.jsonl") if "goodput" in entry]
    assert [entry["step"] for entry in logged] == [3, 6, 9, 12]
    assert logged[0]["save_seconds"] == 0 < logged[-1]["save_seconds"] <= seconds["saves"]
    assert 0 < logged[-1]["goodput"] < 100 and logged[-1]["wall_seconds"] <= sum(seconds.values())
    card = (whole_run / "README.md").read_text(encoding="utf-8")
    total = f"{round(sum(seconds.values())):,}"
    rows = [line for line in card.splitlines() if line.startswith(("| wall time", "| of it"))]
    assert rows == [  # one wall time, and what its parts are of
        f"| wall time, starts and waiting included | {total} s |",
        f"| of it training steps whose result is kept (goodput) | {percentage(seconds):.1f} % |",
        f"| of it the rest | {rest(seconds)} |",
    ]
    assert line(seconds).startswith(f"goodput   {percentage(seconds):.1f} % of {total} s were training steps whose")
