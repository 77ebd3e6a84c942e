"""Independent random streams from one seed."""

import hashlib

import numpy as np


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A generator for one purpose: the same seed never gives two purposes the same numbers.

    The key is a hash of the name, so adding a purpose later leaves the others as they were.
    """
    key = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    return np.random.default_rng([seed, key])
