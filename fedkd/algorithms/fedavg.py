"""FedAvg.

H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Agüera y Arcas, "Communication-Efficient Learning of Deep Networks
from Decentralized Data", AISTATS 2017, https://arxiv.org/abs/1602.05629 (algorithm 1).

w <- sum_k (n_k / n) w_k over the devices that answered, w_k after local SGD from w.

Deviations: running statistics of batch normalisation are averaged like weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from fedkd.algorithms.averaging import WeightAveraging


@final
@dataclass(frozen=True, kw_only=True)
class FedAvg(WeightAveraging):
    """Weighted mean of locally trained weights. See the module text."""

    name: ClassVar[str] = "fedavg"
    paper: ClassVar[str] = "McMahan et al., AISTATS 2017"
