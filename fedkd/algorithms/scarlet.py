"""SCARLET: soft-label caching and sharpening.

K. Azuma, T. Nishio, Y. Kitagawa, W. Nakano, T. Tanimura, "Soft-Label Caching and Sharpening for Communication-Efficient
Federated Distillation", IEEE Transactions on Mobile Computing 2026, https://arxiv.org/abs/2504.19602.

Server and devices keep the global soft labels z of proxy samples. Of those drawn for a round only samples are asked whose
label is not cached or older than D rounds; for the others the cached label serves, and nothing travels either way. New
labels are sharpened by enhanced ERA, z = p̄^beta / sum p̄^beta, p̄ the mean probabilities. A sample whose label has expired
is asked and sent, and leaves the cache until it is next drawn. A device that missed rounds is sent, once, the cached labels
that are newer than its own. One test, :meth:`SCARLET.fresh`, decides what is asked and what is kept: two that differ at age
= D would lose a label.

Deviations: as in DS-FL here, a round is distil -> train -> predict. A device keeps an expired label until it is
overwritten, so that one bit for each sample tells it whether a label follows; the paper's signals have three values.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor

from fedkd.aggregators import enhanced_era, mean_of
from fedkd.algorithms.base import (
    Algorithm,
    Answers,
    Batch,
    Card,
    DeviceState,
    DeviceTools,
    Heard,
    ServerState,
    ServerTools,
    Shapes,
    View,
)
from fedkd.losses import soft_cross_entropy
from fedkd.payloads import Bundle, Chosen, Contract, Nothing, Payload, ProxyIndices, SoftLabels

if TYPE_CHECKING:
    from fedkd.nets import Net


@final
@dataclass(frozen=True, kw_only=True)
class SCARLET(Algorithm):
    """Soft labels that are asked for once in D rounds. See the module text."""

    name: ClassVar[str] = "scarlet"
    paper: ClassVar[str] = "Azuma et al., IEEE TMC 2026"
    upload: ClassVar[type[Payload]] = SoftLabels
    download: ClassVar[type[Payload]] = Bundle
    proxy: ClassVar[Literal["none", "unlabelled", "labelled"]] = "unlabelled"
    weighs: ClassVar[bool] = True
    student: ClassVar[bool] = True

    beta: float = 1.0  # beta of enhanced ERA; the paper takes 1 at alpha .3 and 2 at .05
    duration: int = 50  # D, rounds for which a label serves; 0 caches nothing

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.duration < 0:
            raise ValueError("beta must be above 0, and duration at least 0")

    def fresh(self, stamp: Tensor, round: int) -> Tensor:
        """Tell which labels, cached in round ``stamp`` [P] (-1: never), serve in ``round``."""
        return (stamp >= 0) & (round - stamp <= self.duration)

    # ---- server -----------------------------------------------------------------------------------------------------
    def begin(self, server: ServerState, tools: ServerTools) -> ServerState:
        memory = {
            "labels": torch.zeros(tools.proxies, tools.classes, dtype=tools.dtype),
            "stamp": torch.full((tools.proxies,), -1),  # the round in which a label was cached
            "heard": torch.full((tools.devices,), -1),  # the last round whose message a device surely heard
            "sent": torch.zeros(0),  # which samples of the knowledge come with a label
            "last": torch.tensor(-1),  # the round that the knowledge is of
        }
        return replace(server, memory=memory)

    def ask(self, server: ServerState, drawn: np.ndarray) -> np.ndarray:
        found: np.ndarray = drawn[~self.fresh(server.memory["stamp"], server.round).numpy()[drawn]]
        return found

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        labels = server.memory["labels"].clone()
        mean = mean_of(answers, lambda a: a.payload.tensors()["labels"])
        labels[torch.from_numpy(tools.asked)] = enhanced_era(mean, self.beta)
        return SoftLabels(labels=labels)

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        told, round = knowledge.tensors(), server.round - 1
        asked = torch.from_numpy(tools.asked)
        stamp, heard = server.memory["stamp"].clone(), server.memory["heard"].clone()
        stamp[asked] = torch.where(stamp[asked] >= 0, -1, round)
        heard[torch.tensor(tools.heard)] = round
        taught = SoftLabels(labels=told["labels"][torch.from_numpy(tools.drawn)])
        sent = torch.from_numpy(np.isin(tools.drawn, tools.asked)).to(tools.dtype)
        memory = {"labels": told["labels"], "stamp": stamp, "heard": heard, "sent": sent}
        memory["last"] = torch.tensor(round)
        name, weights = server.models["student"]
        student = tools.train(
            name, weights, lambda net, b: b.mean(soft_cross_entropy(net(b), taught.labels[b.index])), tools.drawn
        )
        models = {**server.models, "student": (name, student)}
        return replace(server, models=models, knowledge=taught, asked=tools.drawn, memory=memory)

    def audience(self, card: Card, server: ServerState) -> Hashable:
        return int(server.memory["heard"][card.id])

    def broadcast(self, server: ServerState, card: Card) -> Payload:
        if isinstance(server.knowledge, Nothing):
            return server.knowledge
        memory, stamp = server.memory, server.memory["stamp"]
        # What was cached before the last message that it heard has reached the device; the last labels are sent below.
        missed = (stamp >= max(0, int(memory["heard"][card.id]))) & (stamp < memory["last"])
        parts: dict[str, Payload] = {
            "sent": Chosen(chosen=memory["sent"]),
            "labels": SoftLabels(labels=server.knowledge.tensors()["labels"][memory["sent"].bool()]),
            "missed": ProxyIndices(indices=missed.nonzero().flatten()),
            "missed labels": SoftLabels(labels=memory["labels"][missed]),
        }
        return Bundle(parts=parts)

    def contract_down(self, shapes: Shapes) -> Contract:
        labels = Contract.of(SoftLabels, {"C": shapes.classes})
        sent, missed = Contract.of(Chosen, {"N": shapes.samples}), Contract.of(ProxyIndices, {"C": shapes.proxies})
        return Contract.bundle({"sent": sent, "labels": labels, "missed": missed, "missed labels": labels})

    # ---- device -----------------------------------------------------------------------------------------------------
    def start(self, state: DeviceState, heard: Heard, tools: DeviceTools) -> DeviceState:
        if not isinstance(heard.knowledge, Bundle):
            return state
        told = heard.knowledge.tensors()
        cache = state.memory.get("cache", torch.zeros(tools.proxies, tools.classes, dtype=tools.dtype)).clone()
        cache[told["missed/indices"]] = told["missed labels/labels"]
        cache[heard.teach[told["sent/chosen"].bool()]] = told["labels/labels"]
        return replace(state, memory={"cache": cache})

    def public_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        return batch.mean(soft_cross_entropy(net(batch), heard.memory["cache"][heard.teach[batch.index]]))

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.public is not None
        nothing = view.public.new_zeros(0, view.classes)
        return SoftLabels(labels=net.probabilities(view.public) if len(view.public) else nothing)
