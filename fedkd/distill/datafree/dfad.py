"""DFAD: a generator seeks the inputs on which student and teacher differ most, the student learns them.

G. Fang, J. Song, C. Shen, X. Wang, D. Chen, M. Song, "Data-Free Adversarial Distillation", 2019,
https://arxiv.org/abs/1912.11006.

The student minimises and the generator maximises the mean absolute difference of logits, eq. (5)-(6):

    L = mean over inputs and classes of |T(G(z)) - S(G(z))|

in turns of k = 5 steps of the student and one of the generator. Published for MNIST: batch 512, 40 epochs of 50 turns,
z of 100, student SGD 0.01 (momentum 0.9, weight decay 1e-4), generator Adam 1e-3, width 64; LeNet-5 -> half 98.3±.2.
The teacher needs no batch normalisation.

The published figures are the means of the best epoch of every run on the test set; here it is the last epoch. The
published generator ends in a normalisation, on inputs that are scaled to mean 0 and deviation 1: that is `bounds=none`.

Deviations: the student is in evaluation mode while the generator learns, and a turn begins with the generator's step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from fedkd.distill.datafree.base import Form, Maker, Synthesizer
from fedkd.distill.datafree.guides import Guide
from fedkd.distill.datafree.makers import Adversary
from fedkd.distill.datafree.pool import Pool
from fedkd.distill.loop import Fit
from fedkd.losses import absolute_error


@final
@dataclass(frozen=True, kw_only=True)
class DFAD(Synthesizer):
    """See the module text."""

    name: ClassVar[str] = "dfad"
    paper: ClassVar[str] = "Fang et al. 2019"
    streams: ClassVar[bool] = True
    fit: ClassVar[Fit] = Fit(epochs=40, batch_size=512, lr=0.01, momentum=0.9, weight_decay=1e-4)

    makes_per_epoch: int = 50
    student_steps: int = 5  # k
    batch_size: int = 512
    noise: int = 100  # width of z
    width: int = 64  # of the generator
    generator_lr: float = 1e-3
    anneal: bool = False  # lower the generator's rate to 0 by a cosine

    def start(self, guide: Guide, form: Form, pool: Pool) -> Maker:
        self.check(guide)
        return Adversary(
            self, guide, form, pool, noise=self.noise, width=self.width, lr=self.generator_lr, anneal=self.anneal
        )

    def student_loss(self, said: Tensor, told: Tensor) -> Tensor:
        return absolute_error(said, told).mean()
