"""DAFL: a generator of inputs that the teacher is sure of, that excite it, and that cover all classes evenly.

H. Chen, Y. Wang, C. Xu, Z. Yang, C. Liu, B. Shi, C. Xu, C. Xu, Q. Tian, "Data-Free Learning of Student Networks", ICCV
2019, https://arxiv.org/abs/1904.01186, eq. (3)-(6). Generator:

    L = oh · CE(T(x), argmax T(x)) - a · mean |f_T(x)|_1 + ie · sum_c p_c log p_c,   p = mean over the batch of softmax T(x)

with f_T the teacher's features before its head. Student: KL(T(x) || S(x)) on the same batch. Published for MNIST: oh 1,
ie 5, a 0.1, Adam 0.2 for the generator and 2e-3 for the student, batch 512, z of 100, 200 epochs of 120 steps; LeNet-5 ->
half 98.20. The teacher needs no batch normalisation.

Deviations: |f_T|_1 is the mean over features, as in the authors' code, and the logarithm is natural (theirs has base 10).
One step of the generator is followed by one of the student on the same inputs, as in theirs; the student's term does not
reach the generator. f_T is the last hidden layer; theirs is the one after the last convolution (``features=body.8`` for
`lenet`). Their base 10 makes ie 2.17 in natural logarithms; their generator's normalisations have an epsilon of 0.8. With
`bounds=none` the generator ends in a normalisation as theirs does. At the published rate of 0.2 it can die, and the student's
loss with it, as in theirs. The published accuracy is the best of all epochs on the test set; here it is the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.distill.datafree.base import Form, Maker, Synthesizer
from fedkd.distill.datafree.guides import Guide
from fedkd.distill.datafree.makers import GeneratorMaker
from fedkd.distill.datafree.pool import Pool
from fedkd.distill.loop import Fit


@final
@dataclass(frozen=True, kw_only=True)
class DAFL(Synthesizer):
    """See the module text."""

    name: ClassVar[str] = "dafl"
    paper: ClassVar[str] = "Chen et al., ICCV 2019"
    streams: ClassVar[bool] = True
    fit: ClassVar[Fit] = Fit(epochs=200, batch_size=512, optimizer="adam", lr=2e-3, weight_decay=0.0)

    makes_per_epoch: int = 120
    student_steps: int = 1
    batch_size: int = 512
    noise: int = 100  # width of z
    width: int = 64  # of the generator
    generator_lr: float = 0.2
    one_hot: float = 1.0  # oh
    balance: float = 5.0  # ie
    activation: float = 0.1  # a
    features: str = "body"  # the teacher's layer f_T

    def start(self, guide: Guide, form: Form, pool: Pool) -> Maker:
        self.check(guide)
        return _Dafl(self, guide, form, pool, noise=self.noise, width=self.width, lr=self.generator_lr)

    def generator_loss(self, told: Tensor, features: Tensor) -> Tensor:
        """Return L for the teacher's logits [B, C] and features [B, D]."""
        sure = F.cross_entropy(told, told.argmax(1))
        share = told.softmax(1).mean(0)
        even = (share * share.clamp(min=torch.finfo(share.dtype).tiny).log()).sum()
        return self.one_hot * sure + self.balance * even - self.activation * features.flatten(1).abs().mean()


class _Dafl(GeneratorMaker):
    settings: DAFL
    x: Tensor
    told: Tensor

    def make(self, student: nn.Module) -> Tensor:
        x = self.generator(self.z())
        told, features = self.guide.read(x, self.settings.features)
        self.learn(self.settings.generator_loss(told, features))
        self.x, self.told = x.detach(), told.detach()
        return self.x

    def loss(self, student: nn.Module, batch_size: int) -> Tensor:
        return self.settings.student_loss(student(self.x), self.told)
