"""FedGEMS: a large server model that learns selectively from small ones, and teaches them back.

S. Cheng, J. Wu, Y. Xiao, Y. Liu, Y. Liu, "FedGEMS: Federated Learning of Larger Server Models via Selective Knowledge
Fusion", 2021, https://arxiv.org/abs/2110.11027 (algorithm 1).

All share a labelled public set. Devices send logits of its samples. The server's model (``models.student``, as large as one
likes) sorts the samples by what it says of them before it learns. One that it has right teaches by its label alone, and its
logits are remembered. One that it has wrong teaches by epsilon CE + (1 - epsilon) KL(teacher ‖ p), the teacher being its own
remembered logits if it was ever right, else the mean logits sum_k a_k z_k of the devices that are right, a = softmax_k(1 /
H(p_k)) among them, H being the entropy. Where no device is right either, the label teaches alone. The server returns its
logits, which the devices digest with the same two terms.

Deviations: samples are sorted once a round, not at every batch. H has a floor of 0.01 nat, so that one certain device does
not silence the rest. epsilon is that of the public code of AIJack, whose weights also count devices that are wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, final

import torch
from torch import Tensor

from fedkd.algorithms.base import Algorithm, Answers, Batch, Heard, ServerState, ServerTools, View, with_model
from fedkd.losses import cross_entropy, entropy, kl_divergence
from fedkd.payloads import Bundle, Chosen, Logits, Payload

if TYPE_CHECKING:
    from fedkd.nets import Net


@final
@dataclass(frozen=True, kw_only=True)
class FedGEMS(Algorithm):
    """Selective knowledge fusion. See the module text."""

    name: ClassVar[str] = "fedgems"
    paper: ClassVar[str] = "Cheng et al., 2021"
    upload: ClassVar[type[Payload]] = Logits
    download: ClassVar[type[Payload]] = Logits
    proxy: ClassVar[Literal["none", "unlabelled", "labelled"]] = "labelled"
    weighs: ClassVar[bool] = True
    student: ClassVar[bool] = True

    hard: float = (
        0.75  # epsilon, what labels count beside a teacher, on server and devices; the teacher counts the rest
    )

    def __post_init__(self) -> None:
        if not 0 <= self.hard <= 1:
            raise ValueError("hard must lie between 0 and 1: it is the share of the labels in the loss")

    def loss(self, logits: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss [B] of either side, ``teacher`` [B, C] being the logits of the other."""
        soft = kl_divergence(logits, teacher.softmax(-1))
        return self.hard * cross_entropy(logits, labels) + (1 - self.hard) * soft

    # ---- device -----------------------------------------------------------------------------------------------------
    def public_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        return batch.mean(self.loss(net(batch), batch.labels, heard.knowledge.tensors()["logits"][batch.index]))

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.public is not None
        return Logits(logits=net(view.public))

    # ---- server -----------------------------------------------------------------------------------------------------
    def begin(self, server: ServerState, tools: ServerTools) -> ServerState:
        logits = torch.zeros(tools.proxies, tools.classes, dtype=tools.dtype)
        return replace(server, memory={"logits": logits, "right": torch.zeros(tools.proxies, dtype=torch.bool)})

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        labels = tools.labels(tools.asked)
        logits = torch.stack([a.payload.tensors()["logits"] for a in answers])  # [K, N, C]
        worth = torch.tensor([a.weight for a in answers], dtype=logits.dtype)[:, None]
        right = (logits.argmax(-1) == labels).to(logits.dtype) * worth  # [K, N]
        certain = 1 / entropy(logits.softmax(-1)).clamp(min=1e-2)
        most = (certain * (right > 0)).amax(0)
        weight = right * (certain - most).clamp(max=0).exp()
        known = weight.sum(0) > 0
        mean = (weight[:, :, None] * logits).sum(0) / torch.where(known, weight.sum(0), 1.0)[:, None]
        return Bundle(parts={"mean": Logits(logits=mean), "known": Chosen(chosen=known.to(mean.dtype))})

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        name, weights = server.models["student"]
        asked, told = torch.from_numpy(tools.asked), knowledge.tensors()
        own = server.memory["right"][asked]
        memory, right = self.remember(server, tools)
        teacher = torch.where(own[:, None], server.memory["logits"][asked], told["mean/logits"])
        taught = ~right & (own | (told["known/chosen"] > 0))

        def loss(net: Net, batch: Batch) -> Tensor:
            logits = net(batch)
            both = self.loss(logits, batch.labels, teacher[batch.index])
            return batch.mean(torch.where(taught[batch.index], both, cross_entropy(logits, batch.labels)))

        server = with_model(server, "student", name, tools.train(name, weights, loss, tools.asked))
        logits = next(iter(tools.logits([server.models["student"]], tools.asked)))
        return replace(server, knowledge=Logits(logits=logits), memory=memory)

    def remember(self, server: ServerState, tools: ServerTools) -> tuple[dict[str, Tensor], Tensor]:
        """Return the memory with the logits of the samples asked that the server has right now, and which these are."""
        asked, memory = torch.from_numpy(tools.asked), {n: t.clone() for n, t in server.memory.items()}
        logits = next(iter(tools.logits([server.models["student"]], tools.asked)))
        right = logits.argmax(-1) == tools.labels(tools.asked)
        memory["logits"][asked[right]], memory["right"][asked[right]] = logits[right], True
        return memory, right
