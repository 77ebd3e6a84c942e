"""The experiment's choice of aggregator, put between the answers and any method that takes their mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedkd.aggregators.robust import (
    by_history,
    geometric_median,
    median,
    outlier_scores,
    spectral_filter,
    trimmed_mean,
)
from fedkd.errors import ConfigError
from fedkd.payloads import SoftLabels

if TYPE_CHECKING:
    from fedkd.algorithms.base import Algorithm, Answers

HISTORY = "aggregator/scores"


class AggregatorConfig(BaseModel):
    """How answers become one. `mean` leaves it to the method; the others are robust, in label space."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mean", "median", "trimmed", "geometric", "cronus", "history"] = "mean"
    share: float = Field(0.3, gt=0, lt=0.5, description="trimmed, cronus: share of answers that may be lies.")
    rate: float = Field(50.0, gt=0, description="history: how fast a device that sticks out loses its weight.")

    def check(self, method: Algorithm, *, secure_sum: bool, central: bool) -> None:
        """Refuse methods and mechanisms that a robust rule does not fit.

        Raises:
            ConfigError: with the reason and what to use instead.
        """
        if self.kind == "mean":
            return
        reason = method.needs_each()
        if method.upload is not SoftLabels or reason is not None:
            raise ConfigError(
                f"aggregator.kind {self.kind} puts one row of probabilities in the place of all devices', but "
                f"{reason or f'{method.name} sends {method.upload.__name__}'}: use ds_fl or cfd, or aggregator.kind=mean"
            )
        if secure_sum:
            raise ConfigError(
                f"aggregator.kind {self.kind} looks at every answer, and privacy.secure_sum lets the server see their sum "
                "alone: robust aggregation and secure sums exclude each other, choose one"
            )
        if central:
            raise ConfigError(
                f"aggregator.kind {self.kind} has a sensitivity that the noise on the mean does not cover: use "
                "aggregator.kind=mean under privacy.kind labels or votes"
            )

    def combine(
        self, answers: Answers, memory: Mapping[str, Tensor], devices: int
    ) -> tuple[Answers, dict[str, Tensor]]:
        """Return the answers that the method is to average, and what the server remembers of every device.

        Raises:
            ValueError: too few answers for the rule.
        """
        if self.kind == "mean":
            return answers, dict(memory)
        listed = list(answers)
        stack = torch.stack([a.payload.tensors()["labels"] for a in listed])
        remembered = dict(memory)
        if self.kind == "median":
            labels = median(stack)
        elif self.kind == "trimmed":
            labels = trimmed_mean(stack, self.share)
        elif self.kind == "geometric":
            labels = geometric_median(stack)
        elif self.kind == "cronus":
            labels = spectral_filter(stack, self.share)
        else:
            scores = remembered.get(HISTORY, torch.zeros(devices, dtype=torch.float64)).clone()
            who = torch.tensor([a.card.id for a in listed])
            scores[who] += outlier_scores(stack)
            remembered[HISTORY] = scores
            labels = by_history(stack, scores[who], self.rate)
        one = replace(listed[0], payload=SoftLabels(labels=labels), examples=1.0, weight=1.0)
        return (one,), remembered
