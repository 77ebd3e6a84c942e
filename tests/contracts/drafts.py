"""Short methods that nobody should use: each asks of the interface something that a method to come will need."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, final

import torch
from torch import Tensor

from fedkd.aggregators import mean_weights
from fedkd.algorithms.base import (
    Algorithm,
    Answers,
    Batch,
    Card,
    DeviceState,
    DeviceTools,
    Heard,
    Phase,
    ServerState,
    ServerTools,
    Shapes,
    View,
    adopt,
    with_model,
)
from fedkd.losses import cross_entropy, kl_divergence
from fedkd.payloads import Bundle, Contract, LabelLogits, Payload, SoftLabels, Weights

if TYPE_CHECKING:
    from fedkd.nets import Net


@final
@dataclass(frozen=True, kw_only=True)
class Mutual(Algorithm):
    """Like FML (Shen et al. 2020): a private model of any architecture and a shared one teach each other."""

    name: ClassVar[str] = "mutual"
    paper: ClassVar[str] = "draft"
    upload: ClassVar[type[Payload]] = Weights
    download: ClassVar[type[Payload]] = Weights
    roles: ClassVar[tuple[str, ...]] = ("model", "shared")
    keeps: ClassVar[tuple[str, ...]] = ("model",)
    student: ClassVar[bool] = True
    weighted: ClassVar[bool] = True

    def begin(self, server: ServerState, tools: ServerTools) -> ServerState:
        return replace(server, knowledge=Weights.from_tensors(server.models["student"][1]))

    def contract_down(self, shapes: Shapes) -> Contract:
        return Contract.of(Weights, shapes.dims, shapes.shared)

    def contract_up(self, shapes: Shapes) -> Contract:
        return Contract.of(Weights, shapes.dims, shapes.shared)

    def start(self, state: DeviceState, heard: Heard, tools: DeviceTools) -> DeviceState:
        return adopt(state, heard, "shared")

    def plan(self, heard: Heard) -> tuple[Phase, ...]:
        both = Phase(
            name="mutual", data="private", loss=self.private_loss, settings="training", trains=("model", "shared")
        )
        return (both,)

    def private_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        own, shared = net(batch), net["shared"](batch)
        loss = cross_entropy(own, batch.labels) + cross_entropy(shared, batch.labels)
        loss = loss + kl_divergence(own, shared.detach().softmax(-1)) + kl_divergence(shared, own.detach().softmax(-1))
        return batch.mean(loss)

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        return Weights.from_tensors(net["shared"].weights)

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        return Weights.from_tensors(mean_weights(answers, weighted=True))

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        return with_model(server, "student", server.models["student"][0], knowledge.tensors())


@final
@dataclass(frozen=True, kw_only=True)
class Personal(Algorithm):
    """Each device is told its own number, and tells how often it was told so: a message and a memory of its own."""

    name: ClassVar[str] = "personal"
    paper: ClassVar[str] = "draft"
    upload: ClassVar[type[Payload]] = LabelLogits
    download: ClassVar[type[Payload]] = LabelLogits

    def audience(self, card: Card, server: ServerState) -> Hashable:
        return card.id

    def broadcast(self, server: ServerState, card: Card) -> Payload:
        return LabelLogits(logits=torch.full((10, 10), float(card.id)), held=torch.ones(10))

    def start(self, state: DeviceState, heard: Heard, tools: DeviceTools) -> DeviceState:
        return replace(state, memory={"told": state.memory.get("told", torch.zeros(())) + 1})

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert isinstance(heard.knowledge, LabelLogits)
        return LabelLogits(logits=100 * heard.memory["told"] + heard.knowledge.logits, held=heard.knowledge.held)

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        return Bundle(parts={str(answer.card.id): answer.payload for answer in answers})


class DropsInputs(torch.nn.Module):
    """A user's model whose first layer is dropout: on proxy samples it sees one tensor for all devices."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.3), torch.nn.Linear(shape[-1] ** 2, 16))
        self.head = torch.nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


@final
@dataclass(frozen=True, kw_only=True)
class Deaf(Algorithm):
    """Draft: the largest probability wins, whoever sent it and however late: answers cannot be weighted."""

    name: ClassVar[str] = "deaf"
    paper: ClassVar[str] = "draft"
    upload: ClassVar[type[Payload]] = SoftLabels
    download: ClassVar[type[Payload]] = SoftLabels
    proxy: ClassVar[Literal["none", "unlabelled", "labelled"]] = "unlabelled"

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.public is not None
        return SoftLabels(labels=net.probabilities(view.public))

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        top = torch.stack([a.payload.tensors()["labels"] for a in answers]).max(0).values
        return SoftLabels(labels=top / top.sum(-1, keepdim=True))
