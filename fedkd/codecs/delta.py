"""Difference of a message's symbols to those of the same sender's last message, modulo the alphabet.

Lossless on the symbols: labels that did not change become runs of 0, which the squeezer behind makes small.
For floats the symbols are the bit patterns, so values that moved little differ in the low bytes only. Source:
the delta coding of CFD (see simplex.py), taken entry by entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from fedkd.codecs.base import Stream, Symbols


def fingerprint(symbols: Iterable[Symbols]) -> bytes:
    """Return 8 bytes that tell two references apart.

    Taken over the symbols and not over the floats: two machines that renormalised a row with another order of
    summation still agree, as long as they quantise to the same symbols.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in symbols:
        digest.update(part.tobytes())
    return digest.digest()


def subtract(stream: Stream, new: Symbols, old: Symbols) -> Symbols:
    """Return (new - old) mod alphabet. Both are below the alphabet."""
    if stream.plain and stream.alphabet == 1 << stream.bits:
        return new - old  # unsigned arithmetic wraps at the alphabet by itself
    result: Symbols = ((new.astype("<i8") - old.astype("<i8")) % stream.alphabet).astype(stream.dtype)
    return result


def add(stream: Stream, change: Symbols, old: Symbols) -> Symbols:
    """Undo :func:`subtract`."""
    if stream.plain and stream.alphabet == 1 << stream.bits:
        return change + old
    result: Symbols = ((change.astype("<i8") + old.astype("<i8")) % stream.alphabet).astype(stream.dtype)
    return result
