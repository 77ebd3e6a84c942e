"""A round on a real network: equal to the simulator's, and steady under what happens on the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import Network, Wire, experiment
from safetensors.torch import load_file

from fedkd import simulate
from fedkd.deploy.mail import Ask, MailError
from fedkd.deploy.network import GridPost
from fedkd.errors import DataError

CLIENTS = 3


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same experiment in the simulator."""
    return simulate.start(experiment(CLIENTS), tmp_path_factory.mktemp("simulated") / "run").folder


@pytest.fixture
def network(tmp_path: Path) -> Network:
    return Network(tmp_path / "net", CLIENTS)


def assert_equal(folder: Path, simulated: Path) -> None:
    ours, theirs = load_file(folder / simulate.STUDENT), load_file(simulated / simulate.STUDENT)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-4)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / simulate.ROWS).read_text().splitlines()]


def test_the_student_is_the_simulators(network: Network, simulated: Path, tmp_path: Path) -> None:
    found = network.play(experiment(CLIENTS), tmp_path / "run")
    assert_equal(found.folder, simulated)
    ours, theirs = rows(found.folder), rows(simulated)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["answered"] == other["answered"] and mine["quarantined"] == []
        assert mine["student_accuracy"] == pytest.approx(other["student_accuracy"], abs=0.01)
    # The proxy set travels once to each device, at its first request.
    assert sum(ask.proxy is not None for _, ask in network.wire.sent) == CLIENTS


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("fedavg", {}),
        ("fedprox", {}),
        ("fd", {}),
        ("fedproto", {}),
        ("feddf", {}),
        ("cfd", {}),
        ("fedmd", {"labelled": 1}),
    ],
)
def test_every_method_runs_on_a_network(network: Network, tmp_path: Path, method: str, changes: dict[str, Any]) -> None:
    proxy = {"size": 100, "labelled": bool(changes)}
    chosen = experiment(CLIENTS, rounds=2, algorithm=method, proxy=proxy)
    for row in rows(network.play(chosen, tmp_path / "run").folder):
        assert row["failed"] is None and row["answered"] == CLIENTS, row


def test_a_device_that_loses_its_memory_goes_on_from_its_disk(
    network: Network, simulated: Path, tmp_path: Path
) -> None:
    def restart_all(wire: Wire, client: int, ask: Ask, honest: Any) -> Any:
        network.restart(client)
        return honest()

    network.wire.twist = restart_all
    assert_equal(network.play(experiment(CLIENTS), tmp_path / "run").folder, simulated)


@pytest.mark.fault(
    16, "a client that loses its memory between training and sending sends the same bytes from its outbox"
)
def test_a_lost_answer_is_sent_again_and_is_the_same(network: Network, simulated: Path, tmp_path: Path) -> None:
    answers: dict[str, bytes] = {}
    lost: list[str] = []

    def lose_first(wire: Wire, client: int, ask: Ask, honest: Any) -> Any:
        say = wire.devices[client].handle(ask)
        if say.answer is not None:
            known = answers.setdefault(ask.key, say.answer)
            assert known == say.answer, "one request, two answers"
            if ask.key not in lost:
                lost.append(ask.key)
                network.restart(client)
                return None
        return wire.reply("", client, say)

    network.wire.twist = lose_first
    assert_equal(network.play(experiment(CLIENTS), tmp_path / "run").folder, simulated)
    assert len(lost) == 3 * CLIENTS


def test_a_device_that_never_heard_the_request_is_asked_again(
    network: Network, simulated: Path, tmp_path: Path
) -> None:
    dropped: set[tuple[int, int]] = set()

    def drop_first(wire: Wire, client: int, ask: Ask, honest: Any) -> Any:
        if ask.kind == "ask" and (client, ask.round) not in dropped:
            dropped.add((client, ask.round))
            return "silence"
        return honest()

    network.wire.twist = drop_first
    chosen = experiment(CLIENTS, deployment={"probe_seconds": 0.05})
    assert_equal(network.play(chosen, tmp_path / "run").folder, simulated)
    assert any(ask.kind == "probe" for _, ask in network.wire.sent)


@pytest.mark.fault(
    15,
    "a lost checkpoint: the round is asked again, devices answer from their outbox, the student is the same",
)
def test_a_server_that_goes_on_from_its_checkpoint_ends_equal(
    network: Network, simulated: Path, tmp_path: Path
) -> None:
    chosen, folder = experiment(CLIENTS), tmp_path / "run"

    def die(record: Any, rounds: int) -> None:
        if record["round"] == 1:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        network.play(chosen, folder, watch=die)
    # The checkpoint of the last round is lost, too: the round is asked again, and devices answer from their outbox.
    newest = sorted((folder / simulate.CHECKPOINTS).glob("round-*"))[-1]
    (newest / "server.safetensors").write_bytes(b"torn")
    asked = len(network.wire.sent)
    assert_equal(network.play(chosen, folder).folder, simulated)
    assert [ask.round for _, ask in network.wire.sent[asked:]] == [1] * CLIENTS + [2] * CLIENTS
    assert [row["round"] for row in rows(folder)] == [0, 1, 2]


@pytest.mark.fault(19, "who is late or offline is noted, and the round goes on with the others")
def test_late_and_offline_devices_do_not_hold_up_a_round(network: Network, tmp_path: Path) -> None:
    def silent(wire: Wire, client: int, ask: Ask, honest: Any) -> Any:
        return "silence" if client == 0 else honest()

    network.wire.twist = silent
    network.wire.offline = {2}
    waits = {"deadline_seconds": 1.0, "offline_seconds": 0.2, "probe_seconds": 100.0}
    for row in rows(network.play(experiment(CLIENTS, rounds=2, deployment=waits), tmp_path / "run").folder):
        assert (row["answered"], row["late"], row["dropped"], row["quarantined"]) == (1, 1, 1, [])


def test_a_revoked_client_is_not_waited_for(network: Network, tmp_path: Path) -> None:
    """One that was revoked before the run, and one in its midst: with an hour's patience for those who are offline."""
    chosen = experiment(CLIENTS, rounds=3, deployment={"offline_seconds": 3600.0})
    network.wire.offline = {2}
    del network.members[2]
    out: set[int] = set()
    runner = network.runner(chosen)
    runner._revoked = lambda: out

    def watch(record: Any, rounds: int) -> None:
        if record["round"] == 0:
            out.add(1)
            network.wire.offline.add(1)
            runner._looked = -1e9

    folder = tmp_path / "run"
    folder.mkdir()
    simulate.play(runner.site, runner, folder, watch, run=runner.run)
    assert [(row["answered"], row["dropped"], row["failed"]) for row in rows(folder)] == [
        (2, 1, None), (1, 2, None), (1, 2, None)
    ]  # fmt: skip


def test_a_quorum_ends_a_round_early(network: Network, tmp_path: Path) -> None:
    def silent(wire: Wire, client: int, ask: Ask, honest: Any) -> Any:
        return "silence" if client == 0 else honest()

    network.wire.twist = silent
    waits = {"deadline_seconds": 1000.0, "quorum": 0.6, "probe_seconds": 100.0}
    for row in rows(network.play(experiment(CLIENTS, rounds=2, deployment=waits), tmp_path / "run").folder):
        assert (row["answered"], row["late"]) == (2, 1)


@pytest.mark.fault(19, "rounds without the minimum fail by name, the run ends after three, and resumed goes on")
def test_a_run_that_nobody_answers_ends_with_a_reason(network: Network, tmp_path: Path, simulated: Path) -> None:
    from fedkd.deploy.serve import RunFailed, _Watch

    waits = {"offline_seconds": 0.05}
    chosen, folder = experiment(CLIENTS, rounds=20, deployment=waits), tmp_path / "run"
    network.wire.offline = {0, 1, 2}
    with pytest.raises(RunFailed, match="0 answers, at least 1 are needed"):
        network.play(chosen, folder, watch=_Watch(3))
    assert len(rows(folder)) == 3 and all(row["failed"] for row in rows(folder))
    network.wire.offline = set()
    network.play(experiment(CLIENTS, rounds=4, deployment=waits), folder)
    assert [row["failed"] for row in rows(folder)[3:]] == [None]


@pytest.mark.fault(19, "a run that nobody joins says how many came and how many are needed")
def test_nobody_comes(network: Network) -> None:
    runner = network.runner(experiment(CLIENTS, deployment={"wait_seconds": 0.1}))
    network.wire.offline = {0, 1, 2}
    with pytest.raises(MailError, match="0 clients came online within 0 s, at least 1 are needed"):
        runner.wait_for(1)


def test_what_travels_names_no_path_and_no_partition(network: Network) -> None:
    told = json.dumps(network.runner(experiment(CLIENTS)).outline)
    for word in ("path", "partition", "alpha", "deadline", "runner"):
        assert f'"{word}' not in told, word


def test_the_server_never_says_less_than_its_devices_spent(tmp_path: Path) -> None:
    """Devices charge their own ledgers; what the server's rows and summary say is an upper bound of each of them."""
    from fedkd.privacy.ledger import Ledger

    network = Network(tmp_path / "net", CLIENTS, policy={"epsilon": None})
    private = {"kind": "dp_sgd", "noise_multiplier": 0.8, "sampling_rate": 0.1, "seeded": False}
    chosen = experiment(CLIENTS, rounds=2, training={"steps": 4}, privacy=private)
    found = network.play(chosen, tmp_path / "run")
    assert [row["answered"] for row in rows(found.folder)] == [CLIENTS] * 2
    spent = []
    for kit in network.wire.kits.values():
        (mine,) = Ledger(kit.state / "privacy" / "ledger.jsonl").spent(1e-5)
        spent.append(mine.epsilon)
    said = [row["epsilon"] for row in rows(found.folder)]
    assert 0 < said[0] < said[1] == found.summary["epsilon"]
    assert said[1] == pytest.approx(max(spent), rel=1e-6)


@pytest.mark.parametrize("where", ["records", "training"])
def test_errors_leave_a_device_without_their_words(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its files and of its training may quote a record; those of the request may be told."""
    network = Network(tmp_path / "net", CLIENTS)
    device = network.wire.devices[1]

    def fails(*_: Any) -> Any:
        raise DataError("column status has the value 'HIV positive'")

    if where == "records":
        monkeypatch.setattr(type(device.local), "records", fails)
    else:
        monkeypatch.setattr("fedkd.client._train", fails)
    (row,) = rows(network.play(experiment(CLIENTS, rounds=1), tmp_path / "run").folder)
    assert [q["message"] for q in row["quarantined"]] == ["DataError on the device; its own log says more"] * CLIENTS
    ask = replace(network.wire.sent[0][1], key="0" * 64, experiment={})
    assert "names no models" in network.wire.devices[0].handle(ask).message


def test_a_servers_runs_share_one_account(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients are the same people in every run: noise on sums of one run after the other composes."""
    from fedkd.deploy import serve
    from fedkd.privacy import build
    from fedkd.privacy.ledger import Ledger

    privacy = {"kind": "labels", "noise_multiplier": 5.0}
    chosen = experiment(CLIENTS, rounds=1, privacy=privacy)
    said = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        runner = network.runner(chosen, name)
        build.open_ledger(runner.site, folder, network.server.state / build.LEDGER)
        done = simulate.play(runner.site, runner, folder, None, run=runner.run)
        (mine,) = Ledger(folder / build.LEDGER).spent(1e-5)
        assert done.summary["epsilon"] == mine.epsilon
        (whole,) = Ledger(network.server.state / build.LEDGER).spent(1e-5)
        said.append(whole.epsilon)
        assert any(f"over all runs of this server, epsilon per client is {whole.epsilon:.3f}" in n
                   for n in done.summary["notes"])  # fmt: skip
    assert said[1] > 1.2 * said[0]

    class Seen(Exception):
        pass

    def seen(site: Any, folder: Path, life: Path) -> None:
        assert life == network.server.state / build.LEDGER
        raise Seen

    monkeypatch.setattr(build, "open_ledger", seen)
    (tmp_path / "a" / simulate.CONFIG).write_text(chosen.dump())
    with pytest.raises(Seen):
        serve._play(network.server, None, tmp_path / "a", serve.Standing("t"))


# ---- requests as they go out ------------------------------------------------------------------------------------------
def test_requests_go_out_together_and_ring_for_those_that_were_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    taken, pushed, rung = ["m-0", "", "m-2"], list[list[int]](), list[Any]()

    class Grid:
        def push_messages(self, messages: Any) -> list[str]:
            pushed.append([message.metadata.dst_node_id for message in messages])
            return taken

    def letter(client: int) -> tuple[int, Ask]:
        return 100 + client, Ask(run="trial.t", client=client, round=0, key="k", request=b"request")

    post = GridPost(Grid(), 10**6, rung.append)
    assert post.send([letter(k) for k in range(3)], 60.0) == ["m-0", None, "m-2"]
    assert pushed == [[100, 101, 102]] and rung == [{0, 2}]
    taken = []  # longer than SuperLink takes
    assert post.send([letter(0)], 60.0) == [None] and rung[1:] == [set()]


def test_long_requests_do_not_wait_for_one_another(
    network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    send = network.wire.send
    monkeypatch.setattr(
        network.wire, "send", lambda letters, seconds: (sent.append(len(letters)), send(letters, seconds))[1]
    )
    network.play(experiment(CLIENTS, rounds=1, proxy=None, algorithm="fedavg"), tmp_path / "together")
    assert sent == [CLIENTS]
    sent.clear()
    monkeypatch.setattr("fedkd.deploy.network.BATCH_BYTES", 1)
    network.play(experiment(CLIENTS, rounds=1, proxy=None, algorithm="fedavg"), tmp_path / "apart")
    assert sent == [1] * CLIENTS
