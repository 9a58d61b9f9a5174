"""Safetensors files written from host memory without torch, so that a thread can write them while training goes on.

Where the file system allows it they are written past its cache (O_DIRECT of open(2)): a checkpoint drives nothing out
of memory that training reads, and the thread takes less of the processor from it.
"""

import dataclasses
import errno
import fcntl
import itertools
import json
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..digests import new_hash

CHUNK = 2**22  # bytes hashed and written at a time; the GIL is released meanwhile

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
    return _write((len(text).to_bytes(8, "little"), text, *(tensors[name].data for name in names)), path)


def _write(parts: Iterable[bytes | np.ndarray], path: Path) -> str:
    """Write the bytes of `parts` one after the other; returns their BLAKE3. While a chunk is written, the next one is
    gathered and hashed.
    """
    state, written = new_hash("blake3"), None
    with open(path, "wb", buffering=0, opener=_open_direct) as file, ThreadPoolExecutor(1) as pool:
        for chunk in _chunks(parts):
            state.update(chunk)
            if written:
                written.result()
            written = pool.submit(write_chunk, file, chunk)
        written.result()
    return state.hexdigest()


def _chunks(parts: Iterable[bytes | np.ndarray]) -> Iterator[memoryview]:
    """The bytes of `parts` in chunks, the last of which is shorter. They lie in two buffers in turn, each of which
    begins at a page, as what is written past the cache must.
    """
    buffers = itertools.cycle([np.frombuffer(mmap.mmap(-1, CHUNK), np.uint8) for _ in range(2)])
    buffer, filled = next(buffers), 0
    for part in parts:
        data = np.asarray(memoryview(part))
        while len(data):
            taken = data[: CHUNK - filled]
            buffer[filled : filled + len(taken)] = taken
            filled, data = filled + len(taken), data[len(taken) :]
            if filled == CHUNK:
                yield buffer.data
                buffer, filled = next(buffers), 0
    yield buffer[:filled].data


def write_chunk(file, chunk: memoryview) -> None:
    """Write a part of a file. All of a snapshot is written through here."""
    while len(chunk):
        try:
            chunk = chunk[file.write(chunk) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not _end_direct(file.fileno()):
                raise


def _open_direct(path: str, flags: int) -> int:
    """An opener of `open`: past the cache, where the file system allows it."""
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _end_direct(descriptor: int) -> bool:
    """Let what follows be written through the cache: the end of a file is no whole block. Whether it was not before."""
    flags, direct = fcntl.fcntl(descriptor, fcntl.F_GETFL), getattr(os, "O_DIRECT", 0)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~direct)
    return bool(flags & direct)
