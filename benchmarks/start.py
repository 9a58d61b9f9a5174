"""Seconds from the command to the first step of a tiny run, beside what importing the libraries alone takes.

    python benchmarks/start.py

`imports`: `from transformers import Trainer; from trl import SFTTrainer`. `first step`: run_pretrain.py on prepared
tokens, until the line of its first step is printed; `resumed`: the same from a checkpoint, verified; `compiled`: with
--compile_layers, what compiling made last time in torch's cache (warm) or not (cold). In turn, medians; the ratio is
that of `first step` to `imports`.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import kill
from llama_lite.files import write_json
from llama_lite.provenance import processor

IMPORTS = "from transformers import Trainer; from trl import SFTTrainer; print('step 1/')"
RUN = [
    "--tokenizer",
    "train",
    "--vocab_size",
    "512",
    "--shard_tokens",
    "60000",
    "--validation_tokens",
    "10000",
    "--model_config",
    "tiny",
]
RUN += [
    "--block_size",
    "64",
    "--tokens_per_step",
    "1024",
    "--per_device_train_batch_size",
    "8",
    "--logging_steps",
    "1",
    "--warmup_steps",
    "1",
]
RUN += [
    "--eval_strategy",
    "no",
    "--probe_windows",
    "4",
    "--sample_tokens",
    "0",
    "--save_steps",
    "2",
]
LONG = ["--max_steps", "100"]


def seconds_to_line(command: list[str], environment: dict, *lines: str) -> float:
    """Until a process prints a line that begins with one of `lines`; it is killed then."""
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **environment}
    ) as process:
        for line in process.stdout:
            if line.startswith(lines):
                seconds = time.perf_counter() - began
                process.kill()
                return seconds
    raise SystemExit(f"ended before {lines}: {command}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kill.write_text(folder / "text.jsonl", 300_000)
        command = [
            sys.executable,
            str(ROOT / "run_pretrain.py"),
            *RUN,
            "--dataset",
            str(folder / "text.jsonl"),
            "--prepared_dir",
            str(folder / "tokens"),
        ]
        subprocess.run([*command, "--prepare_only"], check=True)
        subprocess.run(
            [*command, "--output_dir", str(folder / "done"), "--max_steps", "4"], check=True, stdout=subprocess.DEVNULL
        )
        times: dict[str, list[float]] = {
            way: [] for way in ("imports", "first step", "resumed", "compiled, cold", "compiled, warm")
        }
        for turn in range(arguments.turns):
            new = [*command, *LONG, "--output_dir", str(folder / f"run-{turn}")]
            cache = {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache-{turn}")}
            times["imports"].append(seconds_to_line([sys.executable, "-c", IMPORTS], {}, "step 1/"))
            times["first step"].append(seconds_to_line(new, {}, "step 1/"))
            shutil.copytree(folder / "done" / "checkpoint-2", folder / f"resumed-{turn}" / "checkpoint-2")
            resumed = [*command, *LONG, "--output_dir", str(folder / f"resumed-{turn}"), "--allow_changes", "max_steps"]
            shutil.copy(folder / "done" / "run.json", folder / f"resumed-{turn}")
            times["resumed"].append(seconds_to_line(resumed, {}, "step 3/"))
            for way in ("compiled, cold", "compiled, warm"):
                compiled = [*command, *LONG, "--compile_layers", "--output_dir", str(folder / f"{way}-{turn}")]
                times[way].append(seconds_to_line(compiled, cache, "step 1/"))
    medians = {way: round(statistics.median(values), 2) for way, values in times.items()}
    result = {
        "seconds": medians,
        "first_step_to_imports": round(medians["first step"] / medians["imports"], 3),
        "cores": os.cpu_count(),
        "processor": processor(),
        "date": time.strftime("%F"),
    }
    print(result)
    write_json(arguments.output, result)


if __name__ == "__main__":
    main()
