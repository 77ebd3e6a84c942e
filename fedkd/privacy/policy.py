"""A node's own policy: what any server may ask of it at most. Read from the node's disk, never from a message."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedkd.errors import ConfigError, FedkdError


class AskedPrivacy(Protocol):
    """The section ``privacy`` of what is asked."""

    @property
    def kind(self) -> str: ...

    @property
    def seeded(self) -> bool: ...

    @property
    def secure_sum(self) -> bool: ...


class AskedPopulation(Protocol):
    """The section ``population`` of what is asked."""

    @property
    def minimum(self) -> int: ...


class Named(Protocol):
    """Something with a name."""

    @property
    def name(self) -> str: ...


class Asked(Protocol):
    """What of an experiment a policy looks at: an :class:`fedkd.experiment.Experiment` has it."""

    @property
    def privacy(self) -> AskedPrivacy: ...

    @property
    def population(self) -> AskedPopulation: ...

    @property
    def rounds(self) -> int: ...

    @property
    def method(self) -> Named: ...


class PolicyError(FedkdError):
    """A server asks for more than this node's policy allows."""


class Policy(BaseModel):
    """``clients/policy.yaml``. Nothing in it can be changed by a server; a request beyond it is refused and said so."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epsilon: float | None = Field(
        None, gt=0, description="Most that this node's records may ever cost, over all runs and servers; null: no cap."
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="Delta at which `epsilon` is counted.")
    require_privacy: bool = Field(
        False,
        description="Refuse experiments without differential privacy. Implied by `epsilon`. Alone it takes `labels` and "
        "`votes`, whose noise a server adds that sees this node's raw answers: give `epsilon` where it is not trusted.",
    )
    min_cohort: int = Field(1, ge=1, description="Refuse experiments that go on with fewer answers than this.")
    proxy_sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{32,64}$", description="Identity of the only proxy set that this node answers for."
    )
    max_request_bytes: int = Field(64_000_000, ge=1, description="Longest message that this node reads.")
    max_reply_bytes: int = Field(64_000_000, ge=1, description="Longest message that this node sends.")
    max_rounds: int | None = Field(None, ge=1, description="Most rounds of one run that this node takes part in.")

    @classmethod
    def load(cls, path: Path) -> Policy:
        """Read a policy.

        Raises:
            ConfigError: the file is missing or breaks the schema. A node without a readable policy must not start.
        """
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as cause:
            raise ConfigError(f"cannot read the policy {path}: {' '.join(str(cause).split())}") from cause
        try:
            return cls.model_validate(raw if raw is not None else {})
        except ValidationError as cause:
            faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'policy'}: {e['msg']}" for e in cause.errors())
            raise ConfigError(f"the policy {path} is not valid: {faults}") from cause

    def check_experiment(self, experiment: Asked, proxy_identity: str | None) -> None:
        """Refuse an experiment that goes beyond this policy, before anything is computed for it.

        Args:
            proxy_identity: SHA-256 (hex) of the proxy set at hand, None or empty where the experiment has none.
        Raises:
            PolicyError: naming what is asked and what is allowed.
        """
        kind = experiment.privacy.kind
        if (self.require_privacy or self.epsilon is not None) and kind == "none":
            raise PolicyError("this node's policy asks for differential privacy; the experiment has privacy.kind none")
        if self.epsilon is not None and kind in ("labels", "votes"):
            how = (
                "adds noise in shares, too little of it where the server invents the other devices"
                if experiment.privacy.secure_sum
                else "protects clients on the server only, which sees raw answers"
            )
            raise PolicyError(
                f"this node's policy caps what leaves this node; privacy.kind {kind} {how}: use dp_sgd, or lift the cap if "
                "you trust the server"
            )
        if experiment.privacy.seeded and (self.require_privacy or self.epsilon is not None):
            raise PolicyError("this node's policy asks for privacy; privacy.seeded makes noise that can be foreseen")
        if experiment.population.minimum < self.min_cohort:
            raise PolicyError(
                f"this node's policy asks for {self.min_cohort} answers at least; the experiment goes on with "
                f"population.minimum {experiment.population.minimum}"
            )
        if self.max_rounds is not None and experiment.rounds > self.max_rounds:
            raise PolicyError(
                f"this node's policy allows {self.max_rounds} rounds; the experiment has {experiment.rounds}"
            )
        if self.proxy_sha256 is not None and not proxy_identity:
            raise PolicyError(
                f"this node's policy pins proxy set {self.proxy_sha256[:16]}..., and method {experiment.method.name} asks "
                "for answers without one: those may tell more than labels of the pinned inputs"
            )
        if self.proxy_sha256 is not None and proxy_identity:
            n = min(len(self.proxy_sha256), len(proxy_identity))
            if n < 32 or self.proxy_sha256[:n] != proxy_identity[:n]:
                raise PolicyError(
                    f"this node's policy pins proxy set {self.proxy_sha256[:16]}..., the server speaks of "
                    f"{proxy_identity[:16]}...: labels of other inputs may tell more than was agreed to"
                )
