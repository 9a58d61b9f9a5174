"""Tracing: passages that were planted and found, the time and memory of an answer at the paper's size, and the speed of
the search for a text.

    python benchmarks/trace.py

Passages: 1,000 texts of 4 to 50 words are planted at any character of the documents of a real text, one each. Of each
search the document, the tokens, and every step and window that read them are compared with what the tokenizer's own
offsets, the lengths of all documents and a walk over every position of the run give. As many texts that differ in one
word are searched for, too, and must not be found. The run began its order again once, and then took another seed.
Scale: 20.5e9 sparse tokens in 205 shards, whose index names 20e6 documents; each question in a process of its own,
seconds and memory beyond the imports. Scan: seconds of a search over real tokens, repeated, in one thread.
"""

import argparse
import json
import os
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
from benchmarks.resume import prepared_tiny, sparse
from llama_lite.data.document_index import IndexWriter, hashes_of
from llama_lite.files import read_json, write_json
from llama_lite.provenance import processor

PARTS = ("passages", "scale", "scan")
DATA = {"order": "shuffled", "data_seed": 7, "seed": 7, "order_version": 2}


# ---- passages ----


def planted_text(path: Path, count: int, characters: int) -> list[dict]:
    """Write real documents with one passage in each of `count`; returns {row, passage, first character} of each."""
    write_text(path, characters)
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    words = sorted({word for text in texts for word in text.split() if word.isascii() and len(word) < 20})
    rng, planted = np.random.default_rng(1), []
    rows = rng.permutation([row for row, text in enumerate(texts) if len(text) > 100])[:count]
    assert len(rows) == count, "more characters are needed"
    for row in map(int, rows):
        passage = " ".join(words[i] for i in rng.integers(0, len(words), int(rng.integers(4, 51))))
        first = int(rng.integers(0, len(texts[row]) + 1))
        texts[row] = texts[row][:first] + passage + texts[row][first:]
        planted.append({"row": row + 1, "passage": passage, "first": first})
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return planted


def expected_matches(path: Path, planted: list[dict], tokenizer) -> list[tuple[int, int]]:
    """Tokens [first, last) of the whole stream in which each passage lies, by the tokenizer's own offsets."""
    wanted, found, begin = {one["row"]: one for one in planted}, {}, 0
    for row, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = json.loads(line)["text"]
        coded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        if row in wanted:
            first, last = wanted[row]["first"], wanted[row]["first"] + len(wanted[row]["passage"])
            inside = [i for i, (a, b) in enumerate(coded["offset_mapping"]) if a < last and b > first]
            found[row] = (begin + 1 + inside[0], begin + 1 + inside[-1] + 1)
        begin += 1 + len(coded["input_ids"])
    return [found[one["row"]] for one in planted]


def write_run(folder: Path, prepared: Path, block: int, per_step: int, steps: int, middle: bool) -> Path:
    """The records of a run that read a prepared folder; middle: with an order that began again, and another seed."""
    fingerprint = read_json(prepared / "manifest.json")["fingerprint"]
    data = {**DATA, "data": fingerprint, "block_size": block, "tokens_per_step": block * per_step}
    folder.mkdir(parents=True)
    write_json(
        folder / "run.json",
        {"kind": "pretrain", "identity": {"data": data}, "settings": {"prepared_dir": str(prepared)}},
    )
    events = [{"event": "started", "step": 0, "data_start": 0}]
    if middle:
        events.append({"event": "resumed", "step": steps // 3, "data_start": steps // 3})
        events.append({"event": "changed", "kind": "data", "fields": {"data_seed": [7, 8]}})
        events.append({"event": "resumed", "step": steps // 2, "data_start": steps // 3})
    events.append({"event": "saved", "step": steps})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def walk(manifest: dict, block: int, per_step: int, steps: int) -> dict[int, list[tuple[int, int]]]:
    """{window: [(step, position)]} of the run of `write_run`, position by position."""
    from llama_lite.data.dataset import Order, permuted

    epoch = (manifest["splits"]["train"]["tokens"] - 1) // block // per_step * per_step
    read: dict[int, list[tuple[int, int]]] = {}
    for position in range(steps * per_step):
        step = position // per_step + 1
        start = (0 if step <= steps // 3 else steps // 3) * per_step
        number, index = divmod(position - start, epoch)
        order = Order("shuffled", 7 if step <= steps // 2 else 8, 2)
        window = permuted(index, epoch, order.key(manifest["fingerprint"], number))
        read.setdefault(window, []).append((step, position))
    return read


def passages(folder: Path, count: int, block: int = 128, per_step: int = 16) -> dict:
    """Search for planted passages, and for others."""
    from transformers import AutoTokenizer

    from llama_lite.commands.trace import Trace

    text = folder / "planted.jsonl"
    planted = planted_text(text, count, 6000 * count)
    command = [sys.executable, str(ROOT / "run_pretrain.py"), "--prepare_only", "--dataset", text]
    command += ["--prepared_dir", folder / "planted", "--validation_tokens", 5000, "--shard_tokens", 250_000]
    command += ["--vocab_size", 4096, "--tokenizer", "train", "--block_size", block]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    manifest = read_json(folder / "planted/manifest.json")
    held = manifest["splits"]["validation"]["tokens"]
    steps = int(1.5 * (manifest["splits"]["train"]["tokens"] // block // per_step))
    trace = Trace(str(write_run(folder / "planted-run", folder / "planted", block, per_step, steps, True)), [], [])
    spans = expected_matches(
        text, planted, AutoTokenizer.from_pretrained(folder / "planted/tokenizer", trust_remote_code=False)
    )
    read, counts = walk(manifest, block, per_step, steps), dict.fromkeys(("document", "tokens", "reads"), 0)
    invented = of_validation = absent = 0
    sys.stderr = open(os.devnull, "w")  # which says each time that a text is in no document
    for one, (first, last) in zip(planted, spans, strict=True):
        found = list(trace.text(one["passage"], 100))
        invented += sum(match["document"]["row"] != one["row"] for match in found)
        match = next((match for match in found if match["document"]["row"] == one["row"]), None)
        split, begin = ("validation", first) if last <= held else ("train", first - held)
        of_validation += split == "validation"
        if match is None:
            continue
        counts["document"] += 1
        counts["tokens"] += match["document"]["split"] == split and match["match"] == [begin, begin + last - first]
        windows = range((begin - 1) // block, (begin + last - first - 1) // block + 1) if split == "train" else ()
        expected = sorted((*at, window) for window in windows if window >= 0 for at in read.get(window, ()))
        counts["reads"] += expected == sorted((r["step"], r["position"], r["window"]) for r in match["reads"])
    for one in planted:
        words = one["passage"].split(" ")
        words[len(words) // 2] += "qx"
        absent += len(list(trace.text(" ".join(words), 100)))
    sys.stderr = sys.__stderr__
    return {
        "planted": count,
        **{f"right_{name}": number for name, number in counts.items()},
        "invented": invented,
        "found_of_other_texts": absent,
        "of_validation": of_validation,
        "steps": steps,
        "documents": manifest["documents"],
        "train_tokens": manifest["splits"]["train"]["tokens"],
    }


# ---- the paper's size ----


QUESTION = """
import sys, time
sys.path.insert(0, {root!r})
import tokenizers
from llama_lite.commands.trace import Trace
from llama_lite.data import document_reads
from llama_lite.training import run_records
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) / 1024

before, began = peak(), time.perf_counter()
trace = Trace(sys.argv[1], [], [])
answers = list(trace.steps(int(sys.argv[3]), int(sys.argv[3])) if sys.argv[2] == "step" else trace.documents(sys.argv[3:]))
print(time.perf_counter() - began, peak() - before, sum(len(one.get("windows", one.get("reads", ()))) for one in answers))
"""


def write_index(folder: Path, documents: int) -> int:
    """Write an index of so many documents for the sparse shards of a folder; returns its bytes."""
    import pyarrow

    manifest, records = read_json(folder / "manifest.json"), dict(read_json(folder / "manifest.json").get("index", {}))
    writer, shards = IndexWriter(folder), manifest["splits"]["train"]["shards"]
    rng, per_shard = np.random.default_rng(0), documents // len(shards)
    for number, shard in enumerate(shards):
        raw = rng.bytes(16 * per_shard).hex()
        ids = [f"<urn:uuid:{raw[32 * i : 32 * i + 32]}>" for i in range(per_shard)]
        ids[0] = f"first-of-{number}"
        names = pyarrow.record_batch(
            [
                pyarrow.array(ids),
                pyarrow.array([f"https://example.org/{one[10:30]}" for one in ids]),
                pyarrow.array([f"data/part-{number:05d}.parquet"] * per_shard),
                pyarrow.array(np.arange(1, per_shard + 1, dtype=np.uint32)),
                pyarrow.array(hashes_of(ids)),
            ],
            ["id", "url", "file", "row", "hash"],
        )
        begins = np.sort(rng.choice(shard["tokens"] // 16, per_shard, replace=False)) * 16
        begins[0] = 0
        writer.add(names, begins)
        records[shard["name"]] = writer.finish(shard["name"])
    manifest = {name: value for name, value in manifest.items() if name not in ("digest", "fingerprint")}
    from llama_lite.data.shards import add_fingerprint

    write_json(folder / "manifest.json", add_fingerprint({**manifest, "index": records}))
    return sum(file["size"] for record in records.values() for file in record["files"].values())


def scale(folder: Path, documents: int, repeats: int) -> dict:
    """Questions about a run over a sparse folder of the paper's size."""
    small, _ = prepared_tiny(folder)
    index = read_json(small / "manifest.json")["index"]
    sparse(small, folder / "large")
    manifest = read_json(folder / "large/manifest.json")
    held = {shard["name"]: index[shard["name"]] for shard in manifest["splits"]["validation"]["shards"]}
    write_json(folder / "large/manifest.json", {**manifest, "index": held})
    size = write_index(folder / "large", documents)
    tokens = read_json(folder / "large/manifest.json")["splits"]["train"]["tokens"]
    steps = tokens // 524_288 - 1
    run = write_run(folder / "large-run", folder / "large", 1024, 512, steps, False)
    rng, result = np.random.default_rng(2), {}
    questions = {
        "step": [[str(rng.integers(1, steps))] for _ in range(repeats)],
        "document": [[f"first-of-{rng.integers(0, 205)}"] for _ in range(repeats)],
        "document_by_file_and_row": [
            [f"data/part-{rng.integers(0, 205):05d}.parquet:{rng.integers(1, documents // 205)}"]
            for _ in range(repeats)
        ],
    }
    code = QUESTION.format(root=str(ROOT))
    for name, asked in questions.items():
        outputs = []
        for values in asked:
            command = [sys.executable, "-c", code, str(run), name.partition("_")[0], *values]
            outputs.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        assert all(int(output[2]) for output in outputs)
        result[name] = {
            "seconds": round(statistics.median(float(output[0]) for output in outputs), 3),
            "slowest_seconds": round(max(float(output[0]) for output in outputs), 3),
            "most_mib_beyond_imports": round(max(float(output[1]) for output in outputs)),
        }
    return {"tokens": tokens, "documents": documents, "index_bytes_per_document": round(size / documents, 1), **result}


# ---- the search for a text ----


def scan(folder: Path, megabytes: int, count: int) -> dict:
    """Megabytes of tokens per second of the search for random passages in one thread, from the page cache."""
    from transformers import PreTrainedTokenizerFast

    from llama_lite.data.shards import add_fingerprint
    from llama_lite.data.text_search import TextSearch

    text = folder / "scan.jsonl"
    write_text(text, 3_000_000)
    command = [
        sys.executable,
        str(ROOT / "run_pretrain.py"),
        "--prepare_only",
        "--dataset",
        text,
        "--tokenizer",
        "gpt2",
    ]
    command += ["--prepared_dir", folder / "scan", "--validation_tokens", 2000, "--block_size", 128]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    manifest = read_json(folder / "scan/manifest.json")
    [shard] = manifest["splits"]["train"]["shards"]
    once = np.load(folder / "scan" / shard["name"])
    tokens = np.tile(once, megabytes * 500_000 // len(once))
    np.save(folder / "scan" / shard["name"], tokens)
    shard["tokens"] = manifest["splits"]["train"]["tokens"] = len(tokens)
    manifest = add_fingerprint({name: value for name, value in manifest.items() if name != "digest"})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "scan/tokenizer", trust_remote_code=False)
    search = TextSearch(folder / "scan", manifest, tokenizer)
    rng, speeds = np.random.default_rng(3), []
    while len(speeds) < count:
        first = int(rng.integers(0, len(once) - 60))
        passage = search._decoded(once[first : first + 40])
        if not search.is_fast(passage) or "<|endoftext|>" in passage:
            continue
        ids = search.encode(passage[passage.index(" ") : passage.rindex(" ")]).astype(once.dtype)
        began = time.perf_counter()
        assert len(list(search._find("train", ids, lambda count: None, 1))) >= 1
        speeds.append(2 * len(tokens) / 1e6 / (time.perf_counter() - began))
    return {
        "megabytes": round(2 * len(tokens) / 1e6),
        "passages": count,
        "median_megabytes_per_second": round(statistics.median(speeds)),
        "slowest_megabytes_per_second": round(min(speeds)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the other figures stay")
    parser.add_argument("--passages", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=20_000_000)
    parser.add_argument("--megabytes", type=int, default=500, help="of tokens that are searched")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    result = read_json(arguments.output) or {}
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            "passages": lambda: passages(Path(folder), arguments.passages),
            "scale": lambda: scale(Path(folder), arguments.documents, arguments.repeats),
            "scan": lambda: scan(Path(folder), arguments.megabytes, arguments.repeats),
        }
        for part in arguments.parts:
            result[part] = {"processor": processor(), **parts[part]()}
            print(part, json.dumps(result[part]), flush=True)
            write_json(arguments.output, result)


if __name__ == "__main__":
    main()
