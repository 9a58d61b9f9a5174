"""A copy of weights and optimizer state in host memory, of which a thread writes a checkpoint while training goes on.

The first save allocates the buffers, page-locked where there is a GPU; later saves fill them again, which takes a
fraction of the time of new memory.
"""

import contextlib
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ..distributed import print_once
from .tensor_files import HostTensor, write_tensor_file

DTYPE_NAMES = {  # torch's types by safetensors' names
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Snapshot:
    """The files of tensors of one checkpoint at a time: `begin`, `add` or `capture`, `synchronize`, then `write`, in
    any thread, before it begins again. page_locked: whether a GPU copies into the buffers.
    """

    def __init__(self, page_locked: bool):
        self.page_locked, self.waits = page_locked, False
        self.buffers: dict[tuple[str, str], torch.Tensor] = {}
        self.files: dict[Path, tuple[dict[str, HostTensor], dict[str, str]]] = {}

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def begin(self, waits: bool = False) -> None:
        """Forget the files of the checkpoint before; the buffers stay. waits: whether training waits for `write`, so
        that no tensor in host memory needs a copy.
        """
        self.files, self.waits = {}, waits

    @torch.no_grad()
    def add(
        self, path: Path, tensors: Iterable[tuple[str, torch.Tensor]], metadata: dict[str, str], live: set[int] | None
    ) -> None:
        """Copy the tensors of a file. Each is read before the next one is asked for.

        live: the storages (`storage_of`) that training goes on to change. A tensor on the CPU that shares none of them
        is kept as it is, without a copy; None: all are copied.
        """
        copies = {}
        for name, tensor in tensors:
            source = tensor.detach()
            changes = not self.waits and (live is None or storage_of(source) in live)
            if changes or source.device.type != "cpu" or not source.is_contiguous():
                source = self._copied((Path(path).name, name), source)
            data = source.reshape(-1).view(torch.uint8).numpy()
            copies[name] = HostTensor(DTYPE_NAMES[source.dtype], tuple(source.shape), data)
        self.files[Path(path)] = (copies, metadata)

    def _copied(self, key: tuple[str, str], source: torch.Tensor) -> torch.Tensor:
        buffer = self.buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
            self.buffers[key] = buffer = torch.empty(source.shape, dtype=source.dtype, device="cpu")
            if self.page_locked:
                _lock_pages(buffer)
        return buffer.copy_(source, non_blocking=self.page_locked)

    @contextlib.contextmanager
    def capture(self, live: set[int]) -> Iterator[None]:
        """Within the block, add the files of tensors that `save_pretrained` of transformers and PEFT would write."""
        names = ("transformers.modeling_utils", "peft.peft_model")
        modules = [sys.modules[name] for name in names if name in sys.modules]
        originals = [module.safe_save_file for module in modules]
        thread = threading.get_ident()

        def save_file(tensors: dict, filename, metadata: dict | None = None) -> None:
            if threading.get_ident() != thread:  # another thread, which exports a revision
                originals[0](tensors, filename, metadata=metadata)
            else:
                self.add(Path(filename), tensors.items(), metadata or {}, live)

        for module in modules:
            module.safe_save_file = save_file
        try:
            yield
        finally:
            for module, original in zip(modules, originals, strict=True):
                module.safe_save_file = original

    def synchronize(self) -> None:
        """Return when the GPU has made its copies."""
        if self.page_locked:
            torch.cuda.synchronize()

    def write(self) -> dict[Path, str]:
        """Write the files; returns the BLAKE3 of each. Calls no torch operation. Raises OSError."""
        digests = {path: write_tensor_file(path, *content) for path, content in self.files.items()}
        self.files = {}  # what was not copied is freed
        return digests


def storage_of(tensor: torch.Tensor) -> int:
    """What two tensors that share memory have in common."""
    return tensor.untyped_storage().data_ptr()


def live_storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    """The storages of tensors; of a distributed tensor, that of this rank's part."""
    return {storage_of(tensor.to_local() if hasattr(tensor, "to_local") else tensor) for tensor in tensors}


def _lock_pages(buffer: torch.Tensor) -> None:
    """Page-lock a buffer for the GPU. torch's own pinned memory is rounded up to a power of two."""
    cudart, pointer = torch.cuda.cudart(), buffer.data_ptr()
    if not buffer.nbytes:
        return
    if int(cudart.cudaHostRegister(pointer, buffer.nbytes, 0)):
        print_once("page-locked", "WARNING   no page-locked memory for the copies of saves: they are slower")
        return
    weakref.finalize(buffer, cudart.cudaHostUnregister, pointer).atexit = False
