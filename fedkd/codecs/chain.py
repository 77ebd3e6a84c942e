"""The one codec class: a coder per tensor, then optionally delta, then optionally a squeezer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fedkd import wire
from fedkd.codecs import delta
from fedkd.codecs.base import DEFAULT_MAX_BYTES, Codec, Coder, Squeezer, Stream, Symbols
from fedkd.codecs.bits import pack, unpack
from fedkd.codecs.floats import FloatCoder
from fedkd.codecs.integers import FlagCoder, IntegerCoder, LabelCoder
from fedkd.payloads import (
    Bundle,
    Contract,
    Envelope,
    Nothing,
    Payload,
    PayloadError,
    Range,
    Weights,
    range_of,
)

_PLANS_KEPT = 64
_LABELS = {size: LabelCoder(size) for size in (1, 2, 4)}
_INTEGER, _FLAG = IntegerCoder(), FlagCoder()


@dataclass(frozen=True)
class _Item:
    """One tensor of a checked header, with all that its bytes need."""

    name: str
    shape: tuple[int, ...]
    coder: Coder
    streams: tuple[Stream, ...]


@dataclass(frozen=True)
class _Plan:
    """What a table of tensors means under one contract; kept, since a sender's table is the same every
    round."""

    contract: Contract
    items: tuple[_Item, ...]
    packed_bytes: int


@final
class Chain(Codec):
    """See :class:`~fedkd.codecs.base.Codec`; made by :func:`fedkd.codecs.codec`.

    Args:
        real: coder of unbounded floats; ``simplex`` of probability rows; counts take float32, or float64 with
            it.
    """

    def __init__(
        self,
        spec: str,
        real: FloatCoder,
        simplex: Coder,
        squeezer: Squeezer | None = None,
        needs_reference: bool = False,
    ) -> None:
        self.spec = spec
        self.needs_reference = needs_reference
        self._squeezer = squeezer
        self._real = real
        self._simplex = simplex
        weight = real if real.size == 8 else FloatCoder(4)
        self._coders: dict[Range, Coder] = {
            "real": real,
            "simplex": simplex,
            "weight": weight,
            "integer": _INTEGER,
            "flag": _FLAG,
        }
        self._tables: dict[object, bytes] = {}
        self._plans: dict[bytes, _Plan] = {}

    def __repr__(self) -> str:
        return f"codec({self.spec!r})"

    def lossless_for(self, dtype: torch.dtype) -> bool:
        if not dtype.is_floating_point:
            return not dtype.is_complex
        return self._simplex is self._real and self._real.exact_for(dtype)

    def supports(self, kind: type[Payload]) -> bool:
        if self._simplex is self._real or kind in (Nothing, Bundle):
            return True
        return any(spec.range == "simplex" for spec in kind.fields.values())

    def encode(self, payload: Payload, envelope: Envelope, reference: Payload | None = None) -> bytes:
        coded = self._symbols(payload)
        fingerprint = wire.NO_REFERENCE
        has_delta = False
        if self.needs_reference and reference is not None and type(reference) is type(payload):
            old = self._reference_symbols(reference, coded)
            if old is not None:
                fingerprint = delta.fingerprint(x for parts in old for x in parts)
                has_delta = True
                coded = [
                    (item, tuple(map(delta.subtract, item.streams, new, was)))
                    for (item, new), was in zip(coded, old, strict=True)
                ]
        pairs = [pair for item, parts in coded for pair in zip(item.streams, parts, strict=True)]
        body = [pack(*pair) for pair in pairs] if self._squeezer is None else self._squeezer.squeeze(pairs)
        return wire.write(envelope, self._table(payload, [item for item, _ in coded]), body, has_delta, fingerprint)

    def decode(
        self,
        data: bytes,
        contract: Contract,
        reference: Payload | None = None,
        *,
        expected: Envelope | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> tuple[Payload, Envelope]:
        if len(data) > max_bytes:
            raise PayloadError("cap", f"a message of {len(data)} bytes, at most {max_bytes} are accepted")
        try:
            return self._decode(data, contract, reference, expected, max_bytes)
        except PayloadError:
            raise
        except Exception as error:  # a server must outlive what its author did not foresee; tests demand it never runs
            raise PayloadError("malformed", f"{type(error).__name__} while decoding: {str(error)[:200]}") from error

    def _decode(
        self,
        data: bytes,
        contract: Contract,
        reference: Payload | None,
        expected: Envelope | None,
        max_bytes: int,
    ) -> tuple[Payload, Envelope]:
        head = wire.read_head(data)
        if expected is not None:
            head.envelope.check_identity(expected)
        plan = self._plans.get(head.table)
        if plan is None or plan.contract is not contract:
            plan = self._plan(head.table, contract, max_bytes)
        if self._squeezer is None and len(head.body) != plan.packed_bytes:
            raise PayloadError("length", f"expected a body of {plan.packed_bytes} bytes, got {len(head.body)}")
        if expected is not None:
            head.envelope.check_proxy(expected)
        old = self._held(head, reference, plan) if head.delta else None

        streams = [stream for item in plan.items for stream in item.streams]
        if self._squeezer is None:
            flat = _unpack(head.body, streams)
        else:
            flat = self._squeezer.expand(head.body, streams)
        if old is not None:
            flat = list(map(delta.add, streams, flat, (x for parts in old for x in parts)))
        tensors: dict[str, Tensor] = {}
        at = 0
        for item in plan.items:
            end = at + len(item.streams)
            tensors[item.name] = item.coder.from_symbols(item.name, flat[at:end], item.shape)
            at = end
        return contract.check_values(contract.build(tensors)), head.envelope

    def roundtrip(self, payload: Payload, reference: Payload | None = None) -> Payload:
        tensors = {item.name: item.coder.from_symbols(item.name, x, item.shape) for item, x in self._symbols(payload)}
        contract = Contract.like(payload)
        # from_symbols may hand out views of the sender's own memory; the reference must not change under it.
        return contract.check_values(contract.build({name: t.clone() for name, t in tensors.items()}))

    def _symbols(self, payload: Payload) -> list[tuple[_Item, tuple[Symbols, ...]]]:
        if not self.supports(type(payload)):
            raise PayloadError(
                "codec",
                f"{self.spec} quantises probabilities; {type(payload).__name__} has none: use a float codec",
            )
        ranges = _ranges(payload)
        coded = []
        for name, value in payload.tensors().items():
            coder = self._label_coder(value) if ranges[name] == "label" else self._coders[ranges[name]]
            shape = tuple(value.shape)
            symbols = coder.to_symbols(name, value)
            coded.append((_Item(name, shape, coder, coder.streams(shape)), symbols))
        return coded

    @staticmethod
    def _label_coder(value: Tensor) -> LabelCoder:
        # The payload does not know its number of classes: the largest label present is enough to be read
        # back.
        return _LABELS[LabelCoder.size_for(int(value.max()) + 1 if value.numel() else 1)]

    def _reference_symbols(
        self, reference: Payload, coded: Sequence[tuple[_Item, tuple[Symbols, ...]]]
    ) -> list[tuple[Symbols, ...]] | None:
        """Return the reference's symbols under this message's coders; None where names or shapes differ."""
        return _symbols_of(reference, [item for item, _ in coded])

    def _held(self, head: wire.Head, reference: Payload | None, plan: _Plan) -> list[tuple[Symbols, ...]]:
        if not self.needs_reference:
            raise PayloadError("header", f"a delta, but codec {self.spec} has none")
        if reference is None:
            raise PayloadError("reference", "a delta against a message that is not held; ask for the whole")
        old = _symbols_of(reference, plan.items)
        if old is None or delta.fingerprint(x for parts in old for x in parts) != head.fingerprint:
            raise PayloadError("reference", "a delta against another message than the one held; ask for the whole")
        return old

    def _table(self, payload: Payload, items: Sequence[_Item]) -> bytes:
        key = (type(payload), tuple((item.name, item.coder.wire, item.shape) for item in items))
        table = self._tables.get(key)
        if table is None:
            entries = tuple(wire.Entry(item.name, item.coder.wire, item.shape) for item in items)
            table = wire.write_table(wire.Table(type(payload).__name__, self.spec, entries))
            if len(self._tables) >= _PLANS_KEPT:
                self._tables.clear()
            self._tables[key] = table
        return table

    def _plan(self, data: bytes, contract: Contract, max_bytes: int) -> _Plan:
        kind, spec = wire.read_agreement(data)
        if kind != contract.kind.__name__:
            raise PayloadError("kind", f"expected {contract.kind.__name__}, got {kind[:60]!r}")
        if spec != self.spec:
            raise PayloadError("codec", f"expected codec {self.spec}, got {spec[:60]!r}")
        table = wire.read_table(data, len(contract.shapes))
        # As many as the contract has: a name that comes twice therefore leaves another one out.
        contract.check_shapes({entry.name: entry.shape for entry in table.entries})
        classes = _classes(contract)
        items, free_bytes = [], 0
        for entry in table.entries:
            coder = self._accepted(entry, contract.ranges[entry.name], classes)
            item = _Item(entry.name, entry.shape, coder, coder.streams(entry.shape))
            items.append(item)
            if None in contract.shapes[entry.name]:
                # The contract does not bound these, so the byte cap must: as decoded, at 8 bytes at most
                # each.
                size = 8
                for length in entry.shape:
                    size *= length
                free_bytes += size
        if free_bytes > max_bytes:
            raise PayloadError("size", f"tensors of free size would take {free_bytes} bytes, at most {max_bytes}")
        plan = _Plan(contract, tuple(items), sum(s.packed_bytes for item in items for s in item.streams))
        # Only what a contract let through is kept, and little of it: a stranger cannot fill the memory.
        if len(self._plans) >= _PLANS_KEPT:
            self._plans.clear()
        if not free_bytes:
            self._plans[data] = plan
        return plan

    def _accepted(self, entry: wire.Entry, kind: Range, classes: Callable[[str], int]) -> Coder:
        if kind == "label":
            widest = LabelCoder.size_for(classes(entry.name))
            for size, coder in _LABELS.items():
                if size <= widest and coder.wire == entry.wire:
                    return coder
            raise PayloadError("dtype", f"{entry.name}: expected labels of up to {widest} bytes, got {entry.wire!r}")
        coder_ = self._coders[kind]
        if coder_.wire != entry.wire:
            raise PayloadError("dtype", f"{entry.name}: expected wire type {coder_.wire}, got {entry.wire[:60]!r}")
        return coder_


def _unpack(body: memoryview, streams: Sequence[Stream]) -> list[Symbols]:
    flat, at = [], 0
    for stream in streams:
        end = at + stream.packed_bytes
        flat.append(unpack(stream, body[at:end]))
        at = end
    return flat


def _symbols_of(reference: Payload, items: Sequence[_Item]) -> list[tuple[Symbols, ...]] | None:
    tensors = reference.tensors()
    if tensors.keys() != {item.name for item in items}:
        return None
    if any(tuple(tensors[item.name].shape) != item.shape for item in items):
        return None
    return [item.coder.to_symbols(item.name, tensors[item.name]) for item in items]


def _ranges(payload: Payload) -> Mapping[str, Range]:
    if isinstance(payload, Weights):
        return {name: range_of(value) for name, value in payload.values.items()}
    if isinstance(payload, Bundle):
        return {f"{role}/{name}": r for role, part in payload.parts.items() for name, r in _ranges(part).items()}
    return {name: spec.range for name, spec in payload.fields.items()}


def _classes(contract: Contract) -> Callable[[str], int]:
    """Return the function from a tensor's name to the number of classes of its part."""

    def of(name: str) -> int:
        for role, part in contract.parts.items():
            if name.startswith(f"{role}/") and name[len(role) + 1 :] in part.shapes:
                return _classes(part)(name[len(role) + 1 :])
        return contract.classes

    return of
