"""What the benchmark and paper commands share: run experiments over seeds, reusing what is finished."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedkd.experiment import load
from fedkd.papers import measure
from fedkd.papers import percent as percent
from fedkd.simulate import git_revision, versions

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


def run(
    experiment: Path, overrides: Sequence[str], seeds: Sequence[int], folder: Path, small: bool, jobs: int | None = None
) -> dict[str, Any]:
    """Run one experiment over seeds into ``folder`` and return mean, deviation and seeds of what it reached."""
    words = [*overrides, *(small_overrides(experiment) if small else ()), f"seed={','.join(map(str, seeds))}"]
    print(f"+ fedkd simulate simulations/{experiment.relative_to(HERE)} {' '.join(words)}", file=sys.stderr, flush=True)
    return {"seeds": list(seeds), "overrides": list(words), **measure(load(experiment, words), folder, jobs)[0]}


def small_overrides(experiment: Path) -> list[str]:
    """Return the overrides of the quick form; a proxy set, where there is one, shrinks along."""
    words = list(SMALL)
    proxy = load(experiment)[0][1]
    if proxy.proxy is not None:
        words += ["proxy.size=60", "proxy_per_round=30"]
    return words


def made_with() -> dict[str, str]:
    """Return the versions behind a table, and the revision that made it, with ``+`` if files were changed."""
    return versions() | {"git_revision": git_revision() or "unknown"}
