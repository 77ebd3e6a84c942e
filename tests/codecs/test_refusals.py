"""Bytes of a stranger: the upload faults as crafted messages; test_fuzz.py has mutated and random ones."""

import dataclasses
import math
import struct
import sys
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
import torch

from fedkd.codecs import REASONS, codec, peek, wire
from fedkd.errors import ConfigError
from fedkd.payloads import (
    Contract,
    Envelope,
    Features,
    Logits,
    PayloadError,
    SoftLabels,
    Votes,
)

N, C = 20, 10
EXPECTED = Envelope(run="r", round=4, sender=2, proxy="proxy-hash", ids="ids-hash", examples=50.0)
SOFT = Contract.of(SoftLabels, {"N": N, "C": C})


def labels(seed: int = 0) -> SoftLabels:
    rng = torch.Generator().manual_seed(seed)
    return SoftLabels(labels=torch.softmax(3 * torch.randn(N, C, generator=rng), 1))


def craft(
    array: np.ndarray,
    *,
    spec: str = "float32",
    kind: str = "SoftLabels",
    name: str = "labels",
    dtype: str = "f4",
    shape: tuple[int, ...] | None = None,
    body: bytes | None = None,
    delta: bool = False,
    envelope: Envelope = EXPECTED,
) -> bytes:
    """Make a message that says whatever the test wants, without the checks of an honest sender."""
    entry = wire.Entry(name, dtype, array.shape if shape is None else shape)
    table = wire.write_table(wire.Table(kind, spec, (entry,)))
    return wire.write(envelope, table, array.tobytes() if body is None else body, delta)


def refused(data: bytes, contract: Contract = SOFT, spec: str = "float32", **options: object) -> PayloadError:
    with pytest.raises(PayloadError) as caught:
        codec(spec).decode(data, contract, expected=EXPECTED, **options)  # type: ignore[arg-type]
    assert caught.value.reason in REASONS and caught.value.reason != "malformed"
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return caught.value


def uniform(dtype: str = "<f4") -> np.ndarray:
    return np.full((N, C), 1 / C, dtype)


def test_the_crafted_message_is_good_before_it_is_spoilt() -> None:
    payload, envelope = codec("float32").decode(craft(uniform()), SOFT, expected=EXPECTED)
    assert envelope == EXPECTED and torch.allclose(payload.tensors()["labels"], torch.full((N, C), 0.1))


@pytest.mark.parametrize(("spec", "dtype"), [("float16", "f2"), ("float32", "f4"), ("float64", "f8")])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_fault_1_nan_or_infinity(spec: str, dtype: str, bad: float) -> None:
    values = uniform("<" + dtype)
    values[5, 3] = bad
    error = refused(craft(values, spec=spec, dtype=dtype), spec=spec)
    assert error.reason == "finite" and "labels" in str(error)


@pytest.mark.parametrize("shape", [(N + 1, C), (N, C - 1), (C, N), (N * C,), (N, C, 1), (0, C)])
def test_fault_2_wrong_number_of_samples_or_classes(shape: tuple[int, ...]) -> None:
    error = refused(craft(np.full(shape, 0.1, "<f4")))
    assert error.reason == "shape" and "[20, 10]" in str(error)


@pytest.mark.parametrize("field", ["proxy", "ids"])
def test_fault_3_labels_of_other_samples(field: str) -> None:
    change: dict[str, Any] = {field: "another"}
    other = dataclasses.replace(EXPECTED, **change)
    assert refused(craft(uniform(), envelope=other)).reason == field


def test_fault_4_negative_or_unnormalised() -> None:
    values = uniform()
    values[0, :2] = -0.1, 0.3
    assert refused(craft(values)).reason == "range"
    assert refused(craft(uniform() * 1.01)).reason == "simplex"
    assert refused(craft(uniform() * 0)).reason == "simplex"
    slightly, _ = codec("float32").decode(craft(uniform() * np.float32(1.0005)), SOFT)
    torch.testing.assert_close(slightly.tensors()["labels"].sum(1), torch.ones(N), atol=1e-6, rtol=0)


def test_fault_5_absurd_logits() -> None:
    contract = Contract.of(Logits, {"N": N, "C": C})
    data = craft(np.full((N, C), 1e30, "<f4"), kind="Logits", name="logits")
    assert refused(data, contract).reason == "range"


@pytest.mark.parametrize("dtype", ["O", "V8", "c8", "M8", "U4", "i8", "f2", "f8", "|O", "object", "", "u1", "s1"])
def test_fault_6_other_types(dtype: str) -> None:
    assert refused(craft(uniform(), dtype=dtype)).reason == "dtype"


def test_fault_6_labels_wider_than_the_classes_need() -> None:
    contract = Contract.of(Votes, {"N": 3, "C": C})
    data = craft(np.array([1, 2, 3], "<u2"), kind="Votes", name="votes", dtype="u2")
    assert refused(data, contract).reason == "dtype"
    data = craft(np.array([1, 2, C], "u1"), kind="Votes", name="votes", dtype="u1")
    assert refused(data, contract).reason == "label"


def peak_bytes(data: bytes, contract: Contract, spec: str, **options: object) -> tuple[int, str]:
    tracemalloc.start()
    try:
        reason = refused(data, contract, spec, **options).reason
        return tracemalloc.get_traced_memory()[1], reason
    finally:
        tracemalloc.stop()


FREE = Contract.of(Features, {"C": C})


def features(size: int, body: bytes, spec: str) -> bytes:
    entries = (
        wire.Entry("features", "f4", (size, 2)),
        wire.Entry("logits", "f4", (size, C)),
        wire.Entry("labels", "u1", (size,)),
    )
    return wire.write(EXPECTED, wire.write_table(wire.Table("Features", spec, entries)), body)


@pytest.mark.parametrize("spec", ["float32", "float32+deflate", "float32+entropy"])
def test_fault_7_a_header_that_claims_a_trillion_elements(spec: str) -> None:
    claim = craft(uniform(), shape=(1_000_000, 1_000_000), spec=spec)
    assert peak_bytes(claim, SOFT, spec)[1] == "shape"
    # Where the contract leaves a dimension free, the caps bound it instead.
    peak, reason = peak_bytes(features(4_000_000_000, b"\0" * 50, spec), FREE, spec)
    assert reason == "size" and peak < 100_000
    peak, reason = peak_bytes(features(15_000_000, b"\0" * 50, spec), FREE, spec, max_bytes=2**20)
    assert reason == "size" and peak < 100_000


def test_fault_8_over_the_cap() -> None:
    data = craft(uniform())
    assert refused(data, max_bytes=len(data) - 1).reason == "cap"
    codec("float32").decode(data, SOFT, max_bytes=len(data))


def test_fault_8_a_compressed_bomb() -> None:
    spec = "float32+deflate"
    bomb = zlib.compress(b"\0" * 50_000_000, 9)
    codec(spec).decode(codec(spec).encode(labels(), EXPECTED), SOFT)  # caches warm, so that the peak is the bomb's
    peak, reason = peak_bytes(craft(uniform(), spec=spec, body=bomb), SOFT, spec)
    assert reason == "length" and peak < 2**20


def test_fault_8_an_entropy_block_that_claims_too_much() -> None:
    spec = "simplex:1+entropy"
    for body in (struct.pack("<BI", 2, 2**32 - 1) + b"\xff\xc0" * 20, b"\x02", b"", b"\x07abc", b"\x00"):
        peak, reason = peak_bytes(craft(uniform(), spec=spec, dtype="s1", body=body), SOFT, spec)
        assert reason in ("length", "body") and peak < 100_000


@pytest.mark.parametrize(
    "spec", ["float16", "simplex:1", "simplex:3", "topk:2", "float16+deflate", "simplex:2+entropy"]
)
def test_fault_9_truncated_or_trailing(spec: str) -> None:
    good = codec(spec).encode(labels(), EXPECTED)
    for cut in range(len(good)):
        assert refused(good[:cut], spec=spec).reason in ("magic", "length")
    assert refused(good + b"\0", spec=spec).reason == "length"
    # With prefixes that agree with the wrong length, the body itself must give it away.
    head = wire.read_head(good)
    for body in (bytes(head.body) + b"\0" * 4, bytes(head.body)[:-1], b""):
        assert refused(wire.write(EXPECTED, head.table, body), spec=spec).reason in ("length", "body")


@pytest.mark.parametrize("field", ["run", "round", "sender"])
def test_fault_11_and_14_another_run_round_or_sender(field: str) -> None:
    change: dict[str, Any] = {field: "x" if field == "run" else 99}
    other = dataclasses.replace(EXPECTED, **change)
    assert refused(craft(uniform(), envelope=other)).reason == field


@pytest.mark.parametrize("examples", [0.0, -1.0, math.nan, 1e18, math.inf])
def test_fault_12_example_counts(examples: float) -> None:
    bad = dataclasses.replace(EXPECTED, examples=examples)
    with pytest.raises(PayloadError) as caught:
        codec("float32").encode(labels(), bad)
    assert caught.value.reason == "examples"
    data = bytearray(craft(uniform()))
    struct.pack_into("<d", data, wire.PREFIX.size + 16, examples)
    assert refused(bytes(data)).reason == "examples"
    with pytest.raises(PayloadError):
        peek(bytes(data))


def test_the_header_is_judged_before_the_body() -> None:
    nan = np.full((N, C), np.nan, "<f4")
    assert refused(craft(nan, kind="Logits")).reason == "kind"
    assert refused(craft(nan, kind="os.system")).reason == "kind"
    assert refused(craft(nan, spec="float16")).reason == "codec"
    assert refused(craft(nan, name="label")).reason == "fields"
    assert refused(craft(nan, body=b"\x80\x04pickle")).reason == "length"
    assert refused(craft(nan, envelope=dataclasses.replace(EXPECTED, ids="?"))).reason == "ids"


def test_prefix_faults() -> None:
    good = craft(uniform())
    assert refused(b"\x80\x04\x95" + good[3:]).reason == "magic"
    assert refused(b"\x93NUMPY" + good).reason == "magic"
    assert refused(good[:4] + b"\x02" + good[5:]).reason == "version"
    assert refused(good[:5] + b"\x02" + good[6:]).reason == "header"
    assert refused(good[:8] + struct.pack("<I", 2**32 - 1) + good[12:]).reason == "header"
    entries = (wire.Entry("labels", "f4", (N, C)), wire.Entry("labels", "f4", (N, C)))
    twice = wire.write(EXPECTED, wire.write_table(wire.Table("Bundle", "float32", entries)), b"")
    part = Contract.of(SoftLabels, {"N": N, "C": C})
    assert refused(twice, Contract.bundle({"a": part, "b": part})).reason == "fields"
    head = wire.read_head(good)
    assert refused(wire.write(EXPECTED, head.table + b"x", bytes(head.body))).reason == "header"
    assert refused(wire.write(EXPECTED, head.table[:-3], bytes(head.body))).reason == "header"


def test_a_cached_header_is_not_trusted_under_another_contract() -> None:
    data = craft(uniform())
    codec("float32").decode(data, SOFT)
    assert refused(data, Contract.of(SoftLabels, {"N": N, "C": C + 1})).reason == "shape"
    assert refused(data, Contract.of(Logits, {"N": N, "C": C})).reason == "kind"


def test_reference_faults() -> None:
    coding = codec("simplex:2+delta+entropy")
    old, other = coding.roundtrip(labels(1)), coding.roundtrip(labels(2))
    data = coding.encode(labels(), EXPECTED, old)
    wrong_shape = SoftLabels(labels=torch.full((N + 1, C), 1 / C))
    for held in (None, other, wrong_shape, Votes(votes=torch.zeros(3, dtype=torch.int64))):
        with pytest.raises(PayloadError) as caught:
            coding.decode(data, SOFT, held)
        assert caught.value.reason == "reference"
    coding.decode(data, SOFT, old)
    # A receiver that holds a reference still reads a whole message.
    coding.decode(coding.encode(labels(), EXPECTED), SOFT, old)
    assert refused(craft(uniform(), delta=True)).reason == "header"


def test_an_entropy_block_with_words_left_over_or_missing() -> None:
    spec = "simplex:1+entropy"
    choice = torch.tensor([0] * 17 + [1, 2, 0]).repeat(50)
    payload = SoftLabels(labels=torch.nn.functional.one_hot(choice, C).float())
    contract = Contract.like(payload)
    head = wire.read_head(codec(spec).encode(payload, EXPECTED))
    form, words = struct.unpack_from("<BI", head.body)
    assert form == 2 and words > 2
    for more in (-1, 1):
        body = struct.pack("<BI", 2, words + more) + bytes(head.body)[5:] + b"\0" * 4
        body = body[: len(head.body) + 4 * more]
        assert refused(wire.write(EXPECTED, head.table, body), contract, spec).reason == "length"


@pytest.mark.parametrize("shares", [(0, 0), (1, 1), (40_000, 40_000), (65_535, 0)])
def test_an_entropy_model_that_does_not_add_up(shares: tuple[int, int]) -> None:
    marks = bytes([0b11000000, 0])
    body = struct.pack("<BI", 2, 1) + marks + struct.pack("<HH", *shares) + b"\1\2\3\4"
    error = refused(craft(uniform(), spec="simplex:1+entropy", dtype="s1", body=body), spec="simplex:1+entropy")
    assert error.reason == "body" and "shares" in str(error)


def test_symbols_that_no_encoder_makes() -> None:
    def one(spec: str, dtype: str, body: bytes, n: int = 2) -> str:
        data = craft(np.zeros(0), spec=spec, dtype=dtype, shape=(n, C), body=body)
        return refused(data, Contract.of(SoftLabels, {"N": n, "C": C}), spec).reason

    assert one("simplex:1", "s1", b"\x1a") == "body"  # class 10 of 10
    assert one("simplex:1", "s1", b"\x10\x01", n=3) == "body"  # padding bits set
    assert one("simplex:2", "s2", b"\xff" * 5) == "simplex"
    half = np.array([0.5, 0.5], "<f2").tobytes()
    assert one("topk:2", "t2", b"\x11" + half, n=1) == "body"  # the same class twice
    assert one("topk:2", "t2", b"\x12" + np.array([0.9, 0.9], "<f2").tobytes(), n=1) == "simplex"
    assert one("topk:2", "t2", b"\x12" + np.array([1.5, -0.5], "<f2").tobytes(), n=1) == "range"
    assert one("topk:2", "t2", b"\x12" + np.array([np.nan, 0], "<f2").tobytes(), n=1) == "finite"


def test_without_the_library_for_entropy_coding_the_codec_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    codec.cache_clear()
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ConfigError, match="use `deflate` in its place"):
        codec("simplex:2+entropy")
    codec("simplex:2+deflate")
