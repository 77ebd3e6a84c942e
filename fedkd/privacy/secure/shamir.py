"""Shamir's secret sharing of 32-byte secrets over a prime field.

A. Shamir, "How to share a secret", Communications of the ACM 22(11), 1979. A secret is the constant term of a random
polynomial of degree t - 1; any t of its values give it back, t - 1 of them are independent of it.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping, Sequence

PRIME = 2**256 + 297
"""The least prime above 2^256, so that every 32-byte secret is an element of the field."""

SECRET_BYTES, SHARE_BYTES = 32, 33


def share(secret: bytes, points: Sequence[int], threshold: int) -> list[int]:
    """Split ``secret`` (32 bytes) into one share per point (distinct, from 1 up).

    Raises:
        ValueError: a threshold below 1 or above the number of points, or points that are not distinct and positive.
    """
    if not 1 <= threshold <= len(points) or len(set(points)) != len(points) or min(points) < 1:
        raise ValueError(f"cannot share among the points {points} with a threshold of {threshold}")
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, got {len(secret)}")
    falling = [secrets.randbelow(PRIME) for _ in range(threshold - 1)] + [int.from_bytes(secret, "big")]
    found = []
    for x in points:
        value = 0
        for coefficient in falling:
            value = (value * x + coefficient) % PRIME
        found.append(value)
    return found


def weights(points: Collection[int]) -> dict[int, int]:
    """Return Lagrange's weights at 0 for values at ``points``; one set of helpers serves many secrets."""
    found = {}
    for i in points:
        above, below = 1, 1
        for j in points:
            if j != i:
                above = above * j % PRIME
                below = below * (j - i) % PRIME
        found[i] = above * pow(below, -1, PRIME) % PRIME
    return found


def reconstruct(shares: Mapping[int, int], weight: Mapping[int, int]) -> bytes:
    """Return the secret behind ``shares`` (point -> value) at exactly the points of :func:`weights`.

    Raises:
        ValueError: the shares do not belong together: their polynomial's constant term is no 32-byte secret.
    """
    value = sum(shares[point] * w for point, w in weight.items()) % PRIME
    if value >= 1 << (8 * SECRET_BYTES):
        raise ValueError("the shares do not belong to one secret")
    return value.to_bytes(SECRET_BYTES, "big")
