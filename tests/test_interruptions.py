"""Interruptions at every write: a run and a sweep can be gone on with, or have left nothing, and the end is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_simulate import Interrupt, everything, experiment, rows

from fedkd import simulate
from fedkd.errors import ConfigError, FedkdError
from fedkd.experiment import load
from fedkd.report.runfolder import Run

TINY: dict[str, Any] = {
    "rounds": 2,
    "data": {"source": "digits", "train_size": 200, "test_size": 60},
    "proxy": {"size": 30},
    "proxy_per_round": 20,
    "models": {"student": "mlp(hidden=[8])", "devices": "mlp(hidden=[8])"},
    "evaluation": {"local_only": True},
    "runner": {"threads": 1},
}
MOST = 40


@contextmanager
def interrupted(at: int, *, after: bool) -> Iterator[None]:
    """Raise what Ctrl-C raises just before or just after the ``at``-th rename, the moment at which a file is there."""
    count, real = 0, os.replace

    def replace(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count != at:
            return real(source, target)
        if after:
            real(source, target)
        raise KeyboardInterrupt

    os.replace = replace  # type: ignore[assignment]
    try:
        yield
    finally:
        os.replace = real


def leftovers(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if ".part" in p.name or ".tmp" in p.name]


# Every other write is interrupted just before, the rest just after; the slow half swaps them.
PHASES = pytest.mark.parametrize("phase", [0, pytest.param(1, marks=pytest.mark.slow)])


@PHASES
def test_a_run_interrupted_at_any_write_ends_as_if_it_had_not_been(phase: int, tmp_path: Path) -> None:
    wanted = experiment("ds_fl", **TINY)
    whole = simulate.start(wanted, tmp_path / "whole" / "run")
    begun = []
    for at in range(1, MOST):
        folder = tmp_path / str(at) / "run"
        try:
            with interrupted(at, after=bool((at + phase) % 2)):
                simulate.start(wanted, folder)
            break
        except KeyboardInterrupt:
            assert not leftovers(folder)
        begun.append(simulate.is_begun(folder))
        done = simulate.resume(folder) if begun[-1] else simulate.start(wanted, folder)
        assert everything(folder) == everything(whole.folder)
        assert done.summary["accuracy"] == whole.summary["accuracy"]
        assert {p.name for p in folder.iterdir()} == {p.name for p in whole.folder.iterdir()}
    assert 5 < len(begun) < MOST - 1, "the last write of a run was reached"
    assert begun[2:] and all(begun[2:]), "once a run has begun, it can be gone on with"


@PHASES
def test_a_sweep_interrupted_at_any_write_ends_as_if_it_had_not_been(phase: int, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(experiment("ds_fl", **{**TINY, "rounds": 1, "evaluation": {"local_only": False}}).dump())
    points = load(path, ["seed=1,2"])
    whole = simulate.sweep(points, tmp_path / "whole", jobs=1)
    hits = 0
    # The first writes are the sweep's own; those of its points are as a run's.
    for at in (*range(1, 6), *range(6, MOST, 4)):
        folder = tmp_path / f"sweep-{at}"
        try:
            with interrupted(at, after=bool((at + phase) % 2)):
                simulate.sweep(points, folder, jobs=1)
            break
        except KeyboardInterrupt:
            hits += 1
            assert not leftovers(tmp_path)
        # Both ways on: --resume, and the same command again.
        again = at % 3 == 0 or not simulate.is_begun(folder)
        done = simulate.sweep(points, folder, jobs=1) if again else simulate.resume_sweep(folder, jobs=1)
        for mine, other in zip(done, whole, strict=True):
            assert everything(mine.folder) == everything(other.folder)
        assert (folder / "summary.json").is_file()
    assert 6 < hits < 5 + (MOST - 6) // 4


def test_a_student_that_is_gone_is_written_anew(tmp_path: Path) -> None:
    done = simulate.start(experiment("ds_fl", **TINY), tmp_path / "run")
    student = done.folder / "student.safetensors"
    data = student.read_bytes()
    student.unlink()
    again = simulate.resume(done.folder)
    assert student.read_bytes() == data and again.summary["accuracy"] == done.summary["accuracy"]


@pytest.mark.parametrize("broken", ["", "{", "[]", '"finished"'])
def test_a_broken_summary_is_written_anew(broken: str, tmp_path: Path) -> None:
    done = simulate.start(experiment("ds_fl", **TINY), tmp_path / "run")
    (done.folder / "summary.json").write_text(broken)
    again = simulate.resume(done.folder)
    assert again.summary["accuracy"] == done.summary["accuracy"]
    assert json.loads((done.folder / "summary.json").read_text())["status"] == "finished"


def test_what_a_killed_process_wrote_aside_is_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        simulate.start(experiment("ds_fl", **TINY), folder, Interrupt(1))
    (folder / ".summary.json.1.part").write_text("{")
    (folder / "checkpoints" / ".round-000002.1.part").mkdir()
    simulate.resume(folder)
    assert not leftovers(folder)


def test_a_run_resumed_without_its_partition_gets_it_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        simulate.start(experiment("ds_fl", **TINY), folder, Interrupt(1))
    partition = (folder / "partition.json").read_bytes()
    (folder / "partition.json").unlink()
    simulate.resume(folder)
    assert (folder / "partition.json").read_bytes() == partition
    assert Run.read(folder).partition is not None and len(rows(folder)) == 2


# ---- one sentence instead of a traceback ----------------------------------------------------------------------------
SHORT = ["rounds=1", "proxy.size=30", "partition.clients=4", "evaluation.local_only=false"]


@pytest.mark.parametrize("more", [[], ["seed=1,2"]])
def test_a_folder_that_cannot_be_made_is_one_sentence(more: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    points = load(None, [*SHORT, *more])
    with pytest.raises(FedkdError, match="file") as caught:
        if more:
            simulate.sweep(points, tmp_path / "file" / "run")
        else:
            simulate.start(points[0][1], tmp_path / "file" / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"points": [{}]}', '{"points": [{"folder": "../x"}]}'])
def test_a_broken_sweep_is_one_sentence(broken: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(broken)
    points = load(None, [*SHORT, "seed=1,2"])
    for act in (simulate.resume_sweep, lambda folder: simulate.sweep(points, folder)):
        with pytest.raises(FedkdError) as caught:
            act(tmp_path)
        assert "sweep.json" in str(caught.value) or "another sweep" in str(caught.value)


def test_ctrl_c_before_there_is_a_run_promises_nothing(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom fedkd import simulate\nfrom fedkd.cli import main\n"
        "def stop(*given): raise KeyboardInterrupt\n"
        "simulate.Site.load = stop\nsys.argv = ['fedkd', 'simulate', '--out', 'never']\nmain.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 130 and "--resume" not in done.stderr and "Stopped before" in done.stderr
    assert not (tmp_path / "never").exists()


# ---- points of a sweep ----------------------------------------------------------------------------------------------
def test_no_two_points_share_a_folder() -> None:
    long = "x" * 130
    names = simulate._point_names(
        [{"name": long + "a"}, {"name": long + "b"}, {"name": "a/b"}, {"name": "a:b"}, {"name": "c"}, {}]
    )
    assert len(set(names)) == 6 and max(map(len, names)) <= simulate.MAX_NAME
    assert names[4:] == ["name=c", "point"]


@pytest.mark.parametrize("words", [["seed=1,1"], ["rounds=1", "rounds=2"], ["seed=1,2", "seed=3"]])
def test_what_would_be_dropped_in_silence_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="twice"):
        load(None, words)
