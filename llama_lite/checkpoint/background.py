"""The thread that writes checkpoints while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """One thread that does jobs in the order in which they were submitted. After one has failed, it does no more.

    Jobs call no torch operation: a team of OpenMP threads of their own would take the cores from the training's.
    Python waits for the thread before it exits.
    """

    def __init__(self):
        self.failure: Exception | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._last: Future | None = None

    def submit(self, job: Callable, *args) -> None:
        """Do `job(*args)` after the jobs that were submitted before."""
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._last = self._pool.submit(self._do, job, *args)

    def _do(self, job: Callable, *args) -> None:
        if self.failure is None:
            try:
                job(*args)
            except Exception as error:  # whatever it is, the training learns of it, and ends
                self.failure = error

    @property
    def busy(self) -> bool:
        """Whether a job is not done yet. False means that all are done, or that one has failed."""
        return self._last is not None and not self._last.done()

    def join(self) -> None:
        """Return when all jobs are done; what failed is in `failure`. A signal's handler runs meanwhile."""
        if self._last is not None:
            self._last.result()
