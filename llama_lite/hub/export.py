"""A checkpoint as a model or an adapter that stock transformers and PEFT load."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig

from ..checkpoint import verify
from ..data.tokenizer import read_tokenizer, vocabulary_size
from ..files import flush_folder, sha256

ADAPTER = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "base.json",
)  # of a checkpoint, as they are in its revision


# ---- what a revision holds ----


def export_model(checkpoint: Path, folder: Path, dtype: str) -> None:
    """Write the model of a checkpoint in `dtype`, its vocabulary cut to the tokenizer's (rows beyond it were padding).

    Works on files alone, so that training goes on meanwhile. Same checkpoint, same bytes.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    tokenizer = read_tokenizer(checkpoint)
    rows, end = vocabulary_size(tokenizer), tokenizer.eos_token_id
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    tensors = {}
    for path in sorted(checkpoint.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                tensor = file.get_tensor(name)
                tensors[name] = _cast(tensor[:rows] if name in verify.VOCABULARY else tensor, getattr(torch, dtype))
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    config.use_cache, config.dtype = True, getattr(torch, dtype)
    config.bos_token_id, config.eos_token_id = begin, end
    if any(name in tensors for name in verify.VOCABULARY):
        config.vocab_size = rows
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=begin, eos_token_id=end, pad_token_id=padding).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    flush_folder(folder)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)` in parts too small for torch to share out between threads.

    This thread works beside the training. Were it to open an OpenMP team of its own, there would be more threads than
    cores, and libgomp would let the training's threads sleep between any two operations from then on.
    """
    result = torch.empty(tensor.shape, dtype=dtype)
    for source, target in zip(tensor.reshape(-1).split(2**14), result.view(-1).split(2**14), strict=True):
        target.copy_(source)
    return result


def export_adapter(checkpoint: Path, folder: Path) -> None:
    """Write the adapter of a checkpoint: its weights (float32), config, base record and tokenizer. Same checkpoint,
    same bytes.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ADAPTER:
        shutil.copyfile(checkpoint / name, folder / name)
    read_tokenizer(checkpoint).save_pretrained(folder)
    flush_folder(folder)


def is_export(checkpoint: Path, folder: Path) -> bool:
    """Whether the weights of a whole model or adapter in `folder` are what `export_model` or `export_adapter` makes of
    a verified checkpoint.

    Of an adapter and its records by the manifest's sha256, of a model tensor by tensor, in the dtype and with the
    vocabulary that it has there.
    """
    files = verify.read_manifest(checkpoint)["files"]
    if "adapter_model.safetensors" in files:
        return all((folder / name).is_file() and sha256(folder / name) == files[name]["sha256"] for name in ADAPTER)
    if not (folder / "model.safetensors").is_file():
        return False
    with safe_open(folder / "model.safetensors", "pt") as model:
        left = set(model.keys())
        for path in sorted(checkpoint.glob("model*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                    if name not in left:
                        return False
                    left.remove(name)
                    there, tensor = model.get_tensor(name), file.get_tensor(name)
                    tensor = tensor[: len(there)] if name in verify.VOCABULARY else tensor
                    if not torch.equal(_cast(tensor, there.dtype), there):
                        return False
    return not left
