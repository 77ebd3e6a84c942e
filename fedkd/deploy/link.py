"""A device's line to SuperLink: Flower's fleet API over HTTP, as its SuperNode speaks it, without SuperNode's sleeps.

Written against flwr 1.41 (`flwr/supernode/fleet_http_connection.py`): the same calls, the same signed headers, the same
keys. What differs: the TLS context is the kit's (this project's authority alone, and a client certificate), the node's
number is kept on disk, so that a node that comes back within a minute goes on by a heartbeat instead of waiting until
the server takes it for dead, and whatever fails is reported to the caller in one sentence instead of ending the process.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import fedkd.deploy.switches  # noqa: F401  # first: Flower reads its switches when it is imported
from fedkd.deploy.mail import MailError
from fedkd.deploy.parcels import Arriving, take_apart
from fedkd.errors import FedkdError

import httpx  # isort: skip
from cryptography.hazmat.primitives.asymmetric import ec  # isort: skip
from flwr.app import Message  # isort: skip
from flwr.common.serde import message_from_proto  # isort: skip
from flwr.proto.fleet_pb2 import (  # isort: skip
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest  # isort: skip
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest  # isort: skip
from flwr.proto.node_pb2 import Node  # isort: skip
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor  # isort: skip
from flwr.supercore.primitives.asymmetric import public_key_to_bytes  # isort: skip
from flwr.supernode.fleet_http_client import FleetHttpClient  # isort: skip
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor  # isort: skip

T = TypeVar("T")

HEARTBEAT_SECONDS = 10.0
"""The least that SuperLink takes; after twice as long without one it counts the node as offline."""
PULL_TRIES, PULL_PAUSE_SECONDS = 50, 0.2
MOST_BYTES = 64 * 2**20
"""Longest body of one answer. Flower cuts messages into pieces of a few MiB; a longer one is nothing that was asked for."""

WORDS: Mapping[int, str] = {
    401: "the server does not know this node's key yet, or this device's clock is wrong",
    403: "the server refuses this client: it was revoked, or the run has ended",
    413: "the message is larger than the server lets through",
    429: "this client has sent its bytes for today",
    503: "the server's gate is up, SuperLink behind it is not",
    507: "the server's disk is full",
}


class LinkError(FedkdError):
    """The server cannot be reached, or does not do what it is asked. ``status``: HTTP's, 0 for none."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class _Bounded(httpx.SyncByteStream):
    """The body of an answer, up to :data:`MOST_BYTES`."""

    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self._stream:
            size += len(part)
            if size > MOST_BYTES:
                raise httpx.ReadError(f"an answer of more than {MOST_BYTES} bytes")
            yield part

    def close(self) -> None:
        self._stream.close()


def _bounded(response: httpx.Response) -> None:
    if "content-encoding" in response.headers:
        # The gate never packs: a few bytes could become gigabytes here.
        raise httpx.ReadError("a packed answer")
    assert isinstance(response.stream, httpx.SyncByteStream)
    response.stream = _Bounded(response.stream)


class Link:
    """See the module text. ``tls`` None speaks plain HTTP, for a tunnel on this machine."""

    def __init__(
        self, address: str, tls: ssl.SSLContext | None, key: ec.EllipticCurvePrivateKey, node: int | None = None
    ) -> None:
        self.address, self._key = address, key
        self._client = FleetHttpClient(
            f"{'http' if tls is None else 'https'}://{address}",
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
            verify=tls if tls is not None else False,
            timeout=60.0,
        )
        # Flower's client goes wherever a server redirects it, and reads as much as comes: a device does neither.
        line = self._client._client
        line.follow_redirects = False
        line.event_hooks = {"response": [_bounded]}
        self.node = node
        self.pulled = 0
        """Bytes that came in the last :meth:`pull`, also where it raised."""
        self.online = False
        self.idle = False
        """Whether :meth:`pull` waits for the server to have something for this node."""
        self._stop = threading.Event()
        self._pulse: threading.Thread | None = None

    # ---- being there ------------------------------------------------------------------------------------------------
    def connect(self) -> int:
        """Become online and stay so by heartbeats; returns the node's number.

        Raises:
            LinkError: not now; try again later.
        """
        if self.node is None or not self._beat():
            request = ActivateNodeRequest(
                public_key=public_key_to_bytes(self._key.public_key()), heartbeat_interval=HEARTBEAT_SECONDS
            )
            self.node = int(self._call(lambda: self._client.ActivateNode(request)).node_id)
        self.online = True
        if self._pulse is None:
            self._pulse = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
            self._pulse.start()
        return self.node

    def _beat(self) -> bool:
        assert self.node is not None
        request = SendNodeHeartbeatRequest(node=Node(node_id=self.node), heartbeat_interval=HEARTBEAT_SECONDS)
        try:
            return bool(self._call(lambda: self._client.SendNodeHeartbeat(request)).success)
        except LinkError as cause:
            if cause.status in (400, 401, 404):
                return False
            raise

    def _beat_on(self) -> None:
        while not self._stop.wait(0.7 * HEARTBEAT_SECONDS):
            try:
                self.online = self._beat()
            except LinkError:
                self.online = False

    def close(self) -> None:
        """Say goodbye, if anybody listens."""
        self._stop.set()
        if self.node is not None and self.online:
            node = self.node
            with contextlib.suppress(LinkError):
                self._call(lambda: self._client.DeactivateNode(DeactivateNodeRequest(node_id=node)))
        self._client.close()

    # ---- messages ---------------------------------------------------------------------------------------------------
    def pull(self, most_bytes: int) -> tuple[Message, int] | None:
        """Return the next message for this node and its bytes, or None.

        Raises:
            LinkError: not now. MailError: what came is none, or too large; it is not asked for again.
        """
        assert self.node is not None
        node = Node(node_id=self.node)
        self.pulled = 0
        self.idle = True
        try:
            listed = self._call(lambda: self._client.PullMessages(PullMessagesRequest(node=node)))
        finally:
            self.idle = False
        if not listed.messages_list:
            return None
        outline = message_from_proto(listed.messages_list[0])
        run, name = outline.metadata.run_id, outline.metadata.message_id
        arriving = Arriving.begin(listed.messages_list[0], listed.message_object_trees[0], most_bytes)
        self.pulled = arriving.size
        for item in list(arriving.left):
            for _ in range(PULL_TRIES):
                request = PullObjectRequest(node=node, run_id=run, object_id=item)
                found = self._call(lambda request=request: self._client.PullObject(request))  # type: ignore[misc]
                if not found.object_found:
                    raise MailError("gone", "the server took the message back")
                if found.object_available:
                    break
                self._stop.wait(PULL_PAUSE_SECONDS)
            else:
                raise MailError("gone", "the server did not finish its message")
            self.pulled += len(found.object_content)
            arriving.take(item, found.object_content)
        message = arriving.finish()
        message.metadata.__dict__["_message_id"] = name
        confirm = ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=name)
        self._call(lambda: self._client.ConfirmMessageReceived(confirm))
        return message, arriving.size

    def push(self, reply: Message) -> tuple[bool, int]:
        """Send a reply; returns whether the server still wanted it, and the bytes sent.

        Raises:
            LinkError: not now; send it again.
        """
        assert self.node is not None
        node, run = Node(node_id=self.node), reply.metadata.run_id
        outline, tree, objects = take_apart(reply)
        request = PushMessagesRequest(
            node=node, messages_list=[outline], message_object_trees=[tree], clientapp_runtime_list=[0.0]
        )
        told = self._call(lambda: self._client.PushMessages(request))
        wanted, sent = list(told.objects_to_push), 0
        for name in wanted:
            item = PushObjectRequest(
                node=node, run_id=run, object_id=name, object_content=objects[name], session_id=told.session_id
            )
            self._call(lambda item=item: self._client.PushObject(item))  # type: ignore[misc]
            sent += len(objects[name])
        return bool(wanted), sent

    def _call(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except httpx.HTTPStatusError as cause:
            status = cause.response.status_code
            words = WORDS.get(status, " ".join(cause.response.text.split())[:200])
            raise LinkError(f"{self.address} answered {status}: {words}", status) from cause
        except httpx.HTTPError as cause:
            raise LinkError(f"{self.address} cannot be reached: {_reason(cause)}") from cause
        except (ValueError, ssl.SSLError) as cause:
            raise LinkError(f"{self.address} answered something else than Flower does: {cause}") from cause


def _reason(cause: Exception) -> str:
    words = " ".join(str(cause).split())
    if "CERTIFICATE_VERIFY_FAILED" in words or "certificate" in words.lower():
        return f"its certificate is not accepted, or it does not accept ours ({words}); see `fedkd doctor`"
    return words or type(cause).__name__


def reply_to(message: Message, content: Any) -> Message:
    """Return a reply."""
    return Message(content, reply_to=message)
