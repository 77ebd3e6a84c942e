"""DeepInversion: pixels are optimised until the teacher names the class and its batch normalisation sees what it knows.

H. Yin, P. Molchanov, Z. Li, J. M. Alvarez, A. Mallya, D. Hoiem, N. K. Jha, J. Kautz, "Dreaming to Distill: Data-free
Knowledge Transfer via DeepInversion", CVPR 2020, https://arxiv.org/abs/1912.08795, eq. (2)-(6). Over a batch x:

    CE(T(x), y) + bn · sum over layers (||mean(x) - E||_2 + ||var(x) - V||_2) + tv · TV(x) + l2 · ||x||_2
    - adv · JS(T(x), S(x))                                             (adaptive DeepInversion: student and teacher compete)

Defaults are those of a public comparison on CIFAR-10: 1,000 steps of Adam at 0.1 (0.5, 0.99), bn 10, tv 1e-5, l2 0, adv 1,
JS at temperature 3, batch 256, then 400 steps of the student per batch by KL at T = 20, SGD 0.1, 200 epochs; R34 -> R18
93.26 there (the paper runs 2,000 steps). The teacher needs batch normalisation.

Deviations: the pool starts empty and grows by a batch per epoch, as in that comparison; its term on the student's own
statistics (0.001 times theirs, which it subtracts) is left out; pixels start uniform within their bounds; views are rolled by
``shift`` pixels where it takes an eighth of the side, and mirrored only if ``flip`` says so, because digits and letters are
not themselves in a mirror.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.distill.datafree.base import Form, Maker
from fedkd.distill.datafree.guides import Guide
from fedkd.distill.datafree.makers import Best, Inverter, labels
from fedkd.distill.datafree.pool import Pool
from fedkd.distill.datafree.views import rolled, roughness
from fedkd.distill.loop import Fit
from fedkd.losses import BetaJensenShannon


@final
@dataclass(frozen=True, kw_only=True)
class DeepInversion(Inverter):
    """See the module text."""

    name: ClassVar[str] = "deepinversion"
    paper: ClassVar[str] = "Yin et al., CVPR 2020"
    fit: ClassVar[Fit] = Fit(epochs=200, batch_size=256, lr=0.1, weight_decay=1e-4, schedule="cosine")

    steps: int = 1000  # of Adam, per batch
    lr: float = 0.1  # of the pixels
    statistics: float = 10.0  # bn
    variation: float = 1e-5  # tv
    size: float = 0.0  # l2
    adversarial: float = 1.0  # adv
    shift: int = 3  # pixels by which views are rolled
    flip: bool = False

    def start(self, guide: Guide, form: Form, pool: Pool) -> Maker:
        self.check(guide)
        return _Inversion(self, guide, form, pool)


class _Inversion(Maker):
    settings: DeepInversion

    def make(self, student: nn.Module) -> Tensor:
        how, best = self.settings, Best()
        if self.form.low is None or self.form.high is None:
            x = self.form.noise(how.batch_size)
        else:
            x = self.form.low + (self.form.high - self.form.low) * torch.rand(how.batch_size, *self.form.shape)
        x.requires_grad_(True)
        y = labels(how.batch_size, self.form.classes)
        optimizer = torch.optim.Adam([x], how.lr, betas=(0.5, 0.99))
        with self.guide.statistics(how.name) as watch:
            for _ in range(how.steps):
                view = rolled(x, how.shift, how.flip)
                told = self.guide(view)
                loss = F.cross_entropy(told, y) + how.statistics * watch.take()
                loss = loss + how.variation * roughness(x) + how.size * x.norm()
                if how.adversarial:
                    loss = loss - how.adversarial * between(told, student(view), 3.0)
                best.see(loss, x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                with torch.no_grad():
                    x.copy_(self.form.clamp(x))
        return best.kept[0]


def between(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Return the mean Jensen-Shannon divergence of softmax(logits/T) [B, C] of two models."""
    return BetaJensenShannon(temperature=temperature)(one, other)
