"""Export of a checkpoint as a model or an adapter that unmodified transformers and PEFT load."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig

from ..checkpoint import verify
from ..data.tokenizer import read_tokenizer, vocabulary_size
from ..digests import is_as_recorded
from ..files import flush_folder

# files of a checkpoint that its revision holds unchanged
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "base.json")


# ---- what a revision holds ----


def export_model(checkpoint: Path, folder: Path, dtype: str) -> None:
    """Write the model of a checkpoint in `dtype` ("float32", "bfloat16" ...), its vocabulary cut to the tokenizer's
    (the rows beyond it were padding).

    Reads files only, so that training can continue meanwhile. The same checkpoint gives the same bytes.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    tokenizer = read_tokenizer(checkpoint)
    rows, eos_id = vocabulary_size(tokenizer), tokenizer.eos_token_id
    bos_id = eos_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    pad_id = eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tensors = {}
    for path in sorted(checkpoint.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                tensor = file.get_tensor(name)
                if name in verify.VOCABULARY:
                    rows = min(rows, len(tensor))  # special tokens of a tokenizer may have no row
                tensors[name] = _cast(tensor[:rows] if name in verify.VOCABULARY else tensor, getattr(torch, dtype))
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    config.use_cache, config.dtype = True, getattr(torch, dtype)
    config.bos_token_id, config.eos_token_id = bos_id, eos_id
    if any(name in tensors for name in verify.VOCABULARY):
        config.vocab_size = rows
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=bos_id, eos_token_id=eos_id, pad_token_id=pad_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    flush_folder(folder)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)` in chunks too small for torch to parallelize.

    The export runs in a thread beside the training. An OpenMP team of its own would make more threads than cores, and
    libgomp would then let the training's threads sleep between operations.
    """
    result = torch.empty(tensor.shape, dtype=dtype)
    for source, target in zip(tensor.reshape(-1).split(2**14), result.view(-1).split(2**14), strict=True):
        target.copy_(source)
    return result


def export_adapter(checkpoint: Path, folder: Path) -> None:
    """Write the adapter of a checkpoint: its weights (float32), config, base record and tokenizer. The same checkpoint
    gives the same bytes.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ADAPTER:
        shutil.copyfile(checkpoint / name, folder / name)
    read_tokenizer(checkpoint).save_pretrained(folder)
    flush_folder(folder)


def is_export(checkpoint: Path, folder: Path) -> bool:
    """Whether the weights in `folder` are what `export_model` or `export_adapter` makes of a verified checkpoint.

    An adapter and its records are compared by the manifest's digests, a model tensor by tensor, in the dtype and with
    the vocabulary of the exported one.
    """
    files = verify.read_manifest(checkpoint)["files"]
    if "adapter_model.safetensors" in files:
        return all(is_as_recorded(folder / name, files[name]) for name in ADAPTER)
    if not (folder / "model.safetensors").is_file():
        return False
    with safe_open(folder / "model.safetensors", "pt") as model:
        remaining = set(model.keys())
        for path in sorted(checkpoint.glob("model*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                    if name not in remaining:
                        return False
                    remaining.remove(name)
                    exported, tensor = model.get_tensor(name), file.get_tensor(name)
                    tensor = tensor[: len(exported)] if name in verify.VOCABULARY else tensor
                    if not torch.equal(_cast(tensor, exported.dtype), exported):
                        return False
    return not remaining
