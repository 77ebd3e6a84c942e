"""Runs whose devices lie in files: exact whatever memory they may take, whenever the process dies, whoever is looked at."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_simulate import Interrupt, everything, experiment, rows

from fedkd import simulate
from fedkd.report.runfolder import Run
from fedkd.runners import base
from fedkd.storage import unpack_tensors


def test_results_do_not_depend_on_how_much_memory_devices_may_take(tmp_path: Path) -> None:
    folders = []
    for name, memory in (("files", 0), ("some", 3e-5), ("memory", 1)):
        folders.append(tmp_path / name / "run")
        simulate.start(experiment("ds_fl", runner={"memory_gib": memory}), folders[-1])
    first, *others = (everything(folder) for folder in folders)
    assert all(other == first for other in others)


KILLED = """
import os, signal, sys
from pathlib import Path
from fedkd import simulate
from fedkd.experiment import load
from fedkd.runners import base
import torch
torch.set_num_threads(1)
base.SLICE = 2
respond, rounds = base.respond, set()
def killed(site, engine, store, requests):
    found = respond(site, engine, store, requests)
    rounds.add(requests[0].round)
    if requests[0].round == 3 and requests[0].client >= 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return found
base.respond = killed
simulate.start(load(Path(sys.argv[1]))[0][1], Path(sys.argv[2]))
"""


@pytest.mark.parametrize("memory", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_in_the_middle_of_a_round_is_as_if_the_round_had_not_begun(
    memory: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four of six devices have stored their new state when the process dies; the round is played again from the start."""
    whole, cut = tmp_path / "a" / "run", tmp_path / "b" / "run"
    wanted = experiment("ds_fl", runner={"memory_gib": memory}, checkpoint={"every": 2})
    monkeypatch.setattr(base, "SLICE", 2)
    simulate.start(wanted, whole)
    config = tmp_path / "wanted.yaml"
    config.write_text(wanted.dump())
    done = subprocess.run([sys.executable, "-c", KILLED, str(config), str(cut)], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(rows(cut)) == 3
    simulate.resume(cut)
    assert everything(cut) == everything(whole)


def test_a_damaged_device_file_sends_the_run_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    whole, cut = tmp_path / "a" / "run", tmp_path / "b" / "run"
    more = {"runner": {"memory_gib": 0}}
    simulate.start(experiment("ds_fl", **more), whole)
    with pytest.raises(KeyboardInterrupt):
        simulate.start(experiment("ds_fl", **more), cut, Interrupt(3))
    newest, before = (_places(cut, f"round-{n:06d}") for n in (3, 2))
    place = next(p for p in newest if p not in before)
    path = next((cut / "states").glob("*.rows"))
    data = bytearray(path.read_bytes())
    data[int(place * _row_bytes(path, newest + before)) + 8] ^= 1
    path.write_bytes(data)
    simulate.resume(cut)
    assert everything(cut) == everything(whole)


def _places(folder: Path, checkpoint: str) -> list[int]:
    data = (folder / "checkpoints" / checkpoint / "devices.safetensors").read_bytes()
    return [int(slot) for slot in unpack_tensors(data, "table")["places"][:, 2]]


def _row_bytes(path: Path, slots: list[int]) -> int:
    return path.stat().st_size // (max(slots) + 1)


def test_a_sample_of_devices_has_the_figures_that_all_have(tmp_path: Path) -> None:
    more = {"evaluation": {"clients_every": 2}}
    whole = simulate.start(experiment("ds_fl", **more), tmp_path / "a").summary
    more["evaluation"]["clients_sample"] = 2
    part = simulate.start(experiment("ds_fl", **more), tmp_path / "b").summary
    looked_at = [c for c in part["per_client"] if c["accuracy"] is not None]
    assert len(looked_at) == 2 and len(part["per_client"]) == 6
    assert all(c == whole["per_client"][c["client"]] for c in looked_at)
    assert part["accuracy"]["clients_mean"] == pytest.approx(sum(c["accuracy"] for c in looked_at) / 2)
    assert part["accuracy"]["local_only"] == pytest.approx(sum(c["local_only"] for c in looked_at) / 2)
    assert part["accuracy"]["student"] == whole["accuracy"]["student"]
    assert any("2 of the 6 devices" in note for note in part["notes"]) and not any(
        "of the 6 devices" in note for note in whole["notes"]
    )
    row, full = (rows(tmp_path / name)[1]["clients_accuracy"] for name in ("b", "a"))
    assert sorted(c["client"] for c in looked_at) == [k for k, a in enumerate(row) if a is not None]
    assert all(a is None or a == full[k] for k, a in enumerate(row))
    assert Run.read(tmp_path / "b").rounds[1].clients_accuracy == tuple(row)
