"""Who may speak at the gate, and how much they have sent today."""

from __future__ import annotations

import base64
import json
import logging
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509

from fedkd.deploy.kit import REVOKED, ServerKit
from fedkd.deploy.log import event
from fedkd.errors import FedkdError
from fedkd.storage import write_json

MIB = 2**20


@dataclass(frozen=True)
class Peer:
    """A device by the certificate that it showed; the TLS layer has checked chain, dates and usage."""

    name: str
    project: str
    serial: int
    ends: float

    @classmethod
    def of(cls, certificate: Mapping[str, Any]) -> Peer:
        """Read what :meth:`ssl.SSLObject.getpeercert` returns.

        Raises:
            ValueError: it does not name exactly one common name and one organisation.
        """
        named: dict[str, list[str]] = {}
        for part in certificate.get("subject", ()):
            for key, value in part:
                named.setdefault(key, []).append(value)
        if len(named.get("commonName", ())) != 1 or len(named.get("organizationName", ())) != 1:
            raise ValueError("the certificate does not name one client of one project")
        return cls(
            named["commonName"][0],
            named["organizationName"][0],
            int(certificate["serialNumber"], 16),
            ssl.cert_time_to_seconds(certificate["notAfter"]),
        )


class Members:
    """clients.yaml and crl.pem, read again whenever they change; a broken file leaves what was read before."""

    def __init__(self, kit: ServerKit, log: logging.Logger) -> None:
        self._kit, self._log = kit, log
        self._seen: tuple[int, ...] = ()
        self._keys: dict[str, str] = {}
        self._serials: frozenset[int] = frozenset()
        self._read()

    def _stamps(self) -> tuple[int, ...]:
        return tuple(self._kit.path(n).stat().st_mtime_ns for n in ("clients.yaml", REVOKED))

    def _read(self) -> None:
        self._seen = self._stamps()
        clients = self._kit.client_list().clients
        self._keys = {c.name: base64.b64encode(c.node_key_pem).decode() for c in clients if not c.revoked}
        revoked = x509.load_pem_x509_crl(self._kit.path(REVOKED).read_bytes())
        authority = x509.load_pem_x509_certificate(self._kit.path("ca.crt").read_bytes())
        if not revoked.is_signature_valid(authority.public_key()):  # type: ignore[arg-type]
            raise ValueError(f"{REVOKED} was not signed by this project's authority")
        self._serials = frozenset(entry.serial_number for entry in revoked)

    def refresh(self) -> bool:
        """Read the files again if they changed; returns whether they did."""
        try:
            if self._stamps() == self._seen:
                return False
            self._read()
        except (OSError, ValueError, FedkdError) as cause:
            event(self._log, "clients.unreadable", level=logging.ERROR, reason=str(cause))
            return False
        event(self._log, "clients.read", clients=len(self._keys), revoked_certificates=len(self._serials))
        return True

    @property
    def names(self) -> tuple[str, ...]:
        """Everybody who may speak."""
        return tuple(self._keys)

    def refusal(self, peer: Peer) -> str | None:
        """Return why a peer may not speak (now), None if it may."""
        if peer.project != self._kit.project or peer.name not in self._keys:
            return "not_a_client"
        if peer.serial in self._serials:
            return "revoked"
        if peer.ends <= time.time():
            return "expired"
        return None

    def node_key(self, peer: Peer) -> str:
        """Return the header by which Flower's node authentication names this client: base64 of PEM."""
        return self._keys[peer.name]


class Usage:
    """Bytes that each client sent in this UTC day, kept on disk so that a restart does not hand out a new day."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.path, self.limit_bytes = path, limit_bytes
        self._day, self._sent, self._written = self._today(), dict[str, int](), dict[str, int]()
        try:
            found = json.loads(path.read_text())
            if found["day"] == self._day:
                self._sent = {str(k): int(v) for k, v in found["bytes"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        self._written = dict(self._sent)

    @staticmethod
    def _today() -> str:
        return datetime.now(UTC).date().isoformat()

    def _turn(self) -> None:
        today = self._today()
        if today != self._day:
            self._day, self._sent = today, {}

    def sent(self, name: str) -> int:
        """Bytes of a client's bodies today."""
        self._turn()
        return self._sent.get(name, 0)

    def room(self, name: str) -> int:
        """Bytes that a client may still send today."""
        return max(0, self.limit_bytes - self.sent(name))

    def add(self, name: str, size: int) -> None:
        """Count ``size`` bytes."""
        self._turn()
        self._sent[name] = self._sent.get(name, 0) + size

    @staticmethod
    def seconds_left() -> int:
        """Seconds until the next UTC day."""
        now = datetime.now(UTC)
        midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
        return int((midnight - now).total_seconds()) + 1

    def save(self) -> None:
        """Write the counts if they changed."""
        if self._sent != self._written:
            write_json(self.path, {"day": self._day, "bytes": self._sent})
            self._written = dict(self._sent)
