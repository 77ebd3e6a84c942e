"""``fedkd papers``: published tables run again, with our figures beside the papers'."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Run published tables again, ours beside theirs.")

FOLDER = Path("simulations/papers/tables")

Folder = Annotated[Path, typer.Option(help="Where the tables' YAML files lie.")]


@app.command("list")
def listing(folder: Folder = FOLDER) -> None:
    """List the tables."""
    from fedkd import papers

    for path in papers.find("all", folder):
        print(f"{path.stem}: {papers.Source.read(path).table.title}")


@app.command("run")
def run(
    name: Annotated[str, typer.Argument(help="A table's name, a YAML file, or `all`.")],
    folder: Folder = FOLDER,
    to: Annotated[Path, typer.Option("--out", help="Folder of the runs; finished ones are reused.")] = Path(
        "runs/papers"
    ),
    seeds: Annotated[str | None, typer.Option(help="Comma list, instead of the table's own.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs side by side; default: as many as there are cores for.")
    ] = None,
    small: Annotated[bool, typer.Option(help="One round on the bundled digits, nothing is written.")] = False,
) -> None:
    """Run a table; its figures are printed, and written beside its YAML file."""
    from fedkd import papers

    out = Console(width=140)
    chosen = [int(s) for s in seeds.split(",")] if seeds else None
    for path in papers.find(name, folder):
        found = papers.run(path, to, chosen, small, jobs)
        table = Table(title=found["title"], box=None)
        for title in ("row", "paper", "ours", "of", "kB up", "kB down", "s"):
            table.add_column(title)
        for row in found["rows"]:
            bytes_ = [f"{row[f'bytes_{way}_per_device'] / 1e3:.1f}" for way in ("up", "down")]
            value = papers.percent(row[row["measure"]])
            table.add_row(row["label"], row["published"], value, row["measure"], *bytes_, f"{row['seconds']:.0f}")
        out.print(table)
        for row in found["rows"]:
            for told in row.get("failed", ()):
                out.print(f"{row['label']}: {told}", style="yellow", markup=False)
        if not small:
            papers.store(path, found)
