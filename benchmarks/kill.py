"""Does a run that is killed at random instants end as the run that was not? SIGKILL, real processes, real text.

    python benchmarks/kill.py --runs 100

Each trial prepares its own tokens and trains a tiny LLaMA, is killed one to three times (at any time, or aimed at
preparation, a save, or a rotation), is started again by the same command until it finishes, and is compared with the
uninterrupted run: tokens, weights, optimiser, scheduler, random state and log, byte for byte.

    python benchmarks/kill.py --runs 100 --aim writing

Each trial runs on a slowed disk and is killed once, while the thread writes a checkpoint and training goes on.
"""

import argparse
import glob
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from llama_lite.data import formats, parsing, sources
from llama_lite.files import read_json, read_jsonl, write_json
from llama_lite.training.trainer import TIMINGS

SLOWED = """
import sys, time
sys.path.insert(0, {root!r})
from llama_lite.checkpoint import tensor_files
import run_pretrain
from llama_lite.exit import exit_with_status
write_chunk, tensor_files.CHUNK = tensor_files.write_chunk, 2**14
def write_slowly(file, chunk):
    time.sleep({seconds})
    write_chunk(file, chunk)
tensor_files.write_chunk = write_slowly
exit_with_status(run_pretrain.main)
"""  # a save takes about a second: 1.7 MB in parts of 16 KiB
CHUNK_SECONDS, WRITING_SECONDS = 0.01, 1.2

AIMS = ("anywhere", "preparing", "saving", "rotating")
SETTINGS = """
model_config: tiny
tokenizer: train
vocab_size: 512
shard_tokens: 60000
validation_tokens: 10000
min_characters: 60
exact_dedup: true
block_size: 64
tokens_per_step: 1024
eval_windows: 16
per_device_train_batch_size: 8
max_steps: 30
learning_rate: 1.0e-3
warmup_steps: 5
logging_steps: 4
eval_steps: 10
save_steps: 5
save_total_limit: 2
sample_prompts: ["The"]
sample_tokens: 8
prepare_workers: 2
order: shuffled
cpu_threads: 1
"""


def write_text(path: Path, characters: int) -> None:
    """Real English of about this length, from the documentation of the installed packages, as jsonl."""
    left = characters
    with open(path, "w", encoding="utf-8") as file:
        for module in sources.resolve("installed-docs").files:
            for document in parsing.read(module, formats.Skipped()):
                file.write(json.dumps({"text": document.text}) + "\n")
                left -= len(document.text)
            if left <= 0:
                return


def command(text: Path, place: Path, slowed: bool = False) -> list[str]:
    code = SLOWED.format(root=str(ROOT), seconds=CHUNK_SECONDS)
    return [
        sys.executable,
        *(("-c", code) if slowed else (str(ROOT / "run_pretrain.py"),)),
        "--config",
        str(text.with_name("kill.yaml")),
        *("--dataset", str(text), "--prepared_dir", str(place / "data"), "--output_dir", str(place / "run")),
    ]


def launch(text: Path, place: Path, slowed: bool = False) -> subprocess.Popen:
    place.mkdir(parents=True, exist_ok=True)
    log = open(place / "output.txt", "a")
    return subprocess.Popen(command(text, place, slowed), stdout=log, stderr=log)


def outcome(place: Path) -> dict[str, str]:
    """sha256 of everything that two equal runs must share."""
    files = [*(place / "data").glob("*.npy"), place / "data" / "manifest.json", place / "run" / "model.safetensors"]
    last = max((place / "run").glob("checkpoint-*"), key=lambda folder: int(folder.name.removeprefix("checkpoint-")))
    files += [path for path in last.iterdir() if path.name not in ("manifest.json", "trainer_state.json")]
    found = {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    log = [
        {key: value for key, value in entry.items() if key not in TIMINGS}
        for entry in read_jsonl(place / "run" / "log.jsonl")
    ]
    found["log.jsonl"] = hashlib.sha256(json.dumps(log).encode()).hexdigest()
    return found


def kill_once(text: Path, place: Path, aim: str, seconds: float, chance: random.Random) -> str | None:
    """Start the run and kill it; returns what it was doing, or None when it finished first."""
    process = launch(text, place, aim == "writing")
    began, moment = time.monotonic(), chance.uniform(0, seconds)
    patterns = {
        "preparing": "data/*",
        "saving": "run/.staging-*/*",
        "writing": "run/.staging-*/model.safetensors",
        "rotating": "run/.deleted-*",
    }
    delay = chance.uniform(
        0, {"preparing": 1.0, "saving": 0.03, "writing": WRITING_SECONDS, "rotating": 0.003}.get(aim, 0)
    )
    passes = chance.randrange(4) if aim in ("saving", "writing", "rotating") else 0
    seen: set = set()
    while process.poll() is None:
        if aim == "anywhere":
            if time.monotonic() - began > moment:
                break
        else:
            found = glob.glob(
                patterns[aim], root_dir=place
            )  # unlike Path.glob, it bears a folder that goes while it looks
            seen.update(path.split("/")[1] if aim != "preparing" else path.split("/")[0] for path in found)
            if len(seen) > passes:
                time.sleep(delay)
                break
        time.sleep(0.0005 if aim != "anywhere" else 0.005)
    if process.poll() is not None:
        assert process.returncode == 0, (place / "output.txt").read_text()
        return None
    doing = _doing(place)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return doing


def _doing(place: Path) -> str:
    if glob.glob(".staging-*/*.safetensors", root_dir=place / "run"):
        return "writing"
    if glob.glob(".staging-*", root_dir=place / "run"):
        return "saving"
    if glob.glob(".deleted-*", root_dir=place / "run"):
        return "rotating"
    if not (place / "data" / "manifest.json").exists():
        return "preparing" if (place / "data").exists() else "starting"
    log = place / "run" / "events.jsonl"
    return "training" if log.exists() and "start" in log.read_text() else "starting"


def trial(text: Path, place: Path, seconds: float, seed: int, aim: str | None = None) -> list[str]:
    """Kill one run one to three times (one that is `writing` once) and let it finish; returns what it was doing each
    time.
    """
    chance, kills = random.Random(seed), []
    for _ in range(1 if aim == "writing" else chance.randint(1, 3)):
        doing = kill_once(text, place, aim or AIMS[seed % len(AIMS)], seconds, chance)
        if doing is None:
            break
        kills.append(doing)
    process = launch(text, place)
    assert process.wait() == 0, (place / "output.txt").read_text()
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--aim", choices=("writing",))
    parser.add_argument("--parallel", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        write_text(text, 300_000)
        text.with_name("kill.yaml").write_text(SETTINGS)
        began = time.monotonic()
        assert launch(text, Path(folder) / "whole").wait() == 0, (Path(folder) / "whole/output.txt").read_text()
        seconds, expected = time.monotonic() - began, outcome(Path(folder) / "whole")
        equal, kills, unequal = 0, Counter(), []

        def one(seed):
            place = Path(folder) / f"trial-{seed}"
            done = trial(text, place, seconds, seed, arguments.aim)
            found = outcome(place)
            different = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            if not different:
                shutil.rmtree(place)
            return seed, done, different

        with ThreadPoolExecutor(arguments.parallel) as pool:
            for seed, done, different in pool.map(one, range(arguments.runs)):
                kills.update(done)
                equal += not different
                unequal += [{"seed": seed, "kills": done, "different": different}] if different else []
                print(
                    f"run {seed}: killed while {', '.join(done) or '(finished first)'}:"
                    f" {'equal' if not different else f'DIFFERENT {different}'}",
                    flush=True,
                )
        result = {
            "runs": arguments.runs,
            "equal": equal,
            "kills": dict(kills),
            "compared": sorted(expected),
            "unequal": unequal,
        }
        print(f"{equal} of {arguments.runs} runs equal the uninterrupted one; kills: {dict(kills)}")
        before = read_json(arguments.output) or {}
        if arguments.aim:
            result = before | {arguments.aim: {name: result[name] for name in ("runs", "equal", "kills", "unequal")}}
        elif "writing" in before:
            result["writing"] = before["writing"]
        write_json(arguments.output, result)
    sys.exit(equal != arguments.runs)


if __name__ == "__main__":
    main()
