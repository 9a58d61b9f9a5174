"""How a script ends: its exit status, its last line, and the same end on every rank.

Statuses: 0 finished, 2 refused, 3 unhealthy, 75 interrupted; any other error is a crash (1, with a traceback)."""

import os
import sys
import time
import traceback

from .distributed import RANK, WORLD_SIZE, has_process_group, launcher_problem
from .errors import Refusal, end_of, status_of

FIRST_WORD = 30.0  # seconds in which rank 0 ends with the same refusal, or has none

EXIT_CODES = {"finished": 0, "refused": 2, "unhealthy": 3, "interrupted": 75}


def show_any_text(stream) -> None:
    """Let a stream of another encoding than UTF-8 print every text: `?` for a character that it has not."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")


def exit_with_status(main) -> None:
    """Run a script's `main()` and end the process as the module's docstring says; a refusal is one paragraph.

    torchrun kills the others when one process ends: where they have not met yet, rank 0, which says why, goes first. A
    terminal that cannot show a character shows `?`.
    """
    code = 0
    show_any_text(sys.stdout)
    try:
        if problem := launcher_problem(os.environ):
            raise Refusal(problem)
        main()
    except SystemExit as error:
        code = error.code or 0
    except BaseException as error:
        status = status_of(error)
        code = EXIT_CODES[status] if status else 1
        if status and RANK > 0 and not has_process_group():
            time.sleep(FIRST_WORD)
        if status is None:
            traceback.print_exc()
        elif RANK == 0 or not has_process_group():
            print(f"\n{f'rank {RANK}, ' if RANK else ''}{status}: {end_of(error)}", file=sys.stderr, flush=True)
    if has_process_group():
        import torch.distributed as dist

        if code in EXIT_CODES.values():
            dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    if WORLD_SIZE > 1:
        sys.stderr.flush()
        os._exit(
            code
        )  # all is done; torn down by the interpreter, threads of torch's groups have aborted a finished run (SIGABRT)
    sys.exit(code)
