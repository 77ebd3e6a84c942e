"""What a message says of itself, and the error for one that breaks its contract. Needs no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from fedkd.errors import FedkdError

WEIGHT_CAP = 1e9
"""Largest count accepted in a ``weight`` field and in ``Envelope.examples``."""


class PayloadError(FedkdError):
    """A payload broke its contract. ``reason`` is a short code for quarantine records."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """What a message says of itself beside its tensors; small, and checked before the tensors are parsed.

    ``proxy`` and ``ids`` are hashes of the proxy set and of the sample indices that the labels belong to
    (empty where the payload has none). ``examples`` is the maker's count of training records, 1 where counts
    must not leave.
    """

    run: str = ""
    round: int = 0
    sender: int = -1
    proxy: str = ""
    ids: str = ""
    examples: float = 1.0

    def check_examples(self) -> None:
        """Raise PayloadError ``examples`` unless the count is finite, above 0 and at most ``WEIGHT_CAP``."""
        if not 0 < self.examples <= WEIGHT_CAP:  # false for NaN as well
            raise PayloadError("examples", f"examples: expected above 0 and at most 1e9, got {self.examples:.6g}")

    def check_identity(self, expected: Envelope) -> None:
        """Raise PayloadError ``sender``, ``run`` or ``round`` where this envelope is not the one expected."""
        self._compare(expected, ("sender", "run", "round"))

    def check_proxy(self, expected: Envelope) -> None:
        """Raise PayloadError ``proxy`` or ``ids`` where the labels belong to other samples or another
        order."""
        self._compare(expected, ("proxy", "ids"))

    def _compare(self, expected: Envelope, names: tuple[str, ...]) -> None:
        for name in names:
            got, want = getattr(self, name), getattr(expected, name)
            if got != want:
                raise PayloadError(name, f"{name}: expected {want!r}, got {got!r}")


def ids_hash(indices: np.ndarray) -> str:
    """Return the short hash that ties soft labels to the proxy indices (int64 [N]) and their order."""
    return hashlib.sha256(np.ascontiguousarray(indices, dtype="<i8").tobytes()).hexdigest()[:16]
