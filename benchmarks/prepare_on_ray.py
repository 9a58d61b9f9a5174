"""Preparing on a Ray cluster of two nodes on this machine: the bytes of one process, also when a node is killed, and
the time.

    python benchmarks/prepare_on_ray.py                      # 10 small texts, 5 of them with a node killed; 200 MB timed
    python benchmarks/prepare_on_ray.py --small 2 --megabytes 0

Small: each text is other documents, in three files; every second one is curated (a length, equal texts, near
duplicates), the others are one plain file that is cut, one compressed and one table. Each is prepared by one process,
then on the cluster, and every file of the prepared and the curated folder is compared. In half of them one of the two
nodes is killed, after a random share of the time that the same took before, and another joins afterwards. Time: one
text of `--megabytes`, curated, by two processes here and by two nodes with one CPU each, in turn; starting the cluster
is told apart.

The name of this file is not ray.py, because Python would import it instead of the package.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false"}
from llama_lite.config.pretrain import parse_pretrain
from llama_lite.data import formats, given_text, preparation, sources
from llama_lite.files import read_json, write_json
from llama_lite.provenance import processor

CURATED = ["--min_characters", "100", "--exact_dedup", "--minhash_dedup"]
STORE = 300 * 2**20  # bytes of a node's object store
NODE = {"num_cpus": 1, "object_store_memory": STORE}


def documents() -> list[str]:
    """The documentation of the installed packages."""
    return [document.text for document in sources.resolve("installed-docs").documents(formats.Skipped())]


def write_jsonl(path: Path, texts: list[str], size: int) -> None:
    """Lines of texts, which begin again at the end, up to about `size` bytes."""
    with open(path, "w", encoding="utf-8") as file:
        number = 0
        while file.tell() < size:
            file.write(json.dumps({"text": texts[number % len(texts)]}) + "\n")
            number += 1


def write_small(folder: Path, texts: list[str], curated: bool, rng: random.Random) -> None:
    """Three files of random documents: 6 MB to be curated, or 30 MB, one file of which is cut for several tasks."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    folder.mkdir(parents=True)
    rng.shuffle(texts)
    write_jsonl(folder / "a.jsonl", texts, 4_000_000 if curated else 24_000_000)
    write_jsonl(folder / "b.jsonl", texts[1000:], 1_000_000)
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress((folder / "b.jsonl").read_bytes()))
    (folder / "b.jsonl").unlink()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[-4000:]}), folder / "c.parquet")


def prepare(text: Path, out: Path, *argv: str, workers: int = 2) -> float:
    """Seconds that preparing takes."""
    shutil.rmtree(out, ignore_errors=True)
    settings = ["--dataset", text, "--prepared_dir", out / "tokens", "--curated_dir", out / "curated"]
    settings += ["--tokenizer", "gpt2", "--shard_tokens", 1_000_000, "--validation_tokens", 100_000, "--block_size", 64]
    _, data, curation, *_ = parse_pretrain([*map(str, settings), "--prepare_workers", str(workers), *argv])
    begin = time.perf_counter()
    preparation.prepare(data, dataclasses.asdict(curation), given_text.Text(data), set())
    return time.perf_counter() - begin


def files_of(out: Path) -> dict[str, bytes]:
    """Every file of a prepared and a curated folder, but datatrove's own records of its stages (times, logs)."""
    paths = [path for path in out.rglob("*") if path.is_file() and "stages" not in path.relative_to(out).parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


class Killer(threading.Thread):
    """Kills a node of a cluster after some seconds, and says at which stage that was."""

    def __init__(self, cluster, node, seconds: float, out: Path):
        super().__init__(daemon=True)
        self.cluster, self.node, self.seconds, self.out, self.at = cluster, node, seconds, out, None
        self.ended = threading.Event()

    def run(self) -> None:
        """Wait, and kill."""
        if not self.ended.wait(self.seconds):
            stages = sorted((self.out / "curated" / "curation" / "stages").glob("*"), key=lambda p: p.stat().st_mtime)
            begun = (self.out / "tokens" / "progress.json").exists()
            self.at = "encoding" if begun else stages[-1].name if stages else "checks"
            self.cluster.remove_node(self.node, allow_graceful=False)


def small(cluster, count: int, killed: int, folder: Path, seed: int) -> dict:
    """`count` small texts, `killed` of them with a node killed."""
    rng, texts, trials, took = random.Random(seed), documents(), [], {}
    node = cluster.add_node(**NODE)
    for number in range(count):
        curated, kills = number % 2 == 0, number >= count - killed
        text, here, there = (folder / f"{name}-{number}" for name in ("text", "here", "there"))
        write_small(text, texts, curated, rng)
        argv = CURATED if curated else []
        prepare(text, here, *argv, workers=1)
        killer = None
        while killer is None or (kills and not killer.at):  # again where it ended before the node was killed
            killer = Killer(cluster, node, rng.uniform(0.1, 0.8) * took.get(curated, 20.0), there)
            if kills:
                killer.start()
            seconds = prepare(text, there, "--prepare_on", "ray", *argv)
            if kills:
                killer.ended.set()
                killer.join()
            if killer.at:
                node = cluster.add_node(**NODE)
            else:
                took[curated] = seconds
        expected, found = files_of(here), files_of(there)
        different = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        trials.append({"curated": curated, "files": len(expected), "different": different})
        trials[-1] |= {"killed_at": killer.at} if kills else {}
        print(json.dumps(trials[-1] | {"seconds": round(seconds, 1)}), flush=True)
        for path in (text, here, there):
            shutil.rmtree(path)
    cluster.remove_node(node)
    with_kill = [trial for trial in trials if "killed_at" in trial]
    return {
        "texts": len(trials),
        "equal": sum(not trial["different"] for trial in trials),
        "with_a_node_killed": len(with_kill),
        "of_them_equal": sum(not trial["different"] for trial in with_kill),
        "trials": trials,
    }


def speed(cluster, megabytes: int, repeats: int, folder: Path) -> dict:
    """Seconds here, with two processes, and on two nodes with one CPU each, in turn."""
    text, texts, times = folder / "text", documents(), {"here": [], "on_ray": []}
    text.mkdir()
    for number in range(10):
        write_jsonl(text / f"{number}.jsonl", texts[number * 1000 :] + texts, megabytes * 100_000)
    node = cluster.add_node(**NODE)
    for _ in range(repeats):
        times["here"].append(prepare(text, folder / "here", *CURATED))
        times["on_ray"].append(prepare(text, folder / "on_ray", "--prepare_on", "ray", *CURATED))
        print(json.dumps(times), flush=True)
    cluster.remove_node(node)
    here, on_ray = (statistics.median(times[name]) for name in ("here", "on_ray"))
    seconds = {name: [round(value, 1) for value in values] for name, values in times.items()}
    return {"megabytes": megabytes, "ratio_to_here": round(on_ray / here, 3), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=10)
    parser.add_argument("--killed", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    from ray.cluster_utils import Cluster

    begin = time.perf_counter()
    head = {**NODE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    os.environ["RAY_ADDRESS"] = cluster.address
    started = {"seconds_to_start_ray": round(time.perf_counter() - begin, 1), "processor": processor()}
    result = (read_json(arguments.output) or {}) | started
    with tempfile.TemporaryDirectory() as folder:
        if arguments.small:
            result["small"] = small(cluster, arguments.small, arguments.killed, Path(folder), arguments.seed)
            write_json(arguments.output, result)
        if arguments.megabytes:
            result["speed"] = speed(cluster, arguments.megabytes, arguments.repeats, Path(folder))
            write_json(arguments.output, result)
    cluster.shutdown()


if __name__ == "__main__":
    main()
