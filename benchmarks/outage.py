"""Does every checkpoint reach a Hub that fails, from a run that is killed? And what does publishing cost the training?

    python benchmarks/outage.py --runs 30

Each trial trains a tiny LLaMA that publishes to tests/support/hub_server.py while a random schedule takes the Hub down,
answers 503 or 429, cuts uploads or loses answers, and SIGKILLs the run. In the end `--publish_only` empties the queue,
and every revision is compared with the uninterrupted run's. Cost: the demo's model, with and without publishing at 1
MB/s, in turn (see `cost`).
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]
from hub_server import Fault, Hub

from benchmarks import kill
from llama_lite.files import read_json, read_jsonl, write_json

REPO, STEPS = "org/run", (5, 10, 15, 20, 25, 30)
SLICE = 5.0  # seconds that one of two runs has the machine
KINDS = (503, 429, 500, "drop", "cut", "lose")
MODEL = """
model_config: demo
tokenizer: train
vocab_size: 4096
shard_tokens: 1000000
validation_tokens: 20000
block_size: 256
tokens_per_step: 2048
per_device_train_batch_size: 8
eval_strategy: "no"
max_steps: 100000
allow_epochs: true
warmup_steps: 5
logging_steps: 1
save_steps: 40
save_total_limit: 2
sample_tokens: 0
order: shuffled
"""


def launch(text: Path, place: Path, hub: Hub | None, *more: str) -> subprocess.Popen:
    place.mkdir(parents=True, exist_ok=True)
    publishing = ("--push_to_hub", "--hub_model_id", REPO, "--hub_drain_timeout", "2") if hub else ()
    environment = {**os.environ, **(hub.environment() if hub else {}), "HF_HOME": str(place / "cache")}
    log = open(place / "output.txt", "a")
    return subprocess.Popen([*kill.command(text, place), *publishing, *more], stdout=log, stderr=log, env=environment)


def trouble(hub: Hub, chance: random.Random, over: threading.Event, met: Counter) -> None:
    """Random faults and outages until `over`."""
    while not over.wait(chance.uniform(0.1, 1.0)):
        if chance.random() < 0.3:
            met["down"] += 1
            hub.down()
            over.wait(chance.uniform(0.2, 2.0))
            hub.up()
        else:
            kind = chance.choice(KINDS)
            met[str(kind)] += 1
            hub.faults.append(
                Fault(
                    chance.choice((".", "POST .*/commit/", "PUT /lfs/", "POST .*/tag/", "POST .*/branch/", "GET ")),
                    kind,
                    chance.randint(1, 4),
                )
            )


def trial(text: Path, place: Path, seconds: float, seed: int, expected: dict) -> dict:
    """One run under trouble; what is wrong with its repository in the end (nothing), and what it met."""
    chance, met = random.Random(seed), Counter()
    with Hub() as hub:
        over = threading.Event()
        worker = threading.Thread(target=trouble, args=(hub, random.Random(seed + 1000), over, met))
        worker.start()
        for _ in range(chance.randint(0, 2)):
            process = launch(text, place, hub)
            try:
                process.wait(chance.uniform(0.3, 1.2) * seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                met["killed"] += 1
        assert launch(text, place, hub).wait() == 0, (place / "output.txt").read_text()
        over.set()
        worker.join()
        hub.faults.clear()
        last = launch(text, place, hub, "--publish_only", "--hub_drain_timeout", "300")
        assert last.wait() == 0, (place / "output.txt").read_text()
        return {"seed": seed, "met": met, "wrong": wrong_with(hub, expected)}


def wrong_with(hub: Hub, expected: dict) -> list[str]:
    """Revisions that are lost, torn, out of order, or not the uninterrupted run's."""
    there, problems = hub.repos["models", REPO], []
    order, oid = [], there.branches["checkpoints"]
    while there.commits[oid]["parent"]:
        order.insert(0, json.loads(hub.objects[there.commits[oid]["files"]["revision.json"][0]])["step"])
        oid = there.commits[oid]["parent"]
    if tuple(order) != STEPS:
        problems.append(f"order {order}")
    for step in STEPS:
        tag = f"step-{step:06d}"
        if tag not in there.tags:
            problems.append(f"{tag} lost")
            continue
        files = hub.files(REPO, tag)
        record = json.loads(files["revision.json"])["files"]
        if set(files) != {*record, "revision.json", ".gitattributes"} or any(
            hashlib.sha256(files[n]).hexdigest() != r["sha256"] for n, r in record.items()
        ):
            problems.append(f"{tag} torn")
        for name in ("model.safetensors", "training_state/optimizer.safetensors"):
            if expected and record[name]["sha256"] != expected[tag][name]:
                problems.append(f"{tag} has another {name}")
    if hub.files(REPO).get("model.safetensors") != files["model.safetensors"] or len(
        hub.files(REPO)["checkpoints.csv"].splitlines()
    ) != 1 + len(STEPS):
        problems.append("main is not the finished model")
    return problems


def extra_disk(place: Path, over: threading.Event, found: list[float]) -> None:
    """Largest share of a checkpoint that the queue holds beyond hard links."""
    while not over.wait(0.05):
        try:
            files = [path.stat() for path in (place / "run" / "queue").rglob("*") if path.is_file()]
            whole = sum(path.stat().st_size for path in (place / "run" / "checkpoint-40").iterdir())
        except OSError:  # a folder that goes while it is looked at
            continue
        exports = sum(path.st_size for path in files if path.st_nlink == 1)
        found.append(exports / whole)


def cost(folder: Path, pairs: int) -> dict:
    """Steps in the same time with publishing at 1 MB/s and without.

    Two runs share the machine, one of them always stopped (SIGSTOP): slices of SLICE seconds in turn, so that both meet
    the same neighbours. A run is measured from its sixth step on; every 40 steps one revision is queued, which takes
    about as long to upload as the next 100 steps take, so that the publisher always has work.
    """
    text = folder / "text.jsonl"
    kill.write_text(text, 4_000_000)
    text.with_name("kill.yaml").write_text(MODEL)
    assert launch(text, folder / "shared", None, "--prepare_only").wait() == 0
    shares: list[float] = []
    with Hub(rate=1e6) as hub:
        runs = {}
        for publishes in (False, True):
            place = folder / f"cost-{publishes}"
            place.mkdir()
            (place / "data").symlink_to(folder / "shared" / "data")
            process = launch(text, place, hub if publishes else None)
            while steps_of(place) < 45:
                assert process.poll() is None, (place / "output.txt").read_text()
                time.sleep(0.1)
            process.send_signal(signal.SIGSTOP)
            runs[publishes] = (process, place)
        over = threading.Event()
        watch = threading.Thread(target=extra_disk, args=(runs[True][1], over, shares))
        watch.start()
        done: dict[bool, list[int]] = {False: [], True: []}
        for pair in range(pairs):
            for publishes in (False, True) if pair % 2 else (True, False):
                process, place = runs[publishes]
                before = steps_of(place)
                process.send_signal(signal.SIGCONT)
                time.sleep(SLICE)
                process.send_signal(signal.SIGSTOP)
                done[publishes].append(steps_of(place) - before)
        over.set()
        watch.join()
        for process, _ in runs.values():
            assert process.poll() is None, "a run ended before the measurement"
            process.kill()
            process.wait()
    chance = random.Random(0)
    draws = sorted(ratio(done, [chance.randrange(pairs) for _ in range(pairs)]) for _ in range(2000))
    return {
        "step_time_publishing_to_not": round(ratio(done, range(pairs)), 3),
        "step_time_95_interval": [round(draws[50], 3), round(draws[1949], 3)],
        "slices": pairs,
        "steps": {"publishing": sum(done[True]), "not": sum(done[False])},
        "disk_beyond_hard_links_of_a_checkpoint": round(max(shares), 3),
    }


def steps_of(place: Path) -> int:
    """Steps that a run has logged."""
    return len(read_jsonl(place / "run" / "log.jsonl"))


def ratio(done: dict[bool, list[int]], pairs) -> float:
    return sum(done[False][pair] for pair in pairs) / sum(done[True][pair] for pair in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30, help="trials (0: none; the last ones' figures stay)")
    parser.add_argument(
        "--pairs", type=int, default=60, help="slices of the cost measurement (0: none; the last one's figures stay)"
    )
    parser.add_argument("--parallel", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = read_json(arguments.output) or {}
        if arguments.pairs:
            (Path(folder) / "cost").mkdir()
            result |= cost(Path(folder) / "cost", arguments.pairs)
            write_json(arguments.output, result)
            print(result, flush=True)
        if not arguments.runs:
            return
        text = Path(folder) / "text.jsonl"
        kill.write_text(text, 300_000)
        text.with_name("kill.yaml").write_text(kill.SETTINGS)
        began = time.monotonic()
        with Hub() as hub:
            assert launch(text, Path(folder) / "whole", hub, "--hub_drain_timeout", "300").wait() == 0, (
                Path(folder) / "whole/output.txt"
            ).read_text()
            seconds = time.monotonic() - began
            tags = hub.repos["models", REPO].tags
            expected = {
                tag: {n: r["sha256"] for n, r in json.loads(hub.files(REPO, tag)["revision.json"])["files"].items()}
                for tag in tags
            }
            assert not wrong_with(hub, expected)
        met, wrong = Counter(), []
        with ThreadPoolExecutor(arguments.parallel) as pool:
            for found in pool.map(
                lambda seed: trial(text, Path(folder) / str(seed), seconds, seed, expected), range(arguments.runs)
            ):
                met.update(found["met"])
                wrong += [f"seed {found['seed']}: {problem}" for problem in found["wrong"]]
                print(
                    f"run {found['seed']}: {dict(found['met'])}: {found['wrong'] or 'all there, whole, in order'}",
                    flush=True,
                )
        result |= {"runs": arguments.runs, "met": dict(met), "wrong": wrong}
        write_json(arguments.output, result)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
