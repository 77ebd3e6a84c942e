"""What methods share whose devices hold a private model and a copy of the server's, which learn together."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar

from fedkd.algorithms.base import Algorithm, Heard, Phase
from fedkd.payloads import Payload, Weights


@dataclass(frozen=True, kw_only=True)
class MutualLearning(Algorithm, ABC):
    """Devices train the roles ``model`` (their own) and ``shared`` (the student's architecture) in one phase."""

    upload: ClassVar[type[Payload]] = Weights
    download: ClassVar[type[Payload]] = Weights
    roles: ClassVar[tuple[str, ...]] = ("model", "shared")
    keeps: ClassVar[tuple[str, ...]] = ("model",)
    student: ClassVar[bool] = True
    weighted: ClassVar[bool] = True
    weighs: ClassVar[bool] = True

    def plan(self, heard: Heard) -> tuple[Phase, ...]:
        loss, trains = self.private_loss, ("model", "shared")
        return (Phase(name="mutual", data="private", loss=loss, settings="training", trains=trains),)
