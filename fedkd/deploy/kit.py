"""A kit: the folder that one participant of a real federation gets. See docs/deploy.md for its files.

Reading a kit imports neither torch nor flwr, so that a device that only labels, the supervisor and the doctor stay small.
"""

from __future__ import annotations

import difflib
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from fedkd.errors import ConfigError
from fedkd.storage import write_atomic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
RESERVED = ("ca", "server")
CA_CERTIFICATE, REVOKED = "ca.crt", "crl.pem"
STATE = "state"
LOOPBACK = "127.0.0.1"


class Section(BaseModel):
    """Base of everything that is read from a kit: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


M = TypeVar("M", bound=BaseModel)


def read_model(model: type[M], path: Path) -> M:
    """Read one YAML file as ``model``.

    Raises:
        ConfigError: the file is missing, no YAML, or does not fit; one line per fault, with the key and its value.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise ConfigError(f"cannot read {path}: {cause.strerror or cause}") from cause
    except (yaml.YAMLError, UnicodeDecodeError) as cause:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(cause).split())}") from cause
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got a {type(raw).__name__}")
    return read_mapping(model, raw, str(path))


def read_mapping(model: type[M], raw: Mapping[str, Any], where: str) -> M:
    """Build ``model`` from plain data; ``where`` is named in errors.

    Raises:
        ConfigError: one line per fault, with the key and its value.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as cause:
        raise ConfigError("\n".join(f"{where}: {_explain(model, error)}" for error in cause.errors())) from cause


def _explain(model: type[BaseModel], error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), list(model.model_fields), n=1, cutoff=0.5)
        return f"unknown key {where!r}." + (f" Did you mean {near[0]!r}?" if near else "")
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] in ("missing", "value_error"):
        return f"{where}: {message}" if where else message
    return f"{where}: {message}, got {error['input']!r}"


def write_model(path: Path, value: BaseModel, heading: str) -> None:
    """Write ``value`` as YAML below a comment."""
    comment = "".join(f"# {line}\n" for line in heading.splitlines())
    write_atomic(path, (comment + yaml.safe_dump(value.model_dump(mode="json"), sort_keys=False)).encode())


# ---- who takes part -------------------------------------------------------------------------------------------------
class Client(Section):
    """A participant as the server knows it."""

    name: str = Field(pattern=NAME)
    id: int = Field(ge=0, description="The participant's number; the simulator calls the same device by it.")
    node_key: str = Field(description="Public node key in OpenSSH form.")
    revoked: bool = False

    @field_validator("name")
    @classmethod
    def _free(cls, value: str) -> str:
        return free_name(value)

    @property
    def node_key_pem(self) -> bytes:
        """The public node key as Flower sends and stores it: PEM, SubjectPublicKeyInfo."""
        from cryptography.hazmat.primitives import serialization

        key = serialization.load_ssh_public_key(self.node_key.encode())
        return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def free_name(value: str) -> str:
    """Return ``value`` unless it names something else in the folder of kits."""
    if value in RESERVED:
        raise ConfigError(f"a client cannot be called {value!r}: the folder of kits has one of that name already")
    return value


class ClientList(Section):
    """Everybody who ever took part; ids and names are never used twice."""

    clients: tuple[Client, ...] = ()

    @model_validator(mode="after")
    def _unique(self) -> Self:
        for what in ("name", "id", "node_key"):
            values = [getattr(c, what) for c in self.clients]
            twice = sorted({str(v)[:40] for v in values if values.count(v) > 1})
            if twice:
                raise ConfigError(f"two clients share the {what} {twice[0]!r}")
        return self

    def named(self, name: str) -> Client:
        """Return the client of that name.

        Raises:
            ConfigError: there is none.
        """
        for client in self.clients:
            if client.name == name:
                return client
        near = difflib.get_close_matches(name, [c.name for c in self.clients], n=1)
        raise ConfigError(f"there is no client {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


# ---- kits -----------------------------------------------------------------------------------------------------------
class Kit(Section):
    """What server and client kits share."""

    FILE: ClassVar[str]
    project: str = Field(pattern=r"^[\w.-]{1,64}$")
    _folder: Path = PrivateAttr(default=Path("."))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the kit that lies in ``folder``.

        Raises:
            ConfigError: it is no such kit, or a setting does not fit.
        """
        path = folder / cls.FILE
        if folder.is_dir() and not path.is_file():
            other = {ServerKit.FILE: "a server's", ClientKit.FILE: "a client's"}
            kind = next((f"; it is {k} kit" for f, k in other.items() if (folder / f).is_file()), "")
            raise ConfigError(f"{folder} holds no {cls.FILE}{kind}. Kits are made by `fedkd provision project.yaml`")
        kit = read_model(cls, path)
        kit._folder = folder.resolve()
        return kit

    @property
    def folder(self) -> Path:
        """The kit's folder, absolute."""
        return self._folder

    def path(self, name: str) -> Path:
        """Return the path of one of the kit's files."""
        return self._folder / name

    @property
    def state(self) -> Path:
        """The folder for what changes while the participant works: 0700, made if need be."""
        folder = self._folder / STATE
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def _trust(self, purpose: ssl._SSLMethod) -> ssl.SSLContext:
        context = ssl.SSLContext(purpose)
        # Both ends are ours, so that nothing older is ever needed.
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        path = self.path(CA_CERTIFICATE)
        try:
            context.load_verify_locations(path)
        except (OSError, ssl.SSLError) as cause:
            raise ConfigError(f"cannot use the certificate authority {path}: {cause}") from cause
        return context


def _load_pair(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as cause:
        raise ConfigError(f"cannot use {certificate} with {key}: {cause}") from cause


class Limits(Section):
    """What the gate lets through."""

    message_mib: int = Field(64, ge=1, le=2047, description="Largest body of one request, MiB.")
    client_mib_per_day: int = Field(8192, ge=1, description="Bytes that one client may send in a UTC day, MiB.")
    connections: int = Field(256, ge=1, description="Connections of all clients together.")
    connections_per_client: int = Field(8, ge=1)
    handshakes: int = Field(64, ge=1, description="Connections that have not shown a certificate yet.")
    header_seconds: float = Field(10.0, gt=0, description="Time for the handshake, and for a request's header.")
    body_seconds: float = Field(300.0, gt=0, description="Time for a request's body, and for the answer to it.")
    idle_seconds: float = Field(120.0, gt=0, description="A connection without a request is closed after this.")
    min_free_mib: int = Field(512, ge=0, description="Uploads are refused while the disk has less room than this.")


class ServerKit(Kit):
    """``server.yaml``: where the server listens. Devices reach ``host:port`` and nothing else."""

    FILE: ClassVar[str] = "server.yaml"
    host: str = Field(min_length=1, description="Name or address by which devices reach the server.")
    port: int = Field(8443, ge=1, le=65535, description="The gate's port, the only one that devices reach.")
    listen: str = Field("0.0.0.0", description="Address that the gate listens on; '::' takes IPv6 and IPv4.")
    control_port: int = Field(8000, ge=1, le=65535, description="SuperLink, on 127.0.0.1 only.")
    ops_port: int = Field(9464, ge=1, le=65535, description="Health and metrics, on 127.0.0.1 only.")
    gate: Literal["builtin", "external"] = Field(
        "builtin", description="external: nginx or another proxy does the gate's work, by the kit's nginx.conf."
    )
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _ports(self) -> Self:
        if len({self.port, self.control_port, self.ops_port}) < 3:
            raise ConfigError("port, control_port and ops_port need to differ from each other")
        return self

    @property
    def runs(self) -> Path:
        """Where the runs of this server lie."""
        return self.state / "runs"

    @property
    def control_address(self) -> str:
        """Where SuperLink answers, for this machine alone."""
        return f"{LOOPBACK}:{self.control_port}"

    def client_list(self) -> ClientList:
        """Read who takes part."""
        return read_model(ClientList, self.path("clients.yaml"))

    def gate_tls(self) -> ssl.SSLContext:
        """Return what the gate speaks: a certificate of this project's authority is asked of every peer."""
        context = self._trust(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        # A resumed session would not show its certificate again.
        context.num_tickets = 0
        _load_pair(context, self.path("server.crt"), self.path("server.key"))
        return context

    def loopback_tls(self) -> ssl.SSLContext:
        """Return what this machine speaks to its own SuperLink."""
        return self._trust(ssl.PROTOCOL_TLS_CLIENT)


class Server(Section):
    """Where a client finds the server."""

    host: str = Field(min_length=1)
    port: int = Field(8443, ge=1, le=65535)


class Poll(Section):
    """How often a client asks for work: the pause grows from the least to the most while there is none."""

    min_seconds: float = Field(0.2, gt=0)
    max_seconds: float = Field(5.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_seconds > self.max_seconds:
            raise ConfigError("min_seconds is above max_seconds")
        return self


class ClientKit(Kit):
    """``client.yaml``: who this client is and where its server is."""

    FILE: ClassVar[str] = "client.yaml"
    name: str = Field(pattern=NAME)
    id: int = Field(ge=0)
    server: Server
    poll: Poll = Poll()
    ops_port: int | None = Field(None, ge=1, le=65535, description="Health and metrics on 127.0.0.1; null: off.")

    @property
    def server_address(self) -> str:
        """``host:port`` of the gate, an IPv6 address in brackets."""
        host = f"[{self.server.host}]" if ":" in self.server.host else self.server.host
        return f"{host}:{self.server.port}"

    def tls(self) -> ssl.SSLContext:
        """Return what this client speaks: it trusts this project's authority alone and shows its own certificate."""
        context = self._trust(ssl.PROTOCOL_TLS_CLIENT)
        _load_pair(context, self.path("client.crt"), self.path("client.key"))
        return context

    def node_key(self) -> ec.EllipticCurvePrivateKey:
        """Read the key by which Flower knows this node.

        Raises:
            ConfigError: the file is missing or holds no elliptic-curve key.
        """
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        path = self.path("node.key")
        try:
            key = serialization.load_ssh_private_key(path.read_bytes(), None)
        except OSError as cause:
            raise ConfigError(f"cannot read {path}: {cause.strerror or cause}") from cause
        except (ValueError, UnsupportedAlgorithm) as cause:
            raise ConfigError(f"{path} is no private key in OpenSSH form: {cause}") from cause
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{path}: expected an elliptic-curve key, as Flower takes no other")
        return key
