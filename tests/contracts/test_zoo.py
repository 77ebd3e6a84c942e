"""What makes each of the newer methods that method: a test per idea, which fails if the idea is taken out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from harness import MLP, assemble, merged, play, tapped
from test_ideas import C, batch, collect, direct, heard, normal, server
from torch import Tensor

from fedkd.aggregators import enhanced_era
from fedkd.algorithms.base import Card, View
from fedkd.algorithms.comet import COMET
from fedkd.algorithms.scarlet import SCARLET
from fedkd.algorithms.selective_fd import SelectiveFD, density_ratio
from fedkd.payloads import Bundle, Chosen, Logits, Nothing, SoftLabels

TINY = {
    "data": {"train_size": 120, "test_size": 20},
    "proxy": {"size": 16},
    "models": {"student": MLP, "devices": [MLP]},
    "training": {"steps": 2},
}


# ---- SCARLET --------------------------------------------------------------------------------------------------------
def scarlet(**more: object) -> dict[str, object]:
    return merged(TINY, {"algorithm": {"name": "scarlet", **more}, "rounds": 6, "proxy_per_round": 12})


def test_scarlet_asks_for_a_label_again_when_it_is_older_than_its_duration() -> None:
    played, tap = tapped(merged(scarlet(duration=2), {"proxy_per_round": None, "rounds": 9}))
    samples = [len(next(iter(tap.uploads(r, n).values()))[0].tensors()["labels"]) for r, n in enumerate(ASKED)]
    assert samples == ASKED and all(r["failed"] is None for r in played.records)


# All 16 are asked, serve for two rounds, expire, and are asked once more to be cached anew.
ASKED = [16, 0, 0, 16, 16, 0, 0, 16, 16]


def test_scarlet_asks_and_keeps_by_one_rule_at_the_age_of_its_duration() -> None:
    method = SCARLET(duration=2)
    stamps = torch.tensor([-1, 0, 1, 2, 3])
    assert method.fresh(stamps, 3).tolist() == [False, False, True, True, True]
    state = replace(server(), round=3, memory={"stamp": stamps})
    assert method.ask(state, np.array([0, 1, 2, 4])).tolist() == [0, 1]


def test_scarlet_without_a_cache_is_ds_fl_with_the_plain_mean() -> None:
    cached = play(scarlet(duration=0))
    plain = play(
        merged(scarlet(), {"algorithm": {"name": "ds_fl", "aggregation": "mean"}, "rounds": 6})
        | {"algorithm": {"name": "ds_fl", "aggregation": "mean"}}
    )
    for name, value in plain.progress.state.models["student"][1].items():
        assert torch.allclose(cached.progress.state.models["student"][1][name], value, atol=1e-12)


def test_scarlet_every_device_teaches_itself_by_the_servers_labels_whatever_it_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taught: list[tuple[int, Tensor]] = []
    original = SCARLET.plan

    def spy(self: SCARLET, heard: object) -> object:
        taught.append((heard.round, heard.memory["cache"][heard.teach] if "cache" in heard.memory else None))  # type: ignore[attr-defined]
        return original(self, heard)  # type: ignore[arg-type]

    monkeypatch.setattr(SCARLET, "plan", spy)
    labels: dict[int, Tensor] = {}
    rough = {"population": {"participation": 0.5, "dropout": 0.2, "late": 0.1}, "rounds": 12}
    played = assemble(merged(scarlet(duration=3), rough))
    played.rounds.play(
        played.progress, lambda p, _: labels.update({p.state.round: p.state.knowledge.tensors().get("labels")})
    )
    seen = [(r, t) for r, t in taught if t is not None]
    assert len(seen) > 20
    assert all(torch.equal(t, labels[r]) for r, t in seen)


def test_scarlet_sends_fewer_bytes_than_ds_fl() -> None:
    raw = merged(scarlet(), {"rounds": 8})
    ours, theirs = play(raw).progress, play({**raw, "algorithm": "ds_fl"}).progress
    assert ours.bytes_up < 0.6 * theirs.bytes_up and ours.bytes_down < 0.8 * theirs.bytes_down


def test_enhanced_era_is_a_power_of_the_mean() -> None:
    p = normal(5, C).softmax(-1)
    assert torch.allclose(enhanced_era(p, 2.0), p**2 / (p**2).sum(-1, keepdim=True))
    assert torch.allclose(enhanced_era(p, 1.0), p)
    assert torch.isfinite(enhanced_era(torch.tensor([[1e-30, 2e-30, 1.0 - 3e-30]]), 9.0)).all()


# ---- COMET ----------------------------------------------------------------------------------------------------------
def test_comet_teaches_each_device_by_its_own_cluster() -> None:
    near, far = normal(6, C), 50 + normal(6, C, seed=1)
    sent = [Logits(logits=base + 0.01 * normal(6, C, seed=9 + k)) for k, base in enumerate([near, far, near, far])]
    method, examples = COMET(clusters=2), [1.0, 2.0, 3.0, 4.0]
    state = replace(server(), memory={"cluster": torch.full((6,), -1)})
    knowledge = method.aggregate(collect(sent, examples), state, Seeded())
    state = method.update(replace(state, knowledge=knowledge), knowledge, Seeded())
    for members in ([0, 2], [1, 3]):
        want = sum(examples[k] * sent[k].logits for k in members) / sum(examples[k] for k in members)
        for k in members:
            assert torch.allclose(method.broadcast(state, Card(id=k, architecture="mlp")).tensors()["logits"], want)
    cards = [Card(id=k, architecture="mlp") for k in range(6)]
    assert len({method.audience(c, state) for c in cards}) == 3
    everybody = sum(e * s.logits for e, s in zip(examples, sent, strict=True)) / 10
    assert torch.allclose(method.broadcast(state, cards[5]).tensors()["logits"], everybody)


class Seeded:
    """Stands for the server's tools where only a seed is wanted."""

    def seed(self, *labels: str | int) -> int:
        return 3


def test_comet_pulls_logits_to_those_of_the_cluster() -> None:
    net, x, teacher = direct(), normal(3, C), normal(3, C, seed=4)
    value = COMET(weight=2.0).public_loss(net, batch(x), heard(Logits(logits=teacher)))
    assert torch.allclose(value, 2.0 * (net(x) - teacher).square().mean())


# ---- Selective-FD ---------------------------------------------------------------------------------------------------
def test_the_density_ratio_solves_its_least_squares_problem() -> None:
    """KuLSIF minimises mean r(u)²/2 - mean r(x) + lambda/2 |r|²; at the optimum r of the noise obeys its normal equations."""
    known, noise, sigma, ridge = normal(7, 3), 2 * normal(9, 3, seed=1), 1.3, 0.2
    at_noise = density_ratio(noise, known, noise, sigma, ridge)
    # r = (kernel mean of the records - sum_i r(u_i) k(., u_i) / n) / lambda: the gradient of the objective is 0.
    x = normal(5, 3, seed=2)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(torch.cdist(a, b) ** 2) / (2 * sigma**2))

    want = (kernel(x, known).mean(1) - kernel(x, noise) @ at_noise / len(noise)) / ridge
    assert torch.allclose(density_ratio(x, known, noise, sigma, ridge), want, atol=1e-10)


def test_selective_fd_selects_what_resembles_own_records() -> None:
    method = SelectiveFD(sigma=1.0, fit=0.5, noise=40)
    own = 0.2 * normal(60, C)
    like, unlike = 0.2 * normal(20, C, seed=1), 4 + 0.2 * normal(20, C, seed=2)
    flags = method.select(own, torch.cat([like, unlike]))
    assert flags[:20].mean() > 0.5 and flags[20:].sum() == 0
    assert SelectiveFD(selects=False).select(own, unlike).tolist() == [1.0] * 20
    assert method.select(own[:3], like).sum() == 0
    view = View(private=batch(own, [0] * 60), public=torch.cat([like, unlike]), classes=C)
    sent = method.answer(direct(), view, heard(Nothing())).tensors()
    assert len(sent["labels/labels"]) == int(flags.sum())


def test_selective_fd_averages_over_who_selected_and_drops_what_stays_ambiguous() -> None:
    p = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.2, 0.8, 0.0, 0.0]]).double()
    flags = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]).double()
    sent = [
        Bundle(parts={"chosen": Chosen(chosen=flags[0]), "labels": SoftLabels(labels=p)}),
        Bundle(parts={"chosen": Chosen(chosen=flags[1]), "labels": SoftLabels(labels=p[:1])}),
    ]
    toolbox = Asked()
    found = SelectiveFD(tau=2.0).aggregate(collect(sent), server(), toolbox).tensors()
    assert found["chosen/chosen"].tolist() == [1, 1, 0]
    assert torch.allclose(found["labels/labels"], torch.stack([p[0], (p[0] + p[1]) / 2]))
    strict = SelectiveFD(tau=0.5).aggregate(collect(sent), server(), toolbox).tensors()
    assert strict["chosen/chosen"].tolist() == [1, 0, 0]


class Asked:
    """Stands for the server's tools where three samples were asked."""

    asked, classes, dtype = np.arange(3), C, torch.float64


def test_selective_fd_learns_nothing_from_samples_that_were_dropped() -> None:
    net, x, teacher = direct(), normal(3, C), normal(3, C, seed=4).softmax(-1)
    told = heard(Nothing(), labels=teacher, chosen=torch.tensor([1.0, 0.0, 1.0]).double())
    each = -(teacher * net(x).log_softmax(-1)).sum(-1)
    assert torch.allclose(SelectiveFD().public_loss(net, batch(x), told), (each[0] + each[2]) / 3)
