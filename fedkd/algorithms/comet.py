"""COMET: clustered knowledge transfer between devices of unlike data and models.

Y. J. Cho, J. Wang, T. Chirvolu, G. Joshi, "Communication-Efficient and Model-Heterogeneous Personalized Federated Learning
via Clustered Knowledge Transfer", IEEE Journal of Selected Topics in Signal Processing 2023 (PerFed-CKT),
https://arxiv.org/abs/2109.08119.

Devices send logits of the proxy samples. The server clusters the devices by k-means of these, and each device is taught
by the weighted mean z̄_c of the logits of its own cluster: it minimises its own loss + lambda · mean over proxy samples of
‖z_k(x) - z̄_c(x)‖², so that devices learn from those whose data are like theirs.

Deviations: own records and proxy samples take turns, a phase each (``digest`` and ``training``), instead of one step on
the sum of both losses; the squared distance is averaged over the classes, so that lambda does not depend on their number.
k-means runs over a device's whole answer and is started by k-means++ from the run's seed; the public re-implementation by
SCARLET's authors clusters each sample by itself and lets the device take the nearest centre. Here the server chooses, so
that one mean travels and not all. Clusters keep their numbers: a new one takes that of the old one with which it shares most
devices. A device that did not answer keeps its last cluster; one that never did is taught by the mean of all.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor

from fedkd.aggregators import weighted_mean
from fedkd.algorithms.base import Algorithm, Answers, Batch, Card, Heard, ServerState, ServerTools, View
from fedkd.losses import squared_error
from fedkd.payloads import Bundle, Logits, Nothing, Payload, ProxyIndices

if TYPE_CHECKING:
    from fedkd.nets import Net

EVERYBODY = -1


@final
@dataclass(frozen=True, kw_only=True)
class COMET(Algorithm):
    """Logits averaged within clusters of devices. See the module text."""

    name: ClassVar[str] = "comet"
    paper: ClassVar[str] = "Cho et al., IEEE JSTSP 2023"
    upload: ClassVar[type[Payload]] = Logits
    download: ClassVar[type[Payload]] = Logits
    proxy: ClassVar[Literal["none", "unlabelled", "labelled"]] = "unlabelled"
    predictors: ClassVar[bool] = True
    weighs: ClassVar[bool] = True
    weighted: ClassVar[bool] = True

    clusters: int = 2  # C, clusters of devices
    weight: float = 1.0  # lambda, weight of the distance to the cluster's mean

    def __post_init__(self) -> None:
        if self.clusters < 1:
            raise ValueError("clusters must be at least 1")

    # ---- server -----------------------------------------------------------------------------------------------------
    def begin(self, server: ServerState, tools: ServerTools) -> ServerState:
        return replace(server, memory={"cluster": torch.full((tools.devices,), EVERYBODY)})

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        from sklearn.cluster import KMeans

        points = torch.stack([a.payload.tensors()["logits"] for a in answers])  # [K, N, C]
        count = min(self.clusters, len(points))
        seed = tools.seed("clusters") % 2**32
        found = KMeans(count, n_init=4, random_state=seed).fit_predict(points.flatten(1).double().numpy())
        found = self.renumbered(found, [int(server.memory["cluster"][a.card.id]) for a in answers])
        worth = [a.weight * a.examples for a in answers]
        parts: dict[str, Payload] = {"who": ProxyIndices(indices=torch.tensor([a.card.id for a in answers]))}
        parts["cluster"] = ProxyIndices(indices=torch.from_numpy(found).to(torch.int64))
        for cluster in (EVERYBODY, *sorted({int(c) for c in found})):
            members = [(p, w) for p, w, c in zip(points, worth, found, strict=True) if cluster in (EVERYBODY, c)]
            parts[str(cluster)] = Logits(logits=weighted_mean(members))
        return Bundle(parts=parts)

    def renumbered(self, found: np.ndarray, before: Sequence[int]) -> np.ndarray:
        """Return the clusters ``found`` [K] under the numbers that most of their devices had ``before``."""
        from scipy.optimize import linear_sum_assignment

        shared = np.zeros((self.clusters, self.clusters))
        for new, old in zip(found, before, strict=True):
            shared[new, old] += old != EVERYBODY
        kept: np.ndarray = linear_sum_assignment(shared, maximize=True)[1][found]
        return kept

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        told, cluster = knowledge.tensors(), server.memory["cluster"].clone()
        cluster[told["who/indices"]] = told["cluster/indices"]
        return replace(server, memory={**server.memory, "cluster": cluster})

    def audience(self, card: Card, server: ServerState) -> Hashable:
        return int(server.memory["cluster"][card.id])

    def broadcast(self, server: ServerState, card: Card) -> Payload:
        if not isinstance(server.knowledge, Bundle):
            return Nothing()
        parts = server.knowledge.parts
        return parts.get(str(self.audience(card, server)), parts[str(EVERYBODY)])

    # ---- device -----------------------------------------------------------------------------------------------------
    def public_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        teacher = heard.knowledge.tensors()["logits"][batch.index]
        return self.weight * batch.mean(squared_error(net(batch), teacher))

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.public is not None
        return Logits(logits=net(view.public))
