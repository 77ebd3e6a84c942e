"""Named tensors as rows of fixed length, so that many alike can lie one after another in a file."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fedkd.storage import StorageError

ALIGNMENT_BYTES = 64
"""Where torch puts its own tensors. A product over memory aligned in another way may round differently."""

LET_GO_BYTES = 64 * 2**20
"""So much of a mapped file is read before its pages are taken out of this process; the page cache keeps them."""

_DTYPES = {
    name: getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
}


class Form:
    """The layout of rows: name, dtype, shape and place of every tensor, and whatever else rows of this form share."""

    def __init__(self, tensors: Mapping[str, tuple[str, tuple[int, ...]]], rest: Any = None) -> None:
        """Lay out ``tensors``: name -> (dtype, shape); ``rest`` is plain data."""
        self.rest = rest
        self._places: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]] = {}
        end = 0
        for name, (kind, shape) in tensors.items():
            if kind not in _DTYPES:
                raise StorageError(f"tensor {name!r} has the dtype {kind}, which device files do not hold")
            size = _DTYPES[kind].itemsize * math.prod(shape)
            self._places[name] = (_DTYPES[kind], tuple(shape), end, size)
            end += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.bytes = max(end, ALIGNMENT_BYTES)
        self.text = json.dumps([[[n, k, list(s)] for n, (k, s) in tensors.items()], rest])

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], rest: Any = None) -> Form:
        """Return the form of these tensors."""
        return cls({n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}, rest)

    @classmethod
    def parse(cls, text: str) -> Form:
        """Return the form that ``text`` describes.

        Raises:
            StorageError: it describes none.
        """
        try:
            tensors, rest = json.loads(text)
            return cls({str(n): (str(k), tuple(int(i) for i in s)) for n, k, s in tensors}, rest)
        except (ValueError, TypeError) as cause:
            raise StorageError(f"the layout of device files cannot be read: {cause}") from cause

    def pack(self, many: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return the rows of several sets of tensors, uint8 [K, bytes]."""
        rows = torch.zeros(len(many), self.bytes, dtype=torch.uint8)
        for name, (_, _, start, size) in self._places.items():
            if size:
                stacked = torch.stack([tensors[name].detach() for tensors in many])
                rows[:, start : start + size] = stacked.view(len(many), -1).view(torch.uint8)
        return rows

    def unpack(self, row: Tensor) -> dict[str, Tensor]:
        """Return the tensors that lie in ``row`` uint8 [bytes]; they share its memory."""
        return {
            name: row[start : start + size].view(dtype).view(shape)
            for name, (dtype, shape, start, size) in self._places.items()
        }


class RowFile:
    """Rows of one length in a file that grows as needed: written by position, read through a memory map.

    A write through a map would end the process with a signal when the disk is full; a plain write raises.
    """

    def __init__(self, file: IO[bytes], row_bytes: int, where: str) -> None:
        self.row_bytes, self._file, self._where = row_bytes, file, where
        self._map: mmap.mmap | None = None
        self._mapped, self._read = 0, 0

    @classmethod
    def open(cls, path: Path, row_bytes: int) -> RowFile:
        """Open the file at ``path``, made if it is not there."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
        except OSError as cause:
            raise StorageError(f"cannot open {path}: {cause.strerror or cause}") from cause
        return cls(os.fdopen(handle, "r+b", buffering=0), row_bytes, str(path))

    def write(self, place: int, rows: Tensor) -> None:
        """Put ``rows`` uint8 [K, row_bytes] at ``place`` and the places after it.

        Raises:
            StorageError: the disk is full or read-only.
        """
        at, left = place * self.row_bytes, memoryview(rows.view(-1).numpy().data)
        try:
            while left:
                done = os.pwrite(self._file.fileno(), left, at)
                at, left = at + done, left[done:]
        except OSError as cause:
            raise StorageError(f"cannot write {self._where}: {cause.strerror or cause}") from cause

    def read(self, place: int) -> Tensor:
        """Return the row at ``place``, uint8 [row_bytes], in memory of its own.

        Raises:
            StorageError: the file ends before.
        """
        start, end = place * self.row_bytes, (place + 1) * self.row_bytes
        if end > self._mapped:
            self._remap(end)
        assert self._map is not None
        row = torch.empty(self.row_bytes, dtype=torch.uint8)
        row.numpy()[:] = np.frombuffer(self._map, np.uint8, self.row_bytes, start)
        self._read += self.row_bytes
        if self._read > LET_GO_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read = 0
        return row

    def sync(self) -> None:
        """Make what was written durable.

        Raises:
            StorageError: the disk is full or broken.
        """
        try:
            getattr(os, "fdatasync", os.fsync)(self._file.fileno())
        except OSError as cause:
            raise StorageError(f"cannot write {self._where}: {cause.strerror or cause}") from cause

    def close(self) -> None:
        """Let go of the file."""
        if self._map is not None:
            self._map.close()
        self._map, self._mapped = None, 0
        self._file.close()

    def _remap(self, wanted: int) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size < wanted:
            raise StorageError(f"{self._where} has {size} bytes, at least {wanted} were expected: it was cut short")
        if self._map is not None:
            self._map.close()
        self._map, self._mapped = mmap.mmap(self._file.fileno(), size, access=mmap.ACCESS_READ), size
