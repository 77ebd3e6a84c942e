"""Bytes of a stranger against every reader of messages: ``python -m simulations.benchmarks.fuzz --inputs 100000``.

Each input is random bytes, or a valid message that was flipped, cut, spliced with another one, or given another header or
body; it goes to ``decode`` under every kind of payload and every codec, or to ``read_request`` of a device. A reader may
refuse it with a ``PayloadError``, or accept it: then payload and envelope are judged anew, by this file's own reading of
the contract. Anything else is a failure: another exception, a death of the process, or memory beyond the bounds below.

It needs the extra ``dev`` (hypothesis draws the inputs, and shrinks one that fails).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from fedkd import wire
from fedkd.codecs import REASONS, SQUEEZERS, VALUES, codec, peek
from fedkd.experiment import validate
from fedkd.messages import Heading, read_request, write_request
from fedkd.payloads import KINDS, REAL_CAP, WEIGHT_CAP, Bundle, Contract, Envelope, Nothing, Payload, PayloadError
from fedkd.site import Site

MAX_BYTES = 2**20
"""The byte cap that the readers are given."""
MORE_BYTES = 32 * 2**20
"""How much one input may raise the process's resident memory."""
RESERVE_BYTES = 2**30
"""How much address space a process of the command may reserve beyond what it has once everything is loaded."""
BATCH = 20_000

LETTERS = {"N": 20, "C": 10, "D": 3, "M": 7}
FREE = 5
"""Length of a free dimension in the valid messages."""
NUMBERS = {"simplex": (1, 3), "topk": (2,)}
SPECS = tuple(
    first + delta + squeezer
    for first, delta, squeezer in product(
        [f"{name}:{n}" if numbers else name for name, (_, numbers) in VALUES.items() for n in NUMBERS.get(name, (0,))],
        ("", "+delta"),
        ("", *(f"+{name}" for name in SQUEEZERS)),
    )
)
EXPECTED = Envelope(run="r", round=4, sender=2, proxy="proxy-hash", ids="ids-hash", examples=50.0)
METHODS: dict[str, dict[str, Any]] = {
    "ds_fl": {},
    "cfd": {},
    "fedavg": {},
    "fd": {"codec": {"down": "float16+delta+deflate"}},
}


class Escaped(Exception):
    """A reader let something through that the contract does not have, or took too much memory."""


# ---- valid messages -------------------------------------------------------------------------------------------------
def sample(contract: Contract, rng: torch.Generator) -> Payload:
    """Return a payload that keeps ``contract``; free dimensions have the length ``FREE``."""
    if contract.kind is Bundle:
        return Bundle(parts={role: sample(part, rng) for role, part in contract.parts.items()})

    def tensor(name: str) -> Tensor:
        shape = [FREE if size is None else size for size in contract.shapes[name]]
        kind = contract.ranges[name]
        if kind == "simplex":
            return torch.softmax(3 * torch.randn(shape, generator=rng), -1)
        if kind == "weight":
            return torch.randint(0, 1000, shape, generator=rng).float()
        if kind in ("label", "flag"):
            values = torch.randint(0, contract.classes if kind == "label" else 2, shape, generator=rng)
            return values if kind == "label" else values.bool()
        return torch.randint(0, 2**40, shape, generator=rng) if kind == "integer" else torch.randn(shape, generator=rng)

    return contract.build({name: tensor(name) for name in contract.shapes})


@cache
def contracts() -> dict[str, Contract]:
    """Return a contract of every kind."""
    model = {"w": torch.zeros(3, 2), "steps": torch.tensor(5), "mask": torch.tensor([True, False])}
    made = {
        name: Contract.of(kind, LETTERS, weights=model if name == "Weights" else None)
        for name, kind in KINDS.items()
        if kind is not Bundle
    }
    bundle = Contract.bundle({"w": made["Weights"], "y": made["SoftLabels"], "v": made["Votes"]})
    return {**made, "Bundle": bundle}


@dataclass(frozen=True)
class Reader:
    """One way to read a stranger's bytes: a whole message, one against a reference, and what reads and judges them."""

    valid: tuple[bytes, bytes]
    read: Callable[[bytes, bool], None]
    """Called with the bytes and whether the reference is held; raises PayloadError for a refusal, Escaped for a fault."""


@cache
def decoder(kind: str, spec: str) -> Reader:
    """Return the reader of uploads of ``kind`` under the codec ``spec``."""
    contract, coding, rng = contracts()[kind], codec(spec), torch.Generator().manual_seed(0)
    payload = sample(contract, rng)
    held = coding.roundtrip(sample(contract, rng))

    def read(data: bytes, has_reference: bool) -> None:
        found, envelope = coding.decode(
            data, contract, held if has_reference else None, expected=EXPECTED, max_bytes=MAX_BYTES
        )
        judge(found, contract)
        if replace(envelope, examples=EXPECTED.examples) != EXPECTED or peek(data) != envelope:
            raise Escaped(f"accepted an envelope that was not awaited: {envelope}")
        judge_examples(envelope)

    return Reader((coding.encode(payload, EXPECTED), coding.encode(payload, EXPECTED, held)), read)


@cache
def device(method: str) -> Reader:
    """Return a device of ``method`` that reads requests."""
    raw: dict[str, Any] = {
        "algorithm": {"name": method},
        "data": {"source": "digits", "train_size": 200, "test_size": 60},
        "partition": {"clients": 2},
        "models": {"student": "mlp(hidden=[8])", "devices": "mlp(hidden=[8])"},
        **METHODS[method],
    }
    if method in ("ds_fl", "cfd"):
        raw |= {"proxy": {"size": 30}, "proxy_per_round": 20}
    site, rng = Site.load(validate(raw)), torch.Generator().manual_seed(0)
    card, size = site.cards[0], len(site.proxy) if site.proxy is not None else 0
    allowed = site.contracts_down(card, min(size, 20))
    teach, ask = np.arange(min(size, 20)), np.arange(size)[::-1][:20].copy()

    def message(reference: Payload | None) -> tuple[bytes, Payload]:
        knowledge = sample(allowed[0].parts["knowledge"], rng)
        return write_request(site, "r", 4, knowledge, teach, ask, reference)

    whole, held = message(None)

    def read(data: bytes, has_reference: bool) -> None:
        found: Heading = read_request(site, card, data, held if has_reference else None)
        assert isinstance(found.message, Bundle)
        empty = type(found.message.parts["knowledge"]) is Nothing
        judge(found.message, allowed[1] if empty else allowed[0])
        for indices in (found.teach, found.ask):
            if indices.dtype != np.int64 or ((indices < 0) | (indices >= size)).any():
                raise Escaped(f"accepted proxy indices outside the set of {size}: {indices}")
        judge_examples(peek(data))

    return Reader((whole, message(held)[0]), read)


# ---- the judge ------------------------------------------------------------------------------------------------------
def judge(payload: Payload, contract: Contract) -> None:
    """Raise Escaped unless an accepted payload keeps the contract's words, read independently of ``fedkd.payloads``."""
    if type(payload) is not contract.kind:
        raise Escaped(f"accepted {type(payload).__name__} for {contract.kind.__name__}")
    if isinstance(payload, Bundle):
        if payload.parts.keys() != contract.parts.keys():
            raise Escaped(f"accepted the parts {list(payload.parts)}")
        for role, part in payload.parts.items():
            judge(part, contract.parts[role])
        return
    tensors = payload.tensors()
    if set(tensors) != set(contract.shapes):
        raise Escaped(f"accepted the tensors {list(tensors)}")
    for name, value in tensors.items():
        want, kind = contract.shapes[name], contract.ranges[name]
        if len(want) != value.ndim or any(w not in (None, s) for w, s in zip(want, value.shape, strict=True)):
            raise Escaped(f"{name}: accepted shape {list(value.shape)} for {want}")
        if kind == "integer":
            good = value.dtype == torch.int64
        elif kind == "flag":
            good = value.dtype == torch.bool
        elif kind == "label":
            good = value.dtype == torch.int64 and all(0 <= v < contract.classes for v in value.flatten().tolist())
        else:
            numbers = value.double().numpy()
            cap = {"real": REAL_CAP, "weight": WEIGHT_CAP, "simplex": 1.001}[kind]
            good = value.is_floating_point() and bool((np.isfinite(numbers) & (np.abs(numbers) <= cap)).all())
            if kind != "real":
                good &= bool((numbers >= 0).all())
            if kind == "simplex":
                good &= bool((np.abs(numbers.sum(-1) - 1) < 1e-4).all())
        if not good:
            raise Escaped(f"{name}: accepted values that are no {kind}: {value.dtype} {value.flatten()[:20].tolist()}")


def judge_examples(envelope: Envelope) -> None:
    """Raise Escaped unless the count of records is a finite number above 0 and at most 1e9."""
    if not (math.isfinite(envelope.examples) and 0 < envelope.examples <= 1e9):
        raise Escaped(f"accepted a count of records of {envelope.examples}")


# ---- inputs ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Input:
    """Bytes for one reader."""

    name: str
    reader: Reader
    data: bytes
    has_reference: bool

    def __repr__(self) -> str:
        return f"Input({self.name}, reference held: {self.has_reference}, {self.data.hex()})"


@st.composite
def inputs(draw: st.DrawFn) -> Input:
    """Draw a reader and what it is to read."""
    if draw(st.integers(0, 4)) == 0:
        name = draw(st.sampled_from(sorted(METHODS)))
        reader = device(name)
    else:
        kind, spec = draw(st.sampled_from(sorted(KINDS))), draw(st.sampled_from(SPECS))
        if not codec(spec).supports(KINDS[kind]):
            spec = "float32" + spec[spec.find("+") :] if "+" in spec else "float32"
        name, reader = f"{kind} {spec}", decoder(kind, spec)
    whole, delta = reader.valid
    good = draw(st.sampled_from([whole, delta]))
    change = draw(st.sampled_from([_random, _bytes, _bytes, _splice, _header, _body]))
    data = change(draw, good)
    if draw(st.booleans()):
        data = _agree(data)
    return Input(name, reader, data, draw(st.booleans()))


def _random(draw: st.DrawFn, good: bytes) -> bytes:
    start = draw(st.sampled_from([0, 4, wire.PREFIX.size, wire.PREFIX.size + 35]))
    return good[:start] + draw(st.binary(max_size=200))


def _bytes(draw: st.DrawFn, good: bytes) -> bytes:
    """Flip, set, cut, insert and overwrite, anywhere."""
    message = bytearray(good)
    for _ in range(draw(st.integers(0, 4))):
        how = draw(st.sampled_from(["flip", "set", "cut", "insert", "word", "end"]))
        at = draw(st.integers(0, max(0, len(message) - 1)))
        if how == "flip" and message:
            message[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "set" and message:
            message[at] = draw(st.sampled_from([0, 1, 127, 128, 255]))
        elif how == "cut":
            del message[at : at + draw(st.integers(1, 9))]
        elif how == "insert":
            message[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif how == "word":
            message[at : at + 4] = struct.pack("<I", draw(st.integers(0, 2**32 - 1)))
        else:
            del message[at:]
    return bytes(message)


def _splice(draw: st.DrawFn, good: bytes) -> bytes:
    """Join the start of one message and the end of another, of any kind and codec."""
    kind, spec = draw(st.sampled_from(sorted(KINDS))), draw(st.sampled_from(SPECS))
    other = decoder(kind, spec if codec(spec).supports(KINDS[kind]) else "float32").valid[draw(st.integers(0, 1))]
    if draw(st.booleans()):
        # At the seam between header and body: each half is one that some sender makes.
        head, tail = wire.read_head(good), wire.read_head(other)
        return wire.write(head.envelope, head.table, bytes(tail.body), head.delta, head.fingerprint)
    return good[: draw(st.integers(0, len(good)))] + other[draw(st.integers(0, len(other))) :]


_WIRES = ("f2", "f4", "f8", "u1", "u2", "u4", "i8", "b1", "s1", "s3", "t2", "c8", "|O", "M8", "")


def _header(draw: st.DrawFn, good: bytes) -> bytes:
    """Write another header that is well formed: other names, types, shapes, envelope or fingerprint."""
    head = wire.read_head(good)
    envelope, table = head.envelope, _table(head.table)
    entries = list(table.entries)
    for _ in range(draw(st.integers(1, 2))):
        what = draw(st.sampled_from(["kind", "spec", "entry", "drop", "twice", "run", "round", "ids", "examples"]))
        if what == "kind":
            table = replace(table, kind=draw(st.sampled_from([*sorted(KINDS), "Integers", "os.system", ""])))
        elif what == "spec":
            table = replace(table, spec=draw(st.sampled_from([*SPECS, "", "pickle"])))
        elif what == "drop" and entries:
            del entries[draw(st.integers(0, len(entries) - 1))]
        elif what in ("entry", "twice") and entries:
            at = draw(st.integers(0, len(entries) - 1))
            size = st.sampled_from([0, 1, 5, 10, 20, 10**6, 2**32 - 1])
            shape = draw(st.one_of(st.just(entries[at].shape), st.lists(size, max_size=8).map(tuple)))
            wires = draw(st.sampled_from([entries[at].wire, *_WIRES]))
            changed = wire.Entry(entries[at].name, wires, shape)
            entries[at : at + 1] = [changed, changed] if what == "twice" else [changed]
        elif what == "run":
            envelope = replace(envelope, run=draw(st.text(max_size=20)))
        elif what == "round":
            envelope = replace(envelope, round=draw(st.integers(-(2**63), 2**63 - 1)))
        elif what == "ids":
            envelope = replace(envelope, ids=draw(st.text(max_size=20)))
        elif what == "examples":
            envelope = replace(envelope, examples=draw(st.floats(min_value=1e-300, max_value=1e9)))
    delta = draw(st.booleans())
    fingerprint = head.fingerprint if draw(st.booleans()) else wire.NO_REFERENCE
    written = wire.write_table(replace(table, entries=tuple(entries)))
    return wire.write(envelope, written, bytes(head.body), delta, fingerprint)


def _table(data: bytes) -> wire.Table:
    """Parse a table whatever its number of tensors."""
    kind, spec = wire.read_agreement(data)
    (count,) = struct.unpack_from("<H", data, 2 + len(kind.encode()) + len(spec.encode()))
    return wire.read_table(data, count)


def _body(draw: st.DrawFn, good: bytes) -> bytes:
    """Write another body behind a good header."""
    head = wire.read_head(good)
    size = len(head.body)
    how = draw(st.sampled_from(["bytes", "noise", "floats", "changed", "bomb"]))
    if how == "bytes":
        body = draw(st.binary(max_size=200))
    elif how == "noise":
        body = draw(st.randoms(use_true_random=False)).randbytes(size)
    elif how == "floats":
        value = draw(st.floats(width=32))
        body = (struct.pack("<f", value) * (size // 4 + 1))[:size]
    elif how == "changed":
        body = _bytes(draw, bytes(head.body))
    else:
        body = bytes(draw(st.sampled_from([size, 10**5, 10**7])))
    if how == "bomb" or draw(st.booleans()):
        body = zlib.compress(body, 1)
    return wire.write(head.envelope, head.table, body, head.delta, head.fingerprint)


def _agree(data: bytes) -> bytes:
    """Let the prefix tell the true length, so that a change gets past the first door."""
    if len(data) < wire.PREFIX.size:
        return data
    (header,) = struct.unpack_from("<I", data, 8)
    body = max(0, len(data) - wire.PREFIX.size - header)
    return data[:12] + struct.pack("<Q", body) + data[wire.PREFIX.size :]


# ---- one input ------------------------------------------------------------------------------------------------------
def check(given: Input) -> str:
    """Let the reader read; returns ``accepted`` or the reason of the refusal.

    Raises:
        Escaped: it accepted what it must not, refused without a proper reason, or took too much memory.
    """
    before = _resident_bytes()
    try:
        given.reader.read(given.data, given.has_reference)
        said = "accepted"
    except PayloadError as refusal:
        said = refusal.reason
        if said not in REASONS or said == "malformed" or len(str(refusal)) > 1000 or "\n" in str(refusal):
            raise Escaped(f"refused with {said!r}: {str(refusal)[:300]}") from refusal
    taken = _peak_bytes() - before
    if taken > MORE_BYTES:
        raise Escaped(f"{taken / 2**20:.0f} MiB of memory for an input of {len(given.data)} bytes")
    return said


def _resident_bytes() -> int:
    """Return resident memory now, from which on the peak is counted."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak_bytes()


def _peak_bytes() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}: the fuzzer needs Linux")


# ---- the command ----------------------------------------------------------------------------------------------------
def batch(number: int, count: int) -> Counter[str]:
    """Read ``count`` inputs in this process, which may reserve little more memory than it has; returns what was said."""
    torch.set_num_threads(1)
    for method in METHODS:
        device(method)
    limit = _status("VmSize") + RESERVE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    said: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(inputs())
    def read(one: Input) -> None:
        said[check(one)] += 1

    read()
    return said


def main() -> int:
    """Read the inputs, batch by batch, each in a process of its own; print what the readers said as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    said: Counter[str] = Counter()
    started, number = time.perf_counter(), args.seed
    spawn = multiprocessing.get_context("spawn")
    while said.total() < args.inputs:
        # A reader that kills its process breaks the pool, and the command ends with that error.
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            said += pool.submit(batch, number, min(BATCH, args.inputs - said.total())).result()
        number += 1
        print(f"{said.total()} inputs", file=sys.stderr, flush=True)
    refused = {reason: said[reason] for reason in REASONS if said[reason]}
    print(
        json.dumps(
            {
                "inputs": said.total(),
                "accepted": said["accepted"],
                "refused": refused,
                "readers": len(METHODS) + sum(codec(s).supports(k) for s in SPECS for k in KINDS.values()),
                "seconds": round(time.perf_counter() - started, 1),
            },
            indent=2,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
