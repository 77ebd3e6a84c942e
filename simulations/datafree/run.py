"""Distillation without data, beside its controls: ``python -m simulations.datafree.run [mnist|digits] [--methods ...]``.

A row is a method or a control over the seeds: noise, other (patches of photographs), and data (the same student with the
data). Settings stand in the YAML files beside this one, ``--full`` takes those below ``full/``, for a GPU; they are the same
for both data sets. LeNet-5 teaches its half; methods on batch-normalisation statistics take a CNN that has such layers.
Finished runs in ``--out`` are reused, interrupted ones go on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from fedkd.distill.config import DistillExperiment, load
from fedkd.distill.run import CONFIG, Distilled, resume, start
from simulations.tables import made_with

HERE = Path(__file__).resolve().parent
SIZE = 28

PLAIN, NORMED = ("lenet", "lenet_half"), ("cnn(channels=[6, 16], features=32)", "cnn(channels=[3, 8], features=16)")
"""Teacher and student: without and with batch normalisation."""

PAIRS = {"dafl": PLAIN, "dfad": PLAIN, "zskt": PLAIN, "deepinversion": NORMED, "cmi": NORMED, "fast": NORMED}
CONTROLS = ("data", "other", "noise")
TEACHERS = {"short": "teacher.yaml", "long": "teacher-long.yaml"}
LESSONS = {"short": {"mnist": 3, "digits": 126}, "long": {"mnist": 12, "digits": 504}}
"""Epochs of the teacher: 180,000 or 720,000 images of either data set."""
PASSES = LESSONS["short"]
"""Epochs of the student with the data."""
PUBLISHED = {"dafl": "98.20", "dfad": "98.3±0.2", "noise": "74.7-88", "teacher": "98.9"}
"""MNIST, LeNet-5 -> half; the other methods were not published on it."""


def main(argv: list[str] | None = None) -> None:
    """Run what is named, print the table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="mnist", choices=["mnist", "digits"])
    parser.add_argument("--methods", default="data,other,noise,dafl", help=f"of {', '.join([*CONTROLS, *PAIRS])}")
    parser.add_argument(
        "--pair", choices=["plain", "normed"], help="teacher and student of the controls; default plain"
    )
    parser.add_argument("--teacher", choices=list(TEACHERS), default="short", help="how long the teacher learnt")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--full", action="store_true", help="published sizes, for a GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/datafree"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="default: results.json beside this file; rows are added to it")
    parser.add_argument("--small", action="store_true", help="a few steps on the bundled digits, to see that it works")
    words = parser.parse_args(argv)
    seeds = [int(s) for s in words.seeds.split(",")]
    names = words.methods.split(",")
    unknown = [n for n in names if n not in PAIRS and n not in CONTROLS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join([*CONTROLS, *PAIRS])}")
    out = words.out / ("small" if words.small else "full" if words.full else "cpu") / words.data
    data = source(words.data, words.out)
    table = Table(
        title=f"{words.data}: student without data, % of the test set" + (" (small form)" if words.small else "")
    )
    for title in ("row", "models", "published", "student", "teacher", "agreement", "queries", "CPU min"):
        table.add_column(title)
    found: dict[str, Any] = {}
    for name in names:
        pair = PAIRS.get(name, NORMED if words.pair == "normed" else PLAIN)
        kind = ("normed" if pair == NORMED else "plain") + ("-long" if words.teacher == "long" else "")
        row = over_seeds(name, pair, data, seeds, out / kind, words)
        published = PUBLISHED.get(name, "-") if words.data == "mnist" and pair == PLAIN else "-"
        found[f"{words.data} {kind} {name}"] = {"published": published, **row}
        table.add_row(
            name, f"{pair[0]} -> {pair[1]}", published, spread(row["student"]), spread(row["teacher"]),
            spread(row["agreement"]), f"{row['queries']:,}" if row["queries"] else "-", f"{row['cpu_seconds'] / 60:.1f}",
        )  # fmt: skip
    Console(width=170).print(table)
    target = words.json or (words.out / "small.json" if words.small else HERE / "results.json")
    known = json.loads(target.read_text())["rows"] if target.exists() else {}
    label = "full " if words.full else ""
    rows = known | {label + name: {**row, "versions": made_with()} for name, row in found.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def over_seeds(
    name: str, pair: tuple[str, str], data: str, seeds: list[int], out: Path, words: argparse.Namespace
) -> dict[str, Any]:
    """Run one row over the seeds; all seeds share the teacher."""
    quick = ["training.epochs=1"] if words.small else []
    first = [data, f"student={pair[1]}"]
    teach = [
        f"teacher.model={pair[0]}",
        f"teacher.training.epochs={1 if words.small else LESSONS[words.teacher][words.data]}",
        f"training.epochs={1 if words.small else PASSES[words.data]}",
    ]
    school = HERE / TEACHERS[words.teacher]
    done(school, [*first, *teach, "seed=1"], out / "data" / "seed-1")
    teacher = f"teacher={out / 'data' / 'seed-1' / 'teacher-1.safetensors'}"
    runs = []
    for seed in seeds:
        folder = out / name / f"seed-{seed}"
        if name == "data":
            about = [*first, *(teach if seed == 1 else [teacher, teach[-1]]), f"seed={seed}"]
            runs.append(done(school, about, folder))
            continue
        about = [teacher, f"student={pair[1]}", f"seed={seed}", *quick]
        if name == "other":
            about += [f"inputs={patches(words.out)}", "data=none"]
        else:
            about.append(data)
            if words.small:
                about += ["method.makes_per_epoch=2", "method.student_steps=1", "method.batch_size=8"]
                about += ["method.steps=2"] if pair == NORMED and name in PAIRS else []
        runs.append(done(HERE / ("full" if words.full and name != "other" else "") / f"{name}.yaml", about, folder))
    results = [run.summary for run in runs]
    if name == "other":
        # Its inputs have no test set beside them: measured afterwards, on that of the teacher's own data.
        results = [measured(run, data, seed) for run, seed in zip(runs, seeds, strict=True)]
    return {
        "seeds": seeds,
        "student": [r["accuracy"]["student"] for r in results],
        "teacher": [r["accuracy"]["teacher"] for r in results],
        "agreement": [r["agreement"] for r in results],
        "queries": results[0].get("queries"),
        "seconds": float(np.mean([r["seconds"] for r in results])),
        "cpu_seconds": float(np.mean([r["cpu_seconds"] for r in results])),
    }


def done(path: Path, words: list[str], folder: Path) -> Distilled:
    """Return a run, started or gone on with where it is not finished."""
    if (folder / CONFIG).exists():
        return resume(folder)
    print(
        f"+ fedkd distill simulations/datafree/{path.relative_to(HERE)} {' '.join(words)}", file=sys.stderr, flush=True
    )
    ((_, experiment),) = load(path, words)
    assert isinstance(experiment, DistillExperiment)

    def watch(stage: str, epoch: Any, epochs: int) -> None:
        print(f"  {stage} epoch {epoch.epoch + 1}/{epochs} loss {epoch.total:.4g}", file=sys.stderr, flush=True)

    return start(experiment, folder, watch)


def measured(run: Distilled, data: str, seed: int) -> dict[str, Any]:
    """Return the summary of a run on unlabelled inputs, with accuracies on the test set of ``data``."""
    from fedkd.data import load as load_data
    from fedkd.distill.distiller import accuracy
    from fedkd.distill.run import records
    from fedkd.distill.teachers import load_teacher

    ((_, experiment),) = load(HERE / "teacher.yaml", [data])
    assert experiment.data is not None
    split = load_data(experiment.data, seed)
    test, shape, classes = records(split.test), split.test.shape, split.test.classes
    student = load_teacher(run.folder / "student.safetensors", shape, classes)
    ((_, own),) = load(run.folder / CONFIG, [])
    assert own.teacher[0].path is not None
    teacher = load_teacher(own.teacher[0].path, shape, classes)
    return {**run.summary, "accuracy": {"student": accuracy(student, test), "teacher": accuracy(teacher, test)}}


def source(name: str, out: Path) -> str:
    """Return the override that names the data; digits are brought to 28x28, so that LeNet takes them."""
    if name == "mnist":
        return "data={source: mnist}"
    path = out / "digits28.npz"
    if not path.exists():
        from sklearn.datasets import load_digits

        digits = load_digits()
        x = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
        large = F.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False)
        pixels, y = (large.numpy() * 255).round().astype(np.uint8), digits.target.astype(np.int64)
        # One test set for all seeds, since all share the teacher.
        order = np.random.default_rng(0).permutation(len(y))
        train, test = order[360:], order[:360]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, x=pixels[train], y=y[train], x_test=pixels[test], y_test=y[test])
    return f"data={{source: npz, path: {path}}}"


def patches(out: Path) -> Path:
    """Write 5,000 grey patches of scikit-learn's two photographs as unlabelled inputs, and return the file."""
    path = out / "patches.npz"
    if not path.exists():
        from sklearn.datasets import load_sample_images

        rng = np.random.default_rng(0)
        grey = [image.mean(2) for image in load_sample_images().images]
        found = []
        for _ in range(5_000):
            image = grey[rng.integers(len(grey))]
            top, left = (rng.integers(s - SIZE + 1) for s in image.shape)
            found.append(image[top : top + SIZE, left : left + SIZE])
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, x=np.stack(found)[:, None].round().astype(np.uint8))
    return path


def spread(values: list[float]) -> str:
    """Return mean ± deviation in percent."""
    deviation = f"±{100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{deviation}"


if __name__ == "__main__":
    main()
