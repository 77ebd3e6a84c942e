"""``fedkd client``: the device's end of a real federation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

client_app = typer.Typer(help="Be a device of a real federation, by the kit that `fedkd provision` made for it.")
KitFolder = Annotated[Path, typer.Argument(help="This client's kit.")]


def register(app: typer.Typer) -> None:
    """Add the group to ``app``."""
    app.add_typer(client_app, name="client")


@client_app.command()
def start(
    kit: KitFolder,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay here, for systemd and containers.")] = False,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Start although `fedkd doctor` would find a problem that stays.")
    ] = False,
) -> None:
    """Start the node: it asks the server for work until it is stopped. What could never work is refused."""
    from fedkd.cli.main import out
    from fedkd.deploy import client
    from fedkd.deploy.kit import ClientKit

    opened = ClientKit.read(kit)
    if not unchecked:
        client.check(opened)
    if foreground:
        client.run(opened)
    else:
        pid = client.start(opened)
        out.print(f"{opened.name} works for {opened.server_address} (process {pid})", highlight=False)


@client_app.command()
def stop(kit: KitFolder) -> None:
    """Stop the node; it leaves the server and keeps its state."""
    from fedkd.cli.main import out
    from fedkd.deploy import client
    from fedkd.deploy.kit import ClientKit

    out.print("stopped" if client.stop(ClientKit.read(kit)) else "was not running")


@client_app.command()
def status(
    kit: KitFolder, as_json: Annotated[bool, typer.Option("--json", help="As JSON, for machines.")] = False
) -> None:
    """Say how the node is."""
    from fedkd.cli.main import out
    from fedkd.deploy import client
    from fedkd.deploy.kit import ClientKit

    found = client.status(ClientKit.read(kit))
    if as_json:
        print(json.dumps(found))
        return
    state = f"running (process {found['pid']})" if found["running"] else "not running"
    out.print(
        f"{found['name']}: {state}, server {found['server']}, {found['bytes_today']:,} bytes today", highlight=False
    )
    if not found["running"]:
        raise typer.Exit(3)


@client_app.command()
def tunnel(
    kit: KitFolder,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1 to listen on.")] = 9092,
) -> None:
    """Carry a stock SuperNode's requests over this kit's mutual TLS, until stopped."""
    import asyncio

    from fedkd.deploy import tunnel
    from fedkd.deploy.kit import ClientKit
    from fedkd.deploy.log import setup_log

    asyncio.run(tunnel.run(ClientKit.read(kit), port, setup_log("tunnel", None)))
