"""What a method without data is: settings that start a maker of inputs, and the maker's state while a student learns.

A :class:`Synthesizer` is a frozen dataclass of a method's own parameters. Its :meth:`~Synthesizer.start` gives a
:class:`Maker`, which alternates with the student: ``make`` improves the inputs (a step of a generator, an inversion of
pixels), ``loss`` gives the student's loss on inputs of the maker's choice. The loop, optimiser, checkpoints, pool and
randomness belong to :class:`fedkd.distill.datafree.DataFree`; the teacher is a :class:`~fedkd.distill.datafree.Guide`,
which may be one model, an ensemble of clients, or a service that only answers.

Letters: B batch, C classes, K models of an ensemble, Z width of the noise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from fedkd.distill.loop import Fit
from fedkd.errors import ConfigError

if TYPE_CHECKING:
    from fedkd.distill.datafree.guides import Guide
    from fedkd.distill.datafree.pool import Pool


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a teacher takes and gives, as far as it is public.

    ``shape``: of one input, without B. ``low``, ``high``: bounds of every value where inputs are bounded (pixels: 0 and
    1); None where they are scaled to about mean 0 and deviation 1. ``classes``: C.
    """

    shape: tuple[int, ...]
    classes: int
    low: float | None = 0.0
    high: float | None = 1.0

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ConfigError("give both bounds of an input, low and high, or neither")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ConfigError(f"an input's bounds are {self.low} and {self.high}: low must be below high")

    @staticmethod
    def within(shape: tuple[int, ...], classes: int, bounds: tuple[float, float] | None) -> Form:
        """Return the form of inputs between two bounds, or without any."""
        low, high = bounds if bounds is not None else (None, None)
        return Form(shape=shape, classes=classes, low=low, high=high)

    def place(self, standard: Tensor) -> Tensor:
        """Bring values of about mean 0 and deviation 1 within the bounds by a sigmoid; leave them where there are none."""
        if self.low is None or self.high is None:
            return standard
        return self.low + (self.high - self.low) * torch.sigmoid(standard)

    def clamp(self, x: Tensor) -> Tensor:
        """Cut values at the bounds, where there are any."""
        return x if self.low is None else x.clamp(self.low, self.high)

    def noise(self, count: int) -> Tensor:
        """Return inputs [count, *shape] of standard normal noise, which goes beyond the bounds of pixels.

        Uniform noise within them says less of a teacher: its answers hardly differ.
        """
        return torch.randn(count, *self.shape)


class Maker(ABC):
    """A method at work. Randomness is torch's global stream, which the loop seeds anew in every epoch; new tensors come up
    on the loop's device by themselves.

    Attributes:
        guide: the teacher; its parameters carry no gradient, its inputs may.
        pool: the inputs kept so far; the loop adds what ``make`` returns.
        modules, optimizers: what a checkpoint must hold to go on bit for bit.
        extra: other tensors of the state, by name; a maker replaces entries, never the mapping.
        progress: share of the training that is done, from 0 to below 1; the loop sets it.
        student_batch: inputs of a step of the student; the loop sets it.
    """

    def __init__(self, settings: Synthesizer, guide: Guide, form: Form, pool: Pool) -> None:
        self.settings, self.guide, self.form, self.pool = settings, guide, form, pool
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.extra: dict[str, Tensor] = {}
        self.progress = 0.0
        self.student_batch = settings.batch_size

    @abstractmethod
    def make(self, student: nn.Module) -> Tensor:
        """Improve the inputs once, and return those [B, *shape] that the pool should keep (perhaps none: B = 0).

        The student is in evaluation mode, and its parameters carry no gradient: what is made may oppose it.
        """

    def student_steps(self) -> int:
        """Return how many steps the student takes before the next ``make``."""
        return self.settings.student_steps

    def loss(self, student: nn.Module, batch_size: int) -> Tensor:
        """Return the student's loss on one batch. By default: inputs of the pool, and the method's student loss."""
        x = self.pool.draw(batch_size)
        with torch.no_grad():
            told = self.guide(x)
        return self.settings.student_loss(student(x), told)

    def restored(self) -> None:
        """Take up what a checkpoint brought back into ``modules``, ``optimizers`` and ``extra``."""
        return None

    def none(self) -> Tensor:
        """Return no inputs: [0, *shape]."""
        return torch.zeros(0, *self.form.shape)


COUNTS = ("makes_per_epoch", "batch_size", "steps", "width", "noise", "head", "others", "bank")
ABOVE_0 = ("lr", "generator_lr", "noise_lr", "temperature", "tau", "zoom")
"""Parameters by these names mean the same in every method, and are checked in one place."""


@dataclass(frozen=True, kw_only=True)
class Synthesizer(ABC):
    """Base of all methods; subclasses are final, frozen, keyword-only dataclasses of a method's own parameters.

    ``looks_inside``: needs the teacher's gradient with respect to its inputs, and so a torch model; a guide that
    estimates gradients by questions will do. ``norms``: reads the statistics of the teacher's batch normalisation.
    ``streams``: inputs are made afresh for every step, and the pool keeps those of the last step of every epoch; else
    the student learns on the pool. ``fit``: how the published student is trained.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    looks_inside: ClassVar[bool] = True
    norms: ClassVar[bool] = False
    streams: ClassVar[bool] = False
    fit: ClassVar[Fit] = Fit()

    makes_per_epoch: int = 1
    student_steps: int = 50  # of the student, after every make
    batch_size: int = 128  # inputs made at a time

    def __post_init__(self) -> None:
        for field, value in vars(self).items():
            if field in COUNTS and isinstance(value, int) and value < 1:
                raise ConfigError(f"{self.name}.{field} is {value}, expected at least 1")
            if field in ABOVE_0 and not 0 < value < math.inf:
                raise ConfigError(f"{self.name}.{field} is {value}, expected a finite number above 0")
            if field == "warmup" and not 0 <= value < 1:
                raise ConfigError(f"{self.name}.warmup is {value}, expected a share of the training from 0 to below 1")
        if self.batch_size < 2:
            raise ConfigError(f"{self.name}.batch_size is {self.batch_size}: batch statistics need at least 2 inputs")
        if self.student_steps < 0:
            raise ConfigError(f"{self.name}.student_steps is {self.student_steps}, expected at least 0")

    @abstractmethod
    def start(self, guide: Guide, form: Form, pool: Pool) -> Maker:
        """Return the method at work, with fresh generators from torch's global stream.

        Raises:
            ConfigError: the teacher lacks what the method needs; says what to use instead.
        """

    def queries_per_epoch(self, fit: Fit) -> int | None:
        """Return how many inputs an epoch asks of a teacher that only answers, or None where that is not known before."""
        return None

    def check(self, guide: Guide) -> None:
        """Refuse a teacher that lacks what the method needs.

        Raises:
            ConfigError: naming what is missing and what to use instead.
        """
        if self.looks_inside and not guide.differentiable:
            raise ConfigError(
                f"{self.name} needs gradients through the teacher, and this one only answers: use a method for a black "
                "box, such as ideal or dfme, or a teacher whose weights are at hand (.safetensors, .pt; several of them "
                "need mix=logits)"
            )
        if self.norms:
            guide.statistics(self.name).close()

    def student_loss(self, said: Tensor, told: Tensor) -> Tensor:
        """Return the student's loss, given its logits and the teacher's [B, C]: by default KL(t || s) at T = 1."""
        return divergence(told, said).mean()


def divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(softmax(t/T) || softmax(s/T)) as [B], for logits [B, C]; no T^2. Both sides carry gradients."""
    log_t, log_s = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    return (log_t.exp() * (log_t - log_s)).sum(-1)
