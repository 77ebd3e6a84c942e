"""A sum that only comes out whole: pairwise masks, a mask of one's own, and shares for those who drop out.

K. Bonawitz, V. Ivanov, B. Kreuter, A. Marcedone, H. B. McMahan, S. Patel, D. Ramage, A. Segal, K. Seth, "Practical Secure
Aggregation for Privacy-Preserving Machine Learning", CCS 2017, https://eprint.iacr.org/2017/281 (figure 4, without the
signatures of its steps 1 and 3, which need a public-key infrastructure).

A device u holds a vector x_u modulo 2^bits, two key pairs and a random seed b_u, and sends

    y_u = x_u + G(b_u) + sum over v > u of G(s_uv) - sum over v < u of G(s_uv)

where s_uv is agreed between u and v. Devices hold Shamir shares of each other's b and mask key. At the end the server gets,
for every device whose y it has, shares of b, and for every device that dropped out after the shares were dealt, shares of
its mask key: never both of one device. A device that answers too late is thereby still hidden behind G(b).

Steps, each one message down and one up; whoever is silent in a step is out of the next ones:

1. *keys*: the server opens a session; devices send two public keys.
2. *deal*: the server sends the roster; devices send encrypted shares for each other.
3. *relay*: the server passes the shares on; devices acknowledge.
4. *masked*: the ordinary request of the round; devices train, and send y.
5. *unmask*: the server names the devices whose y it has; those devices send shares.

Guarantee: an honest-but-curious server, and any set of fewer than t devices with it, learns the sum over the devices of
step 5 and nothing else of the others' vectors, under the security of X25519, HKDF, AES-CTR and ChaCha20-Poly1305. A device
answers each step of a session once, and refuses a roster or a list of survivors below the minimum cohort. It gives one vector
for a round of a run, however often a session is opened for it, as long as its store lives (``Store.save_summed``; a
:class:`fedkd.store.MemoryStore` ends with the process): a server that lost the sum to a crash goes without that round.
With t above half of the roster, a server that names different survivors to different devices gets no device's two secrets.
Not covered: a server that makes up devices of its own (that needs keys which the devices can check: give every device a
certificate and pin the cohort), and what the sum itself tells (that needs noise, see ``noise``).
"""

from __future__ import annotations

import json
import secrets
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from numpy.typing import NDArray

from fedkd.codecs.base import Stream
from fedkd.codecs.bits import pack, unpack
from fedkd.privacy.secure import shamir
from fedkd.privacy.secure.heads import (
    DEAL,
    HEAD,
    KEYS,
    MASKED,
    RELAY,
    SERVER,
    STEPS,
    UNMASK,
    SecureSumError,
    read,
    write,
)
from fedkd.privacy.secure.masks import KEY_BYTES, Residues, agree, expand, modulus_mask, public_key

_ROW_KEYS = struct.Struct(f"<I{KEY_BYTES}s{KEY_BYTES}s")
_CIPHER_BYTES = 2 * shamir.SHARE_BYTES + 16
_ROW_CIPHER = struct.Struct(f"<I{_CIPHER_BYTES}s")
_ROW_SHARE = struct.Struct(f"<IB{shamir.SHARE_BYTES}s")
_ROW_ID = struct.Struct("<I")
_OWN_SEED, _MASK_KEY = 0, 1
_NONCE = bytes(12)  # a key is used for one message


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What all parties know beforehand, from the experiment and not from a message.

    ``length``: entries of a vector. ``bits``: the modulus is 2^bits. ``minimum``: the smallest sum that may be learned, in
    devices. ``threshold``: share of the roster that a recovery needs more than. ``clients``: devices of the federation,
    numbered from 0; a roster names no other.
    """

    length: int
    bits: int
    minimum: int = 3
    threshold: float = 0.5
    clients: int = 2**32

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 32:
            raise ValueError(f"the modulus needs 1 to 32 bits, got {self.bits}")
        if self.minimum < 2:
            raise ValueError("a sum of fewer than 2 devices is no secret: minimum must be at least 2")
        if not 0 <= self.threshold < 1:
            raise ValueError("threshold is a share of the roster, at least 0 and below 1")

    def needed(self, roster: int) -> int:
        """Return t, the number of devices that a recovery needs."""
        return max(2, int(self.threshold * roster) + 1)

    def fewest(self, roster: int) -> int:
        """Return the least number of survivors with which a session of ``roster`` devices may end."""
        return max(self.minimum, self.needed(roster))


# ---- messages -------------------------------------------------------------------------------------------------------
def _rows(data: bytes, form: struct.Struct, what: str) -> Iterator[tuple[Any, ...]]:
    if len(data) % form.size:
        raise SecureSumError(f"a list of {what} has a broken length of {len(data)} bytes")
    return form.iter_unpack(data)


def _by_id(data: bytes, form: struct.Struct, what: str) -> dict[int, tuple[Any, ...]]:
    """Read rows that begin with a device's number, strictly ascending."""
    found: dict[int, tuple[Any, ...]] = {}
    last = -1
    for client, *rest in _rows(data, form, what):
        if client <= last:
            raise SecureSumError(f"a list of {what} is not in ascending order: device {client} after {last}")
        found[client] = tuple(rest)
        last = client
    return found


# ---- the device -----------------------------------------------------------------------------------------------------
@dataclass
class Session:
    """What a device keeps of a session between steps. Sensitive: it lives on the device alone, and until its end.

    ``shares`` maps a device to the shares (of its own seed, of its mask key) that this device holds.
    """

    id: bytes
    client: int
    cipher_key: bytes = field(repr=False)
    mask_key: bytes = field(repr=False)
    own_seed: bytes = field(repr=False)
    roster: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    shares: dict[int, tuple[int, int]] = field(default_factory=dict, repr=False)
    step: int = KEYS

    @staticmethod
    def open(id: bytes, client: int) -> Session:
        """Draw fresh secrets from the operating system."""
        cipher_key, mask_key, own_seed = (secrets.token_bytes(KEY_BYTES) for _ in range(3))
        return Session(id, client, cipher_key, mask_key, own_seed)

    def dump(self) -> bytes:
        """Return the session as bytes, for a device whose process ends between steps."""
        plain = {
            "id": self.id.hex(),
            "client": self.client,
            "secrets": [s.hex() for s in (self.cipher_key, self.mask_key, self.own_seed)],
            "roster": {str(k): [a.hex(), b.hex()] for k, (a, b) in self.roster.items()},
            "shares": {str(k): [hex(a), hex(b)] for k, (a, b) in self.shares.items()},
            "step": self.step,
        }
        return json.dumps(plain).encode()

    @staticmethod
    def load(data: bytes) -> Session:
        """Undo :meth:`dump`."""
        plain = json.loads(data)
        cipher_key, mask_key, own_seed = (bytes.fromhex(s) for s in plain["secrets"])
        return Session(
            bytes.fromhex(plain["id"]),
            int(plain["client"]),
            cipher_key,
            mask_key,
            own_seed,
            roster={int(k): (bytes.fromhex(a), bytes.fromhex(b)) for k, (a, b) in plain["roster"].items()},
            shares={int(k): (int(a, 16), int(b, 16)) for k, (a, b) in plain["shares"].items()},
            step=int(plain["step"]),
        )

    @staticmethod
    def answer_opening(body: bytes, client: int) -> Session:
        """Open the session that the server's first message names."""
        if len(body) != HEAD.size:
            raise SecureSumError(f"an opening of {len(body)} bytes, expected {HEAD.size}")
        id: bytes = HEAD.unpack(body)[3]
        read(body, KEYS, SERVER, id)
        return Session.open(id, client)

    # ---- steps ------------------------------------------------------------------------------------------------------
    def keys(self) -> bytes:
        """Step 1: return this device's public keys."""
        rows = public_key(self.cipher_key) + public_key(self.mask_key)
        return write(KEYS, self.client, self.id, rows)

    def deal(self, body: bytes, terms: Terms) -> bytes:
        """Step 2: check the roster, and return an encrypted pair of shares for everybody else on it.

        Raises:
            SecureSumError: the roster is too small, lacks this device or shows other keys for it, or repeats a key.
        """
        self._at(KEYS)
        roster = {k: (a, b) for k, (a, b) in _by_id(read(body, DEAL, SERVER, self.id), _ROW_KEYS, "keys").items()}
        own = (public_key(self.cipher_key), public_key(self.mask_key))
        if roster.get(self.client) != own:
            raise SecureSumError("the roster does not show this device's own keys")
        if max(roster) >= terms.clients:
            raise SecureSumError(f"the roster names device {max(roster)} of a federation of {terms.clients}")
        fewest = terms.fewest(len(roster))
        if len(roster) < fewest:
            raise SecureSumError(f"a roster of {len(roster)} devices, at least {fewest} are needed")
        if len({key for pair in roster.values() for key in pair}) != 2 * len(roster):
            raise SecureSumError("two devices of the roster show one key")
        points = [client + 1 for client in roster]
        threshold = terms.needed(len(roster))
        seeds = shamir.share(self.own_seed, points, threshold)
        masks = shamir.share(self.mask_key, points, threshold)
        rows = []
        for client, a, b in zip(roster, seeds, masks, strict=True):
            if client == self.client:
                self.shares[client] = (a, b)
                continue
            text = a.to_bytes(shamir.SHARE_BYTES, "big") + b.to_bytes(shamir.SHARE_BYTES, "big")
            key = self._pair_key(roster[client][0], self.client, client)
            rows.append(_ROW_CIPHER.pack(client, ChaCha20Poly1305(key).encrypt(_NONCE, text, self.id)))
        self.roster, self.step = roster, DEAL
        return write(DEAL, self.client, self.id, b"".join(rows))

    def relay(self, body: bytes, terms: Terms) -> bytes:
        """Step 3: take the shares that others dealt to this device; who dealt none is out of the session.

        Raises:
            SecureSumError: a share is forged or of a stranger, or too few devices are left.
        """
        self._at(DEAL)
        for sender, (cipher,) in _by_id(read(body, RELAY, SERVER, self.id), _ROW_CIPHER, "shares").items():
            if sender not in self.roster or sender == self.client:
                raise SecureSumError(f"a share of device {sender}, which is not on the roster")
            key = self._pair_key(self.roster[sender][0], sender, self.client)
            try:
                text = ChaCha20Poly1305(key).decrypt(_NONCE, cipher, self.id)
            except InvalidTag:
                raise SecureSumError(f"the share of device {sender} was changed on its way") from None
            size = shamir.SHARE_BYTES
            self.shares[sender] = (int.from_bytes(text[:size], "big"), int.from_bytes(text[size:], "big"))
        fewest = terms.fewest(len(self.roster))
        if len(self.shares) < fewest:
            raise SecureSumError(f"shares of {len(self.shares)} devices, at least {fewest} are needed")
        self.step = RELAY
        return write(RELAY, self.client, self.id)

    def masked(self, vector: Residues, terms: Terms) -> bytes:
        """Step 4: return ``vector`` (modulo 2^bits) behind its masks.

        Raises:
            SecureSumError: the session is not ready for it, or has had its vector already.
        """
        self._at(RELAY)
        if vector.shape != (terms.length,):
            raise SecureSumError(f"expected a vector of {terms.length} entries, got {list(vector.shape)}")
        total = vector.astype(np.uint32) + expand(self.own_seed, terms.length, terms.bits)
        for other in self.shares:
            if other != self.client:
                total += pair_mask(self.mask_key, self.roster[other][1], self.id, self.client, other, terms)
        self.step = MASKED
        return write(MASKED, self.client, self.id, pack(_stream(terms), total & modulus_mask(terms.bits)))

    def unmask(self, body: bytes, terms: Terms) -> bytes:
        """Step 5: return, for every device of the session, the share of one of its two secrets. Once.

        Raises:
            SecureSumError: too few survivors, a survivor that is not of the session, or a second try.
        """
        self._at(MASKED)
        survivors = set(_by_id(read(body, UNMASK, SERVER, self.id), _ROW_ID, "survivors"))
        if not survivors <= self.shares.keys():
            raise SecureSumError("the survivors named are not all of this session")
        if self.client not in survivors:
            raise SecureSumError("this device is not among the survivors: its vector is not in the sum")
        fewest = terms.fewest(len(self.roster))
        if len(survivors) < fewest:
            raise SecureSumError(f"a sum over {len(survivors)} devices, at least {fewest} are needed")
        rows = []
        for client in sorted(self.shares):
            kind = _OWN_SEED if client in survivors else _MASK_KEY
            value = self.shares[client][kind].to_bytes(shamir.SHARE_BYTES, "big")
            rows.append(_ROW_SHARE.pack(client, kind, value))
        self.step = UNMASK
        return write(UNMASK, self.client, self.id, b"".join(rows))

    def _at(self, step: int) -> None:
        if self.step != step:
            raise SecureSumError(
                f"this device has done step {STEPS[self.step]!r} of the session, the message wants it right after "
                f"{STEPS[step]!r}: a step is answered once, in its order"
            )

    def _pair_key(self, public: bytes, sender: int, receiver: int) -> bytes:
        try:
            return agree(self.cipher_key, public, b"share|" + self.id + struct.pack("<II", sender, receiver))
        except ValueError as cause:
            raise SecureSumError(f"a device's public key is no key: {cause}") from cause


def pair_mask(private: bytes, public: bytes, session: bytes, own: int, other: int, terms: Terms) -> Residues:
    """Return the mask between two devices as ``own`` adds it; ``other`` adds its negative."""
    low, high = min(own, other), max(own, other)
    try:
        seed = agree(private, public, b"mask|" + session + struct.pack("<II", low, high))
    except ValueError as cause:
        raise SecureSumError(f"the public key of device {other} is no key: {cause}") from cause
    mask = expand(seed, terms.length, terms.bits)
    return mask if own == low else np.negative(mask)


def _stream(terms: Terms) -> Stream:
    return Stream(terms.length, 1 << terms.bits, np.dtype("<u4"), terms.bits)


# ---- the server -----------------------------------------------------------------------------------------------------
@dataclass
class Collector:
    """The server's side of one session. It holds what devices sent, and never one vector in the clear."""

    terms: Terms
    id: bytes
    roster: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    dealt: dict[int, dict[int, bytes]] = field(default_factory=dict)
    ready: set[int] = field(default_factory=set)
    vectors: dict[int, Residues] = field(default_factory=dict)

    def opening(self) -> bytes:
        """Return the message that opens a session (to every device asked)."""
        return write(KEYS, SERVER, self.id)

    def take_keys(self, client: int, body: bytes) -> None:
        """Note a device's public keys."""
        rows = read(body, KEYS, client, self.id)
        if len(rows) != 2 * KEY_BYTES:
            raise SecureSumError(f"device {client}: expected two keys, got {len(rows)} bytes")
        self.roster[client] = (rows[:KEY_BYTES], rows[KEY_BYTES:])

    def roster_message(self) -> bytes:
        """Return the roster, the same for every device on it."""
        self._enough(len(self.roster), "sent their keys")
        rows = b"".join(_ROW_KEYS.pack(client, *self.roster[client]) for client in sorted(self.roster))
        return write(DEAL, SERVER, self.id, rows)

    def take_shares(self, client: int, body: bytes) -> None:
        """Note the encrypted shares that a device dealt."""
        rows = {k: c for k, (c,) in _by_id(read(body, DEAL, client, self.id), _ROW_CIPHER, "shares").items()}
        if rows.keys() != self.roster.keys() - {client}:
            raise SecureSumError(f"device {client} dealt shares to others than the roster's devices")
        self.dealt[client] = rows

    def relay_message(self, client: int) -> bytes:
        """Return the shares dealt to ``client``."""
        self._enough(len(self.dealt), "dealt their shares")
        rows = b"".join(_ROW_CIPHER.pack(s, self.dealt[s][client]) for s in sorted(self.dealt) if s != client)
        return write(RELAY, SERVER, self.id, rows)

    def take_ready(self, client: int, body: bytes) -> None:
        """Note that a device has its shares."""
        if read(body, RELAY, client, self.id):
            raise SecureSumError(f"device {client}: an acknowledgement with {len(body)} bytes")
        self.ready.add(client)

    def take_masked(self, client: int, body: bytes) -> None:
        """Note a device's masked vector."""
        if client in self.vectors:
            raise SecureSumError(f"device {client} sent its vector already")
        if client not in self.ready:
            raise SecureSumError(f"device {client} is not of this session")
        rows, stream = read(body, MASKED, client, self.id), _stream(self.terms)
        if len(rows) != stream.packed_bytes:
            raise SecureSumError(f"device {client}: expected {stream.packed_bytes} bytes, got {len(rows)}")
        self.vectors[client] = unpack(stream, rows)

    def survivors_message(self) -> bytes:
        """Return the list of devices whose vectors came, the same for each of them."""
        self._enough(len(self.vectors), "sent their vectors")
        return write(UNMASK, SERVER, self.id, b"".join(_ROW_ID.pack(k) for k in sorted(self.vectors)))

    def total(self, replies: Mapping[int, bytes]) -> NDArray[np.int64]:
        """Return the sum of the survivors' vectors, as signed integers in [-2^(bits-1), 2^(bits-1)).

        Args:
            replies: what survivors answered to :meth:`survivors_message`; a broken one is passed over.
        Raises:
            SecureSumError: fewer than t good replies, or shares that do not fit the keys that devices showed.
        """
        needed = self.terms.needed(len(self.roster))
        good: dict[int, dict[int, int]] = {}
        for client, body in sorted(replies.items()):
            try:
                good[client] = self._shares_of(client, body)
            except SecureSumError:
                continue
            if len(good) == needed:
                break
        if len(good) < needed:
            raise SecureSumError(f"{len(good)} devices sent shares, {needed} are needed to take the masks off")
        weight = shamir.weights([client + 1 for client in good])
        total = np.zeros(self.terms.length, np.uint32)
        for vector in self.vectors.values():
            total += vector
        for client in self.dealt:
            shares = {helper + 1: values[client] for helper, values in good.items()}
            try:
                secret = shamir.reconstruct(shares, weight)
            except ValueError as cause:
                raise SecureSumError(f"the secret of device {client} cannot be recovered: {cause}") from cause
            if client in self.vectors:
                total -= expand(secret, self.terms.length, self.terms.bits)
                continue
            if public_key(secret) != self.roster[client][1]:
                raise SecureSumError(f"the shares of device {client}'s mask key are not of the key that it showed")
            for other in self.vectors:
                # What the lost device would have added for this pair undoes what the survivor did.
                total += pair_mask(secret, self.roster[other][1], self.id, client, other, self.terms)
        return signed(total, self.terms.bits)

    def _shares_of(self, client: int, body: bytes) -> dict[int, int]:
        rows = _by_id(read(body, UNMASK, client, self.id), _ROW_SHARE, "shares")
        if client not in self.vectors or rows.keys() != self.dealt.keys():
            raise SecureSumError(f"device {client} sent shares of other devices than those of the session")
        for other, (kind, _) in rows.items():
            if kind != (_OWN_SEED if other in self.vectors else _MASK_KEY):
                raise SecureSumError(f"device {client} sent the wrong secret's share of device {other}")
        return {other: int.from_bytes(value, "big") for other, (_, value) in rows.items()}

    def _enough(self, count: int, what: str) -> None:
        fewest = self.terms.fewest(len(self.roster))
        if count < fewest:
            raise SecureSumError(f"{count} devices {what}, at least {fewest} are needed")


def residues(values: NDArray[np.int64], bits: int) -> Residues:
    """Return signed integers modulo 2^bits."""
    found: Residues = values.astype(np.uint32, casting="unsafe") & modulus_mask(bits)
    return found


def signed(values: Residues, bits: int) -> NDArray[np.int64]:
    """Undo :func:`residues` for integers in [-2^(bits-1), 2^(bits-1))."""
    plain = (values & modulus_mask(bits)).astype(np.int64)
    found: NDArray[np.int64] = np.where(plain >= 1 << (bits - 1), plain - (1 << bits), plain)
    return found
