"""The two messages of a round: a request down and a reply up, as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from fedkd.algorithms.base import Card
from fedkd.errors import FedkdError
from fedkd.payloads import Bundle, Contract, Envelope, Payload, PayloadError, ProxyIndices, ids_hash
from fedkd.privacy.mechanisms import Released
from fedkd.site import Site

SERVER = -1
HOLDS_BYTES = 4


@dataclass(frozen=True)
class Request:
    """What one device is asked in one round.

    ``holds``: the round of this device's last answer that the server has kept as a reference for delta coding, -1 for
    none; it travels as 4 bytes beside the body.
    """

    client: int
    round: int
    body: bytes
    holds: int = -1

    @property
    def bytes(self) -> int:
        """Bytes that travel down."""
        return len(self.body) + HOLDS_BYTES


@dataclass(frozen=True)
class Reply:
    """What one device answered: the message, or why there is none, in words and by a short code.

    ``losses`` is for the simulator's eyes alone. The reasons ``late`` (no answer before the deadline) and ``offline`` say
    that nothing came; every other reason is one of quarantine.
    """

    client: int
    round: int
    body: bytes | None
    error: str | None = None
    losses: tuple[tuple[str, float], ...] = ()
    reason: str = "device"


@dataclass(frozen=True)
class Heading:
    """A decoded request: knowledge, the proxy indices it belongs to, and those to answer."""

    round: int
    run: str
    knowledge: Payload
    teach: NDArray[np.int64]
    ask: NDArray[np.int64]
    message: Payload

    @cached_property
    def teach_ids(self) -> str:
        """Hash of the proxy indices that the knowledge belongs to; taken once for all devices that share the message."""
        return ids_hash(self.teach)

    @cached_property
    def ask_ids(self) -> str:
        """Hash of the proxy indices to answer."""
        return ids_hash(self.ask)


def write_request(
    site: Site,
    run: str,
    round: int,
    knowledge: Payload,
    teach: NDArray[np.int64],
    ask: NDArray[np.int64],
    reference: Payload | None,
) -> tuple[bytes, Payload]:
    """Return the message down and the bundle it carries."""
    parts: dict[str, Payload] = {"knowledge": knowledge}
    if site.proxy is not None:
        size = len(site.proxy)
        parts["teach"] = ProxyIndices(indices=_compact(teach, size))
        parts["ask"] = ProxyIndices(indices=_compact(ask, size))
    bundle = Bundle(parts=parts)
    envelope = Envelope(run=run, round=round, sender=SERVER, proxy=site.proxy_identity, ids=ids_hash(ask))
    return site.codec_down.encode(bundle, envelope, reference), bundle


def read_request(site: Site, card: Card, body: bytes, reference: Payload | None = None) -> Heading:
    """Decode and check a request.

    Raises:
        PayloadError: the message breaks its contract, or speaks of another proxy set.
    """
    whole, empty = site.contracts_down(card, _known_samples(site))
    payload, envelope = _decode(site, body, (whole, empty), reference)
    assert isinstance(payload, Bundle)
    if envelope.proxy != site.proxy_identity:
        raise PayloadError(
            "proxy", f"the server speaks of proxy set {envelope.proxy!r}, this device has {site.proxy_identity!r}"
        )
    size = len(site.proxy) if site.proxy is not None else 0
    teach = _expand(payload.parts.get("teach"), size)
    ask = _expand(payload.parts.get("ask"), size)
    if envelope.ids != ids_hash(ask):
        raise PayloadError("ids", "the proxy indices asked for do not match their hash")
    return Heading(envelope.round, envelope.run, site.widen(payload.parts["knowledge"]), teach, ask, payload)


def write_reply(site: Site, card: Card, heading: Heading, released: Released, reference: Payload | None) -> bytes:
    """Return the message up. The only way from an answer to bytes, and it takes nothing but a ``Released``.

    Raises:
        TypeError: anything else is handed in.
    """
    if type(released) is not Released:
        raise TypeError(f"only what a mechanism released may be sent, got a {type(released).__name__}")
    envelope = Envelope(
        run=heading.run,
        round=heading.round,
        sender=card.id,
        proxy=site.proxy_identity,
        ids=heading.ask_ids,
        examples=released.examples,
    )
    return site.codec_up.encode(released.payload, envelope, reference)


def _known_samples(site: Site) -> int:
    if site.proxy is None:
        return 0
    per_round = site.experiment.proxy_per_round
    return len(site.proxy) if per_round is None else per_round


def _decode(
    site: Site, body: bytes, contracts: tuple[Contract, ...], reference: Payload | None
) -> tuple[Payload, Envelope]:
    refused: FedkdError | None = None
    for contract in contracts:
        try:
            return site.codec_down.decode(body, contract, reference)
        except PayloadError as cause:
            if cause.reason not in ("fields", "kind"):
                raise
            refused = refused or cause
    assert refused is not None
    raise refused


def _compact(indices: NDArray[np.int64], size: int) -> torch.Tensor:
    """The whole set in order is said by an empty list: a fixed proxy set costs no index bytes. No sample: its size."""
    if len(indices) == size and bool((indices == np.arange(size)).all()):
        return torch.zeros(0, dtype=torch.int64)
    return torch.from_numpy(np.ascontiguousarray(indices)) if len(indices) else torch.tensor([size])


def _expand(part: Payload | None, size: int) -> NDArray[np.int64]:
    if not isinstance(part, ProxyIndices):
        return np.zeros(0, np.int64)
    if len(part.indices) > size:
        # Each index stands for an input in memory: a short message could ask for more of them than a device holds.
        raise PayloadError("size", f"{len(part.indices)} proxy indices, but the proxy set has {size} samples")
    found: NDArray[np.int64] = part.indices.numpy()
    if len(found) == 1 and found[0] == size:
        return np.zeros(0, np.int64)
    if len(found) and found.max() >= size:
        raise PayloadError("label", f"proxy index {int(found.max())}, but the set has {size} samples")
    return np.arange(size, dtype=np.int64) if len(found) == 0 else found
