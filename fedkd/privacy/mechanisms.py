"""What stands between an answer and the network: only a mechanism makes a ``Released``, and only a ``Released`` is sent.

A mechanism works at two places. On a device, ``admit`` charges the ledger before private training begins, and
``release`` lets the answer go. On the server, ``combine`` may replace the answers of a round by one noisy aggregate before
the method sees them. ``NoPrivacy`` does nothing at either place and says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fedkd.errors import FedkdError
from fedkd.payloads import Payload
from fedkd.privacy.events import Event, Relation, Unit
from fedkd.privacy.ledger import SERVER, Ledger
from fedkd.privacy.policy import Policy

if TYPE_CHECKING:
    from fedkd.algorithms.base import Answers, Phase

_SEAL: Final = object()


class PrivacyError(FedkdError):
    """A release that would break the account."""


class NothingReleased(FedkdError):
    """A mechanism has charged, and found nothing that it may release in this round."""


@dataclass(frozen=True)
class Released:
    """What a mechanism has let go: the payload, and the two numbers that travel or are shown beside it.

    ``examples``: count of records, 1 where counts must not leave. ``losses``: training losses by phase, without those of
    private records where these must not leave. It cannot be made elsewhere.

    Raises:
        TypeError: if it is built outside a mechanism.
    """

    payload: Payload
    examples: float
    losses: tuple[tuple[str, float], ...]
    seal: object

    def __post_init__(self) -> None:
        if self.seal is not _SEAL:
            raise TypeError("only a Mechanism makes a Released; call mechanism.release(payload)")


@dataclass(frozen=True, kw_only=True)
class Party:
    """A device that asks to work in one round of one run."""

    device: int
    run: str
    round: int


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a run may say of its privacy. ``epsilon`` None is infinity; ``note`` says why, where it needs saying."""

    mechanism: str
    unit: Unit | None
    relation: Relation | None
    epsilon: float | None
    delta: float | None
    noise_multiplier: float | None = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data for summaries."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class Mechanism(ABC):
    """Turns an answer into something that may leave the device. Subclasses carry a "Guarantee:" block."""

    name: str
    unit: Unit | None = None
    trains: bool = False
    """Private phases of training go through :mod:`fedkd.privacy.dpsgd` instead of the engine's plain steps."""
    sums_securely: bool = False
    """Answers leave as masked vectors, of which the server learns the sum alone."""
    empty_answers: bool = False
    """A device without records answers like the others, because its silence would tell that it has none."""
    least: int = 1
    """Fewest devices whose answers it makes anything of."""
    secret_cohort: bool = False
    """Clients are drawn by :meth:`draw`, in secret, instead of from the experiment's seed."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.policy: Policy | None = None

    def open(self, ledger: Ledger, policy: Policy | None = None) -> None:
        """Use ``ledger`` from now on, and let no device go beyond ``policy``."""
        self.ledger, self.policy = ledger, policy

    @property
    def trainer(self) -> Mechanism:
        """The mechanism that private training follows, where ``trains``."""
        return self

    # ---- device -----------------------------------------------------------------------------------------------------
    def admit(self, phases: Sequence[Phase], parties: Sequence[Party]) -> Mapping[int, str]:
        """Charge what ``phases`` will cost to every party, on disk, and return those refused with the reason.

        A refused device digests what it hears and trains on public data, leaves its records alone, and abstains.
        """
        return {}

    def asked(self, run: str, round: int, devices: Sequence[int]) -> None:
        """Account, on a server whose devices keep their own ledgers, for what they may release on being asked.

        An upper bound from public facts: a device that was asked counts as one that trained. By default nothing, since
        a server charges its own releases itself.
        """
        return None

    @abstractmethod
    def release(
        self, payload: Payload, party: Party, *, examples: float = 1.0, losses: Mapping[str, float] | None = None
    ) -> Released:
        """Return what may leave.

        Raises:
            PrivacyError: the party was not admitted, so that nothing of it may leave.
        """

    def _seal(self, payload: Payload, examples: float, losses: Mapping[str, float] | None) -> Released:
        return Released(payload, examples, tuple((losses or {}).items()), _SEAL)

    # ---- server -----------------------------------------------------------------------------------------------------
    def combine(
        self, answers: Answers, ask: NDArray[np.int64], *, run: str, round: int
    ) -> tuple[Answers, NDArray[np.int64]]:
        """Return the answers that the method may see, and the proxy indices that they belong to.

        Raises:
            NothingReleased: the round yields no knowledge.
        """
        return answers, ask

    def draw(self, clients: int, participation: float) -> NDArray[np.int64]:
        """Draw a secret cohort; only where ``secret_cohort``."""
        raise NotImplementedError

    # ---- account ----------------------------------------------------------------------------------------------------
    @abstractmethod
    def claim(self) -> Claim:
        """Return what may be said of all releases so far."""

    def payers(self, devices: Sequence[int]) -> Sequence[int]:
        """Return the parties whose charges must stand in the ledger once answers of ``devices`` were used in a round."""
        return ()

    def check_account(self, run: str, answered: Mapping[int, Sequence[int]]) -> None:
        """Refuse to go on with answers that no charge covers: a claim of such a run would be too small, down to 0.

        Args:
            answered: by round, the devices whose answers were used.
        Raises:
            PrivacyError: naming one of the parties that were not charged.
        """
        self.ledger.refresh()
        for round, devices in answered.items():
            missing = set(self.payers(devices)) - self.ledger.charged(run, round, self.unit)
            if missing:
                who = "the server" if (first := min(missing)) == SERVER else f"device {first}"
                raise PrivacyError(
                    f"an answer was used in round {round + 1}, but the ledger holds no charge of {who} for it, so that no "
                    "epsilon covers it: the ledger was exchanged, or is not the one that devices charge"
                )

    @property
    def epsilon(self) -> float:
        """Epsilon of all that was released so far; infinity where it protects nothing."""
        found = self.claim().epsilon
        return float("inf") if found is None else found


class NoPrivacy(Mechanism):
    """Lets everything pass as it is.

    Guarantee: none. Unit and neighbouring relation do not apply; epsilon is infinity after the first release and is
    shown so in every table, because whatever leaves may tell anything about any record.
    """

    name = "none"

    def release(
        self, payload: Payload, party: Party, *, examples: float = 1.0, losses: Mapping[str, float] | None = None
    ) -> Released:
        return self._seal(payload, examples, losses)

    def claim(self) -> Claim:
        return Claim(mechanism=self.name, unit=None, relation=None, epsilon=None, delta=None)


def events_of(phases: Sequence[Phase], one: Event, steps: Mapping[str, int]) -> list[Event]:
    """Return the events of the private ``phases`` of a round: ``one`` times the steps of each phase's section."""
    return [one.times(steps[phase.settings]) for phase in phases if phase.data == "private" and steps[phase.settings]]
