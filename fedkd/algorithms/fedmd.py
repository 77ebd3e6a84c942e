"""FedMD.

D. Li, J. Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", NeurIPS 2019 workshop,
https://arxiv.org/abs/1910.03581 (algorithm 1).

Every party first trains on the labelled public set, then on its own records. Each round the parties send raw class
scores (logits) of a public subset, the server averages them, and every party digests the mean by the mean absolute error
of its logits and revisits its own records.

Deviations: a round is digest -> revisit -> communicate, so that one exchange serves a round and the last consensus is
not digested; a party that is first asked in a later round does its transfer learning then. Pretraining follows the
section ``pretrain``, digesting ``digest``, revisiting ``training``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, final

import torch
from torch import Tensor

from fedkd.aggregators import mean_of
from fedkd.algorithms.base import Algorithm, Answers, Batch, DeviceState, Heard, Phase, ServerState, ServerTools, View
from fedkd.losses import absolute_error, cross_entropy
from fedkd.payloads import Logits, Payload

if TYPE_CHECKING:
    from fedkd.nets import Net


@final
@dataclass(frozen=True, kw_only=True)
class FedMD(Algorithm):
    """Consensus of class scores on labelled public data. See the module text."""

    name: ClassVar[str] = "fedmd"
    paper: ClassVar[str] = "Li & Wang, NeurIPS workshop 2019"
    upload: ClassVar[type[Payload]] = Logits
    download: ClassVar[type[Payload]] = Logits
    proxy: ClassVar[Literal["none", "unlabelled", "labelled"]] = "labelled"
    predictors: ClassVar[bool] = True
    weighs: ClassVar[bool] = True

    def plan(self, heard: Heard) -> tuple[Phase, ...]:
        if "pretrained" in heard.memory:
            return super().plan(heard)
        transfer = (
            Phase(name="pretrain public", data="proxy", loss=self.private_loss, settings="pretrain"),
            Phase(name="pretrain private", data="private", loss=self.private_loss, settings="pretrain"),
        )
        return (*transfer, *super().plan(heard)[:-1])

    def private_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        return batch.mean(cross_entropy(net(batch), batch.labels))

    def public_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        return batch.mean(absolute_error(net(batch), heard.knowledge.tensors()["logits"][batch.index]))

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.public is not None
        return Logits(logits=net(view.public))

    def finish(self, state: DeviceState, answer: Payload, heard: Heard) -> DeviceState:
        return replace(state, memory={**state.memory, "pretrained": torch.ones(())})

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        return Logits(logits=mean_of(answers, lambda a: a.payload.tensors()["logits"]))
