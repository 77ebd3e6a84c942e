"""Synchronous, over-selected and asynchronous rounds in virtual time, by one command.

    python -m simulations.benchmarks.rounds [--target 0.85] [--seeds 1 2 3] [--out runs/rounds]

Plays simulations/mnist-async.yaml (MNIST under FEDKD_DATA) in all three ways and says after how many virtual hours and
megabytes per device the student first reached the target. Folders under --out that are finished are not played again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from fedkd.experiment import load
from fedkd.report.runfolder import Run
from fedkd.simulate import resume, start

YAML = Path(__file__).parents[1] / "mnist-async.yaml"
WAYS: dict[str, tuple[str, ...]] = {
    "synchronous": ("population.buffer=null", "rounds=40"),
    "over-selected by half": ("population.buffer=null", "population.over_selection=0.5", "rounds=60"),
    "asynchronous, buffer 5": ("rounds=120",),
    "asynchronous, constant weights": ("rounds=120", "population.staleness.weighting=constant"),
}


def reached(run: Run, target: float) -> tuple[float, float] | None:
    """Return virtual hours and megabytes per device, up and down, until the student first reached ``target``."""
    sent = 0
    for row in run.rounds:
        sent += row.bytes_up + row.bytes_down
        if row.virtual_seconds is not None and (row.student_accuracy or 0.0) >= target:
            return row.virtual_seconds / 3600, sent / max(run.devices, 1) / 1e6
    return None


def row(name: str, runs: Sequence[Run], target: float) -> str:
    """Return one line of the table: medians over seeds."""
    found = [reached(run, target) for run in runs]
    known = [f for f in found if f is not None]
    hours, sent = (f"{statistics.median(f[i] for f in known):.2f}" if known else "-" for i in (0, 1))
    missed = f" ({len(found) - len(known)} of {len(found)} never)" if len(known) < len(found) else ""
    last = statistics.median(100 * (run.accuracy.student or 0.0) for run in runs)
    whole = statistics.median((run.virtual_seconds or 0.0) / 3600 for run in runs)
    return f"| {name} | {hours}{missed} | {sent} | {last:.1f} after {whole:.1f} h, {len(runs[0].rounds)} rounds |"


def main(words: Sequence[str] | None = None) -> None:
    """Play what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=float, default=0.85)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/rounds"))
    given = parser.parse_args(words)
    lines = []
    for name, overrides in WAYS.items():
        runs = []
        for seed in given.seeds:
            folder = given.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            if (folder / "config.yaml").is_file():
                resume(folder)
            else:
                start(load(YAML, [*overrides, f"seed={seed}", "evaluation.every=1"])[0][1], folder)
            runs.append(Run.read(folder))
        lines.append(row(name, runs, given.target))
    print(f"| rounds | virtual hours to {100 * given.target:g} % | MB per device until then | student at the end |")
    print("|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
