"""DP-SGD: one pass over stacked devices against Opacus on one device at a time, in client-rounds per second.

``python -m simulations.benchmarks.dp_throughput [--passes 5] [--models mlp,lenet] [--json FILE]``

Every form does the same work: devices of 320 records of made-up data, 10 steps of Poisson batches of 32 records expected,
clipping to 1 and noise of 1. Forms are run in turn within a pass, on one thread; reported are medians over passes of the
CPU time of one device, and the ratio of medians to Opacus's hooks. ``plain`` is the stacked engine without privacy, on
batches of 32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedkd.algorithms.base import Heard
from fedkd.data import prepare
from fedkd.engines.base import Task
from fedkd.experiment import validate
from fedkd.payloads import Nothing
from fedkd.privacy.dpsgd import train_private
from fedkd.runners.base import make_engine
from fedkd.simulate import git_revision, versions
from fedkd.site import Site

RECORDS, STEPS, BATCH = 320, 10, 32
MODELS = {"mlp": ("mlp(hidden=[128])", (1, 8, 8), 64), "lenet": ("lenet", (1, 28, 28), 16)}
FORMS = ("hooks", "ghost", "stacked", "plain")
SERIAL_DEVICES = 4
"""Devices that the forms which take one at a time are timed on: their cost per device does not depend on the number."""


def make_site(model: str, shape: tuple[int, ...], devices: int, form: str, folder: Path) -> Site:
    """Return a site of ``devices`` with :data:`RECORDS` made-up records each."""
    path = folder / f"{'x'.join(map(str, shape))}-{devices}.npz"
    if not path.exists():
        rng = np.random.default_rng(0)
        size = devices * RECORDS * 10 // 9 + 20  # a tenth is set aside for the test set
        np.savez(path, x=rng.random((size, *shape), dtype=np.float32), y=np.arange(size) % 10)
    privacy = (
        {"kind": "none"}
        if form == "plain"
        else {
            "kind": "dp_sgd", "noise_multiplier": 1.0, "clip": 1.0, "sampling_rate": BATCH / RECORDS,
            "gradients": "ghost" if form == "ghost" else "hooks",
        }
    )  # fmt: skip
    experiment = validate(
        {
            "algorithm": "ds_fl", "rounds": 1, "proxy": {"kind": "noise", "size": 10},
            "data": {"source": "npz", "path": str(path), "normalise": "none", "test_fraction": 0.1},
            "partition": {"kind": "iid", "clients": devices}, "models": {"student": model, "devices": [model]},
            "training": {"steps": STEPS, "batch_size": BATCH, "optimizer": {"lr": 0.1}}, "privacy": privacy,
        }
    )  # fmt: skip
    return Site(experiment, prepare(experiment.data, experiment.partition, experiment.proxy, experiment.seed))


def seconds_per_device(site: Site, form: str) -> float:
    """Train every device of ``site`` once and return the CPU seconds that one took."""
    engine = make_engine(site, "stacked" if form in ("stacked", "plain") else "serial")
    heard = Heard(knowledge=Nothing(), memory={}, round=0)
    phase = site.method.plan(heard)[-1]
    tasks = [Task(card, site.new_device(card), heard, site.private(card.id), None, None) for card in site.cards]
    began = time.process_time()
    if form == "plain":
        engine.train(phase, tasks)
    else:
        train_private(engine, phase, tasks)
    return (time.process_time() - began) / len(tasks)


def main(words: list[str] | None = None) -> None:
    """Print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--json", type=Path, default=Path(__file__).with_name("dp_throughput.json"))
    chosen = parser.parse_args(words)
    torch.set_num_threads(1)
    table = Table(box=None, header_style="bold", title="DP-SGD, CPU milliseconds per client-round (ratio to hooks)")
    for title in ("model", *FORMS):
        table.add_column(title)
    rows = {}
    with tempfile.TemporaryDirectory() as place:
        for name in chosen.models.split(","):
            model, shape, devices = MODELS[name]
            sites = {
                form: make_site(
                    model, shape, devices if form in ("stacked", "plain") else SERIAL_DEVICES, form, Path(place)
                )
                for form in FORMS
            }
            for form, site in sites.items():
                seconds_per_device(site, form)  # compiles kernels, makes hooks, fills caches
            times: dict[str, list[float]] = {form: [] for form in FORMS}
            for turn in range(chosen.passes):
                for form in FORMS[turn % len(FORMS) :] + FORMS[: turn % len(FORMS)]:
                    times[form].append(seconds_per_device(sites[form], form))
            middle = {form: statistics.median(values) for form, values in times.items()}
            ratios = {form: middle["hooks"] / value for form, value in middle.items()}
            rows[name] = {"seconds": times, "median": middle, "ratio_to_hooks": ratios, "stack": devices}
            table.add_row(name, *(f"{1000 * middle[f]:.2f} ({ratios[f]:.1f}x)" for f in FORMS))
    Console(width=120).print(table)
    note = {"rows": rows, "passes": chosen.passes, "git_revision": git_revision(), "versions": versions()}
    chosen.json.write_text(json.dumps(note, indent=1) + "\n")


if __name__ == "__main__":
    main()
