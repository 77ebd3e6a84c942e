"""A published loss is a term of a federated method: the same file on both engines, padding and all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import pytest
from harness import MLP, assert_finite, assert_same, play
from torch import Tensor

from fedkd.aggregators import mean_of
from fedkd.algorithms.base import Algorithm, Answers, Batch, Heard, ServerState, ServerTools, View
from fedkd.losses import LOSSES
from fedkd.payloads import Payload, SoftLabels


@final
@dataclass(frozen=True, kw_only=True)
class Told(Algorithm):
    """Mean soft labels, digested by whichever loss on logits is named: a teacher's logits are their logarithms."""

    name: ClassVar[str] = "told"
    paper: ClassVar[str] = "none"
    upload: ClassVar[type[Payload]] = SoftLabels
    download: ClassVar[type[Payload]] = SoftLabels
    proxy: ClassVar[Literal["none", "unlabelled", "labelled"]] = "unlabelled"
    student: ClassVar[bool] = True

    loss: str = "kd"

    def _teach(self, net: Any, batch: Batch, labels: Tensor) -> Tensor:
        return LOSSES[self.loss]()(net(batch), labels.clamp(min=1e-6).log(), None, batch.weight)

    def public_loss(self, net: Any, batch: Batch, heard: Heard) -> Tensor:
        return self._teach(net, batch, heard.knowledge.tensors()["labels"][batch.index])

    def answer(self, net: Any, view: View, heard: Heard) -> Payload:
        assert view.public is not None
        return SoftLabels(labels=net.probabilities(view.public))

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        return SoftLabels(labels=mean_of(answers, lambda a: a.payload.tensors()["labels"]))

    def server_loss(self, net: Any, batch: Batch, knowledge: Payload) -> Tensor:
        return self._teach(net, batch, knowledge.tensors()["labels"][batch.index])


SLOW = ("kd", "logits", "beta_js", "sp")


@pytest.mark.parametrize("loss", ["dist", "lskd", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_serial_and_stacked_devices_learn_the_same(loss: str) -> None:
    raw = {
        "algorithm": {"name": "test_published_losses:Told", "loss": loss},
        "models": {"student": MLP, "devices": [MLP]},
    }
    raw |= {"rounds": 2}
    one, many = (play(raw, kind=kind) for kind in ("serial", "stacked"))
    assert_same(one, many, 1e-9)
    assert_finite(one)
