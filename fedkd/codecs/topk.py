"""The k largest probabilities of each row; what is left is spread evenly over the other classes.

Biased: classes outside the top k all get the mean of their mass, so the order and the spread among them are
lost, and an average over many clients is pulled towards uniform there. No error is fed back. The kept values
carry float16 round-off (2^-11 relative). k at or above C keeps every class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from fedkd.codecs.base import Coder, Stream, Symbols
from fedkd.codecs.simplex import probabilities
from fedkd.payloads import PayloadError


@final
class TopKCoder(Coder):
    """Rows [..., C] as k class indices in ascending order and k float16 probabilities. Decodes to float32."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.wire = f"t{k}"

    def streams(self, shape: tuple[int, ...]) -> tuple[Stream, ...]:
        classes = shape[-1]
        count = (math.prod(shape[:-1]) if classes else 0) * min(self.k, classes)
        return Stream.of(count, max(1, classes)), Stream.of(count, 1 << 16)

    def to_symbols(self, name: str, value: Tensor) -> tuple[Symbols, ...]:
        p = probabilities(name, value)
        indices, _ = self.streams(tuple(value.shape))
        # A stable sort gives ties to the lowest class; ascending indices delta-code and check well.
        top = np.sort(np.argsort(-p, axis=1, kind="stable")[:, : self.k], axis=1)
        kept = np.take_along_axis(p, top, axis=1)
        return top.reshape(-1).astype(indices.dtype), kept.astype("<f2").reshape(-1).view("<u2")

    def from_symbols(self, name: str, symbols: Sequence[Symbols], shape: tuple[int, ...]) -> Tensor:
        classes = max(1, shape[-1])
        k = min(self.k, classes)
        top = symbols[0].astype(np.int64).reshape(-1, k)
        if not len(top):
            return torch.zeros(shape)
        if (np.diff(top, axis=1) <= 0).any():
            raise PayloadError("body", f"{name}: class indices of a row must ascend without repeats")
        if (symbols[1] & 0x7C00).max() == 0x7C00:
            raise PayloadError("finite", f"{name}: NaN or infinity, expected finite numbers")
        kept = symbols[1].view("<f2").astype(np.float32).reshape(-1, k)
        rest = np.maximum(0, 1 - kept.sum(axis=1, keepdims=True)) / max(1, classes - k)
        rows = np.repeat(rest, classes, axis=1)
        np.put_along_axis(rows, top, kept, axis=1)
        return torch.from_numpy(rows).reshape(shape)
