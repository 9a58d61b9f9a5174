"""Seconds from the command to the first words of an answer, beside what transformers' generation and loading take.

    python benchmarks/chat.py --model runs/demo-sft/merged
    python benchmarks/chat.py --model runs/demo+runs/demo-sft     # an adapter; the results of the merged model stay

`transformers`: import AutoModelForCausalLM, AutoTokenizer and TextStreamer, and load the model and its tokenizer (an
adapter with PEFT). `chat`: `python -m llama_lite chat MODEL --prompt`, until the first character of the answer. `end`:
until the end of an answer of --max_new_tokens: it streams where this is later. In turn, medians of their ratio.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama_lite.files import read_json, write_json
from llama_lite.provenance import processor

LOAD = """
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
model, tokenizer = AutoModelForCausalLM.from_pretrained({base!r}), AutoTokenizer.from_pretrained({tokenizer!r})
if {adapter!r}:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, {adapter!r})
print("x")
"""


def seconds(command: list[str]) -> tuple[float, float]:
    """Until the first character that a process writes, and until its end."""
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        if not process.stdout.read(1):
            raise SystemExit(f"no answer: {command}")
        first = time.perf_counter() - began
        process.stdout.read()
    return first, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a folder, or BASE+ADAPTER")
    parser.add_argument("--max_new_tokens", type=int, default=150)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    base, _, adapter = arguments.model.partition("+")
    load = LOAD.format(base=base, adapter=adapter, tokenizer=adapter or base)
    chat = [sys.executable, "-m", "llama_lite", "chat", arguments.model, "--prompt", "What is a matrix?", "--seed", "1"]
    chat += ["--max_new_tokens", str(arguments.max_new_tokens)]
    times: dict[str, list[float]] = {"transformers": [], "chat": [], "end": []}
    for turn in range(arguments.turns + 1):
        loaded, _ = seconds([sys.executable, "-c", load])
        first, end = seconds(chat)
        if turn:  # the first reads the files from disk
            for way, value in zip(times, (loaded, first, end), strict=True):
                times[way].append(value)
    ratios = [ours / theirs for ours, theirs in zip(times["chat"], times["transformers"], strict=True)]
    result = {
        "seconds": {way: round(statistics.median(values), 2) for way, values in times.items()},
        "first_answer_to_transformers": round(statistics.median(ratios), 3),
        "cores": os.cpu_count(),
        "processor": processor(),
    }
    name = "adapter" if adapter else "merged"
    print(name, result)
    write_json(arguments.output, {**(read_json(arguments.output) or {}), name: result})


if __name__ == "__main__":
    main()
