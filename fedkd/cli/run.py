"""``fedkd run`` and ``fedkd attach``: the same experiment on a real server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedkd.deploy.kit import ServerKit

On = Annotated[Path, typer.Option("--on", help="The server's kit; this command runs on the server's machine.")]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    app.command()(run)
    app.command()(attach)


def run(
    on: On,
    words: Annotated[
        list[str] | None, typer.Argument(help="An experiment (YAML file) and overrides: key=value.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; default that of the experiment.")] = None,
    resume: Annotated[str | None, typer.Option(help="Go on with this run from its last completed round.")] = None,
    stop: Annotated[str | None, typer.Option(help="End this run; it can be resumed.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Start it and come back at once.")] = False,
) -> None:
    """Run an experiment on a real server and its devices. Ctrl-C leaves it running; `fedkd attach` comes back to it."""
    from fedkd.cli.main import out, split
    from fedkd.deploy import run as runs
    from fedkd.deploy.kit import ServerKit
    from fedkd.errors import ConfigError
    from fedkd.experiment import load

    kit = ServerKit.read(on)
    if stop is not None:
        out.print("stopped" if runs.stop(kit, stop) else "was not running")
        return
    if resume is not None:
        if words or name:
            raise typer.BadParameter("--resume goes on with what the run's folder says; it takes no other words")
        folder = runs.resume(kit, resume)
    else:
        path, overrides = split(words)
        points = load(path, overrides)
        if len(points) != 1:
            raise ConfigError("a sweep runs by `fedkd simulate`: a real network takes one experiment at a time")
        folder = runs.start(kit, points[0][1], name)
    if detach:
        out.print(f"{folder.name} runs on; watch it by `fedkd attach {folder.name} --on {on}`", highlight=False)
        return
    _watch(kit, folder, on)


def attach(name: Annotated[str, typer.Argument(help="Name of the run.")], on: On) -> None:
    """Watch a run until it ends. Ctrl-C leaves it running."""
    from fedkd.deploy.kit import ServerKit
    from fedkd.deploy.serve import Standing, run_folder

    kit = ServerKit.read(on)
    folder = run_folder(kit, name)
    Standing.read(folder)
    _watch(kit, folder, on)


def _watch(kit: ServerKit, folder: Path, on: Path) -> None:
    from fedkd.cli.main import out, tell
    from fedkd.deploy import run as runs
    from fedkd.experiment import read_yaml, validate
    from fedkd.simulate import CONFIG

    rounds = validate(read_yaml(folder / CONFIG)).rounds
    try:
        for record in runs.follow(kit, folder):
            out.print(_line(record, rounds), highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        out.print(f"\nStill running. Come back by: fedkd attach {folder.name} --on {on}", highlight=False)
        raise typer.Exit(130) from None
    tell(runs.summary(folder), folder)


def _line(record: dict[str, Any] | Any, rounds: int) -> str:
    student = record["student_accuracy"]
    words = [f"round {record['round'] + 1}/{rounds}"]
    if record["asked"] is not None:
        words.append(f"{record['answered']}/{record['asked']} answers")
    if student is not None:
        words.append(f"student {100 * student:.1f} %")
    if record["asked"] is not None:
        words.append(f"{(record['bytes_up'] + record['bytes_down']) / 1e6:.2f} MB")
    words.append(f"{record['seconds']:.1f} s")
    if record["quarantined"]:
        words.append("quarantined: " + ", ".join(f"{q['client']} ({q['reason']})" for q in record["quarantined"]))
    if record["failed"]:
        words.append(f"failed: {record['failed']}")
    return "  ".join(words)
