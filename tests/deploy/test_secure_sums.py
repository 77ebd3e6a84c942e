"""Secure sums on a real network: the simulator's sum, drop-outs at every step, and servers that lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inprocess import Network, Wire, experiment
from safetensors.torch import load_file

from fedkd import simulate
from fedkd.deploy.device import SUMS
from fedkd.deploy.mail import Ask, Say, key_of
from fedkd.deploy.network import NetworkRunner
from fedkd.deploy.outbox import Outbox
from fedkd.errors import ConfigError
from fedkd.experiment import Experiment
from fedkd.privacy.build import LEDGER
from fedkd.privacy.ledger import Ledger
from fedkd.privacy.secure import heads, protocol
from fedkd.privacy.secure.heads import DEAL, KEYS, MASKED, RELAY, SERVER, UNMASK, session_id
from fedkd.privacy.secure.protocol import Collector, Session, signed

CLIENTS = 5


def secure(*, minimum: int = 3, rounds: int = 1, kind: str = "none", **changes: Any) -> Experiment:
    privacy = {"kind": kind, "secure_sum": True, **changes.pop("privacy", {})}
    return experiment(CLIENTS, rounds=rounds, population={"minimum": minimum}, privacy=privacy, **changes)


def step_of(ask: Ask) -> int:
    return heads.read_step(ask.request) if heads.is_message(ask.request) else MASKED


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / simulate.ROWS).read_text().splitlines()]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Network:
    made = Network(tmp_path_factory.mktemp("net"), CLIENTS)
    runner = made.runner(secure())
    assert runner.proxy is not None
    for kit in made.kits.values():
        # So that every device answers at once, and a short deadline finds the silent alone.
        (kit.state / "proxies").mkdir(parents=True)
        (kit.state / "proxies" / f"{runner.outline['proxy']['sha256']}.proxy").write_bytes(runner.proxy)
    return made


@pytest.fixture
def network(shared: Network) -> Iterator[Network]:
    """The kits of the module; every test has runs of its own on them."""
    yield shared
    shared.wire.twist = None
    shared.wire.offline = set()
    for client in range(CLIENTS):
        shared.restart(client)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What devices put in, and what the server got out."""
    seen: dict[str, Any] = {"in": {}, "out": []}
    masked, total = Session.masked, Collector.total

    def put(self: Session, vector: Any, terms: Any) -> bytes:
        seen["in"][self.client] = vector.copy()
        return masked(self, vector, terms)

    def got(self: Collector, replies: Any) -> Any:
        found = total(self, replies)
        seen["out"].append((sorted(self.vectors), found, self.terms))
        return found

    monkeypatch.setattr(Session, "masked", put)
    monkeypatch.setattr(Collector, "total", got)
    return seen


def assert_exact(sums: dict[str, Any], devices: list[int]) -> None:
    """The server has the sum of the vectors of ``devices``."""
    ((of, found, terms),) = sums["out"]
    assert of == devices
    total = np.zeros(terms.length, np.uint32)
    for client in devices:
        total += sums["in"][client]
    np.testing.assert_array_equal(found, signed(total, terms.bits))
    assert found.any()


def test_the_student_is_the_simulators_to_the_bit(network: Network, tmp_path: Path) -> None:
    chosen = secure(rounds=2)
    simulated = simulate.start(chosen, tmp_path / "simulated").folder
    found = network.play(chosen, tmp_path / "run", "equal")
    ours, theirs = load_file(found.folder / simulate.STUDENT), load_file(simulated / simulate.STUDENT)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for mine, other in zip(rows(found.folder), rows(simulated), strict=True):
        assert mine["answered"] == CLIENTS and mine["failed"] is None and mine["quarantined"] == []
        assert mine["bytes_up"] == other["bytes_up"]
    said = [step_of(ask) for client, ask in network.wire.sent if client == 0 and ask.run == "trial.equal"]
    assert [step for step in said if step != MASKED] == [KEYS, DEAL, RELAY, UNMASK] * 2
    for kit in network.kits.values():
        assert not list((kit.state / "runs" / "trial.equal").rglob("session.json")), "a session that ended is kept"


@pytest.mark.parametrize("step", [KEYS, DEAL, RELAY, MASKED, UNMASK])
def test_devices_that_drop_out_at_a_step_are_left_out_of_the_sum(
    step: int, network: Network, sums: dict[str, Any], tmp_path: Path
) -> None:
    def silent(wire: Wire, client: int, ask: Ask, honest: Callable[[], Any]) -> Any:
        return "silence" if client in (1, 3) and step_of(ask) >= step else honest()

    network.wire.twist = silent
    chosen = secure(deployment={"deadline_seconds": 0.3, "probe_seconds": 100.0})
    (row,) = rows(network.play(chosen, tmp_path / "run", f"step-{step}").folder)
    left = [0, 2, 4] if step != UNMASK else [0, 1, 2, 3, 4]
    assert (row["failed"], row["answered"], row["late"], row["quarantined"]) == (None, len(left), 5 - len(left), [])
    assert_exact(sums, left)


def test_a_cohort_below_the_minimum_gives_no_sum(network: Network, sums: dict[str, Any], tmp_path: Path) -> None:
    def silent(wire: Wire, client: int, ask: Ask, honest: Callable[[], Any]) -> Any:
        return "silence" if client in (1, 3) and step_of(ask) == MASKED else honest()

    network.wire.twist = silent
    chosen = secure(minimum=4, deployment={"deadline_seconds": 0.3, "probe_seconds": 100.0})
    (row,) = rows(network.play(chosen, tmp_path / "run", "few").folder)
    assert "3 answers, at least 4" in row["failed"] and sums["out"] == []


def test_a_device_that_restarts_between_two_messages_goes_on(
    network: Network, sums: dict[str, Any], tmp_path: Path
) -> None:
    """As Flower's own node does, which starts a process per message."""

    def restarted(wire: Wire, client: int, ask: Ask, honest: Callable[[], Any]) -> Any:
        network.restart(client)
        return honest()

    network.wire.twist = restarted
    (row,) = rows(network.play(secure(), tmp_path / "run", "restarts").folder)
    assert row["failed"] is None
    assert_exact(sums, [0, 1, 2, 3, 4])


@pytest.mark.parametrize("step", [DEAL, MASKED])
def test_a_device_that_is_killed_within_a_step_drops_out(
    step: int, network: Network, sums: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its step counts as answered, although no answer left: it is not answered a second time."""
    killed: list[int] = []

    class Killed(BaseException):
        pass

    put = Outbox.put

    def die(self: Outbox, round: int, key: str, answer: bytes) -> None:
        now = heads.read_step(answer)
        if "client-1" in str(self.folder) and now == step and not killed:
            killed.append(now)
            raise Killed
        put(self, round, key, answer)

    def fragile(wire: Wire, client: int, ask: Ask, honest: Callable[[], Any]) -> Any:
        try:
            return honest()
        except Killed:
            network.restart(client)
            return None  # lost: it is asked again

    monkeypatch.setattr(Outbox, "put", die)
    network.wire.twist = fragile
    (row,) = rows(network.play(secure(), tmp_path / "run", f"killed-{step}").folder)
    assert killed == [step] and row["failed"] is None and [q["client"] for q in row["quarantined"]] == [1]
    assert_exact(sums, [0, 2, 3, 4])


def test_a_lost_answer_is_sent_again_and_a_resumed_server_gets_the_same_sum(
    network: Network, sums: dict[str, Any], tmp_path: Path
) -> None:
    lost: set[str] = set()

    def lose_first(wire: Wire, client: int, ask: Ask, honest: Callable[[], Any]) -> Any:
        came = honest()
        if ask.key in lost:
            return came
        lost.add(ask.key)
        return None

    network.wire.twist = lose_first
    first = network.play(secure(), tmp_path / "a", "again")
    assert_exact(sums, [0, 1, 2, 3, 4])
    assert len(lost) == 5 * CLIENTS
    # The server's memory of the round is gone altogether; it asks the very same, and is sent the very same.
    sums["out"].clear()
    given = dict(sums["in"])
    second = network.play(secure(), tmp_path / "b", "again")
    assert_exact(sums, [0, 1, 2, 3, 4])
    assert all(given[k] is sums["in"][k] for k in given), "no device computed a second vector"
    ours, theirs = load_file(first.folder / simulate.STUDENT), load_file(second.folder / simulate.STUDENT)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["votes", "dp_sgd"])
def test_every_device_pays_on_its_own_disk_before_its_vector_leaves(
    kind: str, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    privacy = {"noise_multiplier": 1.5, **({"sampling_rate": 0.1} if kind == "dp_sgd" else {})}
    chosen = secure(kind=kind, privacy=privacy, training={"steps": 3})
    run, paid = f"trial.{kind}", []
    unit: Any = "record" if kind == "dp_sgd" else "client"
    masked = Session.masked

    def look(self: Session, vector: Any, terms: Any) -> bytes:
        assert self.client in Ledger(network.kits[self.client].state / LEDGER).charged(run, 0, unit)
        paid.append(self.client)
        return masked(self, vector, terms)

    monkeypatch.setattr(Session, "masked", look)
    found = network.play(chosen, tmp_path / "run", kind)
    (row,) = rows(found.folder)
    assert row["failed"] is None and paid == [0, 1, 2, 3, 4]
    spent = []
    for kit in network.kits.values():
        mine = [s for s in Ledger(kit.state / LEDGER).spent(1e-5) if s.unit == unit]
        spent += [s.epsilon for s in mine]
    # One charge for the round and none for its keys and shares; the server says what its devices spent at most.
    assert found.summary["epsilon"] == row["epsilon"] == pytest.approx(max(spent), rel=1e-6) and max(spent) > 0


# ---- servers that lie -----------------------------------------------------------------------------------------------
class Liar:
    """A server that sends whatever it wants in round 0 of its run."""

    def __init__(self, network: Network, token: str, chosen: Experiment) -> None:
        self.network, self.runner = network, network.runner(chosen, token)
        self.terms = self.runner.site.mechanism.terms  # type: ignore[attr-defined]
        self.id = session_id(self.runner.run, 0)
        self.collector = Collector(self.terms, self.id)

    def letter(self, client: int, body: bytes, **changes: Any) -> Ask:
        return letter(self.runner, client, body, **changes)

    def tell(self, client: int, body: bytes, **changes: Any) -> Say:
        return self.network.wire.devices[client].handle(self.letter(client, body, **changes))

    def open(self) -> None:
        for client in range(CLIENTS):
            say = self.tell(client, self.collector.opening())
            assert say.answer is not None, say.message
            self.collector.take_keys(client, say.answer)

    def roster(self, clients: list[int]) -> bytes:
        rows = b"".join(protocol._ROW_KEYS.pack(k, *self.collector.roster[k]) for k in clients)
        return heads.write(DEAL, SERVER, self.id, rows)

    def names(self, clients: list[int]) -> bytes:
        return heads.write(UNMASK, SERVER, self.id, b"".join(protocol._ROW_ID.pack(k) for k in clients))


def letter(runner: NetworkRunner, client: int, body: bytes, **changes: Any) -> Ask:
    told = {"round": 0, "holds": -1, "experiment": runner.outline, **changes}
    key = key_of(runner.run, client, told["round"], told["holds"], told["experiment"], body)
    return Ask(run=runner.run, client=client, key=key, request=body, proxy=runner.proxy, **told)


def refused(say: Say, words: str, reason: str = "device") -> None:
    assert (say.kind, say.reason) == ("refused", reason) and words in say.message, say


def test_a_second_roster_and_a_small_one_are_refused(network: Network) -> None:
    liar = Liar(network, "rosters", secure())
    liar.open()
    refused(liar.tell(0, liar.roster([0, 1])), "a roster of 2 devices, at least 3")
    refused(liar.tell(0, liar.roster([1, 2, 3])), "this device's own keys")
    stranger = protocol._ROW_KEYS.pack(CLIENTS, b"a" * 32, b"b" * 32)
    refused(liar.tell(0, liar.roster([0, 1, 2]) + stranger), f"device {CLIENTS} of a federation of {CLIENTS}")
    assert liar.tell(0, liar.roster([0, 1, 2])).answer is not None
    refused(liar.tell(0, liar.roster([0, 2, 3])), "a step is answered once")
    assert liar.tell(0, liar.roster([0, 1, 2])).answer is not None, "the same once more is a retry"


def test_a_round_has_one_session_whatever_the_server_says_beside_it(network: Network) -> None:
    liar = Liar(network, "sessions", secure(rounds=2))
    liar.open()
    opening = liar.collector.opening()
    keys = liar.tell(0, opening).answer
    assert keys is not None and keys == liar.tell(0, opening).answer
    refused(liar.tell(0, opening, holds=0), "was opened already")
    other = {**liar.runner.outline, "name": "another"}
    refused(liar.tell(0, opening, experiment=other), "was opened already")
    network.restart(0)
    for path in (network.kits[0].state / "runs" / liar.runner.run).rglob("*"):
        if path.is_file():
            path.unlink()
    refused(liar.tell(0, opening), "was opened already")
    refused(liar.tell(1, heads.write(KEYS, SERVER, session_id(liar.runner.run, 1))), "another run or round")
    register = network.kits[2].state / SUMS
    before = register.read_bytes()
    register.write_bytes(b"torn")
    following = heads.write(KEYS, SERVER, session_id(liar.runner.run, 1))
    refused(liar.tell(2, following, round=1), "joins no secure sum until it can")
    register.write_bytes(before)


def test_nobody_gets_both_secrets_of_a_device(network: Network) -> None:
    """Two lists of survivors, one with and one without a device, would uncover its vector."""
    liar = Liar(network, "both", secure(rounds=2))
    liar.open()
    sent: dict[int, bytes] = {}
    wire, runner = network.wire, liar.runner
    # The whole session up to the vectors, by the library's own server.
    collector = liar.collector
    for client in range(CLIENTS):
        collector.take_shares(client, liar.tell(client, collector.roster_message()).answer or b"")
    for client in range(CLIENTS):
        collector.take_ready(client, liar.tell(client, collector.relay_message(client)).answer or b"")
    refused(liar.tell(0, liar.names([0, 1, 2])), "a step is answered once")
    request = first_request(runner)
    for client in range(CLIENTS):
        sent[client] = liar.tell(client, request).answer or b""
        collector.take_masked(client, sent[client])
    refused(liar.tell(0, request, holds=3), "already")
    refused(liar.tell(0, liar.names([0, 1])), "a sum over 2 devices, at least 3")
    refused(liar.tell(0, liar.names([1, 2, 3])), "its vector is not in the sum")
    refused(liar.tell(0, liar.names([0, 1, 2, 7])), "not all of this session")
    assert liar.tell(0, liar.names([0, 1, 2])).answer is not None
    for second in ([0, 1, 2, 3], [0, 1, 2, 3, 4]):
        refused(liar.tell(0, liar.names(second)), "no session")
    network.restart(0)
    refused(wire.devices[0].handle(liar.letter(0, liar.names([0, 2, 3]))), "no session")
    # The others were told of all five: too few shares of any mask key are out, and the sum does not come either.
    answers = {k: liar.tell(k, liar.names([0, 1, 2, 3, 4])).answer or b"" for k in (3, 4)}
    with pytest.raises(heads.SecureSumError, match="2 devices sent shares, 3 are needed"):
        collector.total(answers)


def first_request(runner: NetworkRunner) -> bytes:
    """The ordinary request of round 0."""
    from fedkd.messages import write_request
    from fedkd.payloads import Nothing

    none = np.zeros(0, np.int64)
    return write_request(runner.site, runner.run, 0, Nothing(), none, np.arange(100), None)[0]


def test_no_answer_leaves_without_a_session(network: Network) -> None:
    liar = Liar(network, "none", secure())
    refused(liar.tell(0, first_request(liar.runner)), "no session")
    for step in (DEAL, RELAY, UNMASK):
        refused(liar.tell(0, heads.write(step, SERVER, liar.id)), "no session")
    refused(liar.tell(0, heads.write(MASKED, SERVER, liar.id)), "no session")


def test_bytes_that_are_no_message_change_nothing(network: Network) -> None:
    liar = Liar(network, "bytes", secure())
    liar.open()
    good = liar.roster([0, 1, 2, 3])
    for at in range(0, len(good), 7):
        broken = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        say = liar.tell(0, good[:at])
        assert say.kind == "refused" and say.answer is None, at
        if at < heads.HEAD.size + 4 + 64:  # the head and this device's own row
            assert liar.tell(0, broken).kind == "refused", at
    refused(liar.tell(0, heads.write(DEAL, 3, liar.id)), "claims to be of 3")
    assert liar.tell(0, good).answer is not None


def test_the_nodes_own_minimum_cohort_holds(tmp_path: Path, network: Network) -> None:
    kit = network.kits[4]
    path, before = kit.path("policy.yaml"), kit.path("policy.yaml").read_text()
    path.write_text("min_cohort: 4\n")
    try:
        network.restart(4)
        liar = Liar(network, "policy", secure())
        refused(liar.tell(4, liar.collector.opening()), "asks for 4 answers at least", "policy")
        liar = Liar(network, "policy-4", secure(minimum=4))
        liar.open()
        refused(liar.tell(4, liar.roster([0, 1, 4])), "a roster of 3 devices, at least 4")
    finally:
        path.write_text(before)


def test_a_threshold_that_trusts_the_server_is_refused_by_both_sides(network: Network, tmp_path: Path) -> None:
    low = secure(privacy={"secure_threshold": 0.4})
    with pytest.raises(ConfigError, match="trusts the server"):
        network.runner(low)
    liar = Liar(network, "low", secure())
    outline = {**liar.runner.outline, "privacy": low.privacy.model_dump(mode="json")}
    refused(liar.tell(0, liar.collector.opening(), experiment=outline), "ConfigError")
