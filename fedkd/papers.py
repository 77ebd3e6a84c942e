"""Published tables run again: a YAML file with the settings and the paper's figures becomes a table with ours beside.

A file has ``title``, ``paper``, ``seeds``, ``base`` (an experiment) and ``rows``. A row has a ``label``, a ``set`` that is
laid over the base (or over ``experiment``, a YAML file beside the folder of tables), ``measure`` (``student``,
``clients_mean``, ``clients_own_classes_mean`` or ``ensemble``) and ``published``, the paper's figure as text. ``scale`` says
how the runs differ in size from the paper's, ``note`` why figures miss. ``grid`` is for labels of the form "line, column":
the table then has a line and a column for each. What was measured lies as NAME.json beside NAME.yaml, and in README.md of
the folder above, between the marks of the table's name.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedkd.errors import ConfigError
from fedkd.experiment import Experiment, build, read_yaml, validate
from fedkd.report.runfolder import Group, expand, group_seeds
from fedkd.simulate import git_revision, sweep, versions
from fedkd.storage import write_atomic

MEASURES = ("student", "clients_mean", "clients_own_classes_mean", "ensemble")


class PaperRow(BaseModel):
    """One line of a table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: str
    experiment: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    measure: Literal["student", "clients_mean", "clients_own_classes_mean", "ensemble"] = "student"
    published: str = "-"


class PaperTable(BaseModel):
    """A table to be run again; see the module text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    paper: str
    scale: str = ""
    note: str = ""
    grid: bool = False
    seeds: tuple[int, ...] = (1, 2, 3)
    base: dict[str, Any] = Field(default_factory=dict)
    rows: tuple[PaperRow, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Source:
    """A table and the file that it was read from."""

    path: Path
    table: PaperTable

    @classmethod
    def read(cls, path: Path) -> Source:
        """Read a table.

        Raises:
            ConfigError: the file is missing or breaks the schema.
        """
        return cls(path, build(PaperTable, read_yaml(path)))

    def raw(self, row: PaperRow) -> dict[str, Any]:
        """Return the settings of one row as a plain mapping."""
        base = self.table.base if row.experiment is None else read_yaml(self.path.parent.parent / row.experiment)
        return merged(base, row.set)

    def experiment(self, row: PaperRow, seed: int) -> Experiment:
        """Return the experiment of one row and seed."""
        return validate({**self.raw(row), "seed": seed})


def merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the nested mapping ``more`` laid over it; a name in the place of a section replaces it."""
    out = dict(base)
    for name, value in more.items():
        old = out.get(name)
        out[name] = merged(old, value) if isinstance(value, Mapping) and isinstance(old, Mapping) else value
    return out


def find(name: str, folder: Path) -> list[Path]:
    """Return the files of tables: one by name or path, or ``all`` of ``folder``.

    Raises:
        ConfigError: there is none.
    """
    known = sorted(folder.glob("*.yaml"))
    if name == "all" and known:
        return known
    for path in (Path(name), folder / f"{name}.yaml"):
        if path.suffix == ".yaml" and path.is_file():
            return [path]
    names = ", ".join(p.stem for p in known) or f"none in {folder}; run this in a checkout, or give a file"
    raise ConfigError(f"no table is named {name!r}. Known: {names}")


def measure(
    points: Sequence[tuple[Mapping[str, Any], Experiment]], folder: Path, jobs: int | None = None
) -> list[dict[str, Any]]:
    """Run a sweep, and return for each of its points, seeds apart, mean, deviation and bytes of what they reached."""
    sweep(points, folder, jobs=jobs)
    return [_row(group) for group in group_seeds(expand([folder]))]


def _row(group: Group) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key in MEASURES:
        spread = group.accuracy(key)
        row[key] = (
            None if spread is None else {"mean": spread.mean, "std": spread.std, "per_seed": list(spread.per_seed)}
        )
    for key in ("bytes_up_per_device", "bytes_down_per_device", "seconds"):
        row[key] = group.average(key)
    # A round that failed leaves the models as they were: a figure of such a run is not the method's.
    failed = [f"seed {run.seed}: {note}" for run in group.counted for note in run.notes if " rounds failed" in note]
    return row | ({"failed": failed} if failed else {})


def run(
    path: Path, out: Path, seeds: Sequence[int] | None = None, small: bool = False, jobs: int | None = None
) -> dict[str, Any]:
    """Run a table below ``out``, reusing what is finished there; returns what is written as NAME.json.

    Args:
        seeds: instead of the table's own.
        jobs: runs side by side; None: as many as there are cores for.
        small: one round on the bundled digits, to see that everything works; its figures mean nothing.
    """
    source = Source.read(path)
    table = source.table
    chosen = tuple(seeds) if seeds else table.seeds
    # Rows that differ in nothing but what they measure share their runs.
    settings = [source.raw(row) for row in table.rows]
    first = [settings.index(raw) for raw in settings]
    points = [
        ({"row": i, "seed": s}, _shrunk(source, table.rows[i], s) if small else source.experiment(table.rows[i], s))
        for i in dict.fromkeys(first)
        for s in chosen
    ]
    # Other settings are another sweep, so that nothing is taken for a result that is none.
    digest = hashlib.sha256("\n".join(point.dump() for _, point in points).encode()).hexdigest()[:12]
    found = dict(zip(dict.fromkeys(first), measure(points, out / path.stem / digest, jobs), strict=True))
    rows = [
        {"label": row.label, "measure": row.measure, "published": row.published, **found[i]}
        for row, i in zip(table.rows, first, strict=True)
    ]
    made = versions() | {"git_revision": git_revision() or "unknown"}
    return {"title": table.title, "seeds": list(chosen), "versions": made, "rows": rows}


def _shrunk(source: Source, row: PaperRow, seed: int) -> Experiment:
    raw = source.raw(row)
    tiny: dict[str, Any] = {"rounds": 1, "data": {"source": "digits"}, "training": {"steps": 2}, "proxy_per_round": 30}
    tiny["partition"] = {"kind": "dirichlet", "clients": 4, "alpha": 1.0}
    tiny["models"] = {"student": "mlp", "devices": "mlp"}
    tiny["proxy"] = {"size": 60, "labelled": bool((raw.get("proxy") or {}).get("labelled"))}
    for name in ("data", "partition", "models", "proxy"):
        raw.pop(name, None)
    return validate({**merged(raw, tiny), "seed": seed})


def store(path: Path, found: Mapping[str, Any]) -> None:
    """Write what was measured beside the table's file, and its block of the README of the folder above."""
    write_atomic(path.with_suffix(".json"), (json.dumps(found, indent=1) + "\n").encode())
    page = path.parent.parent / "README.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else "# Published tables, run again\n"
    write_atomic(page, placed(text, path.stem, block(Source.read(path), found)).encode())


def placed(text: str, name: str, block: str) -> str:
    """Return ``text`` with ``block`` between the marks of ``name``, which are added at the end if they are not there."""
    begin, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
    new = f"{begin}\n{block}{end}"
    if begin not in text or end not in text:
        return f"{text.rstrip()}\n\n{new}\n"
    return text[: text.index(begin)] + new + text[text.index(end) + len(end) :]


def block(source: Source, found: Mapping[str, Any]) -> str:
    """Return the part of the README that tells of one table."""
    table = source.table
    lines = [f"## {table.title}", "", _wrapped(f"{table.paper.rstrip('.')}."), ""]
    lines += [_wrapped(table.scale), ""] if table.scale else []
    folder = source.path.parent
    home = "" if folder.parts[-2:] == ("papers", "tables") else f" --folder {folder.as_posix()}"
    lines += [f"`fedkd papers run {source.path.stem}{home}`; seeds {', '.join(map(str, found['seeds']))}.", ""]
    if table.grid:
        lines += _grid(found["rows"])
    else:
        lines += ["| row | paper | ours | measured on | kB up | kB down |", "|---|---|---|---|---|---|"]
        lines += [_line(row) for row in found["rows"]]
    lines += ["", _wrapped(table.note)] if table.note else []
    for row in found["rows"]:
        lines += ["", _wrapped(f"**{row['label']}**: {'; '.join(row['failed'])}.")] if row.get("failed") else []
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _grid(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    ours = {tuple(row["label"].split(", ", 1)): percent(row[row["measure"]]) for row in rows}
    across = list(dict.fromkeys(column for _, column in ours))
    lines = [f"| | {' | '.join(across)} |", "|---" * (len(across) + 1) + "|"]
    for down in dict.fromkeys(line for line, _ in ours):
        lines.append(f"| {down} | {' | '.join(ours.get((down, column), '-') for column in across)} |")
    return lines


def _line(row: Mapping[str, Any]) -> str:
    of = {"student": "student", "clients_mean": "devices", "clients_own_classes_mean": "devices, own classes"}
    up, down = (f"{row[f'bytes_{way}_per_device'] / 1e3:.1f}" for way in ("up", "down"))
    ours, name = percent(row[row["measure"]]), of.get(row["measure"], row["measure"])
    return f"| {row['label']} | {row['published']} | {ours} | {name} | {up} | {down} |"


def percent(value: Mapping[str, Any] | None) -> str:
    """Return ``mean±deviation`` in percent, or a dash."""
    if value is None:
        return "-"
    spread = f"±{100 * value['std']:.1f}" if value["std"] is not None else ""
    return f"{100 * value['mean']:.1f}{spread}"
