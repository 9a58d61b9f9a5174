"""Opens a file of this machine or the Hub as a stream of bytes, decompressed by its ending."""

import bz2
import csv
import gzip
import io
import lzma
import os
import zlib
from typing import BinaryIO

import fsspec
import zstandard

from .formats import ARROW_KINDS, kind_of

DAMAGED = (EOFError, OSError, zlib.error, zstandard.ZstdError, lzma.LZMAError, csv.Error)


class _ZstdFile(io.RawIOBase):
    """Reads all frames of a zstd file. The package's own reader ends after the first, and does not report a truncated
    last frame.
    """

    def __init__(self, file):
        self.file, self.frame, self.compressed, self.text = file, None, b"", memoryview(b"")
        self.position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes that were read."""
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        """Fill a buffer and return the number of bytes. Raises EOFError where the file is truncated."""
        while not self.text:
            self.compressed = self.compressed or self.file.read(2**17)
            if not self.compressed:
                if self.frame is None:
                    return 0
                raise EOFError("the file ends within a zstd frame")
            self.frame = self.frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self.text = memoryview(self.frame.decompress(self.compressed))
            self.compressed = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        count = min(len(buffer), len(self.text))
        self.position += count
        buffer[:count], self.text = self.text[:count], self.text[count:]
        return count


def open_file(path: str) -> BinaryIO:
    """A file of this machine or the Hub as a buffered, decompressed stream of bytes, with `peek`."""
    if path.lower().endswith(".zst"):
        return io.BufferedReader(_ZstdFile(fsspec.open(path, "rb").open()), 2**20)
    if os.path.exists(path):
        opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(os.path.splitext(path)[1].lower())
        return io.BufferedReader(opener(path), 2**20) if opener else open(path, "rb", 2**20)
    handle = fsspec.open(path, "rb", compression="infer").open()
    return handle if kind_of(path) in ARROW_KINDS else io.BufferedReader(handle, 2**20)
