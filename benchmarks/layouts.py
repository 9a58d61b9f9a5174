"""Is every pair of layouts accepted, stopped under one and resumed under another, with the same losses?

    python benchmarks/layouts.py

Layouts: one process, DDP, FSDP2, HSDP (two replicas of two shards) and ZeRO-2, on CPU processes with real sharding;
precisions: float32 and bfloat16. Each layout trains four steps of a tiny LLaMA on real text and saves at the second;
then each goes on from the second step of every one. Losses are compared with those of the run that never stopped, in
one process. `make test` installs DeepSpeed where this script looks for it (.venv/deepspeed).
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from benchmarks.kill import SETTINGS, write_text
from llama_lite.files import read_jsonl, write_json

CONFIGS = {"one": None, "ddp": "ddp", "fsdp2": "fsdp2", "hsdp": "hsdp", "zero2": "deepspeed_zero2"}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}  # nats
STEPS, STOP = 4, 2


def settings(folder: Path) -> Path:
    """The config file of all runs."""
    changes = {"dataset": str(folder / "text.jsonl"), "prepared_dir": str(folder / "tokens"), "max_steps": STEPS}
    changes |= {"save_steps": STOP, "eval_steps": STOP, "logging_steps": 1, "warmup_steps": 1, "sample_tokens": 0}
    changes |= {"eval_windows": 13, "per_device_train_batch_size": 2, "compile_layers": False}
    path = folder / "layouts.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(SETTINGS) | changes))
    return path


def accelerate_config(name: str, folder: Path) -> Path:
    """A shipped accelerate config as it is, but for two CPU processes (HSDP: four) of one machine."""
    config = yaml.safe_load((ROOT / f"configs/accelerate/{CONFIGS[name]}.yaml").read_text())
    config |= {"num_machines": 1, "num_processes": 4 if name == "hsdp" else 2, "main_process_port": 0}
    config |= {} if name == "zero2" else {"use_cpu": True}
    if name == "hsdp":
        config["parallelism_config"]["parallelism_config_dp_shard_size"] = 2
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def launch(name: str, commands: list[list[str]], folder: Path) -> list[dict]:
    """Run run_pretrain.py under a layout, once for each command, in one launch; returns what the runs said."""
    work = folder / f"{name}-work.json"
    work.write_text(json.dumps(commands))
    launcher = [sys.executable]
    if CONFIGS[name]:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(accelerate_config(name, folder))]
    paths = [str(Path(sys.prefix) / "deepspeed")] if name == "zero2" else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [*launcher, str(Path(__file__).resolve()), "--worker", str(work)],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    said = Path(f"{work}.said")
    assert result.returncode == 0 and said.exists(), result.stderr[-4000:]
    return json.loads(said.read_text())


def worker(work: Path) -> None:
    """One rank of a launch: the commands one after the other; rank 0 writes what each printed, or why it was refused."""
    from llama_lite.distributed import RANK
    from llama_lite.errors import Refusal
    from llama_lite.machine import parallelism

    allow_sharding_on_cpus(parallelism)
    from run_pretrain import main

    said = []
    for argv in json.loads(work.read_text()):
        output, refusal = io.StringIO(), None
        with contextlib.redirect_stdout(output):
            try:
                main(argv)
            except Refusal as error:
                refusal = str(error)
        said.append({"output": output.getvalue(), "refused": refusal})
    if RANK == 0:
        Path(f"{work}.said").write_text(json.dumps(said))


def allow_sharding_on_cpus(parallelism) -> None:
    """accelerate counts only accelerators, and passes over sharding on CPUs in silence, which the scripts refuse."""
    check = parallelism.check_launch

    def checked(training, *shards) -> None:
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        if training.device.type == "cpu" and parallelism.layout().sharding in ("fsdp2", "zero2"):
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        check(training, *shards)

    parallelism.check_launch = checked


def losses(run: Path) -> dict:
    return {
        f"{entry['step']} {name}": entry[name]
        for entry in read_jsonl(run / "log.jsonl")
        for name in ("loss", "eval_loss")
        if name in entry
    }


def measure(folder: Path, names: list[str]) -> dict:
    config = settings(folder)

    def command(run: Path, precision: str, *resume: str) -> list[str]:
        return ["--config", str(config), "--precision", precision, "--output_dir", str(run), *resume]

    for name in names:
        commands = [command(folder / f"{name}-{precision}", precision) for precision in TOLERANCE]
        assert not any(said["refused"] for said in launch(name, commands, folder)), name
        print(f"{name}: trained", flush=True)
    pairs = []
    for name in names:
        stopped = [(precision, other) for precision in TOLERANCE for other in names]
        runs = [folder / f"{other}-{name}-{precision}" for precision, other in stopped]
        resume = [("--resume_from_checkpoint", str(folder / f"{o}-{p}" / f"checkpoint-{STOP}")) for p, o in stopped]
        commands = [command(run, p, *r) for run, (p, _), r in zip(runs, stopped, resume, strict=True)]
        for (precision, other), run, said in zip(stopped, runs, launch(name, commands, folder), strict=True):
            pair = {"precision": precision, "stopped": other, "resumed": name, "accepted": not said["refused"]}
            if pair["accepted"]:
                whole, found = losses(folder / f"one-{precision}"), losses(run)
                assert whole.keys() == found.keys()
                pair["largest_difference_in_nats"] = max(abs(found[key] - whole[key]) for key in whole)
                pair["probe"] = re.search("verified: probe loss [0-9.]+, (.*)", said["output"])[1]
            pairs.append(pair)
            print(json.dumps(pair), flush=True)
    return summary(pairs, names)


def summary(pairs: list[dict], names: list[str]) -> dict:
    """The figures: pairs that were accepted, and how far their losses are from the run that never stopped."""
    result = {"layouts": names, "pairs": len(pairs), "accepted": sum(pair["accepted"] for pair in pairs)}
    for precision, tolerance in TOLERANCE.items():
        found = [pair for pair in pairs if pair["precision"] == precision and pair["accepted"]]
        largest = max(pair["largest_difference_in_nats"] for pair in found)
        result[precision] = {
            "tolerance_in_nats": tolerance,
            "largest_difference_in_nats": largest,
            "within": largest <= tolerance,
            "probes_bit_for_bit": sum(pair["probe"] == "as recorded, bit for bit" for pair in found),
        }
    return {**result, "each": pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        from llama_lite.exit import exit_with_status

        exit_with_status(lambda: worker(arguments.worker))
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder) / "text.jsonl", 300_000)
        names = ["one", *(name for name in arguments.layouts if name != "one")]
        result = measure(Path(folder), names)
    write_json(arguments.output, result)
    print(f"{result['accepted']} of {result['pairs']} pairs accepted")
    sys.exit(result["accepted"] != result["pairs"] or not all(result[name]["within"] for name in TOLERANCE))


if __name__ == "__main__":
    main()
