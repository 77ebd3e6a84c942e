"""Run folders made up on the spot, in the format of docs/run-folder.md: no training is needed here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

WriteRun = Callable[..., Path]


def make_run(
    folder: Path,
    *,
    name: str = "digits",
    method: str = "ds_fl",
    runner: str = "serial",
    seed: int = 1,
    rounds: int = 8,
    clients: int = 6,
    classes: int = 10,
    student: bool = True,
    evaluated: bool = True,
    sent: bool = True,
    proxy: bool = True,
    epsilon: float | None = None,
    troubles: bool = False,
    status: str = "finished",
    summary: bool = True,
    level: float = 0.9,
    config: dict[str, Any] | None = None,
    every: int = 2,
) -> Path:
    """Write one run folder and return it."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = ["mlp", "lenet", "resnet"]
    architectures = [kinds[index % 3] for index in range(clients)]
    names = [f"device {index}" for index in range(clients)]
    shares = rng.dirichlet([0.3] * classes, size=clients)
    counts = (shares * rng.integers(40, 160, (clients, 1))).astype(int).tolist()
    proxy_bytes = 64 * 500 * 4
    partition = {
        "counts": counts,
        "class_names": [str(index) for index in range(classes)],
        "client_names": names,
        "architectures": architectures,
        "proxy": {"name": "held-out", "identity": "ab" * 32, "size": 500, "bytes": proxy_bytes} if proxy else None,
    }
    settings = {
        "name": name,
        "seed": seed,
        "rounds": rounds,
        "runner": runner,
        "algorithm": {"name": method, "temperature": 0.1},
        "data": {"name": "digits"},
        **(config or {}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (folder / "partition.json").write_text(json.dumps(partition))

    offset = rng.normal(0, 0.07, clients)
    alone = np.clip(0.5 + offset + rng.normal(0, 0.03, clients), 0, 1)
    last: list[float] = []
    rows = []
    for index in range(rounds):
        grown = level - 0.6 * np.exp(-(index + 1) / 3) + rng.normal(0, 0.006)
        here = np.clip(grown - 0.08 + offset, 0, 1)
        seen = evaluated and (index % every == 0 or index == rounds - 1)
        if seen:
            last = here.tolist()
        dropped = int(rng.integers(0, 3)) if troubles else 0
        late = int(rng.integers(0, 2)) if troubles else 0
        bad = (
            [{"client": 2, "reason": "not_finite", "message": "NaN in 3 of 500 rows"}]
            if troubles and index == 3
            else []
        )
        rows.append(
            {
                "round": index,
                "asked": clients,
                "answered": clients - dropped - late - len(bad),
                "abstained": 0,
                "dropped": dropped,
                "late": late,
                "quarantined": bad,
                "failed": "fewer than 2 answers" if troubles and index == 5 else None,
                "student_accuracy": float(grown) if student and evaluated else None,
                "clients_accuracy": here.tolist() if seen else None,
                "ensemble_accuracy": float(grown + 0.015) if student and evaluated else None,
                "bytes_up": 500 * 10 * 4 * clients if sent else 0,
                "bytes_down": 500 * 10 * 4 * clients if sent else 0,
                "epsilon": None if epsilon is None else epsilon * float(np.sqrt((index + 1) / rounds)),
                "seconds": 0.8,
                "loss": {"private": float(2 * np.exp(-index / 4)), "public": float(1.2 * np.exp(-index / 5))},
            }
        )
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not summary:
        return folder
    up = sum(row["bytes_up"] for row in rows)
    down = sum(row["bytes_down"] for row in rows)
    once = proxy_bytes * clients if proxy and sent else 0
    content = {
        "schema": 1,
        "name": name,
        "method": method,
        "runner": runner,
        "seed": seed,
        "rounds": rounds,
        "rounds_completed": rounds,
        "status": status,
        "accuracy": {
            "student": rows[-1]["student_accuracy"],
            "clients_mean": float(np.mean(last)) if last else None,
            "clients_own_classes_mean": float(np.mean(last)) + 0.03 if last else None,
            "local_only": float(alone.mean()) if evaluated else None,
            "ensemble": rows[-1]["ensemble_accuracy"],
        },
        "student_per_class": [0.9] * (len(partition["class_names"]) - 1) + [0.123] if student and evaluated else None,
        "per_client": [
            {
                "client": index,
                "name": names[index],
                "architecture": architectures[index],
                "examples": sum(counts[index]),
                "accuracy": last[index] if last else None,
                "accuracy_own_classes": min(1.0, last[index] + 0.03) if last else None,
                "local_only": float(alone[index]) if evaluated else None,
            }
            for index in range(clients)
        ],
        "bytes_up": up,
        "bytes_down": down,
        "bytes_proxy": once,
        "bytes_up_per_device": up / clients,
        "bytes_down_per_device": (down + once) / clients,
        "epsilon": epsilon,
        "delta": None if epsilon is None else 1e-5,
        "privacy": {
            "unit": None if epsilon is None else "record",
            "relation": None if epsilon is None else "add_remove",
        },
        "seconds": 0.8 * rounds,
        "versions": {"fedkd": "0.1.0", "python": "3.11.9", "torch": "2.13.0"},
        "git_revision": "0123abc",
        "notes": ["2 devices hold no example of class 7."] if troubles else [],
    }
    (folder / "summary.json").write_text(json.dumps(content))
    return folder


def make_sweep(folder: Path, points: list[dict[str, Any]], name: str = "digits") -> Path:
    """Write a sweep: each point is `overrides` plus, under `run`, what `make_run` takes."""
    entries = []
    for point in points:
        overrides = point["overrides"]
        inner = ",".join(f"{key}={value}" for key, value in overrides.items())
        if point.get("started", True):
            make_run(folder / inner, name=name, seed=overrides.get("seed", 1), **point.get("run", {}))
        entries.append({"overrides": overrides, "folder": inner})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps({"schema": 1, "name": name, "points": entries}))
    return folder


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Make a run folder below the test's own folder."""

    def write(name: str = "run", /, **options: Any) -> Path:
        return make_run(tmp_path / name, **options)

    return write


@pytest.fixture
def write_sweep(tmp_path: Path) -> WriteRun:
    """Make a sweep folder below the test's own folder."""

    def write(points: list[dict[str, Any]], folder: str = "sweep", /, **options: Any) -> Path:
        return make_sweep(tmp_path / folder, points, **options)

    return write
