"""Range coding of symbol streams with the counts of the symbols as the model, by the library
``constriction``.

Each stream of a small alphabet is one block; wider symbols are cut into byte planes, one block each. A block
takes the smallest of three forms: packed as it is, one symbol repeated, or range coded. The model travels as
a bit per symbol of the alphabet (does it occur?) and 16 bits for the share of each that does; shares sum to
2^16 exactly, so both ends derive the same model without any rounding.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from fedkd.codecs.base import Squeezer, Stream, Symbols
from fedkd.codecs.bits import check_alphabet, pack, unpack
from fedkd.errors import ConfigError
from fedkd.payloads import PayloadError

_PACKED, _SAME, _CODED = 0, 1, 2
_TOTAL = 1 << 16
_WIDEST = 4096
"""Largest alphabet that gets a model of its own; above it, the table would outweigh the gain."""


def _stream() -> Any:
    """Return the library's coders. It has no wheel for Linux on arm64, where everything but this codec goes without."""
    try:
        import constriction
    except ModuleNotFoundError as cause:
        raise ConfigError(
            "the codec `entropy` needs the package constriction, which has no wheel for this machine: build it "
            "(`pip install constriction` with a Rust compiler), or use `deflate` in its place"
        ) from cause
    return constriction.stream


@final
class Entropy(Squeezer):
    """Blocks one after the other; each knows from its stream how many symbols it holds."""

    def __init__(self) -> None:
        _stream()

    def squeeze(self, streams: Sequence[tuple[Stream, Symbols]]) -> bytes:
        return b"".join(
            _squeeze_block(plane, part) for stream, symbols in streams for plane, part in _cut(stream, symbols)
        )

    def expand(self, body: memoryview, streams: Sequence[Stream]) -> list[Symbols]:
        reader, result = _Reader(body), []
        for stream in streams:
            if not stream.count:
                result.append(np.zeros(0, stream.dtype))
            elif stream.alphabet <= _WIDEST:
                result.append(_expand_block(stream, reader))
            else:
                planes = [_expand_block(_plane_of(stream), reader) for _ in range(stream.dtype.itemsize)]
                symbols = np.stack(planes, axis=1).reshape(-1).view(stream.dtype)
                check_alphabet(stream, symbols)
                result.append(symbols)
        if reader.left:
            raise PayloadError("length", f"{reader.left} bytes behind the last entropy block")
        return result


class _Reader:
    def __init__(self, body: memoryview) -> None:
        self.body, self.at = body, 0

    @property
    def left(self) -> int:
        return len(self.body) - self.at

    def take(self, size: int) -> memoryview:
        if size > self.left:
            raise PayloadError("length", f"an entropy block needs {size} more bytes, {self.left} are left")
        self.at += size
        return self.body[self.at - size : self.at]


def _plane_of(stream: Stream) -> Stream:
    return Stream.of(stream.count, 256)


def _cut(stream: Stream, symbols: Symbols) -> list[tuple[Stream, Symbols]]:
    if not stream.count:
        return []
    if stream.alphabet <= _WIDEST:
        return [(stream, symbols)]
    planes = np.ascontiguousarray(symbols.view(np.uint8).reshape(-1, stream.dtype.itemsize).T)
    return [(_plane_of(stream), plane) for plane in planes]


def _shares(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Scale positive counts to integers of at least 1 that sum to 2^16."""
    shares: NDArray[np.int64] = 1 + counts * (_TOTAL - len(counts)) // counts.sum()
    shares[counts.argmax()] += _TOTAL - int(shares.sum())
    return shares


def _model(shares: NDArray[np.int64]) -> Any:
    # Multiples of 2^-16 are exact in float32, and so is their sum: the model cannot differ between machines.
    return _stream().model.Categorical((shares / _TOTAL).astype(np.float32), perfect=False)


def _squeeze_block(stream: Stream, symbols: Symbols) -> bytes:
    counts = np.bincount(symbols, minlength=stream.alphabet)
    present = np.flatnonzero(counts)
    if len(present) == 1:
        return struct.pack("<BH", _SAME, present[0])
    shares = _shares(counts[present])
    entropy_bits = -float((counts[present] * np.log2(shares / _TOTAL)).sum())
    overhead = 4 + (stream.alphabet + 7) // 8 + 2 * len(present)
    if overhead + entropy_bits / 8 >= stream.packed_bytes:
        return bytes([_PACKED]) + pack(stream, symbols)
    rank = np.zeros(stream.alphabet, np.int32)
    rank[present] = np.arange(len(present), dtype=np.int32)
    words = _encode(rank[symbols], shares)
    return b"".join(
        (
            struct.pack("<BI", _CODED, len(words)),
            np.packbits(counts > 0).tobytes(),
            shares.astype("<u2").tobytes(),  # at least two are present, so every share is below 2^16
            words.astype("<u4").tobytes(),
        )
    )


def _encode(ranks: NDArray[np.int32], shares: NDArray[np.int64]) -> NDArray[np.uint32]:
    encoder = _stream().queue.RangeEncoder()
    encoder.encode(ranks, _model(shares))
    words: NDArray[np.uint32] = encoder.get_compressed()
    return words


def _expand_block(stream: Stream, reader: _Reader) -> Symbols:
    form = reader.take(1)[0]
    if form == _PACKED:
        symbols = unpack(stream, reader.take(stream.packed_bytes))
        check_alphabet(stream, symbols)
        return symbols
    if form == _SAME:
        (symbol,) = struct.unpack("<H", reader.take(2))
        if symbol >= stream.alphabet:
            raise PayloadError("body", f"symbol {symbol}, expected below {stream.alphabet}")
        return np.full(stream.count, symbol, stream.dtype)
    if form != _CODED:
        raise PayloadError("body", f"entropy block of unknown form {form}")
    return _expand_coded(stream, reader)


def _expand_coded(stream: Stream, reader: _Reader) -> Symbols:
    (length,) = struct.unpack("<I", reader.take(4))
    marks = np.unpackbits(np.frombuffer(reader.take((stream.alphabet + 7) // 8), np.uint8))
    present = np.flatnonzero(marks)
    if len(present) < 2 or present[-1] >= stream.alphabet:
        raise PayloadError("body", "entropy model: expected at least two symbols, all inside the alphabet")
    shares = np.frombuffer(reader.take(2 * len(present)), "<u2").astype(np.int64)
    if shares.min() < 1 or shares.sum() != _TOTAL:
        raise PayloadError("body", f"entropy model: shares must be positive and sum to {_TOTAL}")
    words = np.frombuffer(reader.take(4 * length), "<u4").astype(np.uint32) if length else np.zeros(0, np.uint32)
    try:
        ranks = _stream().queue.RangeDecoder(words).decode(_model(shares), stream.count)
    except (AssertionError, ValueError) as error:
        raise PayloadError("body", f"entropy block: {str(error)[:100]}") from None
    # Range decoding cannot see words that are missing or left over; encoding again can.
    if not np.array_equal(_encode(ranks, shares), words):
        raise PayloadError("length", "entropy block: its words are not what its symbols encode to")
    symbols: Symbols = present.astype(stream.dtype)[ranks]
    return symbols
