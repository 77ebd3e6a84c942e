"""The pool of synthetic inputs: what a student learns on, and what is left of the work afterwards."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkd.storage import write_atomic


class Pool:
    """Keeps inputs [N, *shape]; when ``limit`` is reached, the oldest give way.

    ``pick`` and ``draw`` use torch's global stream, as makers do.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._parts: list[Tensor] = []
        self._joined: Tensor | None = None

    def __len__(self) -> int:
        return min(self.limit, sum(map(len, self._parts)))

    def add(self, x: Tensor) -> None:
        """Keep x [B, *shape]."""
        if not len(x):
            return
        self._parts.append(x.detach().clone())
        self._joined = None
        while sum(map(len, self._parts[1:])) >= self.limit:
            self._parts.pop(0)

    @property
    def x(self) -> Tensor:
        """All inputs [N, *shape], the oldest first."""
        if not self._parts:
            raise RuntimeError("the pool is empty: nothing has been made yet")
        if self._joined is None:
            self._joined = torch.cat(self._parts)[-self.limit :]
            self._parts = [self._joined]
        return self._joined

    def draw(self, count: int) -> Tensor:
        """Return ``count`` inputs, without repetition where there are enough."""
        return self.x[self.pick(count)]

    def pick(self, count: int) -> Tensor:
        """Return the positions [``count``] of random inputs, without repetition where there are enough."""
        found = torch.randperm(len(self))[:count] if count <= len(self) else torch.randint(len(self), (count,))
        return found.to(self.x.device)

    def restore(self, x: Tensor | None) -> None:
        """Replace everything by x, or by nothing."""
        self._parts, self._joined = ([] if x is None else [x]), None

    def save(self, path: Path, told: Tensor) -> None:
        """Write an ``.npz`` file with ``x`` float32 [N, *shape] as models take it, and the teacher's ``logits`` [N, C].

        It is read by ``data=pool.npz`` of `fedkd distill`, by ``proxy: {kind: npz, path: pool.npz}`` of an experiment,
        and by whatever wants unlabelled inputs to calibrate a quantised model.
        """
        buffer = io.BytesIO()
        x = self.x.detach().cpu().numpy().astype(np.float32)
        np.savez_compressed(buffer, x=x, logits=told.detach().cpu().numpy().astype(np.float32))
        write_atomic(path, buffer.getvalue())
