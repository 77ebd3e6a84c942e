"""Runs on disk: resume is exact, interruption is clean, a sweep is a folder of runs."""

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
import torch
from harness import section

from fedkd import simulate
from fedkd.algorithms.catalogue import METHODS
from fedkd.errors import ConfigError
from fedkd.experiment import Experiment, load, validate
from fedkd.kernels.jobs import AT_ONCE
from fedkd.report.runfolder import Run, expand
from fedkd.shelves import ShelfStore
from fedkd.storage import StorageError, pack_tensors
from fedkd.store import flatten

SMALL: dict[str, Any] = {
    "rounds": 5,
    "partition": {"clients": 6, "alpha": 0.3},
    "proxy": {"size": 120},
    "training": {"epochs": 1, "batch_size": 16},
    "digest": {"epochs": 1},
    "server": {"epochs": 1},
    "evaluation": {"local_only": False},
}

CASES: dict[str, dict[str, Any]] = {
    "ds_fl": {"proxy_per_round": 50, "training": {"epochs": 1, "optimizer": {"momentum": 0.9, "persist": True}}},
    "cfd": {"population": {"participation": 0.6, "dropout": 0.2, "late": 0.2}},
    "fd": {},
    "fedmd": {"proxy": {"size": 120, "labelled": True}, "pretrain": {"epochs": 1}},
    "fedproto": {},
    "feddf": {"models": {"student": "mlp", "devices": ["mlp", "mlp(hidden=[32])"]}},
    "fedavg": {"codec": {"up": "float16+delta+deflate"}},
    "dense": {"algorithm": section("dense")},
    "scarlet": {
        "algorithm": {"name": "scarlet", "duration": 1},
        "proxy_per_round": 60,
        "population": {"participation": 0.6},
    },
}
# Devices that are not always there, so that what a method remembers of each is needed after the interruption.
ABSENT: dict[str, Any] = {"population": {"participation": 0.6}, "proxy": {"size": 40, "labelled": True}}
RESUMED = [*CASES, *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m not in CASES and m != "central")]


class Interrupt:
    """Stops a run by what Ctrl-C raises, after some rounds."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, record: Mapping[str, Any], rounds: int) -> None:
        if record["round"] + 1 == self.after:
            raise KeyboardInterrupt


def experiment(method: str, **more: Any) -> Experiment:
    return validate({**SMALL, "algorithm": method, **CASES.get(method, {}), **more})


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for row in found:
        row.pop("seconds")
    return found


def everything(folder: Path) -> dict[str, Any]:
    """All that training leaves behind."""
    last = sorted((folder / "checkpoints").iterdir())[-1]
    store = ShelfStore(folder / "states", 0)
    store.restore({"devices.safetensors": (last / "devices.safetensors").read_bytes()}, 0)
    found: dict[str, Any] = {"rows": rows(folder)}
    for client in range(6):
        tensors, kind = flatten(store.load(client, 0))
        found[f"device {client}"] = (pack_tensors(tensors), kind)
    if (folder / "student.safetensors").exists():
        found["student"] = (folder / "student.safetensors").read_bytes()
    return found


@pytest.mark.parametrize("method", RESUMED)
def test_resume_gives_bit_for_bit_what_an_uninterrupted_run_gives(method: str, tmp_path: Path) -> None:
    whole, cut = tmp_path / "a" / "run", tmp_path / "b" / "run"
    wanted = experiment(method, **({} if method in CASES else {**ABSENT, "algorithm": section(method)}))
    simulate.start(wanted, whole)
    with pytest.raises(KeyboardInterrupt):
        simulate.start(wanted, cut, Interrupt(2))
    assert json.loads((cut / "summary.json").read_text())["status"] == "stopped"
    with pytest.raises(KeyboardInterrupt):
        simulate.resume(cut, Interrupt(4))
    simulate.resume(cut)
    assert everything(cut) == everything(whole)


def test_resume_does_not_depend_on_how_often_it_was_saved(tmp_path: Path) -> None:
    more = {"checkpoint": {"every": 3}}
    whole, cut = tmp_path / "a" / "run", tmp_path / "b" / "run"
    simulate.start(experiment("ds_fl", **more), whole)
    with pytest.raises(KeyboardInterrupt):
        simulate.start(experiment("ds_fl", **more), cut, Interrupt(5 - 1))
    assert len(rows(cut)) == 4, "round 4 was recorded but not saved"
    simulate.resume(cut)
    assert everything(cut) == everything(whole)


@pytest.mark.fault(15, "killed at a random moment of a run and resumed: the student equals the undisturbed run's")
def test_a_killed_process_resumes_to_the_same_student(tmp_path: Path) -> None:
    whole, cut = tmp_path / "a" / "run", tmp_path / "b" / "run"
    # Bit for bit holds at one number of threads, and the two processes need not start with the same.
    words = ["rounds=12", "proxy.size=120", "partition.clients=6", "training.epochs=1", "evaluation.local_only=false"]
    words.append("runner.threads=1")
    simulate.start(load(None, words)[0][1], whole)
    command = [sys.executable, "-m", "fedkd", "simulate", *words, "--out", str(cut)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (cut / "checkpoints").is_dir() and len(list((cut / "checkpoints").glob("round-*"))) >= 2:
            break
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    simulate.resume(cut)
    assert (cut / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()
    assert rows(cut) == rows(whole)


def test_ctrl_c_on_the_command_line_exits_130_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "fedkd", "simulate", "rounds=500", "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (folder / "checkpoints").is_dir():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert f"fedkd simulate --resume {folder}" in " ".join(error.split())


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    whole, cut = tmp_path / "a" / "run", tmp_path / "b" / "run"
    simulate.start(experiment("ds_fl"), whole)
    with pytest.raises(KeyboardInterrupt):
        simulate.start(experiment("ds_fl"), cut, Interrupt(3))
    checkpoints = sorted((cut / "checkpoints").iterdir())
    victim = checkpoints[-1] / "server.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    simulate.resume(cut)
    assert everything(cut) == everything(whole)


def test_without_a_whole_checkpoint_the_reason_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        simulate.start(experiment("ds_fl"), folder, Interrupt(2))
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "devices.safetensors").write_bytes(b"gone")
    with pytest.raises(StorageError, match="checksum"):
        simulate.resume(folder)


def test_a_run_folder_is_what_the_documentation_says(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    simulate.start(experiment("ds_fl", evaluation={"clients_every": 2}), folder)
    run = Run.read(folder)
    assert len(run.rounds) == 5
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["epsilon"] is None
    found = rows(folder)
    assert summary["bytes_up"] == sum(row["bytes_up"] for row in found)
    assert summary["bytes_down"] == sum(row["bytes_down"] for row in found)
    proxy = json.loads((folder / "partition.json").read_text())["proxy"]
    assert summary["bytes_proxy"] == 6 * proxy["bytes"]
    assert summary["accuracy"]["student"] == found[-1]["student_accuracy"]
    assert [row["clients_accuracy"] is not None for row in found] == [False, True, False, True, True]
    assert found[-1]["clients_accuracy"] == [c["accuracy"] for c in summary["per_client"]]
    assert validate(simulate.read_yaml(folder / "config.yaml")).rounds == 5


def test_a_second_run_does_not_overwrite_the_first(tmp_path: Path) -> None:
    simulate.start(experiment("local", rounds=1), tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run already"):
        simulate.start(experiment("local", rounds=1), tmp_path / "run")


def test_a_sweep_resumes_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(experiment("ds_fl", rounds=2).dump())
    points = load(path, ["seed=1,2", "algorithm.temperature=0.1,1"])
    assert [dict(varying) for varying, _ in points] == [
        {"algorithm.temperature": t, "seed": s} for t in (0.1, 1) for s in (1, 2)
    ]
    folder = tmp_path / "sweep"

    def announce(name: str, _: Experiment) -> Interrupt:
        return Interrupt(1 if "temperature=1,seed=1" in name else 99)

    with pytest.raises(KeyboardInterrupt):
        simulate.sweep(points, folder, announce, jobs=1)
    done = simulate.resume_sweep(folder, jobs=1)
    assert [f.summary["seed"] for f in done] == [1, 2, 1, 2]
    straight = simulate.start(points[2][1], tmp_path / "algorithm.temperature=1,seed=1")
    assert everything(done[2].folder) == everything(straight.folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["points"]) == 2 and summary["points"][0]["seeds"] == [1, 2]
    assert len(expand([folder])) == 4


def test_local_only_is_what_the_local_method_gives(tmp_path: Path) -> None:
    """The baseline beside every run is the method ``local`` on the same records, not a shortcut."""
    wanted = experiment("ds_fl", evaluation={})
    site = simulate.Site.load(wanted)
    beside = simulate.play(site, _runner(site), _folder(tmp_path / "a", wanted)).summary
    # `local` takes no proxy set, so that by itself it would deal other records: it is given the same ones.
    alone = simulate.Site(experiment("local", evaluation={}, training=CASES["ds_fl"]["training"]), site.federation)
    told = simulate.play(alone, _runner(alone), _folder(tmp_path / "b", alone.experiment)).summary
    assert told["accuracy"]["local_only"] is None
    assert [c["local_only"] for c in beside["per_client"]] == [c["accuracy"] for c in told["per_client"]]
    assert len({c["accuracy"] for c in told["per_client"]}) > 1


def _runner(site: simulate.Site) -> simulate.LocalRunner:
    return simulate.LocalRunner(site, simulate.make_engine(site, "stacked"))


def _folder(path: Path, wanted: Experiment) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(wanted.dump())
    return path


def test_how_often_a_run_is_looked_at_changes_nothing(tmp_path: Path) -> None:
    """Batch normalisation has modes and statistics that an evaluation must leave as they were."""
    more = {"rounds": 3, "models": {"student": "cnn", "devices": ["cnn"]}, "proxy_per_round": 50}
    often = simulate.start(
        experiment("cfd", **more, evaluation={"every": 1, "clients_every": 1}), tmp_path / "a" / "run"
    )
    seldom = simulate.start(experiment("cfd", **more, evaluation={"every": 3}), tmp_path / "b" / "run")
    names = ("student.safetensors", "partition.json")
    assert all((often.folder / n).read_bytes() == (seldom.folder / n).read_bytes() for n in names)
    assert often.summary["accuracy"] == seldom.summary["accuracy"]


def test_a_lost_class_is_told_of(tmp_path: Path) -> None:
    done = simulate.start(experiment("ds_fl", rounds=1), tmp_path / "run")
    shares = done.summary["student_per_class"]
    site = simulate.Site.load(experiment("ds_fl", rounds=1))
    assert site.test.y is not None and len(shares) == 10
    totals = site.test.y.bincount(minlength=10)
    mean = sum(share * int(of) for share, of in zip(shares, totals, strict=True)) / int(totals.sum())
    assert mean == pytest.approx(done.summary["accuracy"]["student"])
    assert "hardly" not in " ".join(done.summary["notes"]), "after one round nothing is learned yet"
    assert simulate._lost(site, [0.9, 0.03, *[0.8] * 7, None]) == []
    site = simulate.Site.load(experiment("ds_fl", rounds=5))
    told = " ".join(simulate._lost(site, [0.9, 0.03, *[0.8] * 7, None]))
    assert "1 (3 %, " in told and told.count("holders") == 1
    assert simulate._lost(site, [0.9, 0.3, *[0.8] * 8]) == []
    pooled, plain = (done.summary["accuracy"][f"clients_own_classes_{how}"] for how in ("pooled", "mean"))
    counts = site.federation.counts > 0
    tested = [int(totals[torch.from_numpy(row)].sum()) for row in counts]
    each = [one["accuracy_own_classes"] for one in done.summary["per_client"]]
    assert pooled == pytest.approx(sum(a * n for a, n in zip(each, tested, strict=True)) / sum(tested))
    assert plain == pytest.approx(sum(each) / len(each))
    notes = simulate._codec(experiment("cfd", dtype="float64")), simulate._codec(experiment("cfd"))
    assert "simplex:1" in notes[0][0] and notes[1] == []


def test_a_run_takes_one_thread_and_leaves_torch_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, whose threads do not wait for one another, take as many as torch had."""
    seen = []
    monkeypatch.setattr(simulate, "_run", lambda *_: seen.append((torch.get_num_threads(), AT_ONCE.get())))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        simulate.start(experiment("ds_fl"), tmp_path / "a")
        simulate.start(experiment("ds_fl", runner={"threads": 3}), tmp_path / "b")
        assert seen == [(1, 2), (3, 3)] and torch.get_num_threads() == 2 and AT_ONCE.get() is None
    finally:
        torch.set_num_threads(before)
