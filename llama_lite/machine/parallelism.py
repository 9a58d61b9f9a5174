"""How this process was launched, and whether what was asked for is what runs.

Launchers and accelerate pass over some requests in silence: a second CPU process, sharding on a CPU. A run that
believes it is something else wastes days, so that is refused before anything is touched.
"""

import dataclasses
import os

import yaml

from ..distributed import WORLD_SIZE
from ..errors import Refusal
from ..files import read_yaml

SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


SHARDINGS = ("none", "ddp", "fsdp2", "zero2")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Over how many processes a run goes, and what of it each of them holds: all (none, ddp), or a share (fsdp2,
    zero2).
    """

    processes: int = 1
    sharding: str = "none"


def layout() -> Layout:
    """The layout of this process, from what its launcher set."""
    if _asked("ACCELERATE_USE_FSDP"):
        return Layout(WORLD_SIZE, "fsdp2")
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        return Layout(WORLD_SIZE, "zero2")
    return Layout(WORLD_SIZE, "ddp" if WORLD_SIZE > 1 else "none")


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
        return Layout(processes, "fsdp2")
    return Layout(processes, "zero2" if kind == "DEEPSPEED" else "ddp" if processes > 1 else "none")


def use_one_gpu(training, script: str) -> str | None:
    """Let a process that sees several GPUs train on the first: Trainer would copy the model to all of them
    (DataParallel), in a step that many times larger.

    Returns what a person is to be told before training, or None where there is nothing to tell. training:
    TrainingArguments.
    """
    seen = training.n_gpu
    if seen <= 1:
        return None
    training._n_gpu = 1
    launch = f"accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes {seen} {script}"
    return f"{training.device}, one of the {seen} GPUs that this process sees; all of them: {launch} ..."


def check_launch(training, shards: bool = True) -> None:
    """Raise Refusal where the launcher, accelerate or Slurm asked for one thing and another runs.

    training: TrainingArguments. shards: whether this script can run with a share of the model in each process.
    """
    from accelerate import PartialState

    device = training.device  # makes accelerate's state
    state = PartialState()
    alone = "this process is alone"
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() not in ("", "no"):
        raise Refusal(
            f"the launcher's dynamo_backend {dynamo} (ACCELERATE_DYNAMO_BACKEND) compiles the whole model beside what"
            " is recorded: take it out of the launcher's config; --compile_layers compiles what is worth it."
        )
    if WORLD_SIZE == 1 and state.num_processes == 1:
        if "MASTER_ADDR" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ and "RANK" not in os.environ:
            raise Refusal(
                f"accelerate launch was asked for several processes, and {alone}: on CPUs it starts one, in silence."
                " Give --multi_gpu, or a config file with `distributed_type: MULTI_GPU` and `use_cpu: true`"
                " (configs/accelerate/cpu2.yaml)."
            )
        if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            raise Refusal(
                f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} tasks, and {alone}: each would train a model of its"
                " own. Let srun start one `accelerate launch` a node, as configs/slurm/pretrain.sbatch does."
            )
    if state.num_processes != WORLD_SIZE:
        raise Refusal(
            f"accelerate counts {state.num_processes} processes and the launcher's WORLD_SIZE is {WORLD_SIZE}: launch"
            " with accelerate launch or torchrun."
        )
    wanted = layout().sharding
    if wanted in ("fsdp2", "zero2") and not shards:
        raise Refusal(
            f"{wanted} shards the model, which tuning does not: under FSDP2 it trains and never ends. Launch with"
            " configs/accelerate/ddp.yaml, where every process holds the whole model, of which LoRA trains a small"
            " part."
        )
    if wanted in ("fsdp2", "zero2") and str(state.distributed_type).rpartition(".")[2] in ("NO", "MULTI_CPU"):
        name = {"fsdp2": "FSDP", "zero2": "DeepSpeed"}[wanted]
        raise Refusal(
            f"{name} was asked for and accelerate ignores it on a {device.type}: every process would hold the whole"
            " model. Use cpu2.yaml or ddp.yaml."
        )
    if wanted == "fsdp2" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise Refusal(
            "FSDP of version 1 was asked for: its checkpoints are not tested here. Set `fsdp_version: 2`, as in"
            " configs/accelerate/fsdp2.yaml."
        )
    if wanted == "fsdp2" and os.environ.get("FSDP_STATE_DICT_TYPE", "") != "FULL_STATE_DICT":
        raise Refusal(
            f"fsdp_state_dict_type {os.environ.get('FSDP_STATE_DICT_TYPE') or 'is not set, and'} saves no model that"
            " can be loaded without this layout. Set `fsdp_state_dict_type: FULL_STATE_DICT`, as in"
            " configs/accelerate/fsdp2.yaml: weights and optimiser are gathered once a save."
        )
    if wanted in ("fsdp2", "zero2") and training.optim.value not in SHARDED_OPTIMIZERS:
        raise Refusal(
            f"--optim {training.optim.value} under {wanted}: its state is not known to be gathered. Use"
            f" {' or '.join(SHARDED_OPTIMIZERS)}, or launch with ddp.yaml."
        )
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if wanted == "zero2" and stage != "2":
        raise Refusal(
            f"DeepSpeed ZeRO stage {stage} was asked for; stage 2 is what is supported. To shard weights too:"
            " configs/accelerate/fsdp2.yaml."
        )


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
