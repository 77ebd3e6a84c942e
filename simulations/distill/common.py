"""What the distillation experiments share: their options, means and paired intervals over seeds, JSON and tables."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from fedkd.data import DataConfig, load
from fedkd.distill import Fit
from fedkd.models import Architecture
from fedkd.seeding import key, numpy_rng
from simulations.tables import made_with

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def options(doc: str | None, name: str, seeds: int, argv: Sequence[str] | None, full: bool = False) -> Any:
    """Read an experiment's words: ``--seeds``, ``--json``, ``--small``, and ``--full`` where there is a larger form."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default=",".join(str(s + 1) for s in range(seeds)), help="comma list")
    parser.add_argument("--json", type=Path, help=f"where the figures are written; default: results/{name}.json")
    parser.add_argument("--small", action="store_true", help="a second's worth of it, to see that the command works")
    if full:
        parser.add_argument("--full", action="store_true", help="the published setting, at its full length")
    words = parser.parse_args(argv)
    # The two forms are two tables.
    words.json = words.json or RESULTS / (f"{name}_full.json" if full and words.full else f"{name}.json")
    words.seeds = [int(s) for s in words.seeds.split(",")]
    return words


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, sample deviation and the values themselves."""
    array = np.asarray(values, np.float64)
    return {
        "mean": float(array.mean()),
        "std": float(array.std(ddof=1)) if len(array) > 1 else None,
        "per_seed": [float(v) for v in array],
    }


def gain(ours: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Return the mean paired difference over seeds with its 95 % interval (Student's t), or None for one seed."""
    gap = np.asarray(ours, np.float64) - np.asarray(base, np.float64)
    mean = float(gap.mean())
    if len(gap) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(stats.t.ppf(0.975, len(gap) - 1) * gap.std(ddof=1) / np.sqrt(len(gap)))
    return {"mean": mean, "low": mean - half, "high": mean + half}


@dataclass
class Report:
    """Rows of one experiment, over seeds.

    ``columns`` maps a metric to its title; metrics are shares and shown in percent unless named in ``plain``. ``base`` is
    the row against which gains in the first metric are paired; None for no column of gains. A table of several parts has
    rows like "part, row", and a base in each: "part, BASE".
    """

    name: str
    settings: Mapping[str, Any]
    seeds: Sequence[int]
    columns: Mapping[str, str]
    base: str | None = None
    plain: tuple[str, ...] = ()
    published: Mapping[str, str] = field(default_factory=dict)
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def add(self, row: str, **metrics: float) -> None:
        """Add one seed's figures to a row."""
        for metric, value in metrics.items():
            self.values.setdefault(row, {}).setdefault(metric, []).append(float(value))
        said = ", ".join(f"{m} {v:.4f}" for m, v in metrics.items())
        print(f"{time.perf_counter() - self.began:7.1f} s  {row}: {said}", flush=True)

    def done(self) -> dict[str, Any]:
        """Return everything as JSON wants it."""
        first = next(iter(self.columns))
        rows: dict[str, Any] = {}
        for row, metrics in self.values.items():
            rows[row] = {metric: spread(values) for metric, values in metrics.items()}
            if row in self.published:
                rows[row]["published"] = self.published[row]
            base = self._base_of(row)
            if base is not None and first in metrics:
                rows[row]["gain"] = gain(metrics[first], self.values[base][first])
        return {
            "name": self.name,
            "command": f"python -m simulations.distill.{self.name}",
            "settings": dict(self.settings),
            "seeds": list(self.seeds),
            "columns": dict(self.columns),
            "plain": list(self.plain),
            "base": self.base,
            "rows": rows,
            "seconds": time.perf_counter() - self.began,
            "versions": made_with(),
        }

    def _base_of(self, row: str) -> str | None:
        """Return the row that ``row`` is compared with, None for a base itself and for rows of no part."""
        if self.base is None or row == self.base:
            return None
        if self.base in self.values:
            return self.base
        part, comma, rest = row.partition(", ")
        found = f"{part}, {self.base}"
        return found if comma and rest != self.base and found in self.values else None

    def _join(self, earlier: Mapping[str, Any]) -> None:
        new = [i for i, seed in enumerate(earlier["seeds"]) if seed not in self.seeds]
        for row, metrics in self.values.items():
            for metric, values in metrics.items():
                values[:0] = [earlier["rows"][row][metric]["per_seed"][i] for i in new]
        self.seeds = [*(earlier["seeds"][i] for i in new), *self.seeds]
        self.began -= earlier["seconds"]

    def write(self, path: Path) -> dict[str, Any]:
        """Write JSON, print the table, and return what was written.

        Seeds that the file holds already for the same settings are kept: a long experiment may be run seed by seed.
        """
        earlier = json.loads(path.read_text()) if path.is_file() else None
        if earlier is not None and earlier["settings"] == json.loads(json.dumps(dict(self.settings))):
            self._join(earlier)
        found = self.done()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        print("\n" + table(found))
        return found


def table(found: Mapping[str, Any]) -> str:
    """Return an experiment's figures as a Markdown table."""
    rows, columns, plain = found["rows"], found["columns"], found["plain"]
    published = any("published" in row for row in rows.values())
    gains = found["base"] is not None
    titles = ["", *(["published"] if published else []), *columns.values()]
    titles += [f"gain over {found['base']} [95 % interval]"] if gains else []
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for label, row in rows.items():
        cells = [label, *([row.get("published", "")] if published else [])]
        cells += [_cell(row.get(metric), metric in plain) for metric in columns]
        if gains:
            cells.append(_gain(row.get("gain"), next(iter(columns)) in plain))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: Mapping[str, Any] | None, plain: bool) -> str:
    if value is None:
        return ""
    factor, digits = (1, 3) if plain else (100, 2)
    deviation = "" if value["std"] is None else f"±{factor * value['std']:.{digits}f}"
    return f"{factor * value['mean']:.{digits}f}{deviation}"


def _gain(value: Mapping[str, Any] | None, plain: bool) -> str:
    if value is None:
        return ""
    factor, digits = (1, 3) if plain else (100, 2)
    text = f"{factor * value['mean']:+.{digits}f}"
    if value["low"] is not None:
        text += f" [{factor * value['low']:+.{digits}f}, {factor * value['high']:+.{digits}f}]"
        helps = value["low"] > 0
        text += "" if helps else " harms" if value["high"] < 0 else " not shown"
    return text


# ---- data and models ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Images:
    """Images as tensors: x [N, 1, H, W] in 0..1, y [N]."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return tuple(self.x.shape[1:])


def images(small: bool, size: int | None = None, seed: int = 1, test_size: int | None = None) -> Images:
    """Return MNIST (``size`` training records drawn by ``seed``), or, small, the bundled digits."""
    config = (
        DataConfig(source="digits", train_size=300, test_size=200)
        if small
        else DataConfig(source="mnist", train_size=size, test_size=test_size)
    )
    split = load(config, seed)
    x, t = torch.from_numpy(split.train.inputs()), torch.from_numpy(split.test.inputs())
    return Images(x, torch.from_numpy(split.train.y), t, torch.from_numpy(split.test.y))


def model(name: str, shape: tuple[int, ...], classes: int, *stream: str | int) -> nn.Module:
    """Return a fresh model of the registry, its weights drawn from the named stream."""
    architecture = Architecture(name, shape, classes, torch.float32)
    return architecture.module(architecture.initial(key("simulations", *stream, name)))


def shorter(how: Fit, small: bool) -> Fit:
    """Return the fit, at one epoch where ``small``."""
    return Fit(**{**vars(how), "epochs": 1}) if small else how


def subset(data: Tensor, labels: Tensor, size: int, *stream: str | int) -> tuple[Tensor, Tensor]:
    """Return ``size`` records drawn without replacement."""
    index = torch.from_numpy(numpy_rng("subset", *stream).permutation(len(data))[:size])
    return data[index], labels[index]
