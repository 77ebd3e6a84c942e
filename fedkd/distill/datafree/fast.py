"""Fast-Datafree: a meta-generator from which a few steps lead to the next batch.

G. Fang, K. Mo, X. Wang, J. Song, S. Bei, H. Zhang, M. Song, "Up to 100x Faster Data-Free Knowledge Distillation", AAAI
2022, https://arxiv.org/abs/2112.10282, eq. (4)-(8) and algorithm 1. Every epoch a copy of the meta-generator and fresh z
take k steps down

    bn · (batch-normalisation statistics) + oh · CE(T(x), y) - adv · mean(1[argmax S = argmax T] · KL(T(x) || S(x)))

and the meta-generator takes one step along the sum of the copy's gradients (first-order MAML). The best of the k batches
joins the pool. Published for CIFAR-10: bn 10, oh 0.5, adv 1.33 after a warm-up of 20 of 220 epochs in which the student
waits, k 2/5/10 with generator rates 5e-3/3e-3/2e-3 (times k for the meta step) and z 0.015/0.01/0.01, Adam (0.5, 0.999),
batch 256, 400 student steps, KL at T = 20, SGD 0.2; R34 -> R18 92.62/93.63/94.05 in .06/.14/.28 hours. The teacher needs
batch normalisation.

Deviations: plain batch statistics (theirs keep a momentum of 0.9 over batches); their reset of the first layer after 120
epochs is left out; views are mirrored only if ``flip`` says so.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.distill.datafree.base import Form, Maker
from fedkd.distill.datafree.generators import generator
from fedkd.distill.datafree.guides import Guide
from fedkd.distill.datafree.makers import Best, Inverter, agreed, labels
from fedkd.distill.datafree.pool import Pool
from fedkd.distill.datafree.views import shifted
from fedkd.distill.loop import Fit


@final
@dataclass(frozen=True, kw_only=True)
class FastDatafree(Inverter):
    """See the module text."""

    name: ClassVar[str] = "fast"
    paper: ClassVar[str] = "Fang et al., AAAI 2022"
    fit: ClassVar[Fit] = Fit(epochs=220, batch_size=256, lr=0.2, weight_decay=1e-4, schedule="cosine")

    steps: int = 5  # k
    noise: int = 256  # width of z
    width: int = 64  # of the generator
    lr: float = 3e-3  # of the copy
    noise_lr: float = 0.01  # of z
    statistics: float = 10.0  # bn
    one_hot: float = 0.5  # oh
    adversarial: float = 1.33  # adv
    warmup: float = 20 / 220  # share of the training without the adversarial term and without the student
    shift: int = 4  # pixels
    flip: bool = False

    def start(self, guide: Guide, form: Form, pool: Pool) -> Maker:
        self.check(guide)
        return _Fast(self, guide, form, pool)


class _Fast(Maker):
    settings: FastDatafree

    def __init__(self, settings: FastDatafree, guide: Guide, form: Form, pool: Pool) -> None:
        super().__init__(settings, guide, form, pool)
        self.generator = generator(form, settings.noise, settings.width)
        meta = torch.optim.Adam(self.generator.parameters(), settings.lr * settings.steps, betas=(0.5, 0.999))
        self.modules, self.optimizers = {"generator": self.generator}, {"meta": meta}

    @property
    def ready(self) -> bool:
        """Whether the warm-up is over."""
        return self.progress >= self.settings.warmup

    def make(self, student: nn.Module) -> Tensor:
        how, best = self.settings, Best()
        fast = copy.deepcopy(self.generator)
        z = torch.randn(how.batch_size, how.noise).requires_grad_(True)
        y = labels(how.batch_size, self.form.classes)
        groups: list[dict[str, Any]] = [{"params": fast.parameters()}, {"params": [z], "lr": how.noise_lr}]
        optimizer = torch.optim.Adam(groups, how.lr, betas=(0.5, 0.999))
        self.optimizers["meta"].zero_grad()
        with self.guide.statistics(how.name) as watch:
            for _ in range(how.steps):
                x = fast(z)
                view = shifted(x, how.shift, how.flip)
                told = self.guide(view)
                loss = how.statistics * watch.take() + how.one_hot * F.cross_entropy(told, y)
                if how.adversarial and self.ready:
                    loss = loss - how.adversarial * agreed(told, student(view))
                best.see(loss, x)
                optimizer.zero_grad()
                loss.backward()
                for meta, own in zip(self.generator.parameters(), fast.parameters(), strict=True):
                    if own.grad is not None:
                        meta.grad = own.grad.clone() if meta.grad is None else meta.grad + own.grad
                optimizer.step()
        self.optimizers["meta"].step()
        return best.kept[0]

    def student_steps(self) -> int:
        return self.settings.student_steps if self.ready else 0
