"""Symbols of any width packed without gaps, most significant bit first."""

from __future__ import annotations

import numpy as np

from fedkd.codecs.base import Stream, Symbols
from fedkd.payloads import PayloadError


def pack(stream: Stream, symbols: Symbols) -> bytes:
    """Return ``stream.packed_bytes`` bytes; unused bits at the end are 0."""
    if stream.plain:
        return symbols.tobytes()
    width = stream.dtype.itemsize
    if stream.bits == 1:
        return np.packbits(symbols).tobytes()
    bits = np.unpackbits(symbols.astype(f">u{width}").view(np.uint8)).reshape(-1, 8 * width)
    return np.packbits(bits[:, 8 * width - stream.bits :]).tobytes()


def unpack(stream: Stream, data: memoryview | bytes) -> Symbols:
    """Return the symbols, writable. ``data`` has exactly ``stream.packed_bytes`` bytes.

    Raises:
        PayloadError: ``body`` for a symbol outside the alphabet or bits set behind the last symbol.
    """
    if not stream.count:
        return np.zeros(0, stream.dtype)
    if stream.plain:
        return np.frombuffer(bytearray(data), dtype=stream.dtype)
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    used = stream.count * stream.bits
    if bits[used:].any():
        raise PayloadError("body", "bits behind the last packed symbol are set, expected zeros")
    bits = bits[:used]
    if stream.bits == 1:
        return bits.astype(stream.dtype)
    width = stream.dtype.itemsize
    wide = np.zeros((stream.count, 8 * width), dtype=np.uint8)
    wide[:, 8 * width - stream.bits :] = bits.reshape(stream.count, stream.bits)
    symbols = np.packbits(wide).view(f">u{width}").astype(stream.dtype)
    check_alphabet(stream, symbols)
    return symbols


def check_alphabet(stream: Stream, symbols: Symbols) -> None:
    """Raise PayloadError ``body`` for a symbol at or above the alphabet."""
    if symbols.size and stream.alphabet != 1 << (8 * stream.dtype.itemsize) and symbols.max() >= stream.alphabet:
        raise PayloadError("body", f"symbol {int(symbols.max())}, expected below {stream.alphabet}")
