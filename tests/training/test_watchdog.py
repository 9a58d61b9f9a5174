"""A run whose steps stop ends with status 3, and nothing that may take long ends it."""

import os
import threading
import types

import pytest

from llama_lite.files import read_json, read_jsonl
from llama_lite.run_folder import RunFolder
from llama_lite.training import goodput, watchdog
from llama_lite.training.goodput import WallClock
from llama_lite.training.watchdog import Watchdog, last_seen


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """(a Watchdog of 100 seconds, function that lets seconds pass and returns whether it saw the steps stop)."""
    now = [1000.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    dog = Watchdog(RunFolder(tmp_path), 100.0, WallClock())

    def wait(seconds: float) -> bool:
        stuck = False
        for _ in range(round(seconds)):
            now[0] += 1.0
            stuck = stuck or dog.is_stuck(1.0)
        return stuck

    dog.now = now
    return dog, wait


def beat(dog: Watchdog, step: int) -> None:
    dog.on_substep_end(None, types.SimpleNamespace(global_step=step), None)


def test_only_steps_that_stop_end_a_run(watch):
    dog, wait = watch
    assert not wait(5000)  # preparation, before training
    dog.clock.switch("steps")
    assert not wait(15)  # the first micro-batch, which compiles
    beat(dog, 1)
    assert not wait(95)
    beat(dog, 1)  # the second of the same step
    for kind in ("saves", "evaluations", "other"):
        with dog.clock.during(kind):
            assert not wait(5000), kind
        assert not wait(95), kind
        beat(dog, 2)
    dog.slowest = 0.0
    assert not wait(101) and wait(1)  # the first look after a micro-batch sees it, and counts nothing
    assert dog.idle == 101


def test_slow_steps_a_stopped_process_and_0_end_nothing(watch):
    dog, wait = watch
    dog.clock.switch("steps")
    assert not wait(60)
    beat(dog, 1)  # the slowest took 60 seconds: the next may take five times as long
    assert not wait(301) and wait(1)
    beat(dog, 2)
    dog.now[0] += 10_000  # stopped, or asleep, in one tick
    assert not dog.is_stuck(10_000)
    dog.timeout = 0
    assert not wait(5000)


def test_a_rank_that_failed_alone_does_not_wait_for_ever(watch):
    """The others wait for it in a collective of the evaluation."""
    dog, wait = watch
    with dog.clock.during("evaluations"):
        assert not wait(5000)
        with dog.attempting("Samples"):
            assert not wait(5000)
            dog.fail_alone("no")
            assert not wait(100) and wait(1)
        assert not wait(5000)


def test_a_lone_failure_of_a_sharded_model_ends_every_rank_that_waits(watch, monkeypatch):
    from torch.distributed import HashStore

    dog, _ = watch
    other, store = Watchdog(dog.run, 0, dog.clock), HashStore()
    monkeypatch.setattr(watchdog, "RANK", 1)
    for one in (dog, other):
        one.store, one.sharded, one.step = store, True, 6

    def look(one: Watchdog, seconds: int) -> str | None:
        return next(filter(None, (one._lone_failure(1.0) for _ in range(seconds))), None)

    with dog.attempting("validation loss"), other.attempting("validation loss"):
        assert look(dog, 5000) is None
        dog.fail_alone("CUDA out of memory")
        reasons = [(look(one, int(watchdog.ALONE) - 1), look(one, 1)) for one in (dog, other)]
        assert [before for before, _ in reasons] == [None, None]
        for _, reason in reasons:
            assert reason.startswith(
                "validation loss of the evaluation after step 6: rank 1 failed: CUDA out of memory. "
            )
    with other.attempting("Samples"):  # they all came to the end of the part, and the next one is another
        assert look(other, 5000) is None
        other.sharded = False
        dog.parts = other.parts
        dog.fail_alone("no")
        assert look(other, 5000) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_cannot_write_the_status_ends_even_so(watch, tmp_path, monkeypatch, capfd, rank):
    """A full disk, or another rank that has just renamed the same temporary file."""
    dog, _ = watch
    ends = []

    def fails(*args):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(watchdog, "RANK", rank)
    monkeypatch.setattr(watchdog, "FIRST_WORD", 0)
    monkeypatch.setattr(watchdog, "write_json", fails)
    monkeypatch.setattr(dog.run, "ends", fails)
    monkeypatch.setattr(watchdog, "record_status", ends.append)
    monkeypatch.setattr(watchdog, "end_process", ends.append)
    dog._end("no progress")
    assert ends == [3, 3] and "unhealthy: no progress" in capfd.readouterr().err


class Ended(BaseException):
    """Instead of the end of this process."""


def test_a_run_that_hangs_ends_with_status_3(pretrain, settings, tmp_path, monkeypatch, capfd):
    """In the fourth step; its heartbeat says where."""
    from llama_lite.training.trainer import PretrainTrainer

    ended, codes, training_step = threading.Event(), [], PretrainTrainer.training_step

    def hanging(self, *args, **kwargs):
        if self.state.global_step == 3:
            assert ended.wait(300)
            raise Ended
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(PretrainTrainer, "training_step", hanging)
    monkeypatch.setattr(watchdog, "TICK", 0.02)
    monkeypatch.setattr(watchdog, "SLOWEST", 1)
    monkeypatch.setattr(watchdog, "end_process", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setenv("EXIT_STATUS_FILE", str(tmp_path / "status"))
    run = tmp_path / "run"
    with pytest.raises(Ended):
        pretrain(run, step_timeout=0.2, save_steps=2)
    status = read_json(run / "status.json")
    assert codes == [3] and (status["status"], status["code"], status["step"]) == ("unhealthy", 3, 3)
    assert "no progress for" in status["reason"] and "all ranks are at step 3" in status["reason"]
    assert (tmp_path / "status").read_text() == "3\n" and (run / "checkpoint-2").is_dir()
    heartbeat = read_json(run / "heartbeat/rank-00000.json")
    assert (heartbeat["rank"], heartbeat["step"], heartbeat["doing"], heartbeat["pid"]) == (0, 3, "steps", os.getpid())
    assert last_seen(run) == heartbeat["time"]
    assert "hanging" in capfd.readouterr().err  # where each thread is
    assert [event["event"] for event in read_jsonl(run / "events.jsonl")][-1] == "unhealthy"


def test_the_ranks_that_are_behind_are_named(watch, tmp_path, monkeypatch):
    dog, _ = watch
    monkeypatch.setattr(watchdog, "WORLD_SIZE", 3)
    for rank, step in enumerate((7, 6, 7, 2)):  # the last is of an earlier start with more processes
        monkeypatch.setattr(watchdog, "RANK", rank)
        other = Watchdog(RunFolder(tmp_path), 100.0, WallClock())
        other.step = step
        other._write()
    assert dog._behind() == f"behind step 7 are rank 1 on {watchdog.socket.gethostname()} at step 6"
