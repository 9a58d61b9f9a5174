"""`make demo`: prepare text, pretrain, tune, evaluate. Prints the stages with their expected times, and at the end the
measured times.

    python -m llama_lite.commands.demo           # benchmarks/demo.json says how long it took
    python -m llama_lite.commands.demo --long    # the larger run, on which the studies rest

Every stage is a command of its own. It can be interrupted at any time; the same command resumes it.
"""

import argparse
import functools
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from ..files import read_json, read_jsonl, write_json
from ..processes import die_with_parent

ROOT = Path(__file__).resolve().parents[2]

# seconds of each stage, on the machines that were at hand, and of `work_seconds` there
MEASURED = ROOT / "benchmarks" / "demo.json"


def stages(name: str) -> list[tuple[str, list[str]]]:
    """(description, command) of each stage, in order."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    accelerate += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # accelerate's defaults, which it would warn of
    return [
        (
            "prepare the text and pretrain",
            [*accelerate, "run_pretrain.py", "--config", f"configs/pretrain/{name}.yaml"],
        ),
        ("tune on instructions", [*accelerate, "run_sft.py", "--config", f"configs/sft/{name}.yaml"]),
        ("evaluate", [sys.executable, "run_eval.py", "--config", f"configs/eval/{name}.yaml"]),
    ]


def work_seconds() -> float:
    """Seconds for a fixed piece of work like a small model's training step, in the format that a run here would compute
    in; the best of some.
    """
    import torch

    from ..machine.hardware import native_bfloat16
    from ..processes import cores_for_a_process

    torch.set_num_threads(cores_for_a_process())
    half = native_bfloat16(torch.device("cpu"))[0]
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        *(layer for _ in range(8) for layer in (torch.nn.Linear(96, 256), torch.nn.SiLU(), torch.nn.Linear(256, 96))),
        torch.nn.Linear(96, 4096),
    )
    inputs, best, began = torch.randn(2048, 96), 60.0, time.perf_counter()
    while time.perf_counter() - began < 2.0:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            torch.nn.functional.cross_entropy(layers(inputs).float(), torch.zeros(2048, dtype=torch.long)).backward()
        sum(range(300_000))  # what Python itself does between the products
        best = min(best, time.perf_counter() - start)
    return best


def expected(name: str, count: int) -> list[float] | None:
    """Seconds that each stage is expected to take here, by the nearest machine that was measured; None where none
    was.
    """
    known = (read_json(MEASURED) or {}).get(name, {})
    if not known:
        return None
    here = work_seconds()
    nearest = min(known.values(), key=lambda machine: abs(machine["work_seconds"] - here))
    return [nearest["stages"][i] * here / nearest["work_seconds"] for i in range(count)]


def run(command: list[str]) -> int:
    """Run a command; returns its exit status. Ctrl-C is left to the command, which finishes its step and saves; SIGTERM
    is passed on. The command ends with this process.
    """
    process = subprocess.Popen(command, preexec_fn=functools.partial(die_with_parent, signal.SIGTERM))
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    return process.wait()


def in_minutes(seconds: float) -> str:
    """Seconds as text, in minutes from 90 s on."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def main() -> None:
    """Run the stages of the demo, and record their times with --record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="the larger run")
    parser.add_argument(
        "--record", help="write the seconds of each stage under this name of the machine to benchmarks/demo.json"
    )
    arguments = parser.parse_args()
    os.chdir(ROOT)
    name = "demo-long" if arguments.long else "demo"
    todo, took = stages(name), []
    about = expected(name, len(todo))
    estimates = [""] * len(todo) if about is None else [f", about {in_minutes(seconds)}" for seconds in about]
    whole = "" if about is None else f"; about {in_minutes(sum(about))} on this machine, if it has nothing else to do"
    print(
        "demo     "
        f" {', then '.join(f'{what}{share}' for (what, _), share in zip(todo, estimates, strict=True))}{whole}",
        flush=True,
    )
    for number, ((what, command), share) in enumerate(zip(todo, estimates, strict=True), 1):
        of_all = "" if about is None else f" ({about[number - 1] / sum(about):.0%} of the demo)"
        print(f"\nstage     {number} of {len(todo)}: {what}{share}{of_all}", flush=True)
        began = time.time()
        if code := run(command):
            sys.exit(code)
        took.append(time.time() - began)
        if number == 1:
            started = [
                event["time"]
                for event in read_jsonl(Path("runs") / name / "events.jsonl")
                if event["event"] == "started"
            ]
            prepared = datetime.fromisoformat(started[-1]).timestamp() - began if started else 0.0
    parts = [
        ("start and prepare", prepared),
        ("pretrain", took[0] - prepared),
        *((what, seconds) for (what, _), seconds in zip(todo[1:], took[1:], strict=True)),
    ]
    if prepared <= 0:
        parts = [(what, seconds) for (what, _), seconds in zip(todo, took, strict=True)]
    print(
        f"\ntook      {', '.join(f'{what} {in_minutes(seconds)}' for what, seconds in parts)}; in all"
        f" {in_minutes(sum(took))}"
    )
    print(
        f"          look at runs/{name}/README.md, runs/{name}-sft/README.md and runs/{name}-eval/README.md, the cards"
        " of what was made"
        f"\n          open runs/{name}/report.html in a browser: curves, samples, and items along training"
        f"\n          talk to the model: python -m llama_lite chat runs/{name}-sft"
    )
    if arguments.record:
        record = read_json(MEASURED) or {}
        entry = {
            "work_seconds": round(work_seconds(), 5),
            "stages": [round(seconds, 1) for seconds in took],
            "parts": {what: round(seconds, 1) for what, seconds in parts},
        }
        record.setdefault(name, {})[arguments.record] = entry
        write_json(MEASURED, record)


if __name__ == "__main__":
    main()
