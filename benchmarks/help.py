"""Seconds that `--help` takes, beside `lm_eval --help`.

    python benchmarks/help.py

The scripts' help and refusals in turn with lm-eval's help; medians of five, after one of each that does not count. The
ratio is to lm-eval's median.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 5

COMMANDS = {
    "lm_eval --help": [str(Path(sys.executable).with_name("lm_eval")), "--help"],
    **{
        f"{script} {argument}": [sys.executable, script, *argument.split()]
        for script, argument in (
            ("run_pretrain.py", "--help"),
            ("run_pretrain.py", "--help_all"),
            ("run_pretrain.py", "--learning_rte 1e-3"),
            ("run_pretrain.py", "--config nowhere.yaml"),
            ("run_sft.py", "--help"),
            ("run_eval.py", "--help"),
            ("run_study.py", "--help"),
            ("run_study.py", "--config nowhere.yaml"),
        )
    },
}


def main() -> None:
    seconds = {name: [] for name in COMMANDS}
    for _ in range(REPEATS + 1):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(command, cwd=ROOT, capture_output=True)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    for name, median in medians.items():
        print(f"{name:40} {median:6.2f} s   {median / medians['lm_eval --help']:5.2f}")


if __name__ == "__main__":
    main()
