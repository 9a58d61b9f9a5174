"""The heartbeat file of each rank, and the end of a run whose steps stop.

A rank that hangs in a collective does not end by itself, and would keep its machines until their time limit.
"""

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from pathlib import Path

from transformers import TrainerCallback

from ..distributed import RANK, WORLD_SIZE, has_process_group
from ..exit import EXIT_CODES, record_status
from ..files import read_json, write_json
from ..machine.parallelism import layout
from ..run_folder import RunFolder
from .goodput import WallClock

HEARTBEATS, FLIGHT_RECORDER = "heartbeat", "flight_recorder"  # folders of a run
TICK, WRITE_EVERY = 1.0, 10.0  # seconds between two looks, and between two heartbeats
SLOWEST = 5  # a step may take as long as this many of the slowest before
FIRST_WORD = 10.0  # seconds that other ranks leave rank 0 to record the end
ALONE = 30.0  # seconds that a rank of a sharded model, which failed alone, waits for the others to fail, too
end_process = os._exit  # a thread that hangs in a collective cannot be ended otherwise


class Watchdog(TrainerCallback):
    """A callback that notes each micro-batch, and a thread that looks for the next one.

    timeout: seconds without a micro-batch, in training steps, after which the run ends (0: never). The thread counts
    only time of the kind `steps` of `clock`, and none before the first micro-batch has ended, which may compile:
    evaluations, saves, and what comes before and after training, may take as long as they do. It counts its own ticks,
    so that a process that was stopped, or a machine that slept, is not taken for one that hangs.
    """

    def __init__(self, run: RunFolder, timeout: float, clock: WallClock):
        self.run, self.timeout, self.clock = run, timeout, clock
        self.path = Path(run.path) / HEARTBEATS / f"rank-{RANK:05d}.json"
        self.step, self.beats, self.last, self.slowest = run.step, 0, None, 0.0
        self.idle, self.seen = 0.0, 0
        self.failed_alone, self.part, self.parts, self.waited = False, None, 0, 0.0
        self.sharded, self.store = layout().sharding == "fsdp2", None
        self.done, self.thread = threading.Event(), None

    # ---- the training thread ----

    def __enter__(self):
        if has_process_group():
            from torch.distributed import PrefixStore, distributed_c10d

            # its own connection: that of the training thread may be waiting
            self.store = PrefixStore("watchdog", distributed_c10d._get_default_store().clone())
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.done.set()
        self.thread.join()

    def on_substep_end(self, args, state, control, **kwargs):
        """A micro-batch has ended."""
        self._beat(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        """A step has ended; saving and evaluating follow."""
        self._beat(state.global_step)

    def _beat(self, step: int) -> None:
        now = time.monotonic()
        self.slowest = max(self.slowest, now - max(self.last or 0.0, self.clock.since))
        self.step, self.last, self.beats = step, now, self.beats + 1

    @contextlib.contextmanager
    def attempting(self, part: str):
        """In this block all ranks make a part of an evaluation, and tell each other at its end whether it failed."""
        self.parts, self.waited, self.part = self.parts + 1, 0.0, part
        try:
            yield
        finally:
            self.part, self.failed_alone = None, False

    def fail_alone(self, reason: str) -> None:
        """This rank's part of an evaluation failed. The others may wait for it in a collective: from now on its wait
        for them is watched as steps are, and where the model is sharded, all ranks end after ALONE seconds.
        """
        self.failed_alone = True
        if self.store is not None:
            self.store.set(self._key(), f"rank {RANK} failed: {reason}")

    def _key(self) -> str:
        """Where the failure of the current part is, the same on every rank."""
        return f"failed/{self.parts}"

    # ---- the watching thread ----

    def _watch(self) -> None:
        last, written = time.monotonic(), None
        while True:
            now = time.monotonic()
            if written is None or now - written >= WRITE_EVERY:
                self._write()
                written = now
            if reason := self._lone_failure(now - last) or (self.is_stuck(now - last) and self._stuck()):
                self._end(reason)
                return
            last = now
            if self.done.wait(TICK):
                self._write()
                return

    def is_stuck(self, elapsed: float) -> bool:
        """Whether the steps have stopped. elapsed: seconds since the look before."""
        watched = self.failed_alone or (self.beats and self.clock.kind == "steps")
        if not self.timeout or not watched or self.beats != self.seen:
            self.idle, self.seen = 0.0, self.beats
            return False
        self.idle += min(elapsed, 2 * TICK)
        return self.idle > max(self.timeout, SLOWEST * self.slowest)

    def _lone_failure(self, elapsed: float) -> str | None:
        """Why the run ends, where a rank of a sharded model failed in an evaluation and this one has waited for ALONE
        seconds since; None else. elapsed: seconds since the look before.

        A forward pass of a sharded model needs all ranks. Of other models each rank computes alone, and meets the
        others at the end of the part, whenever that is.
        """
        part = self.part
        if not self.sharded or self.store is None or part is None or not self.store.check([self._key()]):
            return None
        self.waited += min(elapsed, 2 * TICK)
        if self.waited < ALONE:
            return None
        return (
            f"{part} of the evaluation after step {self.step}: {self.store.get(self._key()).decode()}. The other ranks"
            " wait for it in a collective, so all end; the last checkpoint is untouched. Run the same command again: it"
            " begins with the evaluation."
        )

    def _stuck(self) -> str:
        """Why a run ends whose steps have stopped."""
        self._write()  # its own heartbeat is one of those that are compared
        return (
            f"no progress for {self.idle:.0f} s after step {self.step} (--step_timeout {self.timeout:g}):"
            f" {self._behind()}; the last checkpoint is untouched. Run the same command again to go on."
        )

    def _write(self) -> None:
        """The heartbeat: replaced, and not flushed to disk. A disk that is full or away does not end the run."""
        record = {
            "rank": RANK,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": self.step,
            "doing": self.clock.kind,
            "time": time.time(),
        }
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(exist_ok=True)
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
            os.replace(temporary, self.path)

    def _end(self, reason: str) -> None:
        """Record where each thread and rank is, and end this process with the status `unhealthy`."""
        began = time.time()
        with contextlib.suppress(OSError, ValueError):  # a stream without a file, as in notebooks
            faulthandler.dump_traceback(all_threads=True)
        self._dump_collectives()
        if RANK > 0:
            time.sleep(FIRST_WORD)
        status = self.run.path / "status.json"
        with contextlib.suppress(OSError):  # of a full disk, or of ranks that write the same at the same moment
            if RANK == 0:
                self.run.ends("unhealthy", reason)
            elif not status.exists() or status.stat().st_mtime < began - TICK:  # rank 0 is not even able to say it
                record = {"status": "unhealthy", "code": EXIT_CODES["unhealthy"], "step": self.step, "reason": reason}
                write_json(status, record)
        os.write(2, f"\n{f'rank {RANK}, ' if RANK else ''}unhealthy: {reason}\n".encode())
        record_status(EXIT_CODES["unhealthy"])
        end_process(EXIT_CODES["unhealthy"])

    def _behind(self) -> str:
        """The ranks that the heartbeats show behind the others."""
        found = [one for one in read_heartbeats(self.run.path) if one["rank"] < WORLD_SIZE]  # not of a larger layout
        last = max((one["step"] for one in found), default=self.step)
        behind = [f"rank {one['rank']} on {one['host']} at step {one['step']}" for one in found if one["step"] < last]
        return f"behind step {last} are {', '.join(behind[:8])}" if behind else f"all ranks are at step {last}"

    def _dump_collectives(self) -> None:
        """What torch's flight recorder knows of this rank's collectives, into the run folder."""
        if not has_process_group():
            return
        from torch._C._distributed_c10d import _dump_fr_trace_json

        with contextlib.suppress(OSError, RuntimeError):
            folder = self.run.path / FLIGHT_RECORDER
            folder.mkdir(exist_ok=True)
            dump = _dump_fr_trace_json(includeCollectives=True, onlyActive=False)
            (folder / f"rank-{RANK:05d}.json").write_bytes(dump if isinstance(dump, bytes) else dump.encode())


def read_heartbeats(run: Path) -> list[dict]:
    """The last heartbeat of each rank of a run, by rank."""
    records = [read_json(path) for path in sorted((Path(run) / HEARTBEATS).glob("rank-*.json"))]
    return [record for record in records if record]


def last_seen(run: Path) -> float | None:
    """When any rank of a run was last seen, in seconds since 1970; None where there are no heartbeats."""
    return max((record["time"] for record in read_heartbeats(run)), default=None)


def record_collectives(run: Path) -> None:
    """Let torch's flight recorder write its dumps into the run folder, unless the environment names a place. For
    several processes; one has no collectives.
    """
    if WORLD_SIZE == 1:
        return
    (Path(run) / FLIGHT_RECORDER).mkdir(exist_ok=True)
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        os.environ.setdefault(name, str(Path(run).absolute() / FLIGHT_RECORDER / "nccl-rank-"))
