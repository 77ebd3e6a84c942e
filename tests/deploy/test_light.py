"""A client that only labels, by a model of its own and without torch, among clients that train."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from inprocess import Network, Wire, digits, experiment
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from fedkd import simulate
from fedkd.algorithms.base import Heard, View
from fedkd.algorithms.catalogue import METHODS, method_class
from fedkd.deploy.device import Device
from fedkd.deploy.light import ANSWERS
from fedkd.deploy.localdata import read_local_data
from fedkd.deploy.mail import Ask, Say
from fedkd.envelope import PayloadError
from fedkd.errors import ConfigError
from fedkd.labeller import OnnxPredictor, class_probabilities
from fedkd.messages import read_request
from fedkd.nets import PredictorNet
from fedkd.payloads import Nothing
from fedkd.records import records

CLIENTS, LIGHT = 3, 2
MODELS = {"models": {"devices": ["mlp", "mlp", "own"]}}


def fitted() -> LogisticRegression:
    """A model of the digits as fedkd scales them: pixels of 0 to 1."""
    x, y = load_digits(return_X_y=True)
    return LogisticRegression(C=0.1, max_iter=500).fit(np.rint(x / 16 * 255) / 255, y)


def write_onnx(path: Path, model: LogisticRegression, dims: tuple[Any, ...] = (1, 8, 8)) -> Path:
    """Write a linear model as ONNX: images in, probabilities out."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "w", "b"], ["z"], transB=1),
        helper.make_node("Softmax", ["z"], ["p"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *dims])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 10]) for name in ("p", "z")],
        [
            numpy_helper.from_array(model.coef_.astype(np.float32), "w"),
            numpy_helper.from_array(model.intercept_.astype(np.float32), "b"),
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(made, str(path))
    return path


@pytest.fixture(scope="module")
def model() -> LogisticRegression:
    return fitted()


def lighten(network: Network, said: Mapping[str, Any], client: int = LIGHT) -> None:
    (network.kits[client].folder / "data.yaml").write_text(yaml.safe_dump({"model": dict(said)}))
    network.restart(client)


@pytest.fixture
def network(tmp_path: Path, model: LogisticRegression) -> Network:
    network = Network(tmp_path / "net", CLIENTS)
    write_onnx(network.kits[LIGHT].folder / "model.onnx", model)
    lighten(network, {"path": "model.onnx"})
    return network


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / simulate.ROWS).read_text().splitlines()]


def alone(wire: Wire, client: int, ask: Ask, honest: Any) -> Any:
    """Only the light client is of interest."""
    if client == LIGHT:
        return honest()
    say = Say(
        kind="refused", run=ask.run, client=client, round=ask.round, key=ask.key, reason="test", message="not now"
    )
    return wire.reply("", client, say)


def test_it_takes_part_in_a_run(network: Network, tmp_path: Path) -> None:
    found = network.play(experiment(CLIENTS, **MODELS), tmp_path / "run")
    assert [(r["answered"], r["quarantined"], r["failed"]) for r in rows(found.folder)] == [(CLIENTS, [], None)] * 3
    # Its good labels are in the student: alone, the two others' are of fewer classes.
    network.wire.offline = {LIGHT}
    waits = {"offline_seconds": 0.01}
    without = network.play(experiment(CLIENTS, deployment=waits, **MODELS), tmp_path / "without", token="w")
    gain = found.summary["accuracy"]["student"] - without.summary["accuracy"]["student"]
    assert gain > 0.05, gain


LABELS = [name for name in METHODS if method_class(name).predictors and method_class(name).upload is not Nothing]


@pytest.mark.parametrize(("method", "spec"), list(zip(LABELS, itertools.cycle(["float16", "float32", "float64"]))))
def test_it_answers_as_the_method_does(
    method: str, spec: str, network: Network, tmp_path: Path, model: LogisticRegression
) -> None:
    """Whatever method takes clients with ``predict_proba``, its answer is the labels that the light client makes."""
    assert method_class(method).upload.__name__ in ANSWERS
    answers: list[tuple[Ask, bytes]] = []

    def listen(wire: Wire, client: int, ask: Ask, honest: Any) -> Any:
        if client == LIGHT:
            say = wire.devices[client].handle(ask)
            if say.answer is not None:
                answers.append((ask, say.answer))
            return wire.reply("", client, say)
        return honest()

    network.wire.twist = listen
    changes = {"algorithm": method, "codec": {"up": spec, "down": spec}, "proxy_per_round": 40, **MODELS}
    if method == "fedmd":
        changes["proxy"] = {"size": 100, "labelled": True}
    chosen = experiment(CLIENTS, rounds=2, **changes)
    assert [row["answered"] for row in rows(network.play(chosen, tmp_path / "run").folder)] == [CLIENTS] * 2
    site = network.runner(chosen).site
    assert site.proxy is not None and site.proxy_pool is not None and len(answers) == 2
    for ask, answer in answers:
        head = read_request(site, site.cards[LIGHT], ask.request)
        public = records(site.proxy_pool, head.ask).all()[0]
        net = PredictorNet(OnnxPredictor(network.kits[LIGHT].folder / "model.onnx", "probabilities"), 10, site.dtype)
        wanted = site.method.answer(
            net,
            View(private=None, public=public, classes=10),
            Heard(knowledge=head.knowledge, memory={}, round=ask.round),
        )
        got, envelope = site.codec_up.decode(answer, site.contract_up(site.cards[LIGHT], 40))
        assert (envelope.sender, envelope.round, envelope.examples) == (LIGHT, ask.round, 1.0)
        assert type(got) is type(wanted)
        tolerance = 2e-3 if spec == "float16" else 1e-5
        for name, value in wanted.tensors().items():
            torch.testing.assert_close(got.tensors()[name].to(value.dtype), value, rtol=tolerance, atol=tolerance)


ALONE = """
import base64, json, resource, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "sklearn", "scipy", "opacus", "matplotlib", "pandas", "ray"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, NoTorch())
from pathlib import Path
from fedkd.deploy.kit import ClientKit
from fedkd.deploy import doctor, node  # noqa: F401
from fedkd.deploy.device import Device
from fedkd.deploy.mail import Ask, pack_say
kit = ClientKit.read(Path(sys.argv[1]))
told = [finding for finding in doctor.diagnose(kit.folder) if finding.check == "data"]
device = Device(kit)
for line in sys.stdin:
    words = json.loads(line)
    words |= {name: base64.b64decode(words[name]) for name in ("request", "proxy") if words[name] is not None}
    say = device.handle(Ask(**words))
    pack_say(say, kit.node_key())
    print(json.dumps([say.kind, say.message, base64.b64encode(say.answer or b"").decode()]))
print(json.dumps([told[0].level, told[0].said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
assert "torch" not in sys.modules
"""


def test_it_needs_no_torch(network: Network, tmp_path: Path) -> None:
    """The same requests, answered by a process that cannot import torch, scikit-learn or scipy: the same bytes."""
    heard: list[tuple[Ask, Any]] = []

    def listen(wire: Wire, client: int, ask: Ask, honest: Any) -> Any:
        if client != LIGHT:
            return honest()
        say = wire.devices[client].handle(ask)
        heard.append((ask, say))
        return wire.reply("", client, say)

    network.wire.twist = listen
    network.play(experiment(CLIENTS, rounds=2, **MODELS), tmp_path / "run")
    assert [say.kind for _, say in heard] == ["needs", "answer", "answer"]
    folder = network.kits[LIGHT].folder
    for box in (folder / "state/runs").glob("*/outbox/*"):
        box.unlink()

    def plain(ask: Ask) -> str:
        words = {f.name: getattr(ask, f.name) for f in dataclasses.fields(ask)}
        return json.dumps(words, default=lambda data: base64.b64encode(data).decode())

    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder)],
        input="\n".join(plain(ask) for ask, _ in heard), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *lines, last = (json.loads(line) for line in done.stdout.splitlines())
    # The proxy set is there already this time.
    assert [kind for kind, *_ in lines] == ["answer"] * 3
    for (_, say), (_, _, body) in list(zip(heard, lines, strict=True))[1:]:
        assert base64.b64decode(body) == say.answer
    assert last[:2] == ["ok", "a model that only labels: OnnxPredictor"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": {"devices": "mlp"}}, "put 'own' at its place in models.devices"),
        ({"codec": {"up": "simplex:1"}, **MODELS}, "without torch speaks float16, float32, float64: codec.up"),
        ({"codec": {"down": "float32+deflate"}, **MODELS}, "codec.down is 'float32\\+deflate'"),
        ({"algorithm": "fd", "models": {"devices": "mlp"}}, "fd awaits LabelLogits: use a method of labels"),
        ({"algorithm": "fedavg", "models": {"devices": "mlp"}}, "use a method of labels"),
        (
            {"privacy": {"kind": "dp_sgd", "noise_multiplier": 1.0, "sampling_rate": 0.2}, "models": {"devices": "mlp"}},
            "neither DP-SGD nor secure sums",
        ),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused_in_words(
    changes: dict[str, Any], said: str, network: Network, tmp_path: Path
) -> None:
    network.wire.twist = alone
    row = rows(network.play(experiment(CLIENTS, rounds=1, **changes), tmp_path / "run").folder)[0]
    (found,) = [q for q in row["quarantined"] if q["reason"] != "test"]
    assert found["client"] == LIGHT and re.search(said, found["message"]), found


def test_its_policy_binds_the_server(network: Network, tmp_path: Path) -> None:
    network.wire.twist = alone
    network.play(experiment(CLIENTS, rounds=2, **MODELS), tmp_path / "run")
    ask = [ask for client, ask in network.wire.sent if client == LIGHT][-1]
    for box in network.kits[LIGHT].state.glob("runs/*/outbox/*"):
        box.unlink()
    for caps, said in (
        ({"max_proxy_samples": 99}, "the proxy set has 100 samples, this node's policy allows 99"),
        ({"max_rounds": 1}, "allows 1 rounds; the experiment has 2"),
        ({"min_cohort": 3}, "asks for 3 answers at least"),
        ({"require_privacy": True}, "asks for differential privacy"),
        ({"methods": ["fedmd"]}, "does not take part in method 'ds_fl'"),
        ({"proxy_sha256": "0" * 64}, "pins proxy set 0000000000000000"),
        ({"max_reply_bytes": 100}, "max_reply_bytes 100"),
        ({"max_request_bytes": 100}, "max_request_bytes 100"),
    ):
        (network.kits[LIGHT].folder / "policy.yaml").write_text(yaml.safe_dump(caps))
        say = Device(network.kits[LIGHT]).handle(ask)
        assert (say.kind, say.reason) == ("refused", "policy") and said in say.message, say
    (network.kits[LIGHT].folder / "policy.yaml").write_text("{}")
    assert Device(network.kits[LIGHT]).handle(ask).kind == "answer"


def test_a_request_that_is_none_is_refused(network: Network, tmp_path: Path) -> None:
    """Every cut, and every flipped byte of the head: an answer in words, never a crash, and never a wrong sample."""
    network.wire.twist = alone
    network.play(experiment(CLIENTS, rounds=2, proxy_per_round=40, **MODELS), tmp_path / "run")
    ask = [ask for client, ask in network.wire.sent if client == LIGHT][-1]
    device = Device(network.kits[LIGHT])
    whole = device.handle(ask)
    assert whole.answer is not None
    desk = device._desk[1] if device._desk else device._sit_down(ask)
    right, _ = desk.respond(ask)
    refused = 0
    for at in range(min(400, len(ask.request))):
        for bad in (ask.request[:at], ask.request[:at] + bytes([ask.request[at] ^ 0x41]) + ask.request[at + 1 :]):
            try:
                answer, _ = desk.respond(dataclasses.replace(ask, request=bad))
            except PayloadError:
                refused += 1
                continue
            assert answer is not None and right is not None and len(answer) >= len(right) - 16
    assert refused > 500


def test_models_that_do_not_fit_are_named(tmp_path: Path, model: LogisticRegression) -> None:
    path = write_onnx(tmp_path / "m.onnx", model)
    x = np.random.default_rng(0).random((300, 64), np.float32)
    wanted = model.predict_proba(x)
    np.testing.assert_allclose(OnnxPredictor(path, "probabilities").predict_proba(x), wanted, atol=1e-5)
    np.testing.assert_allclose(OnnxPredictor(path, "logits", "z").predict_proba(x), wanted, atol=1e-5)
    np.testing.assert_allclose(class_probabilities(model, x, 12)[:, :10], wanted, atol=2e-5)
    with pytest.raises(ConfigError, match="expected floats \\[N, C\\] called q"):
        OnnxPredictor(path, "logits", "q")
    (tmp_path / "no.onnx").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read as ONNX"):
        OnnxPredictor(tmp_path / "no.onnx", "logits")
    with pytest.raises(ConfigError, match="cannot read the model"):
        OnnxPredictor(tmp_path / "missing.onnx", "logits")
    for said, words in (
        ({"model": {"path": "a", "factory": "b:c"}}, "either `path`"),
        ({"model": {}}, "either `path`"),
        ({}, "either `data`"),
        ({"data": {"source": "digits"}, "model": {"path": "a"}}, "either `data`"),
    ):
        (tmp_path / "data.yaml").write_text(yaml.safe_dump(said))
        with pytest.raises(ConfigError, match=words):
            read_local_data(tmp_path / "data.yaml")
    for factory, words in (("no.such:thing", "cannot be imported"), ("pathlib:Path", "without predict_proba")):
        (tmp_path / "data.yaml").write_text(yaml.safe_dump({"model": {"factory": factory}}))
        with pytest.raises(ConfigError, match=words):
            read_local_data(tmp_path / "data.yaml").check(tmp_path)


def test_an_object_by_its_name(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_hospital.py").write_text(
        "import numpy as np\n"
        "class Model:\n"
        "    def predict_proba(self, x):\n"
        "        return np.full((len(x), 10), 0.1)\n"
        "def make():\n"
        "    return Model()\n"
        "made = Model()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    students = []
    for name in ("make", "made", "Model"):
        lighten(network, {"factory": f"my_hospital:{name}"})
        found = network.play(experiment(CLIENTS, rounds=1, **MODELS), tmp_path / name, token=name)
        assert rows(found.folder)[0]["answered"] == CLIENTS
        students.append(load_file(found.folder / simulate.STUDENT))
    for other in students[1:]:
        assert all(torch.equal(other[n], t) for n, t in students[0].items())


def test_a_simulation_has_no_own_models() -> None:
    from fedkd.site import Site

    with pytest.raises(ConfigError, match="'own', which is for devices of a real network"):
        Site.load(experiment(CLIENTS, **MODELS))


def test_a_client_that_trains_has_no_own_model(tmp_path: Path) -> None:
    network = Network(tmp_path / "net", CLIENTS, digits(CLIENTS))
    row = rows(network.play(experiment(CLIENTS, rounds=1, **MODELS), tmp_path / "run").folder)[0]
    assert row["answered"] == CLIENTS - 1 and "its data.yaml names none" in row["quarantined"][0]["message"]
