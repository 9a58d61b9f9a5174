"""What a training step takes of a device's memory, before anything is allocated: the step itself, run on tensors
without content.

torch's fake tensors have shapes and no storage, and its MemTracker follows what a real step would hold, from the
optimiser's state to the last temporary. Sharding divides the part of it that a layout divides.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path

from ..formatting import duration, size
from ..machine.parallelism import Layout
from .plan import at_once

FREE_SHARE = {
    "cuda": 0.92,
    "cpu": 0.8,
}  # of a device's memory that one can count on: the rest is context, libraries and the allocator's fragments

ONE = Layout()

WORTH_A_GPU = 1e16  # FLOP of a run from which on its days on GPUs are told: 25 s on an H100, a day on two cores

GPUS = {
    "L4": 24,
    "L40S": 48,
    "A100 80GB": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
}  # makers' GB; peak FLOP/s are in TRL's table


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device at the peak of a step; `gathered`: weights that FSDP brings together for the layers at
    work.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered


def step_memory(
    config,
    micro_batch: int,
    block_size: int,
    precision: str,
    layout: Layout = ONE,
    fused: bool = False,
    checkpointing: bool = False,
) -> Memory:
    """The peak of a training step of a `LlamaConfig` with `micro_batch` windows of `block_size` tokens, layers not
    compiled.

    One process and DDP are what MemTracker finds (tests hold it against measured peaks). Under FSDP2 and ZeRO-2 the
    activations are, and the rest is arithmetic: float32 weights, gradients and two moments divided by the processes,
    and in bfloat16 the weights of the embedding, the output layer and two layers (FSDP2), or all of them (ZeRO-2).
    """
    import torch

    compute = getattr(torch, precision).itemsize
    casts = (
        layout.sharding in ("fsdp2", "zero2") and precision != "float32"
    )  # the weights are cast once; autocast, which keeps copies, is off
    few, more = 1, min(2, config.num_hidden_layers)
    peak, elements, ends = _fake_step(config, few, micro_batch, block_size, precision, casts, fused, checkpointing)
    layer = 0
    if config.num_hidden_layers > few:  # layers are alike: what one more adds, every one adds
        other, elements_more, _ = _fake_step(
            config, more, micro_batch, block_size, precision, casts, fused, checkpointing
        )
        layer = (elements_more - elements) // (more - few)
        peak += (other - peak) * (config.num_hidden_layers - few) // (more - few)
        elements += layer * (config.num_hidden_layers - few)
    activations = max(0, peak - 4 * (compute if casts else 4) * elements)
    if layout.sharding in ("none", "ddp"):
        return Memory(4 * elements, (8 if layout.sharding == "ddp" else 4) * elements, 8 * elements, activations)
    share = -(-elements // layout.processes)
    if layout.sharding == "zero2":
        return Memory(elements * compute, 4 * share, 12 * share, activations)
    return Memory(4 * share, 4 * share, 8 * share, activations, (ends + 2 * layer) * compute)


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
) -> tuple:
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
    with FakeTensorMode(), contextlib.ExitStack() as ends_with:
        ends_with.callback(setattr, fused_cross_entropy, "MAX_CHUNKS", fused_cross_entropy.MAX_CHUNKS)
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
            # the moments are there from the first step on, and in the last micro-batch the gradients of an earlier one
            optimizer.step()
            with torch.autocast("cpu", compute) if precision != "float32" and not casts else contextlib.nullcontext():
                loss = model(input_ids=ids, labels=ids, shift_labels=ids).loss
            loss.backward()
        peak = sum(found["Total"] for found in tracker.get_tracker_snapshot("peak").values())
        ends = model.get_input_embeddings().weight.numel() + model.get_output_embeddings().weight.numel()
        return peak, sum(p.numel() for p in model.parameters()), ends


def _fake_step(config, *shape) -> tuple[int, int, int]:
    """(peak bytes, parameters, those of the embeddings) of the last micro-batch of a step, on fake tensors, after a
    first step.
    """
    return _fake(json.dumps(config.to_dict(), default=str), *shape)


def capacity(device) -> int:
    """Bytes that a process can count on: of its GPU, or its part of this machine's memory."""
    import torch

    if device.type == "cuda":
        return int(FREE_SHARE["cuda"] * torch.cuda.get_device_properties(device).total_memory)
    return int(
        FREE_SHARE["cpu"]
        * os.sysconf("SC_PHYS_PAGES")
        * os.sysconf("SC_PAGE_SIZE")
        / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    )


def forecast(config, plan, layout: Layout, precision: str, fused: bool, training, run) -> tuple[list[str], list[str]]:
    """(memory, disk and days of a `plan` as a person reads them, what does not fit and what would). `training`, `run`:
    the arguments.
    """
    device, kind = training.device, {"none": "one process", "ddp": f"{layout.processes} processes, DDP"}
    kind |= {"fsdp2": f"FSDP2 over {layout.processes}", "zero2": f"ZeRO-2 over {layout.processes}"}
    try:
        memory = step_memory(
            config, plan.micro_batch, run.block_size, precision, layout, fused, training.activation_checkpointing
        )
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        NotImplementedError,
    ) as error:  # a kind whose step cannot be followed without its numbers
        why = " ".join(str(error).split())[:120]
        return [f"memory a device     not known for this kind of model ({config.model_type}): {why}"], _too_large(
            plan, training
        )
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimiser": memory.optimizer,
        "activations": memory.activations,
    }
    parts |= {"gathered weights": memory.gathered} if memory.gathered else {}
    if run.plan_launch:
        room, where = int(FREE_SHARE["cuda"] * 80e9), "a GPU of 80 GB"
    else:
        room, where = capacity(device), "this GPU" if device.type == "cuda" else "this machine's memory"
    lines = [
        (
            f"memory a device     {size(memory.total)} ({kind[layout.sharding]}):"
            f" {', '.join(f'{name} {size(value)}' for name, value in parts.items())}"
        ),
    ]
    flops = plan.flops_per_token * plan.tokens
    if run.plan_launch or device.type == "cuda" or flops > WORTH_A_GPU:
        lines += gpu_lines(memory, flops, precision, layout.processes, run.plan_mfu)
    problems = []
    if memory.total > room:
        way = what_would_fit(config, plan.micro_batch, run.block_size, precision, layout, fused, room)
        problems.append(f"a step takes {size(memory.total)} and {where} gives a process {size(room)}: {way}.")
    return lines, problems + _too_large(plan, training)


def _too_large(plan, training) -> list[str]:
    """What does not fit on the disk of the run's folder, in one sentence; nothing where all of it does."""
    needed, free = plan.checkpoint_bytes * at_once(plan) + 2 * plan.model_bytes, _free(Path(training.output_dir))
    if needed > free:
        fitting = (free - 2 * plan.model_bytes) // plan.checkpoint_bytes - 1
        way = f"it would with --save_total_limit {fitting}" if fitting > 0 else "give an --output_dir on a larger disk"
        return [
            f"the run takes up to {size(needed)} of disk and {size(free)} are free at {training.output_dir}: {way}."
        ]
    return []


def _free(folder: Path) -> int:
    """Bytes that a run folder can grow to: free ones, and those it has already."""
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    while not folder.exists():
        folder = folder.parent
    return held + shutil.disk_usage(folder).free


def what_would_fit(
    config, micro_batch: int, block_size: int, precision: str, layout: Layout, fused: bool, room: int
) -> str:
    """Changes, each of which brings the step into `room` bytes; one sentence."""

    def needs(micro: int, checkpointing: bool = False, layout: Layout = layout) -> int:
        return step_memory(config, micro, block_size, precision, layout, fused, checkpointing).total

    memory = step_memory(config, micro_batch, block_size, precision, layout, fused)
    state = memory.total - memory.activations  # stays, however few activations there are
    ways = []
    smaller = micro_batch // 2 if state < room else 0
    while smaller and needs(smaller) > room:
        smaller //= 2
    if smaller:
        ways.append(f"--per_device_train_batch_size {smaller}")
    if state < room and needs(micro_batch, checkpointing=True) <= room:
        ways.append("--activation_checkpointing")
    elif state < room and needs(1, checkpointing=True) <= room:
        ways.append("--activation_checkpointing with --per_device_train_batch_size 1")
    for processes in (2, 4, 8, 16, 32, 64):
        if processes > layout.processes and needs(micro_batch, layout=Layout(processes, "fsdp2")) <= room:
            ways.append(f"FSDP2 over {processes} such devices (configs/accelerate/fsdp2.yaml)")
            break
    return (
        f"it would with {', or '.join(ways)}"
        if ways
        else "nothing that this project offers would make it fit: choose a smaller --model_config"
    )


def gpu_lines(memory: Memory, flops: float, precision: str, processes: int, mfu: float) -> list[str]:
    """Days of a run of `flops` FLOP at `mfu` % on one device of several kinds, and on `processes` of them; whether a
    step fits there.
    """
    from trl.trainer.utils import get_peak_flops

    lines = []
    for name, gigabytes in GPUS.items():
        peak = get_peak_flops(name, precision)
        if peak:
            days = flops / (peak * mfu / 100) / 86_400
            fits = (
                ""
                if memory.total <= FREE_SHARE["cuda"] * gigabytes * 1e9
                else f", but a step does not fit in {gigabytes} GB"
            )
            lines.append(
                f"{name}:"
                f" {duration(days)}{f', {duration(days / processes)} on {processes}' if processes > 1 else ''}{fits}"
            )
    if not lines:
        return []
    return [f"time at {mfu:g} % MFU    {lines[0]}", *(f"                    {line}" for line in lines[1:])]
