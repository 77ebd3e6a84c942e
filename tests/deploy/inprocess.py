"""A real network without the network: the server's runner and devices with kits, their messages handed over as records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from flwr.app import Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata

from fedkd import simulate
from fedkd.deploy.device import Device
from fedkd.deploy.kit import ClientKit, ServerKit
from fedkd.deploy.mail import Ask, MailError, Say, pack_ask, pack_say, unpack_ask
from fedkd.deploy.network import Member, NetworkRunner, Post
from fedkd.deploy.provision import provision
from fedkd.deploy.run import for_network
from fedkd.deploy.sites import server_site
from fedkd.experiment import Experiment, validate

Twist = Callable[["Wire", int, Ask, Callable[[], Message]], "Message | MailError | str | None"]
"""Called for every request; returns what comes back: a reply, a fault, None for lost, or "silence"."""


def digits(clients: int, **part: Any) -> dict[str, Any]:
    """Return a data.yaml by which each client takes its part of the digits, as a simulation of seed 1 deals them."""
    return {
        "data": {"source": "digits"},
        "part": {
            "index": "{id}", "seed": 1, "partition": {"clients": clients, "alpha": 0.5}, "proxy": {"size": 100}, **part
        },
    }  # fmt: skip


def experiment(clients: int, **changes: Any) -> Experiment:
    """Return a small DS-FL experiment on the digits."""
    raw: dict[str, Any] = {
        "name": "trial", "rounds": 3, "partition": {"clients": clients}, "proxy": {"size": 100},
        "training": {"epochs": 1}, "digest": {"epochs": 1}, "server": {"epochs": 2},
        "evaluation": {"local_only": False}, "runner": {"kind": "serial"},
    }  # fmt: skip
    return validate({**raw, **changes})


class Wire(Post):
    """Hands every request to its device at once, through the records that would travel; ``twist`` may interfere."""

    def __init__(
        self, devices: Mapping[int, Device], kits: Mapping[int, ClientKit], members: Mapping[int, Member]
    ) -> None:
        self.devices, self.kits, self.members = dict(devices), kits, members
        self.offline: set[int] = set()
        self.twist: Twist | None = None
        self.sent: list[tuple[int, Ask]] = []
        self.waiting: dict[str, Message | MailError | None] = {}

    def online(self) -> Mapping[bytes, int]:
        return {m.pem: 100 + k for k, m in self.members.items() if k not in self.offline}

    def send(self, letters: Sequence[tuple[int, Ask]], seconds: float) -> list[str | None]:
        return [self.deliver(node, ask) for node, ask in letters]

    def deliver(self, node: int, ask: Ask) -> str:
        client, name = node - 100, f"message-{len(self.sent)}"
        self.sent.append((client, ask))

        def honest() -> Message:
            return self.reply(name, client, self.devices[client].handle(unpack_ask(pack_ask(ask))))

        came = self.twist(self, client, ask, honest) if self.twist is not None else honest()
        if not isinstance(came, str):
            self.waiting[name] = came
        return name

    def collect(self, names: Sequence[str]) -> list[tuple[str, Message | MailError | None]]:
        return [(name, self.waiting.pop(name)) for name in names if name in self.waiting]

    def reply(self, name: str, client: int, say: Say, signer: int | None = None) -> Message:
        """Return what a device says as a message, signed by ``signer``, by default by itself."""
        content = pack_say(say, self.kits[client if signer is None else signer].node_key())
        return self.message(content, name)

    def message(self, content: RecordDict, name: str = "") -> Message:
        """Return a message as Flower would put it together."""
        meta = Metadata(
            run_id=1, message_id="", src_node_id=2, dst_node_id=1, reply_to_message_id=name, group_id="", created_at=0.0,
            ttl=60.0, message_type="train",
        )  # fmt: skip
        return make_message(metadata=meta, content=content)


class Network:
    """Kits for ``clients`` devices in ``root``, their devices, and the wire between them and the server."""

    def __init__(
        self, root: Path, clients: int, data: Mapping[str, Any] | None = None, policy: Mapping[str, Any] | None = None
    ) -> None:
        root.mkdir(parents=True, exist_ok=True)
        project: dict[str, Any] = {
            "project": "trial",
            "server": {"host": "127.0.0.1"},
            "data": dict(data) if data is not None else digits(clients),
            "clients": [f"client-{k}" for k in range(clients)],
        }
        if policy is not None:
            project["policy"] = dict(policy)
        (root / "project.yaml").write_text(yaml.safe_dump(project))
        provision(root / "project.yaml", root / "kits")
        self.root = root
        self.server = ServerKit.read(root / "kits/server")
        self.kits = {k: ClientKit.read(root / f"kits/client-{k}") for k in range(clients)}
        self.members = {
            c.id: Member(c.id, c.name, load_pem_public_key(c.node_key_pem), c.node_key_pem)
            for c in self.server.client_list().clients
        }
        self.wire = Wire({k: Device(kit) for k, kit in self.kits.items()}, self.kits, self.members)

    def restart(self, client: int) -> None:
        """Let a device's process end and come back: what it had in memory is gone."""
        self.wire.devices[client] = Device(self.kits[client])

    def runner(self, chosen: Experiment, token: str = "t") -> NetworkRunner:
        """Return the server's runner for an experiment."""
        site = server_site(for_network(chosen), len(self.kits))
        return NetworkRunner(site, self.wire, self.members, f"{chosen.name}.{token}")

    def play(self, chosen: Experiment, folder: Path, token: str = "t", watch: Any = None) -> simulate.Finished:
        """Run the rounds that are left in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        runner = self.runner(chosen, token)
        return simulate.play(runner.site, runner, folder, watch, run=runner.run)
