"""`make demo`: prepare text, pretrain, tune, evaluate. Prints the stages with their expected times, and at the end the
measured times.

    python -m llama_lite.commands.demo           # benchmarks/demo.json says how long it took
    python -m llama_lite.commands.demo --long    # the larger run, on which the studies rest
    python -m llama_lite.commands.demo --record NAME    # keeps times and output; then python -m benchmarks.render_demo

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

from model_card.private import redact

from ..files import read_json, read_jsonl, write_json, write_text
from ..processes import die_with_parent
from ..provenance import processor

ROOT = Path(__file__).resolve().parents[2]

# seconds of each stage, on the machines that were at hand, and of `work_seconds` there; the lines that told them
MEASURED = ROOT / "benchmarks" / "demo.json"
TERMINAL = ROOT / "benchmarks" / "demo" / "terminal.txt"  # what the last recorded demo printed


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
    in; the best of ten at least, unless they take 10 s: other work on the cores makes some of them slow.
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
    inputs, times, began = torch.randn(2048, 96), [], time.perf_counter()
    while (passed := time.perf_counter() - began) < 2.0 or (len(times) < 10 and passed < 10.0):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            torch.nn.functional.cross_entropy(layers(inputs).float(), torch.zeros(2048, dtype=torch.long)).backward()
        sum(range(300_000))  # what Python itself does between the products
        times.append(time.perf_counter() - start)
    return min(times)


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


def next_stage(about: list[float], took: list[float], number: int) -> str:
    """What is said of stage `number`: how long it is about, by the pace of the stages before, and its share.

    about: seconds that the stages were expected to take. took: seconds of those before, where they were whole ones.
    """
    pace = sum(took) / sum(about[: len(took)]) if took else 1.0
    return f", about {in_minutes(about[number - 1] * pace)} ({about[number - 1] / sum(about):.0%} of the demo)"


def first_step_time(name: str) -> float:
    """When the run trained its first step, in seconds since 1970; 0 where none is recorded."""
    events = read_jsonl(Path("runs") / name / "events.jsonl")
    times = [event["time"] for event in events if event["event"] == "started"]
    return datetime.fromisoformat(times[-1]).timestamp() if times else 0.0


def run(command: list[str], lines: list[str] | None = None) -> int:
    """Run a command; returns its exit status. Ctrl-C is left to the command, which finishes its step and saves; SIGTERM
    is passed on. The command ends with this process. lines: gets what the command prints, where that is kept.
    """
    kept = None if lines is None else subprocess.PIPE
    process = subprocess.Popen(
        command, stdout=kept, text=True, preexec_fn=functools.partial(die_with_parent, signal.SIGTERM)
    )
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines.append(line.rstrip("\n"))
    return process.wait()


def in_minutes(seconds: float) -> str:
    """Seconds as text, in minutes from 90 s on."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def left_from_before(name: str) -> list[str]:
    """Folders of an earlier demo, with which another one is shorter."""
    patterns = [
        f"runs/{name}",
        f"runs/{name}-sft",
        f"runs/{name}-eval",
        f"data/{name}",
        "data/curated/installed-docs-*",
    ]
    return sorted(str(path) for pattern in patterns for path in Path().glob(pattern))


def write_record(name: str, machine: str, took: list[float], parts: list[tuple[str, float]], lines: list[str]) -> None:
    """Write the times of a demo, and the lines that told them, under the name of the machine; of the short demo also
    everything that it printed. took: seconds of each stage; parts: of what the last line names.
    """
    record = read_json(MEASURED) or {}
    first, last = (next(line for line in lines if line.startswith(word)) for word in ("demo  ", "took  "))
    record.setdefault(name, {})[machine] = {
        "work_seconds": round(work_seconds(), 5),
        "stages": [round(seconds, 1) for seconds in took],
        "parts": {what: round(seconds, 1) for what, seconds in parts},
        "processor": processor(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "shown": {"first": first, "took": last},
    }
    write_json(MEASURED, record)
    if name == "demo":
        write_text(TERMINAL, redact("\n".join(lines)) + "\n")


def main() -> None:
    """Run the stages of the demo; with --record, keep their times and what they print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="the larger run")
    parser.add_argument(
        "--record",
        metavar="NAME",
        help="write the seconds of each stage, the processor and the lines that tell them under this name of the"
        " machine to benchmarks/demo.json, and all that the demo prints to benchmarks/demo/terminal.txt",
    )
    arguments = parser.parse_args()
    os.chdir(ROOT)
    name = "demo-long" if arguments.long else "demo"
    left, lines = left_from_before(name), []
    if arguments.record and left:
        parser.error(f"--record measures the demo from its beginning: remove {', '.join(left)} first")

    def show(text: str) -> None:
        print(text, flush=True)
        lines.extend(text.split("\n"))

    todo, took = stages(name), []
    about = expected(name, len(todo))
    estimates = [""] * len(todo) if about is None else [f", about {in_minutes(seconds)}" for seconds in about]
    whole = "" if about is None else f"; about {in_minutes(sum(about))} on this machine, if it has nothing else to do"
    plan = ", then ".join(f"{what}{share}" for (what, _), share in zip(todo, estimates, strict=True))
    show(f"demo      {plan}{whole}")
    for number, (what, command) in enumerate(todo, 1):
        estimate = next_stage(about, [] if left else took, number) if about else ""
        show(f"\nstage     {number} of {len(todo)}: {what}{estimate}")
        began = time.time()
        if code := run(command, lines if arguments.record else None):
            sys.exit(code)
        took.append(time.time() - began)
        if number == 1:
            prepared = first_step_time(name) - began
    parts = [
        ("start and prepare", prepared),
        ("pretrain", took[0] - prepared),
        *((what, seconds) for (what, _), seconds in zip(todo[1:], took[1:], strict=True)),
    ]
    if prepared <= 0:
        parts = [(what, seconds) for (what, _), seconds in zip(todo, took, strict=True)]
    show(
        f"\ntook      {', '.join(f'{what} {in_minutes(seconds)}' for what, seconds in parts)}; in all"
        f" {in_minutes(sum(took))}"
    )
    show(
        f"          look at runs/{name}/README.md, runs/{name}-sft/README.md and runs/{name}-eval/README.md, the cards"
        " of what was made"
        f"\n          open runs/{name}/report.html in a browser: curves, samples, and items along training"
        f"\n          talk to the model: python -m llama_lite chat runs/{name}-sft"
    )
    if arguments.record:
        write_record(name, arguments.record, took, parts, lines)


if __name__ == "__main__":
    main()
