"""What a codec is: a payload turned into bytes and back, and the small parts that a codec is chained from.

A chain has up to three links, each one file::

    payload -> [Coder: tensor -> symbols] -> [delta: minus the reference's symbols] -> [Squeezer: -> bytes]

A *symbol stream* is a flat array of unsigned integers below a known alphabet. Its length and alphabet follow
from the tensor's shape alone, so a receiver knows every size before it reads the body. A later stage that
maps tensors to tensors (FedKD's SVD) goes before the coder: it would name its factors as further entries of
the header.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkd.payloads import Contract, Envelope, Payload

Symbols = NDArray[Any]
"""Flat array of unsigned integers, little-endian, each below the alphabet of its stream."""

DEFAULT_MAX_BYTES = 256 * 2**20
"""Longest message accepted unless the receiver says otherwise (bytes); also the cap on a free dimension's
memory."""


@dataclass(frozen=True)
class Stream:
    """Size of one symbol stream: ``count`` symbols in [0, ``alphabet``), held as ``dtype``, packed in
    ``bits`` each."""

    count: int
    alphabet: int
    dtype: np.dtype[Any]
    bits: int

    @staticmethod
    def of(count: int, alphabet: int) -> Stream:
        """Return the stream that holds ``count`` symbols of ``alphabet`` in the smallest unsigned type."""
        bits = max(1, (alphabet - 1).bit_length())
        size = next(s for s in (1, 2, 4, 8) if bits <= 8 * s)
        return Stream(count, alphabet, np.dtype(f"<u{size}"), bits)

    @property
    def plain(self) -> bool:
        """Whether the symbols fill their type, so that packing is a copy of memory."""
        return self.bits == 8 * self.dtype.itemsize

    @property
    def packed_bytes(self) -> int:
        """Length of the packed stream in bytes."""
        return (self.count * self.bits + 7) // 8


class Coder(ABC):
    """Maps one tensor to symbol streams and back."""

    wire: str
    """Name of the wire type in the header, such as ``f2`` or ``s1``."""

    @abstractmethod
    def streams(self, shape: tuple[int, ...]) -> tuple[Stream, ...]:
        """Return the streams of a tensor of ``shape``; cheap and without allocation."""

    @abstractmethod
    def to_symbols(self, name: str, value: Tensor) -> tuple[Symbols, ...]:
        """Return the symbols of ``value``, one flat array per stream.

        Raises:
            PayloadError: naming the field, where the value cannot be carried.
        """

    @abstractmethod
    def from_symbols(self, name: str, symbols: Sequence[Symbols], shape: tuple[int, ...]) -> Tensor:
        """Return the tensor of ``shape``. The symbols are below their alphabet, but else not to be trusted.

        Raises:
            PayloadError: where no honest encoder makes such symbols.
        """


class Squeezer(ABC):
    """Lossless last link: symbol streams to body bytes and back."""

    @abstractmethod
    def squeeze(self, streams: Sequence[tuple[Stream, Symbols]]) -> bytes:
        """Return the body."""

    @abstractmethod
    def expand(self, body: memoryview, streams: Sequence[Stream]) -> list[Symbols]:
        """Return the symbols of exactly these streams; never more memory than they need.

        Raises:
            PayloadError: ``length`` where the body does not end where the streams do, ``body`` where it is
                corrupt.
        """


class Codec(ABC):
    """Turns a payload into the bytes that travel, and bytes of a stranger into a checked payload."""

    spec: str
    """The codec's name, as in an experiment and in every header: ``simplex:1+delta+entropy``."""

    needs_reference: bool
    """Whether both ends should keep the last message of a sender as the reference of the next one."""

    wire_version: ClassVar[int] = 1

    @abstractmethod
    def lossless_for(self, dtype: torch.dtype) -> bool:
        """Tell whether every tensor of ``dtype`` comes back bit for bit (before simplex rows are
        renormalised)."""

    @abstractmethod
    def supports(self, kind: type[Payload]) -> bool:
        """Tell whether the codec has something to say about this kind (a simplex codec has not about
        ``Logits``)."""

    @abstractmethod
    def encode(self, payload: Payload, envelope: Envelope, reference: Payload | None = None) -> bytes:
        """Return the message.

        Args:
            reference: what the receiver got from this sender last time (see :meth:`roundtrip`), for delta
                codecs. Where it is missing or of another shape the message is whole, and the header says so.
        Raises:
            PayloadError: where the payload cannot be carried (NaN, a magnitude beyond float16, a codec that
                does not fit the kind), naming the field.
        """

    @abstractmethod
    def decode(
        self,
        data: bytes,
        contract: Contract,
        reference: Payload | None = None,
        *,
        expected: Envelope | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> tuple[Payload, Envelope]:
        """Return the checked payload and the envelope of a message from a stranger.

        Checked in this order, each before anything is spent on the next: byte cap; prefix and envelope;
        sender, run and round; kind, codec, names, wire types, shapes, exact length; proxy set and ids;
        reference; body; finite; range; then simplex rows are renormalised.

        Args:
            contract: what the receiver accepts; sizes come from it, never from the message alone.
            reference: what this sender's last message decoded to, for delta codecs.
            expected: the envelope awaited; its ``examples`` is not compared. ``None`` leaves that to the
                caller.
            max_bytes: cap on the message, and on the decoded bytes of tensors with a free dimension.
        Raises:
            PayloadError: ``reason`` is one of ``REASONS``.
        """

    @abstractmethod
    def roundtrip(self, payload: Payload, reference: Payload | None = None) -> Payload:
        """Return what the receiver will decode; the sender keeps it as the next reference.

        ``reference`` is accepted for symmetry and not needed: delta and entropy coding lose nothing.
        """


REASONS = (
    "cap",  # longer than max_bytes
    "magic",  # not a fedkd message, or cut inside the prefix
    "version",  # a wire version that this release does not speak
    "header",  # a header that contradicts itself
    "examples",  # the count of records is 0, negative, NaN or absurd
    "sender",
    "run",
    "round",
    "kind",  # another kind of payload
    "codec",  # another codec than the one agreed
    "fields",  # names of tensors
    "dtype",  # a wire type that the contract does not have
    "shape",
    "size",  # more elements or bytes than the contract or the cap allows
    "length",  # bytes missing or left over
    "proxy",  # labels of another proxy set
    "ids",  # labels of other samples, or in another order
    "reference",  # a delta against a message that the receiver does not hold
    "body",  # symbols that no encoder makes
    "finite",
    "range",
    "simplex",
    "label",
    "malformed",  # the last resort: a fault that none of the checks foresaw; a bug if it is ever seen
)
"""Every reason code of a PayloadError that decode and peek raise."""
