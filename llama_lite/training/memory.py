"""Memory of a training step on a device, before anything is allocated: the step is run on fake tensors.

torch's fake tensors have shapes and no storage. Its MemTracker records what a real step would allocate, from the state
of the optimizer to the last temporary tensor. Sharded parts are divided by the number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..distributed import LOCAL_WORLD_SIZE, print_main, run_on_main
from ..errors import Refusal
from ..formatting import dollars, duration, size
from ..machine.host_memory import SNAPSHOT_FRACTION, available_memory
from ..machine.parallelism import Layout, layout, set_resharding
from .plan import Plan, at_once

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, TrainingArguments

    from ..config.pretrain import RunArguments

# fraction of a device's memory that is usable: the rest is context, libraries and fragmentation
USABLE_FRACTION = {"cuda": 0.92, "cpu": 0.8}
ONE_PROCESS = Layout()
# of a model whose step depends on the values of tensors
UNKNOWN_MEMORY = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError)
GPU_LINES_FLOPS = 1e16  # FLOP of a run from which its days on GPUs are shown: 25 s on an H100, a day on two cores

# makers' GB; peak FLOP/s are in TRL's table
GPUS = {"L4": 24, "L40S": 48, "A100 80GB": 80, "H100": 80, "H200": 141, "B200": 180}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device at the peak of a step. `gathered`: weights that FSDP gathers for the layers in use, or for all
    where it keeps them. `accumulated`: gradients of earlier micro-batches, which FSDP2 and DDP hold beside.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int = 0
    accumulated: int = 0

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered + self.accumulated


def step_memory(
    config: PreTrainedConfig,
    micro_batch: int,
    block_size: int,
    precision: str,
    layout: Layout = ONE_PROCESS,
    fused: bool = False,
    checkpointing: bool = False,
    accumulates: bool = False,
) -> Memory:
    """The peak of a training step with `micro_batch` windows of `block_size` tokens, layers not compiled. accumulates:
    whether a step has several micro-batches.

    For one process and DDP, MemTracker gives it (tests compare it with measured peaks). For FSDP2 and ZeRO-2 it gives
    the activations; the rest is computed: float32 weights, gradients and two moments divided by the processes, and in
    bfloat16 the weights of the embedding, the output layer and two layers (FSDP2), or all of them (ZeRO-2, and FSDP2
    without resharding).
    """
    import torch

    compute = getattr(torch, precision).itemsize
    # the weights are cast once; autocast, which keeps copies, is off
    casts = layout.sharding in ("fsdp2", "zero2") and precision != "float32"
    few, more = 1, min(2, config.num_hidden_layers)
    peak, elements, embeddings = _fake_step(
        config, few, micro_batch, block_size, precision, casts, fused, checkpointing
    )
    layer = 0
    if config.num_hidden_layers > few:  # layers are equal: each adds what the second one adds
        peak_more, elements_more, _ = _fake_step(
            config, more, micro_batch, block_size, precision, casts, fused, checkpointing
        )
        layer = (elements_more - elements) // (more - few)
        peak += (peak_more - peak) * (config.num_hidden_layers - few) // (more - few)
        elements += layer * (config.num_hidden_layers - few)
    activations = max(0, peak - 4 * (compute if casts else 4) * elements)
    # until the last micro-batch DDP's are not yet in its buckets, and FSDP2's are neither reduced nor sharded
    accumulated = 4 * elements if accumulates and layout.sharding in ("ddp", "fsdp2") else 0
    if layout.sharding in ("none", "ddp"):
        return Memory(4 * elements, 4 * elements, 8 * elements, activations, 0, accumulated)
    shard = -(-elements // layout.shards)
    if layout.sharding == "zero2":
        return Memory(elements * compute, 4 * shard, 12 * shard, activations)
    gathered = (embeddings + 2 * layer if layout.reshard else elements) * compute
    return Memory(4 * shard, 4 * shard, 8 * shard, activations, gathered, accumulated)


@functools.lru_cache(maxsize=64)
def _fake(
    config_json: str,
    layers: int,
    micro_batch: int,
    block_size: int,
    precision: str,
    casts: bool,
    fused: bool,
    checkpointing: bool,
) -> tuple[int, int, int]:
    """As `_fake_step`, cached. layers: number of layers of the model; the config as JSON, which is hashable."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..kernels import fused_cross_entropy

    fields = json.loads(config_json)
    fields = {
        name: value[:layers] if isinstance(value, list) and len(value) == fields.get("num_hidden_layers") else value
        for name, value in fields.items()
    }
    config = AutoConfig.for_model(**{**fields, "num_hidden_layers": layers, "use_cache": False})
    compute = getattr(torch, precision)
    with FakeTensorMode(), contextlib.ExitStack() as stack:
        stack.callback(setattr, fused_cross_entropy, "MAX_CHUNKS", fused_cross_entropy.MAX_CHUNKS)
        fused_cross_entropy.MAX_CHUNKS = 3
        model = AutoModelForCausalLM.from_config(
            config, dtype=compute if casts else torch.float32, trust_remote_code=False
        )
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        if fused:
            fused_cross_entropy.apply_fused_cross_entropy(model)
        ids = torch.zeros(micro_batch, block_size, dtype=torch.long)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        tracker = MemTracker()
        tracker.track_external(model, optimizer, ids)
        with tracker:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            # at the peak, the moments exist, and so do the gradients of an earlier micro-batch
            optimizer.step()
            with torch.autocast("cpu", compute) if precision != "float32" and not casts else contextlib.nullcontext():
                loss = model(input_ids=ids, labels=ids, shift_labels=ids).loss
            loss.backward()
        peak = sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())
        embeddings = model.get_input_embeddings().weight.numel() + model.get_output_embeddings().weight.numel()
        return peak, sum(p.numel() for p in model.parameters()), embeddings


def _fake_step(config: PreTrainedConfig, *shape) -> tuple[int, int, int]:
    """(peak bytes, parameters, parameters of the embeddings) of the last micro-batch of the second step, on fake
    tensors. shape: the further arguments of `_fake`.
    """
    return _fake(json.dumps(config.to_dict(), default=str), *shape)


def capacity(device: torch.device) -> int:
    """Usable bytes of a process: of its GPU, or its part of the machine's memory."""
    import torch

    if device.type == "cuda":
        return int(USABLE_FRACTION["cuda"] * torch.cuda.get_device_properties(device).total_memory)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(USABLE_FRACTION["cpu"] * memory / LOCAL_WORLD_SIZE)


def forecast(
    config: PreTrainedConfig,
    plan: Plan,
    layout: Layout,
    precision: str,
    fused: bool,
    training: TrainingArguments,
    run: RunArguments,
) -> tuple[list[str], list[str]]:
    """(lines with memory and days of a plan, problems: what does not fit, and what would). fused: whether the loss is
    fused.
    """
    device = training.device
    try:
        memory = _planned_memory(config, plan, layout, precision, fused, training, run)
    except UNKNOWN_MEMORY as error:
        reason = " ".join(str(error).split())[:120]
        line = f"memory per device   not known for this kind of model ({config.model_type}): {reason}"
        return [line], _disk_problems(plan, training)
    if run.plan_launch:
        available, where = int(USABLE_FRACTION["cuda"] * 80e9), "a GPU of 80 GB"
    else:
        available, where = capacity(device), "this GPU" if device.type == "cuda" else "this machine's memory"
    lines = [_memory_line(memory, layout), _save_line(plan, run, 0 if device.type == "cuda" else memory.total)]
    if layout.sharding == "fsdp2":
        lines.append(f"resharding          {_reshard_advice(memory, layout, plan, precision, available)}")
    flops = plan.flops_per_token * plan.tokens
    if run.plan_launch or device.type == "cuda" or flops > GPU_LINES_FLOPS or run.plan_price is not None:
        # a GPU computes in bfloat16, whatever is faster on this machine, unless a person chose
        on_gpu = precision if "precision" in run.explicit_args or device.type == "cuda" else "bfloat16"
        lines += gpu_lines(memory, flops, on_gpu, layout.processes, run.plan_mfu, run.plan_price)
    problems = []
    if memory.total > available:
        fix = what_would_fit(config, plan, run.block_size, precision, layout, fused, available)
        problems.append(_too_much(memory, where, available, fix))
    return lines, problems + _disk_problems(plan, training)


def _too_much(memory: Memory, where: str, available: int, fix: str) -> str:
    return f"a step takes {size(memory.total)} and {where} gives a process {size(available)}: {fix}."


def check_memory(config: PreTrainedConfig, plan: Plan, layout: Layout, training: TrainingArguments, run) -> None:
    """Print a WARNING for a run whose steps need more memory than its device gives a process. Raise Refusal for one on
    a CPU that needs more than the machine has: Linux would kill it, and maybe other processes, without a word. run: the
    arguments of the script's own; with strict_plan, the plan itself is refused later.
    """
    if run.strict_plan:
        return
    with contextlib.suppress(*UNKNOWN_MEMORY):
        memory, available = (
            _planned_memory(config, plan, layout, run.precision, run.fused_loss, training, run),
            capacity(training.device),
        )
        if memory.total <= available:
            return
        fix = what_would_fit(config, plan, run.block_size, run.precision, layout, run.fused_loss, available)
        kind = training.device.type
        problem = _too_much(memory, "this machine's memory" if kind == "cpu" else "this GPU", available, fix)
        if kind == "cpu" and memory.total > available / USABLE_FRACTION["cpu"]:
            raise Refusal(f"the run does not fit into this machine: {problem} Or give a smaller --model_config.")
        print_main(f"WARNING   {problem}")


def _planned_memory(config, plan: Plan, layout: Layout, precision: str, fused: bool, training, run) -> Memory:
    """As `step_memory`, of a plan. Raises UNKNOWN_MEMORY."""
    checkpointing, accumulates = training.activation_checkpointing, plan.accumulation > 1
    return step_memory(config, plan.micro_batch, run.block_size, precision, layout, fused, checkpointing, accumulates)


def settle_resharding(
    config: PreTrainedConfig, plan: Plan, training: TrainingArguments, run: RunArguments
) -> str | None:
    """Where the launcher's config leaves fsdp_reshard_after_forward to the plan (`auto`): set it for Accelerator, on
    every rank, and return a line that says why; else None.
    """
    if not layout().auto_reshard:
        return None
    reshard, why = run_on_main(_choose_resharding, config, plan, training, run)
    set_resharding(reshard)
    return f"fsdp_reshard_after_forward {str(reshard).lower()}: {why}"


def _choose_resharding(config, plan: Plan, training: TrainingArguments, run: RunArguments) -> tuple[bool, str]:
    """(whether FSDP2 frees gathered weights after the forward pass, the reason) (rank 0)."""
    try:
        memory = _planned_memory(config, plan, layout(), run.precision, run.fused_loss, training, run)
    except UNKNOWN_MEMORY:
        return True, "the memory of a step is not known for this kind of model"
    total, available = _kept_total(memory, plan, run.precision), capacity(training.device)
    if total <= available:
        return False, f"faster, and fits: {size(total)} per device"
    return True, f"all weights at once take {size(total)} per device, and {size(available)} are there"


def _memory_line(memory: Memory, layout: Layout) -> str:
    """Memory of a step in total and by part."""
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
    }
    parts |= {"gathered weights": memory.gathered} if memory.gathered else {}
    parts |= {"accumulated gradients": memory.accumulated} if memory.accumulated else {}
    return (
        f"memory per device   {size(memory.total)} ({layout}):"
        f" {', '.join(f'{name} {size(value)}' for name, value in parts.items())}"
    )


def _save_line(plan: Plan, run: RunArguments, besides: int) -> str:
    """Whether training goes on while a checkpoint is written, from a copy of the float32 weights and two moments in the
    memory of rank 0's machine, or of a part in each process's. besides: bytes of that memory that a step takes.
    """
    copied, available = 12 * plan.parameters, available_memory() - besides
    if run.shard_checkpoints:
        copied, available = -(-copied // plan.processes), available // LOCAL_WORLD_SIZE
    if not run.async_save:
        return "saves               training waits for each (--no_async_save)"
    if not run.plan_launch and copied > SNAPSHOT_FRACTION * available:
        free = f"and {size(available)} would be available" if available > 0 else "of which a step leaves nothing"
        return (
            f"saves               training waits for each: the copy that one is written from takes {size(copied)} of"
            f" memory, {free}"
        )
    where = "the memory of each process" if run.shard_checkpoints else "this machine's memory"
    return f"saves               written while training goes on, from a copy of {size(copied)} in {where}"


def _weight_bytes(plan: Plan, precision: str) -> int:
    """Bytes of all weights, as they are computed with."""
    import torch

    return plan.parameters * getattr(torch, precision).itemsize


def _kept_total(memory: Memory, plan: Plan, precision: str) -> int:
    """Bytes per device where FSDP2 keeps all gathered weights through a step."""
    return memory.total - memory.gathered + _weight_bytes(plan, precision)


def _reshard_advice(memory: Memory, layout: Layout, plan: Plan, precision: str, available: int) -> str:
    """What fsdp_reshard_after_forward should be: false, which gathers each weight once a micro-batch, where all of them
    fit into `available` bytes.
    """
    total, kept = _kept_total(memory, plan, precision), _weight_bytes(plan, precision)
    if layout.auto_reshard:
        chosen = "false, which is faster, and fits" if total <= available else "true: false does not fit"
        return f"fsdp_reshard_after_forward: auto gives {chosen} ({size(total)} per device with false)"
    if layout.reshard and total <= available:
        return f"fsdp_reshard_after_forward: false is faster, and fits: {size(total)} per device"
    if not layout.reshard and total > available:
        return f"fsdp_reshard_after_forward: true saves up to {size(kept)} per device, which does not fit here"
    return f"fsdp_reshard_after_forward: {str(layout.reshard).lower()}, as it is ({size(total)} per device with false)"


def _disk_problems(plan: Plan, training: TrainingArguments) -> list[str]:
    """What does not fit on the disk of the run's folder, in one sentence; nothing where everything fits."""
    needed, free = plan.checkpoint_bytes * at_once(plan) + 2 * plan.model_bytes, _free(Path(training.output_dir))
    if needed > free:
        limit = (free - 2 * plan.model_bytes) // plan.checkpoint_bytes - 1
        fix = f"it would with --save_total_limit {limit}" if limit > 0 else "give an --output_dir on a larger disk"
        return [
            f"the run takes up to {size(needed)} of disk and {size(free)} are free at {training.output_dir}: {fix}."
        ]
    return []


def _free(folder: Path) -> int:
    """Bytes that a run folder can grow to: those that are free, and those that it has."""
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    while not folder.exists():
        folder = folder.parent
    return used + shutil.disk_usage(folder).free


def what_would_fit(
    config: PreTrainedConfig,
    plan: Plan,
    block_size: int,
    precision: str,
    layout: Layout,
    fused: bool,
    available: int,
) -> str:
    """Changes, each of which makes the step fit into `available` bytes, as one sentence."""
    micro_batch = plan.micro_batch

    def memory_of(micro: int, checkpointing: bool = False, layout: Layout = layout) -> Memory:
        accumulates = plan.accumulation > 1 or micro < micro_batch
        return step_memory(config, micro, block_size, precision, layout, fused, checkpointing, accumulates)

    def needs(micro: int, checkpointing: bool = False, layout: Layout = layout) -> int:
        return memory_of(micro, checkpointing, layout).total

    memory = memory_of(micro_batch)
    state = memory.total - memory.activations  # does not depend on the micro-batch
    changes = []
    smaller = micro_batch // 2 if state < available else 0
    while smaller and needs(smaller) > available:
        smaller //= 2
    if smaller:
        changes.append(f"--per_device_train_batch_size {smaller}")
    if state < available and needs(micro_batch, checkpointing=True) <= available:
        changes.append("--activation_checkpointing")
    elif state < available and needs(1, checkpointing=True) <= available:
        changes.append("--activation_checkpointing with --per_device_train_batch_size 1")
    for processes in (2, 4, 8, 16, 32, 64):
        if processes > layout.processes and needs(micro_batch, layout=Layout(processes, "fsdp2")) <= available:
            changes.append(f"FSDP2 over {processes} such devices (configs/accelerate/fsdp2.yaml)")
            break
    return (
        f"it would with {', or '.join(changes)}"
        if changes
        else "nothing that this project offers would make it fit: choose a smaller --model_config"
    )


def gpu_lines(
    memory: Memory, flops: float, precision: str, processes: int, mfu: float, price: float | None = None
) -> list[str]:
    """Lines with the days of a run of `flops` FLOP at `mfu` % MFU on one GPU of several kinds and on `processes` of
    them, what they cost at `price` dollars per GPU and hour, and whether a step fits there.
    """
    from trl.trainer.utils import get_peak_flops

    lines = []
    for name, gigabytes in GPUS.items():
        peak = get_peak_flops(name, precision)
        if peak:
            days = flops / (peak * mfu / 100) / 86_400
            fits = (
                ""
                if memory.total <= USABLE_FRACTION["cuda"] * gigabytes * 1e9
                else f", but a step does not fit in {gigabytes} GB"
            )
            several = f", {duration(days / processes)} on {processes}" if processes > 1 else ""
            cost = "" if price is None else f", {dollars(days * 24 * price)} at {dollars(price)} per GPU and hour"
            lines.append(f"{name}: {duration(days)}{several}{cost}{fits}")
    if not lines:
        return []
    return [f"time at {mfu:g} % MFU    {lines[0]}", *(f"                    {line}" for line in lines[1:])]
