"""Optimizer state (and float32 weights) by parameter name, in one form that every layout writes and reads.

One process, DDP and FSDP2 use torch's distributed state dicts. DeepSpeed ZeRO-2, which flattens and partitions the
parameters, uses DeepSpeed's accessors. Call every function on all ranks.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from .parts import rows_of
from .snapshot import Snapshot, live_storages
from .verify import OPTIMIZER_FILES

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, each of its parameter's shape


def is_zero(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is DeepSpeed's ZeRO."""
    return hasattr(optimizer, "single_partition_of_fp32_groups")


def save_optimizer(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    path: str,
    sharded: bool,
    writes: bool,
    snapshot: Snapshot | None = None,
) -> None:
    """Gather the optimizer state and, on ranks with `writes`, write it to one safetensors file: tensors
    `parameter|field`, parameter groups as JSON in the metadata. `sharded`: the state is distributed over the ranks.
    snapshot: what is to hold the file instead, to be written later.
    """
    live = None
    if is_zero(optimizer):
        tensors, groups = _gather_zero_state(model, optimizer, writes)
    else:
        state = get_optimizer_state_dict(
            model, optimizer, options=StateDictOptions(full_state_dict=sharded, cpu_offload=sharded)
        )
        tensors = {
            f"{name}|{key}": torch.as_tensor(value)
            for name, values in state.get("state", {}).items()
            for key, value in values.items()
        }
        groups, live = state.get("param_groups"), live_storages(_state_tensors(optimizer))
    metadata = {"param_groups": json.dumps(groups)}
    if writes and snapshot is not None:
        snapshot.add(Path(path), tensors.items(), metadata, live)
    elif writes:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """The tensors that an optimizer changes in each step, but for the parameters."""
    for values in optimizer.state.values():
        yield from (value for value in values.values() if torch.is_tensor(value))


def load_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load the optimizer state of a checkpoint's folder, whichever layout wrote it, in one file or in parts. Of a
    sharded parameter a rank reads its own rows.
    """
    parameters = {} if is_zero(optimizer) else get_model_state_dict(model)
    state: dict = {}
    for path in sorted(folder.glob(OPTIMIZER_FILES)):
        with safe_open(path, "pt") as file:
            groups = json.loads(file.metadata()["param_groups"])
            for key in file.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                name, _, field = key.rpartition("|")
                state.setdefault(name, {})[field] = rows_of(file, key, parameters.get(name))
    if is_zero(optimizer):
        _load_zero_state(model, optimizer, state)
    else:
        set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups})


def zero_weights(model: torch.nn.Module, writes: bool) -> dict[str, torch.Tensor]:
    """The float32 master weights of ZeRO by parameter name, gathered one by one; empty tensors on ranks without
    `writes`.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    gathered = ((name, safe_get_full_fp32_param(parameter)) for name, parameter in model.named_parameters())
    return {name: tensor.cpu() if writes else tensor.new_empty(0) for name, tensor in gathered}


def load_zero_weights(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Set ZeRO's float32 master weights to `tensors` (by parameter name), not the model's own."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in model.named_parameters():
        safe_set_full_fp32_param(parameter, tensors[name].float().to(parameter.device))


def _gather_zero_state(model, optimizer, writes: bool) -> tuple[dict, list[dict]]:
    """(tensors `parameter|field` on the CPU, parameter groups) of ZeRO's optimizer; moments only where `writes`."""
    from deepspeed.utils import safe_get_full_optimizer_state

    _link_moments(optimizer)
    base_optimizer, names, tensors, groups = (
        optimizer.optimizer,
        {id(p): name for name, p in model.named_parameters()},
        {},
        [],
    )
    for group, parameters, flat in zip(
        base_optimizer.param_groups, optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True
    ):
        for parameter in parameters:
            for key in MOMENTS:
                moment = safe_get_full_optimizer_state(parameter, key)
                if writes:
                    tensors[f"{names[id(parameter)]}|{key}"] = moment.cpu()
            tensors[f"{names[id(parameter)]}|step"] = (
                torch.as_tensor(base_optimizer.state[flat]["step"]).float().cpu().clone()
            )
        settings = {key: value for key, value in group.items() if key != "params"}
        groups.append({"params": [names[id(p)] for p in parameters], **json.loads(json.dumps(settings, default=str))})
    return tensors, groups


def _load_zero_state(model, optimizer, state: dict) -> None:
    """Load {parameter name: {field: tensor}} into ZeRO's partitions."""
    from deepspeed.utils import safe_set_full_optimizer_state

    base_optimizer, names = optimizer.optimizer, {id(p): name for name, p in model.named_parameters()}
    for parameters, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        step = state[names[id(parameters[0])]]["step"]  # one group steps as one
        base_optimizer.state[flat] = {"step": step.clone(), **{key: torch.zeros_like(flat) for key in MOMENTS}}
    _link_moments(optimizer)
    for name, parameter in model.named_parameters():
        for key in MOMENTS:
            safe_set_full_optimizer_state(parameter, state[name][key].to(parameter.device), key)


def _link_moments(optimizer) -> None:
    """Make DeepSpeed's accessors find the moments of all groups. DeepSpeed itself links them after the first group's
    first step, when the other groups have none.
    """
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()
