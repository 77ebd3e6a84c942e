"""What stands between an answer and the network: only a mechanism makes a ``Released``, and only a ``Released`` is sent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final

from fedkd.payloads import Payload

_SEAL: Final = object()


@dataclass(frozen=True)
class Released:
    """A payload that a mechanism has let go. It cannot be made elsewhere.

    Raises:
        TypeError: if it is built outside a mechanism.
    """

    payload: Payload
    seal: object

    def __post_init__(self) -> None:
        if self.seal is not _SEAL:
            raise TypeError("only a Mechanism makes a Released; call mechanism.release(payload)")


class Mechanism(ABC):
    """Turns an answer into something that may leave the device."""

    @abstractmethod
    def release(self, payload: Payload) -> Released:
        """Return what may leave."""

    @property
    @abstractmethod
    def epsilon(self) -> float:
        """Epsilon of all that this mechanism has released so far; infinity where it protects nothing."""


class NoPrivacy(Mechanism):
    """Lets everything pass as it is.

    Guarantee: none. Unit and neighbouring relation do not apply; epsilon is infinity after the first release and is
    shown so in every table, because whatever leaves may tell anything about any record.
    """

    def release(self, payload: Payload) -> Released:
        return Released(payload, _SEAL)

    @property
    def epsilon(self) -> float:
        return float("inf")
