"""The processes of a launch: their rank, printing from rank 0, running on rank 0 alone, raising on all.

torch is imported only where the processes have a group."""

import datetime
import os
import sys
from collections.abc import Callable, Mapping

from .errors import STATUSES, Refusal, end_of, status_of

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def launcher_problem(environ: Mapping[str, str]) -> str | None:
    """Why the variables of a launcher (torchrun, accelerate, Slurm) in `environ` cannot be right, in one sentence; None
    where they are consistent.
    """
    found = {name: environ[name].strip() for name in LAUNCHER_VARIABLES if name in environ}
    remedy = (
        f"Unset what another program left over (`unset {' '.join(found)}`), or start with accelerate launch or"
        " torchrun."
    )
    for name, value in found.items():
        if not (value.isascii() and value.isdigit()):
            return f"the environment says {name}={value!r}, which is not a number. {remedy}"
    numbers = {name: int(value) for name, value in found.items()}
    rank, world = numbers.get("RANK", 0), numbers.get("WORLD_SIZE", 1)
    local_rank, local_world = numbers.get("LOCAL_RANK", 0), numbers.get("LOCAL_WORLD_SIZE", world)
    values = ", ".join(
        f"{name}={environ[name]}" if name in environ else f"no {name}" for name in LAUNCHER_VARIABLES[:4]
    )
    if rank >= max(world, 1) or world < 1 or local_rank > rank or local_rank >= local_world or local_world > world:
        return f"the environment contradicts itself: {values}. {remedy}"
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not environ.get(name)] if world > 1 or "LOCAL_RANK" in numbers else []
    return (
        f"the environment says that a launcher started this process ({values}), and lacks {', '.join(missing)}."
        f" {remedy}"
        if missing
        else None
    )


def _launched(environ) -> tuple[int, int, int]:
    """(rank, processes, processes of this machine); (0, 1, 1) where the variables are inconsistent, which
    `exit_with_status` refuses.
    """
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    found = {} if launcher_problem(environ) else environ
    return tuple(int(found.get(name, default)) for name, default in names.items())


def _launch_command(environ: Mapping[str, str]) -> str:
    """What starts a training script as this process was started, in commands that are printed: `accelerate launch`, or
    `python` where no launcher did.
    """
    is_launched = any(name in environ for name in (*LAUNCHER_VARIABLES, "ACCELERATE_DYNAMO_MODE"))
    return "accelerate launch" if is_launched else "python"


RANK, WORLD_SIZE, LOCAL_WORLD_SIZE = _launched(os.environ)
LAUNCH_COMMAND = _launch_command(os.environ)  # now: transformers sets variables of accelerate, too
PATIENCE = datetime.timedelta(days=30)  # of ranks that wait for the work of another
_printed: set[str] = set()
_waiting_groups: dict = {}  # {default process group: the group of its ranks for waiting}


def print_once(key: str, message: str) -> None:
    """Print a line once per process. `key`: what identifies it."""
    if key not in _printed:
        _printed.add(key)
        print_main(message)


def print_main(message: str) -> None:
    """One line for the person at the terminal, from rank 0."""
    if RANK == 0:
        print(message, flush=True)


def join_processes() -> None:
    """Make the processes of a launch a group, where a script trains nothing: over the CPU, whatever they compute on.
    Each uses the GPU of its local rank.
    """
    if WORLD_SIZE == 1:
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)


def main_first(function: Callable, *args):
    """Call `function(*args)` on every rank, on rank 0 first: the others find what it has downloaded. Returns each
    rank's own result, or raises what it raised on rank 0.
    """
    found = []
    run_on_main(lambda: found.append(function(*args)))
    return found[0] if found else function(*args)


def has_process_group() -> bool:
    """Whether torch's process group is initialized."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def waiting_group():
    """The process group of ranks that wait for the work of one of them, which may take days. Call on all ranks.

    It is a gloo group of its own. A collective of the default group fails after --ddp_timeout, whatever it waits for;
    this one waits on, and fails at once where a rank has died.
    """
    import torch.distributed as dist

    default = dist.group.WORLD
    if default not in _waiting_groups:
        _waiting_groups.clear()  # of a process group that is no more
        _waiting_groups[default] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _waiting_groups[default]


def wait_for_all_ranks() -> None:
    """Return when every rank has come here, however long that takes."""
    if has_process_group():
        import torch.distributed as dist

        dist.barrier(group=waiting_group())


def run_on_main(function: Callable, *args):
    """Run `function(*args)` on rank 0 alone, for as long as it takes. Every rank returns its result (pickled), or
    raises what it raised there, where that is an OSError or has a status (Refusal, Interrupted ...).
    """
    if not has_process_group():
        return function(*args)
    import torch.distributed as dist

    group, result_and_error = waiting_group(), [None, None]
    if RANK == 0:
        try:
            result_and_error[0] = function(*args)
        except (*STATUSES, OSError) as error:
            result_and_error[1] = error
    dist.broadcast_object_list(result_and_error, src=0, group=group)
    if result_and_error[1] is not None:
        raise result_and_error[1]
    return result_and_error[0]


def raise_on_all_ranks(error: BaseException | None) -> None:
    """Raise on every rank when any of them failed, so that none waits for a rank that has ended. error: this rank's.
    Of what it raises, `is_known_to_all` is true.
    """
    errors = [error]
    if has_process_group():
        import torch.distributed as dist

        errors = [None] * WORLD_SIZE
        shared = error
        # Other ranks may not be able to unpickle the exception of a library.
        if error is not None and status_of(error) in (None, "refused"):
            shared = Refusal(end_of(error)) if status_of(error) else RuntimeError(repr(error))
        dist.all_gather_object(errors, shared, group=waiting_group())
    if error is not None:
        raise _known(error)
    for rank, other in enumerate(errors):
        if other is not None:
            raise _known(other if status_of(other) else RuntimeError(f"rank {rank} failed: {other}"))


def _known(error: BaseException) -> BaseException:
    error.known_to_all_ranks = True
    return error


def is_known_to_all(error: BaseException | None) -> bool:
    """Whether every rank has raised this error, or its own in its place: nothing has to be told to the others."""
    return getattr(error, "known_to_all_ranks", False)
