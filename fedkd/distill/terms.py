"""What a student is taught by: a loss, its weight, the layers it compares, and how the weight changes by epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from fedkd.errors import ConfigError
from fedkd.losses import LOSSES, UNKNOWN, Loss, TrainedLoss
from fedkd.named import class_named, made

Schedule = Callable[[int], float]
"""Factor of a term's weight by epoch, from 0."""

Paths = str | Sequence[str] | None

Seen = tuple[Tensor, Mapping[str, Tensor]]
"""What a model gave for a batch: its logits [B, C], and its layers [B, ...] by path."""


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
    Raises:
        ConfigError: it names no loss, no number for a weight, or layers for a loss that reads none.
    """

    loss: Loss
    weight: float | None = None
    student: Paths = None
    teacher: Paths = None
    adapt: Literal["auto", "none"] = "auto"
    schedule: Schedule = field(default=constant)

    def __post_init__(self) -> None:
        if not isinstance(self.loss, Loss):
            said = self.loss.__name__ if isinstance(self.loss, type) else type(self.loss).__name__
            raise ConfigError(f"a term's loss is {said}: expected a loss that was made, such as KD(temperature=4)")
        if self.weight is not None and not math.isfinite(self.weight):
            raise ConfigError(f"{self.name} has the weight {self.weight}: expected a number")
        if self.loss.reads != "features" and (self.student is not None or self.teacher is not None):
            raise ConfigError(
                f"{type(self.loss).__name__} compares {self.loss.reads}, not layers: leave student and teacher out of it"
            )

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
        return replace(self, student=student, teacher=teacher) if self.loss.reads == "features" else self

    def sides(self, student: Seen, teacher: Seen) -> tuple[list[Tensor], list[Tensor]]:
        """Return what the loss compares of what both models gave, the teacher's in the student's dtype."""
        logits = student[0]
        if self.loss.reads == "features":
            own, told = [student[1][p] for p in self.student_paths], [teacher[1][p] for p in self.teacher_paths]
        else:
            own, told = [logits], [teacher[0] if self.loss.reads == "logits" else logits]
        return own, [t.to(logits.dtype) for t in told]

    def factor(self, epoch: int) -> float:
        """Return the weight in ``epoch``."""
        weight = self.loss.published_weight if self.weight is None else self.weight
        return weight * self.schedule(epoch)


class TermConfig(BaseModel):
    """One addend of the student's loss; keys beside these are the loss's own parameters (`temperature: 4`)."""

    model_config = ConfigDict(frozen=True, extra="allow")

    loss: str = Field(description=f"One of {', '.join(LOSSES)}, or package.module:Class, a fedkd.losses.Loss.")
    weight: float | None = Field(None, description="Factor; null is the published one.")
    student: str | tuple[str, ...] | None = Field(None, description="Layer(s) of the student, such as body.3.")
    teacher: str | tuple[str, ...] | None = Field(None, description="Layer(s) of the teacher; null: the student's.")
    adapt: Literal["auto", "none"] = "auto"
    warmup: int | None = Field(None, ge=1, description="Epochs in which the weight rises linearly.")
    ramp: int | None = Field(None, ge=1, description="Epochs of the sigmoid ramp-up exp(-5 (1-t/T)^2).")

    @model_validator(mode="after")
    def _known(self) -> TermConfig:
        if self.warmup is not None and self.ramp is not None:
            raise ConfigError(f"term {self.loss}: give warmup or ramp, not both")
        self.term  # noqa: B018  refuses unknown parameters before any data are read
        return self

    @property
    def term(self) -> Term:
        """The term."""
        kind: type[Loss] = class_named(self.loss, LOSSES, Loss, "loss", "fedkd.losses")  # type: ignore[type-abstract]
        loss = made(kind, f"loss {self.loss!r}", self.model_extra or {})
        schedule = Warmup(self.warmup) if self.warmup else SigmoidRamp(self.ramp) if self.ramp else constant
        return Term(loss, self.weight, self.student, self.teacher, self.adapt, schedule)


def _paths(value: Paths) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def between_nets(
    terms: Sequence[Term], student: Seen, teacher: Seen, labels: Tensor | None, weight: Tensor, epoch: int
) -> Tensor:
    """Return the weighted sum of terms as an addend of a federated method's loss; the teacher takes no gradient.

    Everything is a pure function of tensors, so that it stacks: see :func:`refuse_parts`.

    Args:
        student, teacher: see :meth:`fedkd.nets.Net.read`.
        labels: [B]. weight: [B], 0 for padding, as ``Batch.weight``.
        epoch: where schedules are; a federated method gives the round.
    """
    total = student[0].new_zeros([])
    for term in terms:
        own, told = term.sides(student, teacher)
        total = total + term.factor(epoch) * term.loss(own[0], told[0].detach(), labels, weight)
    return total


def refuse_parts(terms: Sequence[Term]) -> None:
    """Refuse terms that are no pure function of two models.

    Raises:
        ConfigError: a loss has parts of its own to train, or names no layer or several where it reads one.
    """
    for term in terms:
        if isinstance(term.loss, TrainedLoss):
            raise ConfigError(
                f"{term.name} has parts of its own to train, for which a device has no place: use a loss without, such as "
                "at, sp, rkd_distance or kd"
            )
        if term.loss.reads == "features" and not len(term.student_paths) == len(term.teacher_paths) == 1:
            raise ConfigError(f"{term.name} reads features: name one layer with student=..., such as 'body.3'")


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
