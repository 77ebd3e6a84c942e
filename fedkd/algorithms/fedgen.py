"""FedGen: a generator of features tells every device what the others know.

Z. Zhu, J. Hong, J. Zhou, "Data-Free Knowledge Distillation for Heterogeneous Federated Learning", ICML 2021,
https://arxiv.org/abs/2105.10056 (algorithm 1, eq. (4)-(6)).

Beside its weights, which are averaged, a device sends how many records of each class it holds. The server trains a generator
of features G(e, y), e uniform noise, against the heads of the devices that answered:

    mean over y of sum_k w_ky · NLL(head_k(G(e, y)), y) + exp(-mean of |e - e'|^2 · |G - G'|),   w_ky = n_ky / sum_k n_ky

and sends it down with the weights. From round 1 on a device minimises, y' being random classes,

    CE + 0.98^round · (alpha · NLL(head(G(e', y')), y') + beta · KL(head(G(e, y)) || f(x))).

Published for MNIST: e of 32, one hidden layer of 256 with BN, 50 steps of Adam 3e-4 with weight decay 1e-2 a round, its rate
times 0.98 each round, batch 32, alpha = beta = 10; 91.30 / 93.03 / 95.52 at Dirichlet 0.05 / 0.1 / 1 (Table 1).

Deviations: y' is uniform over all classes; a device draws ``bank`` e, e' and y' a round, one for a record's position each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor, nn

from fedkd.algorithms.base import Batch, DeviceState, DeviceTools, Heard, ServerState, ServerTools, Shapes, with_model
from fedkd.algorithms.counted import CountedAveraging, apart, part, shares
from fedkd.distill.datafree import DataFree, Form, Guide, LatentGenerator, Maker, ModelsGuide, Pool, Synthesizer
from fedkd.distill.loop import Fit, below
from fedkd.losses import cross_entropy, kl_divergence
from fedkd.payloads import Bundle, Contract, Payload, Weights

if TYPE_CHECKING:
    from fedkd.algorithms.base import Tensors
    from fedkd.nets import Net


@final
@dataclass(frozen=True, kw_only=True)
class Latent(Synthesizer):
    """How FedGen's generator learns. Its inputs are features, its teachers heads, and no student learns meanwhile."""

    name: ClassVar[str] = "fedgen"
    paper: ClassVar[str] = "Zhu et al., ICML 2021"

    makes_per_epoch: int = 50  # steps per round
    student_steps: int = 0
    batch_size: int = 32
    noise: int = 32  # width of e
    width: int = 256  # of the hidden layer
    lr: float = 3e-4
    weight_decay: float = 1e-2
    diversity: float = 1.0  # weight of the second term

    def start(self, guide: Guide, form: Form, pool: Pool) -> Maker:
        return _Latent(self, guide, form, pool)


class _Latent(Maker):
    settings: Latent
    guide: ModelsGuide

    def __init__(self, settings: Latent, guide: Guide, form: Form, pool: Pool) -> None:
        super().__init__(settings, guide, form, pool)
        self.made = LatentGenerator(settings.noise, form.classes, form.shape[0], settings.width)
        self.adam = torch.optim.Adam(self.made.parameters(), settings.lr, weight_decay=settings.weight_decay)
        self.modules, self.optimizers = {"generator": self.made}, {"generator": self.adam}

    def make(self, student: nn.Module) -> Tensor:
        how, held = self.settings, self.guide.weights.sum(0).nonzero().squeeze(1)
        y = held[torch.randint(len(held), (how.batch_size,))]
        made = self.made(e := torch.rand(how.batch_size, how.noise), y)
        each = torch.stack([cross_entropy(logits, y) for logits in self.guide.each(made)])  # [K, B]
        far = (e[:, None] - e).square().mean(2) * (made[:, None] - made).abs().mean(2)  # [B, B]
        loss = (self.guide.weights[:, y] * each).sum(0).mean() + how.diversity * torch.exp(-far.mean())
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return self.none()


@final
@dataclass(frozen=True, kw_only=True)
class FedGen(CountedAveraging):
    """FedAvg, with a generator of features as a teacher of every device. See the module text."""

    name: ClassVar[str] = "fedgen"
    paper: ClassVar[str] = "Zhu et al., ICML 2021"
    download: ClassVar[type[Payload]] = Bundle
    features: ClassVar[bool] = True

    make: Latent = Latent()
    alpha: float = 10.0  # weight of the classes of made features
    beta: float = 10.0  # weight of what the head says of them
    fade: float = 0.98  # factor of both, and of the generator's rate, per round
    bank: int = 256  # draws of noise and class on a device, per round

    def start(self, state: DeviceState, heard: Heard, tools: DeviceTools) -> DeviceState:
        rng = torch.Generator().manual_seed(tools.seed("noise"))
        noise = torch.rand(2, self.bank, self.make.noise, generator=rng, dtype=tools.dtype)
        memory = {"noise": noise, "labels": torch.randint(tools.classes, (self.bank,), generator=rng)}
        return replace(state, models={"model": part(heard.knowledge, "model")}, memory=memory)

    def private_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        loss = batch.mean(cross_entropy(logits := net(batch), batch.labels))
        if heard.round == 0:  # the generator knows nothing yet
            return loss
        made, tensors, place = LatentGenerator.function, part(heard.knowledge, "generator"), batch.index % self.bank
        noise, drawn = heard.memory["noise"][:, place], heard.memory["labels"][place]
        told = net.head(made(tensors, noise[0], batch.labels)).softmax(-1).detach()
        said = net.head(made(tensors, noise[1], drawn))
        more = self.beta * kl_divergence(logits, told) + self.alpha * cross_entropy(said, drawn)
        return loss + self.fade**heard.round * batch.mean(more)

    def finish(self, state: DeviceState, answer: Payload, heard: Heard) -> DeviceState:
        return replace(state, memory={})

    def contract_down(self, shapes: Shapes) -> Contract:
        with torch.device("meta"):
            generator = LatentGenerator(self.make.noise, shapes.classes, shapes.features or 1, self.make.width)
        parts = {"model": shapes.weights, "generator": generator.state_dict()}
        return Contract.bundle({name: Contract.of(Weights, shapes.dims, tensors) for name, tensors in parts.items()})

    def begin(self, server: ServerState, tools: ServerTools) -> ServerState:
        return self._told(server, self._work(server, [server.models["student"][1]], torch.ones(1, 1), tools))

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        mean, models, counts = apart(knowledge)
        server = with_model(server, "student", server.models["student"][0], mean)
        work = self._work(server, models, shares(counts), tools)
        work.remember(server.memory)
        work.run()
        return self._told(server, work)

    def _work(self, server: ServerState, models: Sequence[Tensors], weights: Tensor, tools: ServerTools) -> DataFree:
        name, student = server.models["student"]
        features = tools.net(name, student).features(torch.zeros(1, *tools.shape, dtype=tools.dtype))
        first, *heads = (tools.module(name, tensors).get_submodule("head") for tensors in (student, *models))
        make = replace(self.make, lr=self.make.lr * self.fade ** max(server.round - 1, 0))
        form = Form.within(tuple(features.shape[1:]), tools.classes, None)
        return DataFree(first, ModelsGuide(heads, weights), make, form, fit=Fit(epochs=1), seed=tools.seed("generator"))

    def _told(self, server: ServerState, work: DataFree) -> ServerState:
        told = {"model": server.models["student"][1], "generator": below(work.memory(), "module|generator|")}
        knowledge = Bundle(parts={name: Weights.from_tensors(tensors) for name, tensors in told.items()})
        return replace(server, knowledge=knowledge, memory={**server.memory, **work.memory()})
