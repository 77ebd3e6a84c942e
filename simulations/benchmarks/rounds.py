"""Synchronous, over-selected and asynchronous rounds in virtual time, by one command.

    python -m simulations.benchmarks.rounds [--target 0.85] [--seeds 1 2 3] [--out runs/rounds]

Plays simulations/mnist-async.yaml (MNIST under FEDKD_DATA) in all ways and says after how many virtual hours and
megabytes per device the student first reached the target. Writes rounds.json. Folders under --out that are finished are
not played again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedkd.experiment import load
from fedkd.report.runfolder import Run
from fedkd.simulate import resume, start
from simulations.tables import HERE, made_with, small_overrides

YAML = HERE / "mnist-async.yaml"
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


def summed(runs: Sequence[Run], target: float) -> dict[str, Any]:
    """Return what the runs of one way came to, seed by seed; None where a run never reached the target."""
    found = [reached(run, target) for run in runs]
    return {
        "rounds": len(runs[0].rounds),
        "hours_to_target": [None if f is None else f[0] for f in found],
        "mb_per_device_to_target": [None if f is None else f[1] for f in found],
        "student_accuracy": [run.accuracy.student for run in runs],
        "virtual_hours": [(run.virtual_seconds or 0.0) / 3600 for run in runs],
    }


def line(name: str, row: dict[str, Any]) -> str:
    """Return one line of the table."""
    hours, sent = (spread(row[key], 2) for key in ("hours_to_target", "mb_per_device_to_target"))
    never = sum(value is None for value in row["hours_to_target"])
    missed = f" ({never} of {len(row['hours_to_target'])} never)" if never else ""
    last = spread([100 * (value or 0.0) for value in row["student_accuracy"]], 1)
    whole = statistics.mean(row["virtual_hours"])
    return f"| {name} | {hours}{missed} | {sent} | {last} after {whole:.1f} h, {row['rounds']} rounds |"


def spread(values: Sequence[float | None], places: int) -> str:
    """Return ``mean ± standard deviation`` of the values that there are."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    deviation = f" ± {statistics.stdev(known):.{places}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{places}f}{deviation}"


def main(words: Sequence[str] | None = None) -> None:
    """Play what is missing, print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=float, default=0.85)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/rounds"))
    parser.add_argument("--json", type=Path, default=HERE / "benchmarks" / "rounds.json")
    parser.add_argument("--small", action="store_true", help="one quick round on the bundled digits")
    given = parser.parse_args(words)
    small = [*small_overrides(YAML), "population.participation=0.5"] if given.small else []
    rows = {}
    for name, overrides in WAYS.items():
        runs = []
        for seed in given.seeds:
            folder = given.out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            if (folder / "config.yaml").is_file():
                resume(folder)
            else:
                # An override may be given once; those of the small form win.
                named = {word.split("=")[0] for word in small}
                ways = [*small, *(word for word in overrides if word.split("=")[0] not in named)]
                start(load(YAML, [*ways, f"seed={seed}", "evaluation.every=1"])[0][1], folder)
            runs.append(Run.read(folder))
        rows[name] = summed(runs, given.target)
    print(f"| rounds | virtual hours to {100 * given.target:g} % | MB per device until then | student at the end, % |")
    print("|---|---|---|---|")
    print("\n".join(line(name, row) for name, row in rows.items()))
    result = {"target": given.target, "seeds": given.seeds, "versions": made_with(), "rows": rows}
    given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
