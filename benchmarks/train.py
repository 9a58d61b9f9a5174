"""A training step with the output layer and its loss in one, against the plain one: speed in turns, and peak memory.

    python benchmarks/train.py

Shapes: the demo's; 6 layers of 256 with 8,192 tokens; 4 layers of the 124m preset. Ways: `float32` and `plain` (bfloat16 autocast) as
transformers computes the loss, `fused` as run_pretrain.py does on a CPU. Medians of turns in one process; a step is forward, backward, clipping
and AdamW. Memory (--memory, minutes): peak resident size of a process of its own after step 2 at the 124m preset's whole shape, micro-batch 8 x 1,024.
"""

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from transformers import AutoModelForCausalLM

from llama_lite import fused_loss
from llama_lite.plan import load_model_config

WAYS = ("float32", "plain", "fused")


def shaped(preset: str, **changes):
    config = load_model_config(preset)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


SHAPES = {  # config, windows, tokens of each, steps a turn
    "demo": (shaped("demo"), 8, 256, 12),
    "6x256": (
        shaped("demo", hidden_size=256, head_dim=64, intermediate_size=688, vocab_size=8192, max_position_embeddings=512),
        8,
        512,
        6,
    ),
    "124m, 4 layers": (shaped("124m", num_hidden_layers=4), 2, 1024, 2),
    "124m": (shaped("124m"), 8, 1024, 1),
}


class Stepper:
    """A model and its optimiser, stepped on random tokens."""

    def __init__(self, model, way: str, windows: int, tokens: int):
        self.model, self.way = model, way
        if way == "fused":
            fused_loss.fuse(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        ids = torch.randint(0, model.config.vocab_size, (windows, tokens + 1))
        self.batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:].contiguous(), "shift_labels": ids[:, 1:].contiguous()}

    def step(self) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.way != "float32"):
            loss = self.model(**self.batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def speed(shape: str, turns: int) -> dict:
    config, windows, tokens, steps = SHAPES[shape]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    steppers = {way: Stepper(copy.deepcopy(model), way, windows, tokens) for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(turns + 1):  # the first one warms up
        for way, stepper in steppers.items():
            began = time.perf_counter()
            for _ in range(steps):
                stepper.step()
            times[way] += [(time.perf_counter() - began) / steps] if turn else []
    median = {way: statistics.median(values) for way, values in times.items()}
    return {
        "tokens_a_second": {way: round(windows * tokens / value) for way, value in median.items()},
        "fused_to_plain": round(median["plain"] / median["fused"], 3),
        "fused_to_float32": round(median["float32"] / median["fused"], 3),
    }


def peak(way: str) -> float:
    """GiB."""
    config, windows, tokens, _ = SHAPES["124m"]
    stepper = Stepper(AutoModelForCausalLM.from_config(config, dtype=torch.float32), way, windows, tokens)
    for _ in range(2):
        stepper.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--memory", action="store_true", help="peak memory at the 124m preset's whole shape, too")
    parser.add_argument("--peak", choices=WAYS, help="(for itself) print the peak memory of one way, and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    if arguments.peak:
        print(peak(arguments.peak))
        return
    result: dict = {"cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
    for shape in list(SHAPES)[:3]:
        result[shape] = speed(shape, arguments.turns)
        print(shape, json.dumps(result[shape]), flush=True)
    if arguments.memory:
        sizes = {}
        for way in ("plain", "fused"):
            output = subprocess.run([sys.executable, __file__, "--peak", way], check=True, capture_output=True, text=True).stdout
            sizes[way] = round(float(output.split()[-1]), 2)
        result["124m"] = {"peak_gib": sizes, "fused_to_plain": round(sizes["fused"] / sizes["plain"], 3)}
        print("124m", json.dumps(result["124m"]), flush=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
