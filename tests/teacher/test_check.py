"""`fedkd teacher check`: how far a caller could copy a teacher, by what it really hears."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from fedkd.cli.main import app
from fedkd.distill import EnsembleTeacher, ModuleTeacher
from fedkd.distill.config import load
from fedkd.distill.datafree import Form
from fedkd.distill.loop import Records
from fedkd.distill.run import start
from fedkd.errors import ConfigError
from fedkd.storage import pack_tensors, write_atomic
from fedkd.teacher.accounts import OverBudget
from fedkd.teacher.check import ANYBODY, DEFENCES, GuardedTeacher, Plan, check
from fedkd.teacher.client import RemoteTeacher
from fedkd.teacher.policy import AnswersConfig, CallerConfig, Policy, PrivateAnswersConfig, token_hash
from fedkd.teacher.service import TeacherService

Digits = tuple[Tensor, Tensor]
SHAPE = (1, 8, 8)


def test_the_check_hears_what_the_service_says(taught: ModuleTeacher, digits: Digits, tmp_path: Path) -> None:
    x = digits[0][:40]
    (tmp_path / "token").write_text("secret")
    caller = CallerConfig(name="a", token_sha256=token_hash("secret"))
    for name, how in DEFENCES.items():
        if how.noise:
            continue
        policy = Policy(listen="127.0.0.1:0", callers=(caller,), answers=how, state=tmp_path / name)
        with TeacherService(taught, SHAPE, policy) as service:
            remote = RemoteTeacher(f"grpc://127.0.0.1:{service.port}?token={tmp_path / 'token'}")
            guarded = GuardedTeacher(taught, SHAPE, how, caller, tmp_path)
            assert torch.equal(guarded.logits(x), remote.logits(x)), name
            assert guarded.asked == remote.asked == remote.paid
            remote.close()


@pytest.mark.parametrize("data", ["none", "digits"])
def test_a_run_without_data_pays_exactly_what_it_said(taught: ModuleTeacher, data: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    caller = CallerConfig(name="a", token_sha256=token_hash("secret"), queries=100)
    with TeacherService(
        taught, SHAPE, Policy(listen="127.0.0.1:0", callers=(caller,), state=tmp_path / "s")
    ) as service:
        words = [
            f"teacher=grpc://127.0.0.1:{service.port}?token={tmp_path / 'token'}", f"data={data}", "student=logreg",
            "method={name: ideal, batch_size: 20, steps: 2, width: 4}",
        ]  # fmt: skip
        with pytest.raises(
            ConfigError, match=r"asks 20 inputs in each of 6 epochs.*100 at most: set training.epochs to 5"
        ):
            start(load(None, [*words, "training.epochs=6"])[0][1], tmp_path / "dear")
        assert service.accounts.spent("a") == 0
        found = start(load(None, [*words, "training.epochs=4"])[0][1], tmp_path / "run").summary
        # Neither the pool's answers nor the test set's, which would measure the teacher, cost a query.
        assert found["queries"] == found["paid"] == service.accounts.spent("a") == 80
        assert found["accuracy"]["teacher"] is None and (found["accuracy"]["student"] is None) == (data == "none")


def test_noise_cannot_be_averaged_away_and_a_budget_ends(taught: ModuleTeacher, digits: Digits, tmp_path: Path) -> None:
    caller = CallerConfig(name="a", certificate="a", queries=30)
    guarded = GuardedTeacher(taught, SHAPE, DEFENCES["noise 0.1"], caller, tmp_path)
    first = guarded.logits(digits[0][:20])
    assert torch.equal(guarded.logits(digits[0][:20]), first) and guarded.asked == 20
    exact = taught.logits(digits[0][:20]).softmax(1)
    assert 0.02 < float((first.softmax(1) - exact).abs().mean()) < 0.2
    with pytest.raises(OverBudget, match="10 of 30 are left to a"):
        guarded.logits(digits[0][:31])
    assert guarded.asked == 20


def plan(taught: ModuleTeacher, digits: Digits, **more: object) -> Plan:
    x, y = digits
    given = {
        "teacher": taught, "form": Form(shape=SHAPE, classes=10), "test": Records.of(x[1500:], y[1500:]),
        "student": "mlp(hidden=[16])", "defences": {"none": AnswersConfig()}, "queries": (200,), "seeds": (1,),
        "steps": 120, **more,
    }  # fmt: skip
    return Plan(**given)  # type: ignore[arg-type]


def test_rows_tell_accuracy_price_and_refusal(taught: ModuleTeacher, digits: Digits) -> None:
    caller = ANYBODY.model_copy(update={"queries": 250})
    made = plan(
        taught, digits, attacks=("noise", "other"), queries=(200, 300), caller=caller, seeds=(1, 2),
        other=digits[0][:400], defences={k: DEFENCES[k] for k in ("none", "top-1")},
    )  # fmt: skip
    told: list[dict[str, object]] = []
    rows = check(made, told.append)
    assert rows == told and [(r["defence"], r["attack"]) for r in rows] == [
        (d, a) for d in ("none", "top-1") for a in ("noise", "other")
    ]
    for row in rows:
        affordable, refused = row["students"]
        assert affordable["charged"] == 200 and len(affordable["accuracy"]) == 2
        assert refused["accuracy"] is None and row["answers"] > 0.8
    # Inputs of the same kind as the teacher's teach more than noise: the table can tell attacks apart.
    assert np.mean(rows[1]["students"][0]["accuracy"]) > np.mean(rows[0]["students"][0]["accuracy"]) + 0.02
    # The same seed gives the same student.
    again = check(plan(taught, digits, attacks=("noise",), seeds=(2,)))
    assert again[0]["students"][0]["accuracy"] == [rows[0]["students"][0]["accuracy"][1]]


def test_a_privacy_budget_refuses_too(taught: ModuleTeacher, digits: Digits, members: Any) -> None:
    ensemble = EnsembleTeacher(members(3))
    private = AnswersConfig(privacy=PrivateAnswersConfig(sigma=4.0, epsilon=5.0))
    made = plan(taught, digits, teacher=ensemble, attacks=("noise",), queries=(80, 5000), defences={"votes": private})
    (row,) = check(made)
    assert row["answers"] is None and row["students"][0]["accuracy"] is None and row["students"][1]["accuracy"] is None
    loose = AnswersConfig(privacy=PrivateAnswersConfig(sigma=4.0))
    (row,) = check(plan(taught, digits, teacher=ensemble, attacks=("noise",), queries=(80,), defences={"votes": loose}))
    assert row["students"][0]["charged"] == 80


def test_the_command(taught: ModuleTeacher, tmp_path: Path) -> None:
    model = tmp_path / "teacher.safetensors"
    note = {"architecture": "mlp", "shape": SHAPE, "classes": 10}
    write_atomic(model, pack_tensors(dict(taught.module.state_dict()), {"fedkd": json.dumps(note)}))
    words = [
        "teacher",
        "check",
        str(model),
        "--data",
        "digits",
        "--student",
        "logreg",
        "--queries",
        "100",
        "--seeds",
        "1",
    ]
    done = CliRunner().invoke(
        app, [*words, "--steps", "40", "--defences", "none,1 decimal", "--json", str(tmp_path / "table.json")]
    )
    assert done.exit_code == 0, done.output
    assert "1 decimal" in done.output and "ideal" in done.output
    found = json.loads((tmp_path / "table.json").read_text())
    assert len(found["rows"]) == 4 and found["rows"][0]["students"][0]["queries"] == 100
    for more, says in (
        (["--defences", "magic"], "known are none"),
        (["--attacks", "other"], "name their file"),
        (["--attacks", "dfad"], "no method for a black box"),
        (["--data", "mnistt"], "mnistt"),
    ):
        wrong = CliRunner().invoke(app, [*words, *more])
        assert wrong.exit_code != 0 and says in (wrong.output + str(wrong.exception)), more


@pytest.mark.parametrize(("queries", "says"), [((10,), "at least 80"), ((), "at least 80"), ((900,), "there are 400")])
def test_plans_that_cannot_be(taught: ModuleTeacher, digits: Digits, queries: tuple[int, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan(taught, digits, queries=queries, attacks=("other",), other=digits[0][:400])
    with pytest.raises(ConfigError, match="at least 40"):
        plan(taught, digits, steps=39)
