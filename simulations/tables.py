"""What the benchmark and paper commands share: run experiments over seeds, reusing what is finished."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedkd.experiment import load
from fedkd.report.runfolder import expand as expand_runs
from fedkd.report.runfolder import group_seeds
from fedkd.simulate import git_revision, sweep, versions

HERE = Path(__file__).resolve().parent

SMALL = (
    "data={source: digits}",
    "rounds=1",
    "training.steps=2",
    "training.epochs=1",
    "partition={kind: dirichlet, clients: 4, alpha: 1.0}",
    "models={student: mlp, devices: mlp}",
)
"""Overrides that make any of the experiments run in a second, to see that the command works."""


def run(experiment: Path, overrides: Sequence[str], seeds: Sequence[int], folder: Path, small: bool) -> dict[str, Any]:
    """Run one experiment over seeds into ``folder`` and return mean, deviation and seeds of what it reached."""
    words = [*overrides, *(small_overrides(experiment) if small else ()), f"seed={','.join(map(str, seeds))}"]
    print(f"+ fedkd simulate simulations/{experiment.relative_to(HERE)} {' '.join(words)}", file=sys.stderr, flush=True)
    sweep(load(experiment, words), folder)
    (group,) = group_seeds(expand_runs([folder]))
    row: dict[str, Any] = {"seeds": list(seeds), "overrides": list(words)}
    for key in ("student", "clients_mean", "clients_own_classes_mean", "ensemble"):
        spread = group.accuracy(key)
        row[key] = (
            None if spread is None else {"mean": spread.mean, "std": spread.std, "per_seed": list(spread.per_seed)}
        )
    for key in ("bytes_up_per_device", "bytes_down_per_device", "seconds"):
        row[key] = group.average(key)
    return row


def small_overrides(experiment: Path) -> list[str]:
    """Return the overrides of the quick form; a proxy set, where there is one, shrinks along."""
    words = list(SMALL)
    proxy = load(experiment)[0][1]
    if proxy.proxy is not None:
        words += ["proxy.size=60", "proxy_per_round=30"]
    return words


def percent(value: dict[str, Any] | None) -> str:
    """Return ``mean±deviation`` in percent, or a dash."""
    if value is None:
        return "-"
    spread = f"±{100 * value['std']:.1f}" if value["std"] is not None else ""
    return f"{100 * value['mean']:.1f}{spread}"


def made_with() -> dict[str, str]:
    """Return the versions behind a table, and the revision that made it, with ``+`` if files were changed."""
    return versions() | {"git_revision": git_revision() or "unknown"}
