"""FedFTG: the averaged model is fine-tuned on the server with hard inputs that nobody's data went into.

L. Zhang, L. Shen, L. Ding, D. Tao, L.-Y. Duan, "Fine-tuning Global Model via Data-Free Knowledge Distillation for Non-IID
Federated Learning", CVPR 2022, https://arxiv.org/abs/2203.09249 (algorithms 1-2).

Devices train from the server's weights and send theirs, and how many records n_ky of each class they hold. The server
averages the weights, then takes ``makes_per_epoch`` turns. In each, classes y are drawn by their share of all records, and
with a_ky = n_ky / sum_k n_ky a generator G(z, y) takes a step down

    - L_md + lambda_cls · sum_k a_ky CE(D_k(G(z, y)), y) + lambda_dis · exp(-mean over pairs of |x - x'| · |z - z'|)
    L_md = mean of sum_k a_ky KL(D_k(x) || D(x))

(hard inputs of the right class, apart from each other), and the averaged model D five steps down L_md / C on the same z and
y, C being the number of classes. Published for CIFAR-10: 10 turns of 1 and 5 steps, batch 50, z of 100, Adam 0.01 for G, SGD
0.1 with weight decay 1e-3 for D, both rates times 0.998 each round, lambda_cls = lambda_dis = 1.

As the published code has it: D learns the devices' probabilities by cross-entropy, which is KL with the devices first, and
the mean is over classes too (hence 1 / C); |x - x'| is the mean absolute difference, |z - z'| the mean squared one.
Deviations from that code: it raises the mean absolute difference of logits where L_md stands for G, and lets G take one step
per device rather than one down the sum, which reaches it through the average alone; its Adam begins anew in every round; the
generator here is the one that all methods share, given one-hot classes beside z. D is in training mode on the server, as
there, so that its batch normalisation goes on with the statistics of what was made.
FedAvg is the method that is fine-tuned; the paper does the same to others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.algorithms.base import ServerState, ServerTools, with_model
from fedkd.algorithms.counted import CountedAveraging, apart, shares
from fedkd.distill.datafree import DataFree, Form, Guide, Maker, ModelsGuide, Pool, Synthesizer, divergence
from fedkd.distill.datafree.makers import GeneratorMaker
from fedkd.distill.loop import Fit, below
from fedkd.losses import cross_entropy
from fedkd.payloads import Payload, Weights


@final
@dataclass(frozen=True, kw_only=True)
class Hard(Synthesizer):
    """How FedFTG makes inputs. Its guide's weights are the counts of labels [K, C]."""

    name: ClassVar[str] = "fedftg"
    paper: ClassVar[str] = "Zhang et al., CVPR 2022"
    streams: ClassVar[bool] = True

    makes_per_epoch: int = 10  # I, turns per round
    student_steps: int = 5  # I_d
    batch_size: int = 50
    generator_steps: int = 1  # I_g
    noise: int = 100  # width of z
    width: int = 64  # of the generator
    lr: float = 0.01  # of the generator
    classes: float = 1.0  # lambda_cls
    diversity: float = 1.0  # lambda_dis

    def start(self, guide: Guide, form: Form, pool: Pool) -> Maker:
        return _Hard(self, guide, form, pool, noise=self.noise + form.classes, width=self.width, lr=self.lr)


class _Hard(GeneratorMaker):
    settings: Hard
    guide: ModelsGuide
    x: Tensor
    y: Tensor
    each: Tensor

    def draw(self) -> tuple[Tensor, Tensor]:
        """Return noise [B, Z], and classes [B] by their share of all records."""
        y = torch.multinomial(self.guide.weights.sum(0), self.settings.batch_size, replacement=True)
        return torch.randn(self.settings.batch_size, self.settings.noise), y

    def discrepancy(self, each: Tensor, said: Tensor, y: Tensor) -> Tensor:
        """Return L_md of the devices' logits [K, B, C] and the model's [B, C]."""
        found: Tensor = (shares(self.guide.weights)[:, y] * divergence(each, said)).sum(0).mean()
        return found

    def make(self, student: nn.Module) -> Tensor:
        how, (z, y) = self.settings, self.draw()
        given = torch.cat([z, F.one_hot(y, self.form.classes).to(z)], 1)
        for _ in range(how.generator_steps):
            x = self.generator(given)
            each = self.guide.each(x)
            right = torch.stack([cross_entropy(logits, y) for logits in each])  # [K, B]
            far = torch.cdist(x.flatten(1), x.flatten(1), p=1) / x[0].numel() * torch.cdist(z, z).square() / how.noise
            loss = how.classes * (shares(self.guide.weights)[:, y] * right).sum(0).mean()
            loss = loss + how.diversity * torch.exp(-far.mean())
            self.learn(loss - self.discrepancy(each, student(x), y))
        with torch.no_grad():
            x = self.generator(given)
            self.x, self.y, self.each = x, y, self.guide.each(x)
        return self.x

    def loss(self, student: nn.Module, batch_size: int) -> Tensor:
        return self.discrepancy(self.each, student(self.x), self.y) / self.form.classes


@final
@dataclass(frozen=True, kw_only=True)
class FedFTG(CountedAveraging):
    """FedAvg, fine-tuned on hard inputs by the devices that know their class. See the module text."""

    name: ClassVar[str] = "fedftg"
    paper: ClassVar[str] = "Zhang et al., CVPR 2022"

    make: Hard = Hard()
    lr: float = 0.1  # of the averaged model
    weight_decay: float = 1e-3
    fade: float = 0.998  # factor of both rates per round

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        mean, models, counts = apart(knowledge)
        name, fade = server.models["student"][0], self.fade ** (server.round - 1)
        work = DataFree(
            tools.module(name, mean),
            ModelsGuide([tools.module(name, tensors) for tensors in models], counts),
            replace(self.make, lr=self.make.lr * fade),
            Form.within(tools.shape, tools.classes, tools.bounds),
            fit=Fit(epochs=1, lr=self.lr * fade, momentum=0.0, weight_decay=self.weight_decay),
            seed=tools.seed("generator"),
        )
        if below(server.memory, "module|"):
            work.remember(server.memory)
        work.run()
        taught = work.taught()
        server = with_model(server, "student", name, taught)
        return replace(server, knowledge=Weights.from_tensors(taught), memory={**server.memory, **work.memory()})
