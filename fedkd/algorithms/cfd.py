"""CFD: communication-efficient federated distillation.

F. Sattler, A. Marban, R. Rischke, W. Samek, "CFD: Communication-Efficient Federated Distillation via Soft-Label
Quantization and Delta Coding", IEEE Transactions on Network Science and Engineering 2022,
https://arxiv.org/abs/2012.00632.

Devices send soft labels of a fixed public set, quantised to b bits by Q_b(p) = argmin ‖q - p‖₁ over q in
{l/(2^b - 1)}, sum q = 1 (b = 1: the top class), coded against the last round's message, then entropy coded. The server
distils a net from their mean and sends the quantised labels of *that net* back (dual distillation). Devices restart from
random weights, distil, train and answer.

The quantiser, delta and entropy coding are the codec ``simplex:b+delta+entropy`` (``codec.up``, ``codec.down``), so that
bytes are those of the coded message.

Deviations: a range coder with a static model per message stands for the paper's arithmetic coder. The server's net goes
on from its last weights; ``server_restart`` lets it start from fresh random ones in every round, as devices do.
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
    with_model,
)
from fedkd.losses import soft_cross_entropy
from fedkd.payloads import Payload, SoftLabels

if TYPE_CHECKING:
    from fedkd.nets import Net


@final
@dataclass(frozen=True, kw_only=True)
class CFD(Algorithm):
    """Quantised soft labels both ways, through a net on the server. See the module text."""

    name: ClassVar[str] = "cfd"
    paper: ClassVar[str] = "Sattler et al., IEEE TNSE 2022"
    upload: ClassVar[type[Payload]] = SoftLabels
    download: ClassVar[type[Payload]] = SoftLabels
    proxy: ClassVar[Literal["none", "unlabelled", "labelled"]] = "unlabelled"
    predictors: ClassVar[bool] = True
    weighs: ClassVar[bool] = True
    student: ClassVar[bool] = True
    codecs: ClassVar[tuple[str, str]] = ("simplex:1+delta+entropy", "simplex:1+delta+entropy")

    restart: bool = True  # devices start every round from fresh random weights
    server_restart: bool = False  # and so does the server's net

    def needs_each(self) -> str | None:
        return None

    def start(self, state: DeviceState, heard: Heard, tools: DeviceTools) -> DeviceState:
        return replace(state, models={"model": tools.initial("restart")}) if self.restart else state

    def public_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        return batch.mean(soft_cross_entropy(net(batch), heard.knowledge.tensors()["labels"][batch.index]))

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.public is not None
        return SoftLabels(labels=net.probabilities(view.public))

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        return SoftLabels(labels=mean_of(answers, lambda a: a.payload.tensors()["labels"]))

    def server_loss(self, net: Net, batch: Batch, knowledge: Payload) -> Tensor:
        return batch.mean(soft_cross_entropy(net(batch), knowledge.tensors()["labels"][batch.index]))

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        if self.server_restart:
            name = server.models["student"][0]
            server = with_model(server, "student", name, tools.initial(name, "restart"))
        server = super().update(server, knowledge, tools)
        logits = next(iter(tools.logits([server.models["student"]], tools.asked)))
        return replace(server, knowledge=SoftLabels(labels=logits.softmax(-1)))
