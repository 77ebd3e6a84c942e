"""Does ``fedkd proxy check`` tell which proxy set will serve? ``python -m simulations.benchmarks.proxy_sets``.

For four proxy sets of one size: what the check says after one round, and the accuracy that DS-FL's student reaches after
all rounds, means over the seeds; then the rank correlation of both. MNIST, 10 devices at Dirichlet 0.5, 3,000 private
records, a perceptron.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.experiment import validate
from fedkd.papers import measure, merged, percent
from fedkd.proxy_check import FIGURES, check
from simulations.tables import HERE, made_with

BASE: dict[str, Any] = {
    "name": "proxy-sets",
    "rounds": 8,
    "data": {"source": "mnist", "train_size": 4000},
    "partition": {"kind": "dirichlet", "clients": 10, "alpha": 0.5, "min_size": 10},
    "models": {"student": "mlp(hidden=[32])", "devices": "mlp(hidden=[32])"},
    "algorithm": {"name": "ds_fl", "aggregation": "mean"},
    "training": {"steps": 20, "batch_size": 32, "optimizer": {"lr": 0.1}},
    "digest": {"steps": 20, "batch_size": 40, "optimizer": {"lr": 0.1}},
    "server": {"epochs": 5, "batch_size": 40, "optimizer": {"lr": 0.1}},
    "evaluation": {"every": 8, "local_only": False},
    "runner": {"kind": "stacked", "threads": 1},
}
SETS: dict[str, dict[str, Any]] = {
    "images held out": {"kind": "holdout", "size": 500},
    "images, slightly mixed": {"kind": "mixup", "size": 500, "mixup_alpha": 0.2},
    "images, mixed evenly": {"kind": "mixup", "size": 500, "mixup_alpha": 50.0},
    "ten images, mixed": {"kind": "mixup", "size": 500, "base_size": 10},
}


def ranks(values: list[float]) -> np.ndarray:
    """Return the rank of each value."""
    return np.argsort(np.argsort(np.asarray(values)))


def main(argv: list[str] | None = None) -> None:
    """Check, run, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--out", type=Path, default=Path("runs/proxy-sets"), help="folder of the runs")
    parser.add_argument("--json", type=Path, default=HERE / "benchmarks" / "proxy_sets.json")
    parser.add_argument("--jobs", type=int, default=None, help="runs side by side")
    parser.add_argument("--small", action="store_true", help="one quick round on the bundled digits")
    words = parser.parse_args(argv)
    seeds = [int(s) for s in words.seeds.split(",")]
    base = BASE
    if words.small:
        base = merged(BASE, {"rounds": 1, "data": {"source": "digits", "train_size": 900}, "evaluation": {"every": 1}})
    rows: dict[str, Any] = {}
    print("| proxy set | " + " | ".join(FIGURES) + " | student % |\n|---|" + "---|" * (len(FIGURES) + 1))
    for name, proxy in SETS.items():
        raws = [merged(base, {"proxy": proxy, "seed": seed}) for seed in seeds]
        told = [check(raw) for raw in raws]
        points = [({"seed": s}, validate(raw)) for s, raw in zip(seeds, raws, strict=True)]
        (row,) = measure(points, words.out / name.replace(" ", "-").replace(",", ""), words.jobs)
        rows[name] = {"check": {f: float(np.mean([t[f] for t in told])) for f in FIGURES}, **row}
        figures = " | ".join(f"{rows[name]['check'][f]:.3f}" for f in FIGURES)
        print(f"| {name} | {figures} | {percent(row['student'])} |", flush=True)
    reached = ranks([row["student"]["mean"] for row in rows.values()])
    agreed = {f: float(np.corrcoef(ranks([row["check"][f] for row in rows.values()]), reached)[0, 1]) for f in FIGURES}
    print("Rank correlation with the student's accuracy: " + ", ".join(f"{f} {v:.2f}" for f, v in agreed.items()))
    found = {"seeds": seeds, "versions": made_with(), "rank_correlation": agreed, "rows": rows}
    words.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
