"""FedProx.

T. Li, A. K. Sahu, M. Zaheer, M. Sanjabi, A. Talwalkar, V. Smith, "Federated Optimization in Heterogeneous Networks",
MLSys 2020, https://arxiv.org/abs/1812.06127 (algorithm 2).

Each device minimises F_k(w) + (mu / 2) ‖w - w^t‖², with w^t the server's weights.

Deviations: devices run a fixed amount of work instead of a gamma-inexact solution, and answers are weighted by records
(the paper samples devices with that probability and averages evenly).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from torch import Tensor

from fedkd.algorithms.averaging import WeightAveraging
from fedkd.algorithms.base import Batch, Heard
from fedkd.losses import cross_entropy

if TYPE_CHECKING:
    from fedkd.nets import Net


@final
@dataclass(frozen=True, kw_only=True)
class FedProx(WeightAveraging):
    """FedAvg with a proximal term. See the module text."""

    name: ClassVar[str] = "fedprox"
    paper: ClassVar[str] = "Li et al., MLSys 2020"

    mu: float = 0.01  # mu, weight of the proximal term

    def private_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        loss = batch.mean(cross_entropy(net(batch), batch.labels))
        start = heard.knowledge.tensors()
        distance = sum((w - start[name]).square().sum() for name, w in net.parameters.items())
        return loss + self.mu / 2 * distance
