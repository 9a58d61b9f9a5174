"""What a verified checkpoint costs: starting late in a long run, and saving.

    python benchmarks/resume.py

Late: a run over 20.5e9 tokens (205 sparse shards of 100M) with the paper's 524,288 tokens a step. Seconds from the
start of the process to its first batch in the model, and its resident memory there, at step 0 and at step 39,000 in
turn, medians. Save: the same model and optimiser saved by transformers.Trainer, whose files are then flushed (fsync),
and by our trainer while training waits (weights, state, hashes, flush, rename), in turn, medians. The probe of the
weights is timed apart.

In the background: the same state saved while training goes on. `blocked` is what a save takes from training, beside
`copy` (the state into allocated buffers, alone) and the probe. `slowdown` is what the steps take longer while the thread
writes. `slow_disk`: steps while the disk takes 50 MB/s.
"""

import argparse
import json
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
from llama_lite.checkpoint import store
from llama_lite.files import read_json, write_json
from llama_lite.provenance import processor

LATE, SHARDS, SHARD_TOKENS = 39_000, 205, 100_000_000
UNTIL_FIRST_BATCH = """
import os, resource, sys, time
sys.path.insert(0, ROOT)
import run_pretrain
from llama_lite.training import trainer
def first(self, model, inputs, *args, **kwargs):
    pages = int(open("/proc/self/statm").read().split()[1])
    print("FIRST", time.time(), pages * resource.getpagesize(), self.state.global_step, flush=True)
    os._exit(0)
trainer.PretrainTrainer.training_step = first
run_pretrain.main(sys.argv[1:])
"""


def prepared_tiny(folder: Path) -> tuple[Path, list[str]]:
    """A small prepared folder, and the arguments that go with it."""
    text = folder / "text.jsonl"
    write_text(text, 300_000)
    argv = [
        "--dataset",
        text,
        "--prepared_dir",
        folder / "tokens",
        "--tokenizer",
        "train",
        "--vocab_size",
        512,
        "--validation_tokens",
        20_000,
    ]
    argv = [*map(str, argv), "--probe_windows", "8", "--sample_tokens", "0", "--block_size", "64"]
    run_script(*argv, "--prepare_only")
    return folder / "tokens", argv


def run_script(*argv: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "run_pretrain.py"), *argv], check=True, capture_output=True)


def sparse(small: Path, large: Path) -> None:
    """A prepared folder of SHARDS x SHARD_TOKENS zeros that take no space on disk."""
    from llama_lite.data.shards import add_fingerprint

    shutil.copytree(small, large)
    manifest = read_json(small / "manifest.json")
    manifest.pop("index", None)  # these shards hold no documents
    template = np.lib.format.header_data_from_array_1_0(np.empty(0, np.uint16)) | {"shape": (SHARD_TOKENS,)}
    shards = []
    for number in range(SHARDS):
        name = f"train-{number:05d}.npy"
        with open(large / name, "wb") as file:
            np.lib.format.write_array_header_1_0(file, template)
            file.truncate(file.tell() + 2 * SHARD_TOKENS)
        shards.append(
            {
                "name": name,
                "tokens": SHARD_TOKENS,
                "text_bytes": 1,
                "size": (large / name).stat().st_size,
                "sha256": "-",
            }
        )
    manifest["splits"]["train"] = {"tokens": SHARDS * SHARD_TOKENS, "bytes": 1, "shards": shards}
    manifest = {name: value for name, value in manifest.items() if name not in ("digest", "fingerprint")}
    write_json(large / "manifest.json", add_fingerprint(manifest))


def move_to_step(run: Path, step: int) -> None:
    """Rewrite the only checkpoint of a run as if it had been saved at `step`."""
    ((_, folder),) = store.checkpoints(run)
    staging = store.staging_folder(run, step)
    shutil.copytree(folder, staging, dirs_exist_ok=True)
    manifest = read_json(folder / "manifest.json")
    (staging / "manifest.json").unlink()
    state, progress = read_json(staging / "trainer_state.json"), read_json(staging / "progress.json")
    write_json(staging / "trainer_state.json", state | {"global_step": step, "log_history": []})
    write_json(staging / "progress.json", progress | {"logged_step": step})
    keep = {key: manifest[key] for key in ("identity", "probe")}
    store.commit_checkpoint(staging, run, step, {"tokens": 0, "files": store.flush_and_hash(staging), **keep})
    shutil.rmtree(folder)


def first_batch(argv: list[str]) -> tuple[float, int]:
    """(seconds from the start of a process to its first batch, resident bytes there)."""
    began = time.time()
    code = UNTIL_FIRST_BATCH.replace("ROOT", repr(str(ROOT)))
    output = subprocess.run([sys.executable, "-c", code, *argv], check=True, capture_output=True, text=True).stdout
    moment, resident = output.split("FIRST ")[1].split()[:2]
    return float(moment) - began, int(resident)


def late(folder: Path, repeats: int) -> dict:
    small, _ = prepared_tiny(folder)
    sparse(small, folder / "large")
    config = read_json(ROOT / "configs/model/tiny/config.json") | {"max_position_embeddings": 1024}
    (folder / "model").mkdir()
    write_json(folder / "model/config.json", config)
    argv = [
        "--model_config",
        folder / "model",
        "--dataset",
        folder / "text.jsonl",
        "--tokenizer",
        "train",
        "--vocab_size",
        512,
    ]
    argv += [
        "--validation_tokens",
        20_000,
        "--prepared_dir",
        folder / "large",
        "--verify_data",
        "sizes",
        "--block_size",
        1024,
    ]
    argv += [
        "--tokens_per_step",
        524_288,
        "--per_device_train_batch_size",
        32,
        "--max_steps",
        39_100,
        "--sample_tokens",
        0,
        "--eval_windows",
        8,
    ]
    argv = [*map(str, argv), "--eval_strategy", "no"]
    new, old = folder / "new", folder / "old"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_pretrain.py"), *argv, "--output_dir", str(old), "--save_steps", "1"]
    )
    while not store.checkpoints(old):
        assert process.poll() is None
        time.sleep(0.2)
    process.kill()
    process.wait()
    for _, extra in store.checkpoints(old)[1:]:
        shutil.rmtree(extra)
    move_to_step(old, LATE)
    times: dict[str, list] = {"step 0": [], f"step {LATE}": []}
    for _ in range(repeats):
        shutil.rmtree(new, ignore_errors=True)
        times["step 0"].append(first_batch([*argv, "--output_dir", str(new)]))
        times[f"step {LATE}"].append(first_batch([*argv, "--output_dir", str(old)]))
    found = {
        name: {
            "seconds": statistics.median(t for t, _ in values),
            "mib": statistics.median(m for _, m in values) / 2**20,
        }
        for name, values in times.items()
    }
    start, resumed = found["step 0"], found[f"step {LATE}"]
    found["later_by"] = {
        "seconds": round(resumed["seconds"] - start["seconds"], 2),
        "mib": round(resumed["mib"] - start["mib"], 1),
    }
    return found


SLOW_DISK = 50e6  # bytes per second
STEPS_ALONE = 9  # steps that are timed while nothing is written


def training_step(trainer, batch: dict) -> float:
    """Seconds of a step of plain torch over the trainer's model and optimizer."""
    began = time.perf_counter()
    trainer.model(**batch).loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return time.perf_counter() - began


def steps_while_writing(trainer, batch: dict) -> list[float]:
    """Seconds of the steps that are made until the thread has written; at least one."""
    seconds = [training_step(trainer, batch)]
    while trainer.writer.busy:
        seconds.append(training_step(trainer, batch))
    return seconds


def background(trainer, batch: dict, repeats: int, waiting: float) -> dict:
    """Medians of what saving in the background takes. waiting: seconds of a save for which training waits, without the
    probe.
    """
    from llama_lite.checkpoint import tensor_files
    from llama_lite.checkpoint.snapshot import live_storages

    def save_again() -> float:
        trainer.state.global_step += 1
        os.sync()
        began = time.perf_counter()
        trainer._save_checkpoint(trainer.model, None)
        return time.perf_counter() - began

    trainer.async_save = True
    first = save_again()  # it allocates the buffers
    trainer.finish_save()
    alone = statistics.median(training_step(trainer, batch) for _ in range(STEPS_ALONE))
    found: dict[str, list] = {"blocked": [], "copy": [], "probe": [], "slowdown": [], "written_after": []}
    for _ in range(repeats):
        found["blocked"].append(save_again())
        began = time.perf_counter()
        steps = steps_while_writing(trainer, batch)
        found["written_after"].append(time.perf_counter() - began)
        found["slowdown"].append(sum(steps) - len(steps) * alone)
        trainer.finish_save()
        state, live = trainer.snapshot, live_storages(trainer.model.parameters())
        began = time.perf_counter()
        state.add(Path("model.safetensors"), trainer.model.state_dict().items(), {}, live)
        trainer._save_optimizer_and_scheduler(str(trainer.run.path), state)
        found["copy"].append(time.perf_counter() - began)
        state.begin()
        began = time.perf_counter()
        trainer.probe_loss()
        found["probe"].append(time.perf_counter() - began)
    write_chunk, written = tensor_files.write_chunk, []

    def write_slowly(file, chunk) -> None:
        time.sleep(len(chunk) / SLOW_DISK)
        written.append(len(chunk))
        write_chunk(file, chunk)

    tensor_files.write_chunk = write_slowly
    try:
        save_again()
        began = time.perf_counter()
        slow_steps = steps_while_writing(trainer, batch)
        slow_seconds = time.perf_counter() - began
        trainer.finish_save()
    finally:
        tensor_files.write_chunk = write_chunk
    median = {name: statistics.median(values) for name, values in found.items()}
    cost = median["blocked"] + median["slowdown"]
    return {
        "blocked_over_copy_and_probe": round(median["blocked"] / (median["copy"] + median["probe"]), 3),
        "blocked_and_slowdown_over_waiting": round(cost / (waiting + median["probe"]), 3),
        "first_blocked_seconds": round(first, 3),
        "step_alone_seconds": round(alone, 3),
        "slow_disk": {
            "mb_per_second": round(sum(written) / slow_seconds / 1e6, 1),
            "steps": len(slow_steps),
            "step_seconds": round(statistics.median(slow_steps), 3),
            "writing_seconds": round(slow_seconds, 1),
        },
        "seconds": {name: [round(value, 3) for value in values] for name, values in found.items()},
    }


def save(folder: Path, hidden: int, layers: int, repeats: int) -> dict:
    """Medians of seconds of the ways to save the same state."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

    from llama_lite.config.pretrain import parse_pretrain
    from llama_lite.data.dataset import TokenWindows, collate
    from llama_lite.models.presets import load_model_config
    from llama_lite.processes import cores_for_a_process
    from llama_lite.run_folder import RunFolder
    from llama_lite.training.trainer import PretrainTrainer, ResumePoint

    torch.set_num_threads(cores_for_a_process())
    manifest = read_json(folder / "tokens/manifest.json")
    config = load_model_config("tiny")
    config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.vocab_size = (
        hidden,
        layers,
        4 * hidden,
        4096,
    )
    config.num_attention_heads = config.num_key_value_heads = hidden // 64
    config.head_dim = 64
    train = TokenWindows(folder / "tokens", manifest, "train", 64)
    probe = [collate([TokenWindows(folder / "tokens", manifest, "validation", 64)[i]]) for i in range(8)]
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokens/tokenizer", trust_remote_code=False)
    trainers, seconds = {}, {"trainer_and_fsync": [], "ours": [], "probe": []}
    with RunFolder(folder / f"ours-{hidden}") as run:
        for name in ("trainer", "ours"):
            out = run.path if name == "ours" else folder / f"trainer-{hidden}"
            argv = [
                "--output_dir",
                str(out),
                "--max_steps",
                "1",
                "--per_device_train_batch_size",
                "1",
                "--block_size",
                "64",
                "--tokens_per_step",
                "64",
            ]
            argv += ["--eval_strategy", "no", "--save_strategy", "no", "--disable_tqdm", "--save_total_limit", "2"]
            args = parse_pretrain([*argv, "--warmup_steps", "1"])[-1]
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
            shared = {
                "model": model,
                "args": args,
                "train_dataset": train,
                "eval_dataset": train,
                "data_collator": collate,
                "processing_class": tokenizer,
            }
            if name == "trainer":
                trainers[name] = Trainer(**shared)
            else:
                signals = type("NoSignals", (), {"received": None})()
                identity = {"data": {"tokens_per_step": 64}, "hyperparameters": {"schedule_steps": "max_steps"}}
                extra = {"run": run, "identity": identity, "start": ResumePoint(), "signals": signals, "probe": probe}
                trainers[name] = PretrainTrainer(
                    **shared, **extra, flops_per_token=1, peak_flops=None, validation=[], sources=[]
                )
                trainers[name]._save_checkpoint = lambda *_: None  # not at the end of train(): timed below
            trainers[name].evaluate = lambda *_, **__: {}
            trainers[name].train()
        del trainers["ours"]._save_checkpoint
        trainers["ours"].async_save = False
        state = sum(p.numel() for p in trainers["ours"].model.parameters()) * 12
        for repeat in range(repeats):
            for name, trainer in trainers.items():
                trainer.state.global_step = repeat + 1
                os.sync()
                began = time.perf_counter()
                trainer._save_checkpoint(trainer.model, None)
                if name == "trainer":
                    for path in (Path(trainer.args.output_dir) / f"checkpoint-{repeat + 1}").iterdir():
                        with open(path, "rb") as file:
                            os.fsync(file.fileno())
                whole = time.perf_counter() - began
                began = time.perf_counter()
                if name == "ours":
                    trainer.probe_loss()
                    seconds["probe"].append(time.perf_counter() - began)
                    whole -= seconds["probe"][-1]
                    seconds["ours"].append(whole)
                else:
                    seconds["trainer_and_fsync"].append(whole)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        in_background = background(trainers["ours"], collate([train[0]]), repeats, median["ours"])
        run.record_end = False
    return {
        "state_mb": round(state / 1e6),
        "ratio": round(median["ours"] / median["trainer_and_fsync"], 3),
        "extra_seconds": round(median["ours"] - median["trainer_and_fsync"], 3),
        "probe_seconds": round(median["probe"], 3),
        "background": in_background,
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", help="one of late, save_100_mb, save_1_gb; the other figures stay")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {}
        if arguments.only in (None, "late"):
            result["late"] = {"processor": processor(), **late(Path(folder), max(3, arguments.repeats // 2))}
            print(json.dumps(result["late"], indent=1), flush=True)
        else:
            prepared_tiny(Path(folder))
        for name, hidden, layers in (("save_100_mb", 256, 6), ("save_1_gb", 640, 12)):
            if arguments.only not in (None, name):
                continue
            result[name] = {"processor": processor(), **save(Path(folder), hidden, layers, arguments.repeats)}
            print(json.dumps(result[name], indent=1), flush=True)
        kept = read_json(arguments.output) if arguments.only else None
        write_json(arguments.output, {**(kept or {}), **result})


if __name__ == "__main__":
    main()
