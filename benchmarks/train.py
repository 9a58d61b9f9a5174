"""How fast training is beside what people use now, what each switch gives, how near the machine's limit it is, and what
memory it takes.

    python benchmarks/train.py              # long; --only SHAPE, --parts speed,switches,processes,memory,machines

Every way is a process of its own (memory settings are a process's) that trains a slice of steps when it is told to;
slices go round in turn, and medians are compared. Ways: `ours`, run_pretrain.py itself with its switches on, or without
one of them; `trainer`, transformers.Trainer as it comes (float32); `run_clm`, the same with --bf16, as transformers'
example runs it; `loop`, a plain loop with full logits under bfloat16 autocast, as the authors' code has it; `nanogpt`,
that loop with the whole model compiled, as nanoGPT and litgpt do; `products`, nothing but the matrix products of the
step's linear layers, forward and backward, in bfloat16: the ceiling. Memory: peak resident size after step 2 of the
whole 124m preset, micro-batch 8 x 1,024. AdamW, clipping at 1 and the same sizes in all of them.

Machines: every combination of three switches on this processor, on it without its bfloat16 instructions, and on it as
if it had AVX2 alone (the libraries are told so), each in the precision that is chosen there; what would be chosen for a
long run and for a short one, against the best of them, and against all switches off, kept memory too. `--likely --turns
9`: only those that may be the best, for longer.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import llama_lite  # noqa: F401 (huge pages: read when torch is imported)

if os.environ.get("PLAIN"):
    del os.environ["THP_MEM_ALLOC_ENABLE"]  # the ways of others run as others run them

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks import kill
from llama_lite.files import write_json
from llama_lite.models.presets import load_model_config
from llama_lite.provenance import processor


def shaped(preset: str, **changes):
    config = load_model_config(preset)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


SMALL = {
    "hidden_size": 256,
    "head_dim": 64,
    "intermediate_size": 688,
    "vocab_size": 8192,
    "max_position_embeddings": 512,
}
DEMO = {"vocab_size": 4096, "max_position_embeddings": 256}
SHAPES = {  # config, windows of a micro-batch, tokens of each, steps a slice
    "6x256": (shaped("demo", **SMALL), 8, 512, 8),
    "124m, 4 layers": (shaped("124m", num_hidden_layers=4), 2, 1024, 2),
    "124m": (shaped("124m"), 8, 1024, 1),
    "1m": (shaped("1m", **DEMO), 8, 256, 30),
    "demo": (shaped("demo", **DEMO), 8, 256, 12),
}
# environment in which oneDNN (bfloat16 products), MKL (float32 products) and torch's own kernels leave instructions out
MACHINES = {
    "this processor": {},
    "without bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
NOTHING = "ours with nothing"  # every switch off, memory and huge pages too
COMBINED = ("fused_loss", "block_attention", "compile_layers")
SWITCHES = {
    "fused loss": "fused_loss",
    "attention in blocks": "block_attention",
    "compiled layers": "compile_layers",
    "kept memory": "keep_memory",
}


class Pace(TrainerCallback):
    """Trains a slice each time that a line comes in, and says how long a step took."""

    def __init__(self, steps: int):
        self.steps, self.done, self.began = steps, 0, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if int(os.environ.get("RANK", 0)) == 0:
            self.step()

    def step(self) -> None:
        self.done += 1
        if self.done % self.steps == 0:
            seconds = (time.perf_counter() - self.began) / self.steps
            print(f"PACE {seconds} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}", flush=True)
            if not sys.stdin.readline():
                os._exit(0)
            self.began = time.perf_counter()


def worker(way: str, shape: str, folder: Path) -> None:
    """Trains one way for ever."""
    config, windows, tokens, steps = SHAPES[shape]
    torch.set_num_threads(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if way.startswith("ours"):
        return ours(way, shape, folder)
    torch.manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (windows, tokens))
    pace = Pace(steps)
    if way == "products":
        return products(config, windows * tokens, pace)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    if way in ("trainer", "run_clm"):
        arguments = TrainingArguments(
            output_dir=str(folder / way),
            use_cpu=True,
            bf16=way == "run_clm",
            per_device_train_batch_size=windows,
            max_steps=10**6,
            save_strategy="no",
        )
        rows = [{"input_ids": row, "labels": row} for row in ids] * 1000
        Trainer(model, arguments, train_dataset=rows, callbacks=[pace]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    network = torch.compile(model) if way == "nanogpt" else model
    while True:
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(input_ids=ids).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pace.step()


def ours(way: str, shape: str, folder: Path) -> None:
    """run_pretrain.py, with its progress bar replaced by the pace."""
    import run_pretrain
    from llama_lite.exit import exit_with_status
    from llama_lite.training.callbacks import progress

    config, windows, tokens, steps = SHAPES[shape]
    progress.Progress = lambda: Pace(steps)
    name = f"{way}-{shape}".replace(" ", "-").replace(",", "")
    config.save_pretrained(folder / f"{name}-config")
    micro = 4 if "processes" in way else 1  # micro-batches of a step, over all processes
    argv = [
        *prepared(shape, folder),
        "--output_dir",
        str(folder / name),
        "--model_config",
        str(folder / f"{name}-config"),
    ]
    argv += [
        "--per_device_train_batch_size",
        str(windows),
        "--tokens_per_step",
        str(micro * windows * tokens),
        "--block_size",
        str(tokens),
    ]
    argv += [
        "--max_steps",
        "1000000",
        "--allow_epochs",
        "--eval_strategy",
        "no",
        "--save_steps",
        "1000000",
        "--probe_windows",
        "1",
    ]
    for switch, flag in SWITCHES.items():
        if f"{way} ".startswith("ours with "):
            on = flag in way.split() or (flag == "keep_memory" and way != NOTHING)
        else:
            on = way != f"ours without {switch}"
        argv += [f"--{flag}", str(on)]
    sys.argv = ["run_pretrain.py", *argv]
    exit_with_status(run_pretrain.main)


def prepared(shape: str, folder: Path) -> list[str]:
    """Arguments of prepared tokens with the shape's vocabulary."""
    tokenizer = ["gpt2"] if shape.startswith("124m") else ["train", "--vocab_size", str(SHAPES[shape][0].vocab_size)]
    sizes = ["--shard_tokens", "1000000", "--validation_tokens", "20000"]
    return [
        "--dataset",
        str(folder / "text.jsonl"),
        "--prepared_dir",
        str(folder / f"tokens-{tokenizer[-1]}"),
        "--tokenizer",
        *tokenizer,
        *sizes,
    ]


def products(config, rows: int, pace: Pace) -> None:
    """The products of all linear layers of a step: forward, and the gradients of inputs and weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    shapes = [(m.out_features, m.in_features) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    made = {shape: torch.randn(shape).bfloat16() for shape in set(shapes)}
    inputs = {width: torch.randn(rows, width).bfloat16() for shape in shapes for width in shape}
    while True:
        for out, into in shapes:
            x, weight, gradient = inputs[into], made[out, into], inputs[out]
            x @ weight.T, gradient @ weight, gradient.T @ x
        pace.step()


def start(way: str, shape: str, folder: Path, machine: str = "this processor") -> subprocess.Popen:
    environment = {**os.environ, **MACHINES[machine]} | (
        {"PLAIN": "1"} if not way.startswith("ours") or way == NOTHING else {}
    )
    environment.pop("THP_MEM_ALLOC_ENABLE", None)
    launcher = [sys.executable]
    if way == "ours on two processes":
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    log = open(folder / f"{way}-{shape}.txt", "w")
    command = [*launcher, __file__, "--worker", way, "--shape", shape, "--folder", str(folder)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
    )


def pace_of(process: subprocess.Popen) -> tuple[float, float]:
    """(seconds a step, peak GiB) of the slice that a worker is at."""
    for line in process.stdout:
        if line.startswith("PACE "):
            return tuple(map(float, line.split()[1:]))
    raise SystemExit(f"a way ended: {process.args}")


def in_turn(
    ways: list[str], shape: str, folder: Path, turns: int, machine: str = "this processor"
) -> tuple[dict, dict]:
    """(median seconds a step, peak GiB) of each way, slices in turn after one that warms up."""
    running, times, peaks = {}, {way: [] for way in ways}, {}
    for way in ways:
        running[way] = start(way, shape, folder, machine)
        pace_of(running[way])
    for turn in range(turns + 1):
        for way in ways if turn % 2 else reversed(ways):
            running[way].stdin.write("go\n")
            running[way].stdin.flush()
            seconds, peaks[way] = pace_of(running[way])
            times[way] += [seconds] if turn else []
    for process in running.values():
        process.kill()
        process.wait()
    return {way: statistics.median(values) for way, values in times.items()}, {
        way: round(peak, 2) for way, peak in peaks.items()
    }


def speed(shape: str, folder: Path, turns: int) -> dict:
    peers = ["trainer", "run_clm", "loop", "nanogpt"]
    seconds, peaks = in_turn(["ours", *peers, "products"], shape, folder, turns)
    tokens = SHAPES[shape][1] * SHAPES[shape][2]
    return {
        "tokens_a_second": {way: round(tokens / value) for way, value in seconds.items()},
        "ours_to": {way: round(seconds[way] / seconds["ours"], 3) for way in peers},
        "share_of_ceiling": round(seconds["products"] / seconds["ours"], 3),
        "peak_gib": {way: peaks[way] for way in ("ours", *peers)},
    }


def machine(name: str, folder: Path, turns: int, likely: bool) -> dict:
    """Tokens per second of each combination of switches for the demo's two models, and what the chosen ones are worth.

    likely: only what is chosen, and the combination that comes nearest to it, for more turns in the same time. `long`
    and `short`: what a run takes that is, or is not, long enough to compile its layers, against the best of all, or of
    the uncompiled ones.
    """
    code = """if True:
        import sys, torch
        sys.path.insert(0, sys.argv[1])
        from llama_lite.kernels import switches
        from llama_lite.machine import precision
        cpu = torch.device("cpu")
        chosen = precision.choose("auto", None, cpu)[0]
        print(chosen)
        for seconds in (1e6, 1):
            compiled = switches.choose_compile(seconds, chosen, cpu)[0]
            in_blocks = switches.choose_block_attention(chosen, compiled, cpu)[0]
            on = (switches.choose_fused_loss(cpu)[0], in_blocks, compiled)
            print(*map(int, on))
    """
    asked = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)],
        env={**os.environ, **MACHINES[name]},
        capture_output=True,
        text=True,
        check=True,
    )
    precision, *masks = asked.stdout.splitlines()
    combinations = {
        mask: " ".join(switch for switch, on in zip(COMBINED, mask, strict=True) if on)
        for mask in itertools.product((0, 1), repeat=3)
    }
    long, short = (combinations[tuple(map(int, mask.split()))] for mask in masks)
    if likely:
        combinations = {
            mask: on for mask, on in combinations.items() if on in (long, short, "fused_loss compile_layers")
        }
    found = {
        "precision": precision,
        "long": long,
        "short": short,
        "turns": turns,
        "processor": processor(),
        "date": time.strftime("%F"),
    }
    for shape in ("1m", "demo"):
        ways = {f"ours with {on}".rstrip(): on or "none" for on in combinations.values()} | {
            NOTHING: "none, memory not kept"
        }
        seconds, _ = in_turn(list(ways), shape, folder, turns, name)
        tokens = SHAPES[shape][1] * SHAPES[shape][2]
        speeds = {on: round(tokens / seconds[way]) for way, on in ways.items()}
        found[shape] = {
            "tokens_per_second": speeds,
            "long_to_best": round(speeds[long or "none"] / max(speeds.values()), 3),
            "short_to_best": round(
                speeds[short or "none"] / max(speed for on, speed in speeds.items() if "compile" not in on), 3
            ),
            "long_to_nothing": round(speeds[long or "none"] / speeds[ways[NOTHING]], 3),
        }
    return found


def kind_of_machine(name: str, precision: str) -> str:
    """Under which name the figures of an entry of MACHINES are kept: `AVX2`, `AVX512 with bfloat16`."""
    if name != "this processor":
        return name
    return torch.backends.cpu.get_cpu_capability() + (" with bfloat16" if precision == "bfloat16" else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--only", choices=list(SHAPES)[:2], help="one shape; the last figures of the other stay")
    parser.add_argument(
        "--parts", default="speed,switches,processes,memory,machines", help="the last figures of the other parts stay"
    )
    parser.add_argument(
        "--machines", default=",".join(MACHINES), help="of the part `machines`: the last figures of the others stay"
    )
    parser.add_argument(
        "--likely", action="store_true", help="of the part `machines`: only the combinations that may be the best"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    for name in ("--worker", "--shape", "--folder"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return worker(arguments.worker, arguments.shape, Path(arguments.folder))
    result = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    if arguments.parts != "machines":  # whose figures have dates of their own
        result |= {
            "cores": os.cpu_count(),
            "processor": processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "date": time.strftime("%F"),
        }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kill.write_text(folder / "text.jsonl", 4_000_000)
        for shape in (
            []
            if arguments.parts in ("memory", "machines")
            else [arguments.only]
            if arguments.only
            else list(SHAPES)[:2]
        ):
            found = result.setdefault(shape, {})
            subprocess.run(
                [sys.executable, str(ROOT / "run_pretrain.py"), *prepared(shape, folder), "--prepare_only"], check=True
            )
            if "speed" in arguments.parts:
                found |= speed(shape, folder, arguments.turns)
            if "switches" in arguments.parts:
                ways = ["ours", *(f"ours without {switch}" for switch in SWITCHES)]
                seconds, _ = in_turn(ways, shape, folder, arguments.turns)
                found["switch_gives"] = {
                    switch: round(seconds[f"ours without {switch}"] / seconds["ours"], 3) for switch in SWITCHES
                }
            if "processes" in arguments.parts:
                seconds, _ = in_turn(
                    ["ours, one of processes", "ours on two processes"], shape, folder, arguments.turns
                )
                found["two_processes_to_one"] = round(
                    seconds["ours, one of processes"] / seconds["ours on two processes"], 3
                )
            print(shape, json.dumps(found), flush=True)
            write_json(arguments.output, result)
        if "memory" in arguments.parts:
            peaks = {}
            subprocess.run(
                [sys.executable, str(ROOT / "run_pretrain.py"), *prepared("124m", folder), "--prepare_only"], check=True
            )
            for way in ("run_clm", "ours"):
                process = start(way, "124m", folder)
                pace_of(process)
                process.stdin.write("go\n")
                process.stdin.flush()
                peaks[way] = round(pace_of(process)[1], 2)
                process.kill()
                process.wait()
            result["124m"] = {"peak_gib": peaks, "ours_to_run_clm": round(peaks["ours"] / peaks["run_clm"], 3)}
            print("124m", json.dumps(result["124m"]), flush=True)
            write_json(arguments.output, result)
        if "machines" in arguments.parts:
            subprocess.run(
                [sys.executable, str(ROOT / "run_pretrain.py"), *prepared("1m", folder), "--prepare_only"], check=True
            )
            for name in arguments.machines.split(","):
                found = machine(name, folder, arguments.turns, arguments.likely)
                result.setdefault("machines", {})[kind_of_machine(name, found["precision"])] = found
                print(name, json.dumps(found), flush=True)
                write_json(arguments.output, result)


if __name__ == "__main__":
    main()
