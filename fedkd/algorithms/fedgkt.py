"""FedGKT: group knowledge transfer.

C. He, M. Annavaram, S. Avestimehr, "Group Knowledge Transfer: Federated Learning of Large CNNs at the Edge", NeurIPS 2020,
https://arxiv.org/abs/2007.14513 (algorithm 1).

A device trains a small body and head, and sends features, logits and labels of all its records. The server trains a net
of its own on the features of all devices, L_s = CE + alpha · T² KL(p_device ‖ p_server), and returns to each device its
logits of that device's records, from which the device learns: L_k = CE + alpha · T² KL(p_server ‖ p_device).

The labels of all private records leave the devices as they are: this method protects nothing but the inputs.

Deviations: the server's net is a perceptron on the D features of the body (``width``, ``depth``), where the paper puts the
rest of a ResNet on feature maps. It goes on from round to round, trained by Adam for ``epochs`` over what came this round.
A device decides by its own head; the paper's joint model needs its server for every decision.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.algorithms.base import Algorithm, Answers, Batch, Card, Heard, ServerState, ServerTools, Shapes, View
from fedkd.losses import cross_entropy, kl_divergence
from fedkd.payloads import Bundle, Contract, Features, Logits, Nothing, Payload

if TYPE_CHECKING:
    from fedkd.nets import Net


@final
@dataclass(frozen=True, kw_only=True)
class FedGKT(Algorithm):
    """Features and labels up, a large net on the server, logits down. See the module text."""

    name: ClassVar[str] = "fedgkt"
    paper: ClassVar[str] = "He et al., NeurIPS 2020"
    upload: ClassVar[type[Payload]] = Features
    download: ClassVar[type[Payload]] = Logits
    features: ClassVar[bool] = True
    reads_private: ClassVar[bool] = True
    stackable: ClassVar[bool] = False

    alpha: float = 1.0  # weight of the distillation terms
    temperature: float = 3.0  # T
    width: int = 256  # of the server's hidden layers
    depth: int = 2  # number of them
    epochs: int = 5
    batch_size: int = 256
    lr: float = 1e-3

    def teach(self, logits: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss [B] of either side, ``teacher`` [B, C] being the logits of the other."""
        soft = kl_divergence(logits / self.temperature, (teacher / self.temperature).softmax(-1))
        return cross_entropy(logits, labels) + self.alpha * self.temperature**2 * soft

    # ---- device -----------------------------------------------------------------------------------------------------
    def private_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        logits = net(batch)
        if not isinstance(heard.knowledge, Logits):
            return batch.mean(cross_entropy(logits, batch.labels))
        return batch.mean(self.teach(logits, batch.labels, heard.knowledge.logits[batch.index]))

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.private is not None
        features = net.features(view.private)
        return Features(features=features, logits=net.head(features), labels=view.private.labels)

    # ---- server -----------------------------------------------------------------------------------------------------
    def contract_down(self, shapes: Shapes) -> Contract:
        return Contract.of(Logits, {"C": shapes.classes})

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        # An answer whose parts are not of one length contradicts itself: it is left out, as one of no records is.
        even = [a for a in answers if min(n := [len(t) for t in a.payload.tensors().values()]) == max(n) > 0]
        return Bundle(parts={str(a.card.id): a.payload for a in even})

    def net(self, width: int, classes: int) -> nn.Module:
        """Return the server's net of features [B, ``width``] with fresh weights."""
        sizes = [width, *[self.width] * self.depth]
        layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        assert isinstance(knowledge, Bundle)
        if not knowledge.parts:
            return server
        told = [part.tensors() for part in knowledge.parts.values()]
        features, logits, labels = (torch.cat([t[n] for t in told]) for n in ("features", "logits", "labels"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(tools.seed("server net"))
            net = self.net(features.shape[1], tools.classes).to(tools.dtype)
        if server.memory:
            net.load_state_dict(dict(server.memory))
        optimizer, rng = torch.optim.Adam(net.parameters(), lr=self.lr), np.random.default_rng(tools.seed("batches"))
        for _ in range(self.epochs):
            for part in torch.from_numpy(rng.permutation(len(labels))).split(self.batch_size):
                loss = self.teach(net(features[part]), labels[part], logits[part]).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            said = {k: Logits(logits=net(part.tensors()["features"])) for k, part in knowledge.parts.items()}
        memory = {n: t.detach().clone() for n, t in net.state_dict().items()}
        return replace(server, knowledge=Bundle(parts=said), memory=memory)

    def audience(self, card: Card, server: ServerState) -> Hashable:
        return card.id

    def broadcast(self, server: ServerState, card: Card) -> Payload:
        if not isinstance(server.knowledge, Bundle):
            return Nothing()
        return server.knowledge.parts.get(str(card.id), Nothing())
