"""``fedkd proxy``: what a proxy set is worth, before rounds are spent."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Look at proxy sets.")


@app.callback()
def _only() -> None:
    """Commands about proxy sets."""


@app.command("check")
def check(
    words: Annotated[
        list[str] | None,
        typer.Argument(help="An experiment (YAML file) and overrides: key=value; a comma list checks several."),
    ] = None,
) -> None:
    """Let devices train for one round and tell how well the proxy set serves; more coverage promises more."""
    from fedkd.cli.main import split
    from fedkd.experiment import read_points
    from fedkd.proxy_check import FIGURES
    from fedkd.proxy_check import check as measure

    path, overrides = split(words)
    table = Table(box=None)
    for title in ("proxy set", *FIGURES):
        table.add_column(title)
    for varying, raw in read_points(path, overrides):
        found = measure(raw)
        label = ", ".join(f"{k}={v}" for k, v in varying.items()) or str(
            (raw.get("proxy") or {}).get("kind", "holdout")
        )
        table.add_row(label, *(f"{found[name]:.3f}" for name in FIGURES))
    Console(width=140).print(table)
