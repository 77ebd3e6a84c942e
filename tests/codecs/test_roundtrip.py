"""What goes in comes out: every kind under every codec, and how far the lossy ones may stray."""

import itertools

import numpy as np
import pytest
import torch

from fedkd.codecs import codec, peek
from fedkd.codecs.simplex import largest_remainder
from fedkd.errors import ConfigError
from fedkd.payloads import (
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
    ProxyIndices,
    SoftLabels,
    Votes,
    Weights,
    payload_equal,
)

ENVELOPE = Envelope(run="mnist", round=3, sender=7, proxy="a" * 16, ids="b" * 16, examples=120.0)
FLOATS = ["float16", "float32", "float64"]
LINKS = ["", "+delta", "+entropy", "+deflate", "+delta+entropy", "+delta+deflate"]


def soft_labels(n: int = 40, c: int = 10, seed: int = 0, sharp: float = 3.0) -> SoftLabels:
    rng = torch.Generator().manual_seed(seed)
    return SoftLabels(labels=torch.softmax(sharp * torch.randn(n, c, generator=rng, dtype=torch.float64), 1).float())


def payloads(seed: int = 0) -> dict[str, Payload]:
    rng = torch.Generator().manual_seed(seed)
    model = {
        "body.conv1.weight": torch.randn(6, 1, 3, 3, generator=rng),
        "body.bn.running_var": torch.rand(6, generator=rng),
        "body.bn.num_batches_tracked": torch.tensor(2**40 + seed),
        "mask": torch.tensor([True, False, True]),
    }
    weights = Weights.from_tensors(model)
    labels = soft_labels(seed=seed)
    return {
        "nothing": Nothing(),
        "soft": labels,
        "soft_empty": SoftLabels(labels=torch.zeros(0, 10)),
        "logits": Logits(logits=torch.randn(20, 10, generator=rng)),
        "votes": Votes(votes=torch.randint(0, 10, (33,), generator=rng)),
        "votes_wide": Votes(votes=torch.tensor([0, 70_000, 3])),
        "indices": ProxyIndices(indices=torch.tensor([9_999, 0, 300])),
        "votes_empty": Votes(votes=torch.zeros(0, dtype=torch.int64)),
        "label_logits": LabelLogits(
            logits=torch.randn(10, 10, generator=rng), held=torch.rand(10, generator=rng) > 0.5
        ),
        "prototypes": Prototypes(means=torch.randn(10, 5, generator=rng), counts=torch.arange(10.0) * 1000),
        "features": Features(
            features=torch.randn(9, 4, generator=rng),
            logits=torch.randn(9, 300, generator=rng),
            labels=torch.arange(9) * 33,
        ),
        "weights": weights,
        "bundle": Bundle(parts={"model": weights, "labels": labels, "votes": Votes(votes=torch.tensor([1, 2]))}),
        "nested": Bundle(parts={"a": Bundle(parts={"b": labels}), "c": Nothing()}),
    }


@pytest.mark.parametrize("name", payloads())
@pytest.mark.parametrize("spec", [v + link for v in [*FLOATS, "simplex:1", "simplex:5", "topk:3"] for link in LINKS])
def test_decode_gives_what_roundtrip_promised(spec: str, name: str) -> None:
    coding, payload, old = codec(spec), payloads()[name], payloads(seed=1)[name]
    if not coding.supports(type(payload)):
        with pytest.raises(PayloadError) as refusal:
            coding.encode(payload, ENVELOPE)
        assert refusal.value.reason == "codec"
        return
    contract = Contract.like(payload)
    promised = coding.roundtrip(payload)
    for reference in (None, coding.roundtrip(old)):
        data = coding.encode(payload, ENVELOPE, reference)
        decoded, envelope = coding.decode(data, contract, reference, expected=ENVELOPE)
        assert envelope == ENVELOPE == peek(data)
        assert payload_equal(decoded, promised)
        for value in decoded.tensors().values():
            if value.is_floating_point():
                assert value.dtype == (torch.float64 if spec.startswith("float64") else torch.float32)
    # A payload that has travelled once travels on without further loss, float16 rows to one more rounding.
    tolerance = 1e-3 if spec.startswith(("float16", "topk")) else 0.0
    again = coding.roundtrip(promised).tensors()
    for key, value in promised.tensors().items():
        torch.testing.assert_close(again[key].double(), value.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", payloads())
def test_lossless_codecs_change_no_bit(name: str) -> None:
    payload = payloads()[name]
    for spec in ("float32", "float64+deflate", "float32+delta+entropy"):
        assert codec(spec).lossless_for(torch.float32)
        for key, value in codec(spec).roundtrip(payload).tensors().items():
            # == and not torch.equal: float64 widens float32, and bool flags compare as numbers.
            assert bool((value == payload.tensors()[key]).all()), key


def test_float64_is_exact_for_float64_and_float32_is_not() -> None:
    value = Logits(logits=torch.randn(5, 3, dtype=torch.float64))
    assert torch.equal(codec("float64").roundtrip(value).tensors()["logits"], value.logits)
    assert not torch.equal(codec("float32").roundtrip(value).tensors()["logits"].double(), value.logits)
    assert [codec(s).lossless_for(torch.float64) for s in (*FLOATS, "simplex:8")] == [
        False,
        False,
        True,
        False,
    ]
    assert codec("simplex:1").lossless_for(torch.int64) and codec("float16").lossless_for(torch.float16)
    assert not codec("float16").lossless_for(torch.bfloat16)


def test_exact_integers_and_flags_under_a_coarse_codec() -> None:
    back = codec("float16+delta+entropy").roundtrip(payloads()["weights"]).tensors()
    assert back["body.bn.num_batches_tracked"].item() == 2**40 and back["body.bn.num_batches_tracked"].shape == ()
    assert back["mask"].dtype == torch.bool and back["mask"].tolist() == [True, False, True]


def test_roundtrip_does_not_alias_the_senders_memory() -> None:
    weights = torch.ones(4)
    kept = codec("float32").roundtrip(Weights.from_tensors({"w": weights}))
    weights += 1
    assert kept.tensors()["w"].tolist() == [1.0] * 4


def test_float16_error_is_half_a_unit_and_overflow_is_refused() -> None:
    value = torch.linspace(-60000, 60000, 5001)
    back = codec("float16").roundtrip(Logits(logits=value[:, None])).tensors()["logits"][:, 0]
    assert float(((back - value).abs() / value.abs().clamp(min=1)).max()) <= 2**-11
    with pytest.raises(PayloadError, match=r"logits.*float16") as refusal:
        codec("float16").encode(Logits(logits=torch.tensor([[70000.0]])), ENVELOPE)
    assert refusal.value.reason == "range"


@pytest.mark.parametrize("spec", ["float16", "float32", "float64", "simplex:1", "simplex:3", "topk:2"])
def test_a_sender_refuses_nan_and_infinity(spec: str) -> None:
    for bad in (float("nan"), float("inf")):
        labels = soft_labels().labels.clone()
        labels[3, 2] = bad
        with pytest.raises(PayloadError, match="labels") as refusal:
            codec(spec).encode(SoftLabels(labels=labels), ENVELOPE)
        assert refusal.value.reason == "finite"


# ---------------------------------------------------------------------------------------------------- simplex


@pytest.mark.parametrize(("bits", "classes"), [(1, 2), (1, 5), (2, 2), (2, 4), (3, 3), (4, 3)])
def test_largest_remainder_is_the_nearest_point_of_the_lattice(bits: int, classes: int) -> None:
    steps = (1 << bits) - 1
    lattice = np.array([q for q in itertools.product(range(steps + 1), repeat=classes) if sum(q) == steps]) / steps
    p = np.random.default_rng(bits * 10 + classes).dirichlet(np.full(classes, 0.7), size=300)
    best = np.abs(lattice[None] - p[:, None]).sum(2).min(1)
    levels = largest_remainder(p, steps)
    assert (levels.sum(1) == steps).all() and levels.min() >= 0
    np.testing.assert_allclose(np.abs(levels / steps - p).sum(1), best, atol=1e-12)


def test_one_bit_is_one_hot_of_the_largest_with_ties_to_the_lowest() -> None:
    labels = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4], [0.0, 0.0, 1.0]])
    back = codec("simplex:1").roundtrip(SoftLabels(labels=labels)).tensors()["labels"]
    assert back.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_simplex_round_off_shrinks_with_the_bits_and_requantising_is_exact(bits: int) -> None:
    labels = soft_labels(n=500, c=7)
    coding = codec(f"simplex:{bits}")
    once = coding.roundtrip(labels)
    step = 1 / ((1 << bits) - 1)
    error = once.tensors()["labels"] - labels.labels
    assert float(error.abs().max()) < step * 1.001 + 1e-6
    assert float(error.sum(1).abs().max()) < 1e-5  # rows keep their mass: what one entry loses, others gain
    assert payload_equal(coding.roundtrip(once), once)


def test_float_round_off_is_unbiased() -> None:
    labels = soft_labels(n=4000, c=10, sharp=0.5)
    error = codec("float16").roundtrip(labels).tensors()["labels"].double() - labels.labels.double()
    spread = float(error.std())
    assert spread > 0 and abs(float(error.mean())) < 4 * spread / error.numel() ** 0.5


def test_topk_keeps_the_largest_and_the_mass() -> None:
    labels = torch.tensor([[0.05, 0.5, 0.15, 0.3], [0.25, 0.25, 0.25, 0.25]])
    back = codec("topk:2").roundtrip(SoftLabels(labels=labels)).tensors()["labels"]
    torch.testing.assert_close(back[0], torch.tensor([0.1, 0.5, 0.1, 0.3]), atol=1e-3, rtol=0)
    torch.testing.assert_close(back.sum(1), torch.ones(2))
    whole = codec("topk:9").roundtrip(SoftLabels(labels=labels)).tensors()["labels"]
    torch.testing.assert_close(whole, labels, atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------------------------------ bytes


def size(spec: str, payload: Payload, reference: Payload | None = None) -> int:
    return len(codec(spec).encode(payload, ENVELOPE, reference))


def test_bytes_of_raw_codecs_are_the_values_and_a_short_header() -> None:
    labels = soft_labels(n=1000)
    for spec, per_row in [
        ("float16", 20),
        ("float32", 40),
        ("float64", 80),
        ("simplex:4", 5),
        ("topk:3", 7.5),
    ]:
        assert 0 < size(spec, labels) - 1000 * per_row < 160


def test_one_bit_meets_the_raw_bound_of_the_paper() -> None:
    # CFD's bound for uniform labels: |X| log2 C bits. Packed 4-bit indices lie above it, the range coder
    # reaches it.
    rng = torch.Generator().manual_seed(0)
    labels = SoftLabels(labels=torch.nn.functional.one_hot(torch.randint(0, 10, (10_000,), generator=rng), 10).float())
    bound = 10_000 * np.log2(10) / 8
    header = size("simplex:1", SoftLabels(labels=torch.zeros(0, 10)))
    assert size("simplex:1", labels) - header == 5000
    assert 0.999 * bound < size("simplex:1+entropy", labels) - header < 1.01 * bound
    # Delta of unrelated labels cannot gain either; the coder may not cheat.
    other = SoftLabels(labels=labels.labels[torch.randperm(10_000, generator=rng)])
    assert size("simplex:1+delta+entropy", labels, other) - header > 0.999 * bound


def test_delta_of_slowly_changing_labels_is_small() -> None:
    old, new = soft_labels(n=2000), soft_labels(n=2000)
    fresh = soft_labels(n=2000, seed=5)
    moved = torch.arange(2000) % 20 == 0  # 5 % of the rows
    new = SoftLabels(labels=torch.where(moved[:, None], fresh.labels, old.labels))
    for values, at_most in [("simplex:1", 0.35), ("simplex:4", 0.25), ("float32", 0.25)]:
        coding = codec(f"{values}+delta+entropy")
        reference = coding.roundtrip(old)
        whole, delta = size(coding.spec, new), size(coding.spec, new, reference)
        assert delta < at_most * whole, (values, whole, delta)
    same = size("simplex:1+delta+entropy", old, codec("simplex:1").roundtrip(old))
    assert same < 160  # nothing changed: a header and 3 bytes


def test_delta_survives_many_rounds_and_an_absence() -> None:
    coding = codec("float16+delta+entropy")
    sender: Payload | None = None
    receiver: Payload | None = None
    for seed in range(6):
        payload = soft_labels(seed=seed)
        if seed == 3:
            sender = receiver = None  # the client was away and both ends forgot
        data = coding.encode(payload, ENVELOPE, sender)
        receiver, _ = coding.decode(data, Contract.like(payload), receiver)
        sender = coding.roundtrip(payload, sender)
        assert payload_equal(sender, receiver)


def test_a_reference_of_another_shape_makes_the_message_whole() -> None:
    coding = codec("simplex:2+delta+entropy")
    payload = soft_labels(n=30)
    data = coding.encode(payload, ENVELOPE, soft_labels(n=31))
    decoded, _ = coding.decode(data, Contract.like(payload))
    assert payload_equal(decoded, coding.roundtrip(payload))


# --------------------------------------------------------------------------------------------------------
# spec


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("flaot16", "float16"),
        ("", "known"),
        ("simplex", "number"),
        ("simplex:0", "1 to 16"),
        ("simplex:17", "1 to 16"),
        ("simplex:01", "number"),
        ("simplex:²", "number"),
        ("simplex:" + "9" * 5000, "number"),
        ("float32:2", "no number"),
        ("float32+entropy+delta", "order"),
        ("float32+delta+delta", "order"),
        ("float32+detla", "delta"),
        ("float32+", "unknown"),
        ("topk:-1", "number"),
    ],
)
def test_bad_specs_are_explained(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        codec(spec)


def test_needs_reference_and_spelling() -> None:
    assert codec("simplex:1+delta+entropy").needs_reference and not codec("simplex:1+entropy").needs_reference
    assert codec("topk:3").spec == "topk:3" and codec("topk:3") is codec("topk:3")


def test_bfloat16_grad_and_strided_tensors_travel() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    payload = Weights.from_tensors(
        {"t": base.T, "b": base.bfloat16(), "g": base.clone().requires_grad_(), "h": base.half()}
    )
    back = codec("float32").roundtrip(payload).tensors()
    for name in ("t", "b", "g", "h"):
        assert torch.equal(back[name], payload.values[name].detach().float())
