"""FedKT: one round of knowledge transfer by votes.

Q. Li, B. He, D. Song, "Practical One-Shot Federated Learning for Cross-Silo Setting", IJCAI 2021,
https://arxiv.org/abs/2010.01017 (algorithm 1).

A party partitions its records s times into t subsets and trains a teacher on each. The t teachers of a partition vote on
the unlabelled public samples, and their majority trains a student: s students, which the party sends. The server lets the
parties vote in turn, consistently: a party counts, with s votes, for the class that all its students agree on, and for
none where they do not. The majority trains the final model.

Differential privacy: with ``sends: votes`` and privacy.kind=votes a party sends its students' votes, and the server noises
their sum before anything is taught, on the ledger's account. The unit is a party, as in the paper's FedKT-L1, but noise is
Gaussian and a party has one vote. Else nothing is claimed: students leave as they are. FedKT-L2 (per record) is left out.

Deviations: a record's subset is a hash of its position. All teachers walk the same batches, each minding its own records. A
sample on which nobody agrees teaches nothing; under ``sends: votes`` a party whose students disagree votes by their mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.algorithms.base import (
    Algorithm,
    Answers,
    Batch,
    DeviceState,
    DeviceTools,
    Heard,
    Phase,
    ServerState,
    ServerTools,
    Shapes,
    View,
    with_model,
)
from fedkd.losses import cross_entropy
from fedkd.payloads import Bundle, Chosen, Contract, Nothing, Payload, Votes, Weights

if TYPE_CHECKING:
    from fedkd.nets import Net


def tally(votes: Tensor, classes: int) -> Tensor:
    """Return how many of ``votes`` [K, N] fall on each class [N, C]."""
    return F.one_hot(votes, classes).sum(0)


@final
@dataclass(frozen=True, kw_only=True)
class FedKT(Algorithm):
    """Teachers, students and a final model, each taught by the votes of the former. See the module text."""

    name: ClassVar[str] = "fedkt"
    paper: ClassVar[str] = "Li et al., IJCAI 2021"
    upload: ClassVar[type[Payload]] = Bundle
    proxy: ClassVar[Literal["none", "unlabelled", "labelled"]] = "unlabelled"
    keeps: ClassVar[tuple[str, ...]] = ()
    student: ClassVar[bool] = True

    partitions: int = 2  # s, also the number of students
    subsets: int = 5  # t, teachers of a partition
    sends: Literal["students", "votes"] = "students"  # votes: the mechanism privacy.kind=votes can protect them

    def __post_init__(self) -> None:
        if self.partitions < 1 or self.subsets < 1:
            raise ValueError("partitions and subsets must be at least 1")
        object.__setattr__(self, "roles", (*self.teachers(), *self.students()))  # what a device holds and sends hangs
        object.__setattr__(self, "upload", Votes if self.sends == "votes" else Bundle)  # on the parameters

    def needs_each(self) -> str | None:
        return None if self.sends == "votes" else super().needs_each()

    def teachers(self) -> tuple[str, ...]:
        """Return the roles of all teachers, partition by partition."""
        return tuple(f"teacher {i} {j}" for i in range(self.partitions) for j in range(self.subsets))

    def students(self) -> tuple[str, ...]:
        """Return the roles of the students."""
        return tuple(f"student {i}" for i in range(self.partitions))

    # ---- party ------------------------------------------------------------------------------------------------------
    def start(self, state: DeviceState, heard: Heard, tools: DeviceTools) -> DeviceState:
        return replace(state, models={role: tools.initial(role) for role in state.models})

    def plan(self, heard: Heard) -> tuple[Phase, ...]:
        return (
            Phase(name="teachers", data="private", loss=self.private_loss, settings="training", trains=self.teachers()),
            Phase(name="students", data="proxy", loss=self.public_loss, settings="digest", trains=self.students()),
        )

    def subset(self, index: Tensor, partition: int) -> Tensor:
        """Return the subset [B] of each record at ``index`` [B] in one partition."""
        return ((index + 1) * (2654435761 + 97 * partition) % 2**32 // 2**13) % self.subsets

    def private_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        loss = torch.zeros((), dtype=batch.weight.dtype)
        for i in range(self.partitions):
            for j in range(self.subsets):
                weight = batch.weight * (self.subset(batch.index, i) == j)
                errs = cross_entropy(net[f"teacher {i} {j}"](batch), batch.labels)
                loss = loss + (weight * errs).sum() / weight.sum().clamp(min=1e-12)
        return loss

    def public_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        loss = torch.zeros((), dtype=batch.weight.dtype)
        for i in range(self.partitions):
            said = torch.stack([net[f"teacher {i} {j}"](batch).detach() for j in range(self.subsets)])
            label = tally(said.argmax(-1), said.shape[-1]).argmax(-1)
            loss = loss + batch.mean(cross_entropy(net[f"student {i}"](batch), label))
        return loss

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        if self.sends == "votes" and view.public is not None:
            said = torch.stack([net[role](view.public).softmax(-1) for role in self.students()])
            return Votes(votes=said.mean(0).argmax(-1))
        return Bundle(parts={role: Weights.from_tensors(net[role].weights) for role in self.students()})

    # ---- server -----------------------------------------------------------------------------------------------------
    def contract_up(self, shapes: Shapes) -> Contract:
        students = {r: Contract.of(Weights, shapes.dims, shapes.weights) for r in self.students()}
        return Contract.of(Votes, shapes.dims) if self.sends == "votes" else Contract.bundle(students)

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        votes = torch.zeros(len(tools.asked), tools.classes, dtype=torch.int64)
        for answer in answers:
            if isinstance(answer.payload, Votes):
                votes += tally(answer.payload.votes[None], tools.classes)
                continue
            assert isinstance(answer.payload, Bundle)
            models = [(answer.card.architecture, part.tensors()) for part in answer.payload.parts.values()]
            said = tally(torch.stack([z.argmax(-1) for z in tools.logits(models, tools.asked)]), tools.classes)
            votes += torch.where(said == self.partitions, self.partitions, 0)
        agreed = Chosen(chosen=(votes.sum(-1) > 0).to(tools.dtype))
        return Bundle(parts={"label": Votes(votes=votes.argmax(-1)), "agreed": agreed})

    def server_loss(self, net: Net, batch: Batch, knowledge: Payload) -> Tensor:
        told = knowledge.tensors()
        loss = cross_entropy(net(batch), told["label/votes"][batch.index])
        return batch.mean(told["agreed/chosen"][batch.index] * loss)

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        name = server.models["student"][0]
        server = with_model(server, "student", name, tools.initial(name, "final"))
        return replace(super().update(server, knowledge, tools), knowledge=Nothing())
