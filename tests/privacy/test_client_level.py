"""Client-level mechanisms on the server: sensitivities, noise, price, and what a round does with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from harness import merged

from fedkd import simulate
from fedkd.algorithms.base import Algorithm, Answer, Card
from fedkd.collected import Collected
from fedkd.errors import ConfigError
from fedkd.experiment import validate
from fedkd.payloads import SoftLabels, Votes
from fedkd.privacy.client_level import (
    ClientLevel,
    ConfidentGnmax,
    GaussianLabels,
    clipped_sum,
    count_votes,
    largest_norm,
    odds,
    project_simplex,
)
from fedkd.privacy.events import Event, epsilon
from fedkd.privacy.ledger import SERVER, Ledger
from fedkd.privacy.mechanisms import NothingReleased
from fedkd.report.html import write_report

Q, C, K = 40, 10, 30
CASES = {"zero": 0.0, "huge": 1e300, "nan": float("nan"), "inf": float("inf"), "minus inf": -float("inf")}


def made(kind: str, **more: Any) -> ClientLevel:
    given = {"algorithm": "ds_fl", "rounds": 1, "privacy": {"kind": kind, "noise_multiplier": 1.0}}
    experiment = validate(merged(given, more))
    cls = GaussianLabels if kind == "labels" else ConfidentGnmax
    return cls(experiment, clients=K, queries=Q, classes=C)


def answers(count: int = K, rng: int = 0) -> list[Answer]:
    random = torch.Generator().manual_seed(rng)
    labels = torch.softmax(4 * torch.randn(count, Q, C, generator=random, dtype=torch.float64), -1)
    return [
        Answer(card=Card(id=k, architecture="mlp"), payload=SoftLabels(labels=p), examples=1.0)
        for k, p in enumerate(labels)
    ]


@pytest.mark.parametrize("value", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("clip", [0.5, 3.0])
def test_one_client_moves_the_sum_by_at_most_the_clip_whatever_it_sends(value: float, clip: float) -> None:
    honest = [a.payload.tensors()["labels"] for a in answers(5)]
    strange = [
        torch.full((Q, C), value, dtype=torch.float64),
        torch.where(torch.rand(Q, C) < 0.5, torch.full((Q, C), value, dtype=torch.float64), honest[0]),
    ]
    total = clipped_sum(honest, Q, C, clip)
    for one in strange:
        both = clipped_sum([*honest, one], Q, C, clip)
        assert bool(torch.isfinite(both).all())
        assert float((both - total).norm()) <= clip * (1 + 1e-12)
    # The bound is reached, so that a smaller noise would be too little.
    certain = torch.nn.functional.one_hot(torch.arange(Q) % C, C).double()
    assert float(clipped_sum([certain], Q, C, clip).norm()) == pytest.approx(min(clip, largest_norm(Q, C)))


def test_replacing_a_client_moves_the_sum_by_no_more_than_the_reach() -> None:
    for clip in (0.5, 100.0):
        mechanism = made("labels", privacy={"clip": clip})
        assert isinstance(mechanism, GaussianLabels)
        a = torch.nn.functional.one_hot(torch.zeros(Q, dtype=torch.int64), C).double()
        b = torch.nn.functional.one_hot(torch.ones(Q, dtype=torch.int64), C).double()
        gap = float((clipped_sum([a], Q, C, mechanism.clip) - clipped_sum([b], Q, C, mechanism.clip)).norm())
        assert gap <= mechanism.reach * mechanism.clip * (1 + 1e-12)
    assert mechanism.reach == pytest.approx(math.sqrt(2 * Q) / largest_norm(Q, C)), "min(2 C, sqrt(2 N)), METHODS"
    assert mechanism.clip == pytest.approx(math.sqrt(Q * (1 - 1 / C)))


@pytest.mark.parametrize("value", CASES.values(), ids=CASES.keys())
def test_whatever_a_client_sends_is_one_vote_per_query(value: float) -> None:
    base = [a.payload for a in answers(5)]
    counts = count_votes(base, Q, C)
    both = count_votes([*base, SoftLabels(labels=torch.full((Q, C), value, dtype=torch.float64))], Q, C)
    assert bool((both.sum(-1) - counts.sum(-1) == 1).all())
    assert float((both - counts).norm(dim=-1).max()) == 1.0


@pytest.mark.parametrize("sigma", [0.5, 4.0])
def test_labels_carry_the_noise_claimed_and_no_other(sigma: float) -> None:
    """The release before projection is sum + N(0, (sigma clip)^2): a large clip keeps projection from hiding it."""
    mechanism = made("labels", privacy={"noise_multiplier": sigma, "clip": 2.0})
    mechanism.expected_clients = 1e6  # so that noise and mean stay inside the simplex, where projecting is subtracting
    given, found = answers(4), []
    for _ in range(60):
        labels, _ = mechanism.aggregate(given, mechanism._noise("x"))
        found.append((labels.double() - 1 / C) * mechanism.expected_clients)
    mechanism.dtype = torch.float64
    values = torch.stack(found)
    residual = (values - values.mean(0)).numpy()
    # The projection takes each row's mean out of the noise: C - 1 of C degrees of freedom stay.
    ratio = float(np.mean(residual**2)) / ((sigma * 2.0) ** 2 * (1 - 1 / C) * (1 - 1 / 60))
    error = math.sqrt(2 / residual.size) + 0.01  # float32 rounding of the released labels
    assert abs(ratio - 1) < 6 * error
    for wrong in (2 / 3, 3 / 2):
        assert abs(ratio / wrong**2 - 1) > 6 * error


def test_votes_are_decided_by_noise_of_the_size_claimed() -> None:
    """Two classes, a lead of 3 votes: the leader wins with chance Phi(3 / (sigma sqrt 2)), and no other."""
    from scipy.stats import norm

    sigma, queries = 4.0, 20_000
    experiment = validate({"algorithm": "ds_fl", "rounds": 1, "privacy": {"kind": "votes", "noise_multiplier": sigma}})
    mechanism = ConfidentGnmax(experiment, clients=5, queries=queries, classes=2)
    votes = torch.tensor([[1.0, 0.0]] * queries)
    given = [
        Answer(card=Card(id=k, architecture="mlp"), payload=SoftLabels(labels=votes), examples=1.0) for k in range(3)
    ]
    labels, answered = mechanism.aggregate(given, mechanism._noise("x"))
    assert len(answered) == queries
    share = float(labels[:, 0].double().mean())
    error = math.sqrt(0.25 / queries)
    assert abs(share - norm.cdf(3 / (sigma * math.sqrt(2)))) < 6 * error
    for wrong in (2 / 3, 3 / 2):
        assert abs(share - norm.cdf(3 / (wrong * sigma * math.sqrt(2)))) > 6 * error


def test_odds_are_those_of_bayes_and_cost_what_winners_cost() -> None:
    """Among queries with odds near p, the class is right with chance p; more noise makes them flatter."""
    rng = torch.Generator().manual_seed(0)
    clients, agreement, sigma, many = 100, 0.4, 25.0, 20_000
    right = torch.randint(0, C, (many,), generator=rng)
    chances = torch.full((many, C), (1 - agreement) / (C - 1), dtype=torch.float64)
    chances[torch.arange(many), right] = agreement
    voted = torch.multinomial(chances, clients, replacement=True, generator=rng)
    counts = torch.nn.functional.one_hot(voted, C).double().sum(1)
    told = odds(counts + sigma * torch.randn(many, C, dtype=torch.float64, generator=rng), sigma, clients, agreement)
    assert torch.allclose(told.sum(-1), torch.ones(many, dtype=torch.float64))
    hit = torch.nn.functional.one_hot(right, C).double()
    for low, high in ((0.02, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 0.9)):
        there = (told > low) & (told < high)
        assert float(hit[there].mean()) == pytest.approx(float(told[there].mean()), abs=0.03)
    both = [made("votes", privacy={"taught": how, "agreement": 0.4}) for how in ("winner", "odds")]
    assert both[0].price() == both[1].price()
    labels, answered = both[1].aggregate(Collected(answers()), both[1]._noise("x"))
    assert answered.tolist() == list(range(Q)) and 0.1 < float(labels.max(-1).values.mean()) < 1
    with pytest.raises(ConfigError, match="more than chance"):
        odds(counts, sigma, clients, 0.1)


@pytest.mark.parametrize("words", [{"privacy": {"kind": "labels"}}, {"privacy": {"secure_sum": True}}])
def test_odds_where_there_are_no_noisy_counts_are_refused(words: dict[str, Any]) -> None:
    raw = {"algorithm": "ds_fl", "privacy": {"kind": "votes", "epsilon": 4, "taught": "odds"}}
    with pytest.raises(ConfigError, match="taught=winner"):
        validate(merged(raw, words))
    good = validate(raw)
    takes_votes = cast(Algorithm, SimpleNamespace(name="tally", upload=Votes, pools_data=False))
    with pytest.raises(ConfigError, match="tally takes votes"):
        good.privacy.check(takes_votes, good.population)


def test_confident_gnmax_answers_where_clients_agree_and_charges_the_worst_case() -> None:
    mechanism = made("votes", privacy={"noise_multiplier": 0.2, "threshold": 0.8, "answers": 15})
    agree, differ = torch.zeros(Q, C), torch.zeros(Q, C)
    agree[:, 3] = 1
    differ[:10, 3] = 1
    differ[10:, 5] = 1
    given = [
        Answer(card=Card(id=k, architecture="m"), payload=SoftLabels(labels=agree if k % 2 else differ), examples=1.0)
        for k in range(K)
    ]
    labels, answered = mechanism.aggregate(given, mechanism._noise("x"))
    assert answered.tolist() == list(range(10)) and bool((labels.argmax(-1) == 3).all())
    tests, votes = mechanism.price()
    assert (tests.count, tests.sigma, tests.reach) == (Q, 0.4, 1.0)
    assert (votes.count, votes.sigma, votes.reach) == (15, 0.2, math.sqrt(2))


def test_votes_cost_what_the_paper_says() -> None:
    """RDP a / (2 s^2) per answer under add/remove, a / s^2 under replace-one (Papernot et al. 2018, appendix A)."""
    from fedkd.privacy.events import rdp_epsilon

    votes = made("votes", privacy={"noise_multiplier": 5.0}).price()
    for relation, factor in (("add_remove", 0.5), ("replace_one", 1.0)):
        curve = Event(rdp=tuple((float(a), a * factor / 25) for a in range(2, 1025)), count=Q, relation=relation)  # type: ignore[arg-type]
        assert rdp_epsilon(votes, 1e-5, relation) == pytest.approx(rdp_epsilon([curve], 1e-5, relation))  # type: ignore[arg-type]


@pytest.mark.parametrize("confident", [False, True])
def test_one_secret_cohort_answers_all_queries_of_a_round(confident: bool) -> None:
    """Its coin is thrown once a round: the queries together are one sampled Gaussian, not each a sampled one."""
    more = {"threshold": 0.5, "threshold_noise": 2.0, "answers": 15} if confident else {}
    raw = {"population": {"participation": 0.1}, "privacy": {"sampling": "poisson", "noise_multiplier": 9.0, **more}}
    (event,) = made("votes", **raw).price()
    precision = 15 / 81 + Q / 18**2 if confident else Q / 81
    assert (event.count, event.q, event.sigma) == (1, 0.1, pytest.approx(precision**-0.5))
    each = [Event(sigma=9.0, q=0.1, count=Q, reach=math.sqrt(2))]
    if not confident:
        assert epsilon([event.times(10)], 1e-5) > 1.2 * epsilon([each[0].times(10)], 1e-5), "the figure this replaces"


def test_a_secret_cohort_of_votes_costs_what_a_hundred_queries_together_cost() -> None:
    """q 0.1, sigma 10, 100 queries, 10 rounds: 2.86, where independent sampling of every query would say 1.21."""
    joint = Event(sigma=10 / math.sqrt(100), q=0.1, count=10)
    assert epsilon([joint], 1e-5) == pytest.approx(2.86, abs=0.02)
    raw = {"population": {"participation": 0.1}, "proxy": {"size": 100}, "privacy": {"sampling": "poisson"}}
    (event,) = made("votes", **merged(raw, {"privacy": {"noise_multiplier": 10.0}})).price()
    assert event.sigma == pytest.approx(10 / math.sqrt(Q))


@pytest.mark.parametrize("kind", ["labels", "votes"])
def test_a_round_is_charged_before_it_is_released_and_refused_beyond_the_budget(kind: str) -> None:
    mechanism = made(kind, privacy={"epsilon": 2.0, "noise_multiplier": None}, rounds=2)
    order: list[str] = []
    ledger = Ledger()
    charge, aggregate = ledger.charge, mechanism.aggregate
    ledger.charge = lambda entries: (order.append("charge"), charge(entries))[1]  # type: ignore[method-assign, func-returns-value]
    mechanism.aggregate = lambda *a: (order.append("release"), aggregate(*a))[1]  # type: ignore[method-assign]
    mechanism.open(ledger)
    for round in range(2):
        combined, taught = mechanism.combine(Collected(answers()), np.arange(Q), run="r", round=round)
        (one,) = list(combined)
        assert one.payload.tensors()["labels"].shape == (Q, C) and len(taught) == Q
        assert bool((one.payload.tensors()["labels"].sum(-1) - 1).abs().max() < 1e-6)
    assert order == ["charge", "release"] * 2
    claim = mechanism.claim()
    assert claim.unit == "client" and claim.epsilon is not None and 1.97 <= claim.epsilon <= 2.0
    with pytest.raises(NothingReleased, match="over 2"):
        mechanism.combine(Collected(answers()), np.arange(Q), run="r", round=2)
    assert order == ["charge", "release"] * 2, "what is refused is neither charged nor computed"
    assert {e.devices for e in ledger.entries} == {(SERVER,)}


def test_a_fixed_cohort_amplifies_nothing_and_a_secret_one_does() -> None:
    part = {"population": {"participation": 0.1}}
    fixed = made("labels", **part)
    secret = made("labels", **merged(part, {"privacy": {"sampling": "poisson"}}))
    assert fixed.price() == [Event(sigma=1.0, q=1.0, reach=fixed.price()[0].reach)]
    assert secret.price()[0].q == 0.1
    assert epsilon(secret.price(), 1e-5) < epsilon(fixed.price(), 1e-5) / 2
    draws = np.array([len(secret.draw(1000, 0.1)) for _ in range(200)])
    assert abs(draws.mean() - 100) < 5 and 0.6 < draws.var() / 90 < 1.5
    with pytest.raises(ConfigError, match=r"population\.minimum=1"):
        made("labels", **merged(part, {"privacy": {"sampling": "poisson"}, "population": {"minimum": 2}}))


def test_without_any_answer_the_release_is_noise_alone() -> None:
    for kind in ("labels", "votes"):
        labels, _ = made(kind).aggregate([], made(kind)._noise("x"))  # type: ignore[arg-type]
        assert labels.shape == (Q, C) and bool(torch.isfinite(labels).all())


@pytest.mark.parametrize("kind", ["labels", "votes"])
def test_methods_whose_uploads_do_not_fit_are_refused(kind: str) -> None:
    for algorithm in ("fedavg", "fedproto", "fd"):
        with pytest.raises(ConfigError, match="Use ds_fl or cfd"):
            validate({"algorithm": algorithm, "privacy": {"kind": kind, "epsilon": 4}})


@pytest.mark.parametrize("population", [{"staleness": {"limit": 2}}, {"buffer": 3}], ids=str)
def test_answers_of_older_rounds_are_kept_out_of_a_sum(population: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"staleness\.limit=0"):
        validate(
            {"algorithm": "ds_fl", "virtual": {}, "population": population, "privacy": {"kind": "labels", "epsilon": 4}}
        )


def test_projection_finds_the_nearest_probabilities() -> None:
    rows = torch.randn(200, 6, dtype=torch.float64) * 2
    found = project_simplex(rows)
    assert bool((found >= 0).all()) and float((found.sum(-1) - 1).abs().max()) < 1e-12
    for _ in range(20):
        other = torch.softmax(torch.randn(200, 6, dtype=torch.float64) * 3, -1)
        assert bool(((rows - found).norm(dim=-1) <= (rows - other).norm(dim=-1) + 1e-12).all())
    inside = torch.softmax(torch.randn(50, 6, dtype=torch.float64), -1)
    assert torch.allclose(project_simplex(inside), inside, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"kind": "labels"}, {"kind": "votes", "threshold": 0.4, "answers": 30}, {"kind": "labels", "sampling": "poisson"}],
    ids=str,
)
def test_runs_tell_epsilon_per_client_and_keep_within_the_budget(options: dict[str, Any], tmp_path: Path) -> None:
    experiment = validate(
        {
            "rounds": 2, "partition": {"clients": 8}, "proxy": {"size": 60}, "proxy_per_round": 40,
            "training": {"steps": 2}, "digest": {"epochs": 1}, "server": {"epochs": 1},
            "population": {"participation": 0.9}, "evaluation": {"local_only": False},
            "privacy": {**options, "epsilon": 6},
        }
    )  # fmt: skip
    summary = simulate.start(experiment, tmp_path / "r").summary
    assert summary["privacy"]["unit"] == "client" and summary["delta"] == 1e-5
    assert 5.5 <= summary["epsilon"] <= 6.0
    told = [json.loads(line) for line in (tmp_path / "r" / "rounds.jsonl").read_text().splitlines()]
    assert all(row["loss"] == {} for row in told), "a loss on private records, which no noise covers"
    assert any("epsilon covers the student alone" in note for note in summary["notes"])
    assert Ledger(tmp_path / "r" / "privacy" / "ledger.jsonl").spent(1e-5)[0].epsilon == summary["epsilon"]


def test_a_secret_cohort_leaves_no_trace_in_what_a_run_publishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that differ in who took part, and in who failed, publish the same numbers of devices and bytes: none."""
    published = []
    for chosen in ([0, 1, 2, 3, 4], [2], []):
        monkeypatch.setattr(ClientLevel, "draw", lambda *_, chosen=chosen: np.array(chosen, np.int64))
        experiment = validate(
            {
                "rounds": 2, "partition": {"clients": 8}, "proxy": {"size": 60}, "proxy_per_round": 40,
                "training": {"steps": 2}, "digest": {"epochs": 1}, "server": {"epochs": 1},
                "population": {"participation": 0.4, "dropout": 0.3}, "evaluation": {"local_only": False},
                "privacy": {"kind": "labels", "sampling": "poisson", "epsilon": 6},
            }
        )  # fmt: skip
        folder = tmp_path / str(len(chosen))
        summary = simulate.start(experiment, folder).summary
        rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        # What a run measures, and how long it took, is no matter of who took part here.
        measured = {"student_accuracy", "clients_accuracy", "ensemble_accuracy", "seconds"}
        published.append(
            [{k: v for k, v in row.items() if k not in measured} for row in rows]
            + [{k: summary[k] for k in ("bytes_up", "bytes_down", "bytes_up_per_device", "bytes_down_per_device")}]
        )
        assert rows[0]["asked"] is None and rows[0]["quarantined"] == []
        assert any("who took part is secret" in note for note in summary["notes"])
        page = write_report(folder).read_text()
        assert "Who took part is secret" in page and "0 requests" not in page and "Nothing left a device" not in page
    assert published[0] == published[1] == published[2]
