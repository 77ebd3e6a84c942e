"""FedHKD: hyper-knowledge distillation.

H. Chen, J. Wang, H. Vikalo, "The Best of Both Worlds: Accurate Global and Personalized Models through Federated Learning
with Data-Free Hyper-Knowledge Distillation", ICLR 2023, https://arxiv.org/abs/2301.08968.

Beside its weights, which are averaged as in FedAvg, a device sends hyper-knowledge of every class j that makes up at least
the share ``least`` of its records: the mean feature h̄_j and the mean soft prediction q̄_j = mean softmax(z / T). The server
averages both over the holders by their counts, H_j and Q_j. A device minimises

    CE + lambda · mean over classes of ‖softmax(head(H_j) / T) - Q_j‖ + gamma · mean over records of ‖f(x) - H_y‖.

Deviations: the paper adds Gaussian noise to the means of features for differential privacy, which would cover neither the
soft predictions nor the weights; none is added, no claim is made. The first mean is over the classes that the server knows.
Norms have 1e-8 under the root for a gradient at 0; the public code takes KL and mean square instead, and no threshold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.aggregators import mean_weights
from fedkd.algorithms.base import (
    Algorithm,
    Answers,
    Batch,
    DeviceState,
    DeviceTools,
    Heard,
    ServerState,
    ServerTools,
    Shapes,
    View,
    with_model,
)
from fedkd.losses import cross_entropy
from fedkd.payloads import Bundle, Contract, Payload, Prototypes, SoftLabels, Weights

if TYPE_CHECKING:
    from fedkd.nets import Net


@final
@dataclass(frozen=True, kw_only=True)
class FedHKD(Algorithm):
    """FedAvg, with class means of features and predictions as teachers. See the module text."""

    name: ClassVar[str] = "fedhkd"
    paper: ClassVar[str] = "Chen et al., ICLR 2023"
    upload: ClassVar[type[Payload]] = Bundle
    download: ClassVar[type[Payload]] = Bundle
    heterogeneous: ClassVar[bool] = False
    features: ClassVar[bool] = True
    keeps: ClassVar[tuple[str, ...]] = ()
    student: ClassVar[bool] = True
    weighted: ClassVar[bool] = True
    weighs: ClassVar[bool] = True
    reads_private: ClassVar[bool] = True

    prediction: float = 0.05  # lambda, weight of the soft predictions
    feature: float = 0.05  # gamma, weight of the features
    temperature: float = 0.5  # T of soft predictions
    least: float = 0.25  # nu, share of a device's records from which on it tells of a class

    # ---- device -----------------------------------------------------------------------------------------------------
    def start(self, state: DeviceState, heard: Heard, tools: DeviceTools) -> DeviceState:
        assert isinstance(heard.knowledge, Bundle)
        return replace(state, models={"model": heard.knowledge.parts["model"].tensors()})

    def private_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        told, features = heard.knowledge.tensors(), net.features(batch)
        known = (told["means/counts"] > 0).to(features.dtype)
        loss = batch.mean(cross_entropy(net.head(features), batch.labels))
        near = norm(features - told["means/means"][batch.labels]) * known[batch.labels]
        said = (net.head(told["means/means"]) / self.temperature).softmax(-1)
        apart = (norm(said - told["soft/labels"]) * known).sum() / known.sum().clamp(min=1)
        return loss + self.feature * batch.mean(near) + self.prediction * apart

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.private is not None
        features = net.features(view.private)
        real = (view.private.weight > 0).to(features.dtype)
        member = F.one_hot(view.private.labels, view.classes).to(features.dtype) * real[:, None]
        counts = member.sum(0)
        held = counts.clamp(min=1)[:, None]
        soft = member.T @ (net.head(features) / self.temperature).softmax(-1) / held
        told = (counts > 0) & (counts >= self.least * real.sum())
        # A row of a class that is kept back must say nothing of it: zeros, and all classes alike.
        parts: dict[str, Payload] = {
            "model": Weights.from_tensors(net.weights),
            "means": Prototypes(means=member.T @ features / held * told[:, None], counts=counts * told),
            "soft": SoftLabels(labels=torch.where(told[:, None], soft, 1 / view.classes)),
        }
        return Bundle(parts=parts)

    # ---- server -----------------------------------------------------------------------------------------------------
    def contract_up(self, shapes: Shapes) -> Contract:
        return Contract.bundle(
            {
                "model": Contract.of(Weights, shapes.dims, shapes.weights),
                "means": Contract.of(Prototypes, shapes.dims),
                "soft": Contract.of(SoftLabels, {**shapes.dims, "N": shapes.classes}),
            }
        )

    def contract_down(self, shapes: Shapes) -> Contract:
        return self.contract_up(shapes)

    def begin(self, server: ServerState, tools: ServerTools) -> ServerState:
        name, weights = server.models["student"]
        width = tools.net(name, weights).features(torch.zeros(1, *tools.shape, dtype=tools.dtype)).shape[1]
        means = Prototypes(
            means=torch.zeros(tools.classes, width, dtype=tools.dtype),
            counts=torch.zeros(tools.classes, dtype=tools.dtype),
        )
        soft = SoftLabels(labels=torch.full((tools.classes, tools.classes), 1 / tools.classes, dtype=tools.dtype))
        parts = {"model": Weights.from_tensors(weights), "means": means, "soft": soft}
        return replace(server, knowledge=Bundle(parts=parts))

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        told = [(a.payload.tensors(), a.weight) for a in answers]
        share = torch.stack([t["means/counts"] * w for t, w in told])[:, :, None]  # [K, C, 1]
        total = share.sum(0)
        safe = torch.where(total > 0, total, 1.0)
        means = (torch.stack([t["means/means"] for t, _ in told]) * share).sum(0) / safe
        soft = (torch.stack([t["soft/labels"] for t, _ in told]) * share).sum(0) / safe
        models = [replace(a, payload=_part(a.payload, "model")) for a in answers]
        parts: dict[str, Payload] = {
            "model": Weights.from_tensors(mean_weights(models, weighted=True)),
            "means": Prototypes(means=means, counts=total.squeeze(1)),
            "soft": SoftLabels(labels=torch.where(total > 0, soft, 1 / tools.classes)),
        }
        return Bundle(parts=parts)

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        return with_model(server, "student", server.models["student"][0], _part(knowledge, "model").tensors())


def _part(payload: Payload, name: str) -> Payload:
    assert isinstance(payload, Bundle)
    return payload.parts[name]


def norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm [N] of rows [N, D]."""
    return (x.square().sum(-1) + 1e-8).sqrt()
