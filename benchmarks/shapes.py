"""What size of model, and which learning rate, a text and a number of tokens ask for: the runs behind the rules of
`llama_lite/models/shapes.py`.

    python benchmarks/shapes.py              # every run that shapes.json lacks; some hours on two cores
    python benchmarks/shapes.py --compare    # what is there, beside what the rules expect

Each run is `run_pretrain.py` on the long demo's tokens (`configs/pretrain/demo-long.yaml --prepare_only`), its values
derived by the rules themselves. `sizes`: shapes times tokens, one pass over new text. `rates`: multiples of the rule's
rate. `epochs`: a short text read several times.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama_lite.files import read_json, read_jsonl, write_json
from llama_lite.models import shapes

RESULTS = Path(__file__).with_suffix(".json")
SIZES = {
    "2x64": (0.5, 1),
    "3x64": (0.5, 1, 2, 4, 8),
    "4x96": (0.5, 1, 2),
    "4x128": (0.5, 1, 2, 4),
    "6x192": (0.5, 1, 2),
    "6x256": (0.5, 1),
}  # millions of tokens
RATES = {("3x64", 1): (0.5, 2), ("4x128", 1): (0.5, 2)}  # multiples of the rule's rate
EPOCHS = {
    ("3x64", 0.1): (2, 4, 8),
    ("4x128", 0.1): (2, 4, 8),
    ("4x96", 0.5): (2, 4, 8),
}  # of a text of so many million tokens


def wanted() -> list[dict]:
    runs = [
        {"shape": shape, "millions": tokens, "rate": 1, "unique": tokens}
        for shape, many in SIZES.items()
        for tokens in many
    ]
    runs += [
        {"shape": shape, "millions": tokens, "rate": rate, "unique": tokens}
        for (shape, tokens), many in RATES.items()
        for rate in many
    ]
    runs += [
        {"shape": shape, "millions": unique * n, "rate": 1, "unique": unique}
        for (shape, unique), many in EPOCHS.items()
        for n in many
    ]
    return sorted(runs, key=lambda run: run["millions"])


def measure(run: dict) -> dict:
    """The run's last and best validation loss in bits per byte, and what its rules gave."""
    reads, width = run["millions"] * 1e6, shapes.parse(run["shape"])[1]
    per_step = shapes.tokens_per_step(reads)
    steps = max(1, round(reads / per_step))
    with tempfile.TemporaryDirectory() as folder:
        prepared = ["--config", str(ROOT / "configs/pretrain/demo-long.yaml")]
        if run["unique"] < 0.6 and run["unique"] != run["millions"]:
            cut = [
                "--max_tokens",
                str(150_000 + int(run["unique"] * 1e6)),
                "--prepared_dir",
                f"data/shapes-{run['unique']}",
                "--tokenizer",
                "data/demo-long/tokenizer",
            ]
            prepared += cut
        argv = [
            *prepared,
            "--output_dir",
            f"{folder}/run",
            "--model_config",
            run["shape"],
            "--max_steps",
            str(steps),
            "--tokens_per_step",
            str(per_step),
        ]
        argv += [
            "--block_size",
            "256",
            "--per_device_train_batch_size",
            str(min(8, per_step // 256)),
            "--allow_epochs",
            "--sample_tokens",
            "0",
        ]
        argv += [
            "--learning_rate",
            str(run["rate"] * shapes.learning_rate(width)),
            "--warmup_steps",
            str(max(1, round(0.04 * steps))),
        ]
        argv += [
            "--eval_steps",
            str(max(1, steps // 8)),
            "--save_steps",
            str(steps),
            "--logging_steps",
            str(max(1, steps // 20)),
            "--save_total_limit",
            "1",
        ]
        done = subprocess.run([sys.executable, "run_pretrain.py", *argv], cwd=ROOT, capture_output=True, text=True)
        losses = [
            entry["eval_bits_per_byte"]
            for entry in read_jsonl(Path(folder) / "run" / "log.jsonl")
            if "eval_bits_per_byte" in entry
        ]
        if done.returncode or not losses:
            raise SystemExit(f"{run}: {done.stderr[-2000:]}")
    return {
        **run,
        "tokens_per_step": per_step,
        "learning_rate": run["rate"] * shapes.learning_rate(width),
        "last": losses[-1],
        "best": min(losses),
    }


def compare(runs: list[dict]) -> None:
    """A line a run: bits per byte that it ended with, and by how much `shapes.expected_loss` is above."""
    for run in runs:
        expected = shapes.expected_loss(shapes.parse(run["shape"]), run["millions"] * 1e6, run["unique"] * 1e6)
        of = (
            f"{run['millions']}M tokens, {run['millions'] / run['unique']:g} epochs, {run['rate']:g} times the rule's"
            " rate"
        )
        print(f"{run['shape']:>6}  {of:<55} {run['last']:.3f}  {expected - run['last']:+.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    record = read_json(RESULTS) or {"runs": []}
    done = {(row["shape"], row["millions"], row["rate"], row["unique"]) for row in record["runs"]}
    for run in [] if arguments.compare else wanted():
        if (run["shape"], run["millions"], run["rate"], run["unique"]) not in done:
            record["runs"].append(measure(run))
            print(json.dumps(record["runs"][-1]), flush=True)
            write_json(RESULTS, record)
    compare(record["runs"])


if __name__ == "__main__":
    main()
