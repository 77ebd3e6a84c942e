"""DENSE: one-shot federation without data.

J. Zhang, C. Chen, B. Li, L. Lyu, S. Wu, S. Ding, C. Shen, C. Wu, "DENSE: Data-Free One-Shot Federated Learning", NeurIPS
2022, https://arxiv.org/abs/2112.12371 (algorithm 1).

Devices train once and send their weights. The server alternates between two stages. A fresh generator and its noise z are
trained together down

    CE(D(x), y) + lambda_1 · (batch-normalisation statistics) - lambda_2 · mean(1[argmax S != argmax D] · KL(D || S))

with D the mean of the devices' logits, S the student's and y random classes: inputs of the right class, like the data, and
between the two models' boundaries. The best batch joins a growing pool, on which the student learns D by KL at temperature
T. Published: 200 epochs of 30 Adam steps 1e-3 (0.5, 0.999) on batches of 256, z of 256, lambda_1 = lambda_2 = 1, T = 20,
student SGD 0.005 with momentum 0.9, one pass over the pool per epoch. Devices may run different architectures. Its
published net for MNIST is a CNN with batch normalisation, which the statistics need.

The published code starts the student from random weights, as is done here, and not from the devices' mean. Deviations: the
statistics are the mean over devices (the paper; the published code sums them); where devices have no batch normalisation,
``make.statistics=0`` leaves that term out; views of inputs are not shifted or mirrored, and the pool is not rounded to whole
pixels; a pass over the pool draws every batch anew (theirs shuffles); classes are not sorted within a batch; D's logits of
the pool are kept, not computed anew.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.algorithms.oneshot import OneShot
from fedkd.distill.datafree import Form, Guide, Maker, Pool, divergence
from fedkd.distill.datafree.makers import Asker, BatchMaker, Inverter, labels
from fedkd.distill.loop import Fit
from fedkd.errors import ConfigError


@final
@dataclass(frozen=True, kw_only=True)
class Boundary(Inverter):
    """How DENSE makes inputs, and what its student minimises. See the module text."""

    name: ClassVar[str] = "dense"
    paper: ClassVar[str] = "Zhang et al., NeurIPS 2022"
    fit: ClassVar[Fit] = Fit(epochs=200, batch_size=256, lr=0.005, momentum=0.9, weight_decay=0.0)

    student_steps: int = 0  # per epoch; 0: one pass over the pool
    steps: int = 30  # of generator and z, per batch
    noise: int = 256  # width of z
    width: int = 64  # of the generator
    lr: float = 1e-3  # of generator and z
    statistics: float = 1.0  # lambda_1
    adversarial: float = 1.0  # lambda_2

    def start(self, guide: Guide, form: Form, pool: Pool) -> Maker:
        self.check(guide)
        return _Boundary(self, guide, form, pool, noise=self.noise, width=self.width, lr=self.lr, steps=self.steps)

    def check(self, guide: Guide) -> None:
        if not self.statistics and guide.differentiable:
            return
        try:
            super().check(guide)
        except ConfigError as cause:
            raise ConfigError(f"{cause}; or leave that term out (statistics=0)") from cause


def boundary(told: Tensor, said: Tensor) -> Tensor:
    """Return KL(t || s) of logits [B, C], counted where the two choose different classes, averaged over all of B."""
    apart = (said.argmax(1) != told.argmax(1)).to(told)
    return (apart * divergence(told, said)).mean()


class _Boundary(BatchMaker, Asker):
    settings: Boundary

    def fresh(self, student: nn.Module) -> Tensor:
        how = self.settings
        y = labels(how.batch_size, self.form.classes)
        with self.guide.statistics(how.name) if how.statistics else contextlib.nullcontext() as watch:

            def objective(x: Tensor) -> tuple[Tensor, Tensor]:
                told = self.guide(x)
                loss = F.cross_entropy(told, y) - how.adversarial * boundary(told, student(x))
                return loss if watch is None else loss + how.statistics * watch.take(), told

            return self.invert(objective)[0]


@final
@dataclass(frozen=True, kw_only=True)
class DENSE(OneShot):
    """Weights up once; a generator and a student on the server. See the module text."""

    name: ClassVar[str] = "dense"
    paper: ClassVar[str] = "Zhang et al., NeurIPS 2022"

    make: Boundary = Boundary()
    batch_size: int = 256
    lr: float = 0.005
