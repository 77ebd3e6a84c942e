"""FedED: federated learning by ensemble distillation of a central model.

D. Sui, Y. Chen, J. Zhao, Y. Jia, Y. Xie, W. Sun, "FedED: Federated Learning via Ensemble Distillation for Medical Relation
Extraction", EMNLP 2020, https://aclanthology.org/2020.emnlp-main.165/.

Devices start from the central model, train on their records, and send soft predictions of shared samples, softened by T,
instead of weights. The server takes their mean p̄ and trains the central model by T² KL(p̄ ‖ softmax(z / T)), and by the
cross-entropy with the labels where the shared samples have any: (1 - hard) of the former, ``hard`` of the latter.

Deviations: ``hard`` and T are ours. Shared samples need no labels; the paper's are labelled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, final

from torch import Tensor

from fedkd.aggregators import mean_of
from fedkd.algorithms.base import (
    Algorithm,
    Answers,
    Batch,
    DeviceState,
    DeviceTools,
    Heard,
    ServerState,
    ServerTools,
    View,
    adopt,
)
from fedkd.losses import cross_entropy, kl_divergence
from fedkd.payloads import Payload, SoftLabels, Weights

if TYPE_CHECKING:
    from fedkd.nets import Net


@final
@dataclass(frozen=True, kw_only=True)
class FedED(Algorithm):
    """Predictions up, the central model down. See the module text."""

    name: ClassVar[str] = "feded"
    paper: ClassVar[str] = "Sui et al., EMNLP 2020"
    upload: ClassVar[type[Payload]] = SoftLabels
    download: ClassVar[type[Payload]] = Weights
    proxy: ClassVar[Literal["none", "unlabelled", "labelled"]] = "unlabelled"
    heterogeneous: ClassVar[bool] = False
    keeps: ClassVar[tuple[str, ...]] = ()
    weighs: ClassVar[bool] = True
    student: ClassVar[bool] = True

    temperature: float = 2.0  # T
    hard: float = 0.5  # what labels count for, where the shared samples have any

    def needs_each(self) -> str | None:
        return None

    def begin(self, server: ServerState, tools: ServerTools) -> ServerState:
        return replace(server, knowledge=Weights.from_tensors(server.models["student"][1]))

    def start(self, state: DeviceState, heard: Heard, tools: DeviceTools) -> DeviceState:
        return adopt(state, heard)

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.public is not None
        return SoftLabels(labels=(net(view.public) / self.temperature).softmax(-1))

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        return SoftLabels(labels=mean_of(answers, lambda a: a.payload.tensors()["labels"]))

    def server_loss(self, net: Net, batch: Batch, knowledge: Payload) -> Tensor:
        logits, teacher = net(batch), knowledge.tensors()["labels"][batch.index]
        soft = self.temperature**2 * kl_divergence(logits / self.temperature, teacher)
        if batch.y is None:
            return batch.mean(soft)
        return batch.mean((1 - self.hard) * soft + self.hard * cross_entropy(logits, batch.labels))

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        server = super().update(server, knowledge, tools)
        return replace(server, knowledge=Weights.from_tensors(server.models["student"][1]))
