"""Whether a suggested run takes the hours that were asked for, and whether its model is a good choice for them.

    python benchmarks/suggest.py               # both; about an hour and a half on two cores
    python benchmarks/suggest.py --parts time  # the hours alone; about 25 minutes

time: ten combinations of machine, text and hours. `run_pretrain.py --suggest` writes a config; then the suggested run
is made with a few of its steps, five short evaluations and three saves, and the time of the whole is their times
multiplied: start, preparing and compiling once, each step, each window that is evaluated, each save, the end once.
Machines are emulated: fewer cores (an affinity), and instruction sets that the libraries are told to leave out. loss:
the same command with three presets in turn, each run whole; two of these run at once, on a core each.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.own_text import copied
from benchmarks.train import MACHINES
from llama_lite.files import read_json, read_jsonl, write_json

TEXTS = {"rst, 3 MB": (".rst", 3e6), "Python, 20 MB": (".py", 20e6), "documentation, all": None}
COMBINATIONS = [  # machine, cores, text, hours
    ("this processor", 2, "rst, 3 MB", 0.05),
    ("this processor", 2, "Python, 20 MB", 0.1),
    ("this processor", 2, "documentation, all", 1),
    ("this processor", 2, "documentation, all", 3),
    ("this processor", 1, "Python, 20 MB", 0.25),
    ("this processor", 1, "documentation, all", 4),
    ("without bfloat16", 2, "Python, 20 MB", 0.2),
    ("AVX2", 2, "rst, 3 MB", 0.1),
    ("AVX2", 2, "documentation, all", 2),
    ("AVX2", 1, "Python, 20 MB", 0.5),
]
LOSSES = [
    ("this processor", "Python, 20 MB"),
    ("this processor", "documentation, all"),
    ("AVX2", "Python, 20 MB"),
    ("AVX2", "documentation, all"),
]
PRESETS = ("tiny", "1m", "demo")
WINDOWS = 256  # of an evaluation of a shortened run
ROUND = 6.0  # seconds between two evaluations of a shortened run


def texts(folder: Path) -> None:
    for name, made in TEXTS.items():
        if made:
            (folder / name).mkdir(parents=True)
            copied(folder / name, *made)


def command(machine: str, cores: set[int], argv: list[str]) -> tuple[list[str], dict]:
    """A run of run_pretrain.py on some cores of an emulated machine, and its environment."""
    environment = {**os.environ, **MACHINES[machine], "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return [
        "taskset",
        "-c",
        ",".join(map(str, sorted(cores))),
        sys.executable,
        str(ROOT / "run_pretrain.py"),
        *argv,
    ], environment


def dataset(text: str, folder: Path) -> str:
    return str(folder / text) if TEXTS[text] else "installed-docs"


def hours_of(machine: str, cores: int, text: str, hours: float, folder: Path) -> dict:
    """What the suggestion for so many hours would take."""
    where = folder / "trial"
    where.mkdir()
    argv, environment = command(
        machine,
        set(range(cores)),
        ["--dataset", dataset(text, folder), "--hours", str(hours), "--suggest", "mine.yaml"],
    )
    done = subprocess.run(argv, cwd=where, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    suggested = yaml.safe_load((where / "mine.yaml").read_text())
    limited = "more would teach next to nothing" in (where / "mine.yaml").read_text()
    guess = 0.7 * hours * 3600 / suggested["max_steps"]  # seconds of a step
    every = max(2, round(ROUND / guess))
    windows = min(WINDOWS, suggested["eval_windows"])
    short = [
        "--config",
        "mine.yaml",
        "--output_dir",
        "run",
        "--max_steps",
        str(5 * every),
        "--allow_epochs",
        "True",
        "--eval_windows",
        str(windows),
    ]
    for name, steps in (("logging_steps", every), ("eval_steps", every), ("save_steps", 2 * every)):
        short += [f"--{name}", str(steps)]
    argv, environment = command(machine, set(range(cores)), short)
    began = time.perf_counter()
    seen: list[tuple[float, str]] = []
    with subprocess.Popen(
        argv, cwd=where, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        seen += [(time.perf_counter() - began, line) for line in process.stdout]
    ended = time.perf_counter() - began
    if process.returncode:
        raise SystemExit("".join(line for _, line in seen))
    logged = [
        entry["tokens_per_second"] for entry in read_jsonl(where / "run" / "log.jsonl") if "tokens_per_second" in entry
    ]
    step = suggested["tokens_per_step"] / statistics.median(logged[1:])
    at = [second for second, line in seen if re.match(r"step .*loss", line)]
    pauses = [later - earlier - every * step for earlier, later in itertools.pairwise(at)]
    evaluation, both = (pauses[0] + pauses[2]) / 2, (pauses[1] + pauses[3]) / 2
    parts = {
        "start, preparing, compiling": at[0] - every * step,
        "steps": suggested["max_steps"] * step,
        "evaluations": (
            max(1, suggested["max_steps"] / suggested["eval_steps"]) * evaluation * suggested["eval_windows"] / windows
        ),
        "saves": max(1, suggested["max_steps"] / suggested["save_steps"]) * max(0.0, both - evaluation),
        "end": ended - at[-1] - both,
    }
    shutil.rmtree(where)
    return {
        "machine": machine,
        "cores": cores,
        "text": text,
        "hours": hours,
        "model": suggested["model_config"],
        "steps": suggested["max_steps"],
        "tokens_per_step": suggested["tokens_per_step"],
        "seconds": {name: round(value, 1) for name, value in parts.items()},
        "of_the_hours": round(sum(parts.values()) / (hours * 3600), 3),
        "limited_by_the_text": limited,
    }


def losses(machine: str, text: str, hours: float, folder: Path) -> dict:
    """Validation bits per byte, and minutes, of the suggested model and of each preset, after runs of so many hours on
    one core.
    """

    def run(given: tuple[int, str]) -> tuple[float, float]:
        number, preset = given
        where = folder / f"loss-{number}"
        where.mkdir()
        argv = [
            "--dataset",
            dataset(text, folder),
            "--hours",
            str(hours),
            "--output_dir",
            "run",
            "--sample_tokens",
            "0",
        ]
        argv, environment = command(
            machine, {number % os.cpu_count()}, argv + (["--model_config", preset] if preset else [])
        )
        began = time.perf_counter()
        done = subprocess.run(argv, cwd=where, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        found = [
            entry["eval_bits_per_byte"]
            for entry in read_jsonl(where / "run" / "log.jsonl")
            if "eval_bits_per_byte" in entry
        ][-1]
        model = read_json(where / "run" / "run.json")["settings"]["model_config"]
        shutil.rmtree(where)
        return model, round(found, 4), round((time.perf_counter() - began) / 60, 1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(run, enumerate(["", *PRESETS])))
    return {
        "machine": machine,
        "text": text,
        "hours": hours,
        "suggested": made[0][0],
        "bits_per_byte": {name or "suggested": value for name, (_, value, _) in zip(["", *PRESETS], made, strict=True)},
        "minutes": {name or "suggested": minutes for name, (_, _, minutes) in zip(["", *PRESETS], made, strict=True)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="time,loss", help="the last figures of the other part stay")
    parser.add_argument("--hours", type=float, default=0.1, help="of a run of the part `loss`")
    parser.add_argument("--only", help="numbers of combinations, from 0, separated by commas")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    result = read_json(arguments.output) or {}
    numbers = [int(number) for number in arguments.only.split(",")] if arguments.only else range(len(COMBINATIONS))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts(folder)
        if "time" in arguments.parts:
            found = {(row["machine"], row["cores"], row["text"], row["hours"]): row for row in result.get("time", [])}
            for number in numbers:
                row = found[COMBINATIONS[number]] = hours_of(*COMBINATIONS[number], folder)
                print(json.dumps(row), flush=True)
                result["time"] = list(found.values())
                write_json(arguments.output, result)
        if "loss" in arguments.parts:
            found = {(row["machine"], row["text"]): row for row in result.get("loss", [])}
            for machine, text in [LOSSES[number] for number in numbers if number < len(LOSSES)]:
                row = found[machine, text] = losses(machine, text, arguments.hours, folder)
                print(json.dumps(row), flush=True)
                result["loss"] = list(found.values())
                write_json(arguments.output, result)


if __name__ == "__main__":
    main()
