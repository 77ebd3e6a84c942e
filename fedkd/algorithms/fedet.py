"""FedET: heterogeneous ensemble knowledge transfer to a large server model.

Y. J. Cho, A. Manoel, G. Joshi, R. Sim, D. Dimitriadis, "Heterogeneous Ensemble Knowledge Transfer for Training Large Models
in Federated Learning", IJCAI 2022, https://arxiv.org/abs/2204.12703.

Devices train small models of several architectures and send their weights. For each unlabelled sample the server takes the
consensus s̄(x) = sum_k a_k(x) s_k(x) of their logits with a_k = Var(s_k) / sum_l Var(s_l), the variance over the classes
(certain models count more), and its top class y. The models that say otherwise are heard as well, as a regulariser: their
own consensus s_div. The large model (``models.student``) takes over the mean of the devices' heads, then minimises
CE(y) + lambda · KL(softmax(s_div) ‖ p). The devices' models of each architecture are averaged, take over the head of the
large model, and go down.

Deviations: what the large and the small models share is the head, so that all have one feature width (the paper shares a
representation layer besides). Means of models are weighted by records.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, final

import torch
from torch import Tensor

from fedkd.aggregators import mean_weights
from fedkd.algorithms.averaging import WeightAveraging
from fedkd.algorithms.base import Answers, Batch, Card, ServerState, ServerTools, Tensors, with_model
from fedkd.losses import cross_entropy, kl_divergence
from fedkd.payloads import Bundle, Chosen, Nothing, Payload, SoftLabels, Votes, Weights

if TYPE_CHECKING:
    from fedkd.nets import Net


def consensus(logits: Tensor, worth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of ``logits`` [K, N, C] the consensus [N, C], that of dissenters [N, C], and where there are any [N]."""
    trust = logits.var(-1, correction=0) * worth[:, None]  # [K, N]
    said = (trust[:, :, None] * logits).sum(0) / trust.sum(0).clamp(min=1e-12)[:, None]
    other = trust * (logits.argmax(-1) != said.argmax(-1))
    total = other.sum(0)
    apart = (other[:, :, None] * logits).sum(0) / torch.where(total > 0, total, 1.0)[:, None]
    return said, apart, total > 0


def head(tensors: Tensors) -> Tensors:
    """Return those of a model's tensors that belong to its head."""
    return {name: t for name, t in tensors.items() if name.startswith("head.")}


@final
@dataclass(frozen=True, kw_only=True)
class FedET(WeightAveraging):
    """A large model taught by the weighted consensus of small ones, dissent included. See the module text."""

    name: ClassVar[str] = "fedet"
    paper: ClassVar[str] = "Cho et al., IJCAI 2022"
    heterogeneous: ClassVar[bool] = True
    features: ClassVar[bool] = True
    proxy: ClassVar[Literal["none", "unlabelled", "labelled"]] = "unlabelled"

    diversity: float = 0.05  # lambda, weight of the dissenters

    def begin(self, server: ServerState, tools: ServerTools) -> ServerState:
        return server

    def audience(self, card: Card, server: ServerState) -> Hashable:
        return card.architecture

    def broadcast(self, server: ServerState, card: Card) -> Payload:
        role = f"small {card.architecture}"
        return Weights.from_tensors(server.models[role][1]) if role in server.models else Nothing()

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        models = [(a.card.architecture, a.payload.tensors()) for a in answers]
        logits = torch.stack(list(tools.logits(models, tools.asked)))
        worth = torch.tensor([a.weight for a in answers], dtype=logits.dtype)
        said, apart, dissent = consensus(logits, worth)
        parts: dict[str, Payload] = {
            "label": Votes(votes=said.argmax(-1)),
            "apart": SoftLabels(labels=apart.softmax(-1)),
            "dissent": Chosen(chosen=dissent.to(logits.dtype)),
        }
        heads = [replace(a, payload=Weights.from_tensors(head(a.payload.tensors()))) for a in answers]
        parts["head"] = Weights.from_tensors(mean_weights(heads, weighted=True))
        for name in sorted({architecture for architecture, _ in models}):
            alike = [a for a in answers if a.card.architecture == name]
            parts[f"small {name}"] = Weights.from_tensors(mean_weights(alike, weighted=True))
        return Bundle(parts=parts)

    def server_loss(self, net: Net, batch: Batch, knowledge: Payload) -> Tensor:
        told, logits = knowledge.tensors(), net(batch)
        loss = cross_entropy(logits, told["label/votes"][batch.index])
        apart = kl_divergence(logits, told["apart/labels"][batch.index])
        return batch.mean(loss + self.diversity * told["dissent/chosen"][batch.index] * apart)

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        assert isinstance(knowledge, Bundle)
        name, weights = server.models["student"]
        weights = {**weights, **knowledge.parts["head"].tensors()}
        taught = tools.train(name, weights, lambda net, batch: self.server_loss(net, batch, knowledge), tools.asked)
        server = with_model(server, "student", name, taught)
        for role, part in knowledge.parts.items():
            if role.startswith("small "):
                small = {**part.tensors(), **head(taught)}
                server = with_model(server, role, role.removeprefix("small "), small)
        return replace(server, knowledge=Nothing())
