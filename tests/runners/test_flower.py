"""Flower's runner: the same numbers as serial devices, and what goes wrong stays where it went wrong.

Most tests put the messages through a grid that calls the worker in this process. A few start Ray, which takes ten
seconds; those marked slow put every method through it, kill workers, and run `flwr run .`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import each, section

from fedkd import simulate, sweeping
from fedkd.algorithms.catalogue import METHODS, method_class
from fedkd.experiment import Experiment, load, validate
from fedkd.messages import Reply, Request
from fedkd.rounds import Progress, Rounds
from fedkd.runners import flower
from fedkd.runners.base import Runner
from fedkd.runners.flower_grid import Asker, GridError, Order, pack_order, pack_replies, unpack_order, unpack_replies
from fedkd.site import Site

from flwr.app import Error, Message, RecordDict  # isort: skip
from flwr.common.constant import ErrorCode  # isort: skip

ROOT = Path(__file__).resolve().parents[2]
CORRUPT = 2


def experiment(method: str = "ds_fl", **more: Any) -> Experiment:
    return validate(
        {
            "rounds": 2,
            "dtype": "float64",
            "algorithm": section(method),
            "data": {"source": "digits", "train_size": 240, "test_size": 80},
            "partition": {"clients": 6, "alpha": 0.5},
            "proxy": {"size": 40, "labelled": True},
            "models": {"student": "mlp(hidden=[16])", "devices": "mlp(hidden=[16])"},
            "evaluation": {"local_only": False},
            "runner": {"kind": "flower"},
            **more,
        }
    )


def mixed(method: str) -> Experiment:
    """Two architectures where the method takes them, devices that drop out, come late, or are not asked."""
    models = {"student": "mlp(hidden=[16])", "devices": ["mlp(hidden=[16])", "cnn(channels=[3, 4], features=16)"]}
    rough = {"participation": 0.8, "dropout": 0.1, "late": 0.1}
    return experiment(method, population=rough, **({"models": models} if method_class(method).heterogeneous else {}))


def serial(wanted: Experiment) -> Experiment:
    return wanted.model_copy(update={"runner": wanted.runner.model_copy(update={"kind": "serial"})})


def start(site: Site, runner: Runner, folder: Path, watch: simulate.Watch | None = None) -> simulate.Finished:
    """Play a run on a runner into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / simulate.CONFIG).write_text(site.experiment.dump())
    return simulate.play(site, runner, folder, watch)


def student(folder: Path) -> dict[str, np.ndarray]:
    """Return all tensors of the last checkpoint of the server."""
    from fedkd.storage import read_bundle, unpack_tensors

    last = max((folder / simulate.CHECKPOINTS).glob("round-*"))
    data = read_bundle(last)["server.safetensors"]
    found = unpack_tensors(data, str(last))
    # Answers under way are bytes, of which the last bit of a float changes several.
    return {name: t.double().numpy() for name, t in found.items() if not name.startswith("flights|")}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / simulate.ROWS).read_text().splitlines()]


def assert_same(left: Path, right: Path, tolerance: float = 1e-9) -> None:
    """Check that two runs have the same server, and said the same of every round.

    Their folders need one name: it travels in every message.
    """
    a, b = student(left), student(right)
    assert a.keys() == b.keys()
    for name in a:
        gap = float(np.abs(a[name] - b[name]).max()) if a[name].size else 0.0
        assert gap <= tolerance, f"{name} differs by {gap:.3g}"
    for mine, other in zip(rows(left), rows(right), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=tolerance)
        for name in ("seconds", "loss"):
            del mine[name], other[name]
        assert mine == other
    assert simulate_accuracy(left) == simulate_accuracy(right)


def simulate_accuracy(folder: Path) -> tuple[Any, list[Any]]:
    summary = json.loads((folder / simulate.SUMMARY).read_text())
    return summary["accuracy"], [client["accuracy"] for client in summary["per_client"]]


# ---- a grid inside this process -----------------------------------------------------------------------------------------
@pytest.fixture
def identity() -> Iterator[None]:
    """Flower stamps every message with the task that sends it; outside its engine nobody has said which."""
    from flwr.supercore.task_identity import TaskIdentity

    before = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    yield
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


class LocalGrid:
    """Calls a worker's handler. ``turn`` may look at the n-th message, and answer in the worker's place."""

    def __init__(
        self, handler: Callable[[Message], Message], turn: Callable[[int, Message], Message | str | None] | None = None
    ) -> None:
        self.handler, self.turn, self.count = handler, turn, 0
        self.sent: list[Message] = []
        self.ready: dict[str, Message] = {}

    def get_node_ids(self) -> list[int]:
        return [11, 12, 13]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            name = f"m{self.count}"
            message.metadata.__dict__["_message_id"] = name
            found = self.turn(self.count, message) if self.turn is not None else None
            self.count += 1
            self.sent.append(message)
            if found == "refuse":
                continue
            ids.append(name)
            if found != "silence":
                self.ready[name] = self.handler(message) if found is None else found  # type: ignore[assignment]
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        # The last first: nobody may rely on the order.
        return [self.ready.pop(name) for name in reversed(list(ids)) if name in self.ready]


def session(root: Path, **more: Any) -> flower.Session:
    return flower.Session(LocalGrid(lambda message: flower.answer(message, root.resolve()), **more), root)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    return tmp_path


# ---- messages -----------------------------------------------------------------------------------------------------------
def test_order_and_replies_come_back_as_they_were() -> None:
    requests = (Request(3, 7, b"down", 5), Request(4, 7, b"down"), Request(9, 7, b"other", -1))
    packed = pack_order(Order("a/b", "f" * 64, requests))
    assert len(packed.array_records["fedkd-bodies"]) == 2, "an equal body travels once"
    back = unpack_order(packed)
    assert back == Order("a/b", "f" * 64, requests)
    assert back.requests[0].body is back.requests[1].body

    replies = [Reply(3, 7, b"up", None, (("train", 0.1 + 0.2),)), Reply(4, 7, None, "no data"), Reply(9, 7, b"x")]
    assert unpack_replies(pack_replies(replies, ["note"], reveal_losses=True), requests) == (replies, ["note"])
    bare, _ = unpack_replies(pack_replies(replies, [], reveal_losses=False), requests)
    assert all(reply.losses == () for reply in bare)


def test_replies_for_others_are_not_believed() -> None:
    asked = [Request(1, 4, b""), Request(2, 4, b"")]
    given = [Reply(7, 4, b"not asked"), Reply(1, 3, b"old"), Reply(2, 4, b"first"), Reply(2, 4, b"second")]
    found, _ = unpack_replies(pack_replies(given[:3], [], reveal_losses=True), asked)
    assert [reply.client for reply in found] == [1, 2]
    assert found[0].body is None and "leaves this device out" in (found[0].error or "")
    assert found[1].body == b"first"


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r.config_records.clear(),
        lambda r: r.array_records.clear(),
        lambda r: r.config_records["fedkd"].update(text="{"),
        lambda r: r.config_records["fedkd"].update(text="[1]"),
        lambda r: r.config_records["fedkd"].update(text="{}"),
        lambda r: r.config_records["fedkd"].update(text=json.dumps({"replies": [[1, 4]], "notes": []})),
        lambda r: r.config_records["fedkd"].update(text=json.dumps({"replies": [[1, 4, None, [[1]]]], "notes": []})),
    ],
)
def test_malformed_messages_are_refused(damage: Callable[[RecordDict], None]) -> None:
    record = pack_replies([Reply(1, 4, b"up")], [], reveal_losses=True)
    damage(record)
    with pytest.raises(GridError):
        unpack_replies(record, [Request(1, 4, b"")])
    with pytest.raises(GridError):
        unpack_order(record)


# ---- asking -------------------------------------------------------------------------------------------------------------
def echo(message: Message) -> Message:
    order = unpack_order(message.content)
    replies = [Reply(r.client, r.round, r.body) for r in order.requests]
    return Message(pack_replies(replies, [], reveal_losses=True), reply_to=message)


def orders(count: int, size: int) -> list[Order]:
    return [
        Order(".", "0", tuple(Request(size * i + j, 0, b"%d" % (size * i + j)) for j in range(size)))
        for i in range(count)
    ]


def lost(message: Message) -> Message:
    return Message(Error(code=ErrorCode.UNKNOWN, reason="the worker is gone"), reply_to=message)


@pytest.mark.usefixtures("identity")
def test_replies_come_in_the_order_of_the_requests() -> None:
    grid = LocalGrid(echo)
    found = list(Asker(grid).ask(orders(10, 3)))
    assert [reply.client for reply in found] == list(range(30))
    assert all(reply.body == b"%d" % reply.client for reply in found)
    assert {message.metadata.dst_node_id for message in grid.sent} == {11, 12, 13}


@pytest.mark.usefixtures("identity")
def test_a_block_that_went_down_with_its_worker_is_asked_again() -> None:
    grid = LocalGrid(echo, lambda n, message: lost(message) if n in (1, 2) else None)
    found = list(Asker(grid, pause_seconds=0.05).ask(orders(4, 3)))
    assert [reply.body for reply in found] == [b"%d" % k for k in range(12)]


@pytest.mark.usefixtures("identity")
def test_the_one_device_that_kills_workers_is_found() -> None:
    def turn(n: int, message: Message) -> Message | None:
        return lost(message) if 4 in [r.client for r in unpack_order(message.content).requests] else None

    found = list(Asker(LocalGrid(echo, turn), pause_seconds=0.05).ask(orders(3, 3)))
    assert [reply.client for reply in found if reply.body is None] == [4]
    assert "the worker is gone" in (found[4].error or "")


@pytest.mark.usefixtures("identity")
def test_refused_and_malformed_messages_fail_their_block_alone() -> None:
    def turn(n: int, message: Message) -> Message | str | None:
        if n == 2:
            return Message(RecordDict(), reply_to=message)
        return "refuse" if n == 0 else None

    found = list(Asker(LocalGrid(echo, turn)).ask(orders(4, 2)))
    assert [reply.client for reply in found if reply.body is None] == [0, 1, 4, 5]


@pytest.mark.usefixtures("identity")
def test_deadline_and_stop_end_the_waiting() -> None:
    def mute(n: int, message: Message) -> str | None:
        return "silence" if n == 1 else None

    found = list(Asker(LocalGrid(echo, mute), deadline_seconds=0.2).ask(orders(3, 2)))
    assert [reply.error for reply in found if reply.body is None] == ["no answer within 0.2 s"] * 2
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(KeyboardInterrupt):
        list(Asker(LocalGrid(echo, mute), stop=stop).ask(orders(3, 2)))


# ---- the runner, without Ray ----------------------------------------------------------------------------------------------
ASYNCHRONOUS: dict[str, Any] = {
    "population": {"participation": 0.7, "buffer": 2, "dropout": 0.1, "late": 0.1},
    "virtual": {"flops_per_second": {"kind": "lognormal", "median": 2e6}, "on_seconds": 9, "off_seconds": 3},
    "codec": {"up": "float64+delta", "down": "float64+delta"},
    "rounds": 6,
}


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("method", ["fedavg", "ds_fl"])
def test_asynchronous_rounds_in_virtual_time_equal_serial(method: str, tmp_path: Path) -> None:
    wanted = experiment(method, **ASYNCHRONOUS)
    site = Site.load(wanted)
    start(site, session(tmp_path / "flower" / "run").runner(site), tmp_path / "flower" / "run")
    simulate.start(serial(wanted), tmp_path / "serial" / "run")
    assert_same(tmp_path / "flower" / "run", tmp_path / "serial" / "run")
    assert max(row["staleness"] or 0 for row in rows(tmp_path / "serial" / "run")) > 0


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("method", each(m for m in METHODS if not method_class(m).pools_data))
def test_equals_serial(method: str, tmp_path: Path) -> None:
    wanted = mixed(method)
    site = Site.load(wanted)
    start(site, session(tmp_path / "flower" / "run").runner(site), tmp_path / "flower" / "run")
    simulate.start(serial(wanted), tmp_path / "serial" / "run")
    assert_same(tmp_path / "flower" / "run", tmp_path / "serial" / "run")


@pytest.mark.usefixtures("identity")
def test_blocks_depend_on_the_experiment_alone(tmp_path: Path) -> None:
    wanted = experiment(
        partition={"clients": 12},
        models={"student": "mlp", "devices": ["mlp(hidden=[16])", "cnn(channels=[3, 4], features=16)"]},
        runner={"kind": "flower", "workers": 3},
    )
    runner = session(tmp_path).runner(Site.load(wanted))
    blocks = runner.blocks([Request(k, 0, b"") for k in range(12)])
    assert [[r.client for r in b] for b in blocks] == [[0, 2, 4, 6], [8, 10], [1, 3, 5, 7], [9, 11]]
    assert runner.blocks([]) == []


@pytest.mark.usefixtures("identity")
def test_an_exception_in_one_device_stays_with_it(tmp_path: Path) -> None:
    site = Site.load(experiment(rounds=3))
    assert_only_one_failed(play_and_damage(site, session(tmp_path).runner(site), tmp_path))


def play_and_damage(site: Site, runner: Runner, folder: Path) -> list[dict[str, Any]]:
    """Play two rounds and damage a device's state between them: a device that cannot read its state raises."""
    records: list[dict[str, Any]] = []

    def spoil(progress: Progress, record: dict[str, Any]) -> None:
        records.append(record)
        if record["round"] == 0:
            (folder / "devices" / f"{CORRUPT:06d}" / "000000.safetensors").write_bytes(b"damaged")

    # One round short of the end: after the last one the devices are evaluated, and a damaged state ends the run.
    rounds = Rounds(site, runner, "run")
    rounds.play(rounds.begin(), spoil, until=2)
    return records


def assert_only_one_failed(records: list[dict[str, Any]]) -> None:
    first, second = records
    assert first["quarantined"] == [] and first["answered"] == 6
    assert second["answered"] == 5
    assert [q["client"] for q in second["quarantined"]] == [CORRUPT]
    assert "safetensors" in second["quarantined"][0]["message"]


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize("more", [{"population": {"participation": 0.8}}, ASYNCHRONOUS], ids=["plain", "asynchronous"])
def test_resume_is_exact_from_any_checkpoint(more: dict[str, Any], tmp_path: Path) -> None:
    """Devices have worked on after the checkpoint, and the newest checkpoint is damaged: two times two rounds back."""
    looks = {"local_only": False, "clients_every": 1}
    wanted = experiment(**{"rounds": 6, **more, "checkpoint": {"every": 2, "keep": 2}, "evaluation": looks})
    site = Site.load(wanted)
    whole, broken = tmp_path / "whole" / "run", tmp_path / "broken" / "run"
    start(site, session(whole).runner(site), whole)

    def interrupt(record: Any, rounds: int) -> None:
        if record["round"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(site, session(broken).runner(site), broken, interrupt)
    newest = broken / simulate.CHECKPOINTS / "round-000004" / "server.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    # As a new process would: nothing of the old run in memory.
    flower.desk.cache_clear()
    simulate.play(site, session(broken).runner(site), broken)
    assert_same(whole, broken, tolerance=0.0)
    for device in (broken / "devices").glob("[0-9]*"):
        assert len(list(device.glob("*.safetensors"))) <= (5 if wanted.virtual is None else 6)


def swept(tmp_path: Path, seeds: str) -> list[tuple[dict[str, Any], Experiment]]:
    path = tmp_path / "small.yaml"
    path.write_text(experiment(rounds=3, runner={"workers": 2}).dump())
    return load(path, ["runner.kind=flower,serial", f"seed={seeds}"])


def cut_short(name: str, wanted: Experiment) -> simulate.Watch:
    """Stop a sweep in the middle of its last point on Flower."""

    def watch(record: Mapping[str, Any], rounds: int) -> None:
        if wanted.runner.kind == "flower" and wanted.seed == 2 and record["round"] == 1:
            raise KeyboardInterrupt

    return watch


def assert_swept(folder: Path) -> None:
    flowers, serials = (sorted(folder.glob(f"runner.kind={kind}*")) for kind in ("flower", "serial"))
    assert flowers
    for mine, other in zip(flowers, serials, strict=True):
        assert_same(mine, other)


@pytest.mark.usefixtures("identity")
def test_a_sweep_has_one_engine_at_a_time_and_goes_on_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine has the cores to itself: points side by side have ended before, and no two engines are up at once."""
    story: list[str] = []

    def engine(wanted: Experiment, folder: Path, body: Callable[[Runner], Any]) -> Any:
        story.append(f"up {folder.name[-6:]}")
        try:
            return body(session(folder).runner(Site.load(wanted)))
        finally:
            story.append("down")

    def side_by_side(folders: Sequence[Path], jobs: int, threads: int, begun: Any, heard: Any) -> dict[Path, str]:
        story.append(f"{len(folders)} by {jobs}")
        for folder in folders:
            begun(folder)
            simulate.play_point(folder)
        story.append("all done")
        return {}

    monkeypatch.setattr(flower, "run_on_flower", engine)
    monkeypatch.setattr(sweeping, "play_side_by_side", side_by_side)
    with pytest.raises(KeyboardInterrupt):
        simulate.sweep(swept(tmp_path, "1,2"), tmp_path / "sweep", cut_short, jobs=2)
    assert story == ["2 by 2", "all done", "up seed=1", "down", "up seed=2", "down"]
    flower.desk.cache_clear()
    simulate.resume_sweep(tmp_path / "sweep", jobs=2)
    assert story[6:] == ["up seed=2", "down"]
    assert_swept(tmp_path / "sweep")


@pytest.mark.slow
def test_a_sweep_on_ray_that_was_stopped_goes_on(home: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        simulate.sweep(swept(home, "2"), home / "sweep", cut_short)
    simulate.resume_sweep(home / "sweep")
    assert_swept(home / "sweep")


@pytest.mark.usefixtures("identity")
def test_what_an_older_run_left_is_not_used(tmp_path: Path) -> None:
    wanted = experiment(rounds=3, population={"participation": 0.6})
    site = Site.load(wanted)
    used, fresh = tmp_path / "used" / "run", tmp_path / "fresh" / "run"
    start(site, session(used).runner(site), used)
    for name in (simulate.ROWS, simulate.SUMMARY):
        (used / name).unlink()
    shutil.rmtree(used / simulate.CHECKPOINTS)
    start(site, session(used).runner(site), used)
    start(site, session(fresh).runner(site), fresh)
    assert_same(used, fresh, tolerance=0.0)


@pytest.mark.usefixtures("identity")
@pytest.mark.parametrize(
    ("run", "stamp", "reason"),
    [
        ("../elsewhere", None, "outside"),
        ("/", None, "outside"),
        (".", "0" * 64, "not the experiment"),
        ("no", None, "cannot read"),
    ],
)
def test_a_worker_opens_the_agreed_experiment_only(tmp_path: Path, run: str, stamp: str | None, reason: str) -> None:
    root = tmp_path / "root"
    runner = session(root).runner(Site.load(experiment()))
    order = Order(run, stamp or runner._experiment, (Request(0, 0, b"x"),))
    message = Message(pack_order(order), 1, "train.respond")
    (reply,), _ = unpack_replies(flower.answer(message, root).content, order.requests)
    assert reply.body is None and reason in (reply.error or "")


def test_flower_is_not_imported_unless_asked_for() -> None:
    code = (
        "import sys, fedkd, fedkd.simulate, fedkd.cli.main, fedkd.runners.base, fedkd.algorithms.catalogue as c\n"
        "[c.method_class(m) for m in c.METHODS]\n"
        "sys.exit(any(m.split('.')[0] in ('flwr', 'ray') for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- on Ray -------------------------------------------------------------------------------------------------------------
class Enough(RuntimeError):
    """Raised by a body on purpose."""


def test_on_ray(home: Path) -> None:
    """One start of Ray: the same run as serial; one device's exception stays with it; the body's own comes through."""
    wanted = experiment()
    site = Site.load(wanted)
    environment = without_ray(os.environ)
    pids: list[int] = []
    records: list[dict[str, Any]] = []

    def body(opened: flower.Session) -> None:
        pids.extend(children(os.getpid()))
        start(site, opened.runner(site, "run"), home / "runs" / "run")
        records.extend(play_and_damage(site, opened.runner(site, "bad"), home / "runs" / "bad"))
        raise Enough("that will do")

    with pytest.raises(Enough, match="that will do"):
        flower.in_session(body, home / "runs")
    simulate.start(serial(wanted), home / "serial" / "run")
    assert_same(home / "runs" / "run", home / "serial" / "run")
    assert_only_one_failed(records)
    assert environment == without_ray(os.environ)
    assert pids
    assert_gone(pids)


def without_ray(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith("RAY_")}


def processes() -> dict[int, tuple[int, str]]:
    """Return all processes that still run: parent and command line by id."""
    listed = subprocess.run(
        ["ps", "-ww", "-eo", "pid=,ppid=,stat=,args="], capture_output=True, text=True, check=True
    ).stdout
    fields = [line.split(None, 3) for line in listed.splitlines()]
    return {int(f[0]): (int(f[1]), f[3]) for f in fields if len(f) == 4 and not f[2].startswith("Z")}


def children(pid: int) -> list[int]:
    """Return the processes below one, by their ids."""
    known, found = processes(), [pid]
    for parent in found:
        found += [child for child, (above, _) in known.items() if above == parent]
    return found[1:]


def assert_gone(pids: list[int], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while left := [pid for pid in pids if pid in processes()]:
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.2)


@pytest.mark.slow
def test_every_method_on_ray(home: Path) -> None:
    wanted = {m: mixed(m) for m in METHODS if not method_class(m).pools_data}
    wanted["asynchronous"] = experiment("fedavg", **ASYNCHRONOUS)

    def body(opened: flower.Session) -> int:
        for name, one in wanted.items():
            site = Site.load(one)
            start(site, opened.runner(site, name), home / "flower" / name)
        return len(wanted)

    assert flower.in_session(body, home / "flower") == len(wanted)
    for name, one in wanted.items():
        simulate.start(serial(one), home / "serial" / name)
        assert_same(home / "flower" / name, home / "serial" / name)


PREDICTOR = '''
import os
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

FLAGS = Path(__file__).parent


class Fragile(LogisticRegression):
    """Ends its whole process when it meets the records of the device that a file names."""

    def __init__(self):
        super().__init__(max_iter=50)

    def fit(self, x, y):
        for flag in FLAGS.glob("*.kill"):
            if np.isclose(float(flag.stem), x[: int(flag.read_text())].sum()):
                if not flag.with_suffix(".for-ever").exists():
                    flag.unlink()
                os._exit(3)
        return super().fit(x, y)


def make(shape, classes):
    return Fragile()
'''


@pytest.mark.slow
@pytest.mark.parametrize("for_ever", [False, True])
def test_a_dying_worker(home: Path, monkeypatch: pytest.MonkeyPatch, for_ever: bool) -> None:
    """A worker that dies once costs nothing but time; a device that kills every worker loses its own answer alone."""
    modules = home / "modules"
    modules.mkdir()
    (modules / "fragile_predictor.py").write_text(PREDICTOR)
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.setenv("PYTHONPATH", str(modules))
    wanted = experiment(
        models={"student": "mlp(hidden=[16])", "devices": ["mlp(hidden=[16])", "fragile_predictor:make"]}, rounds=1
    )
    site = Site.load(wanted)
    simulate.start(serial(wanted), home / "serial" / "run")
    own = site.private(3).all()[0].numpy()
    flag = modules / f"{own.reshape(len(own), -1).sum()!r}.kill".replace("np.float64(", "").replace(")", "")
    flag.write_text(str(len(own)))
    if for_ever:
        flag.with_suffix(".for-ever").write_text("")

    start_on = functools.partial(start, site, folder=home / "run")
    flower.run_on_flower(wanted, home / "run", lambda runner: start_on(runner), site=site)
    if for_ever:
        (row,) = rows(home / "run")
        assert [q["client"] for q in row["quarantined"]] == [3] and row["answered"] == 5
    else:
        assert not flag.exists(), "the worker did not die"
        assert_same(home / "run", home / "serial" / "run")


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_resume_is_exact(home: Path) -> None:
    wanted = experiment(rounds=60)
    config = home / "experiment.yaml"
    config.write_text(wanted.dump())
    code = (
        "import sys, signal; from pathlib import Path; from fedkd import simulate; from fedkd.experiment import load\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "if __name__ == '__main__':\n"
        "    try: simulate.start(load(Path(sys.argv[1]))[0][1], Path(sys.argv[2]))\n"
        "    except KeyboardInterrupt: sys.exit(130)\n"
    )
    run = home / "run"
    process = subprocess.Popen([sys.executable, "-c", code, str(config), str(run)], start_new_session=True)
    try:
        end = time.monotonic() + 90
        while not (run / simulate.ROWS).exists() or len(rows_so_far(run)) < 3:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        below = children(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert_gone(below)
    finally:
        if process.poll() is None:
            process.kill()
    done = len(rows_so_far(run))
    assert 3 <= done < 60
    assert json.loads((run / simulate.SUMMARY).read_text())["status"] == "stopped"

    # Go on for two rounds only; sixty were there to have something to stop.
    short = wanted.model_copy(update={"rounds": done + 2})
    (run / simulate.CONFIG).write_text(short.dump())
    simulate.resume(run)
    simulate.start(serial(short), home / "serial" / "run")
    assert_same(run, home / "serial" / "run")


def rows_so_far(folder: Path) -> list[str]:
    return (folder / simulate.ROWS).read_text().splitlines()


# ---- flwr run . -----------------------------------------------------------------------------------------------------------
def bound_port(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("fault", [False, True])
def test_flwr_run(tmp_path: Path, fault: bool) -> None:
    """The second door. Flower leaves a SuperLink behind, which is ended by its id."""
    from flwr.cli.constant import LOCAL_SUPERLINK_HTTP_API_PORT

    if bound_port(int(LOCAL_SUPERLINK_HTTP_API_PORT)):
        pytest.skip("a local SuperLink of somebody else is running")
    flwr = shutil.which("flwr", path=str(Path(sys.executable).parent)) or shutil.which("flwr")
    assert flwr is not None
    wanted = experiment()
    config, run = tmp_path / "experiment.yaml", tmp_path / "run"
    config.write_text(wanted.dump() if not fault else "rounds: none\n")
    from fedkd.runners.flower_grid import SWITCHES

    bin_folder = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **SWITCHES, "FLWR_HOME": str(tmp_path / "flwr"), "PATH": bin_folder}
    call = functools.partial(
        subprocess.run, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=150, check=True
    )
    try:
        call([flwr, "run", ".", "--stream", "--run-config", f"experiment='{config}' run='{run}'"])
        listed = json.loads(call([flwr, "list", "--format", "json"]).stdout)
        assert [entry["status"] for entry in listed["runs"]] == ["finished:failed" if fault else "finished:completed"]
    finally:
        # SuperLink is told where to log, and SuperExec is its child: both are known for certain to be this test's.
        links = [pid for pid, (_, line) in processes().items() if f"{tmp_path}/flwr/" in line and "superlink" in line]
        left = [pid for link in links for pid in [link, *children(link)]]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        assert_gone(left)
        assert not bound_port(int(LOCAL_SUPERLINK_HTTP_API_PORT)), "a SuperLink was left behind"
    if fault:
        assert not run.exists()
        return
    simulate.start(serial(wanted), tmp_path / "serial" / "run")
    assert_same(run, tmp_path / "serial" / "run")
