"""A stranger's messages against the mail of a real network: ``python -m simulations.benchmarks.fuzz_mail --inputs 100000``.

Where ``fuzz`` feeds bytes to the codecs, this feeds whole messages to what reads them first: the objects that Flower cuts a
message into, requests as a device reads them, and signed answers as the server does. Each input is a valid message of
which something was changed: its text, a key or value of it, its bodies, its signature, its records, or the bytes of one of
its objects, with all names (hashes) put right again as an attacker would. A reader may refuse with a ``MailError``, or take
the message for exactly what was said; anything else is a failure: another exception, other words, or memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from fedkd.deploy.mail import (
    BODIES,
    BODY,
    SECTION,
    SHORT_BYTES,
    SIGNATURE,
    TEXT,
    Ask,
    MailError,
    Say,
    key_of,
    pack_ask,
    pack_say,
    unpack_ask,
    unpack_say,
)  # fmt: skip
from fedkd.deploy.parcels import Arriving, take_apart

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict  # isort: skip
from flwr.app.message import make_message  # isort: skip
from flwr.app.metadata import Metadata  # isort: skip

MAX_BYTES = 2**20
MORE_BYTES = 64 * 2**20
"""How much all inputs together may raise the process's peak of resident memory, once a few have been read."""
WARM = 500
NASTY: tuple[Any, ...] = (
    None, True, -1, -2, 2**62, 2**70, 0.5, float("nan"), float("inf"), "", "x" * 501, "\0", "\ud800", "../../x", [], {}, [[]],
    {"a": {}}, "answer", "ask", "probe", "refused", 10**400,
)  # fmt: skip


class Escaped(Exception):
    """A reader let something through, or failed in another way than by a MailError."""


@dataclass(frozen=True)
class Letter:
    """A valid message and what it says."""

    record: Callable[[], RecordDict]
    said: Ask | Say
    read: Callable[[RecordDict], Ask | Say]


@cache
def letters() -> tuple[Letter, ...]:
    """Return a valid message of every kind."""
    node = ec.generate_private_key(ec.SECP384R1())
    experiment = {"name": "trial", "rounds": 3, "models": {"devices": ["mlp"]}}
    key = key_of("trial.t", 1, 2, -1, experiment, b"request")
    common: dict[str, Any] = {"run": "trial.t", "client": 1, "round": 2, "key": key}
    asks = [
        Ask(**common, experiment=experiment, request=b"request"),
        Ask(**common, experiment=experiment, request=b"request", proxy=b"proxy" * 100),
        Ask(kind="probe", **common),
    ]
    says = [
        Say(kind="answer", **common, answer=bytes(range(256)) * 4),
        Say(kind="answer", **common, answer=bytes(range(256)) * (SHORT_BYTES // 256 + 1)),
        Say(kind="refused", **common, reason="policy", message="this node's policy allows 5 rounds"),
        Say(kind="needs", **common),
        Say(kind="known", **common),
    ]
    return tuple(
        [Letter(lambda a=a: pack_ask(a), a, unpack_ask) for a in asks]  # type: ignore[misc]
        + [Letter(lambda s=s: pack_say(s, node), s, lambda r: unpack_say(r, node.public_key())) for s in says]  # type: ignore[misc]
    )


# ---- changes --------------------------------------------------------------------------------------------------------
def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return rng.randbytes(3)
    at = rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data + rng.randbytes(rng.randrange(1, 20))
    return data[:at] + rng.randbytes(rng.randrange(20)) + data[at + rng.randrange(20) :]


def _text(text: str, rng: random.Random) -> Any:
    kind = rng.randrange(5)
    if kind == 0:
        return _flip(text.encode(), rng).decode("utf-8", "surrogateescape")
    if kind == 1:
        return rng.choice(["[" * 50_000, '{"a":' * 50_000, "9" * 10_000, "[]", "null", '"x"', "{}", "x" * 300_000])
    words = json.loads(text)
    name = rng.choice(list(words))
    if kind == 2:
        del words[name]
    else:
        words[name] = rng.choice(NASTY)
    return json.dumps(words)


def _rebuild(record: RecordDict, rng: random.Random) -> RecordDict:
    """Change the text, the signature, a body or the records themselves."""
    config = dict(record.config_records[SECTION])
    arrays = dict(record.array_records[BODIES]) if BODIES in record else {}
    kind = rng.randrange(8)
    if kind <= 1:
        config[TEXT] = _text(str(config[TEXT]), rng)
    elif kind == 2:
        signature = config[SIGNATURE]
        assert isinstance(signature, bytes)
        config[SIGNATURE] = rng.choice([_flip(signature, rng), b"", 7, "x", 0.5, [1, 2]])
    elif kind == 3:
        name = rng.choice([*arrays, "request", "proxy", "answer", "strange"])
        data = _flip(arrays[name].data if name in arrays else b"", rng)
        size = rng.choice([len(data), 0, 10**12, -1])
        arrays[name] = Array(
            rng.choice(["uint8", "object", "float64", "x" * 100]), (size,), rng.choice([SECTION, ""]), data
        )
    elif kind == 4:
        arrays = {} if rng.random() < 0.5 else {f"b{n}": Array("uint8", (1,), SECTION, b"x") for n in range(9)}
    elif kind == 5:
        config = {n: v for n, v in config.items() if rng.random() < 0.5}
    elif kind == 6:
        name = rng.choice([n for n in config if n.startswith(BODY)] or [BODY + "answer", BODY + "proxy", BODY])
        data = config.get(name, b"")
        assert isinstance(data, bytes)
        config[name] = rng.choice([_flip(data, rng), data, b"", 7, "x", 0.5, [b"x", b"y"]])
        config |= {f"{BODY}b{n}": b"x" for n in range(rng.choice([0, 0, 1, 9]))}
    else:
        return RecordDict(
            rng.choice(
                [
                    {},
                    {SECTION: MetricRecord({"a": 1})},
                    {SECTION: ArrayRecord(arrays), BODIES: ArrayRecord(arrays)},
                    {SECTION: ConfigRecord(config)},
                    {BODIES: ArrayRecord(arrays)},
                    {SECTION: ConfigRecord(config), BODIES: ConfigRecord(config)},
                ]
            )
        )
    if rng.random() < 0.1 and arrays:
        config[BODY + rng.choice(list(arrays))] = b"twice"
    return RecordDict({SECTION: ConfigRecord(config)} | ({BODIES: ArrayRecord(arrays)} if arrays else {}))


def message(content: RecordDict) -> Message:
    """Return a message as a node of Flower sends it."""
    meta = Metadata(
        run_id=1, message_id="", src_node_id=2, dst_node_id=1, reply_to_message_id="", group_id="", created_at=0.0, ttl=60.0,
        message_type="train",
    )  # fmt: skip
    return make_message(metadata=meta, content=content)


def _objects(content: RecordDict, rng: random.Random) -> Message:
    """Send a message's objects with one of them changed, every name put right; returns what arrives."""
    whole = message(content)
    _, tree, objects = take_apart(whole)
    name = rng.choice(list(objects))
    changed = {name: _flip(objects[name], rng)}
    # A parent holds the names of its children, so that a new child makes new parents up to the message itself.
    todo, renamed = [name], {}
    while todo:
        old = todo.pop()
        new = hashlib.sha256(changed[old]).hexdigest()
        renamed[old] = new
        for parent, data in objects.items():
            if parent not in renamed and old.encode() in changed.get(parent, data):
                changed[parent] = changed.get(parent, data).replace(old.encode(), new.encode())
                todo.insert(0, parent)
    sent = {renamed.get(n, n): changed.get(n, data) for n, data in objects.items()}
    if rng.random() < 0.1:
        sent.pop(rng.choice(list(sent)))
    root = renamed.get(tree.object_id, tree.object_id)
    arriving = Arriving(root, list(sent), MAX_BYTES)
    for n, data in sent.items():
        arriving.take(n, data)
    return arriving.finish()


# ---- one input ------------------------------------------------------------------------------------------------------
def check(seed: int) -> str:
    """Make and read the input of a seed; returns how it went.

    Raises:
        Escaped: a reader failed.
    """
    rng = random.Random(seed)
    letter = rng.choice(letters())
    try:
        if rng.random() < 0.3:
            came = _objects(letter.record(), rng)
            if not came.has_content():
                return "refused: no content"
            record = came.content
        else:
            # Flower's own records refuse some nonsense before it can be sent.
            try:
                record = _rebuild(letter.record(), rng)
            except (TypeError, ValueError, KeyError):
                return "cannot be sent"
        found = letter.read(record)
    except MailError as cause:
        return f"refused: {cause.reason}"
    except Exception as cause:
        raise Escaped(f"seed {seed}: {type(cause).__name__}: {cause}") from cause
    _judge(found, letter.said, seed)
    return "taken"


def _judge(found: Ask | Say, said: Ask | Say, seed: int) -> None:
    """Raise Escaped unless a message that was taken says what its key or its signature stands for."""
    if isinstance(found, Say):
        if found != said:
            raise Escaped(f"seed {seed}: an answer was taken that its signer did not give: {found}")
        return
    for name in (field.name for field in fields(found)):
        value = getattr(found, name)
        if name in ("client", "round", "holds") and type(value) is not int:
            raise Escaped(f"seed {seed}: {name} is {value!r}")
    right = key_of(found.run, found.client, found.round, found.holds, found.experiment, found.request)
    if found.kind == "ask" and found.key != right:
        raise Escaped(f"seed {seed}: a request was taken under another key")


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began, counts, peak = time.monotonic(), Counter[str](), 0
    for number in range(options.inputs):
        counts[check(options.seed * options.inputs + number)] += 1
        if number == WARM:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    for name, count in counts.most_common():
        print(f"{count:>8}  {name}")
    print(
        f"{options.inputs} inputs in {time.monotonic() - began:.0f} s; the peak of memory rose by {more / 1024:.1f} MiB"
    )
    if options.inputs > WARM and more * 1024 > MORE_BYTES:
        print(f"more than {MORE_BYTES / 2**20:.0f} MiB: a failure")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
