"""``fedkd teacher``: a teacher that only answers, as a service."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

teacher_app = typer.Typer(no_args_is_help=True, help="Serve a teacher that only answers, to callers with an account.")


def register(app: typer.Typer) -> None:
    """Add the group to ``app``."""
    app.add_typer(teacher_app, name="teacher")


Model = Annotated[str | None, typer.Option(help="Architecture, where a file does not name it.")]
Shape = Annotated[str | None, typer.Option(help="Shape of one input, such as 1x28x28, where no file tells.")]
Classes = Annotated[int | None, typer.Option(help="Number of classes, where no file tells.")]
Gives = Annotated[str, typer.Option(help="What an ONNX file's output is: logits or probabilities.")]


@teacher_app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(help="Made with policy.yaml, certificate, CA and tokens.")],
    host: Annotated[list[str] | None, typer.Option(help="Name or address that callers use; may be repeated.")] = None,
    caller: Annotated[list[str] | None, typer.Option(help="A caller's name; may be repeated.")] = None,
    listen: Annotated[str, typer.Option(help="Address and port of the service.")] = "127.0.0.1:7443",
    mutual: Annotated[bool, typer.Option("--mutual", help="Callers show a certificate beside their token.")] = False,
) -> None:
    """Make a policy with a certificate and a token per caller, to be edited and served."""
    from fedkd.cli.main import out
    from fedkd.teacher.kit import make_kit

    tokens = make_kit(folder, ["localhost", "127.0.0.1", *(host or ())], caller or ["alice"], listen, mutual)
    out.print(f"policy  {folder / 'policy.yaml'}", highlight=False, soft_wrap=True)
    for name, path in tokens.items():
        shown = f", {folder / 'certificates' / name}.crt and .key" if mutual else ""
        out.print(
            f"token of {name}  {path} (give it to {name}, with {folder / 'ca.crt'}{shown})",
            highlight=False,
            soft_wrap=True,
        )


@teacher_app.command("serve")
def serve(
    models: Annotated[
        list[str],
        typer.Argument(help="Files (.safetensors, .onnx, .pt) or package.module:factory; several are an ensemble."),
    ],
    policy: Annotated[
        Path | None, typer.Option(help="What callers may ask; default: a new ./teacher-kit, loopback.")
    ] = None,
    model: Model = None,
    shape: Shape = None,
    classes: Classes = None,
    gives: Gives = "logits",
) -> None:
    """Answer soft labels over TLS until Ctrl-C."""
    from fedkd.cli.main import out
    from fedkd.teacher.kit import make_kit
    from fedkd.teacher.policy import load_policy
    from fedkd.teacher.service import TeacherService
    from fedkd.teacher.sources import open_teacher

    teacher, form = open_teacher(models, model, _shape(shape), classes, _gives(gives))
    if policy is None:
        kit = Path("teacher-kit")
        policy = kit / "policy.yaml"
        if not policy.exists():
            make_kit(kit, ["localhost", "127.0.0.1"], ["alice"], "127.0.0.1:7443")
    rules = load_policy(policy)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter('{"time": "%(asctime)s", "log": %(message)s}'))
    log = logging.getLogger("fedkd.teacher")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _interrupt)
    with TeacherService(teacher, form, rules) as service:
        host = rules.listen.rpartition(":")[0]
        name = "localhost" if host in ("127.0.0.1", "[::1]") else host
        folder = policy.resolve().parent
        words = [f"token={p}" for p in sorted((folder / "tokens").glob("*"))[:1]]
        words += [f"cert={p}&key={p.with_suffix('.key')}" for p in sorted((folder / "certificates").glob("*.crt"))[:1]]
        if rules.tls is not None and (folder / "ca.crt").is_file():
            words.insert(0, f"ca={folder / 'ca.crt'}")
        scheme = "grpc" if rules.tls is None else "grpcs"
        address = f"{scheme}://{name}:{service.port}" + ("?" + "&".join(words) if words else "")
        out.print(f"serving {rules.answers.words} of {teacher.classes} classes at", highlight=False)
        out.print(f"  {address}", highlight=False, soft_wrap=True)
        try:
            service.wait()
        except KeyboardInterrupt:
            out.print("stopped", highlight=False)


@teacher_app.command("check")
def check(
    models: Annotated[
        list[str], typer.Argument(help="As for serve: files or package.module:factory; several are an ensemble.")
    ],
    data: Annotated[str, typer.Option(help="Labelled source whose test set measures the copies: a name or an .npz.")],
    policy: Annotated[
        Path | None, typer.Option(help="Adds a row with its answers and its first caller's budget.")
    ] = None,
    student: Annotated[str, typer.Option(help="Architecture of the copies.")] = "lenet_half",
    defences: Annotated[str, typer.Option(help="Names with , between them, or all.")] = "all",
    attacks: Annotated[str, typer.Option(help="ideal, dfme, noise, other, or package.module:Class.")] = "ideal,noise",
    queries: Annotated[str, typer.Option(help="Numbers of queries, each a column.")] = "250,1000,4000",
    seeds: Annotated[str, typer.Option(help="Seeds of the copies.")] = "1,2,3",
    steps: Annotated[int, typer.Option(help="Steps of every copy, on batches of 64.")] = 800,
    other: Annotated[
        Path | None, typer.Option(help="For `other`: a folder of images or an .npz of unlabelled inputs.")
    ] = None,
    to: Annotated[Path | None, typer.Option("--json", help="Also write the table here.")] = None,
    model: Model = None,
    shape: Shape = None,
    classes: Classes = None,
    gives: Gives = "logits",
) -> None:
    """Tell how far a caller could copy this teacher by its answers, with and without each defence."""
    from fedkd.cli.main import err, out
    from fedkd.simulate import versions
    from fedkd.storage import write_json
    from fedkd.teacher.check import cells, plan, table
    from fedkd.teacher.check import check as measure
    from fedkd.teacher.sources import open_teacher

    teacher, form = open_teacher(models, model, _shape(shape), classes, _gives(gives))
    made = plan(
        teacher, form, data, student=student, policy=policy, defences=defences, attacks=attacks.split(","),
        queries=_numbers(queries), seeds=_numbers(seeds), steps=steps, other=other,
    )  # fmt: skip
    rows = measure(made, lambda row: err.print("  ".join(cells(row)), highlight=False))
    out.print(table(made, rows))
    if to is not None:
        write_json(to, {"models": models, "data": data, "student": student, "steps": steps, "seeds": made.seeds,
                        "rows": rows, "versions": versions()})  # fmt: skip


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise typer.BadParameter(f"shape {text!r}: expected numbers joined by x, such as 1x28x28")
    return found


def _gives(text: str) -> Literal["logits", "probabilities"]:
    if text not in ("logits", "probabilities"):
        raise typer.BadParameter(f"gives {text!r}: expected logits or probabilities")
    return "logits" if text == "logits" else "probabilities"


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected whole numbers with , between them") from None
