"""FedDF: ensemble distillation for robust model fusion.

T. Lin, L. Kong, S. U. Stich, M. Jaggi, "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS
2020, https://arxiv.org/abs/2006.07242 (algorithms 1 and 3).

Devices train from the server's weights and send theirs. The server averages the weights of each architecture, and
distils every average on unlabelled samples from all devices together: teacher softmax(mean of the devices' logits),
forward KL, temperature 1.

Deviations: early stopping watches the distillation loss on a tenth of the proxy samples (``server.patience``) instead of
labelled validation accuracy. A student of an architecture that no device runs learns from its own last weights.
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
from fedkd.losses import kl_divergence
from fedkd.payloads import Bundle, Logits, Nothing, Payload, Weights

if TYPE_CHECKING:
    from fedkd.nets import Net


@final
@dataclass(frozen=True, kw_only=True)
class FedDF(WeightAveraging):
    """Averaged weights, then distilled from the ensemble. See the module text."""

    name: ClassVar[str] = "feddf"
    paper: ClassVar[str] = "Lin et al., NeurIPS 2020"
    heterogeneous: ClassVar[bool] = True
    proxy: ClassVar[Literal["none", "unlabelled", "labelled"]] = "unlabelled"

    def begin(self, server: ServerState, tools: ServerTools) -> ServerState:
        return server

    def audience(self, card: Card, server: ServerState) -> Hashable:
        return card.architecture

    def broadcast(self, server: ServerState, card: Card) -> Payload:
        for architecture, weights in server.models.values():
            if architecture == card.architecture:
                return Weights.from_tensors(weights)
        return Nothing()

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        models = [(a.card.architecture, a.payload.tensors()) for a in answers]
        logits = torch.stack(list(tools.logits(models, tools.asked)))
        worth = torch.tensor([a.weight for a in answers], dtype=logits.dtype)
        logits = (logits * worth[:, None, None]).sum(0) / worth.sum()
        parts: dict[str, Payload] = {"teacher": Logits(logits=logits)}
        for name in sorted({architecture for architecture, _ in models}):
            alike = [a for a in answers if a.card.architecture == name]
            parts[f"mean {name}"] = Weights.from_tensors(mean_weights(alike, weighted=True))
        return Bundle(parts=parts)

    def server_loss(self, net: Net, batch: Batch, knowledge: Payload) -> Tensor:
        teacher = knowledge.tensors()["logits"][batch.index].softmax(-1)
        return batch.mean(kl_divergence(net(batch), teacher))

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        assert isinstance(knowledge, Bundle)
        teacher = knowledge.parts["teacher"]
        roles = {architecture: role for role, (architecture, _) in server.models.items()}
        means: dict[str, Tensors] = {
            name.removeprefix("mean "): part.tensors() for name, part in knowledge.parts.items() if name != "teacher"
        }
        student, weights = server.models["student"]
        means.setdefault(student, weights)
        for architecture, start in means.items():
            taught = tools.train(
                architecture,
                start,
                lambda net, batch: self.server_loss(net, batch, teacher),
                tools.asked,
                label=architecture,
            )
            server = with_model(server, roles.get(architecture, architecture), architecture, taught)
        return replace(server, knowledge=Nothing())
