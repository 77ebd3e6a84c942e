"""CMI: inversion by a fresh generator per batch, with a contrastive term that keeps inputs apart from each other.

G. Fang, J. Song, X. Wang, C. Shen, X. Wang, M. Song, "Contrastive Model Inversion for Data-Free Knowledge Distillation",
IJCAI 2021, https://arxiv.org/abs/2105.08584, eq. (1)-(9). For every batch generator and z are optimised together:

    bn · (batch-normalisation statistics) + oh · CE(T(x), y) - adv · mean(1[argmax S = argmax T] · KL(T(x) || S(x)))
    + cr · L_cr
    L_cr = -log ( exp(<h(x1), h(x2)> / tau) / sum over others exp(<h(x1), h(x')> / tau) )

x1, x2 are two views of one input (zoomed and shifted); h is a two-layer head, trained along, on the means over positions of
what enters the teacher's batch normalisations; the others are the batch and a bank of earlier inputs. Published for
CIFAR-10: 200 steps of Adam 1e-3 (0.5, 0.999), bn 1, oh 1, adv 0.5, cr 0.8, tau 0.2, bank 40,960 of which 4,096 are drawn,
batch 256, 400 student steps per batch, KL at T = 20, SGD 0.1; R34 -> R18 94.84 [as listed in a public comparison]. The
teacher needs batch normalisation.

Deviations: the indicator follows the authors' code, which pushes inputs on which both agree; the teacher's features of the
shifted view are taken from the forward pass of the inversion terms; views are mirrored only if ``flip`` says so;
the head has 128 units (theirs for CIFAR-10: 256), the rate follows a cosine (theirs: three steps), and the student sees
inputs as they were made (theirs: cropped, mirrored and in whole pixels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.distill.datafree.base import Form, Maker
from fedkd.distill.datafree.generators import generator, renew
from fedkd.distill.datafree.guides import Guide
from fedkd.distill.datafree.makers import Best, Inverter, agreed, labels
from fedkd.distill.datafree.pool import Pool
from fedkd.distill.datafree.views import shifted, zoomed
from fedkd.distill.loop import Fit


@final
@dataclass(frozen=True, kw_only=True)
class CMI(Inverter):
    """See the module text."""

    name: ClassVar[str] = "cmi"
    paper: ClassVar[str] = "Fang et al., IJCAI 2021"
    fit: ClassVar[Fit] = Fit(epochs=200, batch_size=256, lr=0.1, weight_decay=1e-4, schedule="cosine")

    steps: int = 200  # of generator and z, per batch
    noise: int = 256  # width of z
    width: int = 64  # of the generator
    lr: float = 1e-3  # of generator, z and head
    statistics: float = 1.0  # bn
    one_hot: float = 1.0  # oh
    adversarial: float = 0.5  # adv
    contrast: float = 0.8  # cr
    tau: float = 0.2
    bank: int = 40_960
    others: int = 4_096  # drawn from the bank
    head: int = 128  # width of h
    shift: int = 4  # pixels
    zoom: float = 0.25  # least share of the area
    flip: bool = False

    def start(self, guide: Guide, form: Form, pool: Pool) -> Maker:
        self.check(guide)
        return _Cmi(self, guide, form, pool)


class _Cmi(Maker):
    settings: CMI

    def __init__(self, settings: CMI, guide: Guide, form: Form, pool: Pool) -> None:
        super().__init__(settings, guide, form, pool)
        with guide.statistics(settings.name, means=True) as watch, torch.no_grad():
            guide(form.noise(2))
            size = watch.features().shape[1]
        self.generator = generator(form, settings.noise, settings.width)
        self.head = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, settings.head))
        self.modules = {"head": self.head}
        self.optimizers = {"head": torch.optim.Adam(self.head.parameters(), settings.lr)}
        self.extra = {"bank": torch.zeros(0, 2, size)}

    def make(self, student: nn.Module) -> Tensor:
        how, best = self.settings, Best()
        renew(self.generator)
        z = torch.randn(how.batch_size, how.noise).requires_grad_(True)
        y = labels(how.batch_size, self.form.classes)
        optimizer = torch.optim.Adam([*self.generator.parameters(), z], how.lr, betas=(0.5, 0.999))
        with self.guide.statistics(how.name, means=True) as watch:
            for _ in range(how.steps):
                x = self.generator(z)
                view = shifted(x, how.shift, how.flip)
                told = self.guide(view)
                loss = how.statistics * watch.take() + how.one_hot * F.cross_entropy(told, y)
                whole = watch.features()
                if how.adversarial:
                    loss = loss - how.adversarial * agreed(told, student(view))
                self.guide(zoomed(x, how.zoom, how.flip))
                watch.take()  # the statistics of a zoomed view are not asked for
                part = watch.features()
                loss = loss + how.contrast * self.contrast(part, whole)
                best.see(loss, x, torch.stack([part, whole], 1))
                optimizer.zero_grad()
                self.optimizers["head"].zero_grad()
                loss.backward()
                optimizer.step()
                self.optimizers["head"].step()
        self.extra["bank"] = torch.cat([self.extra["bank"], best.kept[1]])[-how.bank :]
        return best.kept[0]

    def contrast(self, part: Tensor, whole: Tensor) -> Tensor:
        """Return L_cr for the features [B, D] of two views, against each other and the bank.

        The targets carry no gradient. Inputs of the bank are contrasted too, so that the head stays true to them.
        """
        how, bank, count = self.settings, self.extra["bank"], len(part)
        if len(bank):
            bank = bank[torch.randperm(len(bank))[: how.others]]
            part, whole = torch.cat([part, bank[:, 0]]), torch.cat([whole, bank[:, 1]])
        left, right = (F.normalize(self.head(f), dim=1) for f in (part, whole))
        scores = left @ right.detach().T / how.tau
        each = F.cross_entropy(scores, torch.arange(len(scores)), reduction="none")
        return each[:count].mean() + (each[count:].mean() if len(each) > count else 0.0)
