"""A run and a sweep: folders on disk, checkpoints, resume, baselines, and the summary a person wants."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import shutil
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedkd.algorithms.base import ServerState
from fedkd.errors import ConfigError, FedkdError
from fedkd.experiment import Experiment, read_yaml, validate
from fedkd.kernels.jobs import AT_ONCE
from fedkd.payloads import Payload, outline, rebuild
from fedkd.privacy.build import open_ledger
from fedkd.privacy.config import PrivacyConfig
from fedkd.report.runfolder import ACCURACIES, read_json, sweep_points, write_sweep_summary
from fedkd.rounds import Progress, Rounds
from fedkd.runners.base import LocalRunner, Only, Runner, make_engine
from fedkd.shelves import ShelfStore
from fedkd.site import Site
from fedkd.storage import (
    StorageError,
    append_line,
    clear_aside,
    make_folder,
    pack_tensors,
    read_bundle,
    unpack_tensors,
    write_atomic,
    write_bundle,
    write_folder,
    write_json,
)
from fedkd.store import read_metadata
from fedkd.virtual import flights

SCHEMA = 1
CONFIG, ROWS, SUMMARY, PARTITION, SWEEP = "config.yaml", "rounds.jsonl", "summary.json", "partition.json", "sweep.json"
STUDENT, CHECKPOINTS, STATES, SCRATCH = "student.safetensors", "checkpoints", "states", "scratch"
MAX_NAME = 120
"""Characters of a point's folder; file systems allow 255 bytes."""
LOST = 0.2
"""A student that recognises fewer of a class's test records than this has as good as lost the class."""
LEARNED = 0.5
"""Median over classes of that share, below which a student has learned too little to have lost anything."""

Watch = Callable[[Mapping[str, Any], int], None]
"""Called after every round with its record and the number of rounds wanted."""


@dataclass(frozen=True)
class Finished:
    """A run's folder and its summary."""

    folder: Path
    summary: Mapping[str, Any]


# ---- one run --------------------------------------------------------------------------------------------------------
def start(experiment: Experiment, folder: Path, watch: Watch | None = None) -> Finished:
    """Run ``experiment`` into a new folder.

    Raises:
        ConfigError: the folder holds a run already, or experiment and data do not fit.
    """
    if (folder / ROWS).exists() or (folder / CONFIG).exists():
        raise ConfigError(f"{folder} holds a run already: go on with --resume, or choose another --out")
    site = Site.load(experiment)
    make_folder(folder)
    write_json(folder / PARTITION, _partition(site))
    # Last, because it is what makes the folder a run that can be gone on with.
    write_atomic(folder / CONFIG, experiment.dump().encode())
    return _launch(site, folder, watch)


def resume(folder: Path, watch: Watch | None = None) -> Finished:
    """Go on with an interrupted run from its last whole checkpoint, or return it if it is finished.

    Raises:
        ConfigError: the folder holds no run.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} holds no run: expected a {CONFIG} in it")
    experiment = validate(read_yaml(folder / CONFIG))
    summary = _finished(folder, experiment)
    if summary is not None:
        return Finished(folder, summary)
    clear_aside(folder, folder / CHECKPOINTS)
    site = Site.load(experiment)
    if not (folder / PARTITION).is_file():
        write_json(folder / PARTITION, _partition(site))
    return _launch(site, folder, watch)


def is_begun(folder: Path) -> bool:
    """Tell whether ``folder`` holds a run or a sweep that can be gone on with."""
    return (folder / CONFIG).is_file() or (folder / SWEEP).is_file()


def _launch(site: Site, folder: Path, watch: Watch | None) -> Finished:
    """Run on the runner that the experiment names."""
    open_ledger(site, folder)
    with _threads(site.experiment):
        return _run(site, folder, watch)


@contextlib.contextmanager
def _threads(experiment: Experiment) -> Iterator[None]:
    """Give torch ``runner.threads`` threads, or one: the threads of a small operation wait for one another.

    On a busy machine two took ten times as long as one. Compiled kernels share out whole devices, which wait for nobody,
    so that they take as many threads as torch would have.
    """
    before = torch.get_num_threads()
    token = AT_ONCE.set(experiment.runner.threads or before)
    torch.set_num_threads(experiment.runner.threads or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        AT_ONCE.reset(token)


def _run(site: Site, folder: Path, watch: Watch | None) -> Finished:
    kind = site.experiment.runner.kind
    if kind == "flower":
        if site.method.pools_data:
            raise ConfigError(
                f"{site.method.name} pools everybody's records, so that it runs on serial and stacked only"
            )
        from fedkd.runners.flower import run_on_flower

        return run_on_flower(site.experiment, folder, lambda runner: play(site, runner, folder, watch))
    store = ShelfStore(folder / STATES, _budget_bytes(site.experiment), site.experiment.checkpoint.keep)
    try:
        return play(site, LocalRunner(site, make_engine(site, kind), store), folder, watch)
    finally:
        store.close()


def _budget_bytes(experiment: Experiment) -> float:
    return experiment.runner.memory_gib * 2**30


def play(site: Site, runner: Runner, folder: Path, watch: Watch | None = None, *, run: str | None = None) -> Finished:
    """Run the rounds that are left, keep the folder up to date, and write the summary.

    ``run`` is the name that messages carry, by default the folder's.
    Ctrl-C (KeyboardInterrupt) leaves a folder that :func:`resume` goes on with, and is raised again.
    """
    began = time.perf_counter()
    rounds = Rounds(site, runner, run if run is not None else folder.name, folder / SCRATCH)
    progress = _restore(site, runner, folder) or rounds.begin()
    _cut_rows(folder, progress.state.round)
    experiment = site.experiment

    def done(progress: Progress, record: dict[str, Any]) -> None:
        append_line(folder / ROWS, json.dumps(record, allow_nan=False))
        if progress.state.round % experiment.checkpoint.every == 0 or progress.state.round == experiment.rounds:
            _save(runner, folder, progress, experiment.checkpoint.keep)
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        if watch is not None:
            watch(record, experiment.rounds)

    before = progress.seconds
    try:
        rounds.play(progress, done)
        summary = _summary(site, rounds, progress, folder, before + time.perf_counter() - began)
        _write_student(site, progress.state, folder)
    except KeyboardInterrupt:
        if progress.state.round:
            write_json(folder / SUMMARY, _stopped(site, runner, progress, "stopped"))
        raise
    # Last, because it says that all is there.
    write_json(folder / SUMMARY, summary)
    return Finished(folder, summary)


def _write_student(site: Site, state: ServerState, folder: Path) -> None:
    if "student" not in state.models:
        return
    architecture, weights = state.models["student"]
    note = {
        "architecture": architecture,
        "shape": site.shape,
        "classes": site.classes,
        "class_names": site.federation.split.train.class_names,
    }
    # One entry, because safetensors writes several in no fixed order.
    write_atomic(folder / STUDENT, pack_tensors(weights, {"fedkd": json.dumps(note)}))


# ---- checkpoints ----------------------------------------------------------------------------------------------------
def _save(runner: Runner, folder: Path, progress: Progress, keep: int) -> None:
    tensors: dict[str, torch.Tensor] = {}
    state = progress.state
    note: dict[str, Any] = {
        "round": state.round,
        "bytes_up": progress.bytes_up,
        "bytes_down": progress.bytes_down,
        "seconds": progress.seconds,
        "asked": state.asked.tolist(),
        "heard": progress.heard,
        "clock": progress.clock,
        "models": {},
        "payloads": {},
    }
    for role, (architecture, weights) in state.models.items():
        note["models"][role] = architecture
        tensors |= {f"model|{role}|{name}": t for name, t in weights.items()}
    tensors |= {f"memory|{name}": t for name, t in state.memory.items()}
    payloads: dict[str, tuple[int, Payload]] = {"knowledge": (state.round, state.knowledge)}
    payloads |= {f"kept:{client}": item for client, item in progress.answers_kept.items()}
    payloads |= {f"told:{name}": item for name, item in progress.told.items()}
    for i, (name, (round, payload)) in enumerate(payloads.items()):
        note["payloads"][name] = {"round": round, "kinds": outline(payload), "place": i}
        tensors |= {f"payload|{i}|{n}": t for n, t in payload.tensors().items()}
    under_way, note["flights"] = flights.pack(progress.flights.values())
    tensors |= {f"flights|all|{name}": t for name, t in under_way.items()}
    packed = pack_tensors(tensors, {"server": json.dumps(note)})
    checkpoints = folder / CHECKPOINTS
    make_folder(checkpoints)
    write_bundle(checkpoints / f"round-{state.round:06d}", {"server.safetensors": packed, **runner.save()})
    for old in _checkpoints(folder)[keep:]:
        for file in old.iterdir():
            file.unlink()
        old.rmdir()


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, newest first."""
    return sorted((folder / CHECKPOINTS).glob("round-[0-9]*"), reverse=True)


def _restore(site: Site, runner: Runner, folder: Path) -> Progress | None:
    """Return the newest whole checkpoint's progress; a damaged one is passed over for the one before."""
    faults = []
    for i, checkpoint in enumerate(_checkpoints(folder)):
        try:
            files = read_bundle(checkpoint)
            data = files["server.safetensors"]
            note = json.loads(read_metadata(data)["server"])
            tensors = unpack_tensors(data, str(checkpoint))
            waiting = {
                int(f["client"]): int(f["round"])
                for f in note["flights"]
                if f["stage"] == "working" and "reply" not in f
            }
            runner.restore(files, int(note["round"]) - 1, waiting)
        except (StorageError, KeyError, ValueError) as cause:
            faults.append(str(cause))
            continue
        groups: dict[str, dict[str, torch.Tensor]] = {}
        memory = {}
        for name, tensor in tensors.items():
            section, rest = name.split("|", 1)
            if section == "memory":
                memory[rest] = tensor
            else:
                place, rest = rest.split("|", 1)
                groups.setdefault(f"{section}|{place}", {})[rest] = tensor
        payloads = {
            name: (int(p["round"]), rebuild(p["kinds"], groups.get(f"payload|{p['place']}", {})))
            for name, p in note["payloads"].items()
        }
        state = ServerState(
            round=int(note["round"]),
            models={role: (arch, groups.get(f"model|{role}", {})) for role, arch in note["models"].items()},
            knowledge=payloads["knowledge"][1],
            asked=np.asarray(note["asked"], np.int64),
            memory=memory,
        )
        under_way = flights.unpack(groups.get("flights|all", {}), note["flights"])
        for older in _checkpoints(folder)[i + 1 :]:
            # One that is damaged is of no use later either.
            with contextlib.suppress(StorageError, KeyError):
                runner.retain(read_bundle(older))
        return Progress(
            state=state,
            bytes_up=int(note["bytes_up"]),
            bytes_down=int(note["bytes_down"]),
            seconds=float(note["seconds"]),
            answers_kept={int(n[5:]): item for n, item in payloads.items() if n.startswith("kept:")},
            told={n[5:]: item for n, item in payloads.items() if n.startswith("told:")},
            heard={int(client): (int(round), str(name)) for client, (round, name) in note["heard"].items()},
            flights=under_way,
            clock=float(note["clock"]),
        )
    if faults:
        raise StorageError("no checkpoint can be read: " + "; ".join(faults))
    return None


def _cut_rows(folder: Path, rounds: int) -> None:
    """Drop the records of rounds that the checkpoint does not know; they are run again."""
    path = folder / ROWS
    if not path.exists():
        write_atomic(path, b"")
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["round"] >= rounds:
            break
        kept.append(line)
    write_atomic(path, b"".join(kept))


# ---- what is told in the end ----------------------------------------------------------------------------------------
def _partition(site: Site) -> dict[str, Any]:
    train = site.federation.split.train
    counts = site.federation.counts
    names = list(site.federation.client_names) or [f"device {k}" for k in range(len(counts))]
    if site.method.pools_data:
        counts, names = counts.sum(0, keepdims=True), ["all devices together"]
    proxy = site.proxy
    return {
        "counts": counts.tolist(),
        "class_names": [str(n) for n in train.class_names] or [str(c) for c in range(site.classes)],
        "client_names": names,
        "architectures": [card.architecture for card in site.cards],
        "proxy": None
        if proxy is None
        else {"name": proxy.name, "identity": proxy.identity, "size": len(proxy), "bytes": proxy.bytes},
    }


def _own_classes(correct: NDArray[np.int64], counts: NDArray[np.int64], totals: NDArray[np.int64]) -> float | None:
    """Accuracy on the test records of the classes that a device holds."""
    held = counts > 0
    return float(correct[held].sum() / totals[held].sum()) if totals[held].sum() else None


def _pooled(
    correct: Mapping[int, NDArray[np.int64]], counts: NDArray[np.int64], totals: NDArray[np.int64]
) -> float | None:
    """Right answers of all devices on their own classes over all such test records: a device counts by its share."""
    asked = sum(int(totals[counts[k] > 0].sum()) for k in correct)
    return sum(int(right[counts[k] > 0].sum()) for k, right in correct.items()) / asked if asked else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _stopped(site: Site, runner: Runner, progress: Progress, status: str) -> dict[str, Any]:
    claim = site.mechanism.claim()
    return {
        "schema": SCHEMA,
        "name": site.experiment.name,
        "method": site.method.name,
        "runner": runner.name,
        "seed": site.experiment.seed,
        "rounds": site.experiment.rounds,
        "rounds_completed": progress.state.round,
        "status": status,
        "accuracy": dict.fromkeys(ACCURACIES),
        "per_client": [],
        "bytes_up": progress.bytes_up,
        "bytes_down": progress.bytes_down,
        "bytes_proxy": len(site.cards) * site.proxy.bytes if site.proxy is not None else 0,
        "epsilon": claim.epsilon,
        "delta": claim.delta,
        "privacy": claim.to_json(),
        "seconds": progress.seconds,
        "virtual_seconds": None if site.experiment.virtual is None else progress.clock,
        "versions": versions(),
        "git_revision": git_revision(),
        "notes": [],
    }


def _summary(site: Site, rounds: Rounds, progress: Progress, folder: Path, seconds: float) -> dict[str, Any]:
    assert site.test.y is not None
    totals = np.bincount(site.test.y.numpy(), minlength=site.classes)
    counts = np.asarray(_partition(site)["counts"])
    names = _partition(site)["client_names"]
    seen = rounds.inspect(progress.state)
    alone = _local_only(site, rounds.evaluated, folder) if seen is not None else {}
    accuracies = dict(zip(rounds.evaluated, seen.correct, strict=True)) if seen is not None else {}
    per_client: list[dict[str, Any]] = []
    for k, card in enumerate(site.cards):
        one: dict[str, Any] = {
            "client": k,
            "name": names[k],
            "architecture": card.architecture,
            "examples": int(counts[k].sum()),
            "accuracy": float(accuracies[k].sum() / totals.sum()) if k in accuracies else None,
            "accuracy_own_classes": _own_classes(accuracies[k], counts[k], totals) if k in accuracies else None,
            "local_only": alone.get(k),
        }
        per_client.append(one)
    rows = [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]
    recall = _recall(rounds, progress, totals)
    result = _stopped(site, rounds.runner, progress, "finished")
    devices = len(site.cards)
    result |= {
        "accuracy": {
            "student": rows[-1]["student_accuracy"] if rows else None,
            "clients_mean": _mean([c["accuracy"] for c in per_client]),
            "clients_own_classes_mean": _mean([c["accuracy_own_classes"] for c in per_client]),
            "clients_own_classes_pooled": _pooled(accuracies, counts, totals),
            "local_only": _mean(list(alone.values())),
            "ensemble": None if seen is None else rounds.ensemble_accuracy(seen),
        },
        "student_per_class": recall,
        "per_client": per_client,
        "bytes_up_per_device": progress.bytes_up / devices,
        "bytes_down_per_device": (progress.bytes_down + result["bytes_proxy"]) / devices,
        "seconds": seconds,
        "notes": _notes(rows)
        + _uncovered(site, seen is not None)
        + _sampled(len(accuracies), devices)
        + _codec(site.experiment)
        + _lost(site, recall),
    }
    return result


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    failed = [row for row in rows if row["failed"]]
    if failed:
        notes.append(
            f"{len(failed)} of {len(rows)} rounds failed, the first in round {failed[0]['round']}: "
            f"{failed[0]['failed']}"
        )
    refused = [q for row in rows for q in row["quarantined"]]
    if refused:
        notes.append(f"{len(refused)} answers were quarantined, the first: {refused[0]['message']}")
    return notes


def _uncovered(site: Site, looked: bool) -> list[str]:
    """Say what of a summary with an epsilon the epsilon does not cover."""
    notes = []
    if site.mechanism.unit is not None and looked:
        notes.append(
            "accuracies of devices and of their ensemble, local_only and counts of records are the simulation's own look "
            "behind the protection: epsilon covers the student alone, so publish no more than that"
        )
    life = site.mechanism.ledger.life
    if life is not None:
        life.refresh()
        privacy = site.experiment.privacy
        for spent in life.spent(privacy.delta, disjoint=privacy.disjoint):
            known = "void" if spent.void else f"{spent.epsilon:.3f} at delta {spent.delta:g}"
            notes.append(f"over all runs of this server, epsilon per {spent.unit} is {known}")
    if site.mechanism.secret_cohort:
        notes.append("who took part is secret (privacy.sampling poisson): numbers of devices and of bytes are left out")
    return notes


def _recall(rounds: Rounds, progress: Progress, totals: NDArray[np.int64]) -> list[float | None] | None:
    """Return the share of each class's test records that the student recognises; None for a class without any."""
    if "student" not in progress.state.models:
        return None
    correct = rounds.student_correct(progress.state)
    return [float(hit / of) if of else None for hit, of in zip(correct, totals, strict=True)]


def _lost(site: Site, recall: Sequence[float | None] | None) -> list[str]:
    """Tell of classes that the student hardly knows, once it knows most of them: there the mean hides them."""
    known = [share for share in recall or () if share is not None]
    lost = [c for c, share in enumerate(recall or ()) if share is not None and share < LOST]
    # With few classes the median passes soon, so that after a few rounds it has to be high to mean anything.
    wanted = LEARNED if site.experiment.rounds >= 5 else 0.9
    if not lost or np.median(known) < wanted:
        return []
    names, counts = site.federation.split.train.class_names, site.federation.counts
    told = ", ".join(
        f"{names[c] if names else c} ({100 * (recall or ())[c]:.0f} %, {int((counts[:, c] > 0).sum())} holders)"  # type: ignore[operator]
        for c in lost
    )
    return [f"the student hardly recognises some classes (share of their test records; devices that hold them): {told}"]


def _codec(experiment: Experiment) -> list[str]:
    """Tell where a run in float64 sends more than the method's own codec would."""
    own, chosen = experiment.method.codecs, (experiment.codec.up, experiment.codec.down)
    left = sorted({o for o, c in zip(own, chosen, strict=True) if c == "auto" and o != "auto"})
    if experiment.dtype != "float64" or not left:
        return []
    return [f"dtype float64 sends float64 instead of the method's own codec ({', '.join(left)}): name it in codec.up"]


def _sampled(looked_at: int, devices: int) -> list[str]:
    if not 0 < looked_at < devices:
        return []
    return [
        f"the figures of devices (mean, local-only, ensemble) are those of {looked_at} of the {devices} devices, drawn at "
        "random; evaluation.clients_sample=null looks at all"
    ]


def _local_only(site: Site, clients: Sequence[int], folder: Path) -> dict[int, float]:
    """Train devices alone with the same number of steps on their own records, and return their accuracy."""
    experiment = site.experiment
    if not experiment.evaluation.local_only or site.method.pools_data or site.method.name == "local":
        return {}
    crowd = experiment.population
    # Alone there is nobody to wait for.
    everybody = type(crowd)(participation=crowd.participation, dropout=crowd.dropout, minimum=crowd.minimum)
    alone = experiment.model_copy(
        update={
            "algorithm": {"name": "local"},
            "codec": type(experiment.codec)(),
            "privacy": PrivacyConfig(),
            "population": everybody,
            "virtual": None,
        }
    )
    neighbour = Site(alone, site.federation)
    kind = experiment.runner.kind if experiment.runner.kind != "flower" else "stacked"
    for left in folder.glob(".local-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".local-", dir=folder, ignore_cleanup_errors=True) as scratch:
        store = ShelfStore(Path(scratch), _budget_bytes(experiment))
        runner = Only(LocalRunner(neighbour, make_engine(neighbour, kind), store), clients)
        rounds = Rounds(neighbour, runner, run="local")
        progress = rounds.play(rounds.begin(), lambda progress, record: None)
        seen = rounds.inspect(progress.state)
        store.close()
    assert seen is not None
    return dict(zip(clients, (float(a) for a in seen.correct.sum(1) / len(site.test)), strict=True))


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in ("fedkd", "torch", "numpy", "flwr", "scikit-learn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Return the revision of the checkout that the library runs from, with ``+`` if changed; None outside one."""
    here = Path(__file__).parent
    try:
        if not (here.parent / ".git").exists():
            return None
        revision = _git(here, "rev-parse", "HEAD")
        return revision + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()


# ---- sweeps ---------------------------------------------------------------------------------------------------------
Announce = Callable[[str, Experiment], Watch | None]
"""Called with a point's name when it begins; returns what watches its rounds."""


def sweep(
    points: Sequence[tuple[Mapping[str, Any], Experiment]],
    folder: Path,
    announce: Announce | None = None,
    jobs: int | None = None,
) -> list[Finished]:
    """Run every point into a folder of its own below ``folder``; points that are finished are not run again.

    ``jobs``: see :func:`resume_sweep`.

    Raises:
        ConfigError: ``folder`` holds something else.
        FedkdError: points failed; the others are whole.
    """
    names = _point_names([overrides for overrides, _ in points])
    listing = {
        "schema": SCHEMA,
        "name": points[0][1].name,
        "points": [
            {"overrides": dict(overrides), "folder": name} for name, (overrides, _) in zip(names, points, strict=True)
        ],
    }
    configs = {f"{name}/{CONFIG}": point.dump().encode() for name, (_, point) in zip(names, points, strict=True)}
    if (folder / SWEEP).exists():
        if read_json(folder / SWEEP) != json.loads(json.dumps(listing)):
            raise ConfigError(f"{folder} holds another sweep: choose another --out")
        for name, data in configs.items():
            if not (folder / name).is_file():
                make_folder((folder / name).parent)
                write_atomic(folder / name, data)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty: choose another --out")
    else:
        # In one step, so that an interruption leaves a sweep that can be gone on with, or nothing.
        write_folder(folder, {**configs, SWEEP: (json.dumps(listing, indent=1) + "\n").encode()})
    return resume_sweep(folder, announce, jobs)


def resume_sweep(folder: Path, announce: Announce | None = None, jobs: int | None = None) -> list[Finished]:
    """Go on with a sweep: finished points stay, interrupted ones are resumed, missing ones are run.

    Args:
        jobs: points that are played side by side, each in a process of ``runner.threads`` threads (1 if the experiment
            does not say); None: as many as there are cores for. The points' numbers do not depend on it. Points on
            Flower bring workers of their own, so that they are played one at a time, after the others.

    Raises:
        FedkdError: points failed; the others are whole.
    """
    from fedkd.sweeping import cores, play_side_by_side

    paths = [folder / name for name, _ in sweep_points(folder)]
    experiments = {path: validate(read_yaml(path / CONFIG)) for path in paths}
    left = [path for path in paths if _finished(path, experiments[path]) is None]
    apart = [path for path in left if experiments[path].runner.kind == "flower"]
    together = [path for path in left if path not in apart]
    watches: dict[Path, Watch | None] = {}
    failed: dict[Path, str] = {}

    def begun(path: Path) -> None:
        watches[path] = announce(path.name, experiments[path]) if announce is not None else None

    def heard(path: Path, message: Mapping[str, Any]) -> None:
        watch = watches[path]
        if watch is not None:
            watch(message["row"], message["rounds"])

    if together:
        threads = max(experiments[path].runner.threads or 1 for path in together)
        jobs = min(jobs or max(1, cores() // threads), len(together))
        if jobs > 1:
            failed |= play_side_by_side(together, jobs, threads, begun, heard)
        else:
            apart = together + apart
    for path in apart:
        begun(path)
        try:
            play_point(path, watches[path])
        except FedkdError as cause:
            failed[path] = str(cause)
        except Exception as cause:
            # As in a process of its own: a fault of one point must not cost the others.
            traceback.print_exc()
            failed[path] = repr(cause)
    write_sweep_summary(folder)
    if failed:
        first = next(path for path in paths if path in failed)
        raise FedkdError(
            f"{len(failed)} of the {len(paths)} points of {folder} failed, the first {first.name}: {failed[first]}. The "
            "others are whole; go on with --resume when the cause is gone"
        )
    return [Finished(path, read_json(path / SUMMARY)) for path in paths]


def play_point(folder: Path, watch: Watch | None = None) -> Finished:
    """Begin or go on with one point of a sweep, on ``runner.threads`` threads (1 if the experiment does not say)."""
    experiment = validate(read_yaml(folder / CONFIG))
    before = torch.get_num_threads()
    torch.set_num_threads(experiment.runner.threads or 1)
    try:
        return resume(folder, watch)
    finally:
        torch.set_num_threads(before)


def _finished(folder: Path, experiment: Experiment) -> dict[str, Any] | None:
    """Return the summary of a run that is whole; None where something is left to do or to be written anew."""
    try:
        summary = read_json(folder / SUMMARY)
    except FedkdError:
        return None
    whole = not experiment.method.student or (folder / STUDENT).is_file()
    return summary if summary.get("status") == "finished" and whole else None


def _point_names(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a folder's name for each point of a sweep, no two alike."""
    names = [_point_name(overrides) for overrides in points]
    return [
        name if len(name) <= MAX_NAME and names.count(name) == 1 else f"{name[: MAX_NAME - 9]}-{_short_hash(overrides)}"
        for name, overrides in zip(names, points, strict=True)
    ]


def _point_name(overrides: Mapping[str, Any]) -> str:
    text = ",".join(f"{key}={value}" for key, value in overrides.items())
    return "".join(c if c.isalnum() or c in "=,._-" else "_" for c in text) or "point"


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def last_folder(root: Path, name: str) -> Path:
    """Return the last of ``root/name``, ``root/name-2``, ... that exists.

    Raises:
        FedkdError: there is none.
    """
    last = None
    for i in range(1, 100_000):
        path = root / (name if i == 1 else f"{name}-{i}")
        if not path.exists():
            break
        last = path
    if last is None:
        raise FedkdError(f"{root} holds no run called {name}: start it, or name the folder of the run")
    return last


def fresh_folder(root: Path, name: str) -> Path:
    """Return the first of ``root/name``, ``root/name-2``, ... that does not exist."""
    for i in range(1, 100_000):
        path = root / (name if i == 1 else f"{name}-{i}")
        if not path.exists():
            return path
    raise FedkdError(f"{root} is full of runs called {name}")
