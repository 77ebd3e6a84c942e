"""b-bit quantisation of the probability simplex.

Source: Sattler, Marban, Rischke, Samek, "CFD: Communication-Efficient Federated Distillation via Soft-Label
Quantization and Delta Coding", 2020, https://arxiv.org/abs/2012.00632.

    Q_b(p) = argmin_q ||q - p||_1   over q_i in {l / (2^b - 1)}, sum_i q_i = 1

Deviations: ties go to the lowest class index (the paper leaves them open). For b = 1 a row is the index of
its largest entry, in ceil(log2 C) bits; entropy coding brings it to log2 C bits or below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkd.codecs.base import Coder, Stream, Symbols
from fedkd.payloads import PayloadError

MAX_BITS = 16


def probabilities(name: str, value: Tensor) -> NDArray[np.float64]:
    """Return ``value`` [..., C] as float64 [rows, C] with rows that sum to 1.

    Raises:
        PayloadError: ``finite``, ``range`` or ``simplex``: quantising would hide the fault from the receiver.
    """
    if not value.ndim or (value.numel() and not value.shape[-1]):
        raise PayloadError("shape", f"{name}: expected [..., C], got a scalar")
    rows = value.detach().to(device="cpu", dtype=torch.float64).numpy().reshape(-1, max(1, value.shape[-1]))
    if not rows.size:
        return rows
    low, total = rows.min(), rows @ np.ones((rows.shape[1], 1))  # a product with ones beats sum(axis=1)
    if not np.isfinite(total).all():
        raise PayloadError("finite", f"{name}: NaN or infinity, expected finite probabilities to send")
    if low < 0:
        raise PayloadError("range", f"{name}: {low:.4g} is negative, expected probabilities")
    if np.abs(total - 1).max() > 1e-2:
        raise PayloadError("simplex", f"{name}: a row sums to {total.flat[np.abs(total - 1).argmax()]:.4g}, expected 1")
    normal: NDArray[np.float64] = rows / total
    return normal


def largest_remainder(p: NDArray[np.float64], steps: int) -> NDArray[np.int64]:
    """Return the integers l [rows, C], summing to ``steps`` per row, with l / steps nearest to ``p`` in L1.

    Round down, then give the missing units to the largest remainders: each unit moves the one entry whose
    error falls most (or grows least), and the L1 error is separable and convex in each entry, so the greedy
    choice is optimal.
    """
    scaled = p * steps
    levels = np.floor(scaled)
    missing = steps - levels.sum(axis=1, keepdims=True)
    order = np.argsort(levels - scaled, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(p.shape[1])[None, :], axis=1)
    result: NDArray[np.int64] = (levels + (rank < missing)).astype(np.int64)
    return result


@final
class SimplexCoder(Coder):
    """Probability rows [..., C] at ``bits`` bits per entry; one class index per row at 1 bit. Decodes to
    float32."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.steps = (1 << bits) - 1
        self.wire = f"s{bits}"

    def streams(self, shape: tuple[int, ...]) -> tuple[Stream, ...]:
        if self.bits == 1:
            return (Stream.of(math.prod(shape[:-1]) if shape[-1] else 0, max(1, shape[-1])),)
        return (Stream.of(math.prod(shape), 1 << self.bits),)

    def to_symbols(self, name: str, value: Tensor) -> tuple[Symbols, ...]:
        p = probabilities(name, value)
        (stream,) = self.streams(tuple(value.shape))
        levels = p.argmax(axis=1) if self.bits == 1 else largest_remainder(p, self.steps).reshape(-1)
        return (levels.astype(stream.dtype),)

    def from_symbols(self, name: str, symbols: Sequence[Symbols], shape: tuple[int, ...]) -> Tensor:
        if self.bits == 1:
            index = torch.from_numpy(symbols[0].astype(np.int64))
            rows = torch.zeros((len(index), shape[-1]))
            return (rows.scatter_(1, index[:, None], 1.0) if len(index) else rows).reshape(shape)
        levels = symbols[0].reshape(-1, max(1, shape[-1]))
        total = levels.sum(axis=1, dtype=np.int64)
        if (total != self.steps).any():
            worst = int(total[np.abs(total - self.steps).argmax()])
            raise PayloadError("simplex", f"{name}: levels of a row sum to {worst}, expected {self.steps}")
        return torch.from_numpy(levels.astype(np.float32) / np.float32(self.steps)).reshape(shape)
