"""Co-Boosting: one-shot federation without data, in which inputs and ensemble improve each other.

R. Dai, Y. Zhang, A. Li, T. Liu, X. Yang, B. Han, "Enhancing One-Shot Federated Learning Through Data and Ensemble
Co-Boosting", ICLR 2024, https://arxiv.org/abs/2402.15070 (algorithm 1).

Devices train once and send their weights. D_w is the mean of their logits weighted by w, at first 1/K. In turns:

1. A fresh generator and its noise learn hard inputs, down the mean of (1 - p_y) · CE(D_w(x), y) - 9 · KL_{T=3}(D_w || S),
   where p_y is D_w's probability of y: what the ensemble is sure of counts little; 9 is T². The best batch joins the pool.
2. Through the pool, batch by batch, w <- clip(w - mu · 0.99^t · sign(gradient of CE(D_w(x), y)), 0, 1), t being the turn.
3. The student learns D_w by KL at T = 4 on the pool. Before each step inputs move by eps · sign(gradient of
   u · softmax(D_w(x) / 4)), u uniform on -1..1 for each class: they stay hard.

Published: mu 0.01, eps 8/255 of inputs between -1 and 1, Adam 1e-3 (0.5, 0.999), z of 256, student SGD 0.01 with momentum
0.9 and weight decay 1e-4, annealed by a cosine, its gradient clipped at 10, batch 128, one pass over the pool per turn. No
batch normalisation is needed, and devices may run different architectures.

As only the published code has it: logits are divided by the sum of w, the divergence that the generator raises has the
factor T², w is learnt from turn 1 on. Deviations: moved inputs stay within their bounds; w is learnt before the newest
batch joins the pool; a pass draws every batch anew; the generator's gradient is not clipped, pixels are not rounded or moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.algorithms.oneshot import OneShot
from fedkd.distill.datafree import Form, Guide, Maker, ModelsGuide, Pool, Synthesizer, divergence
from fedkd.distill.datafree.makers import BatchMaker, labels
from fedkd.distill.loop import Fit
from fedkd.errors import ConfigError


@final
@dataclass(frozen=True, kw_only=True)
class Boosting(Synthesizer):
    """How Co-Boosting makes inputs and weighs the ensemble, and what its student minimises. See the module text."""

    name: ClassVar[str] = "co_boosting"
    paper: ClassVar[str] = "Dai et al., ICLR 2024"
    fit: ClassVar[Fit] = Fit(epochs=200, batch_size=128, lr=0.01, weight_decay=1e-4, schedule="cosine", clip=10.0)

    student_steps: int = 0  # per turn; 0: one pass over the pool
    steps: int = 30  # of generator and z, per batch
    noise: int = 256  # width of z
    width: int = 64  # of the generator
    lr: float = 1e-3  # of generator and z
    hardness: float = 1.0  # power of (1 - p_y)
    adversarial: float = 1.0  # weight of the divergence that the generator raises
    adversarial_temperature: float = 3.0
    move: float = 4 / 255  # eps, as a share of the way between an input's bounds
    weight_step: float = 0.01  # mu; 0 keeps the plain mean
    weight_fade: float = 0.99  # factor of mu per turn
    temperature: float = 4.0  # T of the student's loss, and of the direction that inputs are moved in

    def start(self, guide: Guide, form: Form, pool: Pool) -> Maker:
        self.check(guide)
        if not isinstance(guide, ModelsGuide):
            raise ConfigError("co_boosting weighs the models of an ensemble, which must be at hand: use dfad")
        return _Boosting(self, guide, form, pool, noise=self.noise, width=self.width, lr=self.lr, steps=self.steps)

    def student_loss(self, said: Tensor, told: Tensor) -> Tensor:
        return self.temperature**2 * divergence(told, said, self.temperature).mean()

    def hard(self, told: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy of logits [B, C] and labels [B], each record's times (1 - p_y) ** hardness."""
        each = F.cross_entropy(told, y, reduction="none")
        return ((1 - (-each.detach()).exp()) ** self.hardness * each).mean()

    def hardship(self, told: Tensor, said: Tensor, y: Tensor) -> Tensor:
        """Return what inputs are made down: of the ensemble's and the student's logits [B, C] and the labels [B]."""
        apart = divergence(told, said, self.adversarial_temperature).mean()
        return self.hard(told, y) - self.adversarial * self.adversarial_temperature**2 * apart


def normalised(w: Tensor) -> Tensor:
    """Return weights [K] of sum 1: w over its sum, or equal ones where all of w are 0."""
    return w / w.sum() if bool(w.any()) else torch.full_like(w, 1 / len(w))


class _Boosting(BatchMaker):
    settings: Boosting
    guide: ModelsGuide

    def make(self, student: nn.Module) -> Tensor:
        how, state = self.settings, self.extra
        y = labels(how.batch_size, self.form.classes)

        def objective(x: Tensor) -> tuple[Tensor, Tensor]:
            each = self.guide.each(x)
            return how.hardship(self.guide.mix(each), student(x), y), each

        x, each = self.invert(objective)
        # What the models say of the pool, and the classes meant, in the pool's order.
        state["each"] = torch.cat([state.get("each", each[:, :0]), each], 1)[:, -self.pool.limit :]
        state["y"] = torch.cat([state.get("y", y[:0]), y])[-self.pool.limit :]
        state["turn"] = state.get("turn", torch.tensor(-1)) + 1
        if state["turn"]:
            self.weigh()
        return x

    def weigh(self) -> None:
        """Take the ensemble's weights through the pool once, batch by batch."""
        step = self.settings.weight_step * self.settings.weight_fade ** int(self.extra["turn"])
        w = self.extra.get("weights", self.guide.weights).to(self.extra["each"])
        for index in torch.randperm(len(self.extra["y"])).split(self.settings.batch_size):
            if int((w > 0).sum()) < 2:  # the shares are settled, and the slope is but rounding
                break
            w = w.clone().requires_grad_(True)
            told = (self.extra["each"][:, index] * normalised(w)[:, None, None]).sum(0)
            (slope,) = torch.autograd.grad(F.cross_entropy(told, self.extra["y"][index]), w)
            w = (w.detach() - step * slope.sign()).clamp(0, 1)
        self.extra["weights"] = w
        self.guide.weights = normalised(w)

    def restored(self) -> None:
        if "weights" in self.extra:
            self.guide.weights = normalised(self.extra["weights"])

    def loss(self, student: nn.Module, batch_size: int) -> Tensor:
        x = self.moved(self.pool.draw(min(batch_size, len(self.pool))))
        return self.settings.student_loss(student(x), self.guide(x).detach())

    def moved(self, x: Tensor) -> Tensor:
        """Return inputs [B, *shape] moved by eps to where the ensemble answers otherwise."""
        x = x.clone().requires_grad_(True)
        told = self.guide(x)
        direction = (2 * torch.rand_like(told) - 1) * (told / self.settings.temperature).softmax(1)
        (slope,) = torch.autograd.grad(direction.sum(), x)
        reach = 1.0 if self.form.low is None or self.form.high is None else self.form.high - self.form.low
        return self.form.clamp(x.detach() + self.settings.move * reach * slope.sign())


@final
@dataclass(frozen=True, kw_only=True)
class CoBoosting(OneShot):
    """Weights up once; hard inputs, a weighted ensemble and a student on the server. See the module text."""

    name: ClassVar[str] = "co_boosting"
    paper: ClassVar[str] = "Dai et al., ICLR 2024"

    make: Boosting = Boosting()
    weight_decay: float = 1e-4
    anneal: bool = True
    clip: float | None = 10.0
