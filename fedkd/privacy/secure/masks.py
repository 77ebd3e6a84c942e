"""Keys and masks: X25519 agreement, HKDF-SHA256 bound to its purpose, AES-256-CTR as the generator of masks.

The seed of a mask has 256 bits. (Flower's SecAgg+ expands masks from 32 bits, its public issue 7522, which a server
can try out one by one.)
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

Residues = NDArray[np.uint32]
"""Integers modulo 2^bits, bits <= 32."""

KEY_BYTES = 32


def public_key(private: bytes) -> bytes:
    """Return the public half (32 bytes) of an X25519 private key (32 random bytes)."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, purpose: bytes) -> bytes:
    """Return the 32-byte key that two parties share for ``purpose`` (which names run, round and both parties).

    Raises:
        ValueError: a public key of low order, which would make the key known to everybody.
    """
    shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=b"fedkd secure sum|" + purpose).derive(shared)


def expand(seed: bytes, count: int, bits: int) -> Residues:
    """Return ``count`` residues modulo 2^bits that nobody can tell from uniform ones without ``seed``.

    A seed is expanded once, so that the counter may start at 0.
    """
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    raw = stream.update(bytes(4 * count)) + stream.finalize()
    found: Residues = np.frombuffer(raw, "<u4").astype(np.uint32) & modulus_mask(bits)
    return found


def modulus_mask(bits: int) -> np.uint32:
    """Return 2^bits - 1: reduction modulo 2^bits is a bitwise and, because uint32 wraps at a multiple of 2^bits."""
    return np.uint32((1 << bits) - 1)
