"""Contracts: what a receiver accepts, and that the words of a refusal name the field."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from fedkd.payloads import (
    KINDS,
    Bundle,
    Contract,
    Envelope,
    Features,
    LabelLogits,
    Logits,
    Nothing,
    Payload,
    PayloadError,
    Prototypes,
    SoftLabels,
    Votes,
    Weights,
    ids_hash,
    payload_equal,
)


def soft(n: int = 4, c: int = 3) -> SoftLabels:
    return SoftLabels(labels=torch.full((n, c), 1 / c))


def reason(contract: Contract, payload: Payload) -> str:
    with pytest.raises(PayloadError) as caught:
        contract.check_values(payload)
    return caught.value.reason


def test_contract_binds_known_letters_and_leaves_the_others_free() -> None:
    contract = Contract.of(Features, {"C": 3, "D": 8})
    assert contract.shapes == {"features": (None, 8), "logits": (None, 3), "labels": (None,)}
    contract.check_shapes({"features": (5, 8), "logits": (5, 3), "labels": (5,)})
    with pytest.raises(PayloadError, match=r"logits: expected shape \[\?, 3\], got \[5, 4\]") as caught:
        contract.check_shapes({"features": (5, 8), "logits": (5, 4), "labels": (5,)})
    assert caught.value.reason == "shape"


@pytest.mark.parametrize(
    ("shapes", "code"),
    [
        ({}, "fields"),
        ({"labels": (4, 3), "x": (1,)}, "fields"),
        ({"label": (4, 3)}, "fields"),
        ({"labels": (4,)}, "shape"),
        ({"labels": (-4, 3)}, "shape"),
    ],
)
def test_check_shapes(shapes: dict[str, tuple[int, ...]], code: str) -> None:
    with pytest.raises(PayloadError) as caught:
        Contract.of(SoftLabels, {"C": 3}).check_shapes(shapes)
    assert caught.value.reason == code


def test_elements_are_counted_over_all_tensors() -> None:
    contract = Contract.of(Prototypes, {"C": 10})
    with pytest.raises(PayloadError) as caught:
        contract.check_shapes({"means": (10, 10**11), "counts": (10,)})
    assert caught.value.reason == "size"


def test_names_from_strangers_stay_short_and_on_one_line() -> None:
    with pytest.raises(PayloadError) as caught:
        Contract.of(SoftLabels, {}).check_shapes({"evil\n" * 1000 + str(i): () for i in range(100)})
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ([math.nan, 0.5, 0.5], "finite"),
        ([math.inf, 0.0, 0.0], "finite"),
        ([-0.1, 0.6, 0.5], "range"),
        ([0.5, 0.5, 0.01], "simplex"),
        ([0.0, 0.0, 0.0], "simplex"),
    ],
)
def test_probabilities(row: list[float], code: str) -> None:
    assert reason(Contract.of(SoftLabels, {"N": 1, "C": 3}), SoftLabels(labels=torch.tensor([row]))) == code


def test_rows_are_renormalised_only_where_they_need_it() -> None:
    contract = Contract.of(SoftLabels, {"C": 3})
    off = SoftLabels(labels=torch.tensor([[0.3, 0.3, 0.4005]]))
    assert float(contract.check_values(off).tensors()["labels"].sum()) == pytest.approx(1, abs=1e-6)
    good = SoftLabels(labels=torch.softmax(torch.randn(100, 3), 1))
    assert payload_equal(contract.check_values(good), good)


@pytest.mark.parametrize(("value", "code"), [(1e30, "range"), (-2e6, "range"), (math.nan, "finite")])
def test_real_values(value: float, code: str) -> None:
    assert reason(Contract.of(Logits, {"N": 1, "C": 1}), Logits(logits=torch.tensor([[value]]))) == code


@pytest.mark.parametrize(("count", "code"), [(-1.0, "range"), (1e18, "range"), (math.nan, "finite")])
def test_counts(count: float, code: str) -> None:
    payload = Prototypes(means=torch.zeros(1, 2), counts=torch.tensor([count]))
    assert reason(Contract.of(Prototypes, {"C": 1, "D": 2}), payload) == code


@pytest.mark.parametrize(
    ("votes", "code"),
    [(torch.tensor([3]), "label"), (torch.tensor([-1]), "range"), (torch.tensor([1.0]), "label")],
)
def test_votes(votes: torch.Tensor, code: str) -> None:
    assert reason(Contract.of(Votes, {"N": 1, "C": 3}), Votes(votes=votes)) == code


def test_flags() -> None:
    contract = Contract.of(LabelLogits, {"C": 2})
    for held in (torch.tensor([True, False]), torch.tensor([1.0, 0.0]), torch.tensor([1, 0])):
        contract.check_values(LabelLogits(logits=torch.zeros(2, 2), held=held))
    assert reason(contract, LabelLogits(logits=torch.zeros(2, 2), held=torch.tensor([0.5, 0]))) == "range"


def test_each_part_of_a_bundle_keeps_its_own_classes() -> None:
    contract = Contract.bundle({"a": Contract.of(Votes, {"N": 1, "C": 3}), "b": Contract.of(Votes, {"N": 1, "C": 9})})
    five = Votes(votes=torch.tensor([5]))
    with pytest.raises(PayloadError, match="a/votes") as caught:
        contract.check_values(Bundle(parts={"a": five, "b": five}))
    assert caught.value.reason == "label"
    assert reason(contract, Bundle(parts={"a": five})) == "fields"
    assert reason(contract, five) == "kind"


def test_weights_by_dtype() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)).state_dict()
    contract = Contract.of(Weights, {}, weights=model)
    assert contract.ranges["1.num_batches_tracked"] == "integer" and contract.ranges["0.weight"] == "real"
    payload = Weights.from_tensors(model)
    assert payload_equal(contract.check_values(payload), payload)
    assert reason(contract, Weights.from_tensors({"w": torch.zeros(1)})) == "fields"


def test_contracts_that_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="bundle"):
        Contract.of(Bundle, {})
    with pytest.raises(TypeError, match="model"):
        Contract.of(Weights, {})


def test_like_accepts_what_it_was_made_from() -> None:
    bundle = Bundle(parts={"y": soft(), "v": Votes(votes=torch.tensor([0, 4])), "n": Bundle(parts={"x": Nothing()})})
    contract = Contract.like(bundle)
    assert payload_equal(contract.check_values(bundle), bundle)
    assert contract.parts["v"].classes == 5
    assert Contract.like(Votes(votes=torch.tensor([1])), classes=10).classes == 10
    assert Contract.like(soft()).shapes == {"labels": (4, 3)}


def test_map_keeps_the_kind() -> None:
    bundle = Bundle(parts={"y": soft(), "w": Weights.from_tensors({"a": torch.ones(2)})})
    doubled = bundle.map(lambda t: 2 * t)
    assert isinstance(doubled, Bundle) and isinstance(doubled.parts["w"], Weights)
    assert doubled.tensors()["w/a"].tolist() == [2, 2]
    assert KINDS["SoftLabels"] is SoftLabels


@pytest.mark.parametrize("examples", [0, -3, math.nan, math.inf, 1e18])
def test_impossible_example_counts(examples: float) -> None:
    with pytest.raises(PayloadError) as caught:
        Envelope(examples=examples).check_examples()
    assert caught.value.reason == "examples"
    Envelope(examples=1e9).check_examples()


def test_envelopes_are_compared_field_by_field() -> None:
    good = Envelope(run="a", round=1, sender=2, proxy="p", ids="i", examples=3)
    good.check_identity(Envelope(run="a", round=1, sender=2))
    good.check_proxy(Envelope(proxy="p", ids="i"))
    others: list[tuple[str, Any]] = [("run", "b"), ("round", 2), ("sender", 0)]
    for field, other in others:
        with pytest.raises(PayloadError) as caught:
            good.check_identity(dataclasses.replace(good, **{field: other}))
        assert caught.value.reason == field


def test_the_hash_of_ids_knows_their_order() -> None:
    ids = np.arange(10)
    assert ids_hash(ids) == ids_hash(ids.astype(np.int32)) and len(ids_hash(ids)) == 16
    assert ids_hash(ids) != ids_hash(ids[::-1])
