"""``policy.yaml`` of a device: what any server may ask of it at most. No message can change it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field, ValidationError

from fedkd.algorithms.catalogue import METHODS
from fedkd.errors import ConfigError
from fedkd.privacy.policy import Asked, Policy, PolicyError

if TYPE_CHECKING:
    from fedkd.experiment import Experiment

TRAINING = ("training", "digest", "pretrain")


class NodePolicy(Policy):
    """The policy of a real device. The fields of :class:`fedkd.privacy.policy.Policy` are about privacy and sizes."""

    methods: tuple[str, ...] | None = Field(
        None, description="Methods that this node takes part in, by name; null: all that come with fedkd."
    )
    models: tuple[str, ...] = Field(
        (), description="Models beyond those that come with fedkd, as package.module:Factory, that may be built here."
    )
    max_epochs: int = Field(100, ge=0, description="Most epochs of one stretch of training in a round.")
    max_steps: int = Field(100_000, ge=0, description="Most optimiser steps of one stretch of training in a round.")
    max_batch_size: int = Field(4096, ge=1)
    max_parameters: int = Field(200_000_000, ge=1, description="Largest model that this node builds.")
    max_proxy_samples: int = Field(1_000_000, ge=1, description="Largest proxy set that this node answers for.")
    max_bytes_per_day: int = Field(
        8_000_000_000, ge=1, description="Most bytes that this node reads and sends in a UTC day."
    )

    def check(self, experiment: Experiment, proxy_identity: str | None) -> None:
        """Refuse what goes beyond this policy.

        Raises:
            PolicyError: naming what is asked and what is allowed.
        """
        for name, most in (("epochs", self.max_epochs), ("steps", self.max_steps), ("batch_size", self.max_batch_size)):
            for section in TRAINING:
                wanted = getattr(getattr(experiment, section), name)
                if wanted is not None and wanted > most:
                    raise PolicyError(f"{section}.{name} is {wanted}, this node's policy allows max_{name} {most}")
        self.check_answers(experiment, 0 if experiment.proxy is None else experiment.proxy.size, proxy_identity)

    def check_answers(self, asked: Asked, proxy_samples: int, proxy_identity: str | None) -> None:
        """Refuse what goes beyond this policy, whether or not anything is trained for it.

        Raises:
            PolicyError: naming what is asked and what is allowed.
        """
        if proxy_samples > self.max_proxy_samples:
            raise PolicyError(
                f"the proxy set has {proxy_samples} samples, this node's policy allows {self.max_proxy_samples}"
            )
        self.check_experiment(asked, proxy_identity)

    def check_method(self, method: Any) -> None:
        """Refuse a method that is neither the library's nor allowed here, before anything is imported.

        Raises:
            PolicyError: naming it.
        """
        name = method.get("name") if isinstance(method, dict) else method
        known = METHODS if self.methods is None else self.methods
        if not isinstance(name, str) or name not in known:
            raise PolicyError(f"this node does not take part in method {name!r}: its policy allows {', '.join(known)}")

    def check_models(self, models: Iterable[Any]) -> None:
        """Refuse models that are neither the library's nor allowed here, before anything is imported.

        Raises:
            PolicyError: naming the model.
        """
        from fedkd.models.registry import REGISTRY

        for model in models:
            if model in self.models:
                continue
            if not isinstance(model, str) or model.partition("(")[0].strip() not in REGISTRY:
                raise PolicyError(
                    f"this node does not build model {model!r}: it is neither fedkd's own nor in `models:` of its policy"
                )


def read_policy(path: Path) -> NodePolicy:
    """Read a policy.

    Raises:
        ConfigError: the file is missing or breaks the schema. A node without a readable policy must not start.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as cause:
        raise ConfigError(f"cannot read the policy {path}: {' '.join(str(cause).split())}") from cause
    try:
        return NodePolicy.model_validate(raw if raw is not None else {})
    except ValidationError as cause:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'policy'}: {e['msg']}" for e in cause.errors())
        raise ConfigError(f"the policy {path} is not valid: {faults}") from cause
