"""`fedkd provision`: kits for everybody who takes part in a real federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
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
