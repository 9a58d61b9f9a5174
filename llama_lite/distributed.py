"""The processes of a launch: their rank, printing from rank 0, running on rank 0 alone, raising on all.

torch is imported only where the processes have a group."""

import os
import sys

from .errors import Interrupted, Refusal, Unhealthy, end_of, status_of

LAUNCHER_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def launcher_problem(environ) -> str | None:
    """What a launcher's variables (torchrun's, accelerate's, Slurm's) say that cannot be; None where they go
    together.
    """
    found = {name: environ[name].strip() for name in LAUNCHER_NUMBERS if name in environ}
    way = (
        f"Unset what another program left over (`unset {' '.join(found)}`), or start with accelerate launch or"
        " torchrun."
    )
    for name, value in found.items():
        if not (value.isascii() and value.isdigit()):
            return f"the environment says {name}={value!r}, which is no number. {way}"
    numbers = {name: int(value) for name, value in found.items()}
    rank, world = numbers.get("RANK", 0), numbers.get("WORLD_SIZE", 1)
    local, here = numbers.get("LOCAL_RANK", 0), numbers.get("LOCAL_WORLD_SIZE", world)
    values = ", ".join(f"{name}={environ[name]}" if name in environ else f"no {name}" for name in LAUNCHER_NUMBERS[:4])
    if rank >= max(world, 1) or world < 1 or local > rank or local >= here or here > world:
        return f"the environment contradicts itself: {values}. {way}"
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environ.get(name)] if world > 1 or "LOCAL_RANK" in numbers else []
    return (
        f"the environment says that a launcher started this process ({values}), and lacks {', '.join(missing)}. {way}"
        if missing
        else None
    )


def _launched(environ) -> tuple[int, int]:
    """(rank, processes); alone where the variables say what cannot be, which `exit_with_status` refuses."""
    return (0, 1) if launcher_problem(environ) else (int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1)))


RANK, WORLD_SIZE = _launched(os.environ)


_once: set[str] = set()


def print_once(key: str, message: str) -> None:
    """A line that one process says one time."""
    if key not in _once:
        _once.add(key)
        print_main(message)


def print_main(message: str) -> None:
    """One line for the person at the terminal, from rank 0."""
    if RANK == 0:
        print(message, flush=True)


def has_process_group() -> bool:
    """Whether the processes of a launch have a group."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def run_on_main(function, *args):
    """Run `function` on rank 0 alone; every rank returns its result, or raises what it raised."""
    if not has_process_group():
        return function(*args)
    import torch.distributed as dist

    box = [None, None]
    if RANK == 0:
        try:
            box[0] = function(*args)
        except (Refusal, Interrupted, Unhealthy, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def raise_on_all_ranks(error: BaseException | None) -> None:
    """Raise on every rank when any of them failed, so that none waits for a rank that is gone."""
    errors = [error]
    if has_process_group():
        import torch.distributed as dist

        errors = [None] * WORLD_SIZE
        shared = error
        if error is not None and status_of(error) in (
            None,
            "refused",
        ):  # others may not be able to read what a library raised
            shared = Refusal(end_of(error)) if status_of(error) else RuntimeError(repr(error))
        dist.all_gather_object(errors, shared)
    if error is not None:
        raise error
    for rank, other in enumerate(errors):
        if other is not None:
            raise other if status_of(other) else RuntimeError(f"rank {rank} failed: {other}")
