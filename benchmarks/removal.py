"""Does a run that goes on without some documents end as one from step 0 that never read them? Real text, real runs.

    python benchmarks/removal.py                # 50 lists, over 5 runs
    python benchmarks/removal.py --lists 4 --runs 1

Each of `--runs` seeds trains a tiny LLaMA for 16 steps, more than one epoch, and saves every second step. Each list has
one to four random documents among those that were read after the first checkpoint. The run goes on from the newest checkpoint before their first
use, and is compared with a run from step 0 with the same list: weights, optimizer, schedule, random state, tokens, log,
bit for bit. That the checkpoint after it is refused, with the name of the one that was used, is counted too, and that
the weights are other ones than those of the run that read the documents.
"""

import argparse
import contextlib
import hashlib
import io
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.kill import write_text
from llama_lite.data.document_index import DocumentIndex
from llama_lite.data.run_windows import windows_of_run
from llama_lite.errors import Refusal
from llama_lite.files import read_json, read_jsonl, write_json
from llama_lite.training.trainer import TIMINGS

STEPS, EVERY = 16, 2
SETTINGS = f"""
model_config: tiny
tokenizer: train
vocab_size: 512
shard_tokens: 6000
validation_tokens: 5000
block_size: 64
tokens_per_step: 1024
eval_windows: 8
probe_windows: 2
per_device_train_batch_size: 8
max_steps: {STEPS}
allow_epochs: true
learning_rate: 1.0e-3
warmup_steps: 5
logging_steps: 2
eval_strategy: "no"
save_steps: {EVERY}
save_total_limit: 99
sample_tokens: 0
prepare_workers: 1
order: shuffled
cpu_threads: 1
compile_layers: false
"""


def train(*argv: object) -> str:
    """What run_pretrain.py prints, in this process. Raises Refusal."""
    from run_pretrain import main

    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(list(map(str, argv)))
    return said.getvalue()


def outcome(run: Path) -> dict[str, str]:
    """sha256 of everything that two equal runs must share."""
    files = [run / "model.safetensors"]
    files += [
        path
        for path in (run / f"checkpoint-{STEPS}").iterdir()
        if path.name not in ("manifest.json", "trainer_state.json")
    ]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    log = [{k: v for k, v in entry.items() if k not in TIMINGS} for entry in read_jsonl(run / "log.jsonl")]
    return found | {"log": hashlib.sha256(json.dumps(log).encode()).hexdigest()}


def first_uses(run: Path, tokens: Path) -> dict[str, int]:
    """{document: the first step that read it} of a run."""
    manifest, data = read_json(tokens / "manifest.json"), read_json(run / "run.json")["identity"]["data"]
    windows = windows_of_run({manifest["fingerprint"]: (tokens, manifest)}, data, STEPS)
    size, per_step, found = data["block_size"], data["tokens_per_step"] // data["block_size"], {}
    read = [(window * size, window * size + size + 1) for window in map(windows.window_of, range(len(windows)))]
    for position, spans in enumerate(DocumentIndex(tokens, manifest).documents("train", read)):
        for span in spans:
            # the last token of a window may be the end-of-text before a document of the next
            if span.first + 1 < read[position][1]:
                found.setdefault(span.location, position // per_step + 1)
    return found


def trial(command: list, base: Path, folder: Path, uses: dict[str, int], rng: random.Random) -> dict:
    """One list: what the two runs share."""
    names = rng.sample(sorted(uses), rng.randint(1, 4))
    first = min(uses[name] for name in names)
    (folder / "list.txt").write_text("\n".join(names))
    without = [*command, "--without_documents", folder / "list.txt"]
    usable = (first - 1) // EVERY * EVERY
    later = base / f"checkpoint-{usable + EVERY}"
    refused = f"Start from {base}/checkpoint-{usable}."
    try:
        train(*without, "--output_dir", folder / "late", "--resume_from_checkpoint", later)
        named = False
    except Refusal as refusal:
        named = refused in str(refusal)
    start = ["--resume_from_checkpoint", base / f"checkpoint-{usable}"]
    said = train(*without, "--output_dir", folder / "resumed", *start)
    train(*without, "--output_dir", folder / "whole")
    runs = [outcome(folder / name) for name in ("resumed", "whole")]
    different = sorted(name for name in {*runs[0], *runs[1]} if runs[0].get(name) != runs[1].get(name))
    began = f"start     step {usable}, " in said
    record = read_json(folder / "whole" / "run.json")["identity"]["data"]["without_documents"]
    for name in ("late", "resumed", "whole"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return {
        "documents": record["documents"],
        "windows": record["windows"],
        "first_use": first,
        "from_step": usable,
        "began_there": began,
        "later_refused": named,
        "different": different,
        "other_than_base": runs[1]["model.safetensors"] != outcome(base)["model.safetensors"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lists", type=int, default=50)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    rng, trials = random.Random(1), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text.jsonl", 60_000)
        (folder / "run.yaml").write_text(SETTINGS)
        for seed in range(arguments.runs):
            base, tokens = folder / f"base-{seed}", folder / "tokens"
            command = ["--config", folder / "run.yaml", "--dataset", folder / "text.jsonl", "--prepared_dir", tokens]
            command += ["--seed", seed]
            train(*command, "--output_dir", base)
            uses = {name: step for name, step in first_uses(base, tokens).items() if step > EVERY}
            for _ in range(arguments.lists // arguments.runs):
                trials.append(trial(command, base, folder, uses, rng))
                print(json.dumps(trials[-1]), flush=True)
                result = {
                    "lists": len(trials),
                    "equal": sum(not one["different"] for one in trials),
                    "later_checkpoint_refused": sum(one["later_refused"] for one in trials),
                    "other_weights_than_with_the_documents": sum(one["other_than_base"] for one in trials),
                    "began_at_a_checkpoint": sum(one["began_there"] for one in trials),
                    "trials": trials,
                }
                write_json(arguments.output, result)


if __name__ == "__main__":
    main()
