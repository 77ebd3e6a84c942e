"""Robust rules against their definitions, what liars can do to them, and both in whole runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkd.aggregators.robust import (
    by_history,
    geometric_median,
    median,
    outlier_scores,
    spectral_filter,
    trimmed_mean,
)
from fedkd.attacks import AttackConfig
from fedkd.errors import ConfigError
from fedkd.experiment import validate
from fedkd.payloads import SoftLabels
from fedkd.simulate import resume, start

K, N, C = 11, 6, 5
RULES = {
    "median": median,
    "trimmed": lambda s: trimmed_mean(s, 0.3),
    "geometric": geometric_median,
    "cronus": lambda s: spectral_filter(s, 0.3),
}


def honest(seed: int, devices: int = K, spread: float = 0.3) -> Tensor:
    """Rows around one truth per sample [K, N, C]."""
    stream = torch.Generator().manual_seed(seed)
    truth = 3 * torch.randn(N, C, generator=stream, dtype=torch.float64)
    noise = spread * torch.randn(devices, N, C, generator=stream, dtype=torch.float64)
    return (truth + noise).softmax(-1)


def test_median_and_trimmed_mean_by_definition() -> None:
    stack = honest(1)
    middle = np.median(stack.numpy(), axis=0)
    assert median(stack).numpy() == pytest.approx(middle / middle.sum(-1, keepdims=True), rel=1e-12)
    ordered = np.sort(stack.numpy(), axis=0)[3 : K - 3]
    kept = ordered.mean(0)
    assert trimmed_mean(stack, 0.3).numpy() == pytest.approx(kept / kept.sum(-1, keepdims=True), rel=1e-12)
    one = torch.tensor([[[1.0, 0, 0]], [[0, 1.0, 0]], [[0, 0, 1.0]]])
    assert median(one)[0].tolist() == pytest.approx([1 / 3] * 3), "all medians are 0: nothing is known"


def test_geometric_median_is_the_point_of_least_distance() -> None:
    stack = honest(2, spread=1.0)
    centre = geometric_median(stack)

    def cost(at: Tensor) -> float:
        return float((stack - at).flatten(1).norm(dim=-1).sum())

    best = cost(centre)
    stream = torch.Generator().manual_seed(0)
    for _ in range(200):
        step = 0.01 * torch.randn(N, C, generator=stream, dtype=torch.float64)
        assert cost(centre + step) >= best - 1e-6
    assert best < cost(stack.mean(0)) - 1e-3


def test_cronus_drops_what_sticks_out() -> None:
    stack = honest(3, spread=0.1)
    lies = torch.zeros(3, N, C, dtype=torch.float64)
    lies[..., 0] = 1.0
    mixed = torch.cat([stack[:8], lies])
    found = spectral_filter(mixed, 3 / 11)
    assert float((found - stack[:8].mean(0)).abs().max()) < 0.03
    assert float((mixed.mean(0) - stack[:8].mean(0)).abs().max()) > 0.15


@pytest.mark.parametrize("name", RULES)
def test_liars_move_a_robust_rule_little_and_the_mean_much(name: str) -> None:
    stack = honest(4)
    truth = stack.mean(0)
    lies = torch.nn.functional.one_hot(truth.argmin(-1), C).double().expand(3, N, C)
    mixed = torch.cat([stack[:8], lies])
    moved = (RULES[name](mixed) - truth).abs().sum(-1).max()
    assert float(moved) < 0.25 < float((mixed.mean(0) - truth).abs().sum(-1).max())
    rows = RULES[name](mixed)
    assert torch.allclose(rows.sum(-1), torch.ones(N, dtype=torch.float64)) and float(rows.min()) >= 0


@pytest.mark.parametrize("name", RULES)
def test_order_of_devices_and_dtype_do_not_matter(name: str) -> None:
    stack = honest(5)
    shuffled = stack[torch.randperm(K, generator=torch.Generator().manual_seed(1))]
    assert torch.allclose(RULES[name](stack), RULES[name](shuffled), atol=1e-9)
    assert RULES[name](stack.float()).dtype == torch.float32
    assert torch.allclose(RULES[name](stack[:1]), stack[0], atol=1e-6), "one honest answer is its own centre"


def test_history_takes_weight_from_those_who_stick_out() -> None:
    stack = honest(6)
    stack[0] = stack[0].roll(1, -1)
    scores = outlier_scores(stack)
    assert int(scores.argmax()) == 0 and float(scores.min()) >= 0 and float(scores.max()) <= 1
    alone = stack[1:].mean(0)
    once, often = by_history(stack, scores, 1.0), by_history(stack, 5 * scores, 1.0)
    gaps = [float((x - alone).abs().max()) for x in (stack.mean(0), once, often)]
    assert gaps[0] > 1.5 * gaps[1] > 3 * gaps[2]


def test_history_leaves_honest_devices_of_unlike_data_alone() -> None:
    stack = honest(9, spread=0.3)
    stack[:3] = honest(9, devices=3, spread=0.45)  # no liars, but farther from the rest
    assert float(outlier_scores(stack).max()) < 0.02
    stack[:3] = stack[:3].roll(1, -1)
    scores = outlier_scores(stack)
    assert float(scores[:3].min()) > 0.1 and float(scores[3:].max()) < 0.02


# ---- attacks --------------------------------------------------------------------------------------------------------
def test_lies_are_what_they_are_called() -> None:
    p = honest(7)[0]
    told = {
        kind: AttackConfig(kind=kind).spoil(SoftLabels(labels=p), seed=1, round=0).tensors()["labels"]  # type: ignore[arg-type]
        for kind in ("none", "label_flip", "lma", "cpa", "collude", "constant", "sybil")
    }
    assert torch.equal(told.pop("none"), p)
    for lie in told.values():
        assert torch.allclose(lie.sum(-1), torch.ones(N, dtype=torch.float64))
    assert torch.equal(told["label_flip"].argmax(-1), (p.argmax(-1) + 1) % C)
    assert torch.equal(told["lma"].argmax(-1), p.argmin(-1))
    assert told["constant"][:, 0].tolist() == [1.0] * N
    for kind in ("cpa", "collude"):
        by_class: dict[int, set[int]] = {}
        for top, lie in zip(p.argmax(-1).tolist(), told[kind].argmax(-1).tolist(), strict=True):
            by_class.setdefault(top, set()).add(lie)
        assert all(len(lies) == 1 and lies != {top} for top, lies in by_class.items()), "one wrong class for each class"
    other = honest(8)[0]
    again = AttackConfig(kind="sybil").spoil(SoftLabels(labels=other), seed=1, round=0).tensors()["labels"]
    assert torch.equal(again, told["sybil"]), "sybils say one thing whatever they know"


def shy(p: Tensor, rng: np.random.Generator) -> Tensor:
    """An attack from outside: all attackers push one class, drawn anew in every round."""
    return torch.nn.functional.one_hot(torch.full((len(p),), int(rng.integers(p.shape[1]))), p.shape[1])


def test_an_attack_may_come_from_outside() -> None:
    attack = AttackConfig(kind=f"{__name__}:shy")
    p = honest(7)[0]
    told = [attack.spoil(SoftLabels(labels=p), seed=1, round=r).tensors()["labels"] for r in (0, 0, 1, 2, 3)]
    assert (
        torch.equal(told[0], told[1])
        and told[0].dtype == p.dtype
        and bool((told[0].argmax(-1) == told[0][0].argmax()).all())
    )
    assert any(not torch.equal(told[0], other) for other in told[2:])
    with pytest.raises(ConfigError, match="attack 'nowhere:shy' cannot be imported"):
        validate({"attack": {"kind": "nowhere:shy"}})


def test_the_seed_chooses_the_attackers() -> None:
    attack = AttackConfig(kind="lma", share=0.3)
    assert len(attack.attackers(20, 1)) == 6 and attack.attackers(20, 1) != attack.attackers(20, 2)
    assert AttackConfig(share=1.0).attackers(20, 1) == frozenset()


# ---- whole runs -----------------------------------------------------------------------------------------------------
SMALL = {
    "rounds": 6,
    "partition": {"kind": "iid", "clients": 10},
    "algorithm": "ds_fl",
    "evaluation": {"local_only": False},
}


def accuracy(tmp_path: Path, **more: object) -> float:
    found = start(validate({**SMALL, **more}), tmp_path / str(len(list(tmp_path.iterdir())))).summary
    return float(found["accuracy"]["student"])


@pytest.mark.fault(20, "30 % colluders break the mean; the rule `cronus` keeps the student")
def test_colluders_break_the_mean_and_not_the_robust_rules(tmp_path: Path) -> None:
    """Three of ten devices agree on wrong classes. The honest run of this seed reaches 0.89."""
    attack = {"kind": "collude", "share": 0.3}
    broken, kept = accuracy(tmp_path, attack=attack), accuracy(tmp_path, attack=attack, aggregator={"kind": "cronus"})
    assert broken < 0.3 and kept > 0.75, (broken, kept)


def test_history_survives_a_resume(tmp_path: Path) -> None:
    raw = {**SMALL, "rounds": 3, "aggregator": {"kind": "history"}, "attack": {"kind": "label_flip"}}
    whole = start(validate(raw), tmp_path / "whole")

    def stop(record: object, rounds: int) -> None:
        if record["round"] == 1:  # type: ignore[index]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(validate(raw), tmp_path / "cut", stop)
    resume(tmp_path / "cut")
    name = "student.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (whole.folder / name).read_bytes()


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"algorithm": "fedavg", "aggregator": {"kind": "median"}}, "use ds_fl or cfd"),
        ({"algorithm": "fedavg", "attack": {"kind": "lma"}}, "lies about soft labels"),
        ({"aggregator": {"kind": "median"}, "privacy": {"kind": "none", "secure_sum": True}}, "exclude each other"),
        ({"aggregator": {"kind": "median"}, "privacy": {"kind": "labels", "epsilon": 4, "delta": 1e-5}}, "sensitivity"),
        ({"aggregator": {"kind": "medain"}}, "aggregator"),
    ],
)
def test_what_does_not_fit_is_refused(raw: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        validate(raw)
