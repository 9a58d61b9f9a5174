"""One run over many layouts: DDP, FSDP2 and ZeRO-2 with real sharding, one process. And what launchers pass over in
silence is refused.
"""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers import ROOT, config_file, launch, launch_ranks, log_of, on_cpus, same_tensors, tensors_of

from llama_lite.checkpoint.identity import changed_arithmetic, differences
from llama_lite.checkpoint.store import checkpoints, resolve
from llama_lite.checkpoint.verify import find_corruption
from llama_lite.errors import Refusal
from llama_lite.files import read_json, read_jsonl
from llama_lite.machine import parallelism
from llama_lite.machine.parallelism import Layout, layout_of
from llama_lite.models.loading import load_weights
from llama_lite.training.trainer import VerifiedTraining

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")


@pytest.fixture
def fsdp2(tmp_path):
    return (
        *ACCELERATE,
        "--config_file",
        str(on_cpus("fsdp2", tmp_path)),
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
        str(on_cpus("deepspeed_zero2", tmp_path)),
        str(ROOT / "tests/support/sharded_on_cpu.py"),
    )


# no multiple of a batch, nor of two processes, is evaluated; every step is logged and saved
CYCLE = {
    "max_steps": 5,
    "save_steps": 1,
    "eval_steps": 3,
    "logging_steps": 1,
    "save_total_limit": 9,
    "eval_windows": 13,
    "sample_tokens": 4,
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}  # nats; of the gradient's norm in parts of it, in float32


def losses(run: Path, *names: str) -> dict:
    return {(entry["step"], name): entry[name] for entry in log_of(run) for name in names if name in entry}


@pytest.mark.slow
@pytest.mark.parametrize("precision", TOLERANCE)
def test_one_run_over_all_layouts(settings, tmp_path, zero2, precision):
    """DDP -> FSDP2 -> one process -> ZeRO-2 -> HSDP, each from a checkpoint of the one before: the same windows, and the
    losses of the run that never stopped.
    """
    cycle, tolerance, before = {**CYCLE, "precision": precision}, TOLERANCE[precision], None
    whole = tmp_path / "whole"
    assert launch("--config", str(config_file(tmp_path, settings, **cycle, output_dir=str(whole)))).returncode == 0
    names = ("loss", "eval_loss", "grad_norm")[: 3 if precision == "float32" else 2]
    expected = losses(whole, *names)
    for step, name in enumerate(("ddp", "fsdp2", "none", "zero2", "hsdp")):
        run = tmp_path / f"{name}-{step}"
        in_parts = precision == "float32" and name in ("fsdp2", "hsdp")
        path = config_file(
            tmp_path,
            settings,
            **cycle,
            output_dir=str(run),
            per_device_train_batch_size=4,
            shard_checkpoints=in_parts,
        )
        if name == "fsdp2":  # items are asked of a sharded model, too
            path = config_file(
                tmp_path, yaml.safe_load(path.read_text()), eval_tasks=["embedded_mmlu_cloze"], eval_task_limit=4
            )
        argv = ["--config", str(path)] + (["--resume_from_checkpoint", str(before)] if before else [])
        result = start(name, argv, tmp_path, zero2)
        assert result.returncode == 0, result.stderr
        assert f"start     step {step}" in result.stdout and (not before or "verified: probe loss" in result.stdout)
        found = losses(run, *names)
        assert expected.keys() == found.keys()
        if name in ("fsdp2", "hsdp"):  # the plan decides what the launcher leaves open
            assert "chosen    fsdp_reshard_after_forward false: faster, and fits" in result.stdout
            events = read_jsonl(run / "events.jsonl")
            assert [event["reshard_after_forward"] for event in events if "reshard_after_forward" in event] == [False]
        off = {key: abs(found[key] - expected[key]) / (expected[key] if key[1] == "grad_norm" else 1) for key in found}
        assert max(off.values()) <= tolerance, (name, off)
        layout = read_json(run / "checkpoint-5" / "manifest.json")["identity"]["layout"]
        processes = {"none": 1, "hsdp": 4}.get(name, 2)
        assert (layout["sharding"], layout["processes"]) == ("fsdp2" if name == "hsdp" else name, processes)
        assert layout.get("replicas", 1) == (2 if name == "hsdp" else 1)
        before = run / f"checkpoint-{step + 1}"
        assert (before / "optimizer.safetensors").exists() is not in_parts
        for folder in run.glob("checkpoint-*"):
            assert find_corruption(folder) == []
        assert same_shapes(whole / "checkpoint-5", run / "checkpoint-5")


def start(name: str, argv: list[str], folder: Path, zero2: tuple[str, ...]):
    """run_pretrain.py under a layout: in one process, or in two."""
    if name in ("none", "zero2"):
        return launch(*argv, launcher=zero2 if name == "zero2" else (sys.executable,))
    if name == "ddp":
        return launch_ranks(ROOT / "configs/accelerate/cpu2.yaml", *argv)
    return launch_ranks(on_cpus(name, folder), *argv, through="tests/support/sharded_on_cpu.py")


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_rank_that_fails_alone_in_an_evaluation_keeps_no_other_waiting(settings, tmp_path, name):
    """Whole copies of a model go on, with a record of it. A sharded model needs all ranks for a forward pass: they end
    with the reason, at once, and the run goes on from the step before the evaluation.
    """
    few = {"max_steps": 2, "save_steps": 1, "eval_steps": 1, "sample_tokens": 0, "eval_windows": 4, "probe_windows": 1}
    few |= {"per_device_train_batch_size": 4, "step_timeout": 100_000, "shard_checkpoints": name == "fsdp2"}
    path = config_file(tmp_path, settings, **few, output_dir=str(tmp_path / "run"))
    launcher = on_cpus(name, tmp_path)
    launcher.write_text(launcher.read_text().replace("reshard_after_forward: auto", "reshard_after_forward: true"))
    result = launch_ranks(launcher, "--config", str(path), through="tests/support/failing_rank_1.py")
    status, events = read_json(tmp_path / "run/status.json"), read_jsonl(tmp_path / "run/events.jsonl")
    failures = [(event["at_step"], event["part"]) for event in events if event["event"] == "evaluation failed"]
    evaluated = [entry["step"] for entry in log_of(tmp_path / "run") if "eval_loss" in entry]
    if name == "ddp":
        assert result.returncode == 0 and status["status"] == "finished", result.stderr
        assert failures == [(1, "validation loss")] and evaluated == [2]
    else:
        assert result.returncode != 0 and status["status"] == "unhealthy"
        assert [event["reshard_after_forward"] for event in events if event["event"] == "started"] == [True]
        assert "validation loss of the evaluation after step 1: rank 1 failed: this rank alone" in status["reason"]
        assert read_json(tmp_path / "run/checkpoint-1/progress.json")["evaluation_due"] and evaluated == []


def test_number_formats_of_gradients_and_losses(monkeypatch):
    import torch
    from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin

    class ZeRO:
        def __init__(self):
            self.deepspeed_config = {}

    def completed(precision: str, **environment):
        with monkeypatch.context() as patch:
            for name in environment:
                patch.setenv(name, environment[name])
            given = {"mixed_precision": precision, "fsdp_plugin": None, "deepspeed_plugin": ZeRO()}
            return parallelism.complete_accelerator_arguments(
                {**given, "kwargs_handlers": [DistributedDataParallelKwargs()]}
            )

    plain = completed("bf16")
    assert plain["kwargs_handlers"][0].gradient_as_bucket_view and plain["fsdp_plugin"] is None
    assert plain["deepspeed_plugin"].deepspeed_config == {}
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    policy = completed("bf16", **sharded)["fsdp_plugin"].mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
    assert completed("no", **sharded)["fsdp_plugin"] is None
    with monkeypatch.context() as patch:
        patch.setattr(FullyShardedDataParallelPlugin, "__post_init__", lambda self: None)
        assert completed("fp16", **sharded)["fsdp_plugin"].mixed_precision_policy.param_dtype is torch.float16
    zero = completed("bf16", ACCELERATE_USE_DEEPSPEED="true")["deepspeed_plugin"]
    assert zero.deepspeed_config == {"data_types": {"grad_accum_dtype": "fp32"}}


def of_layout(processes: int = 1, sharding: str = "none", **more) -> dict:
    layout = {"processes": processes, **Layout(processes, sharding).record(), "micro_batch": 8, "accumulation": 2}
    kinds = {"model": {}, "data": {}, "hyperparameters": {"lr_scheduler_kwargs": None, "lr_scheduler_type": "linear"}}
    hardware = {"device": "H100", "cuda": "13.0"} if more.pop("cuda", False) else {"device": "a processor"}
    switches = {name: True for name in ("deterministic",) if more.pop(name, False)}
    environment = {"hardware": hardware, "switches": switches}
    return {**kinds, "layout": {**layout, **more}, "environment": environment}


WHOLE, SHARDED_2 = of_layout(), of_layout(2, "fsdp2")


@pytest.mark.parametrize(
    "saved, now, other",
    [
        (WHOLE, of_layout(2, "ddp", micro_batch=4, accumulation=1), []),
        (SHARDED_2, of_layout(8, "fsdp2", micro_batch=1), []),
        (WHOLE, SHARDED_2, ["sharding"]),
        (SHARDED_2, of_layout(2, "ddp"), ["sharding"]),
        (SHARDED_2, of_layout(2, "zero2"), ["sharding"]),
        ({**SHARDED_2, "layout": {"processes": 2, "sharding": "fsdp2"}}, SHARDED_2, ["sharding"]),  # it rounded losses
    ],
)
def test_the_kind_of_forward_pass_decides_whether_a_probe_must_be_bitwise_equal(saved, now, other):
    assert changed_arithmetic(differences(saved, now)) == other


@pytest.mark.parametrize("switch", [False, True])
def test_a_gpu_without_deterministic_algorithms_resumes_within_the_tolerance(switch, capsys):
    identity = of_layout(cuda=True, deterministic=switch)
    identity["hyperparameters"]["precision"] = "bfloat16"
    manifest = {"identity": identity, "probe": {"loss": 6.0, "sha256": "0"}}
    start = SimpleNamespace(manifest=manifest, checkpoint=Path("checkpoint-5"))
    trainer = SimpleNamespace(start=start, identity=identity, probe_loss=lambda: 6.001, probe_digest=lambda: "0")
    if switch:
        with pytest.raises(Refusal, match=r"allowed difference here: 0\.0"):
            VerifiedTraining.check_probe(trainer)
    else:
        VerifiedTraining.check_probe(trainer)
        assert (
            "within 0.02 of the recorded 6.000000 (a GPU gives the same bits every time only with --deterministic)"
            in (capsys.readouterr().out)
        )


def test_ranks_wait_for_rank_0_longer_than_a_collective_may_take():
    result = launch_ranks(ROOT / "configs/accelerate/cpu2.yaml", script="tests/support/busy_rank_0.py")
    assert result.returncode == 0, result.stderr
    assert "prepared for the rank that waited; a plain broadcast: True" in result.stdout


def same_shapes(first: Path, second: Path) -> bool:
    """Weights and optimiser of two checkpoints have the same tensors: names, shapes and number formats; every layout
    writes one form.
    """

    def shapes(path):
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors_of(path).items()}

    return all(shapes(first / name) == shapes(second / name) for name in ("model.safetensors", "optimizer.safetensors"))


@pytest.mark.slow
def test_a_sharded_run_resumes_bit_for_bit_publishes_and_exports(settings, tmp_path, fsdp2, hub):
    """The first run, which accelerate starts, writes its checkpoints in parts; the second one does not."""
    import torch
    from transformers import AutoModelForCausalLM

    path = config_file(
        tmp_path, settings, output_dir=str(tmp_path / "whole"), compile_layers=False, shard_checkpoints=True
    )
    result = launch("--config", str(path), "--push_to_hub", "--hub_model_id", "org/sharded", launcher=fsdp2)
    assert result.returncode == 0, result.stderr
    path = config_file(tmp_path, settings, output_dir=str(tmp_path / "again"))
    argv = ["--config", str(path), "--resume_from_checkpoint", "org/sharded@step-000005"]
    result = launch_ranks(on_cpus("fsdp2", tmp_path), *argv, through="tests/support/sharded_on_cpu.py")
    assert result.returncode == 0 and "as recorded, bit for bit" in result.stdout, result.stderr
    assert log_of(tmp_path / "again") == log_of(tmp_path / "whole")
    parts = [f"{kind}-0000{part}-of-00002.safetensors" for kind in ("model", "optimizer") for part in (1, 2)]
    for _, folder in checkpoints(tmp_path / "whole"):
        assert sorted(path.name for path in folder.glob("*.safetensors")) == parts and not list(folder.glob(".*"))
        assert find_corruption(folder) == []
        sizes = [(folder / name).stat().st_size for name in parts]
        assert max(sizes[:2]) < 1.2 * min(sizes[:2]) and max(sizes[2:]) < 1.2 * min(sizes[2:])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/checkpoint-12")  # as any model in several files
    stored = tensors_of(tmp_path / "again/checkpoint-12/model.safetensors")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in stored.items())
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
    config, argv = on_cpus("fsdp2", tmp_path), ("--output_dir", str(tmp_path / "run"))
    if script == "run_pretrain.py":  # under the launcher itself
        result = launch(*argv, launcher=(*ACCELERATE, "--config_file", str(config)), script=script)
    else:
        result = launch_ranks(config, *argv, script=script)
    assert result.returncode != 0 and len(re.findall(SHARDED[script], result.stderr)) == 1
    assert not (tmp_path / "run").exists()


class Training:
    """TrainingArguments, as far as check_launch looks."""

    def __init__(self):
        import torch
        from transformers.training_args import OptimizerNames

        self.optim = OptimizerNames.ADAMW_TORCH_FUSED

        self.device = torch.device("cpu")


HYBRID = {
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
}


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"},
            "SHARDED_STATE_DICT saves no model that can be loaded",
        ),
        ({"FSDP_VERSION": "1", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}, "FSDP version 1"),
        (HYBRID | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size 2: .* Set it to 1"),
        (
            HYBRID | {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8"},
            r"2 replicas \(dp_replicate_size\) of 8 shards \(dp_shard_size\) are not the 1 processes",
        ),
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
        "fsdp2": Layout(8, "fsdp2", auto_reshard=True),
        "deepspeed_zero2": Layout(8, "zero2"),
        "multi_node": Layout(16, "fsdp2", auto_reshard=True),
        "multi_node_ddp": Layout(16, "ddp"),
        "hsdp": Layout(16, "fsdp2", replicas=2, auto_reshard=True),
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
