"""Noise that nobody can foresee: an AES-256-CTR stream keyed by the operating system, turned into normal numbers.

torch's CPU generator keeps 32 bits of its seed, so that whoever holds a released sum could try all seeds; Opacus's
``secure_mode`` needs a package that cannot be installed. A keystream costs no more here than torch's own generator.
"""

from __future__ import annotations

import hashlib
import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

_CHUNK = 1 << 17
_ZEROS = bytes(12 * _CHUNK)
_SCALE = 2.0**-32


class NoiseSource:
    """A stream of random numbers for privacy.

    Guarantee: without ``seed`` the key is 256 fresh bits of the operating system, whatever the experiment's seed is.
    With ``seed``, for tests only, the stream repeats and protects nothing: a ledger marks what it touches as void.
    """

    def __init__(self, *seed: str | int) -> None:
        text = "\x1f".join(f"{type(p).__name__}:{p}" for p in seed).encode()
        secret = hashlib.sha256(b"fedkd test noise" + text).digest() if seed else os.urandom(32)
        self.seeded = bool(seed)
        self._stream = Cipher(algorithms.AES(secret), modes.CTR(bytes(16))).encryptor()
        self._buffer = bytearray()

    def bits(self, count: int) -> NDArray[np.uint32]:
        """Return ``count`` uniform 32-bit integers."""
        data = self._stream.update(bytes(4 * count))
        return np.frombuffer(data, dtype="<u4")

    def bernoulli(self, q: float, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Return independent coins that fall True with probability ``q``, rounded down to a multiple of 2**-32."""
        if q >= 1:
            return np.ones(shape, dtype=bool)
        found: NDArray[np.bool_] = (self.bits(math.prod(shape)) < np.uint64(q * 2.0**32)).reshape(shape)
        return found

    def normal_(self, out: Tensor) -> Tensor:
        """Fill ``out`` (contiguous, float32 or float64) with independent standard normal numbers and return it.

        Box and Muller's method on 52 bits for the radius and 32 for the angle of every two numbers. The radius comes
        from a float64 for either type: it reaches 8.57, which leaves out a mass of 1e-16, and is never zero. float32 numbers
        carry float32's rounding.
        """
        flat = out.view(-1)
        for start in range(0, flat.numel(), 2 * _CHUNK):
            part = flat[start : start + 2 * _CHUNK]
            half = (part.numel() + 1) // 2
            if len(self._buffer) < 12 * half + 16:  # no more than is drawn: audits make a source for every release
                self._buffer = bytearray(12 * half + 16)
            self._stream.update_into(_ZEROS[: 12 * half], self._buffer)
            raw = torch.frombuffer(self._buffer, dtype=torch.int64, count=half)
            # 52 bits and a half are exact in float64, so that the uniform lies inside (0, 1). In float32 it would be 1,
            # and two numbers exactly 0, once in 2**25.
            uniform = raw.bitwise_and_((1 << 52) - 1).double().add_(0.5).mul_(2.0**-52)
            radius = uniform.log_().to(out.dtype).mul_(-2.0).sqrt_()
            turn = torch.frombuffer(self._buffer, dtype=torch.int32, count=half, offset=8 * half)
            angle = turn.to(out.dtype).add_(0.5).mul_(2 * math.pi * _SCALE)
            torch.mul(radius, angle.cos(), out=part[:half])
            rest = part.numel() - half
            torch.mul(radius[:rest], angle.sin_()[:rest], out=part[half:])
        return out

    def normal(self, shape: tuple[int, ...], std: float, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return independent normal numbers of standard deviation ``std``."""
        return self.normal_(torch.empty(shape, dtype=dtype)).mul_(std)
