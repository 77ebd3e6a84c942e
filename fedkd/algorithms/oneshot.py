"""What one-shot methods without data share: devices send their weights, the server teaches a student on inputs it makes.

Meant for ``rounds: 1``. With more rounds devices go on from their own weights, and the student from its last ones; who did
not answer in a round is no teacher in it. Devices may run different architectures.

An interruption within the one round costs a minute of the server's work, and the devices' own.

What happens after the answers sees them alone. Under DP-SGD it is post-processing: it costs no privacy, and the ledger's
epsilon covers it.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from fedkd.algorithms.base import Algorithm, Answers, Heard, ServerState, ServerTools, View, with_model
from fedkd.distill.datafree import DataFree, Form, ModelsGuide, Synthesizer
from fedkd.distill.loop import Fit
from fedkd.errors import ConfigError
from fedkd.payloads import Bundle, Nothing, Payload, Weights

if TYPE_CHECKING:
    from fedkd.models import Architecture
    from fedkd.nets import Net


PAUSE = 60.0
"""Seconds between two checkpoints of a round's work on the server."""


@dataclass(frozen=True, kw_only=True)
class OneShot(Algorithm, ABC):
    """Weights up, a student taught without data. Subclasses say how inputs are made, and the published settings."""

    upload: ClassVar[type[Payload]] = Weights
    student: ClassVar[bool] = True
    weighs: ClassVar[bool] = True

    make: Synthesizer  # how inputs are made
    epochs: int = 200  # of the student; every one begins with new inputs
    batch_size: int = 128  # of the student
    lr: float = 0.01  # of its SGD
    momentum: float = 0.9
    weight_decay: float = 0.0
    anneal: bool = False  # lower lr to 0 by a cosine
    clip: float | None = None  # largest norm of a step's gradient
    pool: int = 51_200  # inputs kept; the oldest give way

    def check(self, architectures: Mapping[str, Architecture]) -> None:
        for name, architecture in architectures.items():
            try:
                self.make.check(ModelsGuide([architecture.build(0)]))
            except ConfigError as cause:
                raise ConfigError(f"devices run {name!r}, but {cause}") from cause

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        return Weights.from_tensors(net.weights)

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        worth = torch.tensor([a.weight for a in answers], dtype=tools.dtype)
        parts: dict[str, Payload] = {f"{a.card.id} {a.card.architecture}": a.payload for a in answers}
        return Bundle(parts={**parts, "shares": Weights.from_tensors({"of": worth / worth.sum()})})

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        assert isinstance(knowledge, Bundle)
        parts = dict(knowledge.parts)
        shares = parts.pop("shares").tensors()["of"]
        models = [(name.split(" ", 1)[1], part.tensors()) for name, part in parts.items()]
        # Convolutions of few channels are about twice as fast in this layout on a CPU.
        teachers = [tools.module(*model).to(memory_format=torch.channels_last) for model in models]  # type: ignore[call-overload]
        architecture, weights = server.models["student"]
        work = DataFree(
            tools.module(architecture, weights),
            ModelsGuide(teachers, shares),
            self.make,
            Form.within(tools.shape, tools.classes, tools.bounds),
            fit=Fit(
                epochs=self.epochs,
                batch_size=self.batch_size,
                lr=self.lr,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                schedule="cosine" if self.anneal else "constant",
                clip=self.clip,
            ),
            seed=tools.seed(self.name),
            keep=self.pool,
        )
        work.run(checkpoint=tools.scratch(self.name, weights, *(tensors for _, tensors in models)), pause=PAUSE)
        return replace(with_model(server, "student", architecture, work.taught()), knowledge=Nothing())
