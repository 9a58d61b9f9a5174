"""Make what a user of one commit has on disk, as data for tests/test_compatibility.py.

    python tests/compatibility/make.py REPOSITORY OUTPUT

REPOSITORY: a checkout of the commit, whose scripts run unmodified; OUTPUT: a new folder beside `inputs/`, named after
the commit. Everything lies in relative places, so that copies of both folders work anywhere. float32, one thread,
nothing that depends on the installed packages' text.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

PRETRAIN = {
    "model_config": "../inputs/model",
    "publish_dtype": "float32",
    "dataset": "../inputs/text.jsonl",
    "prepared_dir": "prepared",
    "tokenizer": "train",
    "vocab_size": 512,
    "shard_tokens": 8000,
    "validation_tokens": 2000,
    "output_dir": "run",
    "block_size": 64,
    "order": "shuffled",
    "tokens_per_step": 512,
    "eval_windows": 8,
    "probe_windows": 2,
    "sample_prompts": ["The"],
    "sample_tokens": 4,
    "per_device_train_batch_size": 4,
    "max_steps": 10,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "bf16": False,
    "logging_steps": 2,
    "eval_steps": 4,
    "save_steps": 5,  # between two logs: what is lost or counted twice shows in the next one
    "prepare_workers": 1,
    "cpu_threads": 1,
}
SFT = {
    "model_name_or_path": "run",
    "dataset": "../inputs/rows.jsonl",
    "output_dir": "adapter",
    "eval_rows": 8,
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "max_length": 384,
    "sequences_per_step": 4,
    "per_device_train_batch_size": 2,
    "probe_rows": 2,
    "compared_prompts": 2,
    "sampled_answers": 2,
    "answer_tokens": 4,
    "max_steps": 6,
    "learning_rate": 5e-3,
    "bf16": False,
    "logging_steps": 2,
    "eval_steps": 3,
    "save_steps": 3,
    "prepare_workers": 1,
    "cpu_threads": 1,
}
EVAL = {
    "models": ["run@step-5", "run", "run+adapter"],
    "tasks": ["arc_easy", "embedded_mmlu_cloze"],  # own items, and lm-eval's own
    "task_data": ["arc_easy=../inputs/arc_easy"],
    "texts": ["notes=../inputs/notes.jsonl"],
    "sensitivity": ["embedded_mmlu_cloze"],
    "limit": 10,
    "variant_limit": 4,
    "contamination": "prepared",
    "inside": "notes",
    "output_dir": "evaluation",
    "cpu_threads": 1,
}
DROPPED = (  # made again from the rest, or not read
    "run/checkpoint-10",
    "*/.lock",
    "*/figures",
    "*/evaluation/*/figures",
)


def main(repository: Path, output: Path) -> None:
    output.mkdir()
    for script, settings in (("pretrain", PRETRAIN), ("sft", SFT), ("eval", EVAL)):
        (output / f"{script}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        command = [sys.executable, str(repository.resolve() / f"run_{script}.py"), "--config", f"{script}.yaml"]
        subprocess.run(
            command,
            cwd=output,
            check=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    for pattern in DROPPED:
        for path in output.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
