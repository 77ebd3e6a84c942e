"""Every cap of policy.yaml refuses what goes beyond it, by name, and no message moves it."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from inprocess import Network, Wire, experiment

from fedkd.deploy.device import Device
from fedkd.deploy.link import Link, LinkError
from fedkd.deploy.mail import Ask, MailError, Say
from fedkd.deploy.node import Node
from fedkd.deploy.policy import NodePolicy

CLIENT = 1
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, Ask]:
    """A network, and a request with its proxy set that has not been answered yet."""
    network = Network(tmp_path_factory.mktemp("net"), 2)
    asks: list[Ask] = []

    def listen(wire: Wire, client: int, ask: Ask, honest: Any) -> Any:
        if ask.proxy is None:
            return honest()  # it needs the proxy set
        if client == CLIENT:
            asks.append(ask)
        say = Say(kind="refused", run=ask.run, client=client, round=ask.round, key=ask.key, reason="test", message="no")
        return wire.reply("", client, say)

    network.wire.twist = listen
    network.play(experiment(2, rounds=1, models={"devices": "logreg"}), tmp_path_factory.mktemp("run") / "run")
    return network, asks[0]


def handle(network: Network, ask: Ask, policy: Mapping[str, Any], change: Change = lambda told: None) -> Say:
    """Let a fresh device with this policy answer a request whose experiment was changed."""
    (network.kits[CLIENT].folder / "policy.yaml").write_text(yaml.safe_dump(dict(policy)))
    for box in network.kits[CLIENT].state.glob("runs/*/outbox/*"):
        box.unlink()
    told = copy.deepcopy(dict(ask.experiment))
    change(told)
    return Device(network.kits[CLIENT]).handle(replace(ask, experiment=told))


def put(section: str, **values: Any) -> Change:
    return lambda told: told[section].update(values)


CAPS: dict[str, tuple[dict[str, Any], Change, str]] = {
    "epsilon": ({"epsilon": 8.0}, lambda told: None, "asks for differential privacy"),
    "epsilon, a server's noise": (
        {"epsilon": 8.0},
        put("privacy", kind="labels", noise_multiplier=9.0),
        "protects clients on the server only",
    ),
    "require_privacy": ({"require_privacy": True}, lambda told: None, "asks for differential privacy"),
    "min_cohort": ({"min_cohort": 2}, lambda told: None, "asks for 2 answers at least"),
    "proxy_sha256": ({"proxy_sha256": "0" * 64}, lambda told: None, "pins proxy set 0000"),
    "methods": ({"methods": ["fedmd"]}, lambda told: None, "'ds_fl': its policy allows fedmd"),
    "methods, by a path": ({}, put("algorithm", name="spy:Method"), "'spy:Method'"),
    "models": ({}, put("models", devices=["spy:Model"]), "does not build model 'spy:Model'"),
    "models, the student": ({}, put("models", student="spy:Model"), "does not build model 'spy:Model'"),
    "max_rounds": ({"max_rounds": 9}, lambda told: told.update(rounds=10), "allows 9 rounds; the experiment has 10"),
    "max_epochs": ({"max_epochs": 4}, put("training", epochs=5), "training.epochs is 5, this node's policy allows"),
    "max_epochs, digest": ({"max_epochs": 4}, put("digest", epochs=5), "digest.epochs is 5"),
    "max_epochs, pretrain": ({"max_epochs": 4}, put("pretrain", epochs=5), "pretrain.epochs is 5"),
    "max_steps": ({"max_steps": 7}, put("training", steps=8), "training.steps is 8"),
    "max_batch_size": ({"max_batch_size": 16}, put("training", batch_size=17), "training.batch_size is 17"),
    "max_parameters": (
        {"max_parameters": 1_000_000},
        put("models", devices=["mlp(hidden=[100000])"]),
        "has 7500010 parameters, this node's policy allows 1000000",
    ),
    "max_parameters, beyond memory": (
        {},
        put("models", devices=["mlp(hidden=[1000000000, 1000000000])"]),
        "parameters, this node's policy allows 200000000",
    ),
    "max_proxy_samples": ({"max_proxy_samples": 99}, lambda told: None, "has 100 samples, this node's policy allows 99"),
    "max_request_bytes": ({"max_request_bytes": 999}, lambda told: None, "allows max_request_bytes 999"),
    "max_reply_bytes": ({"max_reply_bytes": 999}, lambda told: None, "allows max_reply_bytes 999"),
}  # fmt: skip


def test_every_cap_is_tested() -> None:
    named = {name.partition(",")[0] for name in CAPS} | {"delta", "max_bytes_per_day"}
    assert named == NodePolicy.model_fields.keys()


@pytest.mark.parametrize("cap", CAPS)
def test_a_cap_refuses_with_its_reason(
    cap: str, asked: tuple[Network, Ask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever is named by a path must not be imported to be refused.
    (tmp_path / "spy.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    network, ask = asked
    policy, change, said = CAPS[cap]
    say = handle(network, ask, policy, change)
    assert (say.kind, say.reason, say.answer) == ("refused", "policy", None) and said in say.message, say
    assert not (tmp_path / "imported").exists()


def test_the_same_request_within_the_policy_is_answered(asked: tuple[Network, Ask]) -> None:
    network, ask = asked
    assert handle(network, ask, {}).kind == "answer"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda told: told.update(policy={"max_rounds": 10**6}), "'policy', which is no server's to say"),
        (
            lambda told: told.update(data={"source": "csv", "path": "/etc/passwd"}),
            "'data', which is no server's to say",
        ),
        (lambda told: told.update(deployment={}, checkpoint={}), "'checkpoint', 'deployment'"),
        (put("privacy", policy="/tmp/mine.yaml"), "this node's own, not the server's to name"),
    ],
)
def test_a_message_cannot_move_a_cap(change: Change, said: str, asked: tuple[Network, Ask]) -> None:
    network, ask = asked
    caps = {"max_rounds": 5, "epsilon": None}

    def with_more_rounds(told: dict[str, Any]) -> None:
        told["rounds"] = 6
        change(told)

    for attempt in (change, with_more_rounds):
        say = handle(network, ask, caps, attempt)
        assert (say.kind, say.reason) == ("refused", "policy") and said in say.message, say
    assert yaml.safe_load((network.kits[CLIENT].folder / "policy.yaml").read_text()) == caps
    say = handle(network, ask, caps, lambda told: told.update(rounds=6))
    assert "allows 5 rounds" in say.message


def test_a_day_has_an_end(
    asked: tuple[Network, Ask], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that has used its bytes asks for no more, not even after a restart, until another day begins."""
    network, _ = asked
    pulled: list[int] = []

    def pull(most: int) -> None:
        pulled.append(most)

    link = SimpleNamespace(connect=lambda: 7, pull=pull, close=lambda: None, online=True)

    def node() -> Node:
        return Node(
            network.kits[CLIENT], network.wire.devices[CLIENT], max_request_bytes=10**6, max_bytes_per_day=1000, link=link  # type: ignore[arg-type]
        )  # fmt: skip

    first = node()
    first.usage.add(990)
    assert node().usage.left == 10, "a restart grants no new day"
    first.usage.add(10)
    again = node()
    caplog.set_level(logging.WARNING, "fedkd.deploy.client")
    logging.getLogger("fedkd.deploy.client").propagate = True
    thread = threading.Thread(target=again.run)
    thread.start()
    end = time.monotonic() + 20
    while "used its 1000 bytes of today" not in caplog.text and time.monotonic() < end:
        time.sleep(0.01)
    again.stop.set()
    thread.join(20)
    assert "used its 1000 bytes of today" in caplog.text and not pulled
    monkeypatch.setattr(again.usage, "_today", lambda: "2999-01-01")
    assert again.usage.left == 1000


def test_what_is_dropped_counts_too(asked: tuple[Network, Ask]) -> None:
    """Else a server could send a device without end what it drops."""
    network, _ = asked

    def pull(most: int) -> None:
        link.pulled = 600
        raise faults.pop()

    faults: list[Exception] = [LinkError("cut off"), MailError("cap", "too long")]
    link = SimpleNamespace(pull=pull, pulled=0)
    node = Node(
        network.kits[CLIENT], network.wire.devices[CLIENT], max_request_bytes=10**6, max_bytes_per_day=10**9, link=link  # type: ignore[arg-type]
    )  # fmt: skip
    before = node.usage.bytes
    assert node.step()
    with pytest.raises(LinkError):
        node.step()
    assert node.usage.bytes - before == node.counters.bytes_in == 1200


@pytest.mark.parametrize("answer", ["elsewhere", "long", "packed"])
def test_a_server_cannot_send_a_device_elsewhere_nor_fill_its_memory(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def server(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        if answer == "elsewhere":
            return httpx.Response(307, headers={"location": "http://10.0.0.1/admin"})
        if answer == "packed":
            return httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(b"x"))
        return httpx.Response(200, stream=httpx.ByteStream(b"x" * 2000))

    monkeypatch.setattr("fedkd.deploy.link.MOST_BYTES", 1000)
    link = Link("127.0.0.1:1", None, ec.generate_private_key(ec.SECP384R1()), node=1)
    link._client._client._transport = httpx.MockTransport(server)
    with pytest.raises(LinkError, match={"elsewhere": "307", "long": "more than 1000", "packed": "packed"}[answer]):
        link.pull(10**6)
    assert asked == ["http://127.0.0.1:1/v1/fleet/pull-messages"]
