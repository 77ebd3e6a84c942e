"""Whole runs under DP-SGD: nothing leaves a device beside its Released, and the account survives whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from harness import Tap, assemble, finish, merged, section

from fedkd import simulate
from fedkd.errors import ConfigError
from fedkd.experiment import validate
from fedkd.messages import Reply, write_reply
from fedkd.payloads import Nothing, SoftLabels
from fedkd.privacy.build import LEDGER
from fedkd.privacy.events import epsilon
from fedkd.privacy.ledger import Entry, Ledger, LedgerError
from fedkd.privacy.mechanisms import NoPrivacy, Party, PrivacyError, Released
from fedkd.privacy.plan import cost
from fedkd.privacy.policy import Policy, PolicyError
from fedkd.privacy.record_level import DpSgd

MODEL = "mlp(hidden=[16])"
DP: dict[str, Any] = {
    "algorithm": "ds_fl",
    "models": {"student": MODEL, "devices": [MODEL]},
    "training": {"steps": 3, "epochs": 5, "batch_size": 10},
    "privacy": {"kind": "dp_sgd", "noise_multiplier": 1.0, "sampling_rate": 0.3},
}
SMALL: dict[str, Any] = merged(
    DP,
    {
        "rounds": 4, "partition": {"clients": 4}, "proxy": {"size": 60}, "digest": {"epochs": 1},
        "server": {"epochs": 1}, "evaluation": {"local_only": False},
    },
)  # fmt: skip


# ---- what leaves ----------------------------------------------------------------------------------------------------
def leaves(reply: Reply) -> Iterator[tuple[str, Any]]:
    """Walk everything that a reply consists of."""
    for name in reply.__dataclass_fields__:
        yield name, getattr(reply, name)


@pytest.mark.parametrize("algorithm", ["ds_fl", "cfd", "fedmd", "dense"])
@pytest.mark.parametrize("kind", ["serial", "stacked"])
def test_taint_nothing_but_the_released_leaves_a_dp_device(algorithm: str, kind: str) -> None:
    """Every number that leaves is known to come from the model or from public facts; counts and losses are none."""
    played = assemble(merged(DP, {"algorithm": section(algorithm), "rounds": 2}), kind=kind)
    tap = Tap(played.runner)
    played.rounds.runner = tap
    finish(played)
    counts = {card.id: len(played.site.private(card.id)) for card in played.site.cards}
    assert len(set(counts.values())) > 3 and 0 in counts.values()
    assert {reply.client for reply in tap.replies} == counts.keys()
    private = {p.name for p in played.site.method.plan(_heard()) if p.data == "private"} | {"train", "pretrain private"}
    lengths: dict[int, set[int]] = {}
    for reply in tap.replies:
        assert [name for name, _ in leaves(reply)] == ["client", "round", "body", "error", "losses", "reason"], (
            "a new way out"
        )
        assert reply.error is None and reply.reason == "device", "the reason's default, which tells nothing"
        assert private.isdisjoint(dict(reply.losses)), "a loss on private records"
        assert reply.body is not None
        samples = len(played.rounds.ask_indices(reply.round))
        contract = played.site.contract_up(played.site.cards[reply.client], samples)
        payload, envelope = played.site.codec_up.decode(reply.body, contract)
        assert envelope.examples == 1.0, "a count of records"
        assert type(payload) is played.site.method.upload, "a device without records is not told by its silence"
        lengths.setdefault(reply.round, set()).add(len(reply.body) if "entropy" not in played.site.codec_up.spec else 0)
    assert all(len(found) == 1 for found in lengths.values()), "a length that depends on the device"


@pytest.mark.parametrize("kind", ["dp_sgd", "labels"])
def test_an_error_leaves_a_device_without_its_words(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of an error may quote a record; the server hears its kind alone."""

    def fails(*_: Any) -> None:
        raise ValueError("secret pixel 0.4711")

    monkeypatch.setattr("fedkd.client._train", fails)
    played = assemble(merged(DP, {"rounds": 1, "privacy": {"kind": kind, "noise_multiplier": 9.0}}))
    finish(played)
    told = played.records[0]["quarantined"]
    assert {q["message"] for q in told} == {"ValueError on the device; its own log says more"}
    assert len(told) == len(played.site.cards) and "4711" not in json.dumps(played.records)


def _heard() -> Any:
    from fedkd.algorithms.base import Heard

    return Heard(knowledge=Nothing(), memory={}, round=0)


def test_an_answer_depends_on_records_through_the_trained_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With private training left out, two devices with other records say the very same."""
    monkeypatch.setattr("fedkd.client.train_private", lambda engine, phase, tasks: None)
    played = assemble(merged(DP, {"rounds": 1}))
    tap = Tap(played.runner)
    played.rounds.runner = tap
    finish(played)
    bodies = {reply.client: reply.body for reply in tap.replies}
    samples = len(played.rounds.ask_indices(0))
    said = [
        played.site.codec_up.decode(b, played.site.contract_up(played.site.cards[k], samples))[0].tensors()["labels"]
        for k, b in bodies.items()
        if b is not None
    ]
    assert len(said) == len(played.site.cards) and all(torch.equal(said[0], other) for other in said)


def test_only_a_mechanism_makes_a_released_and_only_a_released_is_sent() -> None:
    labels = SoftLabels(labels=torch.full((2, 2), 0.5))
    with pytest.raises(TypeError, match="only a Mechanism"):
        Released(labels, 1.0, (), object())
    real = NoPrivacy().release(labels, Party(device=0, run="r", round=0))
    with pytest.raises(TypeError, match="only a Mechanism"):
        replace(real, seal=None)
    played = assemble(merged(DP, {"rounds": 1}))
    for forged in (labels, vars(real)):
        with pytest.raises(TypeError, match="only what a mechanism released"):
            write_reply(played.site, played.site.cards[0], None, forged, None)  # type: ignore[arg-type]
    # There is one way from an answer to bytes, and it is that function.
    sources = {p: p.read_text() for p in (Path(simulate.__file__).parent).rglob("*.py")}
    assert [p.name for p, text in sources.items() if "codec_up.encode(" in text] == ["messages.py"]


def test_a_device_that_was_not_charged_cannot_release() -> None:
    played = assemble(merged(DP, {"rounds": 1}))
    with pytest.raises(PrivacyError, match="was not charged"):
        played.site.mechanism.release(SoftLabels(labels=torch.ones(1, 2) / 2), Party(device=0, run="r", round=0))


def test_the_ledger_is_charged_before_a_device_trains_or_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    charge = Ledger.charge
    from fedkd import client

    train, release = client.train_private, DpSgd.release

    def spy_charge(self: Ledger, entries: Sequence[Entry]) -> None:
        charge(self, entries)
        order.append("charge")

    def spy_train(*args: Any) -> None:
        order.append("train")
        train(*args)

    def spy_release(self: DpSgd, *args: Any, **named: Any) -> Released:
        order.append("release")
        return release(self, *args, **named)

    monkeypatch.setattr(Ledger, "charge", spy_charge)
    monkeypatch.setattr(client, "train_private", spy_train)
    monkeypatch.setattr(DpSgd, "release", spy_release)
    finish(assemble(merged(DP, {"rounds": 1})))
    assert order[:2] == ["charge", "train"] and set(order[2:]) == {"release"}


def test_a_ledger_that_cannot_be_written_stops_every_release(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Ledger, entries: Sequence[Entry]) -> None:
        raise LedgerError("cannot write the ledger: no space left on device; nothing is released")

    monkeypatch.setattr(Ledger, "charge", full)
    played = assemble(merged(DP, {"rounds": 1}))
    tap = Tap(played.runner)
    played.rounds.runner = tap
    with pytest.raises(LedgerError):
        finish(played)
    assert tap.replies == []


@pytest.mark.parametrize(
    "privacy",
    [
        {},
        {"kind": "votes"},
        {"kind": "labels", "secure_sum": True},
        {"secure_sum": True},
    ],
)
def test_no_epsilon_is_shown_for_answers_that_nobody_was_charged_for(
    privacy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost charge must not show as a small epsilon, of which 0 is the smallest."""
    monkeypatch.setattr(Ledger, "charge", lambda self, entries: None)
    played = assemble(merged(DP, {"rounds": 1, "privacy": privacy}))
    with pytest.raises(PrivacyError, match=r"no charge of (the server|device 0)"):
        finish(played)
    assert played.records == []


# ---- the budget -----------------------------------------------------------------------------------------------------
def test_a_device_beyond_its_budget_abstains_and_goes_on_digesting() -> None:
    one = epsilon(_events(1), 1e-5)
    two = epsilon(_events(2), 1e-5)
    played = assemble(merged(DP, {"rounds": 3}))
    played.site.mechanism.open(Ledger(), Policy(epsilon=(one + two) / 2))
    finish(played)
    assert [r["answered"] for r in played.records] == [8, 0, 0]
    assert [r["abstained"] for r in played.records] == [0, 8, 8]
    assert [r["epsilon"] for r in played.records] == [one] * 3
    assert {"digest"} == played.records[1]["loss"].keys(), "public labels are digested all the same"
    # What it digests is free; its own records were not touched again.
    assert [e.round for e in played.site.mechanism.ledger.entries] == [0]


def _events(rounds: int) -> list[Any]:
    from fedkd.privacy.events import Event

    return [Event(sigma=1.0, q=0.3, count=3 * rounds)]


def test_calibrated_runs_spend_their_budget_and_never_more(tmp_path: Path) -> None:
    budget = merged(SMALL, {"privacy": {"epsilon": 3.0, "noise_multiplier": None}})
    done = simulate.start(validate(budget), tmp_path / "r").summary
    assert 2.9 <= done["epsilon"] <= 3.0 and done["delta"] == 1e-5
    assert done["privacy"]["unit"] == "record" and done["privacy"]["mechanism"] == "dp_sgd"
    rows = [json.loads(line) for line in (tmp_path / "r" / "rounds.jsonl").read_text().splitlines()]
    assert [r["answered"] for r in rows] == [4] * 4
    figures = [r["epsilon"] for r in rows]
    assert figures == sorted(figures) and figures[-1] == done["epsilon"]
    with pytest.raises(ConfigError, match="cannot be kept"):
        simulate.start(validate(merged(budget, {"privacy": {"epsilon": 1e-7, "delta": 1e-12}})), tmp_path / "no")


def test_a_seeded_run_is_void_and_says_so(tmp_path: Path) -> None:
    done = simulate.start(validate(merged(SMALL, {"rounds": 1, "privacy": {"seeded": True}})), tmp_path / "r").summary
    assert done["epsilon"] is None and "void" in done["privacy"]["note"]


@pytest.mark.parametrize(
    ("privacy", "why"),
    [
        ({"epsilon": 1.0}, "device by device"),
        ({"kind": "labels"}, "protects one client"),
        ({"kind": "votes"}, "one client"),
    ],
)
def test_a_budget_that_would_not_hold_for_records_on_several_devices_is_refused(
    privacy: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        validate(merged(SMALL, {"privacy": {"disjoint": False, **privacy}}))


def test_the_plan_for_records_on_several_devices_is_what_the_run_costs(tmp_path: Path) -> None:
    chosen = validate(merged(SMALL, {"rounds": 2, "privacy": {"disjoint": False}}))
    priced = cost(chosen, "dp_sgd", None, clients=4, queries=60, classes=10)
    assert simulate.start(chosen, tmp_path / "run").summary["epsilon"] == pytest.approx(priced.plan)
    alone = cost(validate(merged(SMALL, {"rounds": 2})), "dp_sgd", None, clients=4, queries=60, classes=10)
    assert priced.plan > 1.5 * alone.plan


def test_records_that_are_not_disjoint_cost_the_sum_of_all_devices(tmp_path: Path) -> None:
    runs = {
        d: simulate.start(
            validate(merged(SMALL, {"rounds": 1, "privacy": {"disjoint": d}})), tmp_path / str(d)
        ).summary["epsilon"]
        for d in (True, False)
    }
    assert runs[True] == epsilon(_events(1), 1e-5) and runs[False] == epsilon(_events(4), 1e-5)


# ---- restarts -------------------------------------------------------------------------------------------------------
class Interrupt:
    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, record: Mapping[str, Any], rounds: int) -> None:
        if record["round"] + 1 == self.after:
            raise KeyboardInterrupt


def test_a_run_resumed_three_times_claims_what_a_run_in_one_piece_claims(tmp_path: Path) -> None:
    experiment = validate(SMALL)
    whole = simulate.start(experiment, tmp_path / "a" / "r").summary["epsilon"]
    with pytest.raises(KeyboardInterrupt):
        simulate.start(experiment, tmp_path / "b" / "r", Interrupt(1))
    for after in (2, 3):
        with pytest.raises(KeyboardInterrupt):
            simulate.resume(tmp_path / "b" / "r", Interrupt(after))
    assert simulate.resume(tmp_path / "b" / "r").summary["epsilon"] == whole == epsilon(_events(4), 1e-5)


def test_rounds_that_are_run_again_after_a_lost_checkpoint_are_paid_again(tmp_path: Path) -> None:
    experiment = validate(merged(SMALL, {"checkpoint": {"every": 4}}))
    with pytest.raises(KeyboardInterrupt):
        simulate.start(experiment, tmp_path / "r", Interrupt(3))
    assert simulate.resume(tmp_path / "r").summary["epsilon"] == epsilon(_events(7), 1e-5)


@pytest.mark.fault(16, "killed between charge and release: the claim is larger, never smaller")
def test_killed_between_charge_and_release_the_claim_is_larger_never_smaller(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from fedkd import client, simulate; from fedkd.experiment import load\n"
        "calls = []\n"
        "original = client.train_private\n"
        "def dies(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    original(*args)\n"
        "client.train_private = dies\n"
        "simulate.start(load(Path(sys.argv[1]))[0][1], Path(sys.argv[2]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path), str(folder)], timeout=120, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert Ledger(folder / LEDGER).epsilon(1e-5, 0) == epsilon(_events(3), 1e-5), "round 2 was charged, not released"
    assert simulate.resume(folder).summary["epsilon"] == epsilon(_events(5), 1e-5)


def test_a_tampered_ledger_stops_a_resume(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        simulate.start(validate(SMALL), tmp_path / "r", Interrupt(2))
    path = tmp_path / "r" / LEDGER
    path.write_text(path.read_text().replace('"sigma":1.0', '"sigma":4.0', 1))
    with pytest.raises(LedgerError, match="was changed"):
        simulate.resume(tmp_path / "r")
    path.unlink()
    with pytest.raises(LedgerError, match="gone"):
        simulate.resume(tmp_path / "r")


# ---- policy ---------------------------------------------------------------------------------------------------------
def test_a_policy_refuses_what_goes_beyond_it(tmp_path: Path) -> None:
    private, open_ = validate(SMALL), validate({**SMALL, "privacy": {"kind": "none"}})
    central = validate({**SMALL, "privacy": {"kind": "labels", "epsilon": 1}})
    Policy(epsilon=1.0, min_cohort=1).check_experiment(private, "a" * 64)
    cases = [
        (Policy(epsilon=8.0), open_, "asks for differential privacy"),
        (Policy(require_privacy=True), open_, "asks for differential privacy"),
        (Policy(epsilon=8.0), central, "protects clients on the server only"),
        (Policy(min_cohort=3), private, "3 answers at least"),
        (Policy(max_rounds=3), private, "allows 3 rounds"),
        (Policy(proxy_sha256="b" * 64), private, "pins proxy set"),
        (Policy(epsilon=8.0), validate(merged(SMALL, {"privacy": {"seeded": True}})), "foreseen"),
    ]
    for policy, experiment, reason in cases:
        with pytest.raises(PolicyError, match=reason):
            policy.check_experiment(experiment, "a" * 64)
    Policy(proxy_sha256="a" * 64).check_experiment(private, "a" * 32)
    for nothing in (None, ""):
        with pytest.raises(PolicyError, match="answers without one"):
            Policy(proxy_sha256="a" * 64).check_experiment(private, nothing)
    # What it says it takes, and what it says refuses it.
    Policy(require_privacy=True).check_experiment(central, "a" * 64)


def test_the_policy_file_is_checked_and_the_example_is_valid(tmp_path: Path) -> None:
    example = Path(simulate.__file__).parent.parent / "clients" / "policy.yaml"
    if example.is_file():
        assert Policy.load(example).epsilon == 8.0
    path = tmp_path / "policy.yaml"
    for text in ("epsilon: -1", "epsylon: 3", "[1, 2]", "proxy_sha256: xyz", "{{"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="policy"):
            Policy.load(path)
    with pytest.raises(ConfigError, match="cannot read"):
        Policy.load(tmp_path / "none.yaml")


def test_simulated_devices_keep_the_policy_that_is_given(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(f"epsilon: {(epsilon(_events(2), 1e-5) + epsilon(_events(3), 1e-5)) / 2}\n")
    done = simulate.start(validate(merged(SMALL, {"privacy": {"policy": str(path)}})), tmp_path / "r")
    rows = [json.loads(line) for line in (done.folder / "rounds.jsonl").read_text().splitlines()]
    assert [r["answered"] for r in rows] == [4, 4, 0, 0]
    assert done.summary["epsilon"] == epsilon(_events(2), 1e-5)
    path.write_text("max_rounds: 1\n")
    with pytest.raises(PolicyError):
        simulate.start(validate(merged(SMALL, {"privacy": {"policy": str(path)}})), tmp_path / "s")


def test_records_scaled_by_their_own_statistics_are_refused(tmp_path: Path) -> None:
    """One record moves the mean and so all inputs of its device: clipping each gradient does not bound that."""
    table = tmp_path / "t.csv"
    rng = np.random.default_rng(0)
    table.write_text("a,b,label\n" + "".join(f"{rng.normal():.3f},{rng.normal():.3f},{i % 2}\n" for i in range(200)))
    raw = merged(
        SMALL, {"data": {"source": "csv", "path": str(table), "normalise": "per_client"}, "proxy": {"size": 20}}
    )
    with pytest.raises(ConfigError, match="one record moves all"):
        simulate.start(validate(raw), tmp_path / "r")


# ---- the command line -----------------------------------------------------------------------------------------------
def test_plan_and_ledger_on_the_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fedkd.cli.main import app

    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(merged(SMALL, {"rounds": 2, "privacy": {"epsilon": 50.0}})))
    run = CliRunner().invoke(app, ["privacy", "plan", str(path)])
    assert run.exit_code == 0, run.output
    words = run.output.split()
    for rounds in (1, 2, 3):
        assert f"{epsilon(_events(rounds), 1e-5):.3f}" in words, "one round, the plan, one round more"
    assert "better buy" in run.output and "votes" in run.output
    done = simulate.start(validate(merged(SMALL, {"rounds": 2})), tmp_path / "r")
    shown = CliRunner().invoke(app, ["privacy", "ledger", str(done.folder), "--json"])
    rows = [json.loads(line) for line in shown.output.splitlines()]
    assert [r["round"] for r in rows] == [0, 1] and rows[-1]["epsilon"] == done.summary["epsilon"]
    assert {"what", "time", "mechanism", "unit", "relation", "epsilon", "who"} <= rows[0].keys()
    table = CliRunner().invoke(app, ["privacy", "ledger", str(done.folder)])
    assert f"{done.summary['epsilon']:.3f} at delta 1e-05" in table.output


@pytest.mark.slow
def test_nobody_opens_a_run_without_its_privacy(tmp_path: Path) -> None:
    """A kill of the whole process at a random moment: a resume never claims less than the rounds that were released."""
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(merged(SMALL, {"rounds": 40})))
    folder = tmp_path / "r"
    command = [sys.executable, "-m", "fedkd", "simulate", str(path), "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if (folder / "rounds.jsonl").is_file() and (folder / "rounds.jsonl").read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    released = (folder / "rounds.jsonl").read_bytes().count(b"\n")
    charged = Ledger(folder / LEDGER).events(0)[0].count
    assert released >= 2 and charged >= 3 * released
