"""A checkpoint of a sharded model (FSDP2) in parts: each process writes whole tensors of a share of the parameters.

The files are those of any model in several files (`model-00001-of-00008.safetensors`, an index) and the same for the
optimizer, so that every layout, and every library, reads them. Tensors are gathered on the devices one by one; only
the process that writes a tensor copies it to its memory.
"""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..distributed import RANK, WORLD_SIZE
from ..errors import Refusal
from ..files import read_json, write_json
from .snapshot import Snapshot, live_storages

DIGESTS = ".digests-{}.json"  # in the staging folder: what a rank has written, removed before the folder gets its name
PATIENCE = 120.0  # seconds that a run which ends at once waits for the parts of other ranks


def check_writable(model: torch.nn.Module, name: str) -> None:
    """Raise Refusal for a model whose files have other tensors than itself. name: what the user called it."""
    if get_model_conversion_mapping(model, add_legacy=False):
        raise Refusal(
            f"--shard_checkpoints: the files of {name} ({model.config.model_type}) hold its weights under other names,"
            " several tensors in one, so no process has a part of them alone. Leave it out: rank 0 writes them."
        )


def assign(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """{name: number of the part that holds it}, parts of about equal size: the largest first, each to the part that
    has least.
    """
    totals, found = [0] * count, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        found[name] = totals.index(min(totals))
        totals[found[name]] += sizes[name]
    return found


def largest_part(model: torch.nn.Module) -> int:
    """Bytes of the weights in the largest part. Call on all ranks."""
    weights, totals = _weights(model), [0] * WORLD_SIZE
    for name, part in _assign_parameters(weights).items():
        totals[part] += _size(weights[name])
    return max(totals)


def part_name(kind: str, part: int, count: int) -> str:
    """The name of a file of tensors. kind: model or optimizer."""
    return f"{kind}-{part + 1:05d}-of-{count:05d}.safetensors"


def add_weights(snapshot: Snapshot, folder: Path, model: torch.nn.Module) -> None:
    """Copy this rank's part of the weights into a snapshot, which writes it to `folder` later; rank 0 writes the index.
    Call on all ranks.
    """
    weights = _weights(model)
    part_of = _assign_parameters(weights)
    _add(snapshot, folder, "model", {name: (tensor, part_of[name]) for name, tensor in weights.items()}, format="pt")
    if RANK == 0:
        files = {name: part_name("model", part, WORLD_SIZE) for name, part in sorted(part_of.items())}
        total = sum(map(_size, weights.values()))
        write_json(folder / SAFE_WEIGHTS_INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": files})


def add_optimizer(snapshot: Snapshot, folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Copy the optimizer state of the weights in this rank's part into a snapshot, which writes it to `folder` later.
    Call on all ranks.
    """
    part_of, state = _assign_parameters(_weights(model)), get_optimizer_state_dict(model, optimizer)
    tensors = {
        f"{name}|{field}": (torch.as_tensor(value), part_of[name])
        for name, values in state["state"].items()
        for field, value in values.items()
    }
    _add(snapshot, folder, "optimizer", tensors, param_groups=json.dumps(state["param_groups"]))


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model's files by name, as they are distributed: of two tied ones, one."""
    tensors = get_model_state_dict(model)
    left_out = {*getattr(model, "all_tied_weights_keys", {}), *(model._keys_to_ignore_on_save or ())}
    return {name: tensor for name, tensor in tensors.items() if name not in left_out}


def _assign_parameters(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    return assign({name: _size(tensor) for name, tensor in weights.items()}, WORLD_SIZE)


def _size(tensor: torch.Tensor) -> int:
    """Bytes of a whole tensor."""
    return tensor.numel() * tensor.element_size()


def _add(snapshot: Snapshot, folder: Path, kind: str, tensors: dict[str, tuple[torch.Tensor, int]], **metadata) -> None:
    """Add the file of this rank's part to a snapshot. tensors: {name: (tensor, number of its part)}."""
    live, gathered = live_storages(tensor for tensor, _ in tensors.values()), _gathered(tensors)
    try:
        snapshot.add(folder / part_name(kind, RANK, WORLD_SIZE), gathered, metadata, live)
    finally:  # a rank that fails gathers what is left, with the others
        for _ in gathered:
            pass


def _gathered(tensors: dict[str, tuple[torch.Tensor, int]]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of those in this rank's part; all ranks gather all of them, in the same order."""
    for name, (tensor, part) in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if part == RANK:
            yield name, whole


# ---- the digests of what other ranks have written ----


def write_digests(folder: Path, digests: dict[Path, str]) -> None:
    """Tell rank 0 that the files of this rank's part are written, and their digests. Raises OSError."""
    names = {str(path.relative_to(folder)): digest for path, digest in digests.items()}
    write_json(folder / DIGESTS.format(RANK), names)


def take_digests(folder: Path) -> dict[Path, str]:
    """The digest of every file of all parts (rank 0). Waits for parts that are still being written. Raises TimeoutError
    where one does not come.
    """
    deadline, found = time.monotonic() + PATIENCE, {}
    for rank in range(WORLD_SIZE):
        path = folder / DIGESTS.format(rank)
        while not path.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {rank} has not written its part of {folder.name} after {PATIENCE:.0f} s")
            time.sleep(0.1)
        found |= {folder / name: digest for name, digest in read_json(path).items()}
        path.unlink()
    return found


# ---- reading what a rank needs ----


def rows_of(file, key: str, like: torch.Tensor | None) -> torch.Tensor:
    """A tensor of an open safetensors file, as a parameter `like` it is distributed: of that, only this rank's rows are
    read. None, or another shape: the whole tensor.
    """
    piece = file.get_slice(key)
    if not isinstance(like, DTensor) or list(like.shape) != piece.get_shape():
        return file.get_tensor(key)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    ranges = tuple(slice(first, first + length) for first, length in zip(offset, shape, strict=True))
    rows = piece[ranges] if 0 not in shape else torch.empty(shape, dtype=like.dtype)  # more ranks than rows
    return DTensor.from_local(
        rows.to(like.to_local().device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
