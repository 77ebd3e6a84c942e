"""What methods share that average weights and weigh the devices' models by class: counts of labels go up beside weights.

The counts leave the devices as they are, so that no mechanism of privacy covers them: DP-SGD refuses these methods.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.aggregators import mean_weights
from fedkd.algorithms.averaging import WeightAveraging
from fedkd.algorithms.base import Answer, Answers, Heard, ServerState, ServerTools, Shapes, Tensors, View
from fedkd.payloads import Bundle, Contract, LabelCounts, Payload, Weights

if TYPE_CHECKING:
    from fedkd.nets import Net


@dataclass(frozen=True, kw_only=True)
class CountedAveraging(WeightAveraging, ABC):
    """Weights and counts of labels up; knowledge is the mean of the weights, every device's own, and the counts."""

    upload: ClassVar[type[Payload]] = Bundle
    reads_private: ClassVar[bool] = True

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.private is not None
        real = (view.private.weight > 0).to(view.private.weight)
        counts = (F.one_hot(view.private.labels, view.classes).to(real) * real[:, None]).sum(0)
        return Bundle(parts={"model": Weights.from_tensors(net.weights), "counts": LabelCounts(counts=counts)})

    def contract_up(self, shapes: Shapes) -> Contract:
        model = Contract.of(Weights, shapes.dims, shapes.weights)
        return Contract.bundle({"model": model, "counts": Contract.of(LabelCounts, shapes.dims)})

    def catch_up(self, answer: Answer, heard: Payload, server: ServerState, tools: ServerTools) -> Answer:
        moved = super().catch_up(_model(answer), heard, server, tools)
        assert isinstance(answer.payload, Bundle)
        return replace(moved, payload=Bundle(parts={**answer.payload.parts, "model": moved.payload}))

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        models = [_model(a) for a in answers]
        counts = torch.stack([a.payload.tensors()["counts/counts"].to(tools.dtype) * a.weight for a in answers])
        parts: dict[str, Payload] = {str(a.card.id): a.payload for a in models}
        parts["mean"] = Weights.from_tensors(mean_weights(models, weighted=True))
        return Bundle(parts={**parts, "counts": Weights.from_tensors({"of": counts})})


def _model(answer: Answer) -> Answer:
    assert isinstance(answer.payload, Bundle)
    return replace(answer, payload=answer.payload.parts["model"])


def part(payload: Payload, name: str) -> Tensors:
    """Return the tensors of one part of a bundle."""
    assert isinstance(payload, Bundle)
    return payload.parts[name].tensors()


def apart(knowledge: Payload) -> tuple[Tensors, list[Tensors], Tensor]:
    """Return the mean weights, every device's weights [K], and the counts of labels [K, C]."""
    assert isinstance(knowledge, Bundle)
    parts = {name: part.tensors() for name, part in knowledge.parts.items()}
    counts, mean = parts.pop("counts")["of"], parts.pop("mean")
    return mean, list(parts.values()), counts


def shares(counts: Tensor) -> Tensor:
    """Return each device's share [K, C] of the records of each class; 0 where nobody holds any."""
    return counts / counts.sum(0).clamp(min=torch.finfo(counts.dtype).tiny)
