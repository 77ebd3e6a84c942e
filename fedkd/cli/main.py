"""The command ``fedkd``. Errors are one readable sentence and exit code 2; Ctrl-C is exit code 130."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fedkd.cli.audit import audit
from fedkd.cli.deploy import doctor, provision_app, server_app
from fedkd.cli.papers import app as papers_app
from fedkd.cli.privacy import app as privacy_app
from fedkd.cli.privacy import epsilon_line
from fedkd.cli.proxy import app as proxy_app
from fedkd.errors import FedkdError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated and data-free knowledge distillation that keeps data private.",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at experiments before they run.")
app.add_typer(config_app, name="config")
app.add_typer(privacy_app, name="privacy")
app.add_typer(papers_app, name="papers")
app.add_typer(proxy_app, name="proxy")
app.command()(audit)
app.add_typer(provision_app, name="provision")
app.add_typer(server_app, name="server")
app.command()(doctor)

out = Console() if sys.stdout.isatty() else Console(width=140)
err = Console(stderr=True)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="An experiment (YAML file) and overrides: key=value; a comma list is a sweep."),
]


def split(words: list[str] | None) -> tuple[Path | None, list[str]]:
    """Tell the experiment's file from overrides."""
    words = list(words or [])
    path = Path(words.pop(0)) if words and "=" not in words[0] else None
    stray = [w for w in words if "=" not in w]
    if stray:
        raise typer.BadParameter(f"expected key=value, got {stray[0]!r}")
    return path, words


def _version(wanted: bool) -> None:
    if wanted:
        from fedkd import __version__

        print(f"fedkd {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command as a whole."""


@app.command()
def simulate(
    words: Overrides = None,
    runner: Annotated[str | None, typer.Option(help="serial, stacked or flower; results are the same.")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="Folder of the run; default runs/NAME.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with an interrupted run or sweep in this folder.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Points of a sweep side by side; default: as many as there are cores for.")
    ] = None,
) -> None:
    """Train a student by federated distillation: the bundled digits, or the experiment named."""
    from fedkd import simulate as sim
    from fedkd.cli.progress import Announcer
    from fedkd.experiment import load

    announcer = Announcer(out)
    folder = resume if resume is not None else Path("runs")
    try:
        if resume is not None:
            if words or runner:
                raise typer.BadParameter("--resume goes on with what the folder says; it takes no other words")
            if (folder / sim.SWEEP).is_file():
                finished = sim.resume_sweep(folder, announcer, jobs)
            else:
                finished = [sim.resume(folder, announcer.single())]
        else:
            path, overrides = split(words)
            if runner is not None:
                overrides.append(f"runner.kind={runner}")
            points = load(path, overrides)
            folder = to if to is not None else sim.fresh_folder(Path("runs"), points[0][1].name)
            if len(points) == 1:
                finished = [sim.start(points[0][1], folder, announcer.single())]
            else:
                finished = sim.sweep(points, folder, announcer, jobs)
    except KeyboardInterrupt:
        announcer.close()
        if sim.is_begun(folder):
            err.print(
                f"Stopped. Go on with: [bold]fedkd simulate --resume {_plain(str(folder))}[/bold]", highlight=False
            )
        else:
            err.print("Stopped before the run began: there is nothing to go on with.")
        raise typer.Exit(130) from None
    finally:
        announcer.close()
    if len(finished) == 1:
        tell(finished[0].summary, folder)
        _check_worked(finished[0].folder)
    else:
        from fedkd.report.compare import compare as show

        show([folder], out)
        out.print(f"Sweep: {folder}", highlight=False)


def _check_worked(folder: Path) -> None:
    """A run in which no round had a result is an error, although it came to its end."""
    from fedkd.report.runfolder import Run

    rounds = Run.read(folder).rounds
    if rounds and all(row.failed for row in rounds):
        raise FedkdError(f"every round failed, the last because: {rounds[-1].failed}")


def tell(summary: Mapping[str, Any], folder: Path) -> None:
    """Print the few lines that a person wants."""
    accuracy = summary["accuracy"]

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    lines = []
    if accuracy["student"] is not None:
        lines.append(("student", percent(accuracy["student"])))
    lines.append(("devices, mean", percent(accuracy["clients_mean"])))
    if accuracy["local_only"] is not None:
        lines.append(("local-only, mean", percent(accuracy["local_only"])))
    lines.append(("ensemble of devices", percent(accuracy["ensemble"])))
    up, down = summary["bytes_up_per_device"] / 1e6, summary["bytes_down_per_device"] / 1e6
    proxy = summary["bytes_proxy"] / max(len(summary["per_client"]), 1) / 1e6
    extra = f" (of it {proxy:.3f} MB proxy set, once)" if proxy else ""
    lines.append(("per device", f"{up:.3f} MB up, {down:.3f} MB down{extra}"))
    lines.append(("epsilon", epsilon_line(summary)))
    lines.append(("time", f"{summary['seconds']:.1f} s, {summary['rounds_completed']} rounds of {summary['method']}"))
    if summary.get("virtual_seconds") is not None:
        lines.append(("virtual time", f"{summary['virtual_seconds'] / 3600:.2f} h on the simulated devices"))
    lines.append(("run", str(folder)))
    width = max(len(name) for name, _ in lines)
    out.print()
    for name, value in lines:
        out.print(f"{name:<{width}}  {value}", highlight=False, soft_wrap=True)
    for note in summary["notes"]:
        out.print(f"note: {note}", style="yellow", highlight=False, soft_wrap=True)


@app.command()
def methods() -> None:
    """List every method: what goes up and down, what it needs, and its paper."""
    from fedkd.algorithms.catalogue import METHODS, method_class

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("method", "up", "down", "proxy set", "different models", "predict_proba clients", "student", "paper"):
        table.add_column(title, overflow="fold")
    for name in METHODS:
        cls = method_class(name)
        table.add_row(
            name,
            cls.upload.__name__,
            cls.download.__name__,
            cls.proxy,
            _yes(cls.heterogeneous),
            _yes(cls.predictors),
            _yes(cls.student),
            cls.paper,
        )
    out.print(table)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run or sweep folders.")],
    plot: Annotated[Path | None, typer.Option(help="Write accuracy against megabytes (.png, .svg, .pdf).")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the table as JSON.")] = None,
) -> None:
    """Compare runs: accuracy, bytes, epsilon and seconds, as a table and a plot."""
    from fedkd.report.compare import compare as show

    show(runs, out, plot=plot, json_out=as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run, a sweep, or a run of `fedkd distill`.")],
    to: Annotated[Path | None, typer.Option("--out", help="The HTML file; default RUN/report.html.")] = None,
) -> None:
    """Write one self-contained HTML file about a run."""
    from fedkd.report.html import write_report

    out.print(str(write_report(run, to)), highlight=False, soft_wrap=True)


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of an experiment, so that editors complete it."""
    from fedkd.experiment import schema

    print(json.dumps(schema(), indent=1))


@config_app.command("show")
def config_show(words: Overrides = None) -> None:
    """Print the resolved experiment, every default included."""
    from fedkd.experiment import load

    path, overrides = split(words)
    for varying, experiment in load(path, overrides):
        if varying:
            print(f"--- # {', '.join(f'{k}={v}' for k, v in varying.items())}")
        print(experiment.dump(), end="")


def _register() -> None:
    """Add the commands that live in files of their own."""
    from fedkd.cli import deploy_client, distill, run, teacher

    for module in (distill, teacher, run, deploy_client):
        module.register(app)


_register()


def main() -> None:
    """Run the command line."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            app(standalone_mode=True)
    except FedkdError as cause:
        err.print(f"[red]error:[/red] {_plain(str(cause))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _warn(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
    """Show this library's warnings as one line, and other libraries' not at all: a user cannot act on them."""
    if category.__module__.startswith("fedkd"):
        err.print(f"[yellow]note:[/yellow] {_plain(str(message))}", highlight=False, soft_wrap=True)
