"""Faults 1 to 12 and 14 of an upload: each is refused by name, the round goes on, and the student is that of the others."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inprocess import Network, Wire, experiment
from safetensors.torch import load_file

from fedkd import simulate, wire
from fedkd.codecs import codec
from fedkd.deploy.mail import Ask, MailError, Say
from fedkd.payloads import SoftLabels

CLIENTS, BAD = 3, 1
Spoil = Callable[[bytes], bytes]


def _floats(change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """Change the numbers in the body, which a codec would refuse to send."""

    def spoil(body: bytes) -> bytes:
        head = wire.read_head(body)
        size = len(head.body)
        values = np.frombuffer(head.body, "<f4").copy().reshape(100, 10)
        return body[: len(body) - size] + np.ascontiguousarray(change(values), "<f4").tobytes()

    return spoil


def _set(value: float) -> Spoil:
    def change(values: np.ndarray) -> np.ndarray:
        values[3, 2] = value
        return values

    return _floats(change)


def _again(labels: torch.Tensor | None = None, **envelope: Any) -> Spoil:
    """Encode an answer anew, with another shape or another envelope."""

    def spoil(body: bytes) -> bytes:
        head = wire.read_head(body)
        values = torch.from_numpy(np.frombuffer(head.body, "<f4").copy().reshape(100, 10))
        payload = SoftLabels(labels=labels if labels is not None else values)
        return codec("float32").encode(payload, replace(head.envelope, **envelope))

    return spoil


def _entry(name: str, shape: tuple[int, ...], kind: str = "f4") -> Spoil:
    """Claim another type or shape in the header, with the body as it is."""

    def spoil(body: bytes) -> bytes:
        head = wire.read_head(body)
        table = wire.write_table(wire.Table("SoftLabels", "float32", (wire.Entry(name, kind, shape),)))
        return wire.write(head.envelope, table, bytes(head.body))

    return spoil


def _examples(count: float) -> Spoil:
    """Write an impossible count where the header has it."""

    def spoil(body: bytes) -> bytes:
        at = wire.PREFIX.size + struct.calcsize("<qq")
        return body[:at] + struct.pack("<d", count) + body[at + 8 :]

    return spoil


FAULTS: dict[str, tuple[Spoil, str]] = {
    "1 NaN": (_set(float("nan")), "finite"),
    "1 infinity": (_set(float("inf")), "finite"),
    "2 samples": (_again(torch.full((99, 10), 0.1)), "shape"),
    "2 classes": (_again(torch.full((100, 9), 1 / 9)), "shape"),
    "3 ids permuted": (_again(ids="0" * 16), "ids"),
    "3 another proxy set": (_again(proxy="0" * 32), "proxy"),
    "4 negative": (_set(-0.5), "range"),
    "4 unnormalised": (_floats(lambda v: 3 * v), "simplex"),
    "5 logits of 1e30": (_set(1e30), "range"),
    "6 object": (_entry("labels", (100, 10), "|O"), "dtype"),
    "6 structured": (_entry("labels", (100, 10), "[('a','<f4')]"), "dtype"),
    "6 complex": (_entry("labels", (100, 10), "c8"), "dtype"),
    "6 datetime": (_entry("labels", (100, 10), "M8"), "dtype"),
    "6 unicode": (_entry("labels", (100, 10), "U10"), "dtype"),
    "7 1e12 elements": (_entry("labels", (10**6, 10**6)), "shape"),
    "8 a compressed bomb": (lambda body: zlib.compress(bytes(10**8)), "magic"),
    "9 truncated": (lambda body: body[:-7], "length"),
    "9 trailing": (lambda body: body + b"\0", "length"),
    "11 a stale round": (_again(round=0), "round"),
    "11 a future round": (_again(round=7), "round"),
    "11 another run": (_again(run="other.t"), "run"),
    "12 examples 0": (_examples(0.0), "examples"),
    "12 examples negative": (_examples(-1.0), "examples"),
    "12 examples NaN": (_examples(float("nan")), "examples"),
    "12 examples 1e18": (_examples(1e18), "examples"),
    "14 sender": (_again(sender=0), "sender"),
}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    return Network(tmp_path_factory.mktemp("net"), CLIENTS)


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The student of a run in which the bad client says nothing of use in round 1."""
    network = Network(tmp_path_factory.mktemp("without"), CLIENTS)
    student, rows = play(network, tmp_path_factory.mktemp("run") / "run", lambda wire, ask, say: None)
    assert rows[1]["answered"] == CLIENTS - 1
    return student


def play(network: Network, folder: Path, bad: Callable[[Wire, Ask, Say], Any]) -> tuple[dict[str, torch.Tensor], Any]:
    """Run two rounds; in round 1 client BAD's answer is what ``bad`` makes of it, None for a refusal."""
    for client in range(CLIENTS):
        network.restart(client)

    def twist(wire: Wire, client: int, ask: Ask, honest: Any) -> Any:
        if client != BAD or ask.round != 1:
            return honest()
        say = wire.devices[client].handle(ask)
        if say.kind != "answer":
            return wire.reply("", client, say)
        made = bad(wire, ask, say)
        return (
            wire.reply("", client, replace(say, kind="refused", reason="test", answer=None)) if made is None else made
        )

    network.wire.twist = twist
    found = network.play(experiment(CLIENTS, rounds=2), folder, token=f"t{abs(hash(str(folder))) % 10**8}")
    rows = [json.loads(line) for line in (folder / simulate.ROWS).read_text().splitlines()]
    return load_file(found.folder / simulate.STUDENT), rows


def assert_others(student: dict[str, torch.Tensor], without: dict[str, torch.Tensor]) -> None:
    for name, value in without.items():
        torch.testing.assert_close(student[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=pytest.mark.fault(int(name.split()[0]))) for name in FAULTS]
)
def test_a_bad_answer_is_quarantined(
    fault: str, network: Network, without: dict[str, torch.Tensor], tmp_path: Path, happened: Callable[[str], None]
) -> None:
    spoil, reason = FAULTS[fault]

    def bad(wire: Wire, ask: Ask, say: Say) -> Any:
        assert say.answer is not None
        return wire.reply("", BAD, replace(say, answer=spoil(say.answer)))

    student, rows = play(network, tmp_path / "run", bad)
    assert rows[1]["failed"] is None and rows[1]["answered"] == CLIENTS - 1
    (found,) = rows[1]["quarantined"]
    assert found["client"] == BAD and found["reason"] == reason and len(found["message"]) > 10, found
    assert_others(student, without)
    happened(f"quarantined ({reason}): {found['message']}")


@pytest.mark.fault(8, "refused while it comes, at the first object beyond the cap")
def test_8_over_the_cap(network: Network, without: dict[str, torch.Tensor], tmp_path: Path) -> None:
    from flwr.proto.message_pb2 import Message, ObjectTree

    from fedkd.deploy.parcels import Arriving

    arriving = Arriving.begin(Message(), ObjectTree(object_id="a"), 10)
    with pytest.raises(MailError, match="over the cap of 10 bytes") as caught:
        arriving.take("a", bytes(11))
    student, rows = play(network, tmp_path / "run", lambda wire, ask, say: caught.value)
    assert rows[1]["quarantined"][0]["reason"] == "cap"
    assert_others(student, without)


@pytest.mark.fault(10, "an answer to another request is quarantined; the student is that of the others")
def test_10_a_replay_counts_once(network: Network, without: dict[str, torch.Tensor], tmp_path: Path) -> None:
    kept: list[Say] = []

    def bad(wire: Wire, ask: Ask, say: Say) -> Any:
        # Its own signed answer to another request: true once, but not to what was asked now.
        kept.append(say)
        return wire.reply("", BAD, replace(say, key="0" * 64))

    student, rows = play(network, tmp_path / "run", bad)
    assert rows[1]["quarantined"][0]["reason"] == "round"
    assert_others(student, without)


@pytest.mark.fault(14, "quarantined: the reply is not signed by the key of the client that was asked")
@pytest.mark.parametrize("how", ["signed by another", "says another's number"])
def test_14_a_client_speaks_as_another(
    how: str, network: Network, without: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    def bad(wire: Wire, ask: Ask, say: Say) -> Any:
        if how == "signed by another":
            return wire.reply("", BAD, say, signer=0)
        return wire.reply("", BAD, replace(say, client=0))

    student, rows = play(network, tmp_path / "run", bad)
    assert rows[1]["quarantined"][0]["reason"] == "identity"
    assert_others(student, without)


@pytest.mark.fault(14, "a forged reply is asked for once more, and the honest one counts")
def test_14_one_forged_reply_does_not_cost_the_honest_one(network: Network, tmp_path: Path) -> None:
    forged: list[str] = []

    def bad(wire: Wire, ask: Ask, say: Say) -> Any:
        if not forged:
            forged.append(ask.key)
            return wire.reply("", BAD, say, signer=0)
        return wire.reply("", BAD, say)

    _, rows = play(network, tmp_path / "run", bad)
    assert rows[1]["answered"] == CLIENTS and rows[1]["quarantined"] == []
