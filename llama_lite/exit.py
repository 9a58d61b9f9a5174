"""How a script ends: exit status and last line, the same on every rank.

Statuses: 0 finished, 2 refused, 3 unhealthy, 4 differs (of an audit), 75 interrupted; any other error is a crash
(1, with a traceback). Ctrl-C and SIGTERM interrupt, also where no handler is set."""

import contextlib
import functools
import importlib.util
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from .distributed import RANK, WORLD_SIZE, has_process_group, launcher_problem, wait_for_all_ranks
from .errors import Interrupted, Refusal, end_of, status_of

FIRST_WORD = 30.0  # seconds that other ranks wait, so that rank 0 reports the same refusal first
# packages that an own file of the same name, found before them, hides
PACKAGES = (
    "accelerate datasets datatrove evaluate huggingface_hub jinja2 lm_eval matplotlib numpy peft safetensors tokenizers"
    " torch tqdm transformers trl yaml"
).split()
EXIT_CODES = {"finished": 0, "refused": 2, "unhealthy": 3, "differs": 4, "interrupted": 75}


STATUS_FILE = "EXIT_STATUS_FILE"  # variable of the environment: a file for the exit status of rank 0


def record_status(code: int) -> None:
    """Write the exit status into the file that EXIT_STATUS_FILE names, for a job script: launchers turn every status
    into 1.
    """
    if RANK == 0 and (path := os.environ.get(STATUS_FILE)):
        with contextlib.suppress(OSError):
            Path(path).write_text(f"{code}\n", encoding="utf-8")


def show_any_text(stream: TextIO) -> None:
    """Let a stream whose encoding is not UTF-8 print any text: `?` for a character that it cannot encode."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")


def import_problem() -> str | None:
    """What keeps the libraries of this project from being imported, in one sentence; None where nothing is known to."""
    if sys.flags.optimize > 1:
        return (
            "Python runs without docstrings (-OO or PYTHONOPTIMIZE=2), and transformers cannot be imported so. Use -O,"
            " or none of the two."
        )
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is None:
            return (
                f"{spec.origin} is found in place of the package {name}, which is needed here. Rename that file, or"
                " take its folder from PYTHONPATH."
            )
    return None


def missing_package(error: BaseException) -> str | None:
    """What to do about a package of this project that is not installed, in one sentence; None for any other error."""
    if not isinstance(error, ModuleNotFoundError) or error.name not in PACKAGES:
        return None
    return (
        f"the package {error.name} is not installed for {sys.executable}. Activate the environment that has it (source"
        f" .venv/bin/activate), or install them all: {sys.executable} -m pip install -r requirements.txt."
    )


def stdout_is_closed() -> bool:
    """Whether nobody reads the output any more, as after `| head`; what is still to be written then goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    is_closed = bool(poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_closed


class Terminated(Interrupted):
    """SIGTERM where no handler is set."""


def raise_on_sigterm() -> None:
    """Let SIGTERM raise Terminated in this process, and end its forks as it always does; not where a handler is set."""

    def handle(number, frame):
        raise Terminated("SIGTERM; what is finished is kept. Run the same command again.")

    def end_on_sigterm() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        mask_sigterm(signal.SIG_UNBLOCK)

    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, handle)
        # Python forgets a signal that has a handler and reaches a fork before the first line of Python in it
        block, unblock = (functools.partial(mask_sigterm, how) for how in (signal.SIG_BLOCK, signal.SIG_UNBLOCK))
        os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=end_on_sigterm)


def mask_sigterm(how: int) -> None:
    """Block or unblock SIGTERM in this thread."""
    signal.pthread_sigmask(how, {signal.SIGTERM})


def exit_with_status(main: Callable[[], None]) -> None:
    """Run a script's `main()` and exit with a status of the module's docstring. A refusal prints one paragraph.

    torchrun kills all processes when one ends. Before the process group exists, rank 0, which prints the reason, ends
    first.
    """
    code, others_know = 0, True
    show_any_text(sys.stdout)
    raise_on_sigterm()
    try:
        if problem := launcher_problem(os.environ) or import_problem():
            raise Refusal(problem)
        main()
    except SystemExit as error:
        code = error.code or 0
    except BaseException as raised:
        missing = missing_package(raised)
        error = Refusal(missing) if missing else raised
        status = status_of(error)
        code = EXIT_CODES[status] if status else 1
        others_know = not isinstance(error, KeyboardInterrupt | Terminated)
        if status and RANK > 0 and not has_process_group():
            time.sleep(FIRST_WORD)
        if status is None:
            if not (isinstance(error, BrokenPipeError) and stdout_is_closed()):
                traceback.print_exc()
        elif RANK == 0 or not has_process_group():
            print(f"\n{f'rank {RANK}, ' if RANK else ''}{status}: {end_of(error)}", file=sys.stderr, flush=True)
    record_status(code)
    if has_process_group():
        import torch.distributed as dist

        if code in EXIT_CODES.values() and others_know:
            wait_for_all_ranks()
        dist.destroy_process_group()
    sys.stdout.flush()
    if WORLD_SIZE > 1:
        sys.stderr.flush()
        # Interpreter shutdown can abort a finished run (SIGABRT) in the threads of torch's process groups.
        os._exit(code)
    sys.exit(code)
