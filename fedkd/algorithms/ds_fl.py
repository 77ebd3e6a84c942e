"""DS-FL: distillation-based semi-supervised federated learning.

S. Itahara, T. Nishio, Y. Koda, M. Morikura, K. Yamamoto, "Distillation-Based Semi-Supervised Federated Learning for
Communication-Efficient Collaborative Training with Non-IID Private Data", IEEE Transactions on Mobile Computing 2021,
https://arxiv.org/abs/2008.06180.

Each round the devices distil from the last global soft labels, train on their own records, and send class
*probabilities* of unlabelled open samples. The server averages them to p̄ and sharpens: entropy reduction aggregation
(ERA) takes softmax(p̄ / T), T = 0.1; simple aggregation (SA) takes p̄. The global model learns the result.

Deviations: the paper distils devices at the end of a round and trains at the beginning; here the walk is distil -> train
-> predict, which is the same sequence shifted by one exchange, and the last labels reach the server's student alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, final

from torch import Tensor

from fedkd.aggregators import era, mean_of
from fedkd.algorithms.base import Algorithm, Answers, Batch, Heard, ServerState, ServerTools, View
from fedkd.losses import soft_cross_entropy
from fedkd.payloads import Payload, SoftLabels

if TYPE_CHECKING:
    from fedkd.nets import Net


@final
@dataclass(frozen=True, kw_only=True)
class DSFL(Algorithm):
    """Soft labels of unlabelled open samples, sharpened by ERA. See the module text."""

    name: ClassVar[str] = "ds_fl"
    paper: ClassVar[str] = "Itahara et al., IEEE TMC 2021"
    upload: ClassVar[type[Payload]] = SoftLabels
    download: ClassVar[type[Payload]] = SoftLabels
    proxy: ClassVar[Literal["none", "unlabelled", "labelled"]] = "unlabelled"
    predictors: ClassVar[bool] = True
    weighs: ClassVar[bool] = True
    student: ClassVar[bool] = True

    aggregation: Literal["era", "mean"] = "era"  # ERA or SA
    temperature: float = 0.1  # T of ERA

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError("temperature must be above 0: it divides the mean probabilities")

    def needs_each(self) -> str | None:
        return None

    def public_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        return batch.mean(soft_cross_entropy(net(batch), heard.knowledge.tensors()["labels"][batch.index]))

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.public is not None
        return SoftLabels(labels=net.probabilities(view.public))

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        mean = mean_of(answers, lambda a: a.payload.tensors()["labels"])
        return SoftLabels(labels=era(mean, self.temperature) if self.aggregation == "era" else mean)

    def server_loss(self, net: Net, batch: Batch, knowledge: Payload) -> Tensor:
        return batch.mean(soft_cross_entropy(net(batch), knowledge.tensors()["labels"][batch.index]))
