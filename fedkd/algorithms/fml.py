"""FML: federated mutual learning.

T. Shen, J. Zhang, X. Jia, F. Zhang, G. Huang, P. Zhou, K. Kuang, F. Wu, C. Wu, "Federated Mutual Learning", 2020,
https://arxiv.org/abs/2006.16765 (algorithm 1).

A device has a private model of any architecture and a copy of the shared "meme" model. Both learn its records and each
other: L_private = alpha CE + (1 - alpha) KL(p_meme ‖ p_private), L_meme = beta CE + (1 - beta) KL(p_private ‖ p_meme).
Only the meme travels; the server averages it as FedAvg does, and it is the student.

Deviations: both models take a step on the same batch at once, each from the other's answer before the step. Answers are
weighted by records.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

from torch import Tensor

from fedkd.aggregators import mean_weights
from fedkd.algorithms.base import (
    Answers,
    Batch,
    DeviceState,
    DeviceTools,
    Heard,
    ServerState,
    ServerTools,
    Shapes,
    View,
    adopt,
    with_model,
)
from fedkd.algorithms.mutual import MutualLearning
from fedkd.losses import cross_entropy, kl_divergence
from fedkd.payloads import Contract, Payload, Weights

if TYPE_CHECKING:
    from fedkd.nets import Net


@final
@dataclass(frozen=True, kw_only=True)
class FML(MutualLearning):
    """A private and a shared model teach each other. See the module text."""

    name: ClassVar[str] = "fml"
    paper: ClassVar[str] = "Shen et al., 2020"

    alpha: float = 0.5  # alpha, what labels count for the private model; the rest is the meme's
    beta: float = 0.5  # beta, what labels count for the meme

    # ---- device -----------------------------------------------------------------------------------------------------
    def start(self, state: DeviceState, heard: Heard, tools: DeviceTools) -> DeviceState:
        return adopt(state, heard, "shared")

    def private_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        own, meme, more = self.both(net, batch, heard)
        private = self.alpha * cross_entropy(own, batch.labels)
        private = private + (1 - self.alpha) * kl_divergence(own, meme.detach().softmax(-1))
        shared = self.beta * cross_entropy(meme, batch.labels)
        shared = shared + (1 - self.beta) * kl_divergence(meme, own.detach().softmax(-1))
        return batch.mean(private + shared) + more

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        return Weights.from_tensors(net["shared"].weights)

    # ---- server -----------------------------------------------------------------------------------------------------
    def begin(self, server: ServerState, tools: ServerTools) -> ServerState:
        return replace(server, knowledge=Weights.from_tensors(server.models["student"][1]))

    def contract_down(self, shapes: Shapes) -> Contract:
        return Contract.of(Weights, shapes.dims, shapes.shared)

    def contract_up(self, shapes: Shapes) -> Contract:
        return Contract.of(Weights, shapes.dims, shapes.shared)

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        return Weights.from_tensors(mean_weights(answers, weighted=True))

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        return with_model(server, "student", server.models["student"][0], knowledge.tensors())
