"""Two ranks, of which the first works three times as long as a collective may take. Run by test_layouts.py."""

import datetime
import time

import torch
import torch.distributed as dist

from llama_lite.distributed import RANK, raise_on_all_ranks, run_on_main
from llama_lite.exit import exit_with_status

TIMEOUT = 0.5  # seconds


def busy() -> str:
    time.sleep(3 * TIMEOUT)
    return "prepared"


def main() -> None:
    dist.init_process_group("gloo")
    run_on_main(int)
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=TIMEOUT), dist.group.WORLD)
    found = run_on_main(busy)
    raise_on_all_ranks(busy() and None if RANK == 0 else None)
    if RANK == 0:
        busy()
    else:
        try:
            dist.broadcast(torch.zeros(1), src=0)
        except RuntimeError as error:
            print(f"{found} for the rank that waited; a plain broadcast: {'imed out' in str(error)}", flush=True)


if __name__ == "__main__":
    exit_with_status(main)
