"""Audits: the bounds are right on known mechanisms, and a run's audit finds the leak that is there."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from fedkd.cli.audit import claims_line
from fedkd.experiment import load
from fedkd.privacy.audit import attack
from fedkd.privacy.audit.bounds import (
    auc,
    gaussian_epsilon,
    many_runs,
    one_run,
    one_run_bound,
    one_run_p_value,
    shared,
    tpr_at,
)
from fedkd.privacy.audit.canaries import Canaries, insert
from fedkd.privacy.audit.run import _verdict, audit_run
from fedkd.report.html import write_report
from fedkd.simulate import start
from fedkd.site import Site


def test_the_one_run_bound_has_the_known_values():
    # Steinke et al.'s theorem 5.2 at delta 1e-4, all guesses right of 600 canaries.
    assert one_run_bound(600, 120, 120, 1e-4) == pytest.approx(3.51, abs=0.005)
    assert one_run_bound(600, 600, 600, 1e-4) == pytest.approx(5.13, abs=0.005)
    assert one_run_bound(600, 120, 60, 1e-4) == 0.0
    # Without delta it is the binomial tail of randomised response.
    assert one_run_p_value(100, 100, 100, 0.0) == pytest.approx(2.0**-100)


def test_the_one_run_audit_of_randomised_response_stays_under_its_epsilon_and_comes_near():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(40):
        inside = rng.random(1000) < 0.5
        told = inside ^ (rng.random(1000) < 1 / (1 + np.exp(2.0)))
        found.append(one_run(told + 1e-6 * rng.random(1000), inside).epsilon)
    assert np.mean(np.array(found) > 2.0) <= 0.1
    assert 1.5 < np.median(found) < 2.0


@pytest.mark.parametrize("mu", [0.268, 0.925, 1.666])
def test_the_many_runs_audit_of_a_gaussian_stays_under_its_epsilon_and_comes_near(mu):
    rng = np.random.default_rng(1)
    true = gaussian_epsilon(mu, 1e-5)
    found = [many_runs(rng.normal(size=20_000), rng.normal(mu, 1, 20_000), 1e-5) for _ in range(5)]
    assert all(f.any_mechanism <= true for f in found) and np.mean([f.gaussian > true for f in found]) <= 0.4
    assert np.median([f.gaussian for f in found]) > true * 0.85 - 0.2


def test_auc_and_tpr():
    scores, inside = np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, True, False, False])
    assert auc(scores, inside) == 1.0 and auc(-scores, inside) == 0.0 and auc(np.zeros(4), inside) == 0.5
    assert tpr_at(scores, inside) == 1.0 and tpr_at(-scores, inside) == 0.0


def test_the_audit_of_a_plain_run_finds_the_leak(tmp_path):
    words = ["rounds=2", "partition={kind: iid, clients: 4}", "training.epochs=20", "training.optimizer.lr=0.3"]
    start(load(None, [*words, "evaluation.local_only=false"])[0][1], tmp_path / "a")
    found = audit_run(tmp_path / "a", canaries=300)
    views = {view["name"]: view for view in found["views"]}
    assert views["local model"]["auc"] > 0.75 and views["local model"]["epsilon"] > 0.5
    assert views["soft labels"]["auc"] > 0.6
    assert views["local model"]["claimed"] is None and "leak" in found["verdict"]
    assert json.loads((tmp_path / "a" / "audit.json").read_text()) == json.loads(json.dumps(found))
    assert "epsilon at least" in write_report(tmp_path / "a").read_text()


def test_shadow_runs_have_the_same_canaries_and_other_coins():
    federation = Site.load(load(None, ["partition={kind: iid, clients: 4}"])[0][1]).federation
    (_, first), (_, again), (changed, other) = (insert(federation, 200, 0, coins) for coins in (0, 0, 1))
    assert np.array_equal(first.index, other.index) and np.array_equal(first.label, other.label)
    assert np.array_equal(first.inside, again.inside)
    # Two fair throws of 200 coins differ in about 100.
    assert 65 < (first.inside != other.inside).sum() < 135 and 65 < other.inside.sum() < 135
    held = set(np.concatenate(changed.parts).tolist())
    assert all((int(i) in held) == inside for i, inside in zip(other.index, other.inside, strict=True))


def test_what_shadow_runs_say_anyway_is_taken_off(monkeypatch):
    """Margins that follow the difficulty of a canary, and hardly its coin, tell nothing until the difficulty is known."""
    rng = np.random.default_rng(0)
    inside, difficulty = rng.random(400) < 0.5, rng.normal(0, 10, 400)
    monkeypatch.setattr(attack, "outside", lambda run: {"student": difficulty + inside})
    monkeypatch.setattr(attack, "_reference", lambda run: np.zeros(400))
    canaries = Canaries(*3 * [np.arange(400)], inside)
    experiment = SimpleNamespace(privacy=SimpleNamespace(delta=1e-5))
    run = SimpleNamespace(devices={}, canaries=canaries, site=SimpleNamespace(experiment=experiment))
    (blind,), (view,) = (
        attack.membership(run, shadows)
        for shadows in ((), [{"student": difficulty + (rng.random(400) < 0.5)} for _ in range(4)])
    )
    assert blind.auc < 0.6 and view.auc > 0.9 and view.epsilon > 1


def test_several_tests_share_the_error_probability():
    """Guesses at random about many views at 95 % each would refute a true claim far more often than once in twenty."""
    assert [1 - shared(n) for n in (1, 5)] == pytest.approx([0.05, 0.01])
    assert one_run_bound(600, 120, 100, confidence=shared(5)) < one_run_bound(600, 120, 100)
    view = {"name": "student", "epsilon": 2.1, "joint": 1.9, "claimed": 2.0}
    found = {"views": [view], "claim": {"epsilon": 2.0}, "run": {"finished": True, "epsilon": 2.0, "ledger": 2.0}}
    assert "no attack refutes" in _verdict(found, None)
    assert "refuted" in _verdict({**found, "views": [{**view, "joint": 2.1}]}, None)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        ({"epsilon": 0.5, "ledger": 2.0}, "its ledger holds 2.000"),
        ({"epsilon": 0.5, "ledger": 0.5}, "its repetition 2.000"),
        ({"epsilon": 2.0, "ledger": None}, "no ledger shows it"),
        ({"epsilon": 0.0, "ledger": None}, "its repetition 2.000"),
        ({"epsilon": 0.5, "ledger": 0.5, "finished": False}, None),
        ({"epsilon": 3.0, "ledger": 3.0}, None),
    ],
)
def test_a_claim_is_held_against_its_ledger_and_its_repetition(run, why):
    found = {"views": [], "claim": {"epsilon": 2.0}, "run": {"finished": True, **run}}
    assert (why or "no attack refutes the claim") in _verdict(found, None)


def test_the_audit_reads_the_runs_own_claim_and_ledger(tmp_path):
    words = [
        "rounds=1",
        "partition={kind: iid, clients: 4}",
        "privacy.kind=labels",
        "privacy.epsilon=4",
        "proxy.size=40",
    ]
    start(load(None, [*words, "evaluation.local_only=false", "training.epochs=1"])[0][1], tmp_path / "a")
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    (tmp_path / "a" / "summary.json").write_text(json.dumps({**summary, "epsilon": 0.1}))
    found = audit_run(tmp_path / "a", canaries=60, runs=200, shadows=1)
    assert found["shadows"] == 1
    assert found["run"] == {"finished": True, "epsilon": 0.1, "ledger": summary["epsilon"]}
    assert "claims epsilon 0.100" in found["verdict"]
    (student,) = (view for view in found["views"] if view["name"] == "student")
    assert summary["epsilon"] < student["claimed"] < 2 * summary["epsilon"], "a record more is a client replaced"
    assert f"epsilon {student['claimed']:.2f}, which is that of replacing a client" in found["held"]
    assert found["held"].replace("'", "&#x27;") in write_report(tmp_path / "a").read_text().replace("&#39;", "&#x27;")
    assert f"of its ledger {summary['epsilon']:.2f}" in write_report(tmp_path / "a").read_text()
    assert f"of its ledger {summary['epsilon']:.2f}" in claims_line(found)


@pytest.mark.slow
def test_under_dp_sgd_at_epsilon_8_the_bounds_stay_under_the_claim(tmp_path):
    words = ["rounds=2", "partition={kind: iid, clients: 4}", "privacy.kind=dp_sgd", "privacy.epsilon=8"]
    start(load(None, [*words, "evaluation.local_only=false"])[0][1], tmp_path / "a")
    found = audit_run(tmp_path / "a", canaries=300, runs=2000)
    assert all(view["claimed"] == pytest.approx(8, abs=0.1) for view in found["views"])
    assert all(view["epsilon"] <= view["claimed"] for view in found["views"])
    assert found["mechanism"]["holds"] and "refuted" not in found["verdict"]
