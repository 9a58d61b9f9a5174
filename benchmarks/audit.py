"""Does an audit pass honest segments, and find forgeries whose hashes were renewed? What does it cost?

    python benchmarks/audit.py --segments 100 --forgeries 100

Tiny runs (two of them stopped and resumed) save a checkpoint every few steps. Honest: segments between random states of
random runs are audited, and must be equal bit for bit. Forged: a copy of a run gets one forgery of each kind in turn,
at a random state, with every digest renewed; it is found where the audit ends with status 4, and located where it names
a step of the segment. Cost: seconds of an audit of a longer segment in this process, over those that the run itself
needed for the same steps (without imports).
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.kill import write_text
from llama_lite.checkpoint import store
from llama_lite.digests import digest_of, file_record
from llama_lite.errors import Differs, Interrupted, Refusal
from llama_lite.files import read_json, write_json

SETTINGS = {
    "model_config": "tiny",
    "tokenizer": "train",
    "vocab_size": 512,
    "shard_tokens": 60_000,
    "validation_tokens": 10_000,
    "block_size": 64,
    "tokens_per_step": 1024,
    "eval_windows": 8,
    "per_device_train_batch_size": 8,
    "max_steps": 24,
    "learning_rate": 1e-3,
    "warmup_steps": 4,
    "logging_steps": 2,
    "eval_steps": 6,
    "save_steps": 4,
    "save_total_limit": 99,
    "sample_tokens": 4,
    "cpu_threads": 1,
    "compile_layers": False,
}
VARIANTS = ({"precision": "float32"}, {"precision": "bfloat16"}, {"precision": "float32", "seed": 7, "stop": 11})


# ---- honest runs ----


def train(folder: Path, text: Path, **changes) -> Path:
    """A run of SETTINGS; with `stop`, one that is stopped after that step and resumed."""
    import run_pretrain

    stop = changes.pop("stop", None)
    settings = {**SETTINGS, **changes, "dataset": str(text), "prepared_dir": str(text.with_name("tokens"))}
    settings |= {"output_dir": str(folder)}
    config = folder.with_suffix(".yaml")
    config.write_text(json.dumps(settings))
    with quiet():
        if stop:
            with contextlib.suppress(Interrupted):
                run_pretrain.main(["--config", str(config), "--stop_after_step", str(stop)])
        run_pretrain.main(["--config", str(config)])
    return folder


def quiet():
    """Without the lines of the scripts."""
    return contextlib.redirect_stdout(io.StringIO())


def audit(run: Path, first: int, last: int, out: Path, *argv: str) -> tuple[str, str]:
    """(verdict, where it differs or why it was refused) of an audit of a run's segment."""
    import run_pretrain

    shutil.rmtree(out, ignore_errors=True)
    try:
        with quiet():
            run_pretrain.main(["--audit", f"{run}@step-{first}..step-{last}", "--output_dir", str(out), *argv])
    except Differs as difference:
        return "differs", str(difference)
    except Refusal as refusal:
        return "refused", str(refusal)
    return read_json(out / "audit.json")["verdict"], ""


# ---- forgeries ----


def renew(checkpoint: Path, manifest: dict | None = None) -> None:
    """Write a checkpoint's manifest (another one, if one is given) with digests of its files as they are now."""
    manifest = manifest or read_json(checkpoint / "manifest.json")
    names = sorted(path.name for path in checkpoint.iterdir() if path.name != "manifest.json")
    manifest["files"] = {name: file_record(checkpoint / name) for name in names}
    write_json(checkpoint / "manifest.json", {**manifest, "digest": digest_of(manifest)})


def flip_bit(path: Path, chance: random.Random) -> str:
    """Flip a random bit of a random tensor of floats in a safetensors file; returns where."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    name = chance.choice(sorted(name for name, tensor in tensors.items() if tensor.numel() > 1))
    index, bit = chance.randrange(tensors[name].numel()), chance.randrange(0, 23)
    tensors[name].view(-1).view(torch.int32)[index] ^= 1 << bit
    save_file(tensors, path, metadata)
    return f"{name}[{index}], bit {bit}"


def change_record(run: Path, change) -> None:
    """Apply `change(manifest)` to the manifest of each checkpoint of a run, and to its run.json."""
    for _, checkpoint in store.checkpoints(run):
        manifest = read_json(checkpoint / "manifest.json")
        change(manifest)
        renew(checkpoint, manifest)


def change_logs(run: Path, change) -> None:
    """Apply `change(entry)` to every entry of the logs in all checkpoints of a run."""
    for _, checkpoint in store.checkpoints(run):
        state = read_json(checkpoint / "trainer_state.json")
        for entry in state["log_history"]:
            change(entry)
        write_json(checkpoint / "trainer_state.json", state)
        renew(checkpoint)


def weight_of_start(run, first, last, tokens, chance):
    what = flip_bit(run / f"checkpoint-{first}" / "model.safetensors", chance)
    renew(run / f"checkpoint-{first}")
    return what


def weight_of_end(run, first, last, tokens, chance):
    what = flip_bit(run / f"checkpoint-{last}" / "model.safetensors", chance)
    renew(run / f"checkpoint-{last}")
    return what


def moment_of_end(run, first, last, tokens, chance):
    what = flip_bit(run / f"checkpoint-{last}" / "optimizer.safetensors", chance)
    renew(run / f"checkpoint-{last}")
    return what


def document_exchanged(run, first, last, tokens, chance):
    """The tokens that the record names have other ones in one window that the segment reads."""
    from llama_lite.data.run_windows import windows_of_run
    from llama_lite.data.shards import add_fingerprint
    from llama_lite.digests import sha256

    manifest, identity = read_json(tokens / "manifest.json"), read_json(run / "run.json")["identity"]["data"]
    block, per_step = identity["block_size"], identity["tokens_per_step"] // identity["block_size"]
    data = windows_of_run({manifest["fingerprint"]: (tokens, manifest)}, identity, last)
    begin = data.window_of(chance.randrange(first * per_step, last * per_step)) * block
    shards = manifest["splits"]["train"]["shards"]
    number = int(np.searchsorted(data.ends, begin, side="right"))
    path, offset = tokens / shards[number]["name"], begin - (int(data.ends[number - 1]) if number else 0)
    ids = np.load(path)
    other = chance.randrange(len(ids) - block)
    ids[offset : offset + block] = ids[other : other + block]
    np.save(path, ids)
    for key in ("sha256", "blake3"):
        if key in shards[number]:
            del shards[number][key]
    shards[number] |= {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest = add_fingerprint({name: value for name, value in manifest.items() if name != "fingerprint"})
    write_json(tokens / "manifest.json", manifest)

    def change(record):
        record["identity"]["data"]["data"] = manifest["fingerprint"]
        record["rerun"]["tokens"][0]["fingerprint"] = manifest["fingerprint"]

    change_record(run, change)
    return f"window at token {begin:,}"


def another_rate(run, first, last, tokens, chance):
    factor = 1 + chance.choice((1e-6, 1e-3, 0.1))

    def change(record):
        record["identity"]["hyperparameters"]["learning_rate"] *= factor
        record["rerun"]["arguments"]["learning_rate"] *= factor

    change_record(run, change)
    change_logs(run, lambda entry: entry.update({k: v * factor for k, v in entry.items() if k == "learning_rate"}))
    return f"rate x {factor}"


def another_seed(run, first, last, tokens, chance):
    seed = chance.randrange(10_000, 20_000)

    def change(record):
        record["identity"]["data"] |= {"seed": seed, "data_seed": seed}
        record["rerun"]["arguments"]["seed"] = seed

    change_record(run, change)
    return f"seed {seed}"


def step_skipped(run, first, last, tokens, chance):
    """The state of a later step, called that of the start."""
    later = chance.choice([step for step, _ in store.checkpoints(run) if step > first and step != last] or [last])
    relabel(run / f"checkpoint-{later}", run / f"checkpoint-{first}", ("model.safetensors", "optimizer.safetensors"))
    return f"step {later} as step {first}"


def relabel(source: Path, target: Path, names) -> None:
    """Put files of one checkpoint into another, with the probe of their weights."""
    for name in names:
        shutil.copyfile(source / name, target / name)
    manifest = read_json(target / "manifest.json")
    if "model.safetensors" in names:
        manifest["probe"] = read_json(source / "manifest.json")["probe"]
    renew(target, manifest)


def altered_log(run, first, last, tokens, chance):
    """Another value in one line of the segment, in all checkpoints."""
    log = read_json(run / f"checkpoint-{last}" / "trainer_state.json")["log_history"]
    lines = [entry for entry in log if first < entry["step"] <= last and {"loss", "eval_loss"} & entry.keys()]
    line = chance.choice(lines)
    name = chance.choice([name for name in ("loss", "grad_norm", "learning_rate", "eval_loss") if name in line])
    step, factor = line["step"], 1 - chance.choice((1e-12, 1e-6, 1e-2))

    def change(entry):
        if entry["step"] == step and name in entry:
            entry[name] *= factor

    change_logs(run, change)
    return f"{name} of step {step} x {factor}"


def files_exchanged(run, first, last, tokens, chance):
    """A file of the start in the end, or the other way round."""
    names = chance.choice((("model.safetensors",), ("optimizer.safetensors",), ("scheduler.pt",)))
    source, target = chance.sample((run / f"checkpoint-{first}", run / f"checkpoint-{last}"), 2)
    relabel(source, target, names)
    return f"{names[0]} of {source.name} in {target.name}"


KINDS = (
    weight_of_start,
    weight_of_end,
    moment_of_end,
    document_exchanged,
    another_rate,
    another_seed,
    step_skipped,
    altered_log,
    files_exchanged,
)


def forge(run: Path, folder: Path, first: int, last: int, kind, chance: random.Random) -> tuple[Path, Path, str]:
    """(a forged copy of a run, the tokens that it records, what was forged)."""
    copy, tokens = folder / "forged", folder / "forged-tokens"
    for source, target in ((run, copy), (run.with_name("tokens"), tokens)):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    return copy, tokens, kind(copy, first, last, tokens, chance)


# ---- the parts ----


def honest(runs: list[Path], folder: Path, count: int) -> dict:
    """Audits of honest segments."""
    verdicts, failed = Counter(), []
    for seed in range(count):
        chance = random.Random(seed)
        run = chance.choice(runs)
        first, last = sorted(chance.sample([0, *(step for step, _ in store.checkpoints(run))], 2))
        verdict, why = audit(run, first, last, folder / "audit")
        verdicts[verdict] += 1
        if verdict != "equal, bit for bit":
            failed.append({"seed": seed, "run": run.name, "first": first, "last": last, "why": why})
        print(f"honest {seed}: {run.name} {first}..{last}: {verdict} {why}", flush=True)
    return {"segments": count, "verdicts": dict(verdicts), "failed": failed}


def forged(runs: list[Path], folder: Path, count: int) -> dict:
    """Audits of forged segments, one kind after the other."""
    found, missed = {kind.__name__: [0, 0] for kind in KINDS}, []
    for seed in range(count):
        chance, kind = random.Random(10_000 + seed), KINDS[seed % len(KINDS)]
        run = chance.choice(runs)
        steps = sorted(step for step, _ in store.checkpoints(run))
        first, last = sorted(chance.sample(steps, 2))
        copy, tokens, what = forge(run, folder, first, last, kind, chance)
        verdict, why = audit(copy, first, last, folder / "audit", "--prepared_dir", str(tokens))
        found[kind.__name__][0] += verdict == "differs"
        found[kind.__name__][1] += 1
        if verdict != "differs":
            missed.append({"seed": seed, "kind": kind.__name__, "what": what, "verdict": verdict, "why": why})
        print(f"forged {seed}: {kind.__name__} ({what}) in {first}..{last}: {verdict} {why}", flush=True)
    return {
        "forgeries": count,
        "found": sum(one for one, _ in found.values()),
        "kinds": {name: {"found": one, "of": of} for name, (one, of) in found.items()},
        "missed": missed,
    }


def cost(folder: Path, text: Path, steps: int) -> dict:
    """Seconds of a run's steps, evaluations included, and of their audit, in this process and one after the other."""
    larger = {"model_config": "4x128", "max_steps": 2 * steps, "save_steps": steps, "block_size": 128}
    larger |= {"tokens_per_step": 4096, "per_device_train_batch_size": 16, "logging_steps": 10, "allow_epochs": True}
    run = train(folder / "cost", text, **larger, eval_steps=steps // 4, sample_tokens=0, eval_windows=16)
    log = read_json(run / f"checkpoint-{2 * steps}" / "trainer_state.json")["log_history"]
    walls = {entry["step"]: entry["wall_seconds"] for entry in log if "wall_seconds" in entry}
    began = time.monotonic()
    verdict, _ = audit(run, steps, 2 * steps, folder / "audit")
    seconds, own = time.monotonic() - began, walls[2 * steps] - walls[steps]
    return {
        "steps": steps,
        "run_seconds": round(own, 1),
        "audit_seconds": round(seconds, 1),
        "ratio": round(seconds / own, 3),
        "verdict": verdict,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=100, help="honest segments")
    parser.add_argument("--forgeries", type=int, default=100)
    parser.add_argument("--cost_steps", type=int, default=400, help="steps of the segment that is timed (0: none)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    results = read_json(arguments.output) or {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.chdir(folder)
        write_text(folder / "text.jsonl", 300_000)
        runs = [
            train(folder / f"run-{i}", folder / "text.jsonl", **changes)
            for i, changes in enumerate(VARIANTS if arguments.segments + arguments.forgeries else ())
        ]
        if arguments.segments:
            results["honest"] = honest(runs, folder, arguments.segments)
        if arguments.forgeries:
            results["forged"] = forged(runs, folder, arguments.forgeries)
        if arguments.cost_steps:
            results["cost"] = cost(folder, folder / "text.jsonl", arguments.cost_steps)
        write_json(arguments.output, results)
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
