"""Rounds in virtual time: who answers when follows from the devices, and what they answer from the seed alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import (
    CLIENTS,
    CNN,
    CORE,
    MLP,
    NO_DATA,
    RESNET,
    Played,
    assemble,
    assert_same,
    finish,
    merged,
    play,
    section,
)

from fedkd import rounds as round_loop
from fedkd import simulate
from fedkd.algorithms.base import Algorithm, Answer, Card, ServerState
from fedkd.algorithms.catalogue import METHODS, build, method_class
from fedkd.algorithms.fedavg import FedAvg
from fedkd.errors import ConfigError
from fedkd.experiment import Experiment, validate
from fedkd.messages import Reply, Request
from fedkd.payloads import LabelLogits, Logits, Nothing, Payload, Prototypes, SoftLabels, Weights
from fedkd.rounds import Collected
from fedkd.runners.base import Inspection, Runner
from fedkd.site import Site

EVEN: dict[str, Any] = {
    "rounds": 3,
    "models": {"student": "logreg", "devices": ["logreg"]},
    "virtual": {
        "flops_per_second": 1e6,
        "down_bytes_per_second": 1e5,
        "up_bytes_per_second": 5e4,
        "latency_seconds": 0.25,
    },
}
PLAIN: dict[str, Any] = {"models": EVEN["models"]}
ASYNC = {"population": {"participation": 0.5, "buffer": 2}}
UNEVEN = {
    "flops_per_second": {"kind": "lognormal", "median": 2e5, "sigma": 1.0},
    "on_seconds": 8,
    "off_seconds": {"kind": "uniform", "low": 1, "high": 4},
    "cycle": "exponential",
}
SCENES: dict[str, dict[str, Any]] = {
    "synchronous": {"population": {"participation": 0.7, "dropout": 0.2, "late": 0.2}},
    # Devices that stay long enough to be overtaken: those that leave before count as dropped, not as late.
    "first to come": {
        "rounds": 7,
        "population": {"participation": 0.5, "over_selection": 0.5, "dropout": 0.1},
        "virtual": {"on_seconds": 80},
    },
    "deadline": {"population": {"deadline_seconds": 1.0}},
    "late ones used": {"population": {"deadline_seconds": 1.0, "late": 0.2, "staleness": {"limit": 2}}},
    "asynchronous": {"population": {"participation": 0.7, "buffer": 3, "dropout": 0.1, "late": 0.1}},
}


def scene(method: str, name: str, **more: Any) -> dict[str, Any]:
    raw = merged({"rounds": 5, "virtual": UNEVEN, "algorithm": section(method)}, SCENES[name])
    other = "mlp(hidden=[8, 16])" if method_class(method).heterogeneous else MLP
    return merged(merged(raw, {"models": {"student": MLP, "devices": [MLP, other]}}), more)


class Watch(Runner):
    """Remembers what was asked, block by block."""

    def __init__(self, played: Played) -> None:
        self.inner, self.name = played.runner, "watch"
        self.blocks: list[list[Request]] = []

    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        self.blocks.append(list(requests))
        yield from self.inner.ask(requests)

    def work(self, requests: Sequence[Request]) -> list[float]:
        return self.inner.work(requests)

    def inspect(self, clients: Sequence[int], round: int) -> Inspection | None:
        return self.inner.inspect(clients, round)


def watched(raw: Mapping[str, Any], **more: Any) -> tuple[Played, Watch]:
    played = assemble(raw, **more)
    watch = Watch(played)
    played.rounds.runner = watch
    return finish(played), watch


def trace(tmp_path: Path, *lines: str) -> dict[str, Any]:
    """Write devices: flops, bytes down, bytes up per second, and their windows."""
    path = tmp_path / "trace.csv"
    header = "device,flops_per_second,down_bytes_per_second,up_bytes_per_second,on_from_seconds,on_until_seconds"
    path.write_text("\n".join([header, *(f"{k},{line}" for k, line in enumerate(lines))]))
    return {"virtual": {"trace": str(path)}}


FAST, SLOW = "1e9,1e7,1e7,,", "1e4,1e7,1e7,,"


# ---- time -----------------------------------------------------------------------------------------------------------
def test_a_round_takes_as_long_as_its_slowest_device_by_hand() -> None:
    raw = merged(EVEN, {"algorithm": "fedavg", "rounds": 1, "training": {"epochs": 2}})
    played, watch = watched(raw, awkward=False)
    (record,) = played.records
    site = played.site
    most = max(len(site.private(k)) for k in range(CLIENTS))
    # A logistic regression on 64 pixels: 64 x 10 products, two operations each; a step is three passes.
    flops = 2 * most * 3 * (2 * 64 * 10)
    up, down = record["bytes_up"] / CLIENTS, record["bytes_down"] / CLIENTS
    assert record["virtual_seconds"] == pytest.approx(0.25 + down / 1e5 + flops / 1e6 + 0.25 + up / 5e4, rel=1e-12)
    assert len(watch.blocks) == 1 and len(watch.blocks[0]) == CLIENTS


def test_work_counts_every_phase_and_what_the_answer_reads() -> None:
    raw = merged(EVEN, {"algorithm": "ds_fl", "rounds": 2, "training": {"epochs": 1}, "digest": {"epochs": 3}})
    played = assemble(raw)
    seen: list[list[float]] = []
    plain = played.runner.work

    def work(requests: Sequence[Request]) -> list[float]:
        seen.append(plain(requests))
        return seen[-1]

    played.runner.work = work  # type: ignore[method-assign]
    finish(played)
    forward, proxy = 2 * 64 * 10, 40
    for k, (first, second) in enumerate(zip(*seen, strict=True)):
        own = len(played.site.private(k))
        answer = proxy if own else 0
        assert first == forward * (3 * own + answer)
        assert second == forward * (3 * own + 3 * 3 * proxy + answer)


@pytest.mark.parametrize("name", ["logreg", MLP, CNN, RESNET])
def test_operations_are_counted_as_torch_counts_them(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    site = assemble({"models": {"student": name, "devices": [name]}}).site
    architecture = site.architecture(name)
    model = architecture.module(architecture.initial(0)).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *site.shape, dtype=site.dtype))
    assert architecture.forward_flops == counter.get_total_flops() > 1000


def test_the_server_takes_its_time() -> None:
    quick, slow = (play(merged(EVEN, {"algorithm": "fedavg", "virtual": {"server_seconds": s}})) for s in (0, 7))
    for n, (a, b) in enumerate(zip(quick.records, slow.records, strict=True), 1):
        assert b["virtual_seconds"] - a["virtual_seconds"] == pytest.approx(7 * n)
    assert_student_equal(quick, slow)


def assert_student_equal(a: Played, b: Played) -> None:
    for name, tensor in a.progress.state.models["student"][1].items():
        assert torch.equal(tensor, b.progress.state.models["student"][1][name]), name


def test_without_late_or_lost_answers_time_changes_no_result() -> None:
    raw = {**PLAIN, "algorithm": "fedavg", "rounds": 3, "population": {"participation": 0.6}}
    assert_student_equal(play(raw), play(merged(raw, {"virtual": {}})))


# ---- the same everywhere -----------------------------------------------------------------------------------------------
def late_in_vain(method: str) -> bool:
    """Tell whether a method has no use for late answers: each round asks for other samples, or nothing weighs them."""
    cls = method_class(method)
    return cls.ask is not Algorithm.ask or not (cls.weighs or cls.upload is Nothing)


CASES = [
    pytest.param(m, s, marks=[] if m in ("fedavg", "fd") or (s == "asynchronous" and m in CORE) else pytest.mark.slow)
    for m in METHODS
    for s in SCENES
    if not (method_class(m).upload is Nothing and s in ("asynchronous", "first to come"))
    if not (late_in_vain(m) and s in ("asynchronous", "late ones used"))
]


@pytest.mark.parametrize(("method", "name"), CASES)
def test_timeline_and_student_do_not_depend_on_how_devices_are_run(method: str, name: str) -> None:
    # Compressed lengths would depend on the last bit of a float, and with them the timeline.
    raw = scene(method, name, codec={"up": "float64", "down": "float64"})
    serial = play(raw)
    assert_same(serial, play(raw, kind="stacked", block=3), 1e-9)
    times = [record["virtual_seconds"] for record in serial.records]
    assert times == sorted(times) and times[0] > 0
    if method != "central":
        # The scenario must really hold what it is there for.
        total = Counter[str]()
        for record in serial.records:
            total.update({k: record[k] for k in ("dropped", "late")})
            total["stale"] += bool(record["staleness"])
        wanted = {"synchronous": "dropped", "deadline": "late", "first to come": "late"}.get(name, "stale")
        assert total[wanted] > 0 or method_class(method).upload is Nothing


def test_the_seed_decides_the_timeline() -> None:
    raw = scene("fedavg", "asynchronous")
    first, again, other = play(raw), play(raw), play(merged(raw, {"seed": 2}))
    assert_same(first, again, 0.0)
    assert [r["virtual_seconds"] for r in first.records] != [r["virtual_seconds"] for r in other.records]


@pytest.mark.parametrize("name", SCENES)
def test_every_request_comes_to_one_end(name: str) -> None:
    played = play(scene("fedavg", name, rounds=12))
    total = Counter[str]()
    for record in played.records:
        total.update({k: record[k] for k in ("asked", "answered", "abstained", "dropped", "late")})
        assert record["quarantined"] == []
    ended = total["answered"] + total["abstained"] + total["dropped"] + total["late"]
    assert total["asked"] == ended + played.records[-1]["in_flight"]


# ---- who is waited for --------------------------------------------------------------------------------------------------
def test_over_selection_takes_the_first_to_come(tmp_path: Path) -> None:
    fast = [1, 2, 5, 7]
    devices = trace(tmp_path, *(FAST if k in fast else SLOW for k in range(CLIENTS)))
    raw = merged(
        {**PLAIN, "algorithm": "fedavg", "rounds": 1, "population": {"participation": 0.5, "over_selection": 1.0}},
        devices,
    )
    played = play(raw, awkward=False)
    (record,) = played.records
    assert (record["asked"], record["answered"], record["late"]) == (8, 4, 4)
    assert sorted(played.progress.heard) == fast
    assert record["virtual_seconds"] < 0.1


def test_a_deadline_closes_the_round_and_the_slow_are_not_asked_while_they_work(tmp_path: Path) -> None:
    devices = trace(tmp_path, SLOW, *[FAST] * (CLIENTS - 1))
    raw = merged({**PLAIN, "algorithm": "fedavg", "rounds": 4, "population": {"deadline_seconds": 1.0}}, devices)
    played, watch = watched(raw, awkward=False)
    needs = len(played.site.private(0)) * 3 * (2 * 64 * 10) / 1e4
    assert needs > 2, "the slow device must need longer than all rounds"
    assert [r["asked"] for r in played.records] == [8, 7, 7, 7]
    assert [r["late"] for r in played.records] == [1, 0, 0, 0]
    assert played.records[0]["virtual_seconds"] == 1.0
    assert played.records[-1]["virtual_seconds"] < 1.1, "nobody waits for the slow device any more"
    assert 0 not in played.progress.heard
    assert Counter(r.client for block in watch.blocks for r in block)[0] <= 1


def test_a_late_answer_counts_where_the_limit_allows_it(tmp_path: Path) -> None:
    needs = len(assemble(EVEN, awkward=False).site.private(0)) * 3 * (2 * 64 * 10)
    devices = trace(tmp_path, f"{needs / 0.2015},1e7,1e7,,", *[FAST] * (CLIENTS - 1))
    raw = merged({**PLAIN, "algorithm": "fedavg", "rounds": 4, "population": {"deadline_seconds": 0.2}}, devices)
    strict, mild = (play(merged(raw, {"population": {"staleness": {"limit": n}}}), awkward=False) for n in (0, 3))
    assert 0 not in strict.progress.heard and strict.records[0]["late"] == 1
    assert 0 in mild.progress.heard and mild.records[0]["late"] == 0
    assert mild.records[0]["in_flight"] == 1 and strict.records[0]["in_flight"] == 0
    assert max(r["staleness"] for r in mild.records) > 0 == max(r["staleness"] for r in strict.records)
    # Until then both are the same; the upload of the answer that nobody used is counted all the same.
    assert strict.records[0]["student_accuracy"] == mild.records[0]["student_accuracy"]
    assert sum(r["bytes_up"] for r in strict.records) >= sum(r["bytes_up"] for r in mild.records) * 0.8


@pytest.mark.parametrize("virtual", [None, {}])
def test_answers_held_back_by_bad_luck_come_in_the_next_round(virtual: dict[str, Any] | None) -> None:
    raw = {
        "algorithm": "fedavg",
        "rounds": 2,
        "population": {"late": 1.0, "staleness": {"limit": 1}},
        "virtual": virtual,
    }
    played = play(raw, awkward=False)
    first, second = played.records
    assert (first["answered"], first["in_flight"], first["bytes_up"]) == (0, 8, 0)
    assert (second["asked"], second["answered"], second["staleness"]) == (
        0 if virtual is None else second["asked"],
        8,
        1.0,
    )


def test_devices_that_are_away_are_waited_for(tmp_path: Path) -> None:
    later = "1e9,1e7,1e7,100,1000"
    raw = merged(
        {**PLAIN, "algorithm": "fedavg", "rounds": 1, "population": {"minimum": 8}}, trace(tmp_path, later, *[FAST] * 7)
    )
    (record,) = play(raw, awkward=False).records
    assert record["answered"] == 8 and 100 < record["virtual_seconds"] < 101
    (record,) = play(merged(raw, {"population": {"minimum": 1}}), awkward=False).records
    assert record["answered"] == 7 and record["virtual_seconds"] < 1


def test_when_nobody_comes_any_more_the_rounds_fail_and_end(tmp_path: Path) -> None:
    gone = "1e9,1e7,1e7,0,0.001"
    raw = merged({**PLAIN, "algorithm": "fedavg", "rounds": 2}, trace(tmp_path, *[gone] * CLIENTS))
    records = play(raw, awkward=False).records
    assert [r["asked"] for r in records] == [8, 0] and all(r["failed"] for r in records)
    assert records[0]["dropped"] == 8


def test_devices_that_are_never_there_together_do_not_keep_a_round_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round_loop, "MAX_WAITS", 50)
    turns = [f"1e9,1e7,1e7,{10 * k},{10 * k + 5}" for k in range(CLIENTS)]
    more = {**PLAIN, "algorithm": "fedavg", "rounds": 2, "virtual": {"repeat_seconds": 80}}
    raw = merged({**more, "population": {"minimum": 2}}, trace(tmp_path, *turns))
    records = play(raw, awkward=False).records
    assert [r["asked"] for r in records] == [0, 0] and "never were there as many" in records[0]["failed"]
    assert "population.minimum" in records[0]["failed"] and "(2)" in records[0]["failed"]
    (record, *_) = play(merged(raw, {"population": {"minimum": 1}}), awkward=False).records
    assert record["answered"] == 1 and record["failed"] is None


def test_who_leaves_at_work_keeps_its_old_state_and_who_leaves_while_sending_has_sent_a_part(tmp_path: Path) -> None:
    # Device 0 leaves within its work, device 1 within its upload.
    lines = ["1e4,1e9,1e9,0,1", "1e12,1e9,1e3,0,1", *[FAST] * (CLIENTS - 2)]
    raw = merged({**PLAIN, "algorithm": "ds_fl", "rounds": 1}, trace(tmp_path, *lines))
    played, watch = watched(raw, awkward=False)
    (record,) = played.records
    assert record["dropped"] == 2 and record["answered"] == 6
    asked = [r.client for block in watch.blocks for r in block]
    assert 0 not in asked and 1 in asked, "work that is lost anyway is not run"
    assert played.runner.store.load(0, 1).state is None and played.runner.store.load(1, 1).state is not None
    whole = (record["bytes_up"] - 1000) / 6
    assert whole == pytest.approx(round(whole), abs=0.2), "one second at 1,000 bytes per second"


def test_a_device_that_drops_out_is_noticed_on_the_way() -> None:
    raw = merged(EVEN, {**PLAIN, "algorithm": "fedavg", "rounds": 1, "population": {"dropout": 1.0}})
    played, watch = watched(raw)
    (record,) = played.records
    longest = play(merged(raw, {"population": {"dropout": 0.0}})).records[0]["virtual_seconds"]
    assert record["dropped"] == CLIENTS and 0 < record["virtual_seconds"] < longest
    assert watch.blocks == []


# ---- asynchronous rounds --------------------------------------------------------------------------------------------------
def test_asynchronous_rounds_close_at_the_buffer_and_keep_devices_busy() -> None:
    played, watch = watched(
        merged(EVEN, {"algorithm": "fedavg", "rounds": 20, "virtual": UNEVEN, **ASYNC}), awkward=False
    )
    assert all(r["answered"] == 2 for r in played.records)
    assert all(r["in_flight"] <= 4 for r in played.records)
    assert max(r["staleness"] for r in played.records) > 1
    names = Counter((r.client, r.round) for block in watch.blocks for r in block)
    assert set(names.values()) == {1}, "(device, round) names an answer"
    sync = play(
        merged(EVEN, {"algorithm": "fedavg", "rounds": 20, "virtual": UNEVEN, "population": {"participation": 0.5}})
    )
    assert played.records[-1]["virtual_seconds"] < sync.records[-1]["virtual_seconds"] / 2


def test_requests_queue_so_that_asynchronous_runs_are_stackable() -> None:
    raw = merged(EVEN, {"algorithm": "fedavg", "rounds": 10, "partition": {"clients": 60}, "data": {"train_size": 600}})
    raw = merged(raw, {"virtual": {"flops_per_second": {"kind": "uniform", "low": 1e6, "high": 2e6}}})
    _, watch = watched(merged(raw, {"population": {"participation": 0.5, "buffer": 10}}), awkward=False)
    sizes = [len(block) for block in watch.blocks]
    assert sizes[0] == 30 and np.mean(sizes) > 5


def test_devices_without_records_and_a_buffer_that_is_never_full_do_not_stop_the_clock() -> None:
    played = play(merged(EVEN, {"algorithm": "fedavg", "population": {"buffer": 8}}))
    assert len(played.site.private(NO_DATA)) == 0
    assert [r["answered"] for r in played.records] == [7, 7, 7]


# ---- what a late answer is worth ------------------------------------------------------------------------------------------
def test_staleness_weights() -> None:
    staleness = validate({"population": {"staleness": {"power": 0.5}}}).population.staleness
    assert [staleness.weight(s) for s in (0, 3, 8)] == [1, 0.5, pytest.approx(1 / 3)]
    constant = staleness.model_copy(update={"weighting": "constant"})
    assert constant.weight(8) == 1


def example(method: str, k: int, seed: int) -> Payload:
    rng = torch.Generator().manual_seed(100 * seed + k)
    x = torch.rand(5, 3, generator=rng, dtype=torch.float64)
    kind = method_class(method).upload
    if kind is SoftLabels:
        return SoftLabels(labels=x / x.sum(-1, keepdim=True))
    if kind is Logits:
        return Logits(logits=x)
    if kind is LabelLogits:
        return LabelLogits(logits=x[:3], held=(x[0] > 0.3).double())
    if kind is Prototypes:
        return Prototypes(means=x[:3], counts=(10 * x[1]).floor())
    return Weights.from_tensors({"head.weight": x})


class Ensemble:
    """Stands for the server's tools: a model's logits are its weights."""

    asked = np.arange(5)

    def logits(self, models: Sequence[tuple[str, Mapping[str, torch.Tensor]]], _: np.ndarray) -> Iterator[torch.Tensor]:
        yield from (weights["head.weight"] for _, weights in models)

    def trainable(self, architecture: str) -> tuple[str, ...]:
        return ("head.weight",)


def tensors(method: Any, payload: Payload) -> dict[str, torch.Tensor]:
    """Return what a stranger would be told, or the knowledge itself."""
    state = ServerState(round=1, models={}, knowledge=payload, asked=np.arange(5))
    told = method.broadcast(state, Card(id=99, architecture="m")) if method.name == "fd" else payload
    return dict(told.tensors())


@pytest.mark.parametrize("method", [m for m in CORE if method_class(m).weighs])
def test_an_answer_of_weight_two_counts_like_two(method: str) -> None:
    """And one of weight a half like half a one: weights mean the same in every method that claims to know them."""
    built: Any = build({"name": method})
    state = ServerState(round=1, models={}, knowledge=Nothing(), asked=np.arange(5))

    def answer(k: int, card: int, weight: float) -> Answer:
        return Answer(
            card=Card(id=card, architecture="m"), payload=example(method, k, 1), examples=1.0 + k, weight=weight
        )

    def knowledge(*given: Answer) -> dict[str, torch.Tensor]:
        return tensors(built, built.aggregate(Collected(given), state, Ensemble()))

    double = knowledge(answer(0, 0, 2.0), answer(1, 1, 1.0), answer(2, 2, 1.0))
    twice = knowledge(answer(0, 0, 1.0), answer(0, 3, 1.0), answer(1, 1, 1.0), answer(2, 2, 1.0))
    halves = knowledge(answer(0, 0, 1.0), answer(1, 1, 0.5), answer(2, 2, 0.5))
    plain = knowledge(answer(0, 0, 1.0), answer(1, 1, 1.0), answer(2, 2, 1.0))
    for name, value in double.items():
        if name == "counts":
            continue  # how many records stand behind a mean, not what it is
        assert torch.allclose(value, twice[name], atol=1e-12), name
        assert torch.allclose(value, halves[name], atol=1e-12), name
    assert any(not torch.allclose(value, plain[name], atol=1e-6) for name, value in double.items())


@pytest.mark.parametrize("method", [m for m in CORE if method_class(m).upload is not Nothing])
def test_every_method_takes_late_answers(method: str) -> None:
    """All of them weigh; one that did not would say so and take constant weights alone."""
    assert method_class(method).weighs


def test_a_late_update_is_added_to_the_present_weights_as_in_fedbuff() -> None:
    def weights(value: float, buffer: float) -> Weights:
        found = Weights.from_tensors({"w": torch.tensor([value]), "mean": torch.tensor([buffer]), "n": torch.tensor(7)})
        assert isinstance(found, Weights)
        return found

    class Tools(Ensemble):
        def trainable(self, architecture: str) -> tuple[str, ...]:
            return ("w",)

    method = FedAvg()
    state = ServerState(round=4, models={}, knowledge=weights(10.0, 1.0), asked=np.arange(0))
    answer = Answer(card=Card(id=0, architecture="m"), payload=weights(3.0, 5.0), examples=8.0, weight=0.5)
    made = method.catch_up(answer, weights(1.0, 9.0), state, Tools())  # type: ignore[arg-type]
    found = made.payload.tensors()
    assert found["w"].item() == 10 + 0.5 * (3 - 1) and found["mean"].item() == 1 + 0.5 * (5 - 1)
    assert found["n"].item() == 7 and made.weight == 1.0 and made.examples == 8.0


def test_asynchronous_averaging_is_the_buffered_update() -> None:
    """One device, one answer in the buffer: with nobody else around, asynchronous is synchronous, bit for bit."""
    alone = {"algorithm": "fedavg", "rounds": 4, "partition": {"clients": 1}, "virtual": {}}
    both = [play(merged(alone, {"population": p}), awkward=False) for p in ({}, {"buffer": 1})]
    assert_student_equal(*both)
    assert all(r["staleness"] == 0 for r in both[1].records)


@pytest.mark.parametrize("method", ["fedavg", "ds_fl", "fd"])
def test_staleness_weights_reach_the_student_or_the_devices(method: str) -> None:
    raw = scene(method, "asynchronous")
    mild, strict = (play(merged(raw, {"population": {"staleness": {"power": p}}})) for p in (0.0, 3.0))
    with pytest.raises(AssertionError):
        assert_same(mild, strict, 1e-6)
    assert [r["virtual_seconds"] for r in mild.records] == [r["virtual_seconds"] for r in strict.records]


# ---- refusals -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"population": {"buffer": 3}}, "switch virtual time on"),
        ({"population": {"deadline_seconds": 3}}, "switch virtual time on"),
        ({"population": {"over_selection": 0.3}}, "switch virtual time on"),
        ({"population": {"buffer": 3}, "virtual": {}, "algorithm": "local"}, "sends nothing up"),
        ({"population": {"buffer": 3, "over_selection": 1}, "virtual": {}}, "for synchronous rounds"),
        ({"population": {"buffer": 3, "minimum": 4}, "virtual": {}}, "every round would fail"),
        ({"population": {"buffer": 3}, "virtual": {}, "algorithm": "drafts:Deaf"}, "counts all answers alike"),
    ],
)
def test_what_cannot_work_is_refused_when_the_experiment_is_read(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(raw)


def test_a_method_that_cannot_weigh_takes_late_answers_of_constant_weight() -> None:
    population = {"buffer": 3, "staleness": {"weighting": "constant"}}
    played = play(merged(EVEN, {"algorithm": "drafts:Deaf", "virtual": UNEVEN, "population": population}))
    assert max(r["staleness"] for r in played.records) > 0


@pytest.mark.parametrize("method", ["ds_fl", "cfd", "fedmd"])
def test_answers_to_proxy_samples_need_the_same_samples_every_round(method: str) -> None:
    raw = {"algorithm": method, "proxy_per_round": 13, "virtual": {}, "population": {"buffer": 2}}
    with pytest.raises(ConfigError, match="take out proxy_per_round"):
        play(raw)
    play(merged(raw, {"proxy_per_round": None, "rounds": 1}))
    play(merged(raw, {"population": {"staleness": {"limit": 0}}, "rounds": 1}))


@pytest.mark.parametrize("method", ["fedavg", "feddf", "fedproto"])
def test_other_methods_may_ask_for_other_samples_every_round(method: str) -> None:
    models = {"models": {"student": MLP, "devices": [MLP]}}
    played = play({"algorithm": method, "proxy_per_round": 13, "virtual": UNEVEN, **ASYNC, **models, "rounds": 10})
    assert max(r["staleness"] for r in played.records) > 0


def test_a_real_network_has_no_virtual_time() -> None:
    class Real(Watch):
        def work(self, requests: Sequence[Request]) -> list[float]:
            return Runner.work(self, requests)

    played = assemble(merged(EVEN, {"algorithm": "fedavg"}))
    played.rounds.runner = Real(played)
    with pytest.raises(ConfigError, match="virtual time is for simulations"):
        finish(played)


# ---- resume ---------------------------------------------------------------------------------------------------------------
class Interrupt:
    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, record: Mapping[str, Any], rounds: int) -> None:
        if record["round"] + 1 == self.after:
            raise KeyboardInterrupt


def disk(method: str, name: str, **more: Any) -> Experiment:
    raw = {
        "rounds": 6,
        "algorithm": method,
        "partition": {"clients": 8, "alpha": 0.3},
        "proxy": {"size": 60},
        "training": {"epochs": 1, "batch_size": 16, "optimizer": {"momentum": 0.9, "persist": True}},
        "digest": {"epochs": 1},
        "server": {"epochs": 1},
        "evaluation": {"local_only": False, "clients_every": 1},
        "models": PLAIN["models"],
        "virtual": UNEVEN,
        **SCENES[name],
    }
    return validate(merged(raw, more))


DELTA = {"codec": {"up": "float32+delta", "down": "float32+delta"}}


@pytest.mark.parametrize(
    ("method", "name", "more"),
    [
        ("fedavg", "asynchronous", {}),
        ("fedavg", "asynchronous", DELTA),
        ("ds_fl", "asynchronous", DELTA),
        ("fd", "asynchronous", {}),
        ("feddf", "late ones used", {"models": {"student": "mlp", "devices": ["mlp(hidden=[8])", "logreg"]}}),
        ("fedproto", "deadline", {}),
        ("ds_fl", "late ones used", {"virtual": None, "population": {"deadline_seconds": None}}),
    ],
)
def test_resume_is_exact_with_requests_under_way(method: str, name: str, more: dict[str, Any], tmp_path: Path) -> None:
    whole, cut = tmp_path / "a" / "run", tmp_path / "b" / "run"
    simulate.start(disk(method, name, **more), whole)
    with pytest.raises(KeyboardInterrupt):
        simulate.start(disk(method, name, **more), cut, Interrupt(2))
    for stop in (3, 5):
        with pytest.raises(KeyboardInterrupt):
            simulate.resume(cut, Interrupt(stop))
    simulate.resume(cut)

    def left(folder: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
        import json

        rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        for row in rows:
            del row["seconds"]
        last = max((folder / "checkpoints").iterdir())
        return rows, {f.name: f.read_bytes() for f in last.iterdir() if f.name != "server.safetensors"}

    assert left(cut)[0] == left(whole)[0]
    devices = {n: b for n, b in left(cut)[1].items() if n.startswith("devices")}
    assert devices == {n: b for n, b in left(whole)[1].items() if n.startswith("devices")}
    assert max(row["in_flight"] for row in left(whole)[0][:5]) > 0 or name == "deadline"


def test_a_flight_is_saved_whole() -> None:
    from fedkd.virtual.flights import Flight, pack, unpack

    shared, heard = b"the same message", SoftLabels(labels=torch.eye(3))
    flights = [
        Flight(Request(4, 2, shared, 1), "working", 3.5, late=True, heard=heard),
        Flight(Request(1, 3, shared), "sending", 4.25, reply=Reply(1, 3, b"up", None, (("train", 0.1),)), heard=heard),
        Flight(Request(7, 3, b""), "lost", 5.0, reply=Reply(7, 3, None, "broken"), given_up=True, lost_bytes=9),
    ]
    stored, notes = pack(flights)
    back = unpack(stored, notes)
    assert len([name for name in stored if name.startswith("body")]) == 2, "a shared message is stored once"
    assert back[4].request.body is back[1].request.body and back[4].heard is back[1].heard
    for flight in flights:
        mine = back[flight.request.client]
        assert isinstance(mine.heard, SoftLabels) == (flight.heard is not None)
        assert replace(mine, heard=None) == replace(flight, heard=None)
    assert math.isclose(back[7].at, 5.0)


def test_the_local_baseline_beside_a_run_in_virtual_time_is_plain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedkd.cli.main import tell

    summary = simulate.start(disk("fedavg", "asynchronous", evaluation={"local_only": True}), tmp_path / "run").summary
    assert summary["accuracy"]["local_only"] is not None and summary["virtual_seconds"] > 0
    tell(summary, tmp_path)
    assert f"virtual time         {summary['virtual_seconds'] / 3600:.2f} h" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mnist-async.yaml"])
def test_the_experiment_and_the_example_trace_are_valid(name: str) -> None:
    from fedkd.experiment import load
    from fedkd.virtual.world import World

    folder = Path(__file__).parents[2] / "simulations"
    ((_, found),) = load(folder / name)
    assert found.virtual is not None and found.population.buffer == 5
    virtual = {"trace": str(folder / "traces" / "devices.csv"), "repeat_seconds": 86_400}
    world = World(validate({"virtual": virtual}).virtual or found.virtual, 1, 5)
    # phone-a's window before midnight runs on into the one after it.
    assert world.there(80_000.0)[0] and world.leaves(0) == 86_400 + 21_600
    assert world.there(80_000.0)[4] and not world.there(80_000.0)[3]


def test_site_is_checked_before_records_are_trained() -> None:
    with pytest.raises(ConfigError, match="cannot read the trace"):
        played = assemble({"virtual": {"trace": "/nowhere.csv"}})
        assert isinstance(played.site, Site)
