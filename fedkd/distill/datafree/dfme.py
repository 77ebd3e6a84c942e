"""DFME: DFAD against a teacher that only answers, whose gradient is estimated by asking at neighbouring inputs.

J.-B. Truong, P. Maini, R. J. Walls, N. Papernot, "Data-Free Model Extraction", CVPR 2021, https://arxiv.org/abs/2011.14779.
As DFAD, a generator seeks the inputs on which student and teacher differ most in the mean absolute difference of logits,
and the student learns them. Logits are recovered from probabilities p up to a constant, which the mean fixes:

    t_c = log p_c - (1/C) · sum over c' of log p_c'

Published: batch 256, 50 turns per epoch of one step of the generator and 5 of the student, m = 1 probe of length 1e-3, z of
256, student SGD 0.1 (momentum 0.9, weight decay 5e-4), generator Adam 1e-4, both rates times 0.3 after 10, 30 and 50 % of
the epochs; 20 million queries for CIFAR-10 and 2 million for SVHN. A turn costs batch · (m + 1) + 5 · batch queries. The
scripts of the published code raise the generator's rate to 5e-4 for CIFAR-10, and its generator normalises before a tanh.

Deviations: those of :mod:`fedkd.distill.datafree.probing`; the generator is the one that all methods here share; the
generator's rate is constant, or annealed by a cosine with ``anneal``. A teacher that answers by its top-1 class alone has
no slope to be found: use `ideal`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from fedkd.distill.datafree.base import Form, Maker, Synthesizer
from fedkd.distill.datafree.guides import Guide
from fedkd.distill.datafree.makers import Adversary
from fedkd.distill.datafree.pool import Pool
from fedkd.distill.datafree.probing import ProbingGuide
from fedkd.distill.loop import Fit
from fedkd.errors import ConfigError
from fedkd.losses import absolute_error


@final
@dataclass(frozen=True, kw_only=True)
class DFME(Synthesizer):
    """See the module text."""

    name: ClassVar[str] = "dfme"
    paper: ClassVar[str] = "Truong et al., CVPR 2021"
    looks_inside: ClassVar[bool] = False
    streams: ClassVar[bool] = True
    fit: ClassVar[Fit] = Fit(
        epochs=223, batch_size=256, lr=0.1, weight_decay=5e-4, milestones=(22, 66, 111), gamma=0.3
    )  # about 20 million queries

    makes_per_epoch: int = 50
    student_steps: int = 5
    batch_size: int = 256
    noise: int = 256  # width of z
    width: int = 64  # of the generator
    generator_lr: float = 1e-4
    anneal: bool = False  # lower the generator's rate to 0 by a cosine
    probes: int = 1  # m
    step: float = 1e-3  # length of a probe

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probes < 1 or not self.step > 0:
            raise ConfigError(f"dfme needs at least 1 probe and a step above 0, got {self.probes} and {self.step}")

    def start(self, guide: Guide, form: Form, pool: Pool) -> Maker:
        asked = ProbingGuide(guide, self.probes, self.step)
        return Adversary(
            self, asked, form, pool, noise=self.noise, width=self.width, lr=self.generator_lr, anneal=self.anneal
        )

    def queries_per_epoch(self, fit: Fit) -> int:
        return self.makes_per_epoch * (self.batch_size * (self.probes + 1) + self.student_steps * fit.batch_size)

    def student_loss(self, said: Tensor, told: Tensor) -> Tensor:
        return absolute_error(said, told - told.mean(1, keepdim=True)).mean()
