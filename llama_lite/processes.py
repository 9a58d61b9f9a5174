"""Worker processes, how many there are, and the signals that stop them."""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from .cgroups import cpu_limit
from .errors import Interrupted, Refusal


def available_cores() -> int:
    """Number of cores that this process may use: those that its affinity allows (of a Slurm step, taskset), or as many
    as the CPU quota of its cgroups amounts to (docker --cpus, Kubernetes), rounded up.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_limit())))


def cores_for_a_process() -> int:
    """`available_cores`, divided by the processes that a launcher started on this machine."""
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def seconds_since_start() -> float:
    """Seconds since the command began: since this process started, or the launcher of this script before it."""
    import psutil

    process, start_time = psutil.Process(), psutil.Process().create_time()
    try:
        script = Path(sys.argv[0]).name
        parents = [
            parent for parent in process.parents() if any(Path(word).name == script for word in parent.cmdline())
        ]
        start_time = min([start_time, *(parent.create_time() for parent in parents if "python" in parent.name())])
    except psutil.Error:
        pass
    return max(0.0, time.time() - start_time)


@contextlib.contextmanager
def worker_pool(count: int, initializer: Callable, *arguments):
    """A pool of `count` forked processes, each started with `initializer(*arguments)`. None outlives the block. Raises
    Refusal where one was killed.
    """
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), initializer, arguments)
    try:
        yield pool
    except BaseException as error:
        for child in multiprocessing.active_children():
            child.terminate()
        # A worker may have ended while it sent a result. This process holds the same pipe open for writing, so the
        # pool's own thread would wait for the rest for ever.
        pool._result_queue._writer.close()
        if isinstance(error, BrokenProcessPool):
            raise Refusal(
                f"one of {count} worker processes was killed, usually because memory ran out: lower --prepare_workers"
                " and run the same command again; prepared data is kept."
            ) from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def die_with_parent(signal_number: int) -> None:
    """Ask Linux to send this process a signal when the process that started it ends (nothing elsewhere)."""
    import ctypes

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal_number))  # PR_SET_PDEATHSIG of linux/prctl.h


SECOND_SIGNAL_AFTER = 2.0  # seconds: one Ctrl-C can arrive twice, from the terminal and from the launcher


class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 request an orderly end; a second SIGTERM or SIGINT, 2 s or more later, ends at once.

    A launcher that dies sends SIGUSR1 (parent-death signal), which never counts as a second signal. At first, and after
    `end_at_once`, the first signal raises Interrupted where it arrives. After `end_after` it sets the flag `received`,
    which all ranks read together after each step of training. Forked processes (workers of pools) ignore SIGINT, end on
    SIGTERM and never outlive this process. on_stop: called in the handler of the first signal.
    """

    def __init__(self, on_stop: Callable[[], None]):
        self.on_stop, self.received, self.first = on_stop, None, 0.0
        self.end_at_once("before the first step; prepared data is kept.")
        parent = os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)
        os.register_at_fork(after_in_child=_obey_parent)
        die_with_parent(signal.SIGUSR1)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGUSR1)  # the parent died before the request

    def end_at_once(self, kept: str) -> None:
        """From now on a signal raises Interrupted. kept: when it came and what is kept, for the message."""
        self.at_once, self.message = True, kept

    def end_after(self, first: str) -> None:
        """From now on a signal sets `received`. first: what is done before the end, for the line that is printed."""
        self.at_once, self.message = False, first

    def _handle(self, number, frame):
        if self.received is None:
            self.received, self.first = signal.Signals(number).name, time.monotonic()
            self.on_stop()
            if self.at_once:
                raise Interrupted(f"{self.received} {self.message} Run the same command again.")
            os.write(2, f"\nstopping: {self.message}\n".encode())
        elif number != signal.SIGUSR1 and time.monotonic() - self.first >= SECOND_SIGNAL_AFTER:
            os.write(2, b"\nsecond signal: ending at once; the last checkpoint is untouched\n")
            os._exit(128 + number)


def _obey_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)
