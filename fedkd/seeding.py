"""Randomness without state: every stream is a hash of what it is for.

A stream named by (seed, round, client, phase) is the same whichever process draws it, in whatever order, and after a
resume; so there is no generator state to save, and block sizes and worker counts cannot change a result.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def key(*parts: str | int) -> int:
    """Return a 63-bit integer that depends on every part and on their order."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_rng(*parts: str | int) -> np.random.Generator:
    """Return a NumPy generator for the stream named by ``parts``."""
    return np.random.default_rng(key(*parts))


def torch_rng(*parts: str | int) -> torch.Generator:
    """Return a torch CPU generator for the stream named by ``parts``."""
    return torch.Generator().manual_seed(key(*parts))
