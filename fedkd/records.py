"""Records as tensors: a pool that many devices share, and one device's (or the proxy's) positions in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkd.data import Dataset, ProxySet

FLOAT_BUDGET_BYTES = 1_000_000_000
"""Above this size a pool of pixels stays uint8 and is scaled batch by batch: copies outweigh the models otherwise."""


class Pool:
    """Inputs [M, *shape] and labels [M] of one owner, given out as scaled tensors."""

    def __init__(self, source: Dataset | ProxySet, dtype: torch.dtype) -> None:
        self._source, self.dtype = source, dtype
        self.shape = tuple(source.x.shape[1:])
        self._x: Tensor | None = None
        if source.x.size * dtype.itemsize <= FLOAT_BUDGET_BYTES:
            self._x = torch.from_numpy(source.inputs(None)).to(dtype)
        self.y = None if source.y is None else torch.from_numpy(np.asarray(source.y, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._source.x)

    @property
    def floats(self) -> Tensor | None:
        """All inputs [M, *shape] as scaled floats, or None where they are held as pixels."""
        return self._x

    def take(self, index: Tensor) -> Tensor:
        """Return the inputs at ``index`` (int64 of any shape [...]) as [..., *shape]."""
        flat = index.reshape(-1)
        if self._x is not None:
            found = self._x.index_select(0, flat)
        else:
            found = torch.from_numpy(self._source.inputs(flat.numpy())).to(self.dtype)
        return found.view(*index.shape, *self.shape)


@dataclass(frozen=True)
class Records:
    """Positions ``index`` int64 [n] in a pool."""

    pool: Pool
    index: Tensor

    def __len__(self) -> int:
        return int(self.index.shape[0])

    def inputs(self, positions: Tensor) -> Tensor:
        """Return the inputs [..., *shape] of the records at ``positions`` [...] of this list."""
        return self.pool.take(self.index[positions])

    def labels(self, positions: Tensor) -> Tensor | None:
        """Return the labels [...] of the records at ``positions`` [...], or None."""
        return None if self.pool.y is None else self.pool.y[self.index[positions]]

    def all(self) -> tuple[Tensor, Tensor | None]:
        """Return all inputs and labels in order."""
        return self.pool.take(self.index), None if self.pool.y is None else self.pool.y[self.index]


def records(pool: Pool, index: NDArray[np.int64]) -> Records:
    """Return the records of ``pool`` at ``index``."""
    return Records(pool, torch.from_numpy(np.ascontiguousarray(index, dtype=np.int64)))
