"""``fedkd distill``: a student learns from a teacher in one place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedkd.distill.loop import Epoch


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(distill)


def distill(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="An experiment (YAML file) and overrides: key=value; a comma list is a sweep. With --resume, a run's folder "
            "will do."
        ),
    ] = None,
    to: Annotated[Path | None, typer.Option("--out", help="Folder of the run; default runs/NAME.")] = None,
    assistants: Annotated[
        str | None,
        typer.Option(help="Nets between teacher and student: auto, or names with ; between them, from large to small."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run: its folder, or the words by which it was started.")
    ] = False,
) -> None:
    """Teach a student by a teacher: a checkpoint, an ONNX file, a service, or a model that is trained here first.

    With method=dfad (or another) the inputs are made from the teacher alone, and data=none will do.
    """
    from fedkd.cli.main import err, out, split
    from fedkd.distill import run
    from fedkd.distill.config import load
    from fedkd.errors import ConfigError
    from fedkd.simulate import fresh_folder, last_folder

    def watch(stage: str, epoch: Epoch, epochs: int) -> None:
        parts = ", ".join(f"{k} {v:,.0f}" if k == "queries" else f"{k} {v:.4g}" for k, v in epoch.terms.items())
        out.print(f"{stage}  epoch {epoch.epoch + 1}/{epochs}  loss {epoch.total:.4g}  ({parts})", highlight=False)

    folder: Path | None = None
    try:
        given = [Path(w) for w in words] if words else [to] if to is not None else []
        if resume and len(given) == 1 and (given[0] / run.CONFIG).is_file():
            folder = given[0]
            tell(run.resume(folder, watch).summary, folder)
            return
        if resume and len(given) == 1 and "=" not in str(given[0]) and given[0].suffix not in (".yaml", ".yml"):
            raise ConfigError(f"{given[0]} holds no run: expected a folder with a {run.CONFIG} in it")
        path, overrides = split(words)
        if assistants is not None:
            names = [n.strip() for n in assistants.split(";")]
            overrides.append("assistants=" + ("auto" if names == ["auto"] else json.dumps(names)))
        points = load(path, overrides)
        root = to
        if root is None:
            root = (last_folder if resume else fresh_folder)(Path("runs"), points[0][1].name)
        for varying, experiment in points:
            folder = root / ",".join(f"{k}={v}" for k, v in varying.items()) if varying else root
            go = run.resume_same if resume else run.start
            tell(go(experiment, folder, watch).summary, folder)
    except KeyboardInterrupt:
        err.print(f"Stopped. Go on with: [bold]fedkd distill --resume {folder}[/bold]", highlight=False)
        raise typer.Exit(130) from None


def tell(summary: Mapping[str, Any], folder: Path) -> None:
    """Print the few lines that a person wants."""
    from fedkd.cli.main import out

    accuracy, size = summary["accuracy"], summary["parameters"]
    lines = []
    for name in ("student", "alone", "teacher"):
        if accuracy.get(name) is not None:
            count = size["student" if name == "alone" else name]
            said = "" if count is None else f"  ({count:,} parameters)"
            if summary["metric"] != "accuracy":
                said = f" {summary['metric']}{said}"
            lines.append((name if name != "alone" else "student alone", f"{100 * accuracy[name]:.2f} %{said}"))
    for helper in summary.get("assistants", ()):
        said = "" if helper["accuracy"] is None else f"{100 * helper['accuracy']:.2f} %  "
        lines.append(("assistant", f"{said}({helper['parameters']:,} parameters, {helper['model']})"))
    if summary.get("nearest_mean") is not None:
        lines.append(("nearest mean", f"{100 * summary['nearest_mean']:.2f} %  ({summary['memory']} exemplars)"))
    if summary.get("members"):
        lines.append(("members", ", ".join(f"{100 * m:.2f} %" for m in summary["members"])))
    seen = "synthetic" if summary.get("method") else "training"
    if summary["agreement"] is not None:
        lines.append(("agreement", f"{100 * summary['agreement']:.2f} % of the {seen} inputs, student and teacher"))
    if summary.get("method"):
        lines.append(("queries", f"{summary['queries']:,} inputs that the teacher answered"))
    if summary.get("paid") is not None:
        lines.append(("paid", f"{summary['paid']:,} different inputs, charged by the service"))
    if summary.get("told") is not None:
        lines.append(("answers", summary["told"]))
    if summary.get("method"):
        lines.append(("pool", f"{folder / summary['pool']['file']}  ({summary['pool']['size']:,} synthetic inputs)"))
    lines += [("time", f"{summary['seconds']:.1f} s"), ("run", str(folder))]
    width = max(len(name) for name, _ in lines)
    out.print()
    for name, value in lines:
        out.print(f"{name:<{width}}  {value}", highlight=False, soft_wrap=True)
