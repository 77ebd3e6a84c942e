"""Answers as integer vectors of bounded norm, and the modulus in which their sum cannot wrap around.

Soft labels P [N, C] become the nearest integers of s (P - 1/C); votes become one-hot rows. Centring costs nothing and
halves the norm of an unsure answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How soft labels become integers.

    Guarantee: the L2 norm of a quantised answer is at most ``floor(clip * scale)`` and each entry's magnitude at most
    ``floor(scale)``, whatever came in: NaN counts as 0, and infinity as the largest number. This is the sensitivity of the
    sum under adding or removing a client; under replacing one it is twice that.
    """

    scale: float
    clip: float | None

    def __post_init__(self) -> None:
        if not 1 <= self.scale <= 2**24:
            raise ValueError(f"scale must lie in [1, 2^24], got {self.scale}")
        if self.clip is not None and not self.clip * self.scale >= 1:
            raise ValueError(f"a clip of {self.clip} at scale {self.scale} leaves no integer but 0")

    @property
    def largest(self) -> int:
        """The largest magnitude of an entry."""
        return math.floor(self.scale)

    @property
    def l2(self) -> float:
        """The largest L2 norm of an answer, in integers; infinity without a clip."""
        return math.inf if self.clip is None else float(math.floor(self.clip * self.scale))

    def l1(self, length: int) -> float:
        """The largest L1 norm: by Cauchy and Schwarz, and because |k| <= k² for integers."""
        return min(math.sqrt(length) * self.l2, self.l2**2)

    def quantise(self, labels: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the integers [N * C] of soft labels [N, C]."""
        centred = np.nan_to_num(np.asarray(labels, np.float64) - 1 / labels.shape[-1], nan=0.0, posinf=1.0, neginf=-1.0)
        centred = np.clip(centred, -1.0, 1.0).reshape(-1) * self.scale
        if self.clip is None:
            return self._nearest(centred)
        bound = math.floor(self.clip * self.scale)
        norm = float(np.linalg.norm(centred))
        if norm > bound:
            centred *= bound / norm
        found = self._nearest(centred)
        if int(found @ found) > bound**2:
            # Rounding to nearest has lengthened the vector; rounding towards 0 cannot.
            found = np.trunc(centred).astype(np.int64)
        while int(found @ found) > bound**2:  # what a float's last bit may have left
            place = int(np.abs(found).argmax())
            found[place] -= np.sign(found[place])
        return found

    def _nearest(self, values: NDArray[np.float64]) -> NDArray[np.int64]:
        found: NDArray[np.int64] = np.clip(np.rint(values), -self.largest, self.largest).astype(np.int64)
        return found

    def mean(self, total: NDArray[np.int64], devices: int, classes: int) -> NDArray[np.float64]:
        """Return the mean soft labels [N, C] behind a sum over ``devices`` (not on the simplex where noise is in it)."""
        found: NDArray[np.float64] = total.reshape(-1, classes) / (self.scale * devices) + 1 / classes
        return found


def one_hot(votes: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Return votes [N] as integers [N * C]; a vote outside [0, C) counts for no class.

    Guarantee: norms of at most N (L1) and sqrt(N) (L2) under adding or removing a client.
    """
    rows = np.zeros((len(votes), classes), np.int64)
    valid = (votes >= 0) & (votes < classes)
    rows[np.flatnonzero(valid), votes[valid]] = 1
    return rows.reshape(-1)


def bits_for(devices: int, largest: int, noise: int) -> int:
    """Return the bits of a modulus in which a sum cannot wrap around.

    Args:
        devices: at most this many vectors are summed.
        largest: magnitude of an entry of one vector; noise: of one device's noise.
    Raises:
        ValueError: more than 32 bits would be needed.
    """
    bits = (2 * devices * (largest + noise) + 1).bit_length()
    if bits > 32:
        raise ValueError(
            f"a sum over {devices} devices with entries up to {largest} and noise up to {noise} needs {bits} bits, more "
            "than 32: use a coarser scale"
        )
    return max(bits, 2)
