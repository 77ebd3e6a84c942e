"""The part of an experiment that says when things happen: what late answers are worth, and what devices are like."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedkd.errors import ConfigError


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


class Draw(_Section):
    """Where a quantity of every device comes from. A bare number is the same for all of them."""

    kind: Literal["constant", "lognormal", "uniform", "choice"] = "constant"
    value: float | None = Field(None, description="constant: the value.")
    median: float | None = Field(None, description="lognormal: the median.")
    sigma: float = Field(1.0, ge=0, description="lognormal: deviation of the logarithm; at 1 a decile is 3.6 x away.")
    low: float | None = Field(None, description="uniform: least value.")
    high: float | None = Field(None, description="uniform: largest value.")
    values: tuple[float, ...] = Field((), description="choice: the kinds of devices.")
    weights: tuple[float, ...] = Field((), description="choice: how frequent each is; empty: all alike.")

    @model_validator(mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return {"value": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        needs: dict[str, tuple[str, ...]] = {
            "constant": ("value",),
            "lognormal": ("median",),
            "uniform": ("low", "high"),
            "choice": ("values",),
        }
        for name in needs[self.kind]:
            if getattr(self, name) in (None, ()):
                raise ConfigError(f"`{self.kind}` needs `{name}`")
        if self.kind == "uniform" and not (self.low or 0) <= (self.high or 0):
            raise ConfigError(f"`low` ({self.low:g}) is above `high` ({self.high:g})")
        if self.weights and len(self.weights) != len(self.values):
            raise ConfigError(f"{len(self.values)} values and {len(self.weights)} weights: give as many of each")
        if self.weights and (min(self.weights) < 0 or sum(self.weights) <= 0):
            raise ConfigError("weights must be at least 0, and one of them above")
        return self

    @property
    def least(self) -> float:
        """The least value that can come (for lognormal: the sign of all)."""
        return {
            "constant": self.value or 0.0,
            "lognormal": self.median or 0.0,
            "uniform": self.low or 0.0,
            "choice": min(self.values, default=0.0),
        }[self.kind]

    def of(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """Return one value per device [count]."""
        if self.kind == "lognormal":
            return (self.median or 0.0) * np.exp(self.sigma * rng.standard_normal(count))
        if self.kind == "uniform":
            return rng.uniform(self.low or 0.0, self.high or 0.0, count)
        if self.kind == "choice":
            shares = np.asarray(self.weights or [1.0] * len(self.values))
            return rng.choice(np.asarray(self.values), size=count, p=shares / shares.sum())
        return np.full(count, self.value or 0.0)


class VirtualConfig(_Section):
    """What simulated devices are like. Simulation only; all times are virtual, and none depends on this machine.

    The defaults are round figures for a mixed population of phones, not measurements.
    """

    trace: Path | None = Field(None, description="A CSV file of devices, in place of the draws: docs/simulator.md.")
    repeat_seconds: float | None = Field(None, gt=0, description="trace: windows come again after this time.")
    flops_per_second: Draw = Field(
        Draw(kind="lognormal", median=2e9, sigma=0.8), description="Operations per second that training reaches."
    )
    down_bytes_per_second: Draw = Draw(kind="lognormal", median=2.5e6, sigma=0.8)
    up_bytes_per_second: Draw = Draw(kind="lognormal", median=1e6, sigma=0.8)
    latency_seconds: Draw = Field(Draw(value=0.05), description="Added to every transfer.")
    on_seconds: Draw | None = Field(None, description="How long a device is there at a time; null: always.")
    off_seconds: Draw = Field(Draw(value=0.0), description="How long it is away (on battery, in use) in between.")
    cycle: Literal["fixed", "exponential"] = Field(
        "fixed",
        description="fixed: each device by its own clock, from a random phase; exponential: random spells of these means.",
    )
    predictor_flops: float = Field(
        1e6, gt=0, description="Operations per record learnt or answered by a client that is no torch model."
    )
    server_seconds: float = Field(0.0, ge=0, description="Time from a round's last answer to the next round.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name in ("flops_per_second", "down_bytes_per_second", "up_bytes_per_second", "on_seconds"):
            draw: Draw | None = getattr(self, name)
            if draw is not None and draw.least <= 0:
                raise ConfigError(f"virtual.{name} must be above 0, but {draw.least:g} can come")
        for name in ("latency_seconds", "off_seconds"):
            if getattr(self, name).least < 0:
                raise ConfigError(f"virtual.{name} must be at least 0, but {getattr(self, name).least:g} can come")
        if self.repeat_seconds is not None and self.trace is None:
            raise ConfigError("virtual.repeat_seconds belongs to virtual.trace: give a trace, or take it out")
        return self
