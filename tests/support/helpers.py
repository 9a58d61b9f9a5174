"""What several test files use: settings as a config file, a script as a process, texts and sources, a run's log and
tensors.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import environment
import forking
import pytest
import yaml

from llama_lite.config.pretrain import parse_pretrain
from llama_lite.data import formats, given_text, preparation, sources, text_source
from llama_lite.data.tokenizer import train_tokenizer
from llama_lite.files import read_jsonl

ROOT = Path(__file__).resolve().parents[2]

# a run of four steps that saves two checkpoints and does nothing else
QUICK = {
    "precision": "float32",
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "eval_strategy": "no",
    "eval_windows": 4,
    "sample_tokens": 0,
    "save_total_limit": 9,
}


@contextlib.contextmanager
def without_figures():
    """While it lasts, cards of runs in this process and in its forks have no figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model_card.card.draw", lambda records: None)
        patch.setattr(forking, "FIGURES", False)
        yield


def config_file(folder: Path, settings: dict, **changes) -> Path:
    """A YAML file with `settings` and `changes`, where None removes."""
    chosen = {key: value for key, value in {**settings, **changes}.items() if value is not None}
    path = folder / f"config-{abs(hash(str(chosen)))}.yaml"
    path.write_text(yaml.safe_dump(chosen), encoding="utf-8")
    return path


def launch(
    *argv: str, script: str = "run_pretrain.py", launcher: tuple[str, ...] = (sys.executable,), timeout: float = 900
) -> subprocess.CompletedProcess:
    """A script as a process of its own: a fork of one that has the libraries loaded, so that imports (5 to 14 s) are
    paid once.

    With a launcher, or where the test changed the environment (which imports read), it is started afresh. Signals and
    imports are tested by tests that start their processes themselves.
    """
    command = [*launcher, str(ROOT / script), *argv]
    if launcher == (sys.executable,) and not environment.is_changed():
        return forking.run(command, timeout)
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout)


def launch_ranks(
    config: Path, *argv: str, script: str = "run_pretrain.py", through: str | None = None
) -> subprocess.CompletedProcess:
    """A script under an accelerate config for several CPU processes, which are forks as those of `launch` are.

    through: a script that runs the script, in its place.
    """
    scripts = [str(ROOT / through), script] if through else [str(ROOT / script)]
    return forking.run_ranks(config, [*scripts, *argv], timeout=900)


def on_cpus(name: str, folder: Path) -> Path:
    """A shipped accelerate config as it is, but for two CPU processes (HSDP: four) of one machine."""
    config = yaml.safe_load((ROOT / f"configs/accelerate/{name}.yaml").read_text()) | {
        "num_machines": 1,
        "num_processes": 4 if name == "hsdp" else 2,
        "main_process_port": 0,
    }
    if name != "deepspeed_zero2":
        config["use_cpu"] = True
    if name == "hsdp":
        config["parallelism_config"]["parallelism_config_dp_shard_size"] = 2
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def interrupted(*args, **more) -> None:
    """In place of a request: Ctrl-C while it waits."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def finished_run(folder: Path, settings: dict, script: str = "run_pretrain.py") -> Path:
    """A run in `folder`, with figures, also where the test that asks for it first is `undrawn`."""
    path = config_file(folder.parent, settings, output_dir=str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forking, "FIGURES", True)
        result = launch("--config", str(path), script=script)
    assert result.returncode == 0, result.stderr
    return folder


def log_of(run: Path) -> list[dict]:
    """log.jsonl without what two equal runs may log differently."""
    from llama_lite.training.trainer import TIMINGS

    return [
        {key: value for key, value in entry.items() if key not in TIMINGS} for entry in read_jsonl(run / "log.jsonl")
    ]


def tensors_of(path: Path) -> dict:
    """The tensors of a file, or of its parts where it was written in parts."""
    from safetensors.torch import load_file

    files = [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))
    assert files, path
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


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


END = "<|endoftext|>"


HARD = [
    "A document that says <|endoftext|> in the middle.",
    "It's naïve: 中文, עברית, 🙂🙂‍↔️, ½ and ǆ; tabs\t\tand\r\nlines\n\n\n  x",
    "Before" + " " * 1_000_000 + "after",
    "a" * 3000 + " " * 3000 + "1234567890" * 100,
    "\x00\x1c\x85\u2028\u3000 odd blanks \ufeff",
]


def with_end_at(place: int, folder):
    """A tokenizer of 300 ids whose end-of-text has the id `place`."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    definition = json.loads(train_tokenizer(iter(["some words to learn from " * 20]), 300).backend_tokenizer.to_str())
    definition["added_tokens"][0]["id"] = definition["model"]["vocab"][END] = place
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(definition)), eos_token=END).save_pretrained(
        folder
    )
    return AutoTokenizer.from_pretrained(folder)


def data_args(tmp_path, **changes):
    settings = {
        "prepared_dir": str(tmp_path / "tokens"),
        "block_size": 64,
        "shard_tokens": 20_000,
        "validation_tokens": 5_000,
        "tokenizer": "train",
        "vocab_size": 512,
        "prepare_workers": 1,
        **changes,
    }
    _, data, curation, _, run, _ = parse_pretrain(["--config", str(config_file(tmp_path, settings))])
    return data, dataclasses.asdict(curation), set(run.explicit_args)


def prepare(tmp_path, repair: bool = False, **changes) -> dict:
    data, rules, claimed = data_args(tmp_path, **changes)
    return preparation.prepare(data, rules, given_text.Text(data), claimed, repair)


def jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


ROWS = [
    {
        "text": f"Row {i} explains something about the number {i} in plain English words.",
        "id": str(i),
        "score": i % 5,
        "language": "en" if i % 7 else "fr",
    }
    for i in range(200)
]


def source_of(path, column="text", split="train", max_bytes=None, **more):
    return sources.resolve(str(path), split=split, max_bytes=max_bytes, options=text_source.ReadOptions(column, **more))


def texts_of(source, columns=()):
    return [document.text for document in source.documents(formats.Skipped(), columns)]
