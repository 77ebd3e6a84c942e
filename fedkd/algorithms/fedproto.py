"""FedProto: prototypes instead of weights.

Y. Tan, G. Long, L. Liu, T. Zhou, Q. Lu, J. Jiang, C. Zhang, "FedProto: Federated Prototype Learning across Heterogeneous
Clients", AAAI 2022, https://arxiv.org/abs/2105.00243.

Device i sends the mean feature C_i,j of its records of each class j. The server returns C̄_j = sum_i (|D_i,j| / N_j)
C_i,j over the holders of j. Devices minimise CE + lambda · mean over records of the squared distance between a record's
features and C̄_y, and decide by the nearest global prototype.

Deviations: the paper's formula divides by the number of holders once more, which would shrink every prototype; its
public code takes the plain mean over holders (``weighting="equal"``). The squared distance is averaged over the D
features, as in the public code. ``inference="head"`` decides by the classifier instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.algorithms.base import (
    Algorithm,
    Answers,
    Batch,
    DeviceState,
    Heard,
    ServerState,
    ServerTools,
    Tensors,
    View,
)
from fedkd.losses import cross_entropy, squared_error
from fedkd.payloads import Payload, Prototypes

if TYPE_CHECKING:
    from fedkd.nets import Net


@final
@dataclass(frozen=True, kw_only=True)
class FedProto(Algorithm):
    """Class means of features, pulled towards those of all devices. See the module text."""

    name: ClassVar[str] = "fedproto"
    paper: ClassVar[str] = "Tan et al., AAAI 2022"
    upload: ClassVar[type[Payload]] = Prototypes
    download: ClassVar[type[Payload]] = Prototypes
    features: ClassVar[bool] = True
    reads_private: ClassVar[bool] = True
    weighs: ClassVar[bool] = True

    weight: float = 1.0  # lambda, weight of the prototype term
    weighting: Literal["records", "equal"] = "records"  # |D_i,j| / N_j, or one share per holder
    inference: Literal["prototype", "head"] = "prototype"

    # ---- device -----------------------------------------------------------------------------------------------------
    def private_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        features = net.features(batch)
        loss = cross_entropy(net.head(features), batch.labels)
        if isinstance(heard.knowledge, Prototypes):
            near = squared_error(features, heard.knowledge.means[batch.labels])
            known = (heard.knowledge.counts > 0).to(near.dtype)[batch.labels]
            loss = loss + self.weight * known * near
        return batch.mean(loss)

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.private is not None
        features = net.features(view.private)
        real = (view.private.weight > 0).to(features.dtype)
        member = F.one_hot(view.private.labels, view.classes).to(features.dtype) * real[:, None]
        counts = member.sum(0)
        return Prototypes(means=member.T @ features / counts.clamp(min=1)[:, None], counts=counts)

    def finish(self, state: DeviceState, answer: Payload, heard: Heard) -> DeviceState:
        if not isinstance(heard.knowledge, Prototypes):
            return state
        return replace(state, memory={"means": heard.knowledge.means, "counts": heard.knowledge.counts})

    def predict(self, net: Net, x: Tensor, memory: Tensors) -> Tensor:
        if self.inference == "head" or "means" not in memory:
            return net(x)
        distance = torch.cdist(net.features(x), memory["means"])
        return (-distance).masked_fill(memory["counts"] == 0, -1e9)

    # ---- server -----------------------------------------------------------------------------------------------------
    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        means = torch.stack([a.payload.tensors()["means"] for a in answers])
        counts = torch.stack([a.payload.tensors()["counts"] for a in answers])
        worth = torch.tensor([a.weight for a in answers], dtype=counts.dtype)[:, None]
        share = worth * (counts if self.weighting == "records" else (counts > 0).to(counts.dtype))
        total = share.sum(0)
        mean = (means * share[:, :, None]).sum(0) / torch.where(total > 0, total, 1.0)[:, None]
        return Prototypes(means=mean, counts=counts.sum(0))
