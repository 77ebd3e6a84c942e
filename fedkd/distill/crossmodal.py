"""A teacher of one kind of input and a student of another: pairs of records, and which side a model sees.

A :class:`fedkd.distill.Distiller` gives student and teacher one input. Here that input holds both records of a pair, one
after the other, and each model is wrapped to see its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedkd.distill.cache import data_identity
from fedkd.distill.loop import Records
from fedkd.errors import ConfigError


class Side(nn.Module):
    """A model that sees its part of a pair: numbers ``start`` up to its shape's end of each flat input [B, all].

    Layers are named with ``inner.`` before their path.
    """

    def __init__(self, inner: nn.Module, start: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.inner, self.start, self.shape = inner, start, shape

    def forward(self, x: Tensor) -> Tensor:
        part = x[:, self.start : self.start + math.prod(self.shape)]
        out: Tensor = self.inner(part.unflatten(1, self.shape))
        return out


@dataclass(frozen=True)
class Pairs:
    """Records that each hold the student's input and the teacher's; ``student`` and ``teacher`` wrap models to fit."""

    records: Records
    own: tuple[int, ...]
    other: tuple[int, ...]

    def student(self, model: nn.Module) -> Side:
        """Return the student, seeing the first part."""
        return Side(model, 0, self.own)

    def teacher(self, model: nn.Module) -> Side:
        """Return the teacher, seeing the second part."""
        return Side(model, math.prod(self.own), self.other)


def pairs(own: Tensor, other: Tensor, y: Tensor | None = None) -> Pairs:
    """Join own inputs [N, ...] with the other kind's [N, ...], row by row.

    Raises:
        ConfigError: there are unlike numbers of them.
    """
    if len(own) != len(other):
        raise ConfigError(f"{len(own)} inputs cannot be paired with {len(other)}: give one partner for each")
    flat = torch.cat([own.flatten(1), other.flatten(1).to(own.dtype)], 1)
    records = Records(
        size=len(flat), x=lambda index: flat[torch.from_numpy(index)], y=y, identity=data_identity([flat.numpy()])
    )
    return Pairs(records, tuple(own.shape[1:]), tuple(other.shape[1:]))


def partners(labels: Tensor, others: Tensor, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return for each label [N] the index of a random record of the same class among ``others`` [M].

    For kinds of input that were never recorded together: what pairs them is the class alone.

    Raises:
        ConfigError: a class has no record of the other kind.
    """
    found = np.zeros(len(labels), np.int64)
    for c in sorted(set(labels.tolist())):
        there = np.flatnonzero(others.numpy() == c)
        if not len(there):
            raise ConfigError(f"class {c} has no record of the other kind, so that its records have no partners")
        here = np.flatnonzero(labels.numpy() == c)
        found[here] = rng.choice(there, len(here), replace=len(here) > len(there))
    return found
