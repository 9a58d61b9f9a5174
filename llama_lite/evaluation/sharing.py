"""The (model, task) pairs of an evaluation, shared between the processes of a launch.

Every process computes with a whole model on a device of its own, and all write to one folder. A pair goes to the
process that takes it first. Each begins with another model, so that most models are loaded once, and at the end those
that are done help with what is left. The records are those of one process.
"""

from collections import Counter
from collections.abc import Callable

from ..distributed import RANK, WORLD_SIZE, raise_on_all_ranks
from ..errors import Interrupted

FAILED, DONE, WORK = "failed", "done", "work"  # keys of the store


class FailedElsewhere(Exception):
    """Another process has failed, so this one stops, too."""


class SharedWork:
    """Which pairs this process computes. With one process: all, in order. Create it on all ranks."""

    def __init__(self):
        self.store, self.counted, self.work = None, 0, 0.0
        self.sums: Counter[str] = Counter()  # of `add`, with one process
        self.records: dict[tuple[int, int], dict] = {}  # {(model, task), as positions: record} of this process
        if WORLD_SIZE > 1:
            from torch.distributed import PrefixStore, distributed_c10d

            self.store = PrefixStore("evaluation", distributed_c10d._get_default_store())

    def models(self, count: int) -> list[int]:
        """The positions of `count` models in the order in which this process looks at them."""
        first = RANK * count // WORLD_SIZE
        return [*range(first, count), *range(first)]

    def take(self, model: int, task: int) -> bool:
        """Whether this process computes the pair of these positions: nobody has taken it, and no process has failed."""
        if self.store is None:
            return True
        return not self.store.check([FAILED]) and self.store.add(f"{model}/{task}", 1) == 1

    def add(self, key: str) -> int:
        """Add one to the sum `key` of all processes; returns it."""
        if self.store is not None:
            return self.store.add(key, 1)
        self.sums[key] += 1
        return self.sums[key]

    def stop_if_failed(self) -> None:
        """Raise FailedElsewhere where another process has failed: its reason follows at the end of `run`."""
        if self.store is not None and self.store.check([FAILED]):
            raise FailedElsewhere

    def count(self, seconds: float = 0.0) -> tuple[int, float]:
        """Count a pair, which was forecast to take `seconds`, as done. Returns both sums over all processes."""
        if self.store is None:
            self.counted, self.work = self.counted + 1, self.work + seconds
        else:
            self.counted, self.work = self.store.add(DONE, 1), self.store.add(WORK, round(1000 * seconds)) / 1000
        return self.counted, self.work

    def run(self, compute: Callable[[], None]) -> list[dict]:
        """Call `compute`, which fills `records`; returns the records of all processes, models and tasks in order.
        Raises on all ranks what one of them raised; the others leave the pairs that they are at after the next batch
        (`stop_if_failed`).
        """
        error = None
        try:
            compute()
        except FailedElsewhere:
            pass
        except (Exception, KeyboardInterrupt, Interrupted) as raised:
            error = raised
            if self.store is not None:
                self.store.set(FAILED, "1")
        raise_on_all_ranks(error)
        found = [self.records]
        if self.store is not None:
            import torch.distributed as dist

            from ..distributed import waiting_group

            found = [None] * WORLD_SIZE
            dist.all_gather_object(found, self.records, group=waiting_group())
        merged = {pair: record for part in found for pair, record in part.items()}
        return [merged[pair] for pair in sorted(merged)]
