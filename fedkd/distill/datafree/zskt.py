"""ZSKT: a generator seeks the inputs of the greatest divergence, the student learns them ten times.

P. Micaelli, A. Storkey, "Zero-shot Knowledge Transfer via Adversarial Belief Matching", NeurIPS 2019,
https://arxiv.org/abs/1905.09768, algorithm 1 and eq. (1)-(2). One step of the generator up KL(T(x) || S(x)), then ten of
the student, on inputs of the same z, down

    L = KL(T(x) || S(x)) / C + beta · sum over layers of the mean squared difference of attention maps

(channel means of squares, scaled to length 1). As the published code has it, the divergence is averaged over the C classes
too, beside which beta counts. Published: beta 250, Adam 2e-3 for the student and 1e-3 for the generator, both annealed by a
cosine, the student's gradient cut at length 5, batch 128, z of 100, temperature 1, 80,000 turns; CIFAR-10 R34 -> R18 93.32
in a public re-run. The teacher needs no batch normalisation.

Deviations: attention maps are compared only where ``layers`` are named, since architectures differ; the generator is the
one that all methods here share, and its gradient is not cut; by default 2,000 turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from fedkd.distill.datafree.base import Form, Maker, Synthesizer, divergence
from fedkd.distill.datafree.guides import Guide
from fedkd.distill.datafree.makers import GeneratorMaker
from fedkd.distill.datafree.pool import Pool
from fedkd.distill.loop import Fit
from fedkd.distill.taps import Taps
from fedkd.errors import ConfigError
from fedkd.losses import AttentionTransfer


@final
@dataclass(frozen=True, kw_only=True)
class ZSKT(Synthesizer):
    """See the module text."""

    name: ClassVar[str] = "zskt"
    paper: ClassVar[str] = "Micaelli & Storkey, NeurIPS 2019"
    streams: ClassVar[bool] = True
    fit: ClassVar[Fit] = Fit(
        epochs=40, batch_size=128, optimizer="adam", lr=2e-3, weight_decay=0.0, schedule="cosine", clip=5.0
    )

    makes_per_epoch: int = 50
    student_steps: int = 10  # n_S
    batch_size: int = 128
    noise: int = 100  # width of z
    width: int = 64  # of the generator
    generator_lr: float = 1e-3
    attention: float = 250.0  # beta
    layers: tuple[str, ...] = ()  # of teacher and student, such as body.1; none: no attention term

    def start(self, guide: Guide, form: Form, pool: Pool) -> Maker:
        self.check(guide)
        return _Zskt(self, guide, form, pool, noise=self.noise, width=self.width, lr=self.generator_lr, anneal=True)


class _Zskt(GeneratorMaker):
    settings: ZSKT
    x: Tensor
    told: Tensor

    def make(self, student: nn.Module) -> Tensor:
        z = self.z()
        x = self.generator(z)
        self.learn(-divergence(self.guide(x), student(x)).mean())
        with torch.no_grad():
            self.x = self.generator(z)
            self.told, self.maps = self.guide.layers(self.x, self.settings.layers)
        return self.x

    def loss(self, student: nn.Module, batch_size: int) -> Tensor:
        layers = self.settings.layers
        with Taps(student, layers) as taps:
            said = student(self.x)
            loss: Tensor = self.settings.student_loss(said, self.told) / said.shape[1]
            for path in layers:
                try:
                    apart = [AttentionTransfer()(taps[path], maps[path]) for maps in self.maps]
                except ValueError as cause:
                    raise ConfigError(f"zskt.layers names {path}, which does not serve: {cause}") from cause
                loss = loss + self.settings.attention * torch.stack(apart).mean()
        return loss
