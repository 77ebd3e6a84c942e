"""`fedkd run --resume` beside processes that were killed: what it starts anew, and what it leaves alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from inprocess import Network

from fedkd.deploy import run as runs
from fedkd.deploy import serve
from fedkd.deploy.control import RunState
from fedkd.deploy.kit import ServerKit
from fedkd.deploy.serve import Standing
from fedkd.errors import FedkdError

DEAD = 2**22 + 7  # beyond the largest pid of Linux
OWN = -1  # stands for the id of the test's own process, which differs from worker to worker


class SuperLink:
    """Stands for the control API: one Flower run that goes on until it is stopped."""

    def __init__(self) -> None:
        self.going, self.number, self.calls = True, 7, list[str]()

    def __call__(self, kit: ServerKit) -> SuperLink:
        return self

    def start(self, config: Any) -> int:
        self.calls.append("start")
        self.number += 1
        return self.number

    def state(self, number: int) -> RunState | None:
        return RunState(number, "running" if self.going else "finished", "", "")

    def stop(self, number: int) -> bool:
        self.calls.append("stop")
        return True

    def close(self) -> None:
        pass


@pytest.fixture
def kit(tmp_path: Path) -> ServerKit:
    found = Network(tmp_path, 1).server
    (found.runs / "trial").mkdir(parents=True)
    return found


@pytest.mark.parametrize(
    ("phase", "pid", "going", "calls"),
    [
        ("running", DEAD, True, ["stop", "start"]),
        ("waiting", DEAD, True, ["stop", "start"]),
        ("running", OWN, True, []),
        ("starting", 0, True, []),
        ("running", OWN, False, ["start"]),
        ("failed", DEAD, False, ["start"]),
        ("finished", DEAD, False, []),
    ],
)
def test_resume(
    phase: Any, pid: int, going: bool, calls: list[str], kit: ServerKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = SuperLink()
    link.going = going
    monkeypatch.setattr(runs, "Control", link)
    Standing("t", 7, phase, "", os.getpid() if pid == OWN else pid).write(kit.runs / "trial")
    runs.resume(kit, "trial")
    assert link.calls == calls
    now = Standing.read(kit.runs / "trial")
    assert (now.flower_run, now.phase) == ((8, "starting") if "start" in calls else (7, phase))


def test_a_watcher_hears_of_a_killed_process(kit: ServerKit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "Control", SuperLink())
    assert runs._lost(kit, Standing("t", 7, "running", "", DEAD)) == "its process was killed"
    assert runs._lost(kit, Standing("t", 7, "running", "", os.getpid())) is None


def test_a_process_that_is_told_to_end_says_so(kit: ServerKit, monkeypatch: pytest.MonkeyPatch) -> None:
    Standing("t", 7).write(kit.runs / "trial")
    monkeypatch.setenv("FEDKD_KIT", str(kit.folder))
    monkeypatch.setattr(serve, "_play", lambda *rest: sys.exit(0))
    with pytest.raises(SystemExit):
        serve.serve(None, SimpleNamespace(run_id=7, run_config={"run": "trial"}))
    now = Standing.read(kit.runs / "trial")
    assert (now.phase, now.reason) == ("failed", "its process was told to end")


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_that_ends_late_leaves_its_successor_alone(
    resumed: bool, kit: ServerKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = kit.runs / "trial"
    Standing("t", 7).write(folder)

    def cut_off(*rest: Any) -> None:
        if resumed:
            Standing("t", 8).write(folder)
        raise FedkdError("SuperLink is gone")

    monkeypatch.setenv("FEDKD_KIT", str(kit.folder))
    monkeypatch.setattr(serve, "_play", cut_off)
    with pytest.raises(FedkdError, match="SuperLink is gone"):
        serve.serve(None, SimpleNamespace(run_id=7, run_config={"run": "trial"}))
    now = Standing.read(folder)
    assert (now.flower_run, now.phase) == ((8, "starting") if resumed else (7, "failed"))
    assert "SuperLink is gone" in (kit.state / "logs/run.jsonl").read_text()
