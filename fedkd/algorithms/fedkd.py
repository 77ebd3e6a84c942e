"""FedKD: mutual distillation of a private teacher and a shared student, whose updates travel as truncated SVDs.

C. Wu, F. Wu, L. Lyu, Y. Huang, X. Xie, "Communication-Efficient Federated Learning via Knowledge Distillation", Nature
Communications 2022, https://arxiv.org/abs/2108.13323.

Teacher and student learn the device's records and each other. Distillation counts for less while both still err:
L_t = CE_t + KL(p_s ‖ p_t) / (CE_t + CE_s), L_s = CE_s + KL(p_t ‖ p_s) / (CE_t + CE_s). The device sends what its training
added to the student; every matrix of that is cut to the fewest singular values that hold the share
T(t) = T_start + (T_end - T_start) t of its energy, t being the share of training that is done. The server cuts the mean of
the updates the same way, adds it to the student, and sends it. Where only full rank holds the share, full rank is kept.

Choose an exact codec for messages down: what a lossy one takes from updates adds up on the devices.

Deviations: the update of a round stands for a step's gradient. Losses on hidden states and attention, which belong to the
paper's transformers, are left out; ``terms`` adds such losses of the library's. t is round / ``ramp``. A device that missed
a message is sent the whole student, and a matrix that is shorter than its factors is sent as it is.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

import torch
from torch import Tensor

from fedkd.aggregators import weighted_mean
from fedkd.algorithms.averaging import added
from fedkd.algorithms.base import (
    Answers,
    Batch,
    Card,
    DeviceState,
    DeviceTools,
    Heard,
    ServerState,
    ServerTools,
    Shapes,
    Tensors,
    View,
    with_model,
)
from fedkd.algorithms.mutual import MutualLearning
from fedkd.codecs import lowrank
from fedkd.losses import cross_entropy, kl_divergence
from fedkd.payloads import Contract, Payload, Weights

if TYPE_CHECKING:
    from fedkd.nets import Net

WHOLE, VERSION = "message is whole", "version of the student"


@final
@dataclass(frozen=True, kw_only=True)
class FedKD(MutualLearning):
    """A private teacher, and a shared student of low-rank updates. See the module text."""

    name: ClassVar[str] = "fedkd"
    paper: ClassVar[str] = "Wu et al., Nature Communications 2022"
    stackable: ClassVar[bool] = False

    start_energy: float = 0.95  # T_start
    end_energy: float = 0.98  # T_end
    ramp: int = 100  # rounds from T_start to T_end

    def __post_init__(self) -> None:
        MutualLearning.__post_init__(self)
        if not 0 < self.start_energy <= self.end_energy <= 1 or self.ramp < 1:
            raise ValueError("expected 0 < start_energy <= end_energy <= 1 and ramp of at least 1 round")

    def energy(self, round: int) -> float:
        """Return T(t) of a round."""
        return self.start_energy + (self.end_energy - self.start_energy) * min(1.0, round / self.ramp)

    # ---- device -----------------------------------------------------------------------------------------------------
    def start(self, state: DeviceState, heard: Heard, tools: DeviceTools) -> DeviceState:
        told, held = heard.knowledge.tensors(), own(state.memory)
        new = lowrank.expand(told, state.models["shared"])
        if not bool(told[WHOLE]):
            # An update that comes again, because the last round had no result, was added already.
            new = held if bool(state.memory[VERSION] == told[VERSION]) else added(held, new)
        memory = {**{f"held/{n}": t for n, t in new.items()}, VERSION: told[VERSION]}
        return replace(state, models={**state.models, "shared": new}, memory=memory)

    def private_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        teacher, student, more = self.both(net, batch, heard)
        errs, err = cross_entropy(teacher, batch.labels), cross_entropy(student, batch.labels)
        apart = kl_divergence(teacher, student.detach().softmax(-1))
        apart = apart + kl_divergence(student, teacher.detach().softmax(-1))
        return batch.mean(errs + err + apart / (errs + err).detach().clamp(min=1e-6)) + more

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        update = added(net["shared"].weights, own(heard.memory), -1.0)
        return Weights.from_tensors(lowrank.compress(update, self.energy(heard.round)))

    # ---- server -----------------------------------------------------------------------------------------------------
    def begin(self, server: ServerState, tools: ServerTools) -> ServerState:
        # The rounds in which each device last answered, and in which the student last moved.
        return replace(server, memory={"heard": torch.full((tools.devices,), -1), "moved": torch.tensor(-1)})

    def contract_up(self, shapes: Shapes) -> Contract:
        assert shapes.shared is not None
        return lowrank.contract(shapes.shared)

    def contract_down(self, shapes: Shapes) -> Contract:
        assert shapes.shared is not None
        return lowrank.contract({**shapes.shared, WHOLE: torch.tensor(True), VERSION: torch.tensor(0)})

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        like = server.models["student"][1]
        updates = [(lowrank.expand(a.payload.tensors(), like), a.weight * a.examples) for a in answers]
        mean = {
            name: weighted_mean([(u[name], w) for u, w in updates])
            if value.is_floating_point()
            else updates[0][0][name]
            for name, value in like.items()
        }
        small = lowrank.compress(mean, self.energy(server.round - 1))
        return Weights.from_tensors({**small, "who": torch.tensor([a.card.id for a in answers])})

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        told = knowledge.tensors()
        name, weights = server.models["student"]
        heard, round = server.memory["heard"].clone(), server.round - 1
        heard[told.pop("who")] = round
        server = with_model(server, "student", name, added(weights, lowrank.expand(told, weights)))
        memory = {"heard": heard, "moved": torch.tensor(round)}
        return replace(server, knowledge=Weights.from_tensors(told), memory=memory)

    def audience(self, card: Card, server: ServerState) -> Hashable:
        """Tell whether a device holds the student that the last update was added to: it answered in that round."""
        moved = int(server.memory["moved"])
        return moved >= 0 and int(server.memory["heard"][card.id]) == moved

    def broadcast(self, server: ServerState, card: Card) -> Payload:
        holds = bool(self.audience(card, server))
        told = server.knowledge.tensors() if holds else lowrank.compress(server.models["student"][1], None)
        version = server.memory["moved"] + 1
        return Weights.from_tensors({**told, WHOLE: torch.tensor(not holds), VERSION: version})


def own(memory: Tensors) -> dict[str, Tensor]:
    """Return the student as the server knows that the device holds it."""
    return {name.removeprefix("held/"): t for name, t in memory.items() if name.startswith("held/")}
