"""What methods that average weights share: devices adopt the server's weights, train, and send theirs back."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from fedkd.aggregators import mean_weights
from fedkd.algorithms.base import (
    Algorithm,
    Answers,
    DeviceState,
    DeviceTools,
    Heard,
    ServerState,
    ServerTools,
    View,
    adopt,
    with_model,
)
from fedkd.payloads import Payload, Weights

if TYPE_CHECKING:
    from fedkd.nets import Net


@dataclass(frozen=True, kw_only=True)
class WeightAveraging(Algorithm, ABC):
    """Devices start from the server's weights and keep no model; the server's model is the weighted mean."""

    upload: ClassVar[type[Payload]] = Weights
    download: ClassVar[type[Payload]] = Weights
    heterogeneous: ClassVar[bool] = False
    keeps: ClassVar[tuple[str, ...]] = ()
    student: ClassVar[bool] = True
    weighted: ClassVar[bool] = True

    def begin(self, server: ServerState, tools: ServerTools) -> ServerState:
        return replace(server, knowledge=Weights.from_tensors(server.models["student"][1]))

    def start(self, state: DeviceState, heard: Heard, tools: DeviceTools) -> DeviceState:
        return adopt(state, heard)

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        return Weights.from_tensors(net.weights)

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        return Weights.from_tensors(mean_weights(answers, weighted=True))

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        return with_model(server, "student", server.models["student"][0], knowledge.tensors())
