"""What server and device say to each other on a real network, as Flower records.

A message holds one short JSON text and named bodies of raw bytes; it names a method and its parameters, and brings no
code, no path and no pickle. A device signs what it says with its node key: Flower knows which node is connected, but
would take a reply in another node's name from it.

Down::

    ask    run, client, round, holds, experiment   + body ``request``, and ``proxy`` if the device asked for it
    probe  run, client, round, key                 is the request of this key known, under way or answered?

Up::

    answer   + body ``answer``     refused (reason, message)     needs (the device lacks the proxy set)
    known, unknown                 the answers to a probe

``key`` is the SHA-256 of what was asked, so that a request that comes twice is answered once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import fedkd.deploy.switches  # noqa: F401  # first: Flower reads its switches when it is imported
from fedkd.errors import FedkdError

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict  # isort: skip

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

VERSION = 1
MESSAGE_TYPE = "train.respond"
SECTION, BODIES, TEXT, SIGNATURE = "fedkd", "fedkd-bodies", "text", "signature"
BODY = "body."
"""Before the name of a short body that travels beside the text."""
SHORT_BYTES = 128 * 1024
"""Flower asks for every object of a message in a request of its own, and an array is three: a short body is none."""
MAX_TEXT_BYTES = 256 * 1024
MAX_BODIES = 4
MAX_WORDS = 500
REASON = re.compile(r"[a-z_]{0,32}")


class MailError(FedkdError):
    """A message of another form than this module writes. ``reason`` is a short code for quarantine records."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request to one device. ``holds``: as in :class:`fedkd.messages.Request`."""

    kind: Literal["ask", "probe"] = "ask"
    run: str
    client: int
    round: int
    key: str
    holds: int = -1
    experiment: Mapping[str, Any] = field(default_factory=dict)
    request: bytes = b""
    proxy: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Say:
    """What one device says to a request."""

    kind: Literal["answer", "refused", "needs", "known", "unknown"]
    run: str
    client: int
    round: int
    key: str
    reason: str = ""
    message: str = ""
    answer: bytes | None = None


def key_of(run: str, client: int, round: int, holds: int, experiment: Mapping[str, Any], request: bytes) -> str:
    """Return the name of a request: equal for equal requests, whoever sends them and whenever."""
    head = json.dumps([run, client, round, holds, experiment], sort_keys=True).encode()
    return hashlib.sha256(hashlib.sha256(head).digest() + hashlib.sha256(request).digest()).hexdigest()


def pack_ask(ask: Ask) -> RecordDict:
    """Return a request as a Flower record."""
    text = {
        "version": VERSION,
        "kind": ask.kind,
        "run": ask.run,
        "client": ask.client,
        "round": ask.round,
        "key": ask.key,
        "holds": ask.holds,
        "experiment": dict(ask.experiment),
    }
    bodies = {"request": ask.request} if ask.kind == "ask" else {}
    if ask.proxy is not None:
        bodies["proxy"] = ask.proxy
    return _record(json.dumps(text), bodies)


def unpack_ask(content: RecordDict) -> Ask:
    """Undo :func:`pack_ask`.

    Raises:
        MailError: the record has another form, or the key is not that of what it holds.
    """
    text, bodies, _ = _open(content)
    try:
        kind = text["kind"]
        if text["version"] != VERSION or kind not in ("ask", "probe"):
            raise MailError(
                "form", f"a message of version {text['version']!r}, kind {kind!r}: run one release of fedkd"
            )
        ask = Ask(
            kind=kind,
            run=_word(text["run"]),
            client=_whole(text["client"]),
            round=_whole(text["round"]),
            key=_word(text["key"]),
            holds=_whole(text["holds"]),
            experiment=_mapping(text["experiment"]),
            request=bodies["request"] if kind == "ask" else b"",
            proxy=bodies.get("proxy"),
        )
    except (KeyError, TypeError, ValueError) as cause:
        raise MailError("form", f"a request of unknown form came from the server ({cause!r})") from cause
    if kind == "ask" and ask.key != key_of(ask.run, ask.client, ask.round, ask.holds, ask.experiment, ask.request):
        raise MailError("form", "a request whose key is not that of its content")
    return ask


def pack_say(say: Say, key: ec.EllipticCurvePrivateKey) -> RecordDict:
    """Return what a device says as a Flower record, signed."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    text = json.dumps(
        {
            "version": VERSION,
            "kind": say.kind,
            "run": say.run,
            "client": say.client,
            "round": say.round,
            "key": say.key,
            "reason": say.reason,
            "message": " ".join("".join(c if c.isprintable() else " " for c in say.message).split())[:MAX_WORDS],
        }
    )
    signature = key.sign(_signed(text, say.answer), ec.ECDSA(hashes.SHA256()))
    return _record(text, {} if say.answer is None else {"answer": say.answer}, signature)


def unpack_say(content: RecordDict, key: ec.EllipticCurvePublicKey) -> Say:
    """Undo :func:`pack_say`.

    Raises:
        MailError: ``identity`` if it is not signed by ``key``, ``form`` if the record has another form.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    text, bodies, signature = _open(content)
    answer = bodies.get("answer")
    try:
        key.verify(signature, _signed(str(content.config_records[SECTION][TEXT]), answer), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as cause:
        raise MailError(
            "identity", "the reply is not signed by the key of the client that was asked: another node speaks for it"
        ) from cause
    try:
        kind = text["kind"]
        if text["version"] != VERSION or kind not in ("answer", "refused", "needs", "known", "unknown"):
            raise MailError("form", f"a reply of version {text['version']!r}, kind {kind!r}: run one release of fedkd")
        if (kind == "answer") != (answer is not None):
            raise MailError("form", f"a reply of kind {kind!r} {'with' if answer is not None else 'without'} a body")
        return Say(
            kind=kind,
            run=_word(text["run"]),
            client=_whole(text["client"]),
            round=_whole(text["round"]),
            key=_word(text["key"]),
            reason=_code(text["reason"]),
            message=_word(text["message"]),
            answer=answer,
        )
    except (KeyError, TypeError, ValueError) as cause:
        raise MailError("form", f"a reply of unknown form ({cause!r})") from cause


def _signed(text: str, answer: bytes | None) -> bytes:
    body = b"-" if answer is None else hashlib.sha256(answer).digest()
    return b"fedkd reply\0" + hashlib.sha256(text.encode()).digest() + body


def _record(text: str, bodies: Mapping[str, bytes], signature: bytes = b"") -> RecordDict:
    words: dict[str, Any] = {TEXT: text, SIGNATURE: signature}
    words |= {BODY + name: body for name, body in bodies.items() if len(body) <= SHORT_BYTES}
    # One array of uint8 per long body: Flower cuts arrays into pieces of a few MiB, so that no request grows beyond them,
    # and keeps one that goes to many devices once.
    long = {
        name: Array("uint8", (len(body),), SECTION, body) for name, body in bodies.items() if BODY + name not in words
    }
    return RecordDict({SECTION: ConfigRecord(words)} | ({BODIES: ArrayRecord(long)} if long else {}))


def _open(content: RecordDict) -> tuple[dict[str, Any], dict[str, bytes], bytes]:
    try:
        record = content.config_records[SECTION]
        raw, signature = record[TEXT], record[SIGNATURE]
        arrays = content.array_records[BODIES] if BODIES in content else {}
        short = {str(name).removeprefix(BODY): body for name, body in record.items() if str(name).startswith(BODY)}
        if not isinstance(raw, str) or not isinstance(signature, bytes) or len(raw) > MAX_TEXT_BYTES:
            raise ValueError("its text is none, or too long")
        raw.encode()  # half a surrogate is no text
        if len(arrays) + len(short) > MAX_BODIES or any(str(name) in short for name in arrays):
            raise ValueError(f"it has {len(arrays) + len(short)} bodies, or one of them twice")
        # Only the bytes are taken: what an array says of its type and shape is the sender's word.
        bodies = {str(name): bytes(array.data) for name, array in arrays.items()}
        for name, body in short.items():
            if not isinstance(body, bytes):
                raise ValueError("a body is no bytes")
            bodies[name] = body
        text = json.loads(raw)
        if not isinstance(text, dict):
            raise ValueError("its text is no mapping")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as cause:
        raise MailError("form", f"a message of unknown form ({cause})") from cause
    return text, bodies, signature


def _word(value: Any) -> str:
    # What is printable cannot steer the operator's terminal, nor break a line of a log.
    if not isinstance(value, str) or len(value) > MAX_WORDS or not value.isprintable():
        raise ValueError("expected a short text")
    return value


def _code(value: Any) -> str:
    # It becomes a label of a metric.
    if not isinstance(value, str) or not REASON.fullmatch(value):
        raise ValueError("expected a reason code")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or not -1 <= value < 2**62:
        raise ValueError("expected a number")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("expected a mapping")
    return value
