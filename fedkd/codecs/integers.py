"""Labels, flags and counters: exact, and as small as their values allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from fedkd.codecs.base import Coder, Stream, Symbols
from fedkd.payloads import PayloadError


@final
class LabelCoder(Coder):
    """Class indices as unsigned integers of 1, 2 or 4 bytes; decodes to int64."""

    def __init__(self, size: int) -> None:
        self.wire = f"u{size}"
        self.size = size

    @staticmethod
    def size_for(classes: int) -> int:
        """Return the bytes per label that hold ``classes`` values."""
        return 1 if classes <= 1 << 8 else 2 if classes <= 1 << 16 else 4

    def streams(self, shape: tuple[int, ...]) -> tuple[Stream, ...]:
        return (Stream(math.prod(shape), 1 << (8 * self.size), np.dtype(f"<u{self.size}"), 8 * self.size),)

    def to_symbols(self, name: str, value: Tensor) -> tuple[Symbols, ...]:
        if value.is_floating_point() or value.is_complex():
            raise PayloadError("label", f"{name}: expected integer labels, got {value.dtype}")
        flat = value.detach().cpu().numpy().reshape(-1)
        if flat.size and flat.min() < 0:
            raise PayloadError("range", f"{name}: {int(flat.min())} is negative, expected labels of at least 0")
        return (flat.astype(f"<u{self.size}"),)

    def from_symbols(self, name: str, symbols: Sequence[Symbols], shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(symbols[0].astype(np.int64)).reshape(shape)


@final
class IntegerCoder(Coder):
    """Signed integers of 8 bytes, exact; decodes to int64."""

    wire = "i8"

    def streams(self, shape: tuple[int, ...]) -> tuple[Stream, ...]:
        return (Stream.of(math.prod(shape), 1 << 64),)

    def to_symbols(self, name: str, value: Tensor) -> tuple[Symbols, ...]:
        return (value.detach().to(device="cpu", dtype=torch.int64).numpy().reshape(-1).view("<u8"),)

    def from_symbols(self, name: str, symbols: Sequence[Symbols], shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(symbols[0].view(np.int64)).reshape(shape)


@final
class FlagCoder(Coder):
    """Zeros and ones, one bit each; decodes to bool."""

    wire = "bit"

    def streams(self, shape: tuple[int, ...]) -> tuple[Stream, ...]:
        return (Stream.of(math.prod(shape), 2),)

    def to_symbols(self, name: str, value: Tensor) -> tuple[Symbols, ...]:
        flat = value.detach().cpu().numpy().reshape(-1)
        if not ((flat == 0) | (flat == 1)).all():
            raise PayloadError("range", f"{name}: expected only 0 and 1")
        return (flat.astype(np.uint8),)

    def from_symbols(self, name: str, symbols: Sequence[Symbols], shape: tuple[int, ...]) -> Tensor:
        return torch.from_numpy(symbols[0].astype(np.bool_)).reshape(shape)
