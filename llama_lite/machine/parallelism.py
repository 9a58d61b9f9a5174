"""The layout of a launch (processes, sharding), and whether the requested layout is the one that runs.

Launchers and accelerate ignore some requests silently: a second CPU process, sharding on a CPU. Such a launch is
refused before anything is written.
"""

import dataclasses
import os
from typing import TYPE_CHECKING

import yaml

from ..distributed import WORLD_SIZE
from ..errors import Refusal
from ..files import read_yaml

if TYPE_CHECKING:
    from transformers import TrainingArguments

SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


RESHARD = "FSDP_RESHARD_AFTER_FORWARD"  # variable of accelerate launch


@dataclasses.dataclass(frozen=True)
class Layout:
    """The number of processes of a run, and its sharding: each process holds everything (none, ddp) or a part (fsdp2,
    zero2).

    replicas: groups of processes that each hold the whole model between them (HSDP, more than 1). reshard: whether
    FSDP2 frees gathered weights after the forward pass. auto_reshard: the plan decides that, and has not yet.
    """

    processes: int = 1
    sharding: str = "none"
    replicas: int = 1
    reshard: bool = True
    auto_reshard: bool = False

    @property
    def shards(self) -> int:
        """Processes over which weights, gradients and optimizer state are divided."""
        return self.processes // self.replicas if self.sharding in ("fsdp2", "zero2") else 1

    def record(self) -> dict:
        """What a run's identity holds of it, besides the number of processes. `output_dtype`: FSDP2 keeps the number
        format of outputs; it rounded the loss to that of the weights in checkpoints without this entry.
        """
        replicas = {"replicas": self.replicas} if self.replicas > 1 else {}
        return {"sharding": self.sharding, **replicas} | ({"output_dtype": "kept"} if self.sharding == "fsdp2" else {})

    def __str__(self) -> str:
        over = f"over {self.shards}" + (f", {self.replicas} replicas" if self.replicas > 1 else "")
        return {
            "none": "one process",
            "ddp": f"{self.processes} processes, DDP",
            "fsdp2": f"{'HSDP' if self.replicas > 1 else 'FSDP2'} {over}",
            "zero2": f"ZeRO-2 {over}",
        }[self.sharding]


def layout() -> Layout:
    """The layout of this process, from its launcher's environment variables."""
    if _is_set("ACCELERATE_USE_FSDP"):
        return Layout(WORLD_SIZE, "fsdp2", _replicas(), *_resharding(os.environ.get(RESHARD, "true")))
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        return Layout(WORLD_SIZE, "zero2")
    return Layout(WORLD_SIZE, "ddp" if WORLD_SIZE > 1 else "none")


def _resharding(value: str) -> tuple[bool, bool]:
    """(reshard, auto_reshard) of fsdp_reshard_after_forward: true, false, or `auto`, which is this project's own."""
    return value.lower() != "false", value.lower() == "auto"


def set_resharding(reshard: bool) -> None:
    """Decide fsdp_reshard_after_forward in place of `auto`, before Accelerator reads it."""
    os.environ[RESHARD] = str(reshard).lower()


def _replicas() -> int:
    """Replicas of HSDP, from the launcher's environment variables; 1 without HSDP."""
    hybrid = _is_set("ACCELERATE_USE_PARALLELISM_CONFIG")
    return int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", 1)) if hybrid else 1


def layout_of(path: str) -> Layout:
    """The layout that an accelerate config file would launch. Raises Refusal."""
    try:
        config = read_yaml(path)
        kind, processes = str(config["distributed_type"]).upper(), int(config["num_processes"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        raise Refusal(
            f"--plan_launch {path}: no accelerate config with distributed_type and num_processes"
            f" ({' '.join(str(error).split())})."
        ) from None
    if kind == "FSDP":
        replicas = (config.get("parallelism_config") or {}).get("parallelism_config_dp_replicate_size", 1)
        reshard = (config.get("fsdp_config") or {}).get("fsdp_reshard_after_forward", True)
        return Layout(processes, "fsdp2", int(replicas), *_resharding(str(reshard)))
    return Layout(processes, "zero2" if kind == "DEEPSPEED" else "ddp" if processes > 1 else "none")


def complete_accelerator_arguments(arguments: dict) -> dict:
    """The keyword arguments of Trainer's Accelerator, with what this layout needs besides.

    DDP: gradients are views of the communication buckets, not copies of them. FSDP2 in 16 bits: weights are cast for
    computing; gradients are reduced and accumulated in float32, and outputs keep their number format (accelerate would
    make all of them 16 bits, the loss too). ZeRO-2: gradients are accumulated in float32.
    """
    import torch
    from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    for handler in arguments["kwargs_handlers"]:
        if isinstance(handler, DistributedDataParallelKwargs):
            handler.gradient_as_bucket_view = True
    sharding, half = layout().sharding, {"bf16": torch.bfloat16, "fp16": torch.float16}
    if sharding == "fsdp2" and arguments["mixed_precision"] in half:
        plugin = arguments.get("fsdp_plugin") or FullyShardedDataParallelPlugin()
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=half[arguments["mixed_precision"]], reduce_dtype=torch.float32, output_dtype=None
        )
        arguments["fsdp_plugin"] = plugin
    if sharding == "zero2":
        arguments["deepspeed_plugin"].deepspeed_config["data_types"] = {"grad_accum_dtype": "fp32"}
    return arguments


def use_one_gpu(training: "TrainingArguments", script: str) -> str | None:
    """Let a process that sees several GPUs train on the first. Trainer would copy the model to all of them
    (DataParallel), which multiplies the size of a step.

    Returns a message for the user, or None where there is one GPU at most.
    """
    gpu_count = training.n_gpu
    if gpu_count <= 1:
        return None
    training._n_gpu = 1
    launch = f"accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes {gpu_count} {script}"
    return f"{training.device}, one of the {gpu_count} GPUs that this process sees; all of them: {launch} ..."


def check_launch(training: "TrainingArguments", shards: bool = True) -> None:
    """Raise Refusal where the launcher, accelerate or Slurm requested one layout and another runs.

    shards: whether this script can run with a part of the model in each process.
    """
    from accelerate import PartialState

    device = training.device  # creates accelerate's state
    state = PartialState()
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() not in ("", "no"):
        raise Refusal(
            f"the launcher's dynamo_backend {dynamo} (ACCELERATE_DYNAMO_BACKEND) compiles the whole model, which is not"
            " recorded: remove it from the launcher's config, and use --compile_layers."
        )
    check_process_count(state.num_processes)
    sharding = layout().sharding
    if sharding in ("fsdp2", "zero2"):
        _check_sharding(sharding, shards, training.optim.value, device, state.distributed_type)
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if sharding == "zero2" and stage != "2":
        raise Refusal(
            f"DeepSpeed ZeRO stage {stage} was requested; only stage 2 is supported. To shard weights too:"
            " configs/accelerate/fsdp2.yaml."
        )


def check_shard_checkpoints(requested: bool, layout: Layout) -> None:
    """Raise Refusal for --shard_checkpoints where no process has a part of the model."""
    if requested and layout.sharding != "fsdp2":
        raise Refusal(
            f"--shard_checkpoints: here ({layout}) rank 0 has all of the state, and writes it. Leave it out, or launch"
            " with configs/accelerate/fsdp2.yaml or hsdp.yaml."
        )


def check_process_count(processes: int) -> None:
    """Raise Refusal where accelerate runs another number of `processes` than its launcher, or srun, was asked for."""
    alone = "this process is alone"
    if WORLD_SIZE == 1 and processes == 1:
        if "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ:
            raise Refusal(
                f"accelerate launch was asked for several processes, but {alone}: on CPUs it silently starts one. Give"
                " --multi_gpu, or a config file with `distributed_type: MULTI_GPU` and `use_cpu: true`"
                " (configs/accelerate/cpu2.yaml)."
            )
        if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            raise Refusal(
                f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} tasks, and {alone}: each would do all of the work"
                " again. Let srun start one `accelerate launch` per node, as configs/slurm/pretrain.sbatch does."
            )
    if processes != WORLD_SIZE:
        raise Refusal(
            f"accelerate counts {processes} processes and the launcher's WORLD_SIZE is {WORLD_SIZE}: launch with"
            " accelerate launch or torchrun."
        )


def _check_sharding(sharding: str, shards: bool, optimizer: str, device, distributed_type) -> None:
    """Raise Refusal where this script, accelerate on this device, or the optimizer does not support `sharding`."""
    if not shards:
        raise Refusal(
            f"{sharding} shards the model, which run_sft.py does not support: under FSDP2 the run would never end."
            " Launch with configs/accelerate/ddp.yaml, where every process holds the whole model, of which LoRA trains"
            " a small part."
        )
    if str(distributed_type).rpartition(".")[2] in ("NO", "MULTI_CPU"):
        name = {"fsdp2": "FSDP", "zero2": "DeepSpeed"}[sharding]
        raise Refusal(
            f"{name} was requested, but accelerate ignores it on a {device.type}: every process would hold the whole"
            " model. Use cpu2.yaml or ddp.yaml."
        )
    if sharding == "fsdp2":
        _check_fsdp()
    if optimizer not in SHARDED_OPTIMIZERS:
        raise Refusal(
            f"--optim {optimizer} under {sharding}: gathering its state has not been tested. Use"
            f" {' or '.join(SHARDED_OPTIMIZERS)}, or launch with ddp.yaml."
        )


def _check_fsdp() -> None:
    """Raise Refusal for FSDP of another version than 2, and where it would not save whole weights."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise Refusal(
            "FSDP version 1 was requested: its checkpoints have not been tested. Set `fsdp_version: 2`, as in"
            " configs/accelerate/fsdp2.yaml."
        )
    if os.environ.get("FSDP_STATE_DICT_TYPE", "") != "FULL_STATE_DICT":
        raise Refusal(
            f"fsdp_state_dict_type {os.environ.get('FSDP_STATE_DICT_TYPE') or 'is not set, and'} saves no model that"
            " can be loaded without this layout. Set `fsdp_state_dict_type: FULL_STATE_DICT`, as in"
            " configs/accelerate/fsdp2.yaml: weights and optimizer are gathered at each save."
        )
    if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        _check_hybrid()


def _check_hybrid() -> None:
    """Raise Refusal for a parallelism config other than replicas x shards that make all processes."""
    sizes = {
        name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", 1))
        for name in ("dp_replicate", "dp_shard", "tp", "cp", "sp")
    }
    if other := [name for name in ("tp", "cp", "sp") if sizes[name] > 1]:
        raise Refusal(
            f"parallelism_config_{other[0]}_size {sizes[other[0]]}: the processes of a run each compute whole windows"
            " with whole layers. Set it to 1, as in configs/accelerate/hsdp.yaml."
        )
    replicas, shards = sizes["dp_replicate"], sizes["dp_shard"]
    if replicas * shards != WORLD_SIZE or shards < 2:
        raise Refusal(
            f"parallelism_config: {replicas} replicas (dp_replicate_size) of {shards} shards (dp_shard_size) are not"
            f" the {WORLD_SIZE} processes of this launch. Give the machines as --parallelism_config_dp_replicate_size"
            " and the GPUs of each as --parallelism_config_dp_shard_size."
        )


def _is_set(name: str) -> bool:
    """Whether an environment variable is `true`."""
    return os.environ.get(name, "false").lower() == "true"
