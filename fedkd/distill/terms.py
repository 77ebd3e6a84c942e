"""What a student is taught by: a loss, its weight, the layers it compares, and how the weight changes by epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from fedkd.losses import UNKNOWN, Loss, TrainedLoss

Schedule = Callable[[int], float]
"""Factor of a term's weight by epoch, from 0."""

Paths = str | Sequence[str] | None


def constant(epoch: int) -> float:
    """Return 1 in every epoch."""
    return 1.0


@dataclass(frozen=True)
class Warmup:
    """Rises linearly to 1 over the first ``epochs`` (DKD and ReviewKD: 20)."""

    epochs: int

    def __call__(self, epoch: int) -> float:
        return min(1.0, (epoch + 1) / self.epochs) if self.epochs > 0 else 1.0


@dataclass(frozen=True)
class SigmoidRamp:
    """exp(-5 (1 - t/length)^2) up to ``length`` epochs, then 1 (Laine & Aila, ICLR 2017; used by ONE with 80)."""

    length: int

    def __call__(self, epoch: int) -> float:
        return math.exp(-5 * (1 - min(epoch, self.length) / self.length) ** 2) if self.length > 0 else 1.0


@dataclass(frozen=True)
class Term:
    """One addend of a student's loss.

    Attributes:
        loss: what is compared and how.
        weight: factor; None is the weight published for the loss.
        student, teacher: module paths of the layers to compare, for a loss that reads features; one path, or several for
            a loss over levels. ``teacher`` None is the same path as the student's.
        adapt: ``auto`` maps the student's features to the teacher's shape by a layer that is trained along, where the
            loss needs one shape and they differ; ``none`` never does.
        schedule: factor of the weight by epoch.
    """

    loss: Loss
    weight: float | None = None
    student: Paths = None
    teacher: Paths = None
    adapt: Literal["auto", "none"] = "auto"
    schedule: Schedule = field(default=constant)

    @property
    def name(self) -> str:
        """What the term is called in logs: the loss, and where it looks."""
        where = ",".join(self.student_paths)
        return type(self.loss).__name__ + (f"({where})" if where else "")

    @property
    def student_paths(self) -> tuple[str, ...]:
        """The student's layers that are read."""
        return _paths(self.student)

    @property
    def teacher_paths(self) -> tuple[str, ...]:
        """The teacher's layers that are read."""
        return _paths(self.teacher) if self.teacher is not None else self.student_paths

    def below(self, path: str) -> Term:
        """Return the term for models that were put below ``path`` of others."""
        student, teacher = (tuple(f"{path}.{p}" for p in paths) for paths in (self.student_paths, self.teacher_paths))
        return replace(self, student=student or None, teacher=teacher or None)

    def factor(self, epoch: int) -> float:
        """Return the weight in ``epoch``."""
        weight = self.loss.published_weight if self.weight is None else self.weight
        return weight * self.schedule(epoch)


def _paths(value: Paths) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


class Bound(nn.Module):
    """A term made ready for two models: with its adapter, or with the module of a loss that has parts to train."""

    def __init__(self, term: Term, student: Sequence[Tensor], teacher: Sequence[Tensor], records: int, classes: int):
        super().__init__()
        self.term = term
        self.adapter: nn.Module | None = None
        self.trained: nn.Module | None = None
        if isinstance(term.loss, TrainedLoss):
            shapes = tuple(x.shape for x in student), tuple(x.shape for x in teacher)
            self.trained = term.loss.build(*shapes, records, classes)
        elif term.loss.reads == "features" and term.loss.aligned and term.adapt == "auto":
            self.adapter = adapter(student[0], teacher[0])

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        labels: Tensor | None,
        index: Tensor,
    ) -> Tensor:
        """Return the loss, without its weight; of records without a label where some have one, see :class:`Records`."""
        if self.trained is not None:
            found: Tensor = self.trained(tuple(student), tuple(teacher), labels, index)
            return found
        first, told = student[0] if self.adapter is None else self.adapter(student[0]), teacher[0]
        if self.term.loss.supervised and labels is not None and labels.dim() == 1:
            known = labels != UNKNOWN
            if not bool(known.any()):
                return first.sum() * 0
            if not bool(known.all()):
                first, told, labels = first[known], told[known], labels[known]
        return self.term.loss(first, told, labels)


def adapter(student: Tensor, teacher: Tensor) -> nn.Module | None:
    """Return a layer from the student's features to the teacher's shape [B, ...], or None where they agree.

    Maps get a 1x1 convolution with batch normalisation, after pooling or before upsampling to the teacher's size (the
    regressor of FitNets for unlike sizes is a convolution without padding; a pooled 1x1 serves every pair of sizes).
    Vectors get a linear layer; a map against a vector is pooled first.
    """
    if student.shape == teacher.shape:
        return None
    if student.dim() == 4 and teacher.dim() == 4:
        height, width = int(teacher.shape[2]), int(teacher.shape[3])
        resize: list[nn.Module] = []
        if student.shape[2:] != teacher.shape[2:]:
            shrinks = student.shape[2] >= height and student.shape[3] >= width
            resize = [nn.AdaptiveAvgPool2d((height, width)) if shrinks else nn.Upsample((height, width))]
        mapping = nn.Conv2d(student.shape[1], teacher.shape[1], 1, bias=False)
        return nn.Sequential(*resize, mapping, nn.BatchNorm2d(teacher.shape[1]))
    layers: list[nn.Module] = []
    width_in = int(student[0].numel())
    if student.dim() == 4:
        layers, width_in = [nn.AdaptiveAvgPool2d(1)], int(student.shape[1])
    layers += [nn.Flatten(), nn.Linear(width_in, int(teacher[0].numel()))]
    return nn.Sequential(*layers, nn.Unflatten(1, teacher.shape[1:])) if teacher.dim() > 2 else nn.Sequential(*layers)
