"""Provisioning: from one project.yaml to a folder per participant, and later renewals, newcomers and revocations.

The folder of kits stays with the operator. `ca/` never leaves it; `server/` and each client's folder are copied to the
machine that they name.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from pydantic import Field, field_validator, model_validator

from fedkd.deploy import ca
from fedkd.deploy.kit import (
    CA_CERTIFICATE,
    LOOPBACK,
    NAME,
    REVOKED,
    STATE,
    Client,
    ClientKit,
    ClientList,
    Limits,
    Section,
    Server,
    ServerKit,
    free_name,
    read_model,
    write_model,
)
from fedkd.errors import ConfigError
from fedkd.storage import write_atomic, write_json

KITS = Path("kits")
PROJECT, ISSUED, CLIENTS = "project.yaml", "issued.json", "clients.yaml"
AUTHORITY, SERVER = "ca", "server"
SECRET, PUBLIC = 0o600, 0o644
FLEET_ACTIONS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
"""What a device may ask of SuperLink. Registering is not among them: the server registers whom clients.yaml names."""
FLEET_PATHS = tuple(f"/v1/fleet/{action}" for action in FLEET_ACTIONS)


# ---- what the operator writes ---------------------------------------------------------------------------------------
class Newcomer(Section):
    """A client as project.yaml names it: by its name alone, or with its data and policy."""

    name: str = Field(pattern=NAME)
    data: dict[str, Any] | None = Field(None, description="Becomes data.yaml; {id}, {name}, {clients} are filled in.")
    policy: dict[str, Any] | None = Field(None, description="Becomes policy.yaml.")

    @field_validator("name")
    @classmethod
    def _free(cls, value: str) -> str:
        return free_name(value)


class ServerAddress(Section):
    """Where the server will be."""

    host: str = Field(min_length=1, description="Name or address by which devices reach the server.")
    port: int = Field(8443, ge=1, le=65535)
    extra_hosts: tuple[str, ...] = Field((), description="Other names and addresses of the same server.")
    listen: str = "0.0.0.0"
    control_port: int = Field(8000, ge=1, le=65535)
    ops_port: int = Field(9464, ge=1, le=65535)
    limits: Limits = Limits()


class Project(Section):
    """project.yaml."""

    project: str = Field(pattern=r"^[\w.-]{1,40}$")
    server: ServerAddress
    days: float = Field(90, gt=0, le=825, description="How long certificates of server and clients are valid.")
    data: dict[str, Any] | None = Field(None, description="data.yaml of every client that gives none of its own.")
    policy: dict[str, Any] | None = None
    clients: tuple[Newcomer, ...] = Field(min_length=1)

    @field_validator("clients", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [c.name for c in self.clients]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ConfigError(f"two clients are called {twice[0]!r}")
        return self


@dataclass(frozen=True)
class Issued:
    """A certificate that the authority signed."""

    name: str
    serial: int
    not_after: datetime
    revoked: bool = False

    def plain(self) -> dict[str, Any]:
        """Return the entry as JSON holds it."""
        return {
            "name": self.name,
            "serial": f"{self.serial:x}",
            "not_after": self.not_after.isoformat(),
            "revoked": self.revoked,
        }


# ---- the folder of kits ---------------------------------------------------------------------------------------------
class Kits:
    """The operator's folder: the authority, and everybody's kit as it was last written."""

    def __init__(self, folder: Path) -> None:
        """Open an existing folder.

        Raises:
            ConfigError: it holds no authority, or a damaged one.
        """
        self.folder = folder
        self.project = read_model(Project, folder / PROJECT)
        authority = folder / AUTHORITY
        try:
            self.authority = ca.Authority.load(
                (authority / "ca.key").read_bytes(), (authority / CA_CERTIFICATE).read_bytes()
            )
            self.issued = [
                Issued(e["name"], int(e["serial"], 16), datetime.fromisoformat(e["not_after"]), bool(e["revoked"]))
                for e in json.loads((authority / ISSUED).read_text())["issued"]
            ]
        except OSError as cause:
            raise ConfigError(f"cannot read {cause.filename}: {cause.strerror}") from cause
        except (ValueError, KeyError, TypeError) as cause:
            raise ConfigError(f"{authority} is damaged ({cause}): restore it from a backup") from cause

    @property
    def server(self) -> Path:
        """The server's kit."""
        return self.folder / SERVER

    def clients(self) -> ClientList:
        """Read who takes part."""
        return read_model(ClientList, self.server / CLIENTS)

    # ---- issuing ----
    def issue(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        usage: x509.ObjectIdentifier,
        hosts: Sequence[str],
        days: float,
    ) -> bytes:
        """Sign a certificate and write it into the record first, so that it can always be revoked."""
        certificate = self.authority.leaf(name, key.public_key(), usage=usage, hosts=hosts, days=days)
        self.issued.append(Issued(name, certificate.serial_number, certificate.not_valid_after_utc))
        self.record()
        return ca.certificate_pem(certificate)

    def record(self) -> None:
        """Write the record of certificates, and the list of revoked ones for server and operator."""
        write_json(self.folder / AUTHORITY / ISSUED, {"issued": [entry.plain() for entry in self.issued]})
        revoked = self.authority.revocations(e.serial for e in self.issued if e.revoked)
        write_atomic(self.folder / AUTHORITY / REVOKED, revoked, mode=PUBLIC)
        if self.server.is_dir():
            write_atomic(self.server / REVOKED, revoked, mode=PUBLIC)

    # ---- kits ----
    def make_server(self) -> None:
        """Write the server's kit."""
        address, folder = self.project.server, self.server
        _make_folder(folder)
        _make_folder(folder / STATE)
        write_model(
            folder / ServerKit.FILE,
            ServerKit(
                project=self.project.project,
                host=address.host,
                port=address.port,
                listen=address.listen,
                control_port=address.control_port,
                ops_port=address.ops_port,
                limits=address.limits,
            ),
            "The server's kit; the one file to edit. `fedkd server start .` reads it.\n"
            "Devices reach host:port. control_port and ops_port listen on 127.0.0.1 alone.",
        )
        self._write_authority(folder)
        key, loopback = ca.new_key(), ca.new_key()
        write_atomic(folder / "server.key", ca.key_pem(key), mode=SECRET)
        hosts = [address.host, *address.extra_hosts]
        write_atomic(folder / "server.crt", self.issue(SERVER, key, ca.SERVER, hosts, self.project.days), mode=PUBLIC)
        # Never leaves the machine, stands for it alone, and needs no renewal: SuperLink reads it only when it starts.
        write_atomic(folder / "loopback.key", ca.key_pem(loopback), mode=SECRET)
        local = self.issue("loopback", loopback, ca.SERVER, ["localhost", LOOPBACK, "::1"], ca.CA_DAYS)
        write_atomic(folder / "loopback.crt", local, mode=PUBLIC)
        write_atomic(folder / "superexec.secret", secrets.token_bytes(32), mode=SECRET)
        self.write_clients(ClientList())
        for template in ("fedkd-server.service", "server.Dockerfile", "server.compose.yaml"):
            write_atomic(folder / template.removeprefix("server."), self._fill(template), mode=PUBLIC)

    def make_client(self, newcomer: Newcomer, id: int) -> None:
        """Write a client's kit, and enter the client into the server's list."""
        folder = self.folder / newcomer.name
        if folder.exists():
            raise ConfigError(f"{folder} exists already: choose another name, or move that folder away")
        address = self.project.server
        _make_folder(folder)
        _make_folder(folder / STATE)
        write_model(
            folder / ClientKit.FILE,
            ClientKit(
                project=self.project.project,
                name=newcomer.name,
                id=id,
                server=Server(host=address.host, port=address.port),
            ),
            "A client's kit; the one file to edit. `fedkd client start .` reads it.",
        )
        self._write_authority(folder)
        key = ca.new_key()
        write_atomic(folder / "client.key", ca.key_pem(key), mode=SECRET)
        certificate = self.issue(newcomer.name, key, ca.CLIENT, (), self.project.days)
        write_atomic(folder / "client.crt", certificate, mode=PUBLIC)
        private, public = ca.node_key_pair()
        write_atomic(folder / "node.key", private, mode=SECRET)
        write_atomic(folder / "node.pub", public + b"\n", mode=PUBLIC)
        filled = {"id": str(id), "name": newcomer.name, "clients": str(len(self.project.clients))}
        for name, own in (
            ("data.yaml", newcomer.data or self.project.data),
            ("policy.yaml", newcomer.policy or self.project.policy),
        ):
            text = self._fill(name) if own is None else yaml.safe_dump(fill(own, filled), sort_keys=False).encode()
            write_atomic(folder / name, text, mode=PUBLIC)
        for template in ("fedkd-client.service", "client.Dockerfile", "client.compose.yaml"):
            text = self._fill(template, name=newcomer.name)
            write_atomic(folder / template.removeprefix("client."), text, mode=PUBLIC)
        known = self.clients().clients
        entry = Client(name=newcomer.name, id=id, node_key=public.decode())
        self.write_clients(ClientList(clients=(*known, entry)))

    def write_clients(self, clients: ClientList) -> None:
        """Write who takes part, for the built-in gate and for nginx."""
        write_model(self.server / CLIENTS, clients, "Written by `fedkd provision`; the running server notices changes.")
        write_atomic(self.server / "nginx.conf", self._nginx(clients), mode=PUBLIC)

    def _write_authority(self, folder: Path) -> None:
        write_atomic(folder / CA_CERTIFICATE, ca.certificate_pem(self.authority.certificate), mode=PUBLIC)

    def _fill(self, template: str, **values: str) -> bytes:
        values = {"project": self.project.project, "port": str(self.project.server.port), **values}
        return _template(template, values)

    def _nginx(self, clients: ClientList) -> bytes:
        import base64

        kit = ServerKit.read(self.server)
        members = "\n".join(
            f'    "CN={c.name},O={self.project.project}:{base64.b64encode(c.node_key_pem).decode()}" 1;'
            for c in clients.clients
            if not c.revoked
        )
        return self._fill(
            "nginx.conf",
            listen=f"[::]:{kit.port}" if kit.listen == "::" else f"{kit.listen}:{kit.port}",
            control=kit.control_address,
            folder=str(self.server.resolve()),
            paths="\n".join(f"    {path} 1;" for path in FLEET_PATHS),
            members=members,
            message_mib=str(kit.limits.message_mib),
            connections=str(kit.limits.connections_per_client),
            header_seconds=f"{kit.limits.header_seconds:.0f}",
            body_seconds=f"{kit.limits.body_seconds:.0f}",
            idle_seconds=f"{kit.limits.idle_seconds:.0f}",
        )


# ---- commands -------------------------------------------------------------------------------------------------------
def provision(project_file: Path, folder: Path) -> Kits:
    """Make the authority and a kit for everybody whom ``project_file`` names.

    Raises:
        ConfigError: the project does not fit, or the folder holds a project already.
    """
    project = read_model(Project, project_file)
    if (folder / AUTHORITY).exists() or (folder / SERVER).exists():
        raise ConfigError(
            f"{folder} holds a project already. `fedkd provision add client NAME` adds to it, `fedkd provision renew` "
            "renews certificates; for a new authority choose another folder with --kits"
        )
    clash = [c.name for c in project.clients if (folder / c.name).exists()]
    if clash:
        raise ConfigError(f"{folder / clash[0]} exists already: choose another folder with --kits")
    began = not folder.exists()
    try:
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        _make_folder(folder / AUTHORITY)
        authority = ca.Authority.new(project.project)
        write_atomic(folder / AUTHORITY / "ca.key", ca.key_pem(authority.key), mode=SECRET)
        write_atomic(folder / AUTHORITY / CA_CERTIFICATE, ca.certificate_pem(authority.certificate), mode=PUBLIC)
        write_json(folder / AUTHORITY / ISSUED, {"issued": []})
        _write_project(folder, project)
        kits = Kits(folder)
        kits.make_server()
        for id, newcomer in enumerate(project.clients):
            kits.make_client(newcomer, id)
    except BaseException:
        # Half a project would be refused from then on: leave nothing behind.
        for made in (
            [folder] if began else [folder / n for n in (AUTHORITY, SERVER, *(c.name for c in project.clients))]
        ):
            shutil.rmtree(made, ignore_errors=True)
        raise
    return kits


def add_client(folder: Path, newcomer: Newcomer) -> Path:
    """Make a kit for one more client; its id follows the highest that was ever given."""
    kits = Kits(folder)
    known = kits.clients().clients
    if newcomer.name in {c.name for c in known}:
        raise ConfigError(f"there is a client {newcomer.name!r} already: names are never used twice")
    project = kits.project.model_copy(update={"clients": (*kits.project.clients, newcomer)})
    kits.project = project
    kits.make_client(newcomer, 1 + max((c.id for c in known), default=-1))
    _write_project(folder, project)
    return folder / newcomer.name


def renew(folder: Path, names: Sequence[str], *, days: float | None = None, new_keys: bool = False) -> list[Path]:
    """Sign new certificates for the server and the clients named (all, if none is named); node keys stay.

    The private key stays too, so that one public file has to be copied; ``new_keys`` replaces it and revokes the
    former certificates, which is what to do when a key may have leaked.

    Returns:
        The files that have to be copied to their machines.
    """
    kits = Kits(folder)
    clients = kits.clients()
    alive = [c.name for c in clients.clients if not c.revoked]
    for name in names:
        if name != SERVER and clients.named(name).revoked:
            raise ConfigError(f"{name!r} was revoked: give it a new name with `fedkd provision add client`")
    changed = []
    for name in names or [SERVER, *alive]:
        changed += _renew_one(kits, name, days or kits.project.days, new_keys)
    return changed


def _renew_one(kits: Kits, name: str, days: float, new_keys: bool) -> list[Path]:
    folder, stem = kits.folder / name, SERVER if name == SERVER else "client"
    certificate, private = folder / f"{stem}.crt", folder / f"{stem}.key"
    address = kits.project.server
    hosts = [address.host, *address.extra_hosts] if name == SERVER else []
    usage = ca.SERVER if name == SERVER else ca.CLIENT
    if new_keys:
        kits.issued = [_revoked(e) if e.name == name else e for e in kits.issued]
        key = ca.new_key()
        write_atomic(private, ca.key_pem(key), mode=SECRET)
    else:
        try:
            key = _private_key(private.read_bytes())
        except (OSError, ValueError) as cause:
            raise ConfigError(f"cannot use {private} ({cause}): renew with --new-keys") from cause
    write_atomic(certificate, kits.issue(name, key, usage, hosts, days), mode=PUBLIC)
    return [certificate, private] if new_keys else [certificate]


def revoke(folder: Path, name: str) -> None:
    """Shut a client out for good: its certificates are revoked, and the server unregisters its node."""
    kits = Kits(folder)
    clients = kits.clients()
    clients.named(name)
    kits.issued = [_revoked(e) if e.name == name else e for e in kits.issued]
    kits.record()
    kits.write_clients(
        ClientList(
            clients=tuple(c.model_copy(update={"revoked": True}) if c.name == name else c for c in clients.clients)
        )
    )


def fill(value: Any, filled: Mapping[str, str]) -> Any:
    """Replace ``{id}``, ``{name}`` and ``{clients}`` in the texts of nested data; a text that becomes a number is one."""
    if isinstance(value, dict):
        return {k: fill(v, filled) for k, v in value.items()}
    if isinstance(value, list):
        return [fill(v, filled) for v in value]
    if not isinstance(value, str):
        return value
    text = value
    for key, replacement in filled.items():
        text = text.replace("{" + key + "}", replacement)
    return int(text) if text != value and text.isdecimal() else text


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("no elliptic-curve key")
    return key


def _revoked(entry: Issued) -> Issued:
    return Issued(entry.name, entry.serial, entry.not_after, revoked=True)


def _write_project(folder: Path, project: Project) -> None:
    write_model(folder / PROJECT, project, "What `fedkd provision` was asked for, and who was added since.")


def _make_folder(folder: Path) -> None:
    # `state` too is made here: systemd's ReadWritePaths refuses a unit whose folder is not there.
    folder.mkdir(mode=0o700)
    os.chmod(folder, 0o700)


def _template(name: str, values: Mapping[str, str]) -> bytes:
    text = resources.files("fedkd.deploy").joinpath("templates", name).read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text.encode()
