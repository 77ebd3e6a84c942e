"""Sweeps whose points run side by side: the same numbers, an orderly end, and faults that stay with their point."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_simulate import everything, experiment

from fedkd import simulate
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment, load
from fedkd.sweeping import PointNote

WORDS = ["seed=1,2", "algorithm.temperature=0.1,1"]


def points(tmp_path: Path, *words: str, **more: Any) -> list[tuple[dict[str, Any], Experiment]]:
    path = tmp_path / "small.yaml"
    path.write_text(experiment("ds_fl", rounds=4, **more).dump())
    return load(path, list(words or WORDS))


def test_an_interrupted_sweep_side_by_side_ends_as_an_uninterrupted_one_after_the_other(tmp_path: Path) -> None:
    wanted = points(tmp_path)
    straight = simulate.sweep(wanted, tmp_path / "straight", jobs=1)
    folder, heard, begun = tmp_path / "parallel", [], []

    def announce(name: str, _: Experiment) -> Any:
        begun.append(name)

        def watch(record: Mapping[str, Any], rounds: int) -> None:
            heard.append((name, record["round"], rounds))
            # Two points are under way, one of them in the middle.
            if len(begun) == 2 and record["round"] == 1:
                raise KeyboardInterrupt

        return watch

    with pytest.raises(KeyboardInterrupt):
        simulate.sweep(wanted, folder, announce, jobs=2)
    states = [_status(folder / f.folder.name) for f in straight]
    assert states[2:] == [None, None] and "stopped" in states and len(begun) == 2
    assert all(rounds == 4 for _, _, rounds in heard)
    finished = simulate.resume_sweep(folder, jobs=2)
    assert [f.summary["seed"] for f in finished] == [1, 2, 1, 2]
    for mine, other in zip(finished, straight, strict=True):
        assert mine.folder.name == other.folder.name
        assert everything(mine.folder) == everything(other.folder)
    ours, theirs = (json.loads((f / "summary.json").read_text())["points"] for f in (folder, tmp_path / "straight"))
    assert [p["accuracy"] for p in ours] == [p["accuracy"] for p in theirs]


def _status(folder: Path) -> str | None:
    path = folder / "summary.json"
    return json.loads(path.read_text())["status"] if path.is_file() else None


def test_what_fails_or_dies_or_warns_stays_with_its_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every process has the threads that it was given."""
    models = ("user_models:Notes", "user_models:Dies", "no_such_model", "user_models:OddNorm")
    wanted = points(tmp_path, "seed=1", f"models.devices={','.join(models)}")
    seen = tmp_path / "seen"
    seen.mkdir()
    monkeypatch.setenv("FEDKD_TEST_NOTES", str(seen))
    with pytest.warns(PointNote, match="user_models_OddNorm: .*cannot be stacked"), pytest.raises(FedkdError) as caught:
        simulate.sweep(wanted, tmp_path / "sweep", jobs=2)
    assert "2 of the 4 points" in str(caught.value) and "ended with code -9" in str(caught.value)
    states = {p.name: _status(p) for p in (tmp_path / "sweep").iterdir() if p.is_dir()}
    assert sorted(map(str, states.values())) == ["None", "None", "finished", "finished"], states
    (note,) = [json.loads(path.read_text()) for path in seen.iterdir()]
    assert note["threads"] == 1 and note["omp"] == "1" and note["pid"] != os.getpid()


def test_any_fault_of_a_point_leaves_the_others_alone_one_after_the_other_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resume(folder: Path, watch: Any) -> simulate.Finished:
        if folder.name == "seed=1":
            raise ZeroDivisionError("a fault of the user's own code")
        return played(folder, watch)

    played = simulate.resume
    monkeypatch.setattr(simulate, "resume", resume)
    with pytest.raises(FedkdError, match=r"1 of the 2 points .*seed=1: ZeroDivisionError"):
        simulate.sweep(points(tmp_path, "seed=1,2"), tmp_path / "sweep", jobs=1)
    assert _status(tmp_path / "sweep" / "seed=2") == "finished"


def test_ctrl_c_ends_every_process_and_the_sweep_can_be_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = [
        sys.executable,
        "-m",
        "fedkd",
        "simulate",
        "rounds=3000",
        "seed=1,2,3",
        "--jobs",
        "2",
        "--out",
        str(folder),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait(lambda: len(list(folder.glob("*/checkpoints/round-*"))) >= 2 and len(list(folder.glob("*/checkpoints"))) == 2)
    children = _children(process.pid)
    assert len(children) == 2
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=100)
    assert process.returncode == 130, error
    assert "Traceback" not in error and f"--resume {folder}" in " ".join(error.split())
    assert not any(_alive(pid) for pid in children)
    assert sorted(_status(p) for p in folder.iterdir() if (p / "summary.json").is_file()) == ["stopped", "stopped"]
    lines = [line for line in out.splitlines() if "round" in line]
    assert lines and all(line.startswith("ds_fl seed=") and line.count("round ") == 1 for line in lines)


def test_no_process_outlives_a_parent_that_was_killed(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = [
        sys.executable,
        "-m",
        "fedkd",
        "simulate",
        "rounds=3000",
        "seed=1,2",
        "--jobs",
        "2",
        "--out",
        str(folder),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait(lambda: len(list(folder.glob("*/checkpoints"))) == 2)
    children = _children(process.pid)
    process.kill()
    process.wait(30)
    _wait(lambda: not any(_alive(pid) for pid in children))
    assert len(children) == 2


def _children(pid: int) -> list[int]:
    task = Path(f"/proc/{pid}/task")
    if not task.is_dir():
        pytest.skip("needs /proc to see the processes of a sweep")
    found = " ".join(path.read_text() for path in task.glob("*/children"))
    return [int(child) for child in found.split()]


def _alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _wait(until: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)
