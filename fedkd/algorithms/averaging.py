"""What methods that average weights share: devices adopt the server's weights, train, and send theirs back."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fedkd.aggregators import mean_weights
from fedkd.algorithms.base import (
    Algorithm,
    Answer,
    Answers,
    DeviceState,
    DeviceTools,
    Heard,
    ServerState,
    ServerTools,
    Tensors,
    View,
    adopt,
    with_model,
)
from fedkd.payloads import Payload, Weights

if TYPE_CHECKING:
    from fedkd.nets import Net


@dataclass(frozen=True, kw_only=True)
class WeightAveraging(Algorithm, ABC):
    """Devices start from the server's weights and keep no model; the server's model is the weighted mean.

    An answer to an older request is taken as what it adds to the weights its device started from: it becomes
    w_now + s · (w_k - w_then), with s its weight by staleness. The mean of such answers over a buffer is the update of
    J. Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022,
    https://arxiv.org/abs/2106.06639 (algorithm 1, server learning rate 1), weighted by records as everywhere here.
    Buffers of the model (running statistics) move from the server's value towards the device's by s instead: a sum of
    differences might make a variance negative.
    """

    upload: ClassVar[type[Payload]] = Weights
    download: ClassVar[type[Payload]] = Weights
    heterogeneous: ClassVar[bool] = False
    keeps: ClassVar[tuple[str, ...]] = ()
    student: ClassVar[bool] = True
    weighted: ClassVar[bool] = True
    weighs: ClassVar[bool] = True

    def begin(self, server: ServerState, tools: ServerTools) -> ServerState:
        return replace(server, knowledge=Weights.from_tensors(server.models["student"][1]))

    def start(self, state: DeviceState, heard: Heard, tools: DeviceTools) -> DeviceState:
        return adopt(state, heard)

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        return Weights.from_tensors(net.weights)

    def catch_up(self, answer: Answer, heard: Payload, server: ServerState, tools: ServerTools) -> Answer:
        now = self.broadcast(server, answer.card)
        if not (isinstance(heard, Weights) and isinstance(now, Weights)):
            return answer
        then, present, trained = heard.tensors(), now.tensors(), answer.payload.tensors()
        parameters = tools.trainable(answer.card.architecture)
        moved = {
            name: present[name] + answer.weight * (value - (then if name in parameters else present)[name])
            if value.is_floating_point()
            else value
            for name, value in trained.items()
        }
        return replace(answer, payload=Weights.from_tensors(moved), weight=1.0)

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        return Weights.from_tensors(mean_weights(answers, weighted=True))

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        return with_model(server, "student", server.models["student"][0], knowledge.tensors())


def flatten(tensors: Tensors) -> Tensor:
    """Return all tensors of floats as one vector, by name: messages and checkpoints keep no other order."""
    return torch.cat([t.flatten() for _, t in sorted(tensors.items()) if t.is_floating_point()])


def unflatten(flat: Tensor, like: Tensors) -> dict[str, Tensor]:
    """Undo :func:`flatten`; counters are taken from ``like``."""
    out, at = {}, 0
    for name, value in sorted(like.items()):
        if not value.is_floating_point():
            out[name] = value
            continue
        out[name], at = flat[at : at + value.numel()].reshape(value.shape), at + value.numel()
    return out


def added(base: Tensors, change: Tensors, sign: float = 1.0) -> dict[str, Tensor]:
    """Return base + sign · change; counters are taken from ``base`` where sign is negative, else from ``change``."""
    keep = base if sign < 0 else change
    return {n: t + sign * change[n] if t.is_floating_point() else keep[n] for n, t in base.items()}
