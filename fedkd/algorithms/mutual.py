"""What methods share whose devices hold a private model and a copy of the server's, which learn together."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fedkd.algorithms.base import Algorithm, Batch, Heard, Phase
from fedkd.distill.terms import Term, TermConfig, between_nets, refuse_parts
from fedkd.errors import ConfigError
from fedkd.payloads import Payload, Weights

if TYPE_CHECKING:
    from fedkd.models import Architecture
    from fedkd.nets import Net


@dataclass(frozen=True, kw_only=True)
class MutualLearning(Algorithm, ABC):
    """Devices train the roles ``model`` (their own) and ``shared`` (the student's architecture) in one phase.

    ``terms``: what the shared model learns of the device's own beside what the paper says, such as its attention maps or
    the relations of its features: see :class:`fedkd.distill.terms.TermConfig`. ``student`` names a layer of the shared model,
    ``teacher`` one of the device's own; a warm-up counts rounds. Losses with parts to train are refused, and layers are
    compared as they are, without an adapter.
    """

    upload: ClassVar[type[Payload]] = Weights
    download: ClassVar[type[Payload]] = Weights
    roles: ClassVar[tuple[str, ...]] = ("model", "shared")
    keeps: ClassVar[tuple[str, ...]] = ("model",)
    student: ClassVar[bool] = True
    weighted: ClassVar[bool] = True
    weighs: ClassVar[bool] = True

    terms: tuple[TermConfig, ...] = ()

    def __post_init__(self) -> None:
        refuse_parts(self.learnt)

    @property
    def learnt(self) -> tuple[Term, ...]:
        """The terms."""
        return tuple(config.term for config in self.terms)

    def check(self, architectures: Mapping[str, Architecture]) -> None:
        """Try the terms on two records, of a device's own model with itself: layers, and what losses ask of shapes."""
        from fedkd.nets import Net

        for architecture in architectures.values() if self.terms else ():
            net = Net({"model": architecture}, {"model": architecture.initial(0)})
            net.mode(training=False)
            x, labels = torch.zeros(2, *architecture.shape, dtype=architecture.dtype), torch.zeros(2, dtype=torch.int64)
            for term in self.learnt:
                with torch.no_grad():
                    logits, told = net.read(x, term.teacher_paths)
                own = dict(zip(term.student_paths, told.values(), strict=True))
                try:
                    between_nets([term], (logits, own), (logits, told), labels, logits.new_full((2,), 0.5), 0)
                except ValueError as cause:
                    raise ConfigError(f"term {term.name}: {cause}") from cause

    def plan(self, heard: Heard) -> tuple[Phase, ...]:
        loss, trains = self.private_loss, ("model", "shared")
        return (Phase(name="mutual", data="private", loss=loss, settings="training", trains=trains),)

    def both(self, net: Net, batch: Batch, heard: Heard) -> tuple[Tensor, Tensor, Tensor | float]:
        """Return the logits [B, C] of the device's own model and of the shared one, and the loss of ``terms``."""
        if not self.terms:
            return net(batch), net["shared"](batch), 0.0
        terms = self.learnt
        own = net.read(batch, [p for term in terms for p in term.teacher_paths])
        shared = net["shared"].read(batch, [p for term in terms for p in term.student_paths])
        return own[0], shared[0], between_nets(terms, shared, own, batch.y, batch.weight, heard.round)
