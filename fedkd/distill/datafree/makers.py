"""What methods share: a generator with its optimiser, and what inversions of batch statistics have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedkd.distill.datafree.base import Form, Maker, Synthesizer, divergence
from fedkd.distill.datafree.generators import generator, renew
from fedkd.distill.datafree.guides import Guide
from fedkd.distill.datafree.pool import Pool


class GeneratorMaker(Maker):
    """A maker with one generator that learns by Adam.

    Args:
        noise: width Z of z.
        width: of the generator.
        lr, betas: of Adam.
        anneal: lower the rate to 0 by a cosine over the training.
    """

    def __init__(
        self,
        settings: Synthesizer,
        guide: Guide,
        form: Form,
        pool: Pool,
        *,
        noise: int,
        width: int,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        anneal: bool = False,
    ) -> None:
        super().__init__(settings, guide, form, pool)
        self.noise, self.lr, self.anneal = noise, lr, anneal
        self.generator = generator(form, noise, width)
        self.modules = {"generator": self.generator}
        self.optimizers = {"generator": torch.optim.Adam(self.generator.parameters(), lr, betas)}

    def z(self, count: int | None = None) -> Tensor:
        """Return fresh noise [B, Z]; by default the method's own batch."""
        return torch.randn(count or self.settings.batch_size, self.noise)

    def learn(self, loss: Tensor) -> None:
        """Take one step of the generator down ``loss``."""
        optimizer = self.optimizers["generator"]
        if self.anneal:
            rate = self.lr * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * self.progress))))
            for group in optimizer.param_groups:
                group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


class Adversary(GeneratorMaker):
    """Raises by one step of the generator what the student, on fresh inputs for every step, brings down."""

    def make(self, student: nn.Module) -> Tensor:
        x: Tensor = self.generator(self.z())
        self.learn(-self.settings.student_loss(student(x), self.guide(x)))
        return x.detach()

    def loss(self, student: nn.Module, batch_size: int) -> Tensor:
        with torch.no_grad():
            x = self.generator(self.z(batch_size))
            told = self.guide(x)
        return self.settings.student_loss(student(x), told)


class Asker(Maker):
    """A maker that asks the teacher about every input once, and keeps the answers beside the pool for the student.

    The pool's limit is that of the memory: beyond it the oldest inputs, and their answers, give way.
    """

    def __init__(self, settings: Synthesizer, guide: Guide, form: Form, pool: Pool) -> None:
        super().__init__(settings, guide, form, pool)
        self.extra = {"told": torch.zeros(0, form.classes)}

    @abstractmethod
    def fresh(self, student: nn.Module) -> Tensor:
        """Return new inputs [B, *shape] that no query has been spent on."""

    def make(self, student: nn.Module) -> Tensor:
        x = self.fresh(student).detach()
        with torch.no_grad():
            told = self.guide(x)
        self.extra["told"] = torch.cat([self.extra["told"].to(told), told])[-self.pool.limit :]
        return x

    def loss(self, student: nn.Module, batch_size: int) -> Tensor:
        index = self.pool.pick(batch_size)
        return self.settings.student_loss(student(self.pool.x[index]), self.extra["told"][index])


@dataclass(frozen=True, kw_only=True)
class Inverter(Synthesizer):
    """A method that makes whole batches by batch-normalisation statistics, and teaches by KL at a temperature."""

    norms: ClassVar[bool] = True

    student_steps: int = 400
    batch_size: int = 256
    temperature: float = 20.0  # T of the student's loss

    def student_loss(self, said: Tensor, told: Tensor) -> Tensor:
        return self.temperature**2 * divergence(told, said, self.temperature).mean()


class Best:
    """Remembers the inputs of the least loss."""

    def __init__(self) -> None:
        self.loss = float("inf")
        self.kept: tuple[Tensor, ...] = ()

    def see(self, loss: Tensor, *tensors: Tensor) -> None:
        """Keep ``tensors`` if ``loss`` is the least so far, or the first."""
        value = float(loss.detach())
        if not self.kept or value < self.loss:
            self.loss, self.kept = value, tuple(t.detach().clone() for t in tensors)


class BatchMaker(Maker):
    """A maker of whole batches, each by a fresh generator and its noise, which learn together by Adam.

    Args:
        noise: width Z of z.
        width: of the generator.
        lr: of Adam.
        steps: of Adam per batch.
    """

    def __init__(
        self,
        settings: Synthesizer,
        guide: Guide,
        form: Form,
        pool: Pool,
        *,
        noise: int,
        width: int,
        lr: float,
        steps: int,
    ) -> None:
        super().__init__(settings, guide, form, pool)
        self.noise, self.lr, self.steps = noise, lr, steps
        self.generator = generator(form, noise, width)

    def invert(self, objective: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        """Return the inputs [B, *shape] of the least loss, and what came with them.

        ``objective``: inputs -> the loss, and what is to be remembered of them.
        """
        renew(self.generator)
        z = torch.randn(self.settings.batch_size, self.noise).requires_grad_(True)
        optimizer = torch.optim.Adam([*self.generator.parameters(), z], self.lr, betas=(0.5, 0.999))
        best = Best()
        for _ in range(self.steps):
            x = self.generator(z)
            loss, beside = objective(x)
            best.see(loss, x, beside)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return best.kept

    def student_steps(self) -> int:
        """Return the method's own number; where that is 0, one pass over the pool."""
        return self.settings.student_steps or -(-len(self.pool) // self.student_batch)


def labels(count: int, classes: int) -> Tensor:
    """Return ``count`` random classes [B]."""
    return torch.randint(classes, (count,))


def agreed(told: Tensor, said: Tensor) -> Tensor:
    """Return KL(t || s) of logits [B, C], counted where both choose one class, averaged over all of B.

    What CMI and Fast-Datafree raise: inputs on which the student is unsure of what it already gets right.
    """
    agree = (said.argmax(1) == told.argmax(1)).to(told)
    return (agree * divergence(told, said)).mean()
