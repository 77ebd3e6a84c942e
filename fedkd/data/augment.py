"""Data augmentation of a device's own training records: pure functions of inputs and of what was drawn for them.

What is drawn for a batch depends on its stream alone, which is named by seed, phase, round, device and step, and on the
number of real records; so a device sees the same records alone, in a stack of devices, and after a resume. Test records
and proxy samples are never augmented.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkd.data.config import AugmentConfig


@dataclass(frozen=True)
class Draws:
    """What chance decided for n records.

    ``shift`` int64 [n, 2]: rows and columns to move by. ``flip`` bool [n]. ``corner`` int64 [n, 2]: top left of the
    square to blank, which may lie partly outside. ``noise`` float32 [n, *shape] of deviation 1. None where the
    experiment does not ask for it.
    """

    shift: NDArray[np.int64] | None
    flip: NDArray[np.bool_] | None
    corner: NDArray[np.int64] | None
    noise: NDArray[np.float32] | None


def draw(config: AugmentConfig, rng: np.random.Generator, count: int, shape: tuple[int, ...]) -> Draws:
    """Draw for ``count`` records of the shape ``shape``."""
    shift = rng.integers(-config.crop, config.crop + 1, (count, 2)) if config.crop else None
    flip = rng.random(count) < 0.5 if config.flip else None
    corner = None
    if config.erase:
        # Every pixel is blanked equally often only if the square may hang over the edge.
        corner = rng.integers(1 - config.erase, np.asarray(shape[-2:]), (count, 2))
    noise = rng.standard_normal((count, *shape), dtype=np.float32) if config.noise else None
    return Draws(shift, flip, corner, noise)


def join(draws: list[Draws]) -> Draws:
    """Put the draws of several batches together, in order."""

    def every(name: str) -> NDArray[np.generic] | None:
        found = [getattr(d, name) for d in draws]
        return None if found[0] is None else np.concatenate(found)

    return Draws(*(every(name) for name in ("shift", "flip", "corner", "noise")))  # type: ignore[arg-type]


def apply(config: AugmentConfig, x: Tensor, drawn: Draws) -> Tensor:
    """Return the augmented inputs [n, *shape] of ``x`` [n, *shape]: crop, flip, erase, noise, in this order.

    A crop is a shift that repeats the edge, so that it needs no idea of what an empty pixel looks like. Erased pixels
    become 0 and noise has the deviation ``config.noise``, both in units of what the model sees (after scaling).
    """
    if drawn.shift is not None or drawn.flip is not None:
        high, wide = x.shape[-2:]
        n = len(x)
        rows = np.broadcast_to(np.arange(high), (n, high))
        columns = np.broadcast_to(np.arange(wide), (n, wide))
        if drawn.flip is not None:
            columns = np.where(drawn.flip[:, None], columns[:, ::-1], columns)
        if drawn.shift is not None:
            # The shift is that of the unflipped image, and applied first.
            rows = np.clip(rows + drawn.shift[:, :1], 0, high - 1)
            columns = np.clip(columns + drawn.shift[:, 1:], 0, wide - 1)
        where = torch.from_numpy(np.ascontiguousarray(rows[:, :, None] * wide + columns[:, None, :])).to(x.device)
        flat = x.flatten(-2)
        x = flat.gather(2, where.view(n, 1, -1).expand(-1, x.shape[1], -1)).view(x.shape)
    if drawn.corner is not None:
        high, wide = x.shape[-2:]
        down = np.arange(high)[None, :] - drawn.corner[:, :1]
        across = np.arange(wide)[None, :] - drawn.corner[:, 1:]
        inside = ((down >= 0) & (down < config.erase))[:, :, None] & ((across >= 0) & (across < config.erase))[:, None]
        x = x.masked_fill(torch.from_numpy(inside).to(x.device)[:, None], 0)
    if drawn.noise is not None:
        x = x + config.noise * torch.from_numpy(drawn.noise).to(x)
    return x
