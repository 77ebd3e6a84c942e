"""The server's process of a run on a real network: what Flower's SuperExec starts, in the kit's folder of runs.

A run's folder is the same as a simulation's (docs/run-folder.md), so that reports, comparisons and resuming know no
difference. ``network.json`` beside it says which Flower run carries it, and how it stands.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from fedkd.deploy.kit import ServerKit
from fedkd.deploy.log import setup_log
from fedkd.errors import ConfigError, FedkdError
from fedkd.storage import write_json

log = logging.getLogger("fedkd.deploy.run")

NETWORK, LOCK = "network.json", ".lock"
RUN_NAME = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}$")
LOCK_SECONDS = 60.0
Phase = Literal["starting", "waiting", "running", "finished", "failed"]


@dataclass(frozen=True)
class Standing:
    """How a run stands. ``token`` tells runs of one name apart, so that devices never mix them up."""

    token: str
    flower_run: int = 0
    phase: Phase = "starting"
    reason: str = ""
    pid: int = 0

    @classmethod
    def read(cls, folder: Path) -> Standing:
        """Read a run's standing.

        Raises:
            ConfigError: the folder holds no run of a network.
        """
        try:
            told = json.loads((folder / NETWORK).read_text())
            return cls(**{k: told[k] for k in ("token", "flower_run", "phase", "reason", "pid")})
        except (OSError, ValueError, KeyError, TypeError) as cause:
            raise ConfigError(f"{folder} holds no run of a network ({cause})") from cause

    def write(self, folder: Path) -> None:
        """Keep it."""
        write_json(folder / NETWORK, self.__dict__)


def run_folder(kit: ServerKit, name: str) -> Path:
    """Return the folder of the run ``name``.

    Raises:
        ConfigError: the name is none.
    """
    if not RUN_NAME.match(name):
        raise ConfigError(f"{name!r} is no name of a run: letters, digits, dot, dash and underscore")
    return kit.runs / name


def serve(grid: Any, context: Any) -> None:
    """Run the rounds of the run that Flower's configuration names, from its last checkpoint on.

    Raises:
        FedkdError: the run ended with a reason; Flower marks its own run as failed, and `fedkd run --resume` goes on.
    """
    kit = ServerKit.read(Path(os.environ["FEDKD_KIT"]))
    setup_log("run", kit.state / "logs")
    folder = run_folder(kit, str(context.run_config.get("run", "")))
    with _alone(folder):
        standing = Standing.read(folder)
        if standing.flower_run and standing.flower_run != context.run_id:
            raise ConfigError(f"Flower run {context.run_id} is not the one that carries {folder.name} now")
        mine = Standing(standing.token, int(context.run_id), "starting", "", os.getpid())
        mine.write(folder)
        try:
            _play(kit, grid, folder, mine)
        except BaseException as cause:
            words = " ".join(str(cause).split()) or type(cause).__name__
            if isinstance(cause, SystemExit | KeyboardInterrupt):
                words = "its process was told to end"
            log.error("%s ended: %s", folder.name, words[:500])
            # A run that was resumed meanwhile, after SuperLink was killed under this process, is its successor's.
            if Standing.read(folder).flower_run == mine.flower_run:
                Standing(mine.token, mine.flower_run, "failed", words[:500], mine.pid).write(folder)
            raise
        Standing(mine.token, mine.flower_run, "finished", "", mine.pid).write(folder)


def _play(kit: ServerKit, grid: Any, folder: Path, standing: Standing) -> None:
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    from fedkd import simulate
    from fedkd.deploy.bell import ring
    from fedkd.deploy.network import GridPost, Member, NetworkRunner
    from fedkd.deploy.sites import server_site
    from fedkd.experiment import read_yaml, validate
    from fedkd.privacy.build import LEDGER, open_ledger

    experiment = validate(read_yaml(folder / simulate.CONFIG))
    clients = kit.client_list().clients
    members = {
        c.id: Member(c.id, c.name, load_pem_public_key(c.node_key_pem), c.node_key_pem)
        for c in clients
        if not c.revoked
    }
    if not members:
        raise ConfigError("nobody takes part: clients.yaml names no client that is not revoked")
    site = server_site(experiment, max(c.id for c in clients) + 1)
    open_ledger(site, folder, kit.state / LEDGER)
    most = int(experiment.deployment.max_answer_mib * 2**20)
    post = GridPost(grid, most, lambda ready: ring(kit.ops_port, (members[k].name for k in ready)))
    runner = NetworkRunner(site, post, members, f"{folder.name}.{standing.token}", lambda: _revoked(kit))
    if not (folder / simulate.PARTITION).exists():
        names = {c.id: c.name for c in clients}
        note = {
            **simulate._partition(site),
            "client_names": [names.get(k, f"client {k}") for k in range(len(site.cards))],
        }
        write_json(folder / simulate.PARTITION, note)
    Standing(standing.token, standing.flower_run, "waiting", "", standing.pid).write(folder)
    runner.wait_for(max(experiment.population.minimum, site.mechanism.least))
    Standing(standing.token, standing.flower_run, "running", "", standing.pid).write(folder)
    simulate.play(site, runner, folder, _Watch(experiment.deployment.max_failed_rounds), run=runner.run)


def _revoked(kit: ServerKit) -> set[int]:
    """Return who was revoked up to now. A list that is being written says nothing new."""
    try:
        return {client.id for client in kit.client_list().clients if client.revoked}
    except ConfigError:
        return set()


class RunFailed(FedkdError):
    """Too many rounds in a row brought nothing."""


class _Watch:
    """Ends a run whose rounds fail one after the other."""

    def __init__(self, most: int) -> None:
        self._most, self._failed = most, 0

    def __call__(self, record: Mapping[str, Any], rounds: int) -> None:
        log.info("round %d of %d: student %s", record["round"] + 1, rounds, record["student_accuracy"])
        self._failed = self._failed + 1 if record["failed"] else 0
        if self._failed >= self._most and record["round"] + 1 < rounds:
            raise RunFailed(
                f"{self._failed} rounds in a row failed, the last one for this reason: {record['failed']}. The student is "
                "as it was before them; `fedkd run --resume` goes on"
            )


@contextmanager
def _alone(folder: Path) -> Iterator[IO[bytes]]:
    """Hold a run's folder, so that a process left behind by a killed SuperLink never writes beside its successor."""
    with open(folder / LOCK, "wb") as file:
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as cause:
                if time.monotonic() > end:
                    raise ConfigError(f"another process works on {folder}: wait for it, or end it") from cause
                time.sleep(0.5)
        yield file
