"""Codecs: payload -> bytes -> payload.

``codec(spec)`` makes one from a short text: what the values become, then optional links joined by ``+``.

==================  ====================================================================================
``float32``         IEEE floats; also ``float16`` (half the bytes) and ``float64`` (exact for float64)
``simplex:b``       probabilities at b bits, nearest in L1 (CFD); ``simplex:1`` is the top class alone
``topk:k``          the k largest probabilities, the rest of the mass spread evenly (biased)
``...+delta``       against the same sender's last message, where both ends hold it
``...+entropy``     range coded; or ``...+deflate``, zlib
==================  ====================================================================================

Whatever a chain says of probabilities and floats, labels and flags travel exactly, counts as float32, and a
model's integer buffers exactly. Nothing here unpickles, evaluates or trusts a length that it has not checked.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import lru_cache

from fedkd import wire
from fedkd.codecs.base import DEFAULT_MAX_BYTES, REASONS, Codec, Coder, Squeezer
from fedkd.codecs.chain import Chain
from fedkd.codecs.deflate import Deflate
from fedkd.codecs.entropy import Entropy
from fedkd.codecs.floats import FloatCoder
from fedkd.codecs.simplex import MAX_BITS, SimplexCoder
from fedkd.codecs.topk import TopKCoder
from fedkd.errors import ConfigError
from fedkd.payloads import Envelope

__all__ = ["DEFAULT_MAX_BYTES", "REASONS", "VALUES", "Codec", "codec", "peek"]


def _float(size: int) -> tuple[FloatCoder, Coder]:
    coder = FloatCoder(size)
    return coder, coder


VALUES: dict[str, tuple[Callable[[int], tuple[FloatCoder, Coder]], range | None]] = {
    "float16": (lambda _: _float(2), None),
    "float32": (lambda _: _float(4), None),
    "float64": (lambda _: _float(8), None),
    "simplex": (lambda bits: (FloatCoder(4), SimplexCoder(bits)), range(1, MAX_BITS + 1)),
    "topk": (lambda k: (FloatCoder(4), TopKCoder(k)), range(1, 65536)),
}
"""First link by name: its (real, simplex) coders from its number, and which numbers it takes (None: it takes
none)."""

SQUEEZERS: dict[str, Callable[[], Squeezer]] = {"entropy": Entropy, "deflate": Deflate}


@lru_cache(maxsize=256)
def codec(spec: str) -> Codec:
    """Return the codec of ``spec``; equal texts give the same object.

    Raises:
        ConfigError: naming the link that is unknown, out of place or lacks its number.
    """
    first, *links = spec.split("+")
    name, colon, number = first.partition(":")
    if name not in VALUES:
        raise ConfigError(f"codec {spec!r}: {_unknown(name, VALUES)}")
    make, numbers = VALUES[name]
    if numbers is None and colon:
        raise ConfigError(f"codec {spec!r}: {name} takes no number")
    # Plain digits only: every codec has one spelling, because both ends compare the text.
    if numbers is not None and (not number.isascii() or str(_int(number)) != number or _int(number) not in numbers):
        example = f"{name}:{numbers.start}"
        raise ConfigError(f"codec {spec!r}: {name} needs a number of {numbers.start} to {numbers[-1]}, like {example}")
    real, simplex = make(_int(number))

    has_delta = bool(links) and links[0] == "delta"
    rest = links[1:] if has_delta else links
    if len(rest) > 1 or (rest and rest[0] not in SQUEEZERS):
        known = ["delta", *SQUEEZERS]
        wrong = next((link for link in links if link not in known), None)
        hint = _unknown(wrong, known) if wrong is not None else "links go in the order values+delta+entropy"
        raise ConfigError(f"codec {spec!r}: {hint}")
    return Chain(spec, real, simplex, SQUEEZERS[rest[0]]() if rest else None, has_delta)


def peek(data: bytes) -> Envelope:
    """Return the envelope of a message without reading its tensors; a few microseconds whatever its length.

    Raises:
        PayloadError: where prefix, envelope or total length are wrong. The byte cap is the caller's, or
            decode's.
    """
    return wire.read_head(data).envelope


def _int(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 10 else -1


def _unknown(name: str, known: object) -> str:
    names = sorted(known)  # type: ignore[call-overload]
    close = difflib.get_close_matches(name, names, n=1)
    return f"unknown link {name!r}" + (f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}")
