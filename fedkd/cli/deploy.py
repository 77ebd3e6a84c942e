"""`fedkd provision`, `fedkd server` and `fedkd doctor`: a real federation, from its operator's side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

out = Console(soft_wrap=True, highlight=False)
KitsFolder = Annotated[Path, typer.Option("--kits", help="The operator's folder of kits.")]


class _MakeByDefault(TyperGroup):
    """`provision project.yaml` makes kits; the words below it are commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["make", *args]
        return super().parse_args(ctx, args)


provision_app = typer.Typer(
    cls=_MakeByDefault,
    no_args_is_help=True,
    help="Make kits: `fedkd provision project.yaml`; later renew, add client, revoke.",
)
add_app = typer.Typer(no_args_is_help=True, help="Add somebody to a project.")
provision_app.add_typer(add_app, name="add")


@provision_app.command("make")
def provision_make(
    project: Annotated[Path, typer.Argument(help="project.yaml: the server's address and the clients' names.")],
    kits: KitsFolder = Path("kits"),
) -> None:
    """Make an authority, and one folder for the server and for each client."""
    from fedkd.deploy.provision import provision

    made = provision(project, kits)
    names = [c.name for c in made.clients().clients]
    out.print(f"{kits}/ca      stays here: whoever has it can let anybody in. Back it up")
    out.print(f"{kits}/server  goes to {made.project.server.host}: fedkd server start server")
    for name in names:
        out.print(f"{kits}/{name}  goes to that client: fedkd client start {name}")
    out.print(f"certificates are valid for {made.project.days:g} days: fedkd provision renew")


@add_app.command("client")
def provision_add_client(
    name: Annotated[str, typer.Argument(help="The new client's name.")], kits: KitsFolder = Path("kits")
) -> None:
    """Make a kit for one more client."""
    from fedkd.deploy.kit import read_mapping
    from fedkd.deploy.provision import Newcomer, add_client

    folder = add_client(kits, read_mapping(Newcomer, {"name": name}, "fedkd provision add client"))
    out.print(f"{folder}  goes to that client: fedkd client start {name}")
    _tell_server(kits)


@provision_app.command("renew")
def provision_renew(
    names: Annotated[list[str] | None, typer.Argument(help="server or client names; all if none is given.")] = None,
    kits: KitsFolder = Path("kits"),
    days: Annotated[float | None, typer.Option(min=0.01, max=825, help="Validity; default: the project's.")] = None,
    new_keys: Annotated[
        bool, typer.Option(help="Make new private keys too, and revoke what was issued before.")
    ] = False,
) -> None:
    """Sign new certificates before the old ones end. Node keys stay as they are."""
    from fedkd.deploy.provision import renew

    for path in renew(kits, names or [], days=days, new_keys=new_keys):
        out.print(f"{path}  copy it to its machine")
    if new_keys:
        _tell_server(kits)


@provision_app.command("revoke")
def provision_revoke(
    name: Annotated[str, typer.Argument(help="The client to shut out.")], kits: KitsFolder = Path("kits")
) -> None:
    """Shut a client out for good."""
    from fedkd.deploy.provision import revoke

    revoke(kits, name)
    out.print(f"{name} is revoked.")
    _tell_server(kits)


def _tell_server(kits: Path) -> None:
    files = f"{kits}/server/{{clients.yaml,crl.pem,nginx.conf}}"
    out.print(f"{files}  copy them to the server, unless it runs on this folder; it notices within two seconds")


# ---- server ---------------------------------------------------------------------------------------------------------
server_app = typer.Typer(no_args_is_help=True, help="Run a server from its kit.")
ServerFolder = Annotated[Path, typer.Argument(help="The server's kit.")]


@server_app.command("start")
def server_start(
    kit: ServerFolder,
    foreground: Annotated[bool, typer.Option(help="Stay, and log to stderr: for systemd and Docker.")] = False,
) -> None:
    """Start the server; returns when devices can be served. It goes on from the state that it left."""
    from fedkd.deploy import server
    from fedkd.deploy.kit import ServerKit

    found = ServerKit.read(kit)
    if foreground:
        server.run(found, to_stderr=True)
        return
    status = server.start(found)
    out.print(f"server is up: devices reach {status['address']}; logs in {found.state}/logs")


@server_app.command("stop")
def server_stop(kit: ServerFolder) -> None:
    """Stop the server. Its state stays."""
    from fedkd.deploy import server
    from fedkd.deploy.kit import ServerKit

    out.print("server stopped" if server.stop(ServerKit.read(kit)) else "the server was not running")


@server_app.command("status")
def server_status(
    kit: ServerFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for a program.")] = False,
    ready: Annotated[bool, typer.Option(help="Only exit with 0 if devices can be served, with 1 if not.")] = False,
) -> None:
    """Say how the server, its clients and its runs are. Exit code 1 if devices cannot be served."""
    from fedkd.deploy import server
    from fedkd.deploy.kit import ServerKit

    status = server.status(ServerKit.read(kit))
    if as_json:
        print(json.dumps(status, indent=1))
    elif not ready:
        _show(status)
    if not status["ready"]:
        raise typer.Exit(1)


def _show(status: dict[str, Any]) -> None:
    said = "ready" if status["ready"] else f"{status['phase']}: {'; '.join(status['unready'])}"
    out.print(f"server at {status['address']} is {said}")
    out.print(f"disk: {status['disk_free_bytes'] / 1e9:.1f} GB free")
    parts = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("process", "pid", "up", "restarts", "memory"):
        parts.add_column(title)
    for name, row in status["processes"].items():
        memory = "-" if row["rss_bytes"] is None else f"{row['rss_bytes'] / 1e6:.0f} MB"
        parts.add_row(name, str(row["pid"] or "-"), f"{row['up_seconds']:.0f} s", str(row["restarts"]), memory)
    if status["processes"]:
        out.print(parts)
    people = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("client", "id", "status", "last seen", "sent today"):
        people.add_column(title)
    for row in status["clients"]:
        seen = "-" if row["last_seen_seconds"] is None else f"{row['last_seen_seconds']:.0f} s ago"
        people.add_row(row["name"], str(row["id"]), row["status"], seen, f"{row['bytes_today'] / 1e6:.1f} MB")
    out.print(people)
    for run in status["runs"]:
        accuracy = "-" if run["student_accuracy"] is None else f"{100 * run['student_accuracy']:.1f} %"
        out.print(f"run {run['name']}: {run['rounds']} rounds, student {accuracy}, {run['quarantined']} quarantined")


def doctor(kit: Annotated[Path, typer.Argument(help="A server's or a client's kit.")]) -> None:
    """Look for what would go wrong on this machine: problem | how to fix. Exit code 1 if there is a problem."""
    from fedkd.deploy.doctor import diagnose

    findings = diagnose(kit)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("", "check", "found", "how to fix"):
        table.add_column(title, overflow="fold")
    mark = {"ok": "ok", "warning": "note", "problem": "PROBLEM"}
    for finding in sorted(findings, key=lambda f: ["problem", "warning", "ok"].index(f.level)):
        table.add_row(mark[finding.level], finding.check, escape(finding.said), escape(finding.fix))
    out.print(table)
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)
