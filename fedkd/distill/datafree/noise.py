"""The control beside every method: a student that learns the teacher's answers to pure noise.

Standard normal inputs; T^2 KL(t || s) at a temperature T of 4 by default, since a teacher is sure of much of the noise.
Published accuracies of this control on MNIST lie between 74.7 and 88. It asks nothing but answers, so that it serves a
black box as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from fedkd.distill.datafree.base import Form, Maker, Synthesizer, divergence
from fedkd.distill.datafree.guides import Guide
from fedkd.distill.datafree.pool import Pool
from fedkd.distill.loop import Fit


@final
@dataclass(frozen=True, kw_only=True)
class Noise(Synthesizer):
    """See the module text."""

    name: ClassVar[str] = "noise"
    paper: ClassVar[str] = "a control"
    looks_inside: ClassVar[bool] = False
    streams: ClassVar[bool] = True
    fit: ClassVar[Fit] = Fit(epochs=40, batch_size=128, lr=0.01, momentum=0.9, weight_decay=1e-4)

    makes_per_epoch: int = 50
    student_steps: int = 5
    batch_size: int = 128
    temperature: float = 4.0  # T

    def start(self, guide: Guide, form: Form, pool: Pool) -> Maker:
        self.check(guide)
        return _Noise(self, guide, form, pool)

    def queries_per_epoch(self, fit: Fit) -> int:
        first = self.batch_size if self.student_steps else 0
        return self.makes_per_epoch * (first + max(self.student_steps - 1, 0) * fit.batch_size)

    def student_loss(self, said: Tensor, told: Tensor) -> Tensor:
        return self.temperature**2 * divergence(told, said, self.temperature).mean()


class _Noise(Maker):
    def make(self, student: nn.Module) -> Tensor:
        self.x = self.form.noise(self.settings.batch_size)
        return self.x

    def loss(self, student: nn.Module, batch_size: int) -> Tensor:
        # The first step learns on what the pool may keep: else the pool's answers would cost queries of their own.
        x = self.x if len(self.x) else self.form.noise(batch_size)
        self.x = self.none()
        with torch.no_grad():
            told = self.guide(x)
        return self.settings.student_loss(student(x), told)
