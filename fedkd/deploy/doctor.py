"""Preflight: what would go wrong with a kit on this machine, and how to mend it. Nothing is changed."""

from __future__ import annotations

import http.client
import os
import platform
import shutil
import socket
import ssl
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedkd.deploy import ca
from fedkd.deploy.kit import CA_CERTIFICATE, REVOKED, STATE, ClientKit, Kit, ServerKit
from fedkd.errors import ConfigError, FedkdError

MIB = 2**20
RENEW_SOON = timedelta(days=14)
CLOCK_SECONDS = 60.0
"""Flower refuses signatures that are 5 s in the future or 305 s old; a clock that is a minute off drifts on."""
FREE_MIB = {"server": 2048, "client": 1024}
TRAINING_MIB, LABELLING_MIB, SERVER_MIB = 750, 150, 1024
NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME: to read a server's clock when ours may be wrong."""

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One check: how it went, what was seen, and what to do about it."""

    check: str
    level: Level
    said: str
    fix: str = ""


def diagnose(folder: Path) -> list[Finding]:
    """Look at a server's or a client's kit, and at this machine; one finding at least per check."""
    try:
        kit: ServerKit | ClientKit
        kit = ServerKit.read(folder) if (folder / ServerKit.FILE).is_file() else ClientKit.read(folder)
    except FedkdError as cause:
        return [Finding("kit", "problem", str(cause), "mend the file, or copy the kit again from the operator")]
    around = _server(kit) if isinstance(kit, ClientKit) else _ports(kit)
    machine = chain(around, _disk(kit), _memory(kit))
    return [Finding("kit", "ok", f"{type(kit).__name__} of project {kit.project}"), *_lasting(kit), *machine]


def _lasting(kit: Kit) -> Iterator[Finding]:
    """Check what does not mend by itself: a server may come back, a disk may empty, but files stay as they are."""
    yield from _secrets(kit)
    yield from _certificates(kit)
    if isinstance(kit, ClientKit):
        yield from _node_key(kit)
        yield from _data(kit)
        yield from _policy(kit)
    elif isinstance(kit, ServerKit):
        yield from _clients(kit)
    yield from _versions(kit)


def refuse(kit: Kit) -> None:
    """Refuse to start what could never work: problems of files, keys, certificates, records, policy and versions.

    Raises:
        ConfigError: each problem and its remedy, in the doctor's words.
    """
    # A clock that is behind after a power cut comes right by itself.
    found = [f for f in _lasting(kit) if f.level == "problem" and f.check != "clock"]
    if found:
        words = "; ".join(f"{f.check}: {f.said} | {f.fix}" for f in found)
        raise ConfigError(f"{kit.folder} cannot work ({words}). `fedkd doctor {kit.folder}` shows all of it")


# ---- files ----------------------------------------------------------------------------------------------------------
def _secrets(kit: Kit) -> Iterator[Finding]:
    names = (
        ("client.key", "node.key") if isinstance(kit, ClientKit) else ("server.key", "loopback.key", "superexec.secret")
    )
    bad = False
    for name in names:
        path = kit.path(name)
        if not path.is_file():
            bad = True
            yield Finding("secrets", "problem", f"{name} is missing", "copy the kit again from the operator")
        elif stat.S_IMODE(path.stat().st_mode) & 0o077:
            bad = True
            yield Finding("secrets", "problem", f"others on this machine may read {name}", f"chmod 600 {path}")
    state = kit.path(STATE)
    if state.is_dir() and stat.S_IMODE(state.stat().st_mode) & 0o077:
        bad = True
        yield Finding("secrets", "warning", "others on this machine may read state/", f"chmod 700 {state}")
    if not bad:
        yield Finding("secrets", "ok", "keys are there, and for their owner alone")


def _certificates(kit: Kit) -> Iterator[Finding]:
    authority = _certificate(kit.path(CA_CERTIFICATE))
    if isinstance(authority, Finding):
        yield authority
        return
    if isinstance(kit, ClientKit):
        pairs = [("client.crt", "client.key", kit.name)]
    else:
        pairs = [("server.crt", "server.key", "server"), ("loopback.crt", "loopback.key", "loopback")]
    for name, key_name, owner in pairs:
        leaf = _certificate(kit.path(name))
        if isinstance(leaf, Finding):
            yield leaf
            continue
        yield from _chain(leaf, authority, name)
        yield from _dates(leaf, name, owner)
        yield from _pair(leaf, kit.path(key_name))
        names = [str(a.value) for a in leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
        if names != [owner]:
            fix = "copy the kit again: files of two kits were mixed"
            yield Finding("certificate", "problem", f"{name} is for {', '.join(names)}, this kit is {owner}'s", fix)


def _certificate(path: Path) -> x509.Certificate | Finding:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as cause:
        said = f"cannot read {path.name}: {getattr(cause, 'strerror', None) or cause}"
        return Finding("certificate", "problem", said, "copy it again from the operator's kits")


def _chain(leaf: x509.Certificate, authority: x509.Certificate, name: str) -> Iterator[Finding]:
    try:
        leaf.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        said = f"{name} was not signed by the authority in {CA_CERTIFICATE}"
        yield Finding("chain", "problem", said, "copy both files from the same project's kits")
    else:
        yield Finding("chain", "ok", f"{name} was signed by this project's authority")


def _dates(leaf: x509.Certificate, name: str, owner: str) -> Iterator[Finding]:
    now = datetime.now(UTC)
    renew = f"on the operator's machine: fedkd provision renew {owner}, then copy {name}"
    if now < leaf.not_valid_before_utc:
        said = f"{name} is valid from {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; here it is {now:%Y-%m-%d %H:%M}"
        yield Finding("clock", "problem", said, "set this machine's clock (timedatectl set-ntp true)")
    elif now > leaf.not_valid_after_utc:
        yield Finding("dates", "problem", f"{name} ended on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC", renew)
    else:
        left = leaf.not_valid_after_utc - now
        level: Level = "warning" if left < RENEW_SOON else "ok"
        yield Finding("dates", level, f"{name} is valid for {left.days} more days", renew if level != "ok" else "")


def _pair(leaf: x509.Certificate, path: Path) -> Iterator[Finding]:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError:
        return  # said by the check of secrets
    except (ValueError, TypeError, UnsupportedAlgorithm):
        yield Finding("key", "problem", f"{path.name} is no private key", "copy the kit again from the operator")
        return
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not ca.key_matches(key, leaf):
        fix = "copy certificate and key together from the operator's kits"
        yield Finding("key", "problem", f"{path.name} does not belong to its certificate", fix)
    else:
        yield Finding("key", "ok", f"{path.name} belongs to its certificate")


def _node_key(kit: ClientKit) -> Iterator[Finding]:
    try:
        key = kit.node_key()
        public = serialization.load_ssh_public_key(kit.path("node.pub").read_bytes())
    except (OSError, ValueError, FedkdError, UnsupportedAlgorithm) as cause:
        yield Finding("node key", "problem", str(cause), "copy the kit again from the operator")
        return
    if key.public_key() != public:
        fix = "copy both files again: the server knows the node by node.pub"
        yield Finding("node key", "problem", "node.key and node.pub do not belong together", fix)
    else:
        yield Finding("node key", "ok", "node.key and node.pub belong together")


# ---- the server, seen from a client -----------------------------------------------------------------------------------
def _server(kit: ClientKit) -> Iterator[Finding]:
    """Reach the gate: name, port, TLS both ways, and the time that it says."""
    where, host, port = kit.server_address, kit.server.host, kit.server.port
    try:
        socket.create_connection((host, port), timeout=10).close()
    except socket.gaierror:
        yield Finding(
            "reach", "problem", f"the name {host} is not known here", "check server.host in client.yaml, and DNS"
        )
        return
    except OSError as cause:
        said = f"cannot connect to {where}: {cause.strerror or cause}"
        yield Finding("reach", "problem", said, "is the server running? does a firewall let this port through?")
        return
    try:
        context = kit.tls()
    except FedkdError as cause:
        yield Finding("reach", "problem", str(cause), "mend the certificate first")
        return
    yield from _clock(kit)
    try:
        status, _ = _ask(kit, context)
    except ssl.SSLCertVerificationError as cause:
        said = f"the server at {where} is not believed: {cause.verify_message}"
        fix = f"does {host} lead to your server? its certificate must name {host}: extra_hosts in project.yaml, then renew"
        yield Finding("reach", "problem", said, fix)
    except (ssl.SSLError, ConnectionError, http.client.HTTPException) as cause:
        said = f"the server at {where} refuses this client's certificate ({_reason(cause)})"
        yield Finding("reach", "problem", said, "renewed? revoked? ask the operator for `fedkd provision renew`")
    except OSError as cause:
        yield Finding("reach", "problem", f"{where} does not answer: {cause}", "look at `fedkd server status` there")
    else:
        if status == 405:
            yield Finding("reach", "ok", f"the gate at {where} takes this certificate")
        elif status == 403:
            said = "the server knows this client no more: it was revoked, or its list of clients is old"
            yield Finding("reach", "problem", said, "ask the operator: fedkd server status")
        else:
            yield Finding(
                "reach", "warning", f"{where} answers, but not as a gate does (HTTP {status})", "check the port"
            )


def _clock(kit: ClientKit) -> Iterator[Finding]:
    context = kit.tls()
    context.verify_flags |= NO_CHECK_TIME
    try:
        _, date = _ask(kit, context)
        if date is None:
            return
        seconds = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()
    except (OSError, ValueError, http.client.HTTPException):
        return  # what it is comes out when it is asked in earnest
    if abs(seconds) > CLOCK_SECONDS:
        way = "ahead of" if seconds > 0 else "behind"
        said = f"this clock is {abs(seconds):.0f} s {way} the server's; signatures would be refused"
        yield Finding("clock", "problem", said, "timedatectl set-ntp true, here or on the server")
    else:
        yield Finding("clock", "ok", f"this clock agrees with the server's to {abs(seconds):.0f} s")


def _ask(kit: ClientKit, context: ssl.SSLContext) -> tuple[int, str | None]:
    link = http.client.HTTPSConnection(kit.server.host, kit.server.port, timeout=10, context=context)
    try:
        link.request("GET", "/v1/fleet/")
        answer = link.getresponse()
        return answer.status, answer.getheader("date")
    finally:
        link.close()


def _reason(cause: BaseException) -> str:
    if isinstance(cause, ssl.SSLError) and cause.reason:
        return str(cause.reason).lower().replace("_", " ")
    return str(cause) or type(cause).__name__


# ---- the server's own -------------------------------------------------------------------------------------------------
def _clients(kit: ServerKit) -> Iterator[Finding]:
    try:
        clients = kit.client_list().clients
        for client in clients:
            _ = client.node_key_pem
        revoked = x509.load_pem_x509_crl(kit.path(REVOKED).read_bytes())
        authority = x509.load_pem_x509_certificate(kit.path(CA_CERTIFICATE).read_bytes())
        if not revoked.is_signature_valid(authority.public_key()):  # type: ignore[arg-type]
            raise ValueError(f"{REVOKED} was not signed by this project's authority")
    except (OSError, ValueError, FedkdError, UnsupportedAlgorithm) as cause:
        said = f"the list of clients cannot be used: {cause}"
        yield Finding("clients", "problem", said, f"copy clients.yaml and {REVOKED} again from the operator's kits")
        return
    count = sum(1 for client in clients if not client.revoked)
    if count:
        yield Finding("clients", "ok", f"{count} clients, {len(clients) - count} revoked")
    else:
        yield Finding("clients", "problem", "no client may take part", "fedkd provision add client NAME")


def _ports(kit: ServerKit) -> Iterator[Finding]:
    from fedkd.deploy.gate import listen
    from fedkd.deploy.kit import LOOPBACK
    from fedkd.deploy.server import pid_file, status

    if pid_file(kit).read() is not None:
        now = status(kit)
        if now["ready"]:
            yield Finding("server", "ok", "the server runs and is ready")
        else:
            fix = f"see {kit.state / 'logs'}"
            yield Finding("server", "problem", f"the server runs, but: {'; '.join(now['unready'])}", fix)
        return
    taken = False
    for name, host, port in (
        ("port", kit.listen, kit.port),
        ("control_port", LOOPBACK, kit.control_port),
        ("ops_port", LOOPBACK, kit.ops_port),
    ):
        try:
            listen(host, port).close()
        except FedkdError as cause:
            taken = True
            yield Finding("ports", "problem", str(cause), f"end what uses it, or change {name} in {ServerKit.FILE}")
    if not taken:
        yield Finding("ports", "ok", f"ports {kit.port}, {kit.control_port} and {kit.ops_port} are free")


# ---- the client's own -------------------------------------------------------------------------------------------------
def _data(kit: ClientKit) -> Iterator[Finding]:
    from fedkd.deploy.localdata import read_local_data

    try:
        yield Finding("data", "ok", read_local_data(kit.path("data.yaml")).check(kit.folder))
    except FedkdError as cause:
        yield Finding("data", "problem", str(cause), "say in data.yaml where the records are: docs/devices.md")
    except OSError as cause:
        said = f"cannot read {cause.filename or 'the records'}: {cause.strerror or cause}"
        yield Finding("data", "problem", said, "may the user who runs the client read them?")


def _labels_only(kit: ClientKit) -> bool:
    from fedkd.deploy.localdata import read_local_data

    try:
        return read_local_data(kit.path("data.yaml")).model is not None
    except FedkdError:
        return False  # said by the check of data


def _policy(kit: ClientKit) -> Iterator[Finding]:
    from fedkd.deploy.policy import read_policy

    try:
        read_policy(kit.path("policy.yaml"))
    except FedkdError as cause:
        yield Finding("policy", "problem", str(cause), "mend policy.yaml: docs/devices.md")
    else:
        yield Finding("policy", "ok", "policy.yaml is valid")


# ---- the machine ------------------------------------------------------------------------------------------------------
def _disk(kit: Kit) -> Iterator[Finding]:
    wanted = FREE_MIB["client" if isinstance(kit, ClientKit) else "server"]
    try:
        state = kit.state
        probe = state / f".doctor.{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as cause:
        said = f"cannot write to {kit.folder / 'state'}: {cause.strerror}"
        yield Finding(
            "disk", "problem", said, "give the folder to the user who runs this, on a disk that may be written"
        )
        return
    free = shutil.disk_usage(state).free // MIB
    if free < wanted:
        said = f"{free} MiB are free, {wanted} MiB are wanted for checkpoints and messages"
        yield Finding("disk", "problem", said, "make room, or move the kit to a larger disk")
    else:
        yield Finding("disk", "ok", f"{free / 1024:.1f} GiB are free")


def available_mib() -> int | None:
    """Memory that new processes may take, MiB; None where that cannot be told."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) // 1024
    except (OSError, ValueError):
        pass
    return None


def _memory(kit: Kit) -> Iterator[Finding]:
    if isinstance(kit, ServerKit):
        wanted = SERVER_MIB
    else:
        wanted = LABELLING_MIB if isinstance(kit, ClientKit) and _labels_only(kit) else TRAINING_MIB
    found = available_mib()
    if found is None:
        return
    if found < wanted:
        said = f"{found} MiB of memory are free, about {wanted} MiB are needed"
        yield Finding("memory", "problem", said, "end other programs, or add swap")
    else:
        yield Finding("memory", "ok", f"{found} MiB of memory are free")


def version(package: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


FLOWER = "1.41."


def _versions(kit: Kit) -> Iterator[Finding]:
    flower, torch = version("flwr"), version("torch")
    said = f"Python {platform.python_version()}, fedkd {version('fedkd')}, flwr {flower or '-'}, torch {torch or '-'}"
    bad = False
    if sys.maxsize < 2**32:
        bad = True
        yield Finding(
            "versions", "problem", "this is a 32-bit system", "install the 64-bit system: docs/raspberry-pi.md"
        )
    if flower is None or not flower.startswith(FLOWER):
        bad = True
        fix = f"pip install 'flwr>={FLOWER}0,<1.42'"
        yield Finding("versions", "problem", f"Flower {FLOWER}x is needed, {flower or 'none'} is installed", fix)
    if torch is None and not (isinstance(kit, ClientKit) and _labels_only(kit)):
        bad = True
        fix = "pip install --index-url https://download.pytorch.org/whl/cpu torch"
        yield Finding("versions", "problem", "torch is not installed, and this kit's part is to train", fix)
    if platform.machine() == "aarch64" and version("nvidia-cublas-cu12"):
        bad = True
        fix = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
        yield Finding("versions", "warning", "this torch brings gigabytes of CUDA along", fix)
    if not bad:
        yield Finding("versions", "ok", said)


def main() -> None:
    """Refuse the kit named on the command line, or end with 0: a process of its own, which takes its memory with it."""
    try:
        refuse(ClientKit.read(Path(sys.argv[1])))
    except FedkdError as cause:
        sys.exit(f"error: {cause}")


if __name__ == "__main__":
    main()
