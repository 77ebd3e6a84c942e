"""The part of an experiment that says when things happen: late answers, and the devices' virtual time."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StalenessConfig(_Section):
    """What an answer is worth that comes after the round that asked for it. Its staleness s counts rounds closed since."""

    limit: int | None = Field(
        None, ge=0, description="Largest s that is used; null: 0 in synchronous rounds, any in asynchronous ones."
    )
    weighting: Literal["polynomial", "constant"] = Field(
        "polynomial", description="polynomial: (1 + s)^-power (FedAsync, FedBuff); constant: 1."
    )
    power: float = Field(0.5, ge=0, description="polynomial: a; 0.5 is FedBuff's.")

    def weight(self, staleness: int) -> float:
        """Return the weight of an answer of this staleness."""
        return 1.0 if self.weighting == "constant" else float((1 + staleness) ** -self.power)
