"""Readers of a stranger's bytes under fuzzing, in short; ``python -m simulations.benchmarks.fuzz`` is the long form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from fedkd.payloads import Contract, Payload, PayloadError, SoftLabels
from simulations.benchmarks import fuzz


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    for method in fuzz.METHODS:  # reading records is no part of drawing an input
        fuzz.device(method)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(fuzz.inputs())
def test_nothing_gets_through_and_nothing_crashes(one: fuzz.Input) -> None:
    fuzz.check(one)


def test_what_is_valid_is_accepted() -> None:
    """Else the fuzzer would find no fault in readers that refuse everything."""
    readers = {m: fuzz.device(m) for m in fuzz.METHODS}
    readers |= {k: fuzz.decoder(k, "float32+delta+deflate") for k in fuzz.KINDS}
    readers |= {s: fuzz.decoder("SoftLabels", s) for s in fuzz.SPECS}
    for name, reader in readers.items():
        for data in reader.valid:
            assert fuzz.check(fuzz.Input(name, reader, data, True)) == "accepted", name


def _labels(change: float) -> Payload:
    values = torch.full((20, 10), 0.1)
    values[3, 4] += change
    return SoftLabels(labels=values)


@pytest.mark.parametrize("payload", [_labels(0.1), _labels(-0.2), _labels(float("nan")), _labels(1e30)])
def test_the_judge_finds_what_a_lax_reader_accepts(payload: Payload) -> None:
    reader = replace(
        fuzz.decoder("SoftLabels", "float32"),
        read=lambda data, has_reference: fuzz.judge(payload, fuzz.contracts()["SoftLabels"]),
    )
    with pytest.raises(fuzz.Escaped, match="labels: accepted values"):
        fuzz.check(fuzz.Input("lax", reader, b"", False))


def test_the_judge_finds_the_wrong_shape_kind_and_memory() -> None:
    soft = fuzz.contracts()["SoftLabels"]
    with pytest.raises(fuzz.Escaped, match="accepted shape"):
        fuzz.judge(_labels(0), replace(soft, shapes={"labels": (20, 11)}))
    with pytest.raises(fuzz.Escaped, match="accepted SoftLabels"):
        fuzz.judge(_labels(0), Contract.of(fuzz.KINDS["Logits"], fuzz.LETTERS))

    def greedy(data: bytes, has_reference: bool) -> None:
        bytearray(b"x") * (4 * fuzz.MORE_BYTES)
        raise PayloadError("size", "too late")

    reader = replace(fuzz.decoder("SoftLabels", "float32"), read=greedy)
    with pytest.raises(fuzz.Escaped, match="MiB of memory"):
        fuzz.check(fuzz.Input("greedy", reader, b"", False))
