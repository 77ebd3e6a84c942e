"""What makes each method that method: a test per idea, which fails if the idea is taken out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from harness import CNN, Played, assemble, federation, merged, play, tapped
from torch import Tensor
from torch.nn import functional as F

from fedkd.aggregators import era
from fedkd.algorithms.base import Answer, Batch, Card, DeviceState, Heard, ServerState, View
from fedkd.algorithms.catalogue import build
from fedkd.algorithms.cfd import CFD
from fedkd.algorithms.ds_fl import DSFL
from fedkd.algorithms.fd import FD
from fedkd.algorithms.feddf import FedDF
from fedkd.algorithms.fedmd import FedMD
from fedkd.algorithms.fedproto import FedProto
from fedkd.algorithms.fedprox import FedProx
from fedkd.collected import Collected
from fedkd.experiment import validate
from fedkd.messages import read_request
from fedkd.nets import Net
from fedkd.payloads import Bundle, LabelLogits, Logits, Nothing, Payload, Prototypes, SoftLabels, Weights
from fedkd.rounds import Rounds
from fedkd.runners.base import LocalRunner, make_engine
from fedkd.server_tools import Tools
from fedkd.site import Site

C = 4
LINEAR = "logreg"


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def collect(payloads: Sequence[Payload], examples: Sequence[float] = (), names: Sequence[str] = ()) -> Collected:
    """Return answers of devices 0, 1, ..., of one record each unless ``examples`` says otherwise."""
    return Collected(
        tuple(
            Answer(
                card=Card(id=k, architecture=names[k] if names else "mlp"),
                payload=payload,
                examples=examples[k] if examples else 1.0,
            )
            for k, payload in enumerate(payloads)
        )
    )


def server(knowledge: Payload | None = None, **models: tuple[str, dict[str, Tensor]]) -> ServerState:
    return ServerState(round=1, models=models, knowledge=knowledge or Nothing(), asked=np.arange(3))


def tools() -> Any:
    return None


def heard(knowledge: Payload, **memory: Tensor) -> Heard:
    return Heard(knowledge=knowledge, memory=memory, round=1)


class Direct:
    """Stands for a net whose features are the inputs and whose logits are a fixed linear map of them."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, batch: Batch | Tensor) -> Tensor:
        return self.head(self.features(batch))

    def features(self, batch: Batch | Tensor) -> Tensor:
        return batch.x if isinstance(batch, Batch) else batch

    def head(self, features: Tensor) -> Tensor:
        return features @ self.weight

    def probabilities(self, batch: Batch | Tensor) -> Tensor:
        return self(batch).softmax(-1)


def direct(width: int = C) -> Any:
    return Direct(normal(width, C, seed=99))


def batch(x: Tensor, y: Sequence[int] | None = None) -> Batch:
    n = len(x)
    labels = None if y is None else torch.tensor(y)
    return Batch(x=x, y=labels, index=torch.arange(n), weight=torch.full((n,), 1 / n, dtype=x.dtype))


# ---- baselines ------------------------------------------------------------------------------------------------------
def test_local_exchanges_nothing_and_no_device_depends_on_another() -> None:
    played = play({"algorithm": "local", "rounds": 2})
    assert isinstance(played.progress.state.knowledge, Nothing) and played.progress.state.models == {}
    for record in played.records:
        assert record["bytes_up"] < 120 * record["asked"] and record["bytes_down"] < 120 * record["asked"]
        assert record["answered"] == 0
    # Device 0 ends with the same weights when nobody else has any record.
    alone = replace(federation(played.site.experiment), parts=(played.site.federation.parts[0],))
    site = Site(played.site.experiment, alone)
    runner = LocalRunner(site, make_engine(site, "serial"))
    rounds = Rounds(site, runner, "run")
    rounds.play(rounds.begin(), lambda *_: None)
    mine, other = runner.store.load(0, 2).state, played.runner.store.load(0, 2).state
    assert mine is not None and other is not None
    assert all(torch.equal(t, other.models["model"][n]) for n, t in mine.models["model"].items())


def test_central_is_one_device_with_everybodys_records() -> None:
    played = play({"algorithm": "central", "rounds": 1}, awkward=False)
    assert len(played.site.cards) == 1
    assert played.site.private(0).index.tolist() == list(range(len(played.site.federation.split.train)))


# ---- weights --------------------------------------------------------------------------------------------------------
def test_fedavg_is_the_mean_weighted_by_records() -> None:
    played, tap = tapped({"algorithm": "fedavg", "rounds": 1})
    sent = tap.uploads(0)
    sizes = {k: len(played.site.private(k)) for k in sent}
    assert {k: int(n) for k, (_, n) in sent.items()} == sizes and len(set(sizes.values())) > 2
    total = sum(sizes.values())
    _, student = played.progress.state.models["student"]
    for name, value in student.items():
        if value.is_floating_point():
            want = sum(payload.tensors()[name] * sizes[k] / total for k, (payload, _) in sent.items())
            assert torch.allclose(value, want, atol=1e-13)
    plain = sum(payload.tensors()["head.weight"] for payload, _ in sent.values()) / len(sent)
    assert not torch.allclose(student["head.weight"], plain, atol=1e-3)


def test_fedavg_devices_start_from_the_servers_weights() -> None:
    raw = {"algorithm": "fedavg", "rounds": 2, "training": {"epochs": 0}, "models": {"same_start": False}}
    _, tap = tapped(raw)
    start = [payload.tensors()["head.weight"] for payload, _ in tap.uploads(1).values()]
    assert all(torch.equal(start[0], other) for other in start)


def test_fedprox_with_mu_zero_is_fedavg() -> None:
    avg = play({"algorithm": "fedavg"}).progress.state.models["student"][1]
    prox = play({"algorithm": {"name": "fedprox", "mu": 0.0}}).progress.state.models["student"][1]
    assert all(torch.allclose(avg[n].double(), prox[n].double(), atol=1e-12) for n in avg)


def test_fedprox_pulls_towards_the_servers_weights() -> None:
    def wandered(mu: float) -> float:
        played = play({"algorithm": {"name": "fedprox", "mu": mu}, "rounds": 1, "training": {"epochs": 4}})
        start = played.rounds.begin().state.models["student"][1]
        end = played.progress.state.models["student"][1]
        return sum(float((end[n] - start[n]).square().sum()) for n in start if "running" not in n and "num" not in n)

    assert wandered(5.0) < 0.5 * wandered(0.5) < 0.5 * wandered(0.0)


def test_fedprox_term_is_half_mu_times_the_squared_distance_of_the_parameters() -> None:
    played = play({"algorithm": "fedprox", "rounds": 1})
    site, card = played.site, played.site.cards[0]
    begin = site.initial(card.architecture, "a")
    now = {n: t + 0.1 if t.is_floating_point() else t for n, t in begin.items()}
    x, y = site.private(0).all()
    net = Net(site.architectures_of(card), {"model": now})
    assert y is not None
    given = batch(x, y.tolist())
    told = heard(Weights.from_tensors(begin))
    gap = FedProx(mu=3.0).private_loss(net, given, told) - FedProx(mu=0.0).private_loss(net, given, told)
    count = sum(begin[n].numel() for n in site.architecture(card.architecture).trainable)
    assert gap.item() == pytest.approx(1.5 * 0.01 * count)


# ---- FD -------------------------------------------------------------------------------------------------------------
def test_fd_teaches_each_device_by_the_other_holders_of_the_label() -> None:
    held = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0]], dtype=torch.float64)
    sent = [LabelLogits(logits=normal(C, C, seed=k), held=held[k]) for k in range(3)]
    method = FD()
    state = server(method.aggregate(collect(sent), server(), tools()))
    for k in range(4):  # device 3 did not answer: nobody is left out for it
        told = method.broadcast(state, Card(id=k, architecture="mlp"))
        assert isinstance(told, LabelLogits)
        for label in range(C):
            others = [sent[i].logits[label] for i in range(3) if i != k and held[i, label]]
            assert bool(told.held[label]) == bool(others)
            if others:
                assert torch.allclose(told.logits[label], torch.stack(others).mean(0), atol=1e-14)
    assert method.audience(Card(id=1, architecture="mlp"), state) != method.audience(
        Card(id=2, architecture="mlp"), state
    )


def test_fd_says_nothing_to_the_only_device_that_answered() -> None:
    method = FD()
    one = [LabelLogits(logits=normal(C, C), held=torch.ones(C, dtype=torch.float64))]
    state = server(method.aggregate(collect(one), server(), tools()))
    assert isinstance(method.broadcast(state, Card(id=0, architecture="mlp")), Nothing)


def test_fd_loss_is_cross_entropy_and_a_divergence_for_known_labels_only() -> None:
    net, x, y = direct(), normal(5, C), [0, 1, 1, 2, 3]
    told = LabelLogits(logits=normal(C, C, seed=5), held=torch.tensor([1.0, 1.0, 0.0, 1.0]).double())
    value = FD(gamma=0.7).private_loss(net, batch(x, y), heard(told))
    terms = []
    for row, label in zip(net(x), y, strict=True):
        term = -row.log_softmax(0)[label]
        if told.held[label]:
            teacher = told.logits[label].softmax(0)
            term = term + 0.7 * (teacher * (teacher.log() - row.log_softmax(0))).sum()
        terms.append(term)
    assert value.item() == pytest.approx(torch.stack(terms).mean().item(), abs=1e-12)


def test_fd_sends_mean_logits_per_label_without_padding() -> None:
    net, x = direct(), normal(5, C)
    padded = Batch(
        x=torch.cat([x, 100 + x[:2]]),
        y=torch.tensor([0, 2, 2, 0, 2, 1, 1]),
        index=torch.arange(7),
        weight=torch.tensor([0.2] * 5 + [0.0] * 2).double(),
    )
    sent = FD().answer(net, View(private=padded, public=None, classes=C), heard(Nothing()))
    assert isinstance(sent, LabelLogits)
    assert sent.held.tolist() == [1, 0, 1, 0]
    assert torch.allclose(sent.logits[0], net(x[[0, 3]]).mean(0))
    assert torch.allclose(sent.logits[2], net(x[[1, 2, 4]]).mean(0))


# ---- soft labels ----------------------------------------------------------------------------------------------------
def test_ds_fl_sharpens_mean_probabilities_or_takes_them_as_they_are() -> None:
    labels = [normal(3, C, seed=k).softmax(-1) for k in range(3)]
    answers = collect([SoftLabels(labels=t) for t in labels], examples=[1, 50, 7])
    mean = sum(labels) / 3
    sharp = DSFL(temperature=0.1).aggregate(answers, server(), tools())
    plain = DSFL(aggregation="mean").aggregate(answers, server(), tools())
    assert isinstance(sharp, SoftLabels) and isinstance(plain, SoftLabels)
    want = torch.exp(mean / 0.1) / torch.exp(mean / 0.1).sum(-1, keepdim=True)
    assert torch.allclose(sharp.labels, want, atol=1e-14)
    assert torch.allclose(plain.labels, mean, atol=1e-14)
    assert torch.allclose(era(mean, 1.0), mean.softmax(-1)) and not torch.allclose(era(mean, 1.0), mean)


def test_ds_fl_devices_digest_the_labels_of_the_last_round_for_the_samples_of_the_last_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digested: list[tuple[int, Tensor, Tensor, Tensor]] = []
    original = DSFL.public_loss

    def spy(self: DSFL, net: Net, batch: Batch, heard: Heard) -> Tensor:
        digested.append((heard.round, heard.knowledge.tensors()["labels"], batch.x, batch.index))
        return original(self, net, batch, heard)

    monkeypatch.setattr(DSFL, "public_loss", spy)
    states: list[ServerState] = []
    raw = {"algorithm": "ds_fl", "rounds": 3, "proxy_per_round": 12}
    played = assemble(raw)
    site = played.site
    played.rounds.play(played.progress, lambda p, _: states.append(p.state))
    assert {r for r, *_ in digested} == {1, 2}
    assert site.proxy_pool is not None
    for round, labels, x, index in digested:
        before = states[round - 1]
        assert isinstance(before.knowledge, SoftLabels) and torch.equal(labels, before.knowledge.labels)
        asked = torch.from_numpy(before.asked)
        assert torch.equal(x, site.proxy_pool.take(asked[index]))


def test_soft_label_losses_are_cross_entropies_with_the_teacher() -> None:
    net, x = direct(), normal(3, C)
    teacher = normal(3, C, seed=4).softmax(-1)
    want = -(teacher * net(x).log_softmax(-1)).sum(-1).mean()
    told = SoftLabels(labels=teacher)
    for method in (DSFL(), CFD()):
        assert torch.allclose(method.public_loss(net, batch(x), heard(told)), want)
        assert torch.allclose(method.server_loss(net, batch(x), told), want)
        answer = method.answer(net, View(private=None, public=x, classes=C), heard(Nothing()))
        assert torch.allclose(answer.tensors()["labels"], net(x).softmax(-1))


def test_fedmd_averages_raw_logits_and_digests_by_absolute_error() -> None:
    logits = [normal(3, C, seed=k) for k in range(3)]
    mean = FedMD().aggregate(collect([Logits(logits=t) for t in logits], examples=[1, 9, 9]), server(), tools())
    assert isinstance(mean, Logits) and torch.allclose(mean.logits, sum(logits) / 3, atol=1e-14)
    net, x = direct(), normal(3, C, seed=8)
    value = FedMD().public_loss(net, batch(x), heard(mean))
    assert torch.allclose(value, (net(x) - mean.logits).abs().mean())


def test_fedmd_learns_public_then_own_records_once_and_revisits_afterwards() -> None:
    told = Logits(logits=normal(3, C))
    first = [(p.name, p.data) for p in FedMD().plan(heard(Nothing()))]
    assert first == [("pretrain public", "proxy"), ("pretrain private", "private")]
    late = [p.name for p in FedMD().plan(heard(told))]
    assert late == ["pretrain public", "pretrain private", "digest"]
    later = [(p.name, p.data) for p in FedMD().plan(heard(told, pretrained=torch.ones(())))]
    assert later == [("digest", "public"), ("train", "private")]
    played = play({"algorithm": "fedmd", "rounds": 2})
    assert set(played.records[0]["loss"]) == {"pretrain public", "pretrain private"}
    assert set(played.records[1]["loss"]) == {"digest", "train"}


# ---- CFD ------------------------------------------------------------------------------------------------------------
def test_cfd_devices_restart_from_other_random_weights_every_round() -> None:
    off = {"training": {"epochs": 0}, "digest": {"epochs": 0}, "models": {"devices": [LINEAR], "student": LINEAR}}

    def weights(restart: bool, rounds: int) -> list[Tensor]:
        played = play({"algorithm": {"name": "cfd", "restart": restart}, "rounds": rounds, **off})
        states = [played.runner.store.load(k, rounds).state for k in (0, 2)]
        return [s.models["model"]["head.weight"] for s in states if s is not None]

    fresh = [*weights(True, 1), *weights(True, 2)]
    assert all(not torch.allclose(a, b) for i, a in enumerate(fresh) for b in fresh[:i])
    kept = [*weights(False, 1), *weights(False, 2)]
    assert all(torch.equal(kept[0], b) for b in kept)


def test_cfd_sends_back_the_quantised_labels_of_the_servers_own_net() -> None:
    raw = {"algorithm": "cfd", "rounds": 2, "codec": {"up": "simplex:1+delta+entropy", "down": "simplex:1"}}
    played, tap = tapped(raw)
    state = played.progress.state
    toolbox = Tools(played.site, 2, state.asked)
    own = next(toolbox.logits([state.models["student"]], state.asked)).softmax(-1)
    assert isinstance(state.knowledge, SoftLabels) and torch.allclose(state.knowledge.labels, own, atol=1e-12)
    request = tap.requests[-1]
    told = read_request(played.site, played.site.cards[request.client], request.body).knowledge
    assert isinstance(told, SoftLabels)
    assert sorted(told.labels.unique().tolist()) == [0, 1] and bool((told.labels.sum(-1) == 1).all())


def test_cfd_at_one_bit_takes_at_most_log2_c_bits_a_label_beside_the_header() -> None:
    def up(method: str, samples: int, codec: str) -> float:
        raw = {
            "algorithm": method,
            "rounds": 1,
            "data": {"train_size": 900},
            "proxy": {"size": samples},
            "models": {"student": LINEAR, "devices": [LINEAR]},
            "codec": {"up": codec},
        }
        record = play(raw, awkward=False).records[0]
        return float(record["bytes_up"]) / record["answered"]

    one_bit = "simplex:1+delta+entropy"
    header = up("cfd", 1, one_bit)
    body = up("cfd", 600, one_bit) - header
    # log2(10) bits a label if all classes come alike; the coder may add a table of frequencies.
    assert body <= 600 * math.log2(10) / 8 + 40
    assert up("cfd", 600, "float32") - header > 600 * 10 * 4 - 100


def test_cfd_uses_its_own_codec_unless_told_otherwise() -> None:
    assert validate({"algorithm": "cfd"}).codecs == ("simplex:1+delta+entropy",) * 2
    assert validate({"algorithm": "cfd", "codec": {"up": "float16"}}).codecs[0] == "float16"


# ---- FedDF ----------------------------------------------------------------------------------------------------------
def mixed() -> Played:
    return play({"algorithm": "feddf", "rounds": 1, "models": {"student": CNN, "devices": [CNN, LINEAR]}})


def test_feddf_teacher_is_the_softmax_of_mean_logits_and_averages_stay_within_an_architecture() -> None:
    played = mixed()
    site = played.site
    toolbox = Tools(site, 0, np.arange(10))
    names = [CNN, LINEAR, CNN]
    weights = [site.initial(n, "try", k) for k, n in enumerate(names)]
    answers = collect([Weights.from_tensors(w) for w in weights], examples=[1, 5, 3], names=names)
    found = FedDF().aggregate(answers, server(), toolbox)
    assert isinstance(found, Bundle) and set(found.parts) == {"teacher", f"mean {CNN}", f"mean {LINEAR}"}
    logits = torch.stack(list(toolbox.logits(list(zip(names, weights, strict=True)), np.arange(10))))
    assert torch.allclose(found.parts["teacher"].tensors()["logits"], logits.mean(0), atol=1e-12)
    mean = found.parts[f"mean {CNN}"].tensors()["head.weight"]
    assert torch.allclose(mean, 0.25 * weights[0]["head.weight"] + 0.75 * weights[2]["head.weight"], atol=1e-14)
    assert torch.equal(found.parts[f"mean {LINEAR}"].tensors()["head.weight"], weights[1]["head.weight"])
    x = toolbox.public(np.arange(10))
    student = toolbox.net(LINEAR, weights[1])
    teacher = logits.mean(0).softmax(-1)
    want = (teacher * (teacher.log() - student(x).log_softmax(-1))).sum(-1).mean()
    got = FedDF().server_loss(student, batch(x), found.parts["teacher"])
    assert torch.allclose(got, want, atol=1e-12)


def test_feddf_distils_every_architectures_average_towards_the_ensemble() -> None:
    raw = {
        "algorithm": "feddf",
        "rounds": 1,
        "models": {"student": CNN, "devices": [CNN, LINEAR]},
        "training": {"epochs": 3},
    }

    def divergences(epochs: int) -> list[float]:
        played, tap = tapped(merged(raw, {"server": {"epochs": epochs, "optimizer": {"lr": 0.2}}}))
        state, toolbox = played.progress.state, Tools(played.site, 1, played.progress.state.asked)
        sent = [(played.site.cards[k].architecture, p.tensors()) for k, (p, _) in tap.uploads(0).items()]
        teacher = torch.stack(list(toolbox.logits(sent, state.asked))).mean(0).softmax(-1)
        assert {name for name, _ in state.models.values()} == {CNN, LINEAR}
        logits = toolbox.logits(list(state.models.values()), state.asked)
        return [F.kl_div(z.log_softmax(-1), teacher, reduction="batchmean").item() for z in logits]

    averaged, distilled = divergences(0), divergences(10)
    assert all(b < 0.7 * a for a, b in zip(averaged, distilled, strict=True))


def test_feddf_devices_hear_the_average_of_their_own_architecture() -> None:
    played = mixed()
    state = played.progress.state
    for card in played.site.cards[:2]:
        told = FedDF().broadcast(state, card)
        mine = next(w for name, w in state.models.values() if name == card.architecture)
        assert told.tensors().keys() == mine.keys() and all(torch.equal(t, mine[n]) for n, t in told.tensors().items())
    assert isinstance(FedDF().broadcast(state, Card(id=9, architecture="mlp")), Nothing)


# ---- FedProto -------------------------------------------------------------------------------------------------------
def test_fedproto_weighs_class_means_by_their_records() -> None:
    counts = torch.tensor([[3, 0, 1, 0], [1, 2, 0, 0]]).double()
    sent = [Prototypes(means=normal(C, 5, seed=k), counts=counts[k]) for k in range(2)]
    found = FedProto().aggregate(collect(sent), server(), tools())
    equal = FedProto(weighting="equal").aggregate(collect(sent), server(), tools())
    assert isinstance(found, Prototypes) and isinstance(equal, Prototypes)
    assert torch.allclose(found.means[0], (3 * sent[0].means[0] + sent[1].means[0]) / 4)
    assert torch.allclose(equal.means[0], (sent[0].means[0] + sent[1].means[0]) / 2)
    assert torch.allclose(found.means[1], sent[1].means[1]) and torch.allclose(found.means[2], sent[0].means[2])
    assert found.counts.tolist() == [4, 2, 1, 0]


def test_fedproto_sends_class_means_of_features_without_padding() -> None:
    net, x = direct(), normal(4, C)
    padded = Batch(
        x=torch.cat([x, 50 + x]),
        y=torch.tensor([1, 1, 3, 1, 0, 0, 1, 3]),
        index=torch.arange(8),
        weight=torch.tensor([0.25] * 4 + [0.0] * 4).double(),
    )
    sent = FedProto().answer(net, View(private=padded, public=None, classes=C), heard(Nothing()))
    assert isinstance(sent, Prototypes) and sent.counts.tolist() == [0, 3, 0, 1]
    assert torch.allclose(sent.means[1], x[[0, 1, 3]].mean(0)) and torch.allclose(sent.means[3], x[2])


def test_fedproto_pulls_features_to_known_prototypes_and_decides_by_the_nearest() -> None:
    net, x, y = direct(), normal(3, C), [0, 2, 3]
    known = Prototypes(means=normal(C, C, seed=6), counts=torch.tensor([4.0, 0.0, 1.0, 0.0]).double())
    plain = FedProto().private_loss(net, batch(x, y), heard(Nothing()))
    value = FedProto(weight=2.0).private_loss(net, batch(x, y), heard(known))
    pull = ((x[0] - known.means[0]) ** 2).mean() + ((x[1] - known.means[2]) ** 2).mean()
    assert torch.allclose(value - plain, 2.0 * pull / 3)
    memory = {"means": known.means, "counts": known.counts}
    chosen = FedProto().predict(net, x, memory).argmax(-1)
    assert [int(c) for c in chosen] == [min((0, 2), key=lambda j: float((row - known.means[j]).norm())) for row in x]
    assert torch.equal(FedProto(inference="head").predict(net, x, memory), net(x))
    state = DeviceState(models={})
    assert set(FedProto().finish(state, Nothing(), heard(known)).memory) == {"means", "counts"}


def test_parameters_of_methods_are_checked() -> None:
    with pytest.raises(ValueError, match="above 0"):
        DSFL(temperature=0.0)
    with pytest.raises(ValueError, match=r"temprature.*temperature"):
        build({"name": "ds_fl", "temprature": 1.0})
