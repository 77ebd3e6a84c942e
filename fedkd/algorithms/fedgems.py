"""FedGEMS: a large server model that learns selectively from small ones, and teaches them back.

S. Cheng, J. Wu, Y. Xiao, Y. Liu, Y. Liu, "FedGEMS: Federated Learning of Larger Server Models via Selective Knowledge
Fusion", 2021, https://arxiv.org/abs/2110.11027 (algorithm 1).

All share a labelled public set. Devices send logits of its samples. The server's model (``models.student``, as large as one
likes) learns each sample by its label and by one teacher: a sample that it has right, now or in an earlier round, by its
own logits of that time, which it remembers; any other by the devices that have it right, weighted by
softmax_k(1 / H(p_k)), H being the entropy. Where no device is right either, the label teaches alone. The server returns
its logits, which the devices digest: (1 - soft) CE + soft KL(p_server ‖ p) on both sides.

Deviations: ``soft`` is ours. Labels weigh the same in all three cases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, final

import torch
from torch import Tensor

from fedkd.algorithms.base import Algorithm, Answers, Batch, Heard, ServerState, ServerTools, View, with_model
from fedkd.losses import cross_entropy, entropy, kl_divergence
from fedkd.payloads import Bundle, Chosen, Logits, Payload, SoftLabels

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

    soft: float = 0.5  # what the teacher counts, on server and devices; labels count the rest

    # ---- device -----------------------------------------------------------------------------------------------------
    def public_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        logits, teacher = net(batch), heard.knowledge.tensors()["logits"][batch.index].softmax(-1)
        return batch.mean(
            (1 - self.soft) * cross_entropy(logits, batch.labels) + self.soft * kl_divergence(logits, teacher)
        )

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
        p = (weight[:, :, None] * logits.softmax(-1)).sum(0) / torch.where(known, weight.sum(0), 1.0)[:, None]
        p = torch.where(known[:, None], p, 1 / tools.classes)
        return Bundle(parts={"labels": SoftLabels(labels=p), "known": Chosen(chosen=known.to(p.dtype))})

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        name, weights = server.models["student"]
        asked, told = torch.from_numpy(tools.asked), knowledge.tensors()
        memory = self.remember(server, tools)
        own = memory["right"][asked]
        teacher = torch.where(own[:, None], memory["logits"][asked].softmax(-1), told["labels/labels"])
        known = (own | (told["known/chosen"] > 0)).to(teacher.dtype)

        def loss(net: Net, batch: Batch) -> Tensor:
            logits = net(batch)
            soft = known[batch.index] * kl_divergence(logits, teacher[batch.index])
            return batch.mean((1 - self.soft) * cross_entropy(logits, batch.labels) + self.soft * soft)

        server = with_model(server, "student", name, tools.train(name, weights, loss, tools.asked))
        logits = next(iter(tools.logits([server.models["student"]], tools.asked)))
        return replace(server, knowledge=Logits(logits=logits), memory=memory)

    def remember(self, server: ServerState, tools: ServerTools) -> dict[str, Tensor]:
        """Return the memory with the logits of all samples asked that the server has right now."""
        asked, memory = torch.from_numpy(tools.asked), {n: t.clone() for n, t in server.memory.items()}
        logits = next(iter(tools.logits([server.models["student"]], tools.asked)))
        right = logits.argmax(-1) == tools.labels(tools.asked)
        memory["logits"][asked[right]], memory["right"][asked[right]] = logits[right], True
        return memory
