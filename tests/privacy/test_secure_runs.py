"""Secure sums inside runs: the same numbers as without, through messages that any runner carries."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fedkd.errors import ConfigError
from fedkd.experiment import load
from fedkd.messages import Request
from fedkd.privacy import plan as plans
from fedkd.privacy.secure import heads, protocol
from fedkd.privacy.secure.exchange import take_part
from fedkd.privacy.secure.quantise import bits_for
from fedkd.records import Records
from fedkd.rounds import Rounds
from fedkd.runners.base import LocalRunner, make_engine
from fedkd.simulate import resume, start
from fedkd.site import Site
from fedkd.store import FolderStore, MemoryStore

SMALL = [
    "rounds=2",
    "partition={kind: iid, clients: 6}",
    "proxy.size=40",
    "training.epochs=2",
    "digest.epochs=1",
    "server.epochs=3",
    "evaluation.local_only=false",
]


def play(*words: str, store=None):
    told = {word.partition("=")[0]: word for word in (*SMALL, *words)}  # the later word counts
    experiment = load(None, list(told.values()))[0][1]
    site = Site.load(experiment)
    bodies: list[bytes] = []

    class Listening(LocalRunner):
        def ask(self, requests):
            for reply in super().ask(requests):
                if reply.body is not None:
                    bodies.append(reply.body)
                yield reply

    runner = Listening(site, make_engine(site, experiment.runner.kind), store or MemoryStore())
    records = []
    rounds = Rounds(site, runner, run="run")
    progress = rounds.play(rounds.begin(), lambda p, record: records.append(record))
    return site, progress, records, bodies


@pytest.mark.parametrize("kind", ["serial", "stacked"])
@pytest.mark.parametrize("method", ["ds_fl", "cfd"])
def test_a_secure_sum_gives_the_mean_that_the_server_would_have_taken(kind, method):
    words = (f"runner.kind={kind}", f"algorithm.name={method}", "codec.up=float32", "codec.down=float32", "rounds=1")
    _, plain, _, clear = play(*words)
    _, secure, records, bodies = play(*words, "privacy.secure_sum=true")
    a, b = plain.state.knowledge.tensors()["labels"], secure.state.knowledge.tensors()["labels"]
    if method == "ds_fl":
        assert float((a - b).abs().max()) < 6e-3  # ERA multiplies the steps of 1/4096 by 1/T = 10
    else:
        assert bool((a.argmax(-1) == b.argmax(-1)).float().mean() > 0.8)
    assert records[0]["answered"] == 6 and records[0]["failed"] is None
    assert records[0]["loss"] == {}, "a device's own loss beside a sum that hides its answer"
    assert all(heads.is_message(body) for body in bodies) and not any(map(heads.is_message, clear))


def test_every_byte_of_the_protocol_is_counted():
    site, _, records, bodies = play("privacy.secure_sum=true", "rounds=1")
    assert records[0]["bytes_up"] == sum(map(len, bodies))
    terms = site.mechanism.terms
    masked = [b for b in bodies if heads.read_step(b) == heads.MASKED]
    assert len(masked) == 6
    assert {len(b) for b in masked} == {29 + (terms.length * terms.bits + 7) // 8}


def test_drop_outs_and_late_answers_are_recovered_from():
    words = ("population.dropout=0.3", "population.late=0.2", "rounds=6", "privacy.secure_threshold=0.2")
    _, progress, records, _ = play(*words, "privacy.secure_sum=true")
    assert any(r["dropped"] for r in records) and any(r["late"] for r in records)
    enough = [r for r in records if r["answered"] >= 3]
    assert enough and all(r["failed"] is None for r in enough)
    assert all(r["failed"] is not None for r in records if r["answered"] < 3)
    assert np.isfinite(progress.state.knowledge.tensors()["labels"].numpy()).all()


def test_a_round_below_the_minimum_fails_by_name_and_its_sum_is_never_learned():
    _, _, records, bodies = play(
        "population.dropout=0.7", "population.minimum=5", "privacy.secure_sum=true", "rounds=3"
    )
    assert all("at least 5" in r["failed"] for r in records)
    assert not [b for b in bodies if heads.read_step(b) == heads.UNMASK]


def test_sessions_survive_between_messages_in_a_folder(tmp_path):
    _, memory, _, _ = play("privacy.secure_sum=true")
    _, folder, _, _ = play("privacy.secure_sum=true", store=FolderStore(tmp_path))
    a, b = (p.state.knowledge.tensors()["labels"] for p in (memory, folder))
    assert bool((a == b).all())
    assert not list(tmp_path.rglob("session.json")), "a session that has ended is forgotten"


def test_a_run_on_disk_counts_noise_of_devices_in_its_ledger_and_resumes(tmp_path):
    words = [*SMALL, "privacy.kind=votes", "privacy.epsilon=6", "privacy.secure_sum=true", "population.minimum=5"]
    done = start(load(None, words)[0][1], tmp_path / "a")
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert done.summary["privacy"]["mechanism"] == "secure votes" and summary["privacy"]["unit"] == "client"
    assert 5.5 < summary["epsilon"] <= 6
    assert resume(tmp_path / "a").summary["epsilon"] == summary["epsilon"]


def test_the_devices_noises_add_up_to_what_is_accounted():
    words = ["privacy.kind=labels", "privacy.epsilon=4", "privacy.secure_sum=true", "rounds=1"]
    shape = [word for word in SMALL if word != "rounds=2"]
    site = Site.load(load(None, [*shape, *words])[0][1])
    mechanism = site.mechanism
    assert mechanism.share * mechanism.least == pytest.approx((mechanism.noise_multiplier * mechanism.l2) ** 2)
    # At a fine scale Skellam noise costs what Gaussian noise does, within the slack of Renyi bounds.
    central = Site.load(load(None, [*shape, *words[:2], "rounds=1"])[0][1]).mechanism
    assert central.noise_multiplier < mechanism.noise_multiplier < 1.2 * central.noise_multiplier


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["algorithm.name=fedavg", "models.devices=mlp"], "sends Weights"),
        (["algorithm.name=fedmd", "proxy.labelled=true"], "sends Logits"),
        (["population.staleness.limit=2"], "one round"),
        (["privacy.kind=votes", "privacy.epsilon=4", "privacy.threshold=0.3"], "raw counts"),
        (["privacy.kind=votes", "privacy.epsilon=4", "privacy.sampling=poisson"], "cohort"),
    ],
)
def test_what_a_secure_sum_cannot_serve_is_refused_when_the_experiment_is_read(words, why):
    with pytest.raises(ConfigError, match=why):
        load(None, ["privacy.secure_sum=true", *words])


@pytest.mark.parametrize("model", ["mlp", "user_models:TopLabel"])
def test_a_device_without_records_is_as_loud_as_the_others(model, monkeypatch):
    """The server that noisy sums protect clients from would learn of its silence that it has no records."""
    private = Site.private

    def empty(self, client):
        found = private(self, client)
        return found if client else Records(found.pool, torch.zeros(0, dtype=torch.int64))

    monkeypatch.setattr(Site, "private", empty)
    words = ("rounds=1", "privacy.secure_sum=true", f"models.devices={model}")
    for noise in ("privacy.kind=votes", "privacy.kind=labels"):
        _, _, (record,), _ = play(*words, noise, "privacy.epsilon=8")
        assert (record["answered"], record["quarantined"], record["failed"]) == (6, [], None)
    _, _, (record,), _ = play(*words)
    assert record["answered"] == 5, "without noise the sum protects no client, and none has to answer for nothing"


@pytest.mark.parametrize("kind", ["labels", "votes", "dp_sgd"])
def test_the_plan_of_a_secure_sum_is_what_the_run_costs(kind):
    words = ["rounds=3", "partition.clients=9", "population.minimum=7", "privacy.epsilon=2", "privacy.secure_sum=true"]
    experiment = load(None, [*words, f"privacy.kind={kind}"])[0][1]
    found = plans.cost(experiment, kind, 2.0, clients=9, queries=10, classes=10)
    assert found.reason is None and found.one_round < 1.9 < found.plan <= 2.0 < found.one_more
    if kind != "dp_sgd":
        assert "of 7 devices, the fewest in a sum" in found.noise
        # Nine devices bring the noise of nine; a trusted server adds what is needed.
        trusted = experiment.model_copy(update={"privacy": experiment.privacy.model_copy(update={"secure_sum": False})})
        secure, plain = (plans.best_buys(e, 2.0, clients=9, classes=10, most=40) for e in (experiment, trusted))
        assert secure[0].deviation / secure[0].queries ** 0.5 > plain[0].deviation / plain[0].queries ** 0.5


def test_a_method_that_compares_answers_and_a_secure_sum_exclude_each_other(monkeypatch):
    from fedkd.algorithms.ds_fl import DSFL

    monkeypatch.setattr(DSFL, "needs_each", lambda self: "ds_fl takes the median of answers")
    with pytest.raises(ConfigError, match="exclude each other"):
        load(None, ["privacy.secure_sum=true"])


@pytest.mark.parametrize("participation", [0.3, 0.5, 0.7, 1.0])
def test_as_many_bits_as_the_devices_that_are_asked_need(participation):
    """Halves round up in both places: half of nine is five, and a sum of five that has room for four wraps around."""
    words = ["rounds=1", "proxy.size=20", "evaluation.local_only=false", "privacy.secure_sum=true", "privacy.kind=none"]
    words += [
        "partition={kind: iid, clients: 9}",
        "privacy.secure_scale=120",
        f"population.participation={participation}",
    ]
    site = Site.load(load(None, words)[0][1])
    rounds = Rounds(site, LocalRunner(site, make_engine(site, "serial")), run="r")
    asked = len(rounds.cohort(0).asked)
    largest = site.mechanism.grid.largest
    assert site.mechanism.terms.bits == bits_for(asked, largest, 0)
    needed = protocol.Terms(length=1, bits=1).needed(asked)
    assert site.mechanism.least == max(3, needed)


def test_too_small_a_cohort_is_refused():
    with pytest.raises(ConfigError, match="at least 3 devices"):
        Site.load(load(None, [*SMALL, "partition.clients=2", "privacy.secure_sum=true"])[0][1])


def test_a_device_sends_nothing_without_a_session_and_no_plain_answer_ever():
    experiment = load(None, [*SMALL, "privacy.secure_sum=true"])[0][1]
    site = Site.load(experiment)
    store = MemoryStore()
    for step in (heads.DEAL, heads.RELAY, heads.UNMASK):
        body = heads.write(step, heads.SERVER, heads.session_id("run", 0))
        reply = take_part(site, store, Request(0, 0, body))
        assert reply.body is None and "no session" in (reply.error or "")
    # The ordinary request of a round, without the steps before it.
    from fedkd.messages import write_request
    from fedkd.payloads import Nothing

    ask = np.arange(40)
    body, _ = write_request(site, "run", 0, Nothing(), np.zeros(0, np.int64), ask, None)
    runner = LocalRunner(site, make_engine(site, "serial"))
    (reply,) = runner.ask([Request(0, 0, body)])
    assert reply.body is None and "session" in (reply.error or "")


@pytest.mark.parametrize("folder", [False, True])
def test_no_second_sum_of_a_round(folder, tmp_path):
    """A server that opens a round's session anew, with fewer devices, would get single vectors as differences."""
    site = Site.load(load(None, [*SMALL, "privacy.secure_sum=true"])[0][1])
    store = FolderStore(tmp_path) if folder else MemoryStore()
    runner = LocalRunner(site, make_engine(site, "serial"), store)
    first, again = [], []
    rounds = Rounds(site, runner, run="r")
    rounds.play(rounds.begin(), lambda _, record: first.append(record))
    assert [r["failed"] for r in first] == [None, None] and not any(r["quarantined"] for r in first)
    if folder:
        runner = LocalRunner(site, make_engine(site, "serial"), FolderStore(tmp_path))
    rounds = Rounds(site, runner, run="r")
    rounds.play(rounds.begin(), lambda _, record: again.append(record))
    for record in again:
        assert record["answered"] == 0 and record["failed"]
        assert all("already" in q["message"] for q in record["quarantined"])
        assert len(record["quarantined"]) == record["asked"]
    rounds, other = Rounds(site, runner, run="another"), []
    rounds.play(rounds.begin(), lambda _, record: other.append(record))
    assert [r["failed"] for r in other] == [None, None]


def test_a_node_without_the_setting_refuses_the_protocol():
    site = Site.load(load(None, SMALL)[0][1])
    body = heads.write(heads.KEYS, heads.SERVER, heads.session_id("run", 0))
    assert "no secure sum" in (take_part(site, MemoryStore(), Request(0, 0, body)).error or "")
