"""FedCache: logits of single records, found by hash.

Z. Wu, S. Sun, Y. Wang, M. Liu, K. Xu, W. Wang, X. Jiang, B. Gao, J. Lu, "FedCache: A Knowledge Cache-driven Federated
Learning Architecture for Personalized Edge Intelligence", IEEE Transactions on Mobile Computing 2024,
https://arxiv.org/abs/2308.07816.

Once, a device sends a hash and the label of each of its records; every round it sends the records' logits, which the
server caches. For each record the server looks up the R records of the same label whose hashes are nearest by cosine, and
returns the mean of their logits. The device minimises CE + beta · KL(softmax(that mean) ‖ p).

The labels and hashes of all private records leave the devices: this method protects nothing but the inputs.

Deviations: the hash is a fixed random projection of the inputs (``hash_width``), where the paper takes the features of a
pre-trained encoder. Neighbours are searched among the records of other devices, exactly instead of by HNSW.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.algorithms.base import (
    Algorithm,
    Answers,
    Batch,
    Card,
    Heard,
    ServerState,
    ServerTools,
    Shapes,
    Tensors,
    View,
)
from fedkd.losses import cross_entropy, kl_divergence
from fedkd.payloads import Bundle, Chosen, Contract, Features, Logits, Nothing, Payload

if TYPE_CHECKING:
    from fedkd.nets import Net


def neighbours(hashes: Tensor, labels: Tensor, owners: Tensor, count: int) -> list[Tensor]:
    """Return for each record [M] the positions of its ``count`` nearest of one label and of other owners, or fewer."""
    unit, found = F.normalize(hashes.double(), dim=1), [torch.zeros(0, dtype=torch.int64)] * len(labels)
    for label in labels.unique():
        where = (labels == label).nonzero().flatten()
        alike = unit[where] @ unit[where].T
        alike[owners[where][:, None] == owners[where][None, :]] = -np.inf
        near = alike.topk(min(count, len(where)), dim=1)
        for row, values, columns in zip(where.tolist(), near.values, near.indices, strict=True):
            found[row] = where[columns[values > -np.inf]]
    return found


@final
@dataclass(frozen=True, kw_only=True)
class FedCache(Algorithm):
    """Each record learns from its like on other devices. See the module text."""

    name: ClassVar[str] = "fedcache"
    paper: ClassVar[str] = "Wu et al., IEEE TMC 2024"
    upload: ClassVar[type[Payload]] = Features
    download: ClassVar[type[Payload]] = Bundle
    reads_private: ClassVar[bool] = True
    stackable: ClassVar[bool] = False

    related: int = 16  # R, records that teach one
    beta: float = 1.5  # beta, weight of what they say
    hash_width: int = 32

    # ---- device -----------------------------------------------------------------------------------------------------
    def private_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        logits = net(batch)
        loss = cross_entropy(logits, batch.labels)
        if isinstance(heard.knowledge, Bundle):
            told = heard.knowledge.tensors()
            known = told["known/chosen"][batch.index]
            teacher = told["logits/logits"][batch.index].softmax(-1)
            loss = loss + self.beta * known * kl_divergence(logits, teacher)
        return batch.mean(loss)

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.private is not None
        hashes, labels = self.hashes(view.private.x), view.private.labels
        if isinstance(heard.knowledge, Bundle):  # the server has them
            hashes, labels = hashes[:0], labels[:0]
        return Features(features=hashes, logits=net(view.private), labels=labels)

    def hashes(self, x: Tensor) -> Tensor:
        """Return the hashes [S, D] of records [S, ...]."""
        flat = x.flatten(1)
        draw = np.random.default_rng(self.hash_width).standard_normal((flat.shape[1], self.hash_width))
        return flat @ torch.from_numpy(draw / np.sqrt(flat.shape[1])).to(flat.dtype)

    # ---- server -----------------------------------------------------------------------------------------------------
    def contract_up(self, shapes: Shapes) -> Contract:
        return Contract.of(Features, {"C": shapes.classes, "D": self.hash_width})

    def contract_down(self, shapes: Shapes) -> Contract:
        return Contract.bundle({"known": Contract.of(Chosen, {}), "logits": Contract.of(Logits, {"C": shapes.classes})})

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        return Bundle(parts={str(a.card.id): a.payload for a in answers})

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        assert isinstance(knowledge, Bundle)
        memory = dict(server.memory)
        for client, part in knowledge.parts.items():
            told = part.tensors()
            if 0 < len(told["labels"]) == len(told["features"]):
                memory.pop(f"logits/{client}", None)
                memory |= {f"hash/{client}": told["features"], f"label/{client}": told["labels"]}
            if 0 < len(told["logits"]) == len(memory.get(f"label/{client}", ())):  # else it contradicts itself
                memory[f"logits/{client}"] = told["logits"]
        return replace(server, memory=memory, knowledge=self.look_up(memory))

    def look_up(self, memory: Tensors) -> Payload:
        """Return what each device is told: the mean logits of its records' like, and for which there are any."""
        clients = sorted((n.removeprefix("logits/") for n in memory if n.startswith("logits/")), key=int)
        if not clients:
            return Nothing()
        owners = torch.cat([torch.full((len(memory[f"label/{c}"]),), int(c)) for c in clients])
        hashes, labels, logits = (torch.cat([memory[f"{n}/{c}"] for c in clients]) for n in ("hash", "label", "logits"))
        found = neighbours(hashes, labels, owners, self.related)
        known = torch.tensor([float(len(f) > 0) for f in found], dtype=logits.dtype)
        mean = torch.stack([logits[f].mean(0) if len(f) else torch.zeros_like(logits[0]) for f in found])
        told: dict[str, Payload] = {}
        for client in clients:
            mine = owners == int(client)
            told[client] = Bundle(parts={"known": Chosen(chosen=known[mine]), "logits": Logits(logits=mean[mine])})
        return Bundle(parts=told)

    def audience(self, card: Card, server: ServerState) -> Hashable:
        return card.id

    def broadcast(self, server: ServerState, card: Card) -> Payload:
        if not isinstance(server.knowledge, Bundle):
            return Nothing()
        return server.knowledge.parts.get(str(card.id), Nothing())
