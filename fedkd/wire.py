"""The message: prefix, header, body; little-endian throughout.

::

    prefix    4s  b"FKD\\x01"
              B   wire version, 1
              B   flags: 1 = delta against a reference
              H   0
              I   header length in bytes
              Q   body length in bytes
    header    q   round
              q   sender
              d   examples
              8s  fingerprint of the reference, zeros without one
              BBB lengths of run, proxy and ids, then these as UTF-8
              B+s kind of payload, B+s codec spec
              H   number of tensors, then for each
                  H+s name, B+s wire type, B number of dimensions, I each
    body      the tensors' symbols, in the header's order

The header alone says how long the body must be and how much memory it needs, so all of that is checked before
any is spent. There is no checksum: TLS guards the bytes on the way, and the outbox and checkpoints carry
their own hash.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from fedkd.envelope import Envelope, PayloadError

MAGIC = b"FKD\x01"
VERSION = 1
DELTA = 1
MAX_HEADER_BYTES = 2**20
MAX_DIMENSIONS = 8
NO_REFERENCE = bytes(8)

PREFIX = struct.Struct("<4sBBHIQ")
_ENVELOPE = struct.Struct("<qqd8sBBB")


@dataclass(frozen=True)
class Entry:
    """One tensor in the header."""

    name: str
    wire: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Head:
    """Everything before the table of tensors, and the table and body still unread."""

    delta: bool
    fingerprint: bytes
    envelope: Envelope
    table: bytes
    body: memoryview


@dataclass(frozen=True)
class Table:
    """The constant part of a sender's headers: kind, codec and tensors."""

    kind: str
    spec: str
    entries: tuple[Entry, ...]


def write(
    envelope: Envelope,
    table: bytes,
    body: bytes | list[bytes],
    delta: bool = False,
    fingerprint: bytes = NO_REFERENCE,
) -> bytes:
    """Return the message.

    Raises:
        PayloadError: ``header`` where the envelope does not fit, ``examples`` for an impossible count.
    """
    envelope.check_examples()
    texts = [text.encode() for text in (envelope.run, envelope.proxy, envelope.ids)]
    parts = [body] if isinstance(body, bytes) else body
    try:
        fixed = _ENVELOPE.pack(envelope.round, envelope.sender, envelope.examples, fingerprint, *map(len, texts))
        header = sum(map(len, texts)) + len(fixed) + len(table)
        prefix = PREFIX.pack(MAGIC, VERSION, DELTA if delta else 0, 0, header, sum(map(len, parts)))
    except struct.error as error:
        raise PayloadError("header", f"envelope does not fit the header: {error}") from None
    if header > MAX_HEADER_BYTES:
        raise PayloadError("header", f"a header of {header} bytes, at most {MAX_HEADER_BYTES} are allowed")
    return b"".join((prefix, fixed, *texts, table, *parts))


def write_table(table: Table) -> bytes:
    """Return the bytes of the constant part of a header.

    Raises:
        PayloadError: ``header`` for a name or a shape beyond the format.
    """
    try:
        parts = [_short(table.kind), _short(table.spec), struct.pack("<H", len(table.entries))]
        for entry in table.entries:
            name = entry.name.encode()
            parts += [struct.pack("<H", len(name)), name, _short(entry.wire)]
            if len(entry.shape) > MAX_DIMENSIONS:
                raise PayloadError("header", f"{entry.name}: {len(entry.shape)} dimensions, at most {MAX_DIMENSIONS}")
            parts.append(struct.pack(f"<B{len(entry.shape)}I", len(entry.shape), *entry.shape))
    except struct.error as error:
        raise PayloadError("header", f"a name or a size does not fit the header: {error}") from None
    return b"".join(parts)


def _short(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<B", len(data)) + data


def read_head(data: bytes) -> Head:
    """Read prefix and envelope; the table stays unparsed.

    Raises:
        PayloadError: ``magic``, ``version``, ``header``, ``length`` or ``examples``.
    """
    if len(data) < PREFIX.size or data[:4] != MAGIC:
        raise PayloadError("magic", f"expected a message of fedkd, got {len(data)} bytes that are none")
    _, version, flags, zero, header, body = PREFIX.unpack_from(data)
    if version != VERSION:
        raise PayloadError("version", f"wire version {version}, this release reads {VERSION}")
    if flags & ~DELTA or zero or header > MAX_HEADER_BYTES or header < _ENVELOPE.size:
        raise PayloadError("header", f"flags {flags:#x} or header length {header} are not those of version {VERSION}")
    if len(data) != PREFIX.size + header + body:
        have = len(data) - PREFIX.size
        raise PayloadError("length", f"expected {header} + {body} bytes behind the prefix, got {have}")
    round_, sender, examples, fingerprint, *lengths = _ENVELOPE.unpack_from(data, PREFIX.size)
    at, end = PREFIX.size + _ENVELOPE.size, PREFIX.size + header
    if at + sum(lengths) > end:
        raise PayloadError("header", "the envelope's texts are longer than the header")
    texts = []
    for length in lengths:
        texts.append(_text(data[at : at + length]))
        at += length
    if not flags & DELTA and fingerprint != NO_REFERENCE:
        raise PayloadError("header", "a reference is named, but the message is not a delta")
    run, proxy, ids = texts
    envelope = Envelope(run=run, round=round_, sender=sender, proxy=proxy, ids=ids, examples=examples)
    envelope.check_examples()
    return Head(bool(flags & DELTA), fingerprint, envelope, bytes(data[at:end]), memoryview(data)[end:])


def read_agreement(data: bytes) -> tuple[str, str]:
    """Return kind and codec spec, the first two texts of a table; raises PayloadError ``header``."""
    try:
        at, kind = _read_short(data, 0)
        _, spec = _read_short(data, at)
    except struct.error:
        raise PayloadError("header", "the table of tensors is cut short") from None
    return kind, spec


def read_table(data: bytes, tensors: int) -> Table:
    """Parse the table of a header.

    Args:
        tensors: how many the receiver expects; another number is refused before the names are read.
    Raises:
        PayloadError: ``header`` or ``fields``.
    """
    try:
        at, kind = _read_short(data, 0)
        at, spec = _read_short(data, at)
        (count,) = struct.unpack_from("<H", data, at)
        at += 2
        if count != tensors:
            raise PayloadError("fields", f"expected {tensors} tensors, got {count}")
        entries = []
        for _ in range(count):
            (length,) = struct.unpack_from("<H", data, at)
            name = _text(_slice(data, at + 2, length))
            at, wire = _read_short(data, at + 2 + length)
            (rank,) = struct.unpack_from("<B", data, at)
            if rank > MAX_DIMENSIONS:
                raise PayloadError("header", f"{name[:60]!r}: {rank} dimensions, at most {MAX_DIMENSIONS}")
            shape = struct.unpack_from(f"<{rank}I", data, at + 1)
            at += 1 + 4 * rank
            entries.append(Entry(name, wire, shape))
    except struct.error:
        raise PayloadError("header", "the table of tensors is cut short") from None
    if at != len(data):
        raise PayloadError("header", f"{len(data) - at} bytes behind the table of tensors")
    return Table(kind, spec, tuple(entries))


def _slice(data: bytes, at: int, length: int) -> bytes:
    if at + length > len(data):
        raise PayloadError("header", "the table of tensors is cut short")
    return data[at : at + length]


def _read_short(data: bytes, at: int) -> tuple[int, str]:
    (length,) = struct.unpack_from("<B", data, at)
    return at + 1 + length, _text(_slice(data, at + 1, length))


def _text(data: bytes) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError:
        raise PayloadError("header", "a text of the header is not UTF-8") from None
