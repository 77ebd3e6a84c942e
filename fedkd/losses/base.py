"""What a distillation loss is: a pure, frozen function of the student's and the teacher's tensors.

A loss serves a :class:`fedkd.distill.Distiller`, a federated method's ``public_loss`` and the server alike. It returns a
scalar. ``weight`` [B] sums to 1 and is 0 for padding, as ``Batch.weight`` is: a stacked batch of devices is padded, and
relations between records must leave the padding out. Without it all records count alike.

Letters: B batch, C classes, D features, H and W height and width of a feature map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

Reads = Literal["labels", "logits", "features"]

UNKNOWN = -1
"""The label of a record that has none among others that have one."""


@dataclass(frozen=True, kw_only=True)
class Loss(ABC):
    """Base of all losses; subclasses are final, frozen, keyword-only dataclasses.

    ``reads``: what the loss compares: true ``labels`` with logits, ``logits`` with logits, or ``features`` that are
    tapped from inner layers. ``aligned``: student's and teacher's features must have one shape, so that a student of
    another width needs an adapter. ``supervised``: it needs true labels; records whose label is :data:`UNKNOWN` are left
    out of it. ``weight``: the weight published for the loss.
    """

    reads: ClassVar[Reads] = "logits"
    aligned: ClassVar[bool] = False
    supervised: ClassVar[bool] = False
    published_weight: ClassVar[float] = 1.0
    paper: ClassVar[str] = ""

    @abstractmethod
    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        """Return the scalar loss.

        Args:
            student: logits [B, C] or features [B, ...]; carries the gradient.
            teacher: as ``student``; unused by a loss that reads labels.
            labels: true labels [B] (int64), where the loss needs them.
            weight: [B], sums to 1, 0 for padding; None weighs all records alike.
        Raises:
            ValueError: the tensors are not of the form that the loss is defined for; says what it needs.
        """


@dataclass(frozen=True, kw_only=True)
class TrainedLoss(Loss, ABC):
    """A loss with parts that are trained along with the student, or with a memory of all records."""

    reads: ClassVar[Reads] = "features"

    @abstractmethod
    def build(
        self, student: tuple[torch.Size, ...], teacher: tuple[torch.Size, ...], records: int, classes: int
    ) -> nn.Module:
        """Return the module that computes the loss: ``module(student, teacher, labels, index, weight)``.

        Args:
            student, teacher: shapes [B, ...] of the tapped features, one per tap.
            records: number of training records N, for a memory of them.

        ``labels`` may hold :data:`UNKNOWN`: what the module makes of such records is its own affair.
        """

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        raise TypeError(f"{type(self).__name__} has parts of its own to train: call build() and use its module")


def uniform(like: Tensor) -> Tensor:
    """Return the weights [B] under which every row of ``like`` [B, ...] counts alike."""
    return torch.full((like.shape[0],), 1.0 / max(like.shape[0], 1), dtype=like.dtype, device=like.device)


def mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Return the weighted mean of per-record ``values`` [B]."""
    return values.mean() if weight is None else (values * weight).sum()


def rows(features: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return features as [B, D] with padding set to 0, and the weights [B]."""
    flat = features.flatten(1)
    if weight is None:
        return flat, uniform(flat)
    return torch.where((weight > 0).unsqueeze(1), flat, torch.zeros_like(flat)), weight


def unit(flat: Tensor) -> Tensor:
    """Return rows [B, D] scaled to length 1; a row of zeros stays 0, with a gradient of 0."""
    square = flat.square().sum(1, keepdim=True)
    none = square == 0
    length = torch.where(none, torch.ones_like(square), square).sqrt()
    return flat / length


def same_shape(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    """Refuse tensors of different shapes.

    Raises:
        ValueError: naming both shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"{type(loss).__name__} compares element by element: the student gives {list(student.shape)}, the teacher "
            f"{list(teacher.shape)}; use an adapter (Term(adapt='auto')) or layers of one shape"
        )
