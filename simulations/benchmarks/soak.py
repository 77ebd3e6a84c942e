"""Kill -9 at random moments of runs on a real server: ``python -m simulations.benchmarks.soak --kills 24 --seed 1``.

A server and its nodes work on this machine, as `fedkd server start` and `fedkd client start` run them. Beside them a killer
sends SIGKILL at moments drawn from the seed: to one process of the server (SuperLink, SuperExec, gate, supervisor, the
run's own), to all of them at once, as a power cut would, or to a node. A keeper does what systemd and an operator do: it
starts what has ended, and types `fedkd run --resume` when a run has. Three of four moments are counted while a run is in
its rounds, the fourth whatever happens then, a recovery included. As soon as a
run is finished its student is held against the one of an undisturbed simulation, its records against those of a first run
that is left in peace, and the next run begins, until all kills are spent.

SIGKILL loses nothing that was handed to the kernel: that files are synced before they are renamed is shown by tests, not
by this.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from fedkd import simulate
from fedkd.deploy import run as runs
from fedkd.deploy.serve import NETWORK, Standing
from fedkd.deploy.supervise import Process
from fedkd.errors import FedkdError
from fedkd.experiment import Experiment, validate
from simulations.benchmarks.loopback import Loopback, digits, scratch
from simulations.tables import HERE, made_with

SERVER = ("superlink", "superexec", "gate", "supervisor", "run")
VICTIMS = ("node",) * 6 + ("power cut", "superlink", "run", "superexec", "gate", "supervisor")
"""One block of victims, half of them nodes; its order is drawn anew for each twelve kills."""
PROXY = 200
TOLERANCE = 1e-4


def experiment(clients: int, rounds: int, algorithm: str, codec: str) -> Experiment:
    """Return what runs: a small federation on the digits, in which devices keep models between rounds."""
    stretch = {"epochs": 2, "batch_size": 16, "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}
    return validate(
        {
            "name": "soak", "rounds": rounds, "seed": 1, "data": {"source": "digits"},
            "partition": {"clients": clients, "alpha": 0.5}, "proxy": {"size": PROXY}, "proxy_per_round": PROXY // 2,
            "algorithm": algorithm, "codec": {"up": codec, "down": codec},
            "training": stretch, "digest": stretch, "server": stretch,
            "evaluation": {"local_only": False}, "runner": {"kind": "serial"},
        }
    )  # fmt: skip


@dataclass
class Kill:
    """What was killed, in which second of the soak, and how the run stood: its phase, and the rounds recorded so far.

    ``phase``: that of a run whose process lives; "recovering" if an earlier kill has ended it.
    """

    victim: str
    second: float
    run: str
    phase: str
    rounds: int


@dataclass
class Outcome:
    """One run that came to its end.

    ``launches``: how often it was started; each after the first repeats the round that was open. ``rounds_lost``: rounds
    that were recorded and done again, because the checkpoint after them was not there yet.
    """

    run: str
    rounds: int
    launches: int
    kills: int
    rounds_lost: int
    seconds: float
    answers_sent: int
    answers_counted: int
    quarantined: int
    bytes_up: int
    bytes_down: int
    difference: float
    same_rows: bool


@dataclass
class Soak:
    """A soak under way. ``lock`` guards ``kills``."""

    net: Loopback
    wanted: int
    until: float
    rng: np.random.Generator
    began: float = field(default_factory=time.monotonic)
    kills: list[Kill] = field(default_factory=list)
    run: str = ""
    launches: int = 0
    rounds_lost: int = 0
    done: threading.Event = field(default_factory=threading.Event)
    order: list[str] = field(default_factory=list)

    # ---- the killer -------------------------------------------------------------------------------------------------
    def kill_on(self, round_seconds: float) -> None:
        """Kill until all kills, or the time, are spent; a thread of its own."""
        while len(self.kills) < self.wanted and not self.done.is_set():
            if self.rng.random() < 0.75:
                self._wait(lambda: self._phase() == "running")
                pause = float(self.rng.uniform(0, 3 * round_seconds))
            else:
                pause = float(self.rng.uniform(0, 10 * round_seconds))
            self.done.wait(pause)
            if not self.order:
                self.order = [VICTIMS[i] for i in self.rng.permutation(len(VICTIMS))]
            victim = self.order.pop()
            if time.monotonic() > self.until:
                return
            phase, rounds = self._phase(), self._rounds()
            if self.done.is_set() or not self._kill(victim):
                self.order.append(victim)  # it does not run just now: its turn comes later
            else:
                kill = Kill(victim, round(time.monotonic() - self.began, 1), self.run, phase, rounds)
                self.kills.append(kill)
                words = f"kill {len(self.kills)} of {self.wanted}: {victim}; {self.run} {phase}, {rounds} rounds done"
                print(f"{kill.second:7.1f} s  {words}", file=sys.stderr, flush=True)

    def _kill(self, victim: str) -> bool:
        """Send SIGKILL; returns whether anything was hit."""
        processes = self.net.processes()
        worker = Process.of(self._standing().pid) if self._standing().phase in ("waiting", "running") else None
        if worker is not None:
            processes["run"] = worker
        nodes = sorted(set(processes) - set(SERVER))
        if victim == "node":
            names = [str(self.rng.choice(nodes))] if nodes else []
        else:
            names = [n for n in (SERVER if victim == "power cut" else (victim,)) if n in processes]
        for name in names:
            processes[name].signal(9)
        return bool(names)

    # ---- the keeper -------------------------------------------------------------------------------------------------
    def keep(self, folder: Path, minutes: float) -> None:
        """Start what has ended and resume the run until it is finished.

        Raises:
            TimeoutError: it is not after ``minutes``.
        """
        end, refused = time.monotonic() + 60 * minutes, ""
        while self._standing().phase != "finished":
            if time.monotonic() > end:
                raise TimeoutError(f"{self.run} is not finished after {minutes} minutes: {self._standing()}; {refused}")
            before, recorded = self._standing().flower_run, self._rounds()
            saved = max((int(p.name[6:]) for p in folder.glob("checkpoints/round-[0-9]*")), default=0)
            # What is killed while it starts is started again in the next turn, as systemd would.
            try:
                self.net.start()
                runs.resume(self.net.kit, self.run)
            except FedkdError as cause:
                refused = str(cause)
            if self._standing().flower_run not in (0, before):
                self.launches += 1
                self.rounds_lost += max(0, recorded - saved)
            time.sleep(0.5)

    def play(self, chosen: Experiment, number: int, minutes: float) -> tuple[Path, float]:
        """Play one run to its end; returns its folder and seconds."""
        began = time.monotonic()
        self.launches, self.rounds_lost = 1, 0
        name = f"soak-{number:02d}"
        folder = runs.run_folder(self.net.kit, name)
        while not (folder / NETWORK).exists():
            if time.monotonic() - began > 60 * minutes:
                raise TimeoutError(f"{name} could not be started within {minutes} minutes")
            # One whose launch was hit has its folder all the same, and is resumed like any other.
            with suppress(FedkdError):
                self.net.start()
                self.run = name
                runs.start(self.net.kit, chosen, name)
        self.keep(folder, minutes)
        return folder, time.monotonic() - began

    # ---- what is read -----------------------------------------------------------------------------------------------
    def _standing(self) -> Standing:
        try:
            return Standing.read(runs.run_folder(self.net.kit, self.run or "none"))
        except FedkdError:
            return Standing(token="")

    def _phase(self) -> str:
        standing = self._standing()
        at_work = standing.phase in ("waiting", "running") and Process.of(standing.pid) is None
        return "recovering" if at_work or standing.phase == "failed" else standing.phase

    def _rounds(self) -> int:
        return len(runs.read_rows(runs.run_folder(self.net.kit, self.run))) if self.run else 0

    def _wait(self, true: Any) -> None:
        while not true() and not self.done.is_set():
            time.sleep(0.05)


def difference(folder: Path, calm: Path) -> float:
    """Return the largest difference between the weights of two runs' students."""
    one, other = (load_file(f / simulate.STUDENT) for f in (folder, calm))
    return max(float((one[n] - other[n]).abs().max()) for n in one.keys() | other.keys())


def told(folder: Path) -> list[list[Any]]:
    """Return what a run's records say, without times."""
    keys = ("round", "asked", "answered", "quarantined", "failed", "bytes_up", "bytes_down", "student_accuracy")
    return [[row[key] for key in keys] for row in runs.read_rows(folder)]


def answers_sent(net: Loopback, run: str) -> int:
    """Count the answers that the nodes say they sent in a run."""
    sent = 0
    for kit in net.clients:
        for log in (kit.state / "logs").glob("client.jsonl*"):
            sent += sum(f" of {run}." in line and " answered (" in line for line in log.read_text().splitlines())
    return sent


def soak(words: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run it all; returns what is written as JSON."""
    torch.set_num_threads(1)
    chosen = experiment(words.clients, words.rounds, words.algorithm, words.codec)
    calm = simulate.start(chosen, folder / "calm").folder
    outcomes: list[Outcome] = []
    with Loopback(folder, words.clients, digits(words.clients, proxy=PROXY)) as net:
        state = Soak(net, words.kills, time.monotonic() + 60 * words.limit, np.random.default_rng(words.seed))
        net.start()
        # The first run is left in peace: it says how long a round takes, and that the two agree without any kill.
        killer: threading.Thread | None = None
        while not outcomes or (len(state.kills) < state.wanted and time.monotonic() < state.until):
            before = len(state.kills)
            if outcomes and killer is None:
                pace = float(np.median([row["seconds"] for row in runs.read_rows(runs.run_folder(net.kit, "soak-00"))]))
                killer = threading.Thread(target=state.kill_on, args=(pace,), daemon=True)
                killer.start()
            done, seconds = state.play(chosen, len(outcomes), words.minutes)
            rows = runs.read_rows(done)
            outcomes.append(
                Outcome(
                    run=done.name, rounds=len(rows), launches=state.launches, kills=len(state.kills) - before,
                    rounds_lost=state.rounds_lost, seconds=seconds, answers_sent=answers_sent(net, done.name),
                    answers_counted=sum(row["answered"] for row in rows),
                    quarantined=sum(len(row["quarantined"]) for row in rows),
                    bytes_up=sum(row["bytes_up"] for row in rows), bytes_down=sum(row["bytes_down"] for row in rows),
                    difference=difference(done, calm), same_rows=told(done) == told(runs.run_folder(net.kit, "soak-00")),
                )
            )  # fmt: skip
            print(line(outcomes[-1]), file=sys.stderr, flush=True)
        state.done.set()
    return {
        "versions": made_with(),
        "settings": {k: getattr(words, k) for k in ("kills", "seed", "clients", "rounds", "algorithm", "codec")},
        "kills": [asdict(kill) for kill in state.kills],
        "runs": [asdict(outcome) for outcome in outcomes],
    }


def line(one: Outcome) -> str:
    """Return an outcome as a line."""
    return (
        f"{one.run}: {one.kills} kills, {one.launches - 1} resumes, {one.rounds_lost} recorded rounds done again, "
        f"{one.answers_sent} answers sent of {one.answers_counted} counted, {one.quarantined} quarantined, "
        f"{(one.bytes_up + one.bytes_down) / 1e6:.2f} MB, {one.seconds:.0f} s; student differs by {one.difference:.1e}, "
        f"records {'the same' if one.same_rows else 'NOT the same'}"
    )


def table(found: dict[str, Any]) -> str:
    """Return the table of docs/deploy.md."""
    killed = Counter(kill["victim"] for kill in found["kills"])
    disturbed = found["runs"][1:]
    rows = [
        ("kills", f"{len(found['kills'])}: " + ", ".join(f"{n} {name}" for name, n in sorted(killed.items()))),
        ("while the run was", ", ".join(f"{n} {p}" for p, n in Counter(k["phase"] for k in found["kills"]).items())),
        ("runs, rounds of each", f"{len(disturbed)}, {found['settings']['rounds']}"),
        ("resumes, each of which repeats the open round", str(sum(r["launches"] - 1 for r in disturbed))),
        ("recorded rounds that were done again", str(sum(r["rounds_lost"] for r in disturbed))),
        ("answers sent / counted", f"{_sum(disturbed, 'answers_sent')} / {_sum(disturbed, 'answers_counted')}"),
        ("answers quarantined", str(_sum(disturbed, "quarantined"))),
        ("largest difference from the undisturbed student", f"{max(r['difference'] for r in disturbed):.1e}"),
        ("runs with the undisturbed run's records", f"{sum(r['same_rows'] for r in disturbed)} of {len(disturbed)}"),
    ]
    return "\n".join(f"| {name} | {value} |" for name, value in [("", ""), ("---", "---"), *rows])


def _sum(outcomes: list[dict[str, Any]], key: str) -> int:
    return int(sum(outcome[key] for outcome in outcomes))


def main(argv: list[str] | None = None) -> None:
    """Kill, print the table and write JSON; exit with 1 if a student came out different."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8, help="of each run")
    parser.add_argument("--algorithm", default="ds_fl")
    parser.add_argument("--codec", default="float32")
    parser.add_argument("--limit", type=float, default=60, help="Minutes after which nothing is killed any more.")
    parser.add_argument("--minutes", type=float, default=10, help="A run that takes longer has failed.")
    parser.add_argument("--work", type=Path, help="An empty folder to work in, which stays; default: a temporary one.")
    parser.add_argument("--json", type=Path, default=HERE / "benchmarks" / "soak.json")
    words = parser.parse_args(argv)
    with scratch(words.work) as folder:
        found = soak(words, folder)
    print(table(found))
    words.json.parent.mkdir(parents=True, exist_ok=True)
    words.json.write_text(json.dumps(found, indent=1) + "\n")
    if any(run["difference"] > TOLERANCE or not run["same_rows"] for run in found["runs"]):
        sys.exit("a run ended with another result than the undisturbed one")


if __name__ == "__main__":
    main()
