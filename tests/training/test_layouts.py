"""One run over many layouts: DDP, FSDP2 and ZeRO-2 with real sharding, one process. And what launchers pass over in
silence is refused.
"""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, config_file, launch, log_of, same_tensors
from safetensors import safe_open

from llama_lite.checkpoint.store import resolve
from llama_lite.checkpoint.verify import find_corruption
from llama_lite.errors import Refusal
from llama_lite.files import read_json, read_jsonl
from llama_lite.machine import parallelism
from llama_lite.machine.parallelism import Layout, layout_of
from llama_lite.models.loading import load_weights

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
DDP = (*ACCELERATE, "--config_file", str(ROOT / "configs/accelerate/cpu2.yaml"))


def on_two_cpus(name: str, folder: Path) -> Path:
    """A shipped accelerate config as it is, but for two CPU processes."""
    config = yaml.safe_load((ROOT / f"configs/accelerate/{name}.yaml").read_text()) | {
        "num_processes": 2,
        "main_process_port": 0,
    }
    if name == "fsdp2":
        config["use_cpu"] = True
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def fsdp2(tmp_path):
    return (
        *ACCELERATE,
        "--config_file",
        str(on_two_cpus("fsdp2", tmp_path)),
        str(ROOT / "tests/support/sharded_on_cpu.py"),
    )


@pytest.fixture
def zero2(tmp_path):
    """DeepSpeed's ZeRO-2; `make test` puts DeepSpeed in a folder of its own, for other runs import what they find."""
    found = f"PYTHONPATH={Path(sys.prefix) / 'deepspeed'}"
    return (
        "env",
        found,
        *ACCELERATE,
        "--config_file",
        str(on_two_cpus("deepspeed_zero2", tmp_path)),
        str(ROOT / "tests/support/sharded_on_cpu.py"),
    )


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """The run that never stopped, in float32 (in bfloat16 FSDP2 casts the weights, autocast does not)."""
    folder = tmp_path_factory.mktemp("layouts")
    assert (
        launch("--config", str(config_file(folder, settings, **FLOAT32, output_dir=str(folder / "whole")))).returncode
        == 0
    )
    return folder / "whole"


FLOAT32 = {
    "bf16": False,
    "save_steps": 2,
    "save_total_limit": 9,
    "eval_windows": 13,
}  # no multiple of a batch, nor of two processes


def losses(run: Path) -> dict:
    return {
        (entry["step"], name): entry[name]
        for entry in log_of(run)
        for name in ("loss", "eval_loss", "grad_norm")
        if name in entry
    }


@pytest.mark.slow
def test_one_run_over_all_layouts(settings, whole, tmp_path, fsdp2, zero2):
    """DDP -> FSDP2 -> one process -> ZeRO-2 -> DDP, each from a checkpoint of the one before: the same windows, losses
    to 1e-5.
    """
    one, before = (sys.executable,), None
    for name, launcher, step in (
        ("ddp", DDP, 0),
        ("fsdp2", fsdp2, 2),
        ("one", one, 4),
        ("zero2", zero2, 6),
        ("ddp again", DDP, 8),
    ):
        path = config_file(
            tmp_path, settings, **FLOAT32, output_dir=str(tmp_path / name), per_device_train_batch_size=4
        )
        if name == "fsdp2":  # items are asked of a sharded model, too
            path = config_file(
                tmp_path, yaml.safe_load(path.read_text()), eval_tasks=["embedded_mmlu_cloze"], eval_task_limit=4
            )
        resumed = ("--resume_from_checkpoint", str(before / f"checkpoint-{step}")) if before else ()
        result = launch("--config", str(path), *resumed, launcher=launcher)
        assert result.returncode == 0, result.stderr
        assert f"start     step {step}" in result.stdout and (not before or "verified: probe loss" in result.stdout)
        expected, found = losses(whole), losses(tmp_path / name)
        assert expected.keys() == found.keys()
        assert all(math.isclose(found[key], expected[key], rel_tol=1e-5) for key in expected), (expected, found)
        before = tmp_path / name
        layout = read_json(before / "checkpoint-12" / "manifest.json")["identity"]["layout"]
        assert layout["sharding"] == {"one": "none", "fsdp2": "fsdp2", "zero2": "zero2"}.get(name, "ddp") and layout[
            "processes"
        ] == (1 if name == "one" else 2)
        for folder in before.glob("checkpoint-*"):
            assert find_corruption(folder) == []
    for name in ("fsdp2", "zero2"):
        assert same_shapes(whole / "checkpoint-12", tmp_path / name / "checkpoint-12")


def same_shapes(first: Path, second: Path) -> bool:
    """Weights and optimiser of two checkpoints have the same tensors: names, shapes and number formats; every layout
    writes one form.
    """

    def shapes(path):
        with safe_open(path, "pt") as file:
            return {name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118

    return all(shapes(first / name) == shapes(second / name) for name in ("model.safetensors", "optimizer.safetensors"))


@pytest.mark.slow
def test_a_sharded_run_resumes_bit_for_bit_publishes_and_exports(settings, tmp_path, fsdp2, hub):
    from transformers import AutoModelForCausalLM

    path = config_file(tmp_path, settings, output_dir=str(tmp_path / "whole"), compile_layers=False)
    result = launch("--config", str(path), "--push_to_hub", "--hub_model_id", "org/sharded", launcher=fsdp2)
    assert result.returncode == 0, result.stderr
    path = config_file(tmp_path, settings, output_dir=str(tmp_path / "again"))
    result = launch("--config", str(path), "--resume_from_checkpoint", "org/sharded@step-000005", launcher=fsdp2)
    assert result.returncode == 0 and "as recorded, bit for bit" in result.stdout, result.stderr
    assert log_of(tmp_path / "again") == log_of(tmp_path / "whole")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert same_tensors(tmp_path / "whole" / "checkpoint-12" / name, tmp_path / "again" / "checkpoint-12" / name)
    published = AutoModelForCausalLM.from_pretrained("org/sharded", revision="step-000010")
    assert (
        sum(p.numel() for p in published.parameters())
        == read_json(tmp_path / "whole" / "run.json")["plan"]["parameters"]
    )
    assert [event["event"] for event in read_jsonl(tmp_path / "whole" / "events.jsonl")].count("published") == 3


REFUSED = {
    "CPU processes that are not started": (
        ("--cpu", "--num_processes", "2"),
        {},
        "asked for several processes, but this process is alone",
    ),
    "tasks of srun": ((), {"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 tasks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_launch_that_runs_something_else_is_refused(settings, tmp_path, case, monkeypatch):
    words, environment, message = REFUSED[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launcher = (*ACCELERATE, *words) if words else (sys.executable,)
    result = launch(
        "--config", str(config_file(tmp_path, settings, output_dir=str(tmp_path / "run"))), launcher=launcher
    )
    assert result.returncode != 0 and message in result.stderr and not (tmp_path / "run").exists()


SHARDED = {
    "run_pretrain.py": "FSDP was requested, but accelerate ignores it on a cpu",
    "run_sft.py": "fsdp2 shards the model, which run_sft.py does not support: .* configs/accelerate/ddp.yaml",
}


@pytest.mark.parametrize("script", SHARDED)
def test_sharding_that_does_not_run_is_refused(tmp_path, script):
    launcher = (*ACCELERATE, "--config_file", str(on_two_cpus("fsdp2", tmp_path)))
    result = launch("--output_dir", str(tmp_path / "run"), launcher=launcher, script=script)
    assert result.returncode != 0 and len(re.findall(SHARDED[script], result.stderr)) == 1
    assert not (tmp_path / "run").exists()


class Training:
    """TrainingArguments, as far as check_launch looks."""

    def __init__(self):
        import torch
        from transformers.training_args import OptimizerNames

        self.optim = OptimizerNames.ADAMW_TORCH_FUSED

        self.device = torch.device("cpu")


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
            "SHARDED_STATE_DICT saves no model that can be loaded",
        ),
        ({"FSDP_VERSION": "1", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, "FSDP version 1"),
        (
            {
                "ACCELERATE_USE_FSDP": "false",
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
            },
            "ZeRO stage 3",
        ),
        (
            {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            "dynamo_backend INDUCTOR .* --compile_layers",
        ),
    ],
)
def test_sharding_without_loadable_checkpoints_is_refused(environment, message, monkeypatch):
    class State:
        num_processes, distributed_type = 1, "DistributedType.MULTI_GPU"

    monkeypatch.setattr("accelerate.PartialState", State)
    for name, value in ({"ACCELERATE_USE_FSDP": "true"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Refusal, match=message):
        parallelism.check_launch(Training())


@pytest.mark.parametrize(
    "shard, way_out", [("pytorch_model_fsdp_0", "accelerate merge-weights"), ("global_step10", "zero_to_fp32.py")]
)
def test_a_checkpoint_in_shards_is_refused_with_the_way_out(tmp_path, shard, way_out):
    (tmp_path / "theirs" / shard).mkdir(parents=True)
    for read in (
        lambda folder: resolve(tmp_path / "run", str(folder), (), None),
        lambda folder: load_weights(None, folder),
    ):
        with pytest.raises(Refusal, match=f"which only .* with the same number of processes can read.*{way_out}"):
            read(tmp_path / "theirs")


def test_layouts_are_read_from_accelerate_configs(tmp_path):
    found = {path.stem: layout_of(str(path)) for path in (ROOT / "configs/accelerate").glob("*.yaml")}
    assert found == {
        "one_gpu": Layout(1, "none"),
        "cpu2": Layout(2, "ddp"),
        "ddp": Layout(8, "ddp"),
        "fsdp2": Layout(8, "fsdp2"),
        "deepspeed_zero2": Layout(8, "zero2"),
        "multi_node": Layout(16, "fsdp2"),
    }
    (tmp_path / "no.yaml").write_text(json.dumps({"a": 1}))
    for path in (tmp_path / "no.yaml", tmp_path / "none.yaml"):
        with pytest.raises(Refusal, match="no accelerate config with"):
            layout_of(str(path))


@pytest.fixture
def four_gpus(monkeypatch):
    """Arguments that see four GPUs in one process, as transformers counts them."""
    from transformers import TrainingArguments

    original = TrainingArguments.__post_init__

    def sees_four(self):
        original(self)
        self._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", sees_four)


@pytest.mark.parametrize("script", ["run_pretrain.py", "run_sft.py"])
def test_one_process_that_sees_four_gpus_uses_one_and_says_so(
    script, pretrain, sft, four_gpus, tmp_path, monkeypatch, capsys
):
    """transformers would wrap the model in DataParallel and make each step four times larger."""
    from transformers import Trainer

    call, train, seen = pretrain if script == "run_pretrain.py" else sft, Trainer.train, []

    def spied(self, *args, **kwargs):
        seen.append(
            (
                self.args.n_gpu,
                self.args.train_batch_size,
                self.args.per_device_train_batch_size,
                type(self.model_wrapped).__name__,
            )
        )
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", spied)
    quick = {"max_steps": 2, "eval_strategy": "no"} | (
        {"eval_windows": 4, "sample_tokens": 0} if call is pretrain else {"sampled_answers": 1, "compared_prompts": 0}
    )
    call(tmp_path / "run", "--dry_run", **quick)
    assert "GPUs" not in capsys.readouterr().out
    run = call(tmp_path / "run", **quick)
    (count, batch, asked, name), out = seen[0], capsys.readouterr().out
    assert count == 1 and batch == asked and name != "DataParallel"
    assert (
        out.count(
            "device    cpu, one of the 4 GPUs that this process sees; all of them: accelerate launch --config_file"
            " configs/accelerate/ddp.yaml"
        )
        == 1
    )
    assert f"--num_processes 4 {script} ..." in out
    if call is pretrain:
        assert read_json(run / "checkpoint-2" / "progress.json")["tokens"] == 2 * 1024
