"""IDEAL: a generator that learns from the student alone makes the inputs, and each is asked of the teacher once.

J. Zhang, C. Chen, L. Lyu, "IDEAL: Query-Efficient Data-Free Learning from Black-Box Models", ICLR 2023,
https://arxiv.org/abs/2205.11158. In every round a fresh generator and its noise z are optimised for one batch, by no query,

    CE(S(x), y) + info · mean over inputs and classes of p log p,   p = softmax S(x)

with classes y in equal shares: inputs that the student takes for every class, and yet is not sure of. The batch of the
least loss joins the pool, is answered by the teacher once, and the student learns on the whole pool. Answers may be soft
labels or the top-1 class alone: KL(T(x) || S(x)) is the cross-entropy for the latter.

Published for MNIST, by the authors' code: 100 rounds of a batch of 250 (25,000 inputs), 30 steps of Adam 1e-3 (0.5, 0.999)
on the generator, info 5, z of 256, inputs shifted by up to 4 pixels before the student sees them, one pass over the pool
per round by SGD 0.01 (momentum 0.9, weight decay 5e-4) with batches of 256.

Deviations: the generator normalises its values before the last sigmoid, since it learns every batch anew in few steps, and
batches without contrast teach little; views are mirrored only if ``flip`` says so; z stays as it was drawn, as in the
authors' code; an input keeps the answer that it got, while theirs asks about a changed view of it in every pass, which a
service would charge. Passes of the student grow with the pool and are cut at ``most_steps``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.distill.datafree.base import Form, Maker, Synthesizer, divergence
from fedkd.distill.datafree.generators import generator, renew
from fedkd.distill.datafree.guides import Guide
from fedkd.distill.datafree.makers import Asker, Best
from fedkd.distill.datafree.pool import Pool
from fedkd.distill.datafree.views import shifted
from fedkd.distill.loop import Fit
from fedkd.errors import ConfigError


@final
@dataclass(frozen=True, kw_only=True)
class IDEAL(Synthesizer):
    """See the module text."""

    name: ClassVar[str] = "ideal"
    paper: ClassVar[str] = "Zhang et al., ICLR 2023"
    looks_inside: ClassVar[bool] = False
    fit: ClassVar[Fit] = Fit(epochs=100, batch_size=256, lr=0.01, momentum=0.9, weight_decay=5e-4)

    student_steps: int = 1  # at least, after every batch of inputs
    most_steps: int = 100  # at most
    passes: float = 1.0  # over the pool, after every batch of inputs
    batch_size: int = 250
    steps: int = 30  # of the generator, per batch
    noise: int = 256  # width of z
    width: int = 64  # of the generator
    generator_lr: float = 1e-3
    info: float = 5.0
    temperature: float = 1.0  # T of the student's loss
    shift: int = 4  # pixels
    flip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student_steps > self.most_steps:
            raise ConfigError(
                f"ideal.student_steps is {self.student_steps}, expected at most most_steps, {self.most_steps}"
            )

    def start(self, guide: Guide, form: Form, pool: Pool) -> Maker:
        return _Ideal(self, guide, form, pool)

    def queries_per_epoch(self, fit: Fit) -> int:
        return self.makes_per_epoch * self.batch_size

    def student_loss(self, said: Tensor, told: Tensor) -> Tensor:
        return self.temperature**2 * divergence(told, said, self.temperature).mean()

    def generator_loss(self, said: Tensor, y: Tensor) -> Tensor:
        """Return the loss of inputs with the student's logits [B, C] and wanted classes y [B]."""
        log_p = said.log_softmax(1)
        return F.cross_entropy(said, y) + self.info * (log_p.exp() * log_p).mean()


class _Ideal(Asker):
    settings: IDEAL

    def __init__(self, settings: IDEAL, guide: Guide, form: Form, pool: Pool) -> None:
        super().__init__(settings, guide, form, pool)
        self.generator = generator(form, settings.noise, settings.width, even=True)

    def student_steps(self) -> int:
        how = self.settings
        wanted = round(how.passes * len(self.pool) / self.student_batch)
        return min(max(wanted, how.student_steps), how.most_steps)

    def fresh(self, student: nn.Module) -> Tensor:
        how, best = self.settings, Best()
        renew(self.generator)
        z = torch.randn(how.batch_size, how.noise)
        y = torch.arange(how.batch_size) % self.form.classes
        optimizer = torch.optim.Adam(self.generator.parameters(), how.generator_lr, betas=(0.5, 0.999))
        for _ in range(how.steps):
            x = self.generator(z)
            loss = how.generator_loss(student(shifted(x, how.shift, how.flip)), y)
            best.see(loss, x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return best.kept[0]
