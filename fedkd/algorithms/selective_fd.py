"""Selective-FD: devices and server keep back what would mislead.

J. Shao, F. Wu, J. Zhang, "Selective Knowledge Sharing for Privacy-Preserving Federated Distillation without a Good
Teacher", Nature Communications 2024, https://arxiv.org/abs/2304.01731.

The selector of a device answers only proxy samples that resemble its own records. It estimates the ratio of the density
of its records to that of uniform noise u_1..u_n by kernel unconstrained least squares (KuLSIF): with a Gaussian kernel k of
width sigma, m of its records x_1..x_m, and K11 = k(u, u), K12 = k(u, x),

    a = -(K11 / n + lambda I)^-1 K12 1 / (n m lambda),   r(x) = sum_i a_i k(x, u_i) + sum_j k(x, x_j) / (m lambda),

and selects x if r(x) is above the ``quantile`` of r on records that were held out. The server averages each sample over
the devices that selected it, p̄, and drops it if ‖p̄ - onehot(argmax p̄)‖₁ > tau or if nobody selected it.

Deviations: the paper's public code multiplies by K11 / n + lambda I where its formula inverts it; the formula is followed.
The noise is uniform between the least and the largest value of the proxy samples, and sigma counts in their deviation: they
are public. A device fits on its first records (``fit`` of them, from two to ``fit_most``) and holds out as many that follow;
with fewer than four it selects nothing. tau is ours: the paper tunes it by data set. The server's student is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor

from fedkd.aggregators.scores import density_ratio
from fedkd.algorithms.base import (
    Algorithm,
    Answers,
    Batch,
    DeviceState,
    DeviceTools,
    Heard,
    ServerState,
    ServerTools,
    Shapes,
    View,
)
from fedkd.losses import soft_cross_entropy
from fedkd.payloads import Bundle, Chosen, Contract, Payload, SoftLabels

if TYPE_CHECKING:
    from fedkd.nets import Net


@final
@dataclass(frozen=True, kw_only=True)
class SelectiveFD(Algorithm):
    """Soft labels of the samples that a device knows about. See the module text."""

    name: ClassVar[str] = "selective_fd"
    paper: ClassVar[str] = "Shao et al., Nature Communications 2024"
    upload: ClassVar[type[Payload]] = Bundle
    download: ClassVar[type[Payload]] = Bundle
    proxy: ClassVar[Literal["none", "unlabelled", "labelled"]] = "unlabelled"
    reads_private: ClassVar[bool] = True
    stackable: ClassVar[bool] = False
    weighs: ClassVar[bool] = True
    student: ClassVar[bool] = True

    selects: bool = True  # False: every device answers every sample
    sigma: float = 5.0  # width of the kernel, in standard deviations of the proxy samples' numbers
    noise: int = 250  # n, samples of uniform noise
    fit: float = 0.05  # share of the records that the ratio is fitted on
    fit_most: int = 500
    quantile: float = 0.25  # of r on held-out records: the selector's threshold
    tau: float = 0.9  # largest distance of a mean answer from certainty: 1 for two that contradict; 2 lets all pass

    @property
    def ridge(self) -> float:
        """lambda = n^-1/2."""
        return float(self.noise**-0.5)

    # ---- device -----------------------------------------------------------------------------------------------------
    def select(self, records: Tensor, public: Tensor) -> Tensor:
        """Return as flags [N] which proxy samples ``public`` [N, ...] resemble ``records`` [S, ...]."""
        x, own = public.flatten(1), records.flatten(1)
        size = min(max(2, round(self.fit * len(own))), len(own) // 2, self.fit_most)
        if not self.selects or size < 2:
            return torch.full((len(x),), float(not self.selects), dtype=x.dtype)
        draw = torch.from_numpy(np.random.default_rng(self.noise).random((self.noise, x.shape[1]))).to(x.dtype)
        noise = x.min() + (x.max() - x.min()) * draw
        known, held = own[:size], own[size : 2 * size]
        width = self.sigma * float(x.std(correction=0).clamp(min=1e-6))
        ratio = density_ratio(torch.cat([x, held]), known, noise, width, self.ridge)
        return (ratio[: len(x)] > ratio[len(x) :].quantile(self.quantile)).to(x.dtype)

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.public is not None and view.private is not None
        chosen = self.select(view.private.x, view.public)
        labels = net.probabilities(view.public)[chosen.bool()]
        return Bundle(parts={"chosen": Chosen(chosen=chosen), "labels": SoftLabels(labels=labels)})

    def start(self, state: DeviceState, heard: Heard, tools: DeviceTools) -> DeviceState:
        if not isinstance(heard.knowledge, Bundle):
            return state
        told = heard.knowledge.tensors()
        return replace(state, memory={"labels": spread(told), "chosen": told["chosen/chosen"]})

    def public_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        loss = soft_cross_entropy(net(batch), heard.memory["labels"][batch.index])
        return batch.mean(heard.memory["chosen"][batch.index] * loss)

    def finish(self, state: DeviceState, answer: Payload, heard: Heard) -> DeviceState:
        return replace(state, memory={})

    # ---- server -----------------------------------------------------------------------------------------------------
    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        total = torch.zeros(len(tools.asked), tools.classes, dtype=torch.float64)
        votes = torch.zeros(len(tools.asked), dtype=torch.float64)
        for answer in answers:
            told = answer.payload.tensors()
            if len(told["labels/labels"]) == int(told["chosen/chosen"].sum()):  # else it contradicts itself
                total += answer.weight * spread(told)
                votes += answer.weight * told["chosen/chosen"]
        mean = total / torch.where(votes > 0, votes, 1.0)[:, None]
        chosen = (votes > 0) & (2 * (1 - mean.amax(-1)) <= self.tau)  # ‖p̄ - onehot‖₁, for rows that sum to 1
        labels = SoftLabels(labels=mean[chosen].to(tools.dtype))
        return Bundle(parts={"chosen": Chosen(chosen=chosen.to(tools.dtype)), "labels": labels})

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        kept, taught = knowledge.tensors()["chosen/chosen"].bool().numpy(), knowledge.tensors()["labels/labels"]
        if not kept.any():
            return server
        name, weights = server.models["student"]
        student = tools.train(
            name,
            weights,
            lambda net, batch: batch.mean(soft_cross_entropy(net(batch), taught[batch.index])),
            tools.asked[kept],
        )
        return replace(server, models={**server.models, "student": (name, student)})

    def contract_up(self, shapes: Shapes) -> Contract:
        labels = Contract.of(SoftLabels, {"C": shapes.classes})
        return Contract.bundle({"chosen": Contract.of(Chosen, {"N": shapes.samples}), "labels": labels})

    def contract_down(self, shapes: Shapes) -> Contract:
        return self.contract_up(shapes)


def spread(told: dict[str, Tensor]) -> Tensor:
    """Return the labels of chosen samples at their places [N, C], zeros elsewhere."""
    chosen, labels = told["chosen/chosen"].bool(), told["labels/labels"]
    return labels.new_zeros(len(chosen), labels.shape[1]).index_put((chosen,), labels)
