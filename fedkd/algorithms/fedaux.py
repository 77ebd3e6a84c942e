"""FedAUX: unlabelled auxiliary data for pre-training, and for weights of the ensemble.

F. Sattler, T. Korjakow, R. Rischke, W. Samek, "FedAUX: Leveraging Unlabeled Auxiliary Data in Federated Learning", IEEE
Transactions on Neural Networks and Learning Systems 2021, https://arxiv.org/abs/2102.02514.

The server pre-trains a body h_0 on the proxy samples without labels. Devices start from it, and fit, beside their training,
a logistic regression w that tells h_0 of their own records from h_0 of "negatives", the first ``negatives`` of the proxy
samples: min_w mean log(1 + exp(-y w·h)) + lambda/2 ‖w‖², ‖h‖ = 1, no intercept. The server averages weights as in FedAvg
and distils the mean on the other proxy samples from softmax(sum_k s_k(x) z_k(x) / sum_k s_k(x)), z_k being a device's
logits and s_k(x) = sigmoid(w_k·h_0(x)): it is heard where the sample resembles its records.

No privacy is claimed. The paper adds Gaussian noise to w by the sensitivity 2 / (n lambda) of n records and negatives. That
bound holds for the objective above (a mean of losses, lambda/2, no intercept, ‖h‖ <= 1, exactly minimised). The authors'
public code minimises the sum of losses + lambda/2 ‖w‖² and fits an intercept: its noise is n times too small. And the
weights leave the device without noise.

Deviations: pre-training is contrastive (NT-Xent of two noisy, partly masked views) with the settings of ``server``. w is
found by Newton's method and sent every round, so that a device that joins late needs no other message.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, final

import numpy as np
import torch
from torch.nn import functional as F

from fedkd.aggregators import mean_weights
from fedkd.aggregators.scores import contrast, logistic
from fedkd.algorithms.averaging import flatten, unflatten
from fedkd.algorithms.base import (
    Algorithm,
    Answers,
    Card,
    DeviceState,
    DeviceTools,
    Heard,
    ServerState,
    ServerTools,
    Shapes,
    View,
    with_model,
)
from fedkd.losses import kl_divergence
from fedkd.payloads import Bundle, Contract, Payload, SoftLabels, Weights

if TYPE_CHECKING:
    from fedkd.nets import Net


@final
@dataclass(frozen=True, kw_only=True)
class FedAUX(Algorithm):
    """FedAvg, then distillation weighted by certainty scores. See the module text."""

    name: ClassVar[str] = "fedaux"
    paper: ClassVar[str] = "Sattler et al., IEEE TNNLS 2021"
    upload: ClassVar[type[Payload]] = Bundle
    download: ClassVar[type[Payload]] = Bundle
    proxy: ClassVar[Literal["none", "unlabelled", "labelled"]] = "unlabelled"
    heterogeneous: ClassVar[bool] = False
    features: ClassVar[bool] = True
    roles: ClassVar[tuple[str, ...]] = ("model", "extractor")
    keeps: ClassVar[tuple[str, ...]] = ("extractor",)
    student: ClassVar[bool] = True
    weighted: ClassVar[bool] = True
    weighs: ClassVar[bool] = True
    reads_private: ClassVar[bool] = True

    negatives: float = 0.2  # share of the proxy samples asked that stand for "not mine"
    ridge: float = 0.01  # lambda
    pretrain: bool = True  # False: h_0 is random

    # ---- device -----------------------------------------------------------------------------------------------------
    def start(self, state: DeviceState, heard: Heard, tools: DeviceTools) -> DeviceState:
        assert isinstance(heard.knowledge, Bundle)
        models = {**state.models, "model": heard.knowledge.parts["model"].tensors()}
        flat = heard.knowledge.tensors()["extractor/flat"]
        if len(flat):
            models["extractor"] = unflatten(flat, models["model"])
        return replace(state, models=models)

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.private is not None and view.public is not None
        count = self.count(len(view.public))
        own, other = (F.normalize(net["extractor"].features(x), dim=1) for x in (view.private.x, view.public[:count]))
        y = torch.cat([torch.ones_like(own[:, 0]), -torch.ones_like(other[:, 0])])
        real = torch.cat([(view.private.weight > 0).to(own.dtype), torch.ones_like(other[:, 0])])
        w = logistic(torch.cat([own, other]), y, real / real.sum(), self.ridge)
        return Bundle(parts={"model": Weights.from_tensors(net.weights), "scorer": Weights.from_tensors({"w": w})})

    def count(self, asked: int) -> int:
        """Return how many of the samples asked are negatives: at least one, and not all."""
        return min(max(1, round(self.negatives * asked)), asked - 1)

    # ---- server -----------------------------------------------------------------------------------------------------
    def contract_up(self, shapes: Shapes) -> Contract:
        scorer = Contract.of(Weights, {}, {"w": torch.zeros(shapes.features or 0)})
        return Contract.bundle({"model": Contract.of(Weights, shapes.dims, shapes.weights), "scorer": scorer})

    def contract_down(self, shapes: Shapes) -> Contract:
        flat = Contract(kind=Weights, shapes={"flat": (None,)}, ranges={"flat": "real"}, classes=0)
        return Contract.bundle({"model": Contract.of(Weights, shapes.dims, shapes.weights), "extractor": flat})

    def begin(self, server: ServerState, tools: ServerTools) -> ServerState:
        name, weights = server.models["student"]
        if self.pretrain:
            weights = tools.train(name, weights, contrast, np.arange(tools.proxies), label="pretrain")
        server = with_model(with_model(server, "student", name, weights), "extractor", name, weights)
        return replace(server, memory={"holds": torch.zeros(tools.devices, dtype=torch.bool)})

    def audience(self, card: Card, server: ServerState) -> Hashable:
        return bool(server.memory["holds"][card.id])

    def broadcast(self, server: ServerState, card: Card) -> Payload:
        flat = flatten(server.models["extractor"][1])[: 0 if self.audience(card, server) else None]
        parts: dict[str, Payload] = {"model": Weights.from_tensors(server.models["student"][1])}
        return Bundle(parts={**parts, "extractor": Weights.from_tensors({"flat": flat})})

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        rest = tools.asked[self.count(len(tools.asked)) :]
        features = F.normalize(tools.net(*server.models["extractor"]).features(tools.public(rest)), dim=1)
        total = torch.zeros(len(rest), tools.classes, dtype=tools.dtype)
        score = torch.zeros(len(rest), 1, dtype=tools.dtype)
        models = []
        for answer in answers:
            assert isinstance(answer.payload, Bundle)
            model = answer.payload.parts["model"]
            s = answer.weight * torch.sigmoid(features @ answer.payload.tensors()["scorer/w"])[:, None]
            total += s * next(iter(tools.logits([(answer.card.architecture, model.tensors())], rest)))
            score += s
            models.append(replace(answer, payload=model))
        mean = {**mean_weights(models, weighted=True), "who": torch.tensor([a.card.id for a in models])}
        labels = SoftLabels(labels=(total / score).softmax(-1))
        return Bundle(parts={"labels": labels, "mean": Weights.from_tensors(mean)})

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        assert isinstance(knowledge, Bundle)
        mean, teacher = knowledge.parts["mean"].tensors(), knowledge.tensors()["labels/labels"]
        holds = server.memory["holds"].clone()
        holds[mean.pop("who")] = True
        name, rest = server.models["student"][0], tools.asked[self.count(len(tools.asked)) :]
        taught = tools.train(
            name, mean, lambda net, batch: batch.mean(kl_divergence(net(batch), teacher[batch.index])), rest
        )
        return replace(with_model(server, "student", name, taught), memory={"holds": holds})
