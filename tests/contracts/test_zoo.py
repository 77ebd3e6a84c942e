"""What makes each of the newer methods that method: a test per idea, which fails if the idea is taken out."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import CNN, MLP, assemble, merged, play, tapped
from test_ideas import C, Direct, batch, collect, direct, heard, normal, server
from torch import Tensor
from torch.nn import functional as F

from fedkd.aggregators import enhanced_era
from fedkd.aggregators.scores import density_ratio, logistic
from fedkd.algorithms.base import Batch, Card, Heard, View
from fedkd.algorithms.catalogue import METHODS
from fedkd.algorithms.comet import COMET
from fedkd.algorithms.fedaux import FedAUX
from fedkd.algorithms.fedcache import FedCache, neighbours
from fedkd.algorithms.feded import FedED
from fedkd.algorithms.fedet import FedET, consensus
from fedkd.algorithms.fedgems import FedGEMS
from fedkd.algorithms.fedgkt import FedGKT
from fedkd.algorithms.fedhkd import FedHKD
from fedkd.algorithms.fedkd import FedKD, own
from fedkd.algorithms.fedkt import FedKT
from fedkd.algorithms.fml import FML
from fedkd.algorithms.scarlet import SCARLET
from fedkd.algorithms.selective_fd import SelectiveFD
from fedkd.codecs import lowrank
from fedkd.errors import ConfigError
from fedkd.payloads import Bundle, Chosen, Features, Logits, Nothing, Prototypes, SoftLabels, Weights
from fedkd.server_tools import Tools

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


def test_scarlet_sends_devices_without_records_no_label_twice() -> None:
    played, tap = tapped(merged(scarlet(duration=50), {"proxy_per_round": None, "rounds": 4}))
    empty = [r.bytes for r in tap.requests if not len(played.site.private(r.client))]
    # Round 1 brings all labels; nothing is new afterwards.
    assert len(empty) == 4 and empty[1] > 1.5 * max(empty[2:])


@pytest.mark.parametrize(
    "more",
    [
        {"privacy": {"kind": "labels", "noise_multiplier": 1.0}},
        {"population": {"late": 0.1, "staleness": {"limit": 2}}},
    ],
)
def test_scarlet_refuses_what_hides_who_answered_which_samples(more: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"who answered|other proxy samples"):
        assemble(merged(merged(scarlet(), {"proxy_per_round": None}), more))


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


@pytest.mark.parametrize("before", [[0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0]])
def test_comet_clusters_keep_their_numbers_for_who_is_absent(before: list[int]) -> None:
    near, far = normal(6, C), 50 + normal(6, C, seed=1)
    state = replace(server(), memory={"cluster": torch.tensor(before)})
    sent = collect([Logits(logits=z) for z in (near, far, near, far)])
    knowledge = COMET(clusters=2).aggregate(sent, state, Seeded())
    state = COMET(clusters=2).update(replace(state, knowledge=knowledge), knowledge, Seeded())
    for absent, want in ((4, near), (5, far)):
        told = COMET(clusters=2).broadcast(state, Card(id=absent, architecture="mlp"))
        assert torch.allclose(told.tensors()["logits"], want)


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


# ---- FML and FedKD --------------------------------------------------------------------------------------------------
class Two:
    """Stands for a device's two models, each a fixed linear map."""

    def __init__(self) -> None:
        self.own, self.shared = direct(), Direct(normal(C, C, seed=7))

    def __call__(self, x: object) -> Tensor:
        return self.own(x)

    def __getitem__(self, role: str) -> Direct:
        assert role == "shared"
        return self.shared


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    p = teacher.softmax(-1)
    return (p * (p.log() - student.log_softmax(-1))).sum(-1)


def test_fml_weighs_labels_and_the_other_model_by_alpha_and_beta() -> None:
    net, x, y = Two(), normal(3, C), [0, 2, 3]
    own, meme = net(x), net.shared(x)
    ce = [F.cross_entropy(z, torch.tensor(y), reduction="none") for z in (own, meme)]
    want = 0.3 * ce[0] + 0.7 * divergence(meme, own) + 0.9 * ce[1] + 0.1 * divergence(own, meme)
    got = FML(alpha=0.3, beta=0.9).private_loss(net, batch(x, y), heard(Nothing()))  # type: ignore[arg-type]
    assert torch.allclose(got, want.mean())


def test_fml_sends_the_shared_model_and_keeps_the_private_one() -> None:
    played, tap = tapped(merged(TINY, {"algorithm": "fml", "models": {"devices": ["logreg"]}, "rounds": 2}))
    _, student = played.progress.state.models["student"]
    assert all(p.tensors().keys() == student.keys() for p, _ in tap.uploads(1).values())
    kept = [played.runner.store.load(k, 2).state.models["model"]["head.weight"] for k in (0, 2)]
    assert kept[0].shape != student["head.weight"].shape and not torch.allclose(kept[0], kept[1])


def test_fedkd_trusts_distillation_less_while_both_models_err() -> None:
    net, x, y = Two(), normal(3, C), [0, 2, 3]
    own, shared = net(x), net.shared(x)
    err = sum(F.cross_entropy(z, torch.tensor(y), reduction="none") for z in (own, shared))
    want = err + (divergence(own, shared) + divergence(shared, own)) / err
    assert torch.allclose(FedKD().private_loss(net, batch(x, y), heard(Nothing())), want.mean())  # type: ignore[arg-type]


def test_singular_values_are_kept_up_to_the_share_of_energy_and_all_where_only_all_will_do() -> None:
    s = torch.tensor([3.0, 2.0, 1.0])  # energies 9, 4, 1 of 14
    assert [lowrank.rank(s, e) for e in (0.5, 9 / 14, 0.65, 0.93, 1.0)] == [1, 1, 2, 3, 3]
    assert lowrank.rank(torch.full((5,), 0.1), 1.0) == 5 and lowrank.rank(torch.zeros(3), 0.9) == 0
    u, v = normal(12, 2), normal(2, 3, 5, seed=1).flatten(1)
    like = {"conv": (u @ v).reshape(12, 3, 5), "bias": normal(12, seed=2), "count": torch.tensor(3)}
    small = lowrank.compress(like, 0.999999)
    assert small["conv/s"].shape == (2,) and small["conv/u"].shape == (12, 2)
    for sent in (small, lowrank.compress(like, None)):
        assert all(torch.allclose(t, like[n]) for n, t in lowrank.expand(sent, like).items())
    rough = lowrank.expand(lowrank.compress(like, 0.3), like)["conv"]
    assert 0 < (rough - like["conv"]).square().sum() <= 0.7 * like["conv"].square().sum() + 1e-9


def test_fedkd_keeps_every_device_at_the_servers_student_whatever_it_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[tuple[int, dict[str, Tensor]]] = []
    original = FedKD.plan

    def spy(self: FedKD, heard: Heard) -> object:
        held.append((heard.round, own(heard.memory)))
        return original(self, heard)

    monkeypatch.setattr(FedKD, "plan", spy)
    rough = {"population": {"participation": 0.6, "dropout": 0.2, "late": 0.3, "minimum": 4}, "rounds": 10}
    played = assemble(merged(merged(TINY, {"algorithm": "fedkd"}), rough))
    students = {0: played.progress.state.models["student"][1]}
    played.rounds.play(played.progress, lambda p, _: students.update({p.state.round: p.state.models["student"][1]}))
    assert len(held) > 20
    for round, mine in held:
        assert all(torch.allclose(t, students[round][n], atol=1e-12) for n, t in mine.items())


def test_fedkd_sends_fewer_bytes_than_fml() -> None:
    raw = merged(TINY, {"models": {"student": "mlp(hidden=[64, 64])", "devices": ["logreg"]}, "rounds": 3})
    small, whole = (play({**raw, "algorithm": name}).progress for name in ("fedkd", "fml"))
    assert small.bytes_up < 0.8 * whole.bytes_up and FedKD(ramp=4).energy(2) == pytest.approx(0.965)


# ---- a large model on the server --------------------------------------------------------------------------------------
def test_feded_softens_predictions_and_scales_by_the_square_of_the_temperature() -> None:
    net, x, teacher = direct(), normal(3, C), normal(3, C, seed=4).softmax(-1)
    method = FedED(temperature=3.0, hard=0.25)
    sent = method.answer(net, View(private=None, public=x, classes=C), heard(Nothing()))
    assert torch.allclose(sent.tensors()["labels"], (net(x) / 3).softmax(-1))
    soft = 9 * divergence(teacher.log(), net(x) / 3).mean()
    told = SoftLabels(labels=teacher)
    assert torch.allclose(method.server_loss(net, batch(x), told), soft)
    hard = F.cross_entropy(net(x), torch.tensor([0, 1, 2]))
    assert torch.allclose(method.server_loss(net, batch(x, [0, 1, 2]), told), 0.75 * soft + 0.25 * hard)


def test_fedgems_hears_only_devices_that_are_right_and_the_certain_ones_more() -> None:
    class Labelled:
        asked, classes = np.arange(3), C

        def labels(self, indices: np.ndarray) -> Tensor:
            return torch.tensor([0, 1, 2])

    z = torch.zeros(3, 3, C).double()
    z[0, :, 0], z[1, :, 0], z[2, :, 1] = 1.0, 3.0, 9.0  # devices 0 and 1 say class 0, device 2 says class 1
    found = FedGEMS().aggregate(collect([Logits(logits=t) for t in z]), server(), Labelled()).tensors()
    assert found["known/chosen"].tolist() == [1, 1, 0]
    p = z[:2, 0].softmax(-1)
    weight = (1 / -(p * p.log()).sum(-1)).softmax(0)
    assert torch.allclose(found["mean/logits"][0], weight @ z[:2, 0])
    assert torch.allclose(found["mean/logits"][1], z[2, 1])


def test_fedgems_remembers_its_own_logits_of_samples_it_once_had_right() -> None:
    raw = merged(TINY, {"algorithm": {"name": "fedgems", "hard": 1.0}, "proxy": {"labelled": True}, "rounds": 4})
    played = assemble(merged(raw, {"server": {"epochs": 30, "optimizer": {"lr": 0.1}}}))
    memories: list[dict[str, Tensor]] = []
    played.rounds.play(played.progress, lambda p, _: memories.append(dict(p.state.memory)))
    right = [m["right"] for m in memories]
    assert right[-1].sum() > right[0].sum()
    assert all(bool((later | ~earlier).all()) for earlier, later in pairwise(right))
    labels = Tools(played.site, 4, np.arange(16)).labels(np.arange(16))
    last = memories[-1]
    assert torch.equal(last["logits"][last["right"]].argmax(-1), labels[last["right"]])


def test_fedet_hears_certain_models_more_and_dissenters_besides() -> None:
    z = torch.tensor([[[4.0, 0, 0]], [[0, 1.0, 0]], [[0, 0, 2.0]]]).double()  # [K, N, C]
    said, apart, dissent = consensus(z, torch.ones(3).double())
    var = z.var(-1, correction=0)
    assert torch.allclose(said, (var[:, :, None] * z).sum(0) / var.sum(0)[:, None])
    assert said.argmax(-1).tolist() == [0] and dissent.tolist() == [True]
    assert torch.allclose(apart, (var[1:, :, None] * z[1:]).sum(0) / var[1:].sum(0)[:, None])
    assert consensus(z[:1], torch.ones(1).double())[2].tolist() == [False]


def test_fedgems_learns_from_a_teacher_only_what_it_has_wrong() -> None:
    labels, own = torch.tensor([0, 1, 2, 3]), 4.0 * torch.eye(C).double()
    own[1:] = own[1:].roll(1, 1)  # wrong of samples 1, 2, 3
    memory = {"logits": normal(4, C, seed=5), "right": torch.tensor([True, True, False, False])}
    mean = Logits(logits=normal(4, C, seed=6))
    knowledge = Bundle(parts={"mean": mean, "known": Chosen(chosen=torch.tensor([1.0, 1, 1, 0]).double())})
    net, x, losses = direct(), normal(4, C), []

    class Tools:
        asked = np.arange(4)

        def labels(self, indices: np.ndarray) -> Tensor:
            return labels

        def logits(self, models: object, indices: np.ndarray) -> list[Tensor]:
            return [own]

        def train(self, name: str, weights: object, loss: Callable[..., Tensor], indices: np.ndarray) -> object:
            losses.append(loss(net, batch(x, labels.tolist())))
            return weights

    state = replace(server(), memory=memory, models={"student": ("mlp", {})})
    new = FedGEMS(hard=0.75).update(state, knowledge, Tools())  # type: ignore[arg-type]
    hard = F.cross_entropy(net(x), labels, reduction="none")
    teacher = torch.stack([memory["logits"][1], mean.logits[2]])
    soft = 0.75 * hard[1:3] + 0.25 * divergence(teacher, net(x[1:3]))
    assert torch.allclose(losses[0], torch.stack([hard[0], soft[0], soft[1], hard[3]]).mean())
    assert torch.equal(new.memory["logits"][0], own[0]) and torch.equal(new.memory["logits"][1:], memory["logits"][1:])


def test_fedet_begins_each_round_from_the_mean_of_the_devices_heads() -> None:
    raw = merged(TINY, {"algorithm": "fedet", "server": {"epochs": 0}, "rounds": 1})
    played, tap = tapped(raw)
    told = list(tap.uploads(0).values())
    want = sum(n * p.tensors()["head.weight"] for p, n in told) / sum(n for _, n in told)
    assert torch.allclose(played.progress.state.models["student"][1]["head.weight"], want)


def test_fedet_devices_take_over_the_head_of_the_large_model() -> None:
    devices = {"models": {"student": "mlp(hidden=[32, 16])", "devices": [MLP, "mlp(hidden=[8, 16])"]}}
    played = play(merged(merged(TINY, devices), {"algorithm": "fedet", "rounds": 1}))
    state = played.progress.state
    for card in played.site.cards[:2]:
        told = FedET().broadcast(state, card).tensors()
        assert torch.equal(told["head.weight"], state.models["student"][1]["head.weight"])


# ---- FedKT ----------------------------------------------------------------------------------------------------------
def test_fedkt_deals_each_partition_into_disjoint_subsets_of_like_size() -> None:
    method = FedKT(partitions=2, subsets=5)
    places = torch.stack([method.subset(torch.arange(5000), i) for i in range(2)])
    counts = torch.stack([torch.bincount(p, minlength=5) for p in places])
    assert counts.min() > 900 and counts.max() < 1100
    assert 0.1 < (places[0] == places[1]).double().mean() < 0.3
    assert len(method.roles) == 12 and set(method.students()) < set(method.roles)


def test_fedkt_counts_a_party_only_where_all_its_students_agree() -> None:
    class Says:
        """A model's logits are its weights."""

        asked, classes, dtype = np.arange(3), C, torch.float64

        def logits(self, models: list[tuple[str, dict[str, Tensor]]], _: np.ndarray) -> list[Tensor]:
            return [weights["z"] for _, weights in models]

    def party(*votes: list[int]) -> Bundle:
        hot = [F.one_hot(torch.tensor(v), C).double() for v in votes]
        return Bundle(parts={f"student {i}": Weights.from_tensors({"z": z}) for i, z in enumerate(hot)})

    sent = [party([0, 1, 2], [0, 1, 3]), party([3, 1, 0], [0, 1, 2]), party([0, 2, 1], [1, 2, 0])]
    found = FedKT(partitions=2).aggregate(collect(sent), server(), Says()).tensors()  # type: ignore[arg-type]
    assert found["agreed/chosen"].tolist() == [1, 1, 0]
    assert found["label/votes"].tolist()[:2] == [0, 1]  # two parties say 1 of the second sample, one says 2


def test_fedkt_votes_go_through_the_noisy_count_and_the_ledger() -> None:
    votes = {"algorithm": {"name": "fedkt", "partitions": 2, "subsets": 2, "sends": "votes"}, "rounds": 1}
    played, tap = tapped(merged(TINY, votes))
    assert all(p.tensors().keys() == {"votes"} for p, _ in tap.uploads(0, 16).values())
    counts = sum(F.one_hot(p.tensors()["votes"], 10) for p, _ in tap.uploads(0, 16).values())
    found = played.site.method.aggregate(collect([p for p, _ in tap.uploads(0, 16).values()]), server(), Sixteen())  # type: ignore[arg-type]
    assert torch.equal(found.tensors()["label/votes"], counts.argmax(-1))  # type: ignore[attr-defined]
    noisy = play(merged(merged(TINY, votes), {"privacy": {"kind": "votes", "epsilon": 8.0, "delta": 1e-5}}))
    claim = noisy.site.mechanism.claim()
    assert claim.unit == "client" and claim.epsilon is not None and 7 < claim.epsilon <= 8
    with pytest.raises(ConfigError, match=r"sums of probabilities or votes; fedkt sends Bundle"):
        assemble(merged(TINY, {"algorithm": "fedkt", "privacy": {"kind": "votes", "noise_multiplier": 1.0}}))


class Sixteen:
    """Stands for the server's tools where sixteen samples of ten classes were asked."""

    asked, classes, dtype = np.arange(16), 10, torch.float64


def test_fedkt_students_learn_the_majority_of_their_own_partition() -> None:
    class Crowd:
        def __getitem__(self, role: str) -> object:
            shift = {"teacher 0 0": 1, "teacher 0 1": 1, "teacher 0 2": 2, "student 0": 0}[role]
            return lambda batch: 5.0 * F.one_hot((batch.index + shift) % C, C).double()

    x = normal(4, C)
    got = FedKT(partitions=1, subsets=3).public_loss(Crowd(), batch(x), heard(Nothing()))  # type: ignore[arg-type]
    logits = 5.0 * F.one_hot(torch.arange(4) % C, C).double()
    assert torch.allclose(got, F.cross_entropy(logits, (torch.arange(4) + 1) % C))


# ---- FedAUX ---------------------------------------------------------------------------------------------------------
def test_the_scorer_is_at_the_optimum_of_its_regularised_loss() -> None:
    h, y = F.normalize(normal(30, 5), dim=1), torch.where(normal(30, seed=1) > 0, 1.0, -1.0).double()
    weight = torch.full((30,), 1 / 30).double()
    w = logistic(h, y, weight, 0.05).requires_grad_(True)
    loss = (weight * F.softplus(-y * (h @ w))).sum() + 0.025 * w.square().sum()
    assert torch.autograd.grad(loss, w)[0].abs().max() < 1e-10


def test_fedaux_scores_own_records_higher_and_ignores_padding() -> None:
    own, other = 1 + 0.3 * normal(10, C), -1 + 0.3 * normal(10, C, seed=1)

    class Net(Direct):
        def __getitem__(self, role: str) -> Direct:
            return self

        weights: dict[str, Tensor] = {}  # noqa: RUF012

    def scorer(records: Tensor, weight: Tensor) -> Tensor:
        given = Batch(x=records, y=torch.zeros(len(records), dtype=torch.int64), index=torch.arange(4), weight=weight)
        view = View(private=given, public=other, classes=C)
        return FedAUX(negatives=0.5).answer(Net(normal(C, C)), view, heard(Nothing())).tensors()["scorer/w"]  # type: ignore[arg-type]

    w = scorer(own, torch.full((10,), 0.1).double())
    assert (own @ w).min() > 0 > (other @ w).max()
    padded = scorer(torch.cat([own, 9 * other]), torch.cat([torch.full((10,), 0.1), torch.zeros(10)]).double())
    assert torch.allclose(padded, w)


def test_fedaux_hears_the_logits_of_a_device_by_its_certainty_of_each_sample() -> None:
    x, z = normal(5, C), [normal(3, C, seed=1), normal(3, C, seed=2)]
    w, models = [normal(C, seed=3), normal(C, seed=4)], [{"z": z} for z in z]

    class Toolbox:
        asked, classes, dtype = np.arange(5), C, torch.float64

        def net(self, name: str, weights: object) -> Direct:
            return direct()

        def public(self, indices: np.ndarray) -> Tensor:
            return x[indices]

        def logits(self, models: list[tuple[str, dict[str, Tensor]]], indices: np.ndarray) -> list[Tensor]:
            assert indices.tolist() == [2, 3, 4]
            return [weights["z"] for _, weights in models]

    sent = [
        Bundle(parts={"model": Weights.from_tensors(m), "scorer": Weights.from_tensors({"w": s})})
        for m, s in zip(models, w, strict=True)
    ]
    state = replace(server(), models={"extractor": ("mlp", {})})
    found = FedAUX(negatives=0.4).aggregate(collect(sent), state, Toolbox()).tensors()  # type: ignore[arg-type]
    h = F.normalize(x[2:], dim=1)
    s = [torch.sigmoid(h @ v)[:, None] for v in w]
    assert torch.allclose(found["labels/labels"], ((s[0] * z[0] + s[1] * z[1]) / (s[0] + s[1])).softmax(-1))


def test_fedaux_devices_score_by_the_servers_extractor() -> None:
    # Batch normalisation: its buffers stand elsewhere in a message than in a model.
    played = play(merged(TINY, {"algorithm": "fedaux", "rounds": 1, "models": {"student": CNN, "devices": [CNN]}}))
    _, extractor = played.progress.state.models["extractor"]
    for client in range(3):
        held = played.runner.store.load(client, 1).state.models["extractor"]
        assert held.keys() == extractor.keys() and all(torch.equal(held[n], t) for n, t in extractor.items())


def test_fedaux_sends_the_extractor_once_to_each_device() -> None:
    raw = merged(TINY, {"algorithm": "fedaux", "rounds": 4, "population": {"participation": 0.5}})
    played, tap = tapped(raw)
    first: dict[int, int] = {}
    for request in tap.requests:
        if len(played.site.private(request.client)):
            first.setdefault(request.client, request.round)
    sizes = {r.client: [q.bytes for q in tap.requests if q.client == r.client] for r in tap.requests}
    again = [s for k, s in sizes.items() if k in first and len(s) > 1]
    assert again and all(max(s[1:]) < 0.6 * s[0] for s in again)


# ---- features, class means and single records ---------------------------------------------------------------------------
def test_fedgkt_teaches_each_device_by_the_servers_net_on_that_devices_records() -> None:
    raw = merged(TINY, {"algorithm": {"name": "fedgkt", "epochs": 40, "width": 16, "lr": 0.02}, "rounds": 1})
    played, tap = tapped(raw)
    method, state = played.site.method, played.progress.state
    net = method.net(16, 10).double()
    net.load_state_dict(dict(state.memory))
    wrong = total = 0
    for k, (sent, _) in tap.uploads(0).items():
        told = method.broadcast(state, played.site.cards[k]).tensors()["logits"]
        assert torch.allclose(told, net(sent.tensors()["features"]))
        labels = played.site.private(k).all()[1]
        wrong, total = wrong + int((told.argmax(-1) != labels).sum()), total + len(labels)
    assert wrong < 0.6 * total
    assert isinstance(method.broadcast(state, Card(id=99, architecture="mlp")), Nothing)


def test_fedgkt_loss_is_cross_entropy_and_a_divergence_at_its_temperature() -> None:
    z, y, t = normal(3, C), torch.tensor([0, 1, 3]), normal(3, C, seed=2)
    got = FedGKT(alpha=0.5, temperature=2.0).teach(z, y, t)
    assert torch.allclose(got, F.cross_entropy(z, y, reduction="none") + 0.5 * 4 * divergence(t / 2, z / 2))


def test_fedhkd_pulls_to_class_means_of_features_and_of_predictions() -> None:
    net, x, y = direct(), normal(3, C), [0, 2, 3]
    means, soft = normal(C, C, seed=5), normal(C, C, seed=6).softmax(-1)
    counts = torch.tensor([4.0, 0.0, 1.0, 0.0]).double()
    told = Bundle(parts={"means": Prototypes(means=means, counts=counts), "soft": SoftLabels(labels=soft)})
    got = FedHKD(prediction=0.3, feature=0.7, temperature=2.0).private_loss(net, batch(x, y), heard(told))
    near = ((x[0] - means[0]).norm() + (x[1] - means[2]).norm()) / 3
    apart = ((net.head(means) / 2).softmax(-1) - soft)[[0, 2]].norm(dim=1).mean()
    assert torch.allclose(got, F.cross_entropy(net(x), torch.tensor(y)) + 0.7 * near + 0.3 * apart, atol=1e-6)


def test_fedhkd_tells_only_of_classes_that_make_up_the_least_share() -> None:
    class Net(Direct):
        weights: dict[str, Tensor] = {}  # noqa: RUF012

    x, y = normal(8, C), [0] * 5 + [1] * 2 + [3]
    net = Net(normal(C, C, seed=9))
    sent = FedHKD(least=0.25).answer(net, View(private=batch(x, y), public=None, classes=C), heard(Nothing())).tensors()  # type: ignore[arg-type]
    assert sent["means/counts"].tolist() == [5, 2, 0, 0]
    assert torch.allclose(sent["means/means"][1], x[5:7].mean(0)) and sent["means/means"][3].abs().sum() == 0
    assert torch.allclose(sent["soft/labels"][0], (net(x[:5]) / 0.5).softmax(-1).mean(0))
    assert torch.allclose(sent["soft/labels"][3], torch.full((C,), 0.25).double())


def test_fedcache_looks_up_the_nearest_of_one_label_on_other_devices() -> None:
    hashes, labels, owners = normal(12, 3), torch.tensor([0, 0, 0, 1] * 3), torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
    found = neighbours(hashes, labels, owners, 2)
    unit = F.normalize(hashes, dim=1)
    for i, near in enumerate(found):
        others = [j for j in range(12) if labels[j] == labels[i] and owners[j] != owners[i]]
        assert near.tolist() == sorted(others, key=lambda j: -float(unit[i] @ unit[j]))[:2]
    assert len(neighbours(hashes[:4], labels[:4], owners[:4], 2)[0]) == 0


def test_fedcache_sends_hashes_and_labels_once_and_learns_the_mean_of_its_like() -> None:
    _, tap = tapped(merged(TINY, {"algorithm": "fedcache", "rounds": 2}))
    first, second = (tap.uploads(r) for r in range(2))
    assert all(len(p.tensors()["labels"]) for p, _ in first.values())
    assert all(not len(p.tensors()["labels"]) and len(p.tensors()["logits"]) for p, _ in second.values())
    net, x, y = direct(), normal(2, C), [0, 1]
    told = Bundle(
        parts={
            "known": Chosen(chosen=torch.tensor([1.0, 0.0]).double()),
            "logits": Logits(logits=normal(2, C, seed=3)),
        }
    )
    got = FedCache(beta=1.5).private_loss(net, batch(x, y), heard(told))
    soft = divergence(told.tensors()["logits/logits"], net(x))[0] / 2
    assert torch.allclose(got, F.cross_entropy(net(x), torch.tensor(y)) + 1.5 * soft)


@pytest.mark.parametrize("lengths", [(0, 4, 0), (0, 0, 0), (3, 4, 4), (4, 3, 4), (4, 4, 3)])
def test_an_answer_that_contradicts_itself_does_not_stop_the_server(lengths: tuple[int, int, int]) -> None:
    """A contract leaves the number of private records free, so that a device may lie about it."""

    def told(n: int, m: int, k: int) -> Features:
        return Features(features=normal(n, 32), logits=normal(m, C), labels=torch.zeros(k, dtype=torch.int64))

    method, state = FedCache(related=2), server()
    for others in ([], [told(4, 4, 4)]):
        knowledge = method.aggregate(collect([told(*lengths), *others]), state, Seeded())
        known = method.update(replace(state, knowledge=knowledge), knowledge, Seeded()).knowledge
        assert isinstance(known, Nothing) or set(known.parts) == {"1"}
    kept = FedGKT().aggregate(collect([told(*lengths), told(4, 4, 4)]), state, Seeded())
    assert set(kept.parts) == {"1"}
    like = {"w": normal(5, 4)}
    n, m, k = lengths
    torn = {"w/u": normal(5, n + 1), "w/s": normal(m + 2), "w/v": normal(k + 3, 4)}
    assert not lowrank.expand(torn, like)["w"].any()


def test_selective_fd_leaves_out_a_device_whose_labels_are_not_as_many_as_it_chose() -> None:
    sure = torch.eye(C)[:2].to(normal(1).dtype)
    chosen = torch.tensor([1.0, 1.0, 0.0]).to(sure.dtype)
    fair, torn = (
        Bundle(parts={"chosen": Chosen(chosen=chosen), "labels": SoftLabels(labels=rows)}) for rows in (sure, sure[1:])
    )
    tools = type("Tools", (), {"asked": np.arange(3), "classes": C, "dtype": sure.dtype})()
    got = SelectiveFD().aggregate(collect([fair, torn]), server(), tools).tensors()
    assert torch.equal(got["labels/labels"], sure)


def test_cfd_can_restart_the_servers_net_too() -> None:
    off = {"server": {"epochs": 0}, "rounds": 2}
    kept, anew = (
        play(merged(merged(TINY, off), {"algorithm": {"name": "cfd", "server_restart": r}})) for r in (False, True)
    )
    start = kept.rounds.begin().state.models["student"][1]["head.weight"]
    assert torch.equal(kept.progress.state.models["student"][1]["head.weight"], start)
    assert not torch.allclose(anew.progress.state.models["student"][1]["head.weight"], start)


@pytest.mark.parametrize("path", sorted({METHODS[m].split(":")[0] for m in METHODS}))
def test_a_method_is_one_short_file_that_names_its_source(path: str) -> None:
    text = Path(importlib.import_module(path).__file__ or "").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    if not path.endswith("baselines"):
        assert "http" in text.split('"""')[1] and "eviation" in text.split('"""')[1]
