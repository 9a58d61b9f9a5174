"""Whether a suggested run takes the hours that were asked for, and whether its model is a good choice for them.

    python benchmarks/suggest.py               # both; about an hour and a half on two cores
    python benchmarks/suggest.py --parts time  # the hours alone; about 25 minutes

time: ten combinations of machine, text and hours. `run_pretrain.py --suggest` writes a config; then the suggested run
is made with a few of its steps, five short evaluations and three saves, and the time of the whole is their times
multiplied: start, preparing and compiling once, each step, each window that is evaluated, each save, the end once.
Machines are emulated: fewer cores (an affinity), and instruction sets that the libraries are told to leave out. loss:
the same command with three presets in turn, each run whole; two of these run at once, on a core each. Then each model
is scored on all held-out text.
"""

import argparse
import itertools
import json
import math
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

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.own_text import copied
from benchmarks.train import MACHINES
from llama_lite.data.dataset import TokenWindows
from llama_lite.files import read_json, read_jsonl, write_json
from llama_lite.provenance import processor

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


def held_out(where: Path) -> float:
    """Bits per byte of all held-out windows, of the run in `where`: its own evaluations are of a sample, whose size
    follows from the model's speed.
    """
    from transformers import AutoModelForCausalLM

    settings = read_json(where / "run" / "run.json")["settings"]
    folder = where / settings["prepared_dir"]
    manifest = read_json(folder / "manifest.json")
    windows = TokenWindows(folder, manifest, "validation", settings["block_size"])
    model = AutoModelForCausalLM.from_pretrained(where / "run", dtype=torch.float32, trust_remote_code=False).eval()
    nats = 0.0
    with torch.inference_mode():
        for first in range(0, len(windows), 16):
            rows = [windows[i].astype("int64") for i in range(first, min(first + 16, len(windows)))]
            ids = torch.from_numpy(np.stack(rows))
            logits = model(ids[:, :-1]).logits
            nats += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            ).item()
    split = manifest["splits"]["validation"]
    tokens = len(windows) * settings["block_size"]
    return nats / tokens / math.log(2) * split["tokens"] / split["bytes"]


def losses(machine: str, text: str, hours: float, folder: Path) -> dict:
    """Validation bits per byte, and minutes, of the suggested model and of each preset, after runs of so many hours on
    one core.
    """

    def run(number: int, preset: str | None) -> float:
        """Minutes of a run in a folder of its own."""
        where = folder / str(preset)
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
        argv += ["--model_config", preset] if preset else []
        argv, environment = command(machine, {number % os.cpu_count()}, argv)
        began = time.perf_counter()
        done = subprocess.run(argv, cwd=where, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return round((time.perf_counter() - began) / 60, 1)

    minutes, scores, models = {}, {}, [None, *PRESETS]
    for first in range(0, len(models), os.cpu_count()):
        at_once = models[first : first + os.cpu_count()]
        with ThreadPoolExecutor(len(at_once)) as pool:
            minutes |= dict(zip(at_once, pool.map(run, range(len(at_once)), at_once), strict=True))
    suggested = read_json(folder / "None/run/run.json")["settings"]["model_config"]
    for preset in models:
        scores[preset or "suggested"] = round(held_out(folder / str(preset)), 4)
        shutil.rmtree(folder / str(preset))
    return {
        "machine": machine,
        "text": text,
        "hours": hours,
        "processor": processor(),
        "suggested": suggested,
        "bits_per_byte": scores,
        "minutes": {preset or "suggested": value for preset, value in minutes.items()},
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
