"""Client-rounds per second of fedkd, a plain loop, Flower on Ray and pfl-research, all doing the same work.

``python -m simulations.benchmarks.throughput [--passes 3] [--models mlp,lenet,logreg] [--out throughput.json] [--quick]``

Each contender runs in a process of its own that waits while the others are measured. A pass measures every contender
once, in an order that changes from pass to pass; the tuned plain loop (the baseline) is measured before and after each
pass, and a pass across which it drifts by more than 5 % is repeated, a bounded number of times. Reported are medians over
the passes, and ratios of medians with the smallest and largest ratio within a pass.

What is equal for all: the number of clients, the optimiser steps, the samples trained on and answered (counted where they
happen, and compared), and the results (compared in float64 between fedkd's runners and with the plain loop, and in
float32 between all). What is not: fedkd keeps every device's model from round to round, shuffles its records anew and
carries, checks and aggregates encoded messages; the others start from one model, walk the records in one order and only
average the answers. That favours the others.

pfl-research needs an environment of its own: ``--make-pfl-env FOLDER`` makes one, and ``--pfl-python`` or the variable
FEDKD_PFL_PYTHON names its interpreter later. Without it, it is skipped with a word.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from simulations.benchmarks.throughput_work import (
    BATCH,
    CLASSES,
    POOL,
    PROXY,
    RATE,
    RECORDS,
    SETTINGS,
    STEPS,
    WARM_ROUNDS,
    Setting,
    flops,
    save,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PFL_PYTHON = "FEDKD_PFL_PYTHON"
PFL_NEEDS = ("pfl>=0.6,<0.7", "torch>=2.8,<2.14")
DRIFT = 0.05
"""Relative change of the baseline across a pass beyond which the pass is repeated."""
BASELINE = "loop"
CROWDS = (10, 100, 1_000, 10_000)
CROWD_SECONDS = 240.0
"""A number of devices that would take longer than this is left out, and said."""
READY_SECONDS, ANSWER_SECONDS, END_SECONDS = 240.0, 180.0, 20.0
TEST_RECORDS = 100
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}

LABELS = {
    "serial": "fedkd serial, one process",
    "loop": "plain loop, a process per core",
    "stacked": "fedkd stacked, defaults",
    "flower": "Flower on Ray, a client per task",
    "flower_blocks": "fedkd on Flower, stacked blocks",
    "pfl_1": "pfl-research, one process",
    "pfl_2": "pfl-research, two processes",
}
"""Contenders by name. A privacy run (`--dp`) would add names here and a kind in `throughput_peers`."""

MUST: Mapping[str, tuple[float, float]] = {"mlp": (12, 7), "lenet": (6, 5), "logreg": (50, 15)}
"""What stacked must reach over Flower with one client per task, and over pfl-research at its best process count."""


class Failed(RuntimeError):
    """A contender could not start, or died."""


# ---- processes ------------------------------------------------------------------------------------------------------
def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent died, so that none is lost sight of (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def family(root: int) -> dict[int, list[str]]:
    """Return the fields of ``/proc/<pid>/stat`` after the name, for ``root`` and all its descendants."""
    known: dict[int, list[str]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            known[int(folder.name)] = (folder / "stat").read_text().rpartition(")")[2].split()
    kin = {root}
    while new := {pid for pid, stat in known.items() if int(stat[1]) in kin} - kin:
        kin |= new
    return {pid: known[pid] for pid in kin if pid in known}


def cpu_seconds(root: int) -> float:
    """Processor time of a process and its descendants, those included that have ended and were waited for."""
    ticks = sum(sum(int(n) for n in stat[11:15]) for stat in family(root).values())
    return float(ticks / os.sysconf("SC_CLK_TCK"))


def busy_seconds() -> float:
    """Processor time that the whole machine has spent."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, soft = (int(n) for n in file.readline().split()[1:8])
    return float((user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK"))


def memory_bytes(root: int) -> int:
    """Memory of a process and its descendants; what several share is counted once (proportional set size)."""
    total = 0
    for pid in family(root):
        with contextlib.suppress(OSError, StopIteration, ValueError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return total


def peak_bytes(root: int) -> int:
    """The most memory that a process and its descendants have held, each by itself (high-water mark)."""
    total = 0
    for pid in family(root):
        with contextlib.suppress(OSError, StopIteration, ValueError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            total += 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return total


def end_family(root: int, own: bool) -> None:
    """End the descendants of ``root`` by id (and ``root`` with ``own``): asked first, then forced."""
    for sign, wait in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        until = time.monotonic() + wait
        left = {pid for pid in family(root) if own or pid != root}
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, sign)
        while left and time.monotonic() < until:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            left = {pid for pid, stat in family(root).items() if (own or pid != root) and stat[0] != "Z"}
            time.sleep(0.05)
        if not left:
            return


@dataclass
class Child:
    """A contender's process, and what it has told so far."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    check: Path
    told: dict[str, Any] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    _peer: socket.socket | None = None
    _file: Any = None

    def _fault(self, what: str) -> Failed:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return Failed(f"{self.name} {what}: {lines[-1][:300] if lines else 'it wrote nothing'}")

    def connect(self, door: socket.socket, seconds: float) -> None:
        """Wait until the process is warm."""
        until = time.monotonic() + seconds
        door.settimeout(0.25)
        while self._peer is None:
            with contextlib.suppress(TimeoutError):
                self._peer = door.accept()[0]
            if self._peer is None and self.process.poll() is not None:
                raise self._fault(f"ended with status {self.process.returncode}")
            if self._peer is None and time.monotonic() > until:
                raise self._fault(f"was not there after {seconds:.0f} s")
        self._file = self._peer.makefile("rw", encoding="utf-8")
        self.told = self.hear(max(1.0, until - time.monotonic()))

    def hear(self, seconds: float) -> dict[str, Any]:
        """Wait for one message."""
        assert self._peer is not None
        self._peer.settimeout(seconds)
        try:
            text = self._file.readline()
        except TimeoutError as cause:
            raise self._fault(f"was silent for {seconds:.0f} s") from cause
        except OSError as cause:
            raise self._fault("broke off") from cause
        if not text:
            self.process.poll()
            raise self._fault("ended")
        found: dict[str, Any] = json.loads(text)
        return found

    def measure(self, seconds: float) -> dict[str, Any]:
        """Let it work for about ``seconds``."""
        try:
            self._file.write(json.dumps({"do": "measure", "seconds": seconds}) + "\n")
            self._file.flush()
        except OSError as cause:
            raise self._fault("broke off") from cause
        return self.hear(ANSWER_SECONDS + seconds)

    def stop(self) -> None:
        """Let it end; make it end if it does not."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.write('{"do": "stop"}\n')
                self._file.flush()
            with contextlib.suppress(OSError):
                self._file.close()
        if self._peer is not None:
            self._peer.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            # Without its line a process that still waits for orders ends by itself.
            self.process.wait(END_SECONDS if self._peer is not None else 0.1)
        if self.process.poll() is None:
            end_family(self.process.pid, own=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)


class Stable:
    """Starts contenders and sees to it that all of them end."""

    def __init__(self, folder: Path, seed: int, pfl_python: str | None) -> None:
        self.folder, self.seed, self.pfl_python = folder, seed, pfl_python
        self.children: list[Child] = []

    def start(self, name: str, kind: str, setting: Setting, work: Path, extra: Sequence[str] = ()) -> Child:
        """Start a contender and wait until it is warm.

        Raises:
            Failed: it could not start.
        """
        number = len(list(self.folder.glob("*.log")))
        path, log = self.folder / f"{number}.sock", self.folder / f"{number}-{name}.log"
        check = self.folder / f"{number}-{name}.npz"
        arguments = [
            f"--socket={path}", f"--work={work}", f"--check={check}", f"--model={setting.model}",
            f"--shape={','.join(map(str, setting.shape))}", f"--clients={setting.clients}",
        ]  # fmt: skip
        if kind == "pfl":
            assert self.pfl_python is not None
            launch = ["-m", "torch.distributed.run", "--standalone", *extra, str(HERE / "pfl_peer.py")]
            command = [self.pfl_python, *launch, *arguments]
        else:
            module = "simulations.benchmarks.throughput_peers"
            command = [sys.executable, "-m", module, kind, *arguments, f"--seed={self.seed}", *extra]
        environment = dict(os.environ)
        if kind in ("pfl", "loop", "serial"):
            environment["OMP_NUM_THREADS"] = "1"
        with socket.socket(socket.AF_UNIX) as door, open(log, "wb") as file:
            door.bind(str(path))
            door.listen(1)
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            child = Child(name, process, log, check)
            self.children.append(child)
            try:
                child.connect(door, READY_SECONDS)
            except Failed:
                child.stop()
                self.children.remove(child)
                raise
        return child

    def close(self) -> None:
        """End every contender, and whatever they left behind."""
        for child in self.children:
            child.stop()
        self.children.clear()
        end_family(os.getpid(), own=False)


# ---- the work -------------------------------------------------------------------------------------------------------
def prepare(folder: Path, setting: Setting, seed: int) -> Path:
    """Write the records: scikit-learn's digits, drawn with replacement; enlarged to 28x28 for images."""
    from sklearn.datasets import load_digits

    from fedkd.models import Architecture

    work = folder / f"work-{setting.model}-{setting.clients}"
    work.mkdir(exist_ok=True)
    digits = load_digits()
    pixels, labels = digits.images.astype(np.uint8) * 15, digits.target.astype(np.int64)
    rng = np.random.default_rng(seed)
    if setting.image:
        big = pixels.repeat(3, axis=1).repeat(3, axis=2)
        raw: np.ndarray[Any, Any] = np.pad(big, ((0, 0), (2, 2), (2, 2)))
        scaled = raw[:, None].astype(np.float32) / 255
    else:
        raw = scaled = pixels.reshape(len(pixels), -1).astype(np.float32) / 255
    count = setting.clients * RECORDS
    own, proxy = rng.integers(0, len(raw), count), rng.integers(0, len(raw), PROXY)
    every, test = np.concatenate([own, proxy]), rng.integers(0, len(raw), TEST_RECORDS)
    np.savez(work / POOL, x=raw[every], y=labels[every], x_test=raw[test], y_test=labels[test])
    teacher = np.eye(CLASSES, dtype=np.float32)[labels[proxy]] * 0.8 + 0.2 / CLASSES
    shape = setting.shape
    arrays = {
        "x": scaled[own].reshape(setting.clients, RECORDS, *shape),
        "y": labels[own].reshape(setting.clients, RECORDS),
        "proxy": scaled[proxy].reshape(PROXY, *shape),
        "teacher": teacher,
    }
    save(work, arrays, Architecture(setting.model, shape, CLASSES, torch.float32).initial(seed))
    return work


def wanted_counts() -> dict[str, float]:
    """What a client-round is, in the counts that each contender reports."""
    return {"steps": STEPS, "samples": RECORDS + PROXY, "answered": PROXY}


# ---- measuring ------------------------------------------------------------------------------------------------------
class Bench:
    """One whole run of the benchmark."""

    def __init__(self, options: argparse.Namespace, folder: Path, console: Console) -> None:
        self.options, self.folder, self.console = options, folder, console
        self.stable = Stable(folder, options.seed, options.pfl_python)
        self.gemm: list[dict[str, float]] = []
        self.notes: list[str] = []

    def say(self, text: str) -> None:
        """Tell a line and keep it for the JSON."""
        self.notes.append(text)
        self.console.print(text, style="dim", highlight=False)

    def settings(self) -> Iterator[Setting]:
        """Yield the settings asked for."""
        for name in self.options.models:
            setting = SETTINGS[name]
            yield replace(setting, clients=4 if setting.image else 8) if self.options.quick else setting

    # -- throughput --
    def model(self, setting: Setting) -> dict[str, Any]:
        """Measure all contenders on one model."""
        self.console.rule(f"{setting.model}, {setting.clients} clients")
        work = prepare(self.folder, setting, self.options.seed)
        gemm = self.stable.start("gemm", "gemm", setting, work)
        children: dict[str, Child] = {}
        skipped: dict[str, str] = {}
        for name, kind, extra in self._contenders(skipped):
            try:
                children[name] = self.stable.start(name, kind, setting, work, extra)
            except Failed as cause:
                skipped[name] = str(cause)
        for name, reason in skipped.items():
            self.say(f"{setting.model}: {LABELS[name]} is skipped: {reason}")
        if BASELINE not in children:
            raise Failed(f"there is no baseline: {skipped.get(BASELINE)}")
        memory = {name: memory_bytes(child.process.pid) for name, child in children.items()}
        idle = self._idle()
        passes = self._passes(setting, children, gemm)
        made = {
            "clients": setting.clients,
            "flops_per_client_round": flops(setting),
            "passes": passes,
            "idle_cores_of_waiting_contenders": idle,
            "contenders": {name: self._report(name, child, memory[name]) for name, child in children.items()},
            "skipped": skipped,
            "checks": self._checks(setting, work, children),
        }
        self._judge(setting, made)
        self.stable.close()
        return made

    def _contenders(self, skipped: dict[str, str]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        skip = self.options.skip
        yield "loop", "loop", ()
        yield "serial", "serial", ()
        yield "stacked", "stacked", ()
        if "flower" in skip:
            skipped |= {"flower": "left out by --skip", "flower_blocks": "left out by --skip"}
        else:
            yield "flower", "flower", ()
            yield "flower_blocks", "fedkd_on_flower", ()
        reason = "left out by --skip" if "pfl" in skip else missing_pfl(self.options.pfl_python)
        if reason:
            skipped |= {"pfl_1": reason, "pfl_2": reason}
        else:
            yield "pfl_1", "pfl", ("--nproc-per-node=1",)
            yield "pfl_2", "pfl", ("--nproc-per-node=2",)

    def _idle(self) -> float:
        """Cores that the contenders keep busy while all of them wait."""
        seconds = 0.2 if self.options.quick else 1.0
        before = cpu_seconds(os.getpid())
        time.sleep(seconds)
        return max(0.0, cpu_seconds(os.getpid()) - before) / seconds

    def _passes(self, setting: Setting, children: dict[str, Child], gemm: Child) -> list[dict[str, Any]]:
        seconds, wanted = self.options.seconds, self.options.passes
        passes: list[dict[str, Any]] = []
        others = [name for name in children if name != BASELINE]

        def rate(name: str) -> float:
            told = children[name].measure(seconds)
            return float(setting.clients * told["rounds"] / told["seconds"])

        opening = rate(BASELINE)
        for attempt in range(wanted + self.options.repeats):
            own, busy, clock = cpu_seconds(os.getpid()), busy_seconds(), time.perf_counter()
            shift = attempt % max(1, len(others))
            rates = {name: rate(name) for name in others[shift:] + others[:shift]}
            found = gemm.measure(min(0.3, seconds))
            self.gemm.append({threads: float(value) for threads, value in found.items()})
            closing = rate(BASELINE)
            foreign = (busy_seconds() - busy) - (cpu_seconds(os.getpid()) - own)
            drift = abs(closing / opening - 1)
            passes.append(
                {
                    "rates": {BASELINE: (opening + closing) / 2, **rates},
                    "baseline": [opening, closing],
                    "drift": drift,
                    "kept": drift <= DRIFT,
                    "gemm": self.gemm[-1],
                    "foreign_cores": max(0.0, foreign) / (time.perf_counter() - clock),
                    "load": os.getloadavg()[0],
                }
            )
            opening = closing
            if sum(p["kept"] for p in passes) == wanted:
                break
        rejected = [p for p in passes if not p["kept"]]
        if rejected:
            drifts = ", ".join(f"{p['drift']:.0%}" for p in rejected)
            self.say(
                f"{setting.model}: {len(rejected)} of {len(passes)} passes rejected, the baseline drifted: {drifts}"
            )
        short = wanted - sum(p["kept"] for p in passes)
        if short > 0:
            for one in sorted(rejected, key=lambda p: float(p["drift"]))[:short]:
                one["kept"], one["unsteady"] = True, True
            self.say(
                f"{setting.model}: {short} unsteady passes are used all the same: the machine was not quiet enough"
            )
        return passes

    def _report(self, name: str, child: Child, memory: int) -> dict[str, Any]:
        told = child.told
        steady = told["steady_round_seconds"]
        return {
            "label": LABELS[name],
            "startup_seconds": told["startup_seconds"],
            # Compiling kernels, loading libraries, starting Ray's workers: what the first rounds took beyond the pace.
            "warm_up_seconds": max(0.0, sum(told["first_rounds_seconds"]) - len(told["first_rounds_seconds"]) * steady),
            "counts": told["counts"],
            "memory_bytes": memory,
            "facts": told["facts"],
        }

    def _judge(self, setting: Setting, made: dict[str, Any]) -> None:
        """Add medians, spreads and ratios."""
        kept = [p for p in made["passes"] if p["kept"]]
        peak = max(max(p["gemm"].values()) for p in made["passes"])
        for name, contender in made["contenders"].items():
            rates = [p["rates"][name] for p in kept]
            middle = statistics.median(rates)
            contender |= {
                "client_rounds_per_second": middle,
                "spread": [min(rates), max(rates)],
                "share_of_gemm": middle * made["flops_per_client_round"] / (peak * 1e9),
            }
        made["ratios"] = {}
        pfl = [name for name in ("pfl_1", "pfl_2") if name in made["contenders"]]
        best = max(pfl, key=lambda n: float(made["contenders"][n]["client_rounds_per_second"]), default=None)
        for label, name in {**{n: n for n in LABELS if n != "stacked"}, "pfl_best": best}.items():
            if name in made["contenders"] and "stacked" in made["contenders"]:
                each = [p["rates"]["stacked"] / p["rates"][name] for p in kept]
                middle = [made["contenders"][n]["client_rounds_per_second"] for n in ("stacked", name)]
                made["ratios"][label] = {"of_medians": middle[0] / middle[1], "spread": [min(each), max(each)]}

    def _checks(self, setting: Setting, work: Path, children: dict[str, Child]) -> dict[str, Any]:
        """Compare counts and results of all contenders."""
        counts = {n: c.told["counts"] for n, c in children.items() if n != "flower_blocks"}
        same = {n: found == wanted_counts() for n, found in counts.items()}
        arrays = {}
        for name, child in children.items():
            with np.load(child.check, allow_pickle=False) as file:
                arrays[name] = {key: file[key] for key in file.files}

        def apart(one: str, other: str) -> float | None:
            if one not in arrays or other not in arrays:
                return None
            shared = arrays[one].keys() & arrays[other].keys()
            return max((float(np.abs(arrays[one][k] - arrays[other][k]).max()) for k in shared), default=None)

        pairs = [
            ("stacked", "serial"),
            ("flower_blocks", "serial"),
            ("flower", "loop"),
            ("pfl_1", "loop"),
            ("pfl_2", "loop"),
        ]
        single = {f"{a} - {b}": apart(a, b) for a, b in pairs}
        try:
            double = self.stable.start("equality", "equality", setting, work).told["differences"]
        except Failed as cause:
            double = {}
            self.say(f"{setting.model}: the float64 comparison failed: {cause}")
        for name, right in same.items():
            if not right:
                self.say(f"{setting.model}: {LABELS[name]} did other work: {counts[name]}, not {wanted_counts()}")
        for dtype, found in (("float32", single), ("float64", double)):
            for pair, value in found.items():
                if value is not None and not value <= TOLERANCE[dtype]:
                    self.say(
                        f"{setting.model}: {pair} differ by {value:.1e} in {dtype}, more than {TOLERANCE[dtype]:.0e}"
                    )
        return {"wanted": wanted_counts(), "same_work": same, "float32_apart": single, "float64_apart": double}

    # -- cost against the number of devices --
    def crowds(self) -> dict[str, Any]:
        """Measure the cost of a device-round against the number of devices, on the MLP."""
        self.console.rule("cost per device-round, MLP")
        sizes = (5, 10, 20) if self.options.quick else CROWDS
        work = prepare(self.folder, replace(SETTINGS["mlp"], clients=8), self.options.seed)
        children: dict[int, Child] = {}
        cost = 0.0
        for k in sizes:
            if (expected := cost * k * (WARM_ROUNDS + 1 + self.options.passes)) > CROWD_SECONDS:
                self.say(f"{k} devices are left out: at this pace they would take {expected:.0f} s")
                continue
            try:
                child = self.stable.start(f"crowd-{k}", "crowd", replace(SETTINGS["mlp"], clients=k), work)
            except Failed as cause:
                self.say(f"{k} devices are left out: {cause}")
                continue
            children[k], cost = child, child.told["steady_round_seconds"] / k
        costs: dict[int, list[float]] = {k: [] for k in children}
        for attempt in range(self.options.passes):
            for k in sorted(children, reverse=attempt % 2 == 1):
                told = children[k].measure(self.options.seconds)
                costs[k].append(told["seconds"] / told["rounds"] / k)
        made: dict[str, Any] = {
            "devices": {
                str(k): {
                    "seconds_per_device_round": statistics.median(costs[k]),
                    "spread": [min(costs[k]), max(costs[k])],
                    "startup_seconds": child.told["startup_seconds"],
                    "peak_bytes": peak_bytes(child.process.pid),
                    "state_bytes": child.told["facts"]["state_bytes"],
                    "same_work": child.told["counts"] == wanted_counts(),
                }
                for k, child in children.items()
            },
            "flatness": None,
            "peak_bytes_per_device": None,
        }
        many = [k for k in children if k >= sizes[1]]
        if len(many) > 1:
            found = [made["devices"][str(k)] for k in many]
            medians = [f["seconds_per_device_round"] for f in found]
            made |= {
                "flatness": max(medians) / min(medians) - 1,
                "flatness_of": [many[0], many[-1]],
                "peak_bytes_per_device": (found[-1]["peak_bytes"] - found[-2]["peak_bytes"]) / (many[-1] - many[-2]),
                "state_bytes_per_device": found[-1]["state_bytes"],
            }
        self.stable.close()
        return made

    # -- all of it --
    def run(self) -> dict[str, Any]:
        """Measure everything asked for."""
        began, load = time.perf_counter(), os.getloadavg()
        models = {setting.model: self.model(setting) for setting in self.settings()}
        crowds = None if "crowds" in self.options.skip else self.crowds()
        peak = {threads: max(found[threads] for found in self.gemm) for threads in (self.gemm or [{}])[0]}
        return {
            "schema": 1,
            "benchmark": "throughput",
            "quick": self.options.quick,
            "seed": self.options.seed,
            "passes": self.options.passes,
            "machine": machine(),
            "versions": versions(models),
            "load": {"before": list(load), "after": list(os.getloadavg())},
            "seconds": time.perf_counter() - began,
            "work": {"records": RECORDS, "proxy": PROXY, "batch": BATCH, "rate": RATE, "steps": STEPS},
            "gemm_gflops": peak,
            "kernel_compile_seconds": None if self.options.quick else kernel_compile_seconds(self.folder),
            "models": models,
            "devices": crowds,
            "must_show": must_show(models, crowds),
            "notes": self.notes,
        }


def must_show(models: Mapping[str, Any], crowds: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Compare with what the simulator has to reach."""
    found = []
    for name, made in models.items():
        for rival, goal in zip(("flower", "pfl_best"), MUST[name], strict=True):
            if rival in made["ratios"]:
                ratio = made["ratios"][rival]["of_medians"]
                found.append(
                    {"what": f"{name}: stacked over {rival}", "goal": goal, "found": ratio, "met": ratio >= goal}
                )
    if crowds is not None and (flat := crowds["flatness"]) is not None:
        few, many = crowds["flatness_of"]
        what = f"cost per device-round from {few:,} to {many:,} devices: largest over smallest, less 1"
        found.append({"what": what, "goal": 0.2, "found": flat, "met": flat <= 0.2})
        if many == CROWDS[-1]:
            gib = crowds["devices"][str(many)]["peak_bytes"] / 2**30
            found.append({"what": f"{many:,} devices: peak GiB", "goal": 8, "found": gib, "met": gib <= 8})
    return found


def missing_pfl(python: str | None) -> str | None:
    """Say why pfl-research cannot run; None if it can."""
    if python is None:
        return (
            f"no interpreter is named; make one by --make-pfl-env FOLDER, or name one by --pfl-python or {PFL_PYTHON}"
        )
    try:
        done = subprocess.run([python, "-c", "import pfl, torch"], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as cause:
        return f"{python} does not run: {cause}"
    last = done.stderr.strip().splitlines()[-1:] or ["it ended without a word"]
    return None if done.returncode == 0 else f"{python} has no pfl and torch: {last[0]}"


def make_pfl_env(folder: Path) -> str:
    """Make a virtual environment with pfl-research and torch, unless it is there; return its interpreter.

    pip's own configuration says where torch comes from (``PIP_EXTRA_INDEX_URL`` for a build without CUDA).
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if missing_pfl(str(python)):
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PFL_NEEDS], check=True)
    return str(python)


def kernel_compile_seconds(folder: Path) -> float | None:
    """Return what compiling fedkd's kernels takes once per machine, into a cache folder of its own; None: no compiler."""
    ask = "import torch; from fedkd.kernels.build import library as l; f = l(torch.float32); print(f and f.seconds)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", ask], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=READY_SECONDS
    )
    told = (done.stdout.strip().splitlines() or ["None"])[-1]
    return None if told == "None" else float(told)


def machine() -> dict[str, Any]:
    """Describe this machine."""
    model = platform.processor() or platform.machine()
    memory = None
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": platform.platform(),
        "torch_cpu": torch.backends.cpu.get_cpu_capability(),
    }


def versions(models: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions that matter; pfl-research's and its torch are told by itself."""
    found = {"python": platform.python_version()}
    for name in ("fedkd", "torch", "numpy", "flwr", "ray"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    for made in models.values():
        for name, contender in made["contenders"].items():
            if name.startswith("pfl"):
                found |= {"pfl": contender["facts"]["pfl"], "pfl's torch": contender["facts"]["torch"]}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        found["commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return found


# ---- telling --------------------------------------------------------------------------------------------------------
def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def span(ends: Sequence[float]) -> str:
    """Smallest and largest."""
    return "-".join(number(value) for value in ends)


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print the tables."""
    for model, made in found["models"].items():
        mega = made["flops_per_client_round"] / 1e6
        table = Table(title=f"{model}: {made['clients']} clients, {mega:,.1f} MFLOP each")
        for name in ("", "client-rounds/s", "stacked is", "of GEMM", "MiB", "start s", "warm-up s"):
            table.add_column(name, justify="left" if not name else "right", no_wrap=True)
        for name in LABELS:
            if name in made["skipped"]:
                table.add_row(LABELS[name], "skipped", *[""] * 5)
            if name not in made["contenders"]:
                continue
            one, ratio = made["contenders"][name], made["ratios"].get(name)
            table.add_row(
                LABELS[name],
                f"{number(one['client_rounds_per_second'])} ({span(one['spread'])})",
                f"{number(ratio['of_medians'])} x ({span(ratio['spread'])})" if ratio else "",
                f"{one['share_of_gemm']:.1%}",
                f"{one['memory_bytes'] / 2**20:,.0f}",
                f"{one['startup_seconds']:.1f}",
                f"{one['warm_up_seconds']:.1f}",
            )
        console.print(table)
    if found["devices"]:
        table = Table(title="fedkd stacked, MLP: cost against the number of devices")
        for name in ("devices", "µs per device-round", "peak MiB", "start s"):
            table.add_column(name, justify="right", no_wrap=True)
        for k, one in found["devices"]["devices"].items():
            cost = f"{number(1e6 * one['seconds_per_device_round'])} ({span([1e6 * v for v in one['spread']])})"
            table.add_row(f"{int(k):,}", cost, f"{one['peak_bytes'] / 2**20:,.0f}", f"{one['startup_seconds']:.1f}")
        console.print(table)
        if (each := found["devices"]["peak_bytes_per_device"]) is not None:
            weights = found["devices"]["state_bytes_per_device"]
            console.print(f"memory per device: {each / 1024:,.1f} KiB; its weights take {weights / 1024:,.1f} KiB")
    rates = ", ".join(f"{number(v)} on {n} thread{'s' if n != '1' else ''}" for n, v in found["gemm_gflops"].items())
    console.print(f"matrix products: {rates} (GFLOP/s)", highlight=False)
    if (seconds := found["kernel_compile_seconds"]) is not None:
        console.print(f"compiling the kernels, once per machine: {seconds:.1f} s", highlight=False)
    for one in found["must_show"]:
        mark = "met" if one["met"] else "NOT met"
        console.print(f"{one['what']}: {number(one['found'])}, goal {one['goal']:g}: {mark}", highlight=False)
    load = found["load"]
    console.print(
        f"{found['seconds']:.0f} s; load average {load['before'][0]:.2f} before, {load['after'][0]:.2f} after",
        highlight=False,
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.benchmarks.throughput", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--passes", type=int, help="passes to keep (default 3; 1 with --quick)")
    parser.add_argument("--repeats", type=int, help="passes that may be repeated at most (default: as many as passes)")
    parser.add_argument("--models", default=",".join(SETTINGS), help="comma list of mlp, lenet, logreg")
    parser.add_argument("--skip", default="", help="comma list of flower, pfl, crowds")
    parser.add_argument("--seconds", type=float, help="least seconds per measurement (default 1.2; 0.05 with --quick)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="few clients, one short pass: shows that it runs, no more")
    parser.add_argument(
        "--pfl-python", default=os.environ.get(PFL_PYTHON), help=f"interpreter with pfl (or {PFL_PYTHON})"
    )
    parser.add_argument("--make-pfl-env", type=Path, metavar="FOLDER", help="make an environment with pfl, and use it")
    options = parser.parse_args(arguments)
    for name, known in (("models", SETTINGS), ("skip", ("flower", "pfl", "crowds"))):
        chosen = [part for part in getattr(options, name).split(",") if part]
        if unknown := sorted(set(chosen) - set(known)):
            parser.error(f"--{name}: {', '.join(unknown)} is none of {', '.join(known)}")
        setattr(options, name, chosen)
    options.passes = options.passes or (1 if options.quick else 3)
    options.repeats = options.repeats if options.repeats is not None else (0 if options.quick else options.passes)
    options.seconds = options.seconds or (0.05 if options.quick else 1.2)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options, console = parse(arguments), Console()
    if not console.is_terminal:
        console = Console(width=130)
    if options.make_pfl_env:
        options.pfl_python = make_pfl_env(options.make_pfl_env.resolve())
    adopt_orphans()
    # A signal becomes an exception, so that the contenders are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="thr-", ignore_cleanup_errors=True) as folder:
        bench = Bench(options, Path(folder), console)
        try:
            found = bench.run()
        except Failed as cause:
            console.print(f"[red]{cause}")
            return 1
        finally:
            bench.stable.close()
    show(found, console)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        console.print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
