"""What a teacher's owner allows: who may ask, how much, and how exact the answers are."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from fedkd.errors import ConfigError
from fedkd.experiment import Section, build, read_yaml

MIB = 1 << 20


class TlsConfig(Section):
    """Files of the service's certificate, relative to the policy. With `client_ca` callers must show one as well."""

    certificate: Path
    key: Path
    client_ca: Path | None = Field(None, description="Mutual TLS: callers' certificates must be signed by it.")


class CallerConfig(Section):
    """One caller: known by a token, or by the common name of its certificate (mutual TLS), or by both."""

    name: str = Field(pattern=r"^\w[\w.@-]{0,63}$")
    token_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of its token, in hex.")
    certificate: str | None = Field(None, description="Common name of its certificate.")
    queries: int | None = Field(None, ge=0, description="Different inputs it may ask for in all; null: no limit.")
    rate: float | None = Field(None, gt=0, description="Different inputs per second, averaged; null: no limit.")
    epsilon: float | None = Field(
        None, gt=0, description="Privacy budget under answers.privacy, composed over all its inputs; null: no limit."
    )

    @model_validator(mode="after")
    def _known_by(self) -> CallerConfig:
        if self.token_sha256 is None and self.certificate is None:
            raise ConfigError(f"caller {self.name}: give token_sha256, certificate, or both: else nobody could be it")
        return self


class PrivateAnswersConfig(Section):
    """Noisy votes or labels of an ensemble on a ledger; see :class:`fedkd.teacher.private.PrivateAnswers`."""

    kind: Literal["votes", "labels"] = Field("votes", description="The noisy winner alone, or the noisy mean label.")
    sigma: float = Field(gt=0, description="Deviation of the Gaussian noise on the sum over members, per class.")
    delta: float = Field(1e-5, gt=0, lt=1)
    epsilon: float | None = Field(None, gt=0, description="Budget of all callers together; null: no limit.")


class AnswersConfig(Section):
    """How much an answer tells. Defences against copying the model; only ``privacy`` is a privacy guarantee."""

    kind: Literal["soft", "top1"] = Field("soft", description="Class probabilities, or the most likely class alone.")
    top_k: int | None = Field(None, ge=1, description="Keep the k largest probabilities; the rest share what is left.")
    decimals: int | None = Field(None, ge=1, le=6, description="Round probabilities to this many digits.")
    noise: float = Field(0.0, ge=0, description="Deviation of Gaussian noise on probabilities, once per input.")
    privacy: PrivateAnswersConfig | None = Field(None, description="Differential privacy; needs an ensemble.")

    @property
    def words(self) -> str:
        """The answers in a few words."""
        private = self.privacy
        if private is not None:
            return f"noisy {private.kind} of an ensemble, sigma {private.sigma:g}"
        if self.kind == "top1":
            return "top-1 label" + (f" of probabilities with noise {self.noise:g}" if self.noise else "")
        parts = ["soft labels"]
        parts += [f"largest {self.top_k}"] if self.top_k else []
        parts += [f"{self.decimals} decimals"] if self.decimals else []
        parts += [f"noise {self.noise:g}"] if self.noise else []
        return ", ".join(parts)


class Policy(Section):
    """The policy of a service: `fedkd teacher serve MODEL --policy policy.yaml`."""

    listen: str = Field("127.0.0.1:7443", description="Address and port; port 0 takes a free one.")
    tls: TlsConfig | None = Field(None, description="Without it the service speaks in the clear, on loopback only.")
    callers: tuple[CallerConfig, ...] = Field(min_length=1)
    answers: AnswersConfig = AnswersConfig()
    max_batch: int = Field(1024, ge=1, le=65536, description="Inputs per question.")
    max_message_bytes: int = Field(
        16 * MIB,
        ge=1024,
        le=256 * MIB,
        description="Of a message; a question's inputs must fit as float32, sent as pixels too.",
    )
    streams: int = Field(
        8,
        ge=1,
        le=256,
        description="Streams that are served at the same time; of one caller among several, half of them.",
    )
    patience_seconds: float = Field(
        60.0, gt=0, description="A stream that asks nothing or takes no answers for so long is ended."
    )
    state: Path = Field(Path("state"), description="Folder of the accounts, relative to the policy.")
    reflection: bool = Field(False, description="Let anybody list the service's methods.")

    @field_validator("callers")
    @classmethod
    def _distinct(cls, value: tuple[CallerConfig, ...]) -> tuple[CallerConfig, ...]:
        for what in ("name", "token_sha256", "certificate"):
            known = [getattr(c, what) for c in value if getattr(c, what) is not None]
            if len(set(known)) < len(known):
                raise ConfigError(f"two callers have one {what}: their accounts could not be told apart")
        return value

    @model_validator(mode="after")
    def _accountable(self) -> Policy:
        private = self.answers.privacy
        if private is None and any(c.epsilon is not None for c in self.callers):
            raise ConfigError(
                "a caller has an epsilon, but the answers carry no noise on a ledger: add answers.privacy"
            )
        if private is not None and self.answers.noise:
            raise ConfigError("answers.noise beside answers.privacy would only blur what is accounted: leave it out")
        return self

    @model_validator(mode="after")
    def _safe(self) -> Policy:
        host, _, port = self.listen.rpartition(":")
        if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            raise ConfigError(f"listen is {self.listen!r}, expected address:port")
        if self.tls is None and host not in ("127.0.0.1", "localhost", "[::1]"):
            raise ConfigError(
                f"listen is {self.listen}: without tls tokens and inputs would cross the network in the clear"
            )
        if any(c.certificate for c in self.callers) and (self.tls is None or self.tls.client_ca is None):
            raise ConfigError("a caller is known by its certificate, so that tls.client_ca must be given")
        return self


def load_policy(path: Path) -> Policy:
    """Read a policy; its files are looked for beside it.

    Raises:
        ConfigError: one readable sentence per fault.
    """
    policy = build(Policy, read_yaml(path))
    root = path.resolve().parent
    tls = policy.tls
    if tls is not None:
        tls = TlsConfig(
            certificate=root / tls.certificate,
            key=root / tls.key,
            client_ca=None if tls.client_ca is None else root / tls.client_ca,
        )
        for file in (tls.certificate, tls.key, tls.client_ca):
            if file is not None and not file.is_file():
                raise ConfigError(f"{path} names {file.name}, which is not beside it")
    return policy.model_copy(update={"tls": tls, "state": root / policy.state})


def token_hash(token: str) -> str:
    """Return what a policy keeps of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def new_token() -> str:
    """Return a fresh token of 256 bits."""
    return secrets.token_urlsafe(32)
