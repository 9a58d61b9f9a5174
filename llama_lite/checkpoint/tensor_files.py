"""Safetensors files written from host memory without torch, so that a thread can write them while training goes on."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from ..digests import new_hash

CHUNK = 2**24  # bytes written, and hashed, at a time; the GIL is released meanwhile

# in the order in which safetensors sorts the tensors of a file; within a type they are sorted by name
DTYPES = (
    "U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 F8_E8M0 F8_E4M3 F8_E5M2 I8 U8 F6_E3M2 F6_E2M3 F4 BOOL".split()
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class HostTensor:
    """A tensor in host memory. dtype: one of DTYPES. data: its bytes in order, as a flat uint8 array."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


def write_tensor_file(path: Path, tensors: dict[str, HostTensor], metadata: dict[str, str]) -> str:
    """Write a safetensors file, the same bytes that `safetensors.torch.save_file` writes; returns its BLAKE3. Raises
    OSError.
    """
    names = sorted(tensors, key=lambda name: (DTYPES.index(tensors[name].dtype), name))
    header: dict = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for name in names:
        end = begin + tensors[name].data.nbytes
        header[name] = {
            "dtype": tensors[name].dtype,
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    state = new_hash("blake3")
    with open(path, "wb") as file:
        for part in (len(text).to_bytes(8, "little"), text, *(tensors[name].data for name in names)):
            view = memoryview(part)
            for first in range(0, len(view), CHUNK):
                write_chunk(file, view[first : first + CHUNK])
                state.update(view[first : first + CHUNK])
    return state.hexdigest()


def write_chunk(file, chunk: memoryview) -> None:
    """Write a part of a file. All of a snapshot is written through here."""
    file.write(chunk)
