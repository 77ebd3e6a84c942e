"""The section ``privacy:`` of an experiment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedkd.errors import ConfigError
from fedkd.privacy.events import Relation, Unit

if TYPE_CHECKING:
    from fedkd.algorithms.base import Algorithm
    from fedkd.experiment import PopulationConfig


class PrivacyConfig(BaseModel):
    """What protects the private records, and at what price.

    ``none``: nothing does, and epsilon is infinity. ``dp_sgd``: every device trains by DP-SGD, so that whatever it sends
    is differentially private towards everybody, the server included; the unit is a record. ``labels`` and ``votes``: the
    server, which is trusted and sees raw answers, adds noise to their sum; the unit is a client with all its records.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["none", "dp_sgd", "labels", "votes"] = "none"
    epsilon: float | None = Field(None, gt=0, description="Budget of the whole run; noise is calibrated to it.")
    delta: float = Field(1e-5, gt=0, lt=1, description="Delta at which epsilon is counted.")
    noise_multiplier: float | None = Field(
        None, gt=0, description="Noise / largest share of one unit in a sum, instead of `epsilon`."
    )
    relation: Relation = Field("add_remove", description="Neighbouring data sets: one unit more or less, or replaced.")
    clip: float | None = Field(
        None,
        gt=0,
        description="dp_sgd: largest norm of one record's gradient (default 1). labels: of one client's labels less "
        "the uniform ones (default: their largest possible norm).",
    )
    sampling_rate: float = Field(
        0.1, gt=0, le=1, description="dp_sgd: chance of each record to enter a step. Public, the same on all devices."
    )
    expected_batch: float | None = Field(
        None, gt=0, description="dp_sgd: what sums of gradients are divided by; public. Default training.batch_size."
    )
    gradients: Literal["hooks", "ghost"] = Field(
        "hooks", description="dp_sgd on the serial runner: Opacus keeps each record's gradient, or its norm alone."
    )
    participations: int | None = Field(
        None, ge=1, description="dp_sgd: rounds that one device takes part in at most. Default: by participation."
    )
    disjoint: bool = Field(
        True,
        description="A record lives on one device alone. False (dp_sgd, with noise_multiplier): a person's records may be "
        "on all of them, and epsilon is composed over all.",
    )
    sampling: Literal["fixed", "poisson"] = Field(
        "fixed",
        description="labels, votes: how clients are drawn. poisson: each with chance population.participation, from the "
        "system's entropy and in secret, which amplifies privacy; a fixed cohort does not.",
    )
    threshold: float | None = Field(
        None, ge=0, le=1, description="votes: share of clients that must agree, after noise; null answers every query."
    )
    threshold_noise: float = Field(
        2.0, gt=0, description="votes: noise of the agreement test, as a multiple of that of the votes."
    )
    answers: int | None = Field(None, ge=1, description="votes: queries answered in a round at most.")
    taught: Literal["winner", "odds"] = Field(
        "winner",
        description="votes on a trusted server: what answers teach. The noisy winner; or the odds of every class, given "
        "the noisy counts, which carry more where noise is large. Both cost the same.",
    )
    agreement: float = Field(
        0.5, gt=0, lt=1, description="votes, odds: public guess of the share of clients that vote for the right class."
    )
    secure_sum: bool = Field(
        False,
        description="The server learns the sum of the answers alone (masks and secret shares). Under labels and votes the "
        "devices add the noise, so that the server need not be trusted.",
    )
    secure_threshold: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Share of the cohort that must stay for a secure sum. Below 0.5: an honest server only.",
    )
    secure_scale: float = Field(4096.0, ge=1, le=2**24, description="Steps per unit of probability in a secure sum.")
    policy: str | None = Field(
        None, description="A policy.yaml that every simulated device keeps. A real node reads its own, never this."
    )
    seeded: bool = Field(
        False, description="For tests only: noise follows the seed, protects nothing, and epsilon is void."
    )

    @property
    def unit(self) -> Unit | None:
        """What is protected as a whole."""
        if self.kind == "none":
            return None
        return "record" if self.kind == "dp_sgd" else "client"

    @model_validator(mode="after")
    def _priced(self) -> PrivacyConfig:
        if self.kind != "none" and self.epsilon is None and self.noise_multiplier is None:
            raise ConfigError(
                f"privacy.kind {self.kind} needs a price: give privacy.epsilon (noise is calibrated to it) or "
                "privacy.noise_multiplier"
            )
        if self.kind == "none" and (self.epsilon is not None or self.noise_multiplier is not None):
            raise ConfigError(
                "privacy.epsilon or privacy.noise_multiplier is given, but privacy.kind is none, which protects nothing: "
                "choose dp_sgd (per record, on the device), labels or votes (per client, on the server)"
            )
        if self.kind != "none" and not self.disjoint:
            if self.kind != "dp_sgd":
                raise ConfigError(
                    f"privacy.kind {self.kind} protects one client: with records on several clients (privacy.disjoint false) "
                    "use dp_sgd, or let each person's records be on one client"
                )
            if self.epsilon is not None:
                raise ConfigError(
                    "privacy.epsilon is kept device by device, but privacy.disjoint is false: what all devices spend counts "
                    "together. Give privacy.noise_multiplier alone; `fedkd privacy plan` says what it costs"
                )
        if self.taught == "odds" and (self.kind != "votes" or self.secure_sum):
            raise ConfigError(
                "privacy.taught odds reads the noisy counts of privacy.kind votes on a trusted server: set "
                "privacy.taught=winner"
            )
        if self.answers is not None and self.threshold is None:
            raise ConfigError("privacy.answers limits confident answers: give privacy.threshold too")
        return self

    def _check_sum(self, method: Algorithm, population: PopulationConfig) -> None:
        from fedkd.payloads import SoftLabels, Votes

        if method.upload not in (SoftLabels, Votes):
            raise ConfigError(
                f"privacy.secure_sum adds up probabilities or votes; {method.name} sends {method.upload.__name__}. Use ds_fl "
                "or cfd"
            )
        reason = method.needs_each()
        if reason is not None:
            raise ConfigError(
                f"privacy.secure_sum lets the server see the sum of all answers alone, but {reason}. Robust aggregation and "
                "secure sums exclude each other: choose one"
            )
        if _mixes_rounds(population):
            raise ConfigError("privacy.secure_sum adds up the answers of one round: set population.staleness.limit=0")
        if self.sampling == "poisson":
            raise ConfigError("privacy.secure_sum names the cohort to every device in it: set privacy.sampling=fixed")
        if self.threshold is not None:
            raise ConfigError(
                "privacy.threshold tests each query on the raw counts, which nobody sees in a secure sum: leave it out"
            )

    def check(self, method: Algorithm, population: PopulationConfig) -> None:
        """Refuse a method whose uploads this mechanism cannot protect.

        Raises:
            ConfigError: with the reason and what to use instead.
        """
        from fedkd.payloads import SoftLabels, Votes

        if self.secure_sum:
            self._check_sum(method, population)
        if self.taught == "odds" and method.upload is Votes:
            raise ConfigError(f"privacy.taught odds are probabilities, and {method.name} takes votes. Use ds_fl or cfd")
        if self.kind == "none":
            return
        if method.pools_data:
            raise ConfigError(f"{method.name} pools everybody's records on purpose: it has no privacy to protect")
        if self.kind == "dp_sgd":
            if method.reads_private:
                raise ConfigError(
                    f"{method.name} makes its answer from the private records themselves, after training: DP-SGD "
                    "protects what is computed from the model alone. Use a method that answers for proxy samples, such "
                    "as ds_fl, cfd or fedmd"
                )
            if method.weighted:
                raise ConfigError(
                    f"{method.name} sends every device's count of records, which DP-SGD does not protect. Use a method "
                    "with equal weights, such as ds_fl, cfd, fedmd or dense"
                )
            return
        if method.upload not in (SoftLabels, Votes) or (self.kind == "labels" and method.upload is Votes):
            wanted = "probabilities" if self.kind == "labels" else "probabilities or votes"
            raise ConfigError(
                f"privacy.kind {self.kind} adds noise to sums of {wanted}; {method.name} sends {method.upload.__name__}. "
                "Use ds_fl or cfd, or dp_sgd, which protects every kind of answer"
            )
        if method.narrows:
            raise ConfigError(
                f"{method.name} keeps account of who answered which samples, which privacy.kind {self.kind} hides from it: "
                "use ds_fl or cfd"
            )
        if population.stalest > 0:
            raise ConfigError(
                f"privacy.kind {self.kind} sums the answers of one round, to one set of queries: set "
                "population.staleness.limit=0"
            )
        if self.sampling == "poisson" and population.minimum > 1:
            raise ConfigError(
                "privacy.sampling poisson keeps the number of clients secret, and a round that fails for want of "
                "answers would tell it: set population.minimum=1"
            )


def _mixes_rounds(population: PopulationConfig) -> bool:
    """Tell whether answers to older rounds may come into a round's sum."""
    limit = population.staleness.limit
    return bool(limit) or (limit is None and population.buffer is not None)
