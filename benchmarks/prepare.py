"""Preparing tokens: speed a core against a plain tiktoken loop, memory against the size of the text, ids against the HF
tokenizer.

    python benchmarks/prepare.py

Speed: the embedded corpus, repeated up to `--megabytes`, GPT-2's vocabulary, seconds of all in turn (A B A B ...),
medians. `plain` is the loop that many projects use: read, encode_ordinary, into uint16; `plain_on_all` is that loop
over the whole text in one process a core at once; ours has as many workers, besides the process that reads and writes.
Memory: the largest sum over all processes of their proportional shares (PSS) while preparing 50 MB and 1 GB. Ids: every
document of the embedded corpus. Scale (--scale alone: the other figures stay): the folder that ten workers prepare,
curation and all, against one worker's, file by file; and a run's 20.5e9 tokens in sparse shards, opened. Index (--index
alone): seconds of all with and without the index of documents, in turn, over rows with an id and a URL; its bytes.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.kill import write_text
from llama_lite.data import formats, sources
from llama_lite.data.tokenizer import Encoder, gpt2_tokenizer, train_tokenizer
from llama_lite.files import read_json, write_json
from llama_lite.provenance import processor


def prepare_command(text: Path, out: Path, workers: int) -> list[str]:
    settings = {
        "--dataset": text,
        "--prepared_dir": out,
        "--tokenizer": "gpt2",
        "--prepare_workers": workers,
        "--validation_tokens": 100_000,
        "--block_size": 1024,
    }
    return [
        sys.executable,
        str(ROOT / "run_pretrain.py"),
        "--prepare_only",
        *(str(part) for pair in settings.items() for part in pair),
    ]


def plain(text: Path) -> None:
    """The plain loop: read, encode, into uint16 arrays; end-of-text before each document."""
    encoding = Encoder(gpt2_tokenizer()).fast
    with open(text, encoding="utf-8") as file:
        for line in file:
            ids = [50256, *encoding.encode_ordinary(json.loads(line)["text"])]
            np.array(ids, dtype=np.uint16)


def timed(processes: int, function, *arguments) -> float:
    """Seconds until `processes` of the same, started at once, have ended."""
    began = time.perf_counter()
    running = [multiprocessing.get_context("fork").Process(target=function, args=arguments) for _ in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join()
        assert process.exitcode == 0
    return time.perf_counter() - began


def ours(text: Path, out: Path, workers: int, indexed: bool = True) -> None:
    """What `tokens.prepare` does once it knows its tokenizer: read, encode, write the shards and, where `indexed`, the
    index of documents.
    """
    from llama_lite.config.pretrain import parse_pretrain
    from llama_lite.data import shards
    from llama_lite.data.shards import ShardWriter, tokenize

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    source = sources.resolve(str(text))
    tokenizer = gpt2_tokenizer()
    data = parse_pretrain(["--block_size", "256"])[1]
    writer = ShardWriter(out, len(tokenizer), data.shard_tokens, 100_000, None)
    if not indexed:
        writer.index, shards.names_of = None, lambda documents: None
    for batch in tokenize(source, tokenizer, writer.position, workers):
        writer.add(batch)
    writer.finish(len(source.files))


def group_map(text: Path, cache: Path) -> None:
    """run_clm's way: `datasets.map` of the HF tokenizer, then of the grouping, one process."""
    from datasets import load_dataset

    tokenizer = gpt2_tokenizer()
    rows = load_dataset("json", data_files=str(text), split="train", cache_dir=str(cache))
    rows = rows.map(
        lambda batch: tokenizer(batch["text"]),
        batched=True,
        remove_columns=rows.column_names,
        load_from_cache_file=False,
    )

    def group(batch):
        joined = {key: list(itertools.chain(*batch[key])) for key in batch}
        whole = len(joined["input_ids"]) // 1024 * 1024
        return {key: [ids[i : i + 1024] for i in range(0, whole, 1024)] for key, ids in joined.items()}

    rows.map(group, batched=True, load_from_cache_file=False)


def peak_memory(command: list[str]) -> int:
    """Largest sum of PSS, in bytes, over a command and its descendants."""
    import psutil

    process, peak = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        for one in [root, *root.children(recursive=True)]:
            try:
                total += one.memory_full_info().pss
            except psutil.Error:
                continue
        peak = max(peak, total)
        time.sleep(0.2)
    assert process.returncode == 0, command
    return peak


def equal_ids() -> dict:
    """Documents of the embedded corpus whose ids equal the HF tokenizer's, GPT-2's and a learnt one."""
    texts = [document.text for document in sources.resolve("installed-docs").documents(formats.Skipped())]
    found = {"documents": len(texts), "characters": sum(map(len, texts))}
    for name, tokenizer in (("gpt2", gpt2_tokenizer()), ("demo", train_tokenizer(iter(texts), 4096))):
        encode, equal = Encoder(tokenizer), 0
        assert encode.fast
        for begin in range(0, len(texts), 1000):
            batch = texts[begin : begin + 1000]
            expected = tokenizer(batch, split_special_tokens=True, add_special_tokens=False)["input_ids"]
            ids, ends, _ = encode.batch(batch)
            found_ids = [part[1:].tolist() for part in np.split(ids, ends[:-1])]
            equal += sum(ours == theirs for ours, theirs in zip(found_ids, expected, strict=True))
        found[f"equal_{name}"] = equal
    return found


OPEN = """
import sys, time
sys.path.insert(0, {root!r})
import torch
from llama_lite.files import read_json
from llama_lite.data.shards import verify_prepared
from llama_lite.data.dataset import Order, TokenWindows
from pathlib import Path
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) / 1024

folder, before = Path(sys.argv[1]), peak()
began = time.perf_counter()
manifest = read_json(folder / "manifest.json")
verify_prepared(folder, manifest, "auto")
windows = TokenWindows(folder, manifest, "train", 1024, Order("shuffled", 1))
windows[0], windows[len(windows) - 1]
print(time.perf_counter() - began, peak(), before, len(windows) * 1024)
"""


def index(folder: Path, megabytes: int, repeats: int) -> dict:
    """What the index of documents costs: time with one worker and with one a core, and bytes."""
    text, out, cores = folder / "named.jsonl", folder / "named", os.cpu_count()
    once = folder / "once.jsonl"
    write_text(once, min(megabytes, 20) * 1_000_000)
    rows, rng = (
        [json.loads(line)["text"] for line in once.read_text(encoding="utf-8").splitlines()],
        np.random.default_rng(0),
    )
    with open(text, "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1_000_000:
            for row in rows:
                name = rng.bytes(16).hex()
                named = {"text": row, "id": f"<urn:uuid:{name}>", "url": f"https://example.org/{name[:20]}"}
                file.write(json.dumps(named) + "\n")
    found = {}
    for workers in sorted({1, cores}):
        times: dict[str, list[float]] = {"without": [], "with": []}
        for _ in range(repeats):
            for name, indexed in (("without", False), ("with", True)):
                times[name].append(timed(1, ours, text, out, workers, indexed))
        slower = [with_index / without - 1 for with_index, without in zip(times["with"], times["without"], strict=True)]
        found[f"workers_{workers}"] = {
            "slower_percent": round(100 * statistics.median(slower), 1),
            "seconds": {name: [round(value, 2) for value in values] for name, values in times.items()},
        }
    records = read_json(out / "progress.json")["marks"]
    documents = sum(mark["index"]["entries"] for mark in records)
    sizes = {
        ending: sum(path.stat().st_size for path in out.glob(f"index/*{ending}")) for ending in (".npy", ".parquet")
    }
    return found | {
        "documents": documents,
        "bytes_per_document": {ending: round(size / documents, 1) for ending, size in sizes.items()},
    }


def scale(folder: Path) -> dict:
    """Ten workers against one, and a paper-size folder opened."""
    import pandas

    from benchmarks.resume import prepared_tiny, sparse

    text = folder / "scale.jsonl"
    write_text(text, 20_000_000)
    curation = ["--min_characters", "200", "--exact_dedup", "--minhash_dedup", "--shard_tokens", "1000000"]
    outs = [folder / "scale-1", folder / "scale-10"]
    for out, workers in zip(outs, (1, 10), strict=True):
        subprocess.run(
            [*prepare_command(text, out, workers), *curation],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    files = [
        {
            str(path.relative_to(out)): path.read_bytes()
            for pattern in ("*.npy", "*.json", "tokenizer/*")
            for path in out.glob(pattern)
        }
        for out in outs
    ]
    documents = [
        "".join(
            pandas.read_json(path, lines=True, dtype=False)["text"].sum()
            for path in sorted(out.glob("kept/*.jsonl.zst"))
        )
        for out in outs
    ]
    different = sorted(name for name in {*files[0], *files[1]} if files[0].get(name) != files[1].get(name))
    small, _ = prepared_tiny(folder)
    sparse(small, folder / "large")
    command = [sys.executable, "-c", OPEN.format(root=str(ROOT)), str(folder / "large")]
    seconds, peak, before, tokens = map(
        float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    )
    opened = {
        "tokens": int(tokens),
        "seconds": round(seconds, 3),
        "peak_mib": round(peak),
        "of_them_imports_mib": round(before),
    }
    return {
        "ten_workers": {
            "files": len(files[0]),
            "different": different,
            "documents_equal": documents[0] == documents[1],
        },
        "opened": opened,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument(
        "--scale", action="store_true", help="ten workers and the paper's size only; the other figures stay"
    )
    parser.add_argument("--index", action="store_true", help="the index of documents only; the other figures stay")
    arguments = parser.parse_args()
    cores = os.cpu_count()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else datasets.map would use all cores, too
    with tempfile.TemporaryDirectory() as folder:
        if arguments.index:
            found = {"index": index(Path(folder), arguments.megabytes, arguments.repeats)}
            print(json.dumps(found), flush=True)
            write_json(arguments.output, read_json(arguments.output) | found)
            return
        found = {"scale": {"processor": processor(), **scale(Path(folder))}}
        print(json.dumps(found), flush=True)
        if arguments.scale:
            write_json(arguments.output, read_json(arguments.output) | found)
            return
        text, out = Path(folder) / "text.jsonl", Path(folder) / "out"
        write_text(text, arguments.megabytes * 1_000_000)
        once = text.read_bytes()
        with open(text, "ab") as file:
            while file.tell() + len(once) <= arguments.megabytes * 1_000_000:
                file.write(once)
        megabytes = sum(len(json.loads(line)["text"].encode()) for line in open(text, encoding="utf-8")) / 1e6
        times: dict[str, list[float]] = {
            "plain": [],
            "plain_on_all": [],
            "ours": [],
            "ours_on_all": [],
            "datasets_map": [],
        }
        for _ in range(arguments.repeats):
            times["plain"].append(timed(1, plain, text))
            times["ours"].append(timed(1, ours, text, out, 1))
            times["plain_on_all"].append(timed(cores, plain, text))
            times["ours_on_all"].append(timed(1, ours, text, out, cores))
        times["datasets_map"].append(timed(1, group_map, text, Path(folder) / "cache"))
        median = {name: statistics.median(values) for name, values in times.items()}
        result = {
            "megabytes": round(megabytes, 1),
            "cores": cores,
            "speed_of_one_worker_to_plain": round(median["plain"] / median["ours"], 3),
            "speed_a_core_to_plain_on_all_cores": round(median["plain_on_all"] / median["ours_on_all"] / cores, 3),
            "speed_a_core_to_plain_on_one_core": round(median["plain"] / median["ours_on_all"] / cores, 3),
            "speed_on_all_cores_to_datasets_map_on_one": round(median["datasets_map"] / median["ours_on_all"], 1),
            "seconds": {name: [round(value, 2) for value in values] for name, values in times.items()},
        }
        print(json.dumps(result, indent=1), flush=True)
        result["ids"] = equal_ids()
        print(json.dumps(result["ids"]), flush=True)
        lines = text.read_bytes()
        for size in (50, 1000):
            large = Path(folder) / f"{size}.jsonl"
            with open(large, "wb") as file:
                while file.tell() < size * 1_000_000:
                    file.write(lines[: size * 1_000_000 - file.tell()].rpartition(b"\n")[0] + b"\n")
            result[f"peak_memory_mib_at_{size}_mb"] = (
                peak_memory(prepare_command(large, Path(folder) / f"out-{size}", cores)) >> 20
            )
            print(f"{size} MB: {result[f'peak_memory_mib_at_{size}_mb']} MiB", flush=True)
            large.unlink()
        found |= {"index": index(Path(folder), arguments.megabytes, arguments.repeats)}
        write_json(arguments.output, result | found)


if __name__ == "__main__":
    main()
