"""Devices that lie, to test defences in simulation. An attack changes an honest answer just before it is sent.

Attackers are drawn by the seed. They see what a device sees: their own model and the server's messages; colluders share
a secret besides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedkd.errors import ConfigError
from fedkd.named import imported
from fedkd.payloads import Payload, SoftLabels
from fedkd.seeding import numpy_rng

if TYPE_CHECKING:
    from fedkd.algorithms.base import Algorithm

Kind = Literal["none", "label_flip", "lma", "cpa", "collude", "constant", "sybil"]


class AttackConfig(BaseModel):
    """A share of devices that lie about their soft labels.

    * `label_flip`: every class is called the next one, as after training on flipped labels.
    * `lma`: the class that the device itself holds least likely, with certainty (loss-maximising attack).
    * `cpa`: for each class the one that its samples resemble least over the whole set, with certainty (class-prior
      attack: consistent lies, which a student learns like a rule).
    * `collude`: all attackers agree on one wrong class for each class.
    * `constant`: class 0, whatever the sample.
    * `sybil`: one liar's random labels under many names.
    * `package.module:function`, yours: from honest probabilities [N, C] and a NumPy generator, equal for all attackers of a
      round, to those that are sent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind | Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] = "none"
    share: float = Field(0.3, ge=0, le=1, description="Share of devices that attack.")

    def check(self, method: Algorithm) -> None:
        """Refuse a method whose answers the attacks do not know, and an attack that cannot be imported.

        Raises:
            ConfigError: naming what they know, or what is missing.
        """
        if ":" in self.kind and not callable(imported(self.kind, "attack")):
            raise ConfigError(f"attack.kind {self.kind} is no function of probabilities and a generator")
        if self.kind != "none" and method.upload is not SoftLabels:
            raise ConfigError(
                f"attack.kind {self.kind} lies about soft labels; {method.name} sends {method.upload.__name__}: use ds_fl or "
                "cfd"
            )

    def attackers(self, devices: int, seed: int) -> frozenset[int]:
        """Return who attacks."""
        if self.kind == "none":
            return frozenset()
        count = int(np.floor(self.share * devices + 0.5))
        chosen = numpy_rng(seed, "attackers").choice(devices, size=count, replace=False)
        return frozenset(int(k) for k in chosen)

    def spoil(self, payload: Payload, *, seed: int, round: int) -> Payload:
        """Return the lie that is told instead of ``payload``."""
        if not isinstance(payload, SoftLabels) or self.kind == "none":
            return payload
        if ":" in self.kind:
            lie = imported(self.kind, "attack")(payload.labels, numpy_rng(seed, "attack", round))
            return SoftLabels(labels=lie.to(payload.labels.dtype))
        return SoftLabels(labels=_lie(self.kind, payload.labels, seed, round))


def _lie(kind: str, p: Tensor, seed: int, round: int) -> Tensor:
    """Return false probabilities [N, C] for honest ones.

    The loss-maximising and class-prior attacks are those of C. Roux, M. Zimmer, S. Pokutta, "On the Byzantine-Resilience
    of Distillation-Based Federated Learning", ICLR 2025, https://arxiv.org/abs/2402.12265, section 4, with the
    attacker's own answers in the place of the honest devices' mean, which a device does not see.
    """
    classes = p.shape[-1]
    if kind == "label_flip":
        return p.roll(1, dims=-1)
    if kind == "lma":
        wrong = p.argmin(-1)
    elif kind == "constant":
        wrong = torch.zeros(len(p), dtype=torch.int64)
    elif kind == "sybil":
        wrong = torch.from_numpy(numpy_rng(seed, "sybil", round).integers(classes, size=len(p)))
    elif kind == "collude":
        shift = int(numpy_rng(seed, "collude").integers(1, classes))
        wrong = (p.argmax(-1) + shift) % classes
    else:
        top = p.argmax(-1)
        hot = torch.nn.functional.one_hot(top, classes).to(p.dtype)
        # [C, C]: the mean answer to the samples called each class; a class never called keeps the overall mean.
        share = hot.T @ p / hot.sum(0).clamp(min=1).unsqueeze(1)
        share = torch.where(hot.sum(0).unsqueeze(1) > 0, share, p.mean(0))
        wrong = share.argmin(-1)[top]
    return torch.nn.functional.one_hot(wrong, classes).to(p.dtype)
