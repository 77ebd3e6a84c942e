"""Answers under differential privacy: what is charged, when, to whom, what is refused, and that the noise is there."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torch import Tensor

from fedkd.distill import ModuleTeacher
from fedkd.distill.teachers import EnsembleTeacher, Teacher
from fedkd.errors import ConfigError
from fedkd.privacy.events import Event, epsilon
from fedkd.privacy.ledger import Ledger, LedgerError
from fedkd.teacher.accounts import OverBudget
from fedkd.teacher.client import RemoteError, RemoteTeacher
from fedkd.teacher.policy import CallerConfig, Policy, PrivateAnswersConfig, token_hash
from fedkd.teacher.private import PrivateAnswers
from fedkd.teacher.service import TeacherService

DELTA = 1e-5
NUMBERS = itertools.count()


class Fixed(Teacher):
    """Answers every input with the same probabilities."""

    def __init__(self, probabilities: list[float]) -> None:
        self.p = torch.tensor(probabilities)
        self.classes, self.shape, self.identity = len(probabilities), (2,), f"{probabilities} {next(NUMBERS)}"

    def logits(self, x: Tensor) -> Tensor:
        return self.p.log().expand(len(x), -1)


def ensemble(*members: list[float]) -> EnsembleTeacher:
    return EnsembleTeacher([(Fixed(p), 1.0) for p in members])


def alice(**more: object) -> CallerConfig:
    return CallerConfig(name="alice", token_sha256=token_hash("secret"), **more)  # type: ignore[arg-type]


def cost(count: int, sigma: float) -> float:
    """Epsilon of ``count`` answers under replace-one, from one Gaussian of their joint sensitivity sqrt(2 count)."""
    return epsilon([Event(sigma=sigma / math.sqrt(2 * count))], DELTA)


def test_the_ledger_is_charged_before_an_answer_is_made_and_holds_after_a_restart(
    members: Any, digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    sigma, limit = 8.0, cost(40, 8.0) * 1.0001
    bob = CallerConfig(name="bob", token_sha256=token_hash("bob's"))
    (tmp_path / "bob").write_text("bob's\n")
    how = Policy.model_validate(
        {
            "listen": "127.0.0.1:0",
            "state": tmp_path / "state",
            "callers": (alice(epsilon=limit), bob),
            "answers": {
                "privacy": {"kind": "votes", "sigma": sigma, "delta": DELTA, "epsilon": cost(60, sigma) * 1.0001}
            },
        }
    )
    x = digits[0]
    teacher = EnsembleTeacher(members(5))
    with TeacherService(teacher, (1, 8, 8), how) as service:
        remote = RemoteTeacher(f"grpc://127.0.0.1:{service.port}?token={token}", batch=16)
        assert remote.epsilon == pytest.approx(limit) and remote.delta == DELTA
        assert remote.told.startswith("noisy votes of an ensemble, sigma 8; epsilon at most")
        assert remote.answers == "noisy votes of an ensemble, sigma 8"
        first = remote.logits(x[:30]).exp()
        assert set(first.max(1).values.round(decimals=3).tolist()) == {1.0}
        remote.close()
    with TeacherService(teacher, (1, 8, 8), how) as service:
        remote = RemoteTeacher(f"grpc://127.0.0.1:{service.port}?token={token}", batch=16)
        assert torch.equal(remote.logits(x[:30]).exp(), first), "known inputs get the very answers they got"
        with pytest.raises(RemoteError, match=r"epsilon would be .* over .* for alice"):
            remote.logits(x[30:41])
        remote.logits(x[30:40])
        other = RemoteTeacher(f"grpc://127.0.0.1:{service.port}?token={tmp_path / 'bob'}", batch=16)
        with pytest.raises(RemoteError, match="for all callers together"):
            other.logits(x[:25])
        assert not torch.equal(other.logits(x[:16]).exp(), first[:16]), "each caller has noise of its own"
        remote.close()
        other.close()
    own, all_of_them = Ledger(tmp_path / "state" / "ledger-alice.jsonl"), Ledger(tmp_path / "state" / "ledger.jsonl")
    (spent,) = own.spent(DELTA)
    assert (spent.unit, spent.relation) == ("client", "replace_one")
    assert spent.epsilon == pytest.approx(cost(40, sigma), rel=1e-3)
    assert all_of_them.spent(DELTA)[0].epsilon == pytest.approx(cost(56, sigma), rel=1e-3)


def test_nothing_is_answered_where_the_ledger_cannot_be_written(tmp_path: Path) -> None:
    private = PrivateAnswers(ensemble([0.9, 0.1], [0.2, 0.8]), PrivateAnswersConfig(sigma=1.0), tmp_path)
    private.charge(alice(), 3)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(path.read_bytes().replace(b"3 answers", b"1 answers"))
    with pytest.raises(LedgerError, match="was changed"):
        PrivateAnswers(ensemble([0.9, 0.1], [0.2, 0.8]), PrivateAnswersConfig(sigma=1.0), tmp_path)
    with pytest.raises(OverBudget, match="for alice"):
        PrivateAnswers(ensemble([0.9, 0.1], [0.2, 0.8]), PrivateAnswersConfig(sigma=1.0), tmp_path / "new").charge(
            alice(epsilon=0.1), 1
        )


def test_the_noise_on_votes_is_that_of_the_price(tmp_path: Path) -> None:
    """7 votes against 3: the share of wrong winners is that of N(4, 2 sigma^2) below 0, and not that of other sigmas."""
    sigma, count = 3.0, 20_000
    private = PrivateAnswers(
        ensemble(*[[0.6, 0.4]] * 7, *[[0.3, 0.7]] * 3), PrivateAnswersConfig(sigma=sigma), tmp_path
    )
    wrong = int(private.probabilities(torch.zeros(count, 2))[:, 1].sum())
    for scale, fits in ((1.0, True), (2 / 3, False), (3 / 2, False)):
        share = stats.norm.cdf(-4 / (math.sqrt(2) * sigma * scale))
        assert bool(stats.binomtest(wrong, count, share).pvalue > 1e-6) is fits


def test_the_noise_on_labels_is_that_of_the_price(tmp_path: Path) -> None:
    sigma, count, members = 1.5, 4000, 50
    private = PrivateAnswers(
        ensemble(*[[0.4, 0.3, 0.3]] * members), PrivateAnswersConfig(kind="labels", sigma=sigma), tmp_path
    )
    found = private.probabilities(torch.zeros(count, 2))
    assert torch.allclose(found.sum(1), torch.ones(count, dtype=torch.float64))
    # Inside the simplex projecting takes out the mean over the classes: sigma^2 (1 - 1/C) is left.
    wanted = sigma / members * math.sqrt(2 / 3)
    deviation = float(found[:, 0].std())
    assert abs(deviation / wanted - 1) < 0.1
    assert np.allclose(found.mean(0), [0.4, 0.3, 0.3], atol=5 * wanted / math.sqrt(count))


def test_a_member_that_answers_nonsense_moves_the_sum_by_no_more_than_any_other(tmp_path: Path) -> None:
    for kind in ("votes", "labels"):
        config = PrivateAnswersConfig(kind=kind, sigma=1e-9)  # type: ignore[arg-type]
        plain = PrivateAnswers(ensemble([0.1, 0.9], [0.1, 0.9]), config, tmp_path / f"{kind}-a")
        broken = PrivateAnswers(ensemble([0.1, 0.9], [math.nan, math.inf]), config, tmp_path / f"{kind}-b")
        x = torch.zeros(5, 2)
        step = (plain.probabilities(x) - broken.probabilities(x)) * (2 if kind == "labels" else 1)
        assert bool((step.norm(dim=1) <= math.sqrt(2) + 1e-6).all()) and bool(step.isfinite().all())


def test_one_model_and_unequal_weights_are_refused(taught: ModuleTeacher, members: Any, tmp_path: Path) -> None:
    config = PrivateAnswersConfig(sigma=1.0)
    with pytest.raises(ConfigError, match="no finite epsilon"):
        PrivateAnswers(taught, config, tmp_path)
    one, other = (m for m, _ in members(2))
    with pytest.raises(ConfigError, match="equal weight"):
        PrivateAnswers(EnsembleTeacher([(one, 1.0), (other, 2.0)]), config, tmp_path)
    with pytest.raises(ConfigError, match="two of these are one model"):
        PrivateAnswers(EnsembleTeacher([(one, 1.0), (other, 1.0), (one, 1.0)]), config, tmp_path)
    with pytest.raises(ValidationError, match=r"add answers\.privacy"):
        Policy.model_validate({"callers": (alice(epsilon=1.0),)})


def test_answers_with_and_without_noise_do_not_meet_on_one_ledger(
    members: Any, digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("secret")
    teacher = EnsembleTeacher(members(3))
    exact = {"listen": "127.0.0.1:0", "state": tmp_path / "state", "callers": (alice(),)}
    noisy = {**exact, "answers": {"privacy": {"sigma": 40.0, "epsilon": 1.0}}}

    def serve(how: dict[str, Any], asked: int) -> str:
        with TeacherService(teacher, (1, 8, 8), Policy.model_validate(how)) as service:
            remote = RemoteTeacher(f"grpc://127.0.0.1:{service.port}?token={tmp_path / 'token'}")
            remote.logits(digits[0][:asked])
            return remote.told

    assert serve(exact, 3) == "soft labels; epsilon infinity"
    with pytest.raises(ConfigError, match="without noise, which no epsilon covers"):
        serve(noisy, 3)
    apart = tmp_path / "apart"
    assert "epsilon at most 1 at delta 1e-05" in serve({**noisy, "state": apart}, 3)
    assert "epsilon at most 1 at delta 1e-05" in serve({**noisy, "state": apart}, 5)
    with pytest.raises(ConfigError, match="would make its epsilon untrue"):
        serve({**exact, "state": apart}, 3)


def test_two_processes_cannot_spend_one_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sigma = 8.0
    config = PrivateAnswersConfig(sigma=sigma, delta=DELTA, epsilon=cost(10, sigma) * 1.0001)
    services = [PrivateAnswers(ensemble([1.0, 0.0], [0.0, 1.0]), config, tmp_path) for _ in range(2)]
    looked = threading.Barrier(2)
    would = Ledger.would_exceed

    def slow(self: Ledger, *args: Any, **more: Any) -> str | None:
        found = would(self, *args, **more)
        if args[2] is not None:
            # Whoever has looked waits for the other one to have looked as well.
            with contextlib.suppress(threading.BrokenBarrierError):
                looked.wait(0.3)
        return found

    monkeypatch.setattr(Ledger, "would_exceed", slow)
    refused: list[str] = []

    def spend(service: PrivateAnswers) -> None:
        try:
            service.charge(alice(), 10)
        except OverBudget as cause:
            refused.append(str(cause))

    threads = [threading.Thread(target=spend, args=(s,)) for s in services]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1 and services[0].charged == 10
