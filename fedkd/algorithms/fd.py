"""FD: federated distillation on mean logits per label.

E. Jeong, S. Oh, H. Kim, J. Park, M. Bennis, S.-L. Kim, "Communication-Efficient On-Device Machine Learning: Federated
Distillation and Augmentation under Non-IID Private Data", NeurIPS 2018 workshop, https://arxiv.org/abs/1811.11479
(algorithm 1).

Device k sends its mean logit vector F_k,l for each label l it holds. The server returns the mean over the *other*
holders of the label, F̂_k,l = sum_{i != k, i holds l} F_i,l / #{i != k: i holds l}. The device then minimises
CE + gamma · KL(softmax(F̂_k,y) ‖ p) on a record of label y.

Deviations: mean logits are taken over all own records after training, not accumulated during it. A label that nobody
else holds adds no term. The paper leaves the form of the distillation loss open; KL of softened means is used. The
paper's data augmentation (FAug) is not part of this method.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.algorithms.base import Algorithm, Answers, Batch, Card, Heard, ServerState, ServerTools, View
from fedkd.losses import cross_entropy, kl_divergence
from fedkd.payloads import Bundle, LabelLogits, Nothing, Payload

if TYPE_CHECKING:
    from fedkd.nets import Net


@final
@dataclass(frozen=True, kw_only=True)
class FD(Algorithm):
    """Mean logits per label, each device taught by the others. See the module text."""

    name: ClassVar[str] = "fd"
    paper: ClassVar[str] = "Jeong et al., NeurIPS workshop 2018"
    upload: ClassVar[type[Payload]] = LabelLogits
    download: ClassVar[type[Payload]] = LabelLogits
    reads_private: ClassVar[bool] = True
    weighs: ClassVar[bool] = True

    gamma: float = 1.0  # gamma, weight of the distillation term

    # ---- device -----------------------------------------------------------------------------------------------------
    def private_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        logits = net(batch)
        loss = cross_entropy(logits, batch.labels)
        if isinstance(heard.knowledge, LabelLogits):
            teacher = heard.knowledge.logits.softmax(-1)[batch.labels]
            known = heard.knowledge.held[batch.labels]
            loss = loss + self.gamma * known * kl_divergence(logits, teacher)
        return batch.mean(loss)

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.private is not None
        logits = net(view.private)
        real = (view.private.weight > 0).to(logits.dtype)
        member = F.one_hot(view.private.labels, view.classes).to(logits.dtype) * real[:, None]
        count = member.sum(0)
        mean = member.T @ logits / count.clamp(min=1)[:, None]
        return LabelLogits(logits=mean, held=(count > 0).to(logits.dtype))

    # ---- server -----------------------------------------------------------------------------------------------------
    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        # From here on ``held`` is what a holder counts in a mean, not merely whether it counts.
        parts = {str(a.card.id): (a.payload.tensors(), a.weight) for a in answers}
        return Bundle(
            parts={k: LabelLogits(logits=t["logits"], held=t["held"] * weight) for k, (t, weight) in parts.items()}
        )

    def audience(self, card: Card, server: ServerState) -> Hashable:
        return card.id

    def broadcast(self, server: ServerState, card: Card) -> Payload:
        if not isinstance(server.knowledge, Bundle):
            return Nothing()
        others = [part.tensors() for client, part in server.knowledge.parts.items() if client != str(card.id)]
        if not others:
            return Nothing()
        logits = torch.stack([o["logits"] for o in others])
        held = torch.stack([o["held"] for o in others]).to(logits.dtype)
        holders = held.sum(0)
        mean = (logits * held[:, :, None]).sum(0) / torch.where(holders > 0, holders, 1.0)[:, None]
        return LabelLogits(logits=mean, held=(holders > 0).to(mean.dtype))
