"""zlib over the packed symbols, byte plane by byte plane: for large alphabets and as a dependency-free
fallback."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import final

import numpy as np

from fedkd.codecs.base import Squeezer, Stream, Symbols
from fedkd.codecs.bits import pack, unpack
from fedkd.payloads import PayloadError

LEVEL = 6


@final
class Deflate(Squeezer):
    """One zlib stream for the whole body, decompressed to the length that the shapes imply and not one byte
    more."""

    def squeeze(self, streams: Sequence[tuple[Stream, Symbols]]) -> bytes:
        return zlib.compress(b"".join(_planes(s, pack(s, x)) for s, x in streams), LEVEL)

    def expand(self, body: memoryview, streams: Sequence[Stream]) -> list[Symbols]:
        size = sum(s.packed_bytes for s in streams)
        machine = zlib.decompressobj()
        try:
            # One spare byte tells "ends here" from "goes on"; max_length 0 would mean no limit at all.
            raw = machine.decompress(body, size + 1)
        except zlib.error as error:
            raise PayloadError("body", f"deflate: {error}") from None
        if len(raw) != size or not machine.eof or machine.unused_data:
            raise PayloadError("length", f"deflate: expected exactly {size} bytes inside, and none behind")
        view, symbols, start = memoryview(raw), [], 0
        for stream in streams:
            symbols.append(unpack(stream, _unplanes(stream, view[start : start + stream.packed_bytes])))
            start += stream.packed_bytes
        return symbols


def _planes(stream: Stream, data: bytes) -> bytes:
    # Bytes of equal rank side by side: exponents of neighbouring floats are alike, low mantissa bytes are
    # noise.
    if not stream.plain or stream.dtype.itemsize == 1:
        return data
    return np.frombuffer(data, np.uint8).reshape(-1, stream.dtype.itemsize).T.tobytes() if data else data


def _unplanes(stream: Stream, data: memoryview) -> memoryview | bytes:
    if not stream.plain or stream.dtype.itemsize == 1 or not len(data):
        return data
    return np.frombuffer(data, np.uint8).reshape(stream.dtype.itemsize, -1).T.tobytes()
