"""`fedkd run`: start a run on a real server, watch it, leave it alone, come back to it, go on after a crash."""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedkd.deploy.control import Control, ControlError
from fedkd.deploy.kit import ServerKit
from fedkd.deploy.serve import NETWORK, Standing, run_folder
from fedkd.deploy.supervise import Process
from fedkd.errors import ConfigError, FedkdError
from fedkd.experiment import Experiment
from fedkd.simulate import CONFIG, ROWS, SUMMARY
from fedkd.storage import write_atomic

WATCH_SECONDS = 0.3
FULL_BYTES = 2**20
START_TRIES, START_PAUSE_SECONDS = 20, 1.0


class RunEnded(FedkdError):
    """A run that did not come to its end, and why."""


def start(kit: ServerKit, experiment: Experiment, name: str | None = None) -> Path:
    """Start a run of ``experiment``; returns its folder.

    Raises:
        ConfigError: the name is taken, or the experiment cannot run on a network. ControlError: the server is not there.
    """
    experiment = for_network(experiment)
    folder = run_folder(kit, name) if name is not None else _fresh(kit, experiment.name)
    if (folder / NETWORK).exists():
        raise ConfigError(
            f"{folder} holds a run already: go on by `fedkd run --resume {folder.name}`, or choose --name"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / CONFIG, experiment.dump().encode())
    standing = Standing(token=secrets.token_hex(4))
    standing.write(folder)
    _launch(kit, folder, standing)
    return folder


def resume(kit: ServerKit, name: str) -> Path:
    """Let a run go on from its last completed round; one that is running or finished is left as it is.

    Raises:
        ConfigError: there is no such run. ControlError: the server is not there.
    """
    folder = run_folder(kit, name)
    standing = Standing.read(folder)
    if standing.phase == "finished":
        return folder
    if _alive(kit, standing):
        if not killed(standing):
            return folder
        # Flower would find out by the missing heartbeats, half a minute later.
        stop(kit, name)
    _launch(kit, folder, standing)
    return folder


def killed(standing: Standing) -> bool:
    """Tell whether a run's process has ended without a word: killed by force, or by a power cut."""
    return standing.phase in ("waiting", "running") and Process.of(standing.pid) is None


def _alive(kit: ServerKit, standing: Standing) -> bool:
    if not standing.flower_run:
        return False
    control = Control(kit)
    try:
        state = control.state(standing.flower_run)
    finally:
        control.close()
    return state is not None and not state.ended


def _launch(kit: ServerKit, folder: Path, standing: Standing) -> None:
    for attempt in range(START_TRIES):
        control = Control(kit)
        try:
            number = control.start({"run": folder.name})
            break
        except ControlError:
            # A server that was started a moment ago needs a few seconds.
            if attempt == START_TRIES - 1:
                raise
            time.sleep(START_PAUSE_SECONDS)
        finally:
            control.close()
    # The server's own process may have written its standing already.
    now = Standing.read(folder)
    if now.flower_run != number:
        replace(standing, flower_run=number, phase="starting", reason="", pid=0).write(folder)


def stop(kit: ServerKit, name: str) -> bool:
    """End a run; it can be resumed. Returns whether it was running."""
    standing = Standing.read(run_folder(kit, name))
    if not _alive(kit, standing):
        return False
    control = Control(kit)
    try:
        return control.stop(standing.flower_run)
    finally:
        control.close()


def for_network(experiment: Experiment) -> Experiment:
    """Return the experiment as a real network runs it: what a simulation draws by chance happens by itself there.

    Raises:
        ConfigError: it needs a simulation.
    """
    if experiment.method.pools_data:
        raise ConfigError(f"{experiment.method.name} pools everybody's records: it runs by `fedkd simulate` only")
    population = experiment.population.model_copy(update={"dropout": 0.0, "late": 0.0, "over_selection": 0.0})
    if experiment.virtual is not None or population.buffer is not None or population.staleness.limit not in (None, 0):
        raise ConfigError(
            "virtual time, population.buffer and population.staleness are a simulation's: take them out of the experiment"
        )
    return experiment.model_copy(update={"population": population})


def _fresh(kit: ServerKit, name: str) -> Path:
    for number in range(1, 10_000):
        folder = run_folder(kit, name if number == 1 else f"{name}-{number}")
        if not folder.exists():
            return folder
    raise ConfigError(f"{kit.runs} holds ten thousand runs called {name}: tidy up")


# ---- watching -------------------------------------------------------------------------------------------------------
def follow(kit: ServerKit, folder: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the record of every round from now on until the run ends.

    Raises:
        RunEnded: it failed, for the reason given.
    """
    seen, checked = 0, time.monotonic()
    while True:
        standing = Standing.read(folder)
        rows = read_rows(folder)
        if len(rows) < seen:
            seen = len(rows)  # resumed from an earlier round
        yield from rows[seen:]
        seen = len(rows)
        if standing.phase == "finished":
            return
        if standing.phase == "failed":
            raise RunEnded(f"{folder.name} ended: {standing.reason}. Go on by `fedkd run --resume {folder.name}`")
        if time.monotonic() - checked > 3.0:
            checked = time.monotonic()
            reason = _lost(kit, standing)
            if reason is not None and Standing.read(folder) == standing:
                raise RunEnded(f"{folder.name} ended: {reason}. Go on by `fedkd run --resume {folder.name}`")
        time.sleep(WATCH_SECONDS)


def _lost(kit: ServerKit, standing: Standing) -> str | None:
    """Return why a run will not go on, although it did not say so itself."""
    if killed(standing):
        # A run that finds no room can often not even write down why it ended.
        full = shutil.disk_usage(kit.state).free < FULL_BYTES
        return f"its process ended without a word, and {kit.state}'s disk is full" if full else "its process was killed"
    control = Control(kit)
    try:
        state = control.state(standing.flower_run)
    except ControlError:
        return None  # SuperLink is down; whether it took the run with it is known when it is back
    finally:
        control.close()
    if state is None:
        return "SuperLink does not know it any more"
    if state.ended:
        return f"Flower marked it {state.sub_status or 'ended'} ({state.details or 'SuperLink was ended'})"
    return None


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's rounds; a last line that is being written is left out."""
    path = folder / ROWS
    rows = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith(b"\n"):
            break
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def summary(folder: Path) -> dict[str, Any]:
    """Return the summary of a finished run."""
    found: dict[str, Any] = json.loads((folder / SUMMARY).read_text())
    return found
