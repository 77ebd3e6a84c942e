"""Memory and start of a client that only labels, without torch: ``python -m simulations.benchmarks.light_client``.

For each kind of model a process of its own loads a kit as ``fedkd client start`` does, with torch out of reach, and labels
the proxy samples of a round (digits, as many as ``--samples``). Printed are medians over ``--repeats``: seconds until it
could ask for work, resident memory then, its peak after it has labelled, seconds per 1,000 labels, and the share of test
digits that the model gets right. The int8 model is the float one under static QDQ quantisation per channel.

It needs the extra ``dev``.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from fedkd.deploy.mail import Ask, key_of
from fedkd.deploy.network import Member, NetworkRunner
from fedkd.deploy.provision import provision
from fedkd.deploy.sites import server_site
from fedkd.experiment import validate
from fedkd.messages import write_request
from fedkd.payloads import Nothing

CHILD = """
import sys, time
began = time.perf_counter()
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is not installed here")
sys.meta_path.insert(0, NoTorch())
import base64, json, os
from pathlib import Path
from fedkd.deploy.device import Device
from fedkd.deploy.kit import ClientKit
from fedkd.deploy.mail import Ask, pack_say
from fedkd.deploy.node import Node
from fedkd.deploy.supervise import rss_bytes
kit = ClientKit.read(Path(sys.argv[1]))
device = Device(kit)
node = Node(kit, device, max_request_bytes=10**8, max_bytes_per_day=10**10)
start, idle = time.perf_counter() - began, rss_bytes(os.getpid())
words = json.loads(sys.stdin.read())
words |= {name: base64.b64decode(words[name]) for name in ("request", "proxy")}
ask = Ask(**words)
words = None
device._proxy(ask)
began = time.perf_counter()
say = device.handle(ask)
labelled = time.perf_counter() - began
assert say.kind == "answer", say
pack_say(say, kit.node_key())
print(json.dumps([start, idle, int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024, labelled,
    base64.b64encode(say.answer).decode()]))
"""


def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return all digits as fedkd gives them to models: pixels in steps of 1/255."""
    x, y = load_digits(return_X_y=True)
    return (np.rint(x / 16 * 255) / 255).astype(np.float32), y


def write_onnx(path: Path, model: MLPClassifier) -> None:
    """Write a perceptron of one hidden layer as ONNX: images in, logits out."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "w0"], ["a0"]),
        helper.make_node("Add", ["a0", "b0"], ["z0"]),
        helper.make_node("Relu", ["z0"], ["h"]),
        helper.make_node("MatMul", ["h", "w1"], ["a1"]),
        helper.make_node("Add", ["a1", "b1"], ["z"]),
    ]
    weights = {f"w{n}": w for n, w in enumerate(model.coefs_)} | {f"b{n}": b for n, b in enumerate(model.intercepts_)}
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))


def quantise(path: Path, to: Path, x: NDArray[np.float32]) -> None:
    """Write the int8 form of an ONNX file, its ranges taken from ``x``."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [x[at : at + 50].reshape(-1, 1, 8, 8) for at in range(0, 500, 50)]

        def get_next(self) -> dict[str, Any] | None:
            return {"x": self.left.pop()} if self.left else None

    quantize_static(
        str(path), str(to), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def request(kits: Path, samples: int) -> tuple[Ask, NDArray[np.int64]]:
    """Return a server's first request to client 0, and the true labels of the samples that it asks for."""
    chosen = validate(
        {
            "name": "light", "rounds": 1, "partition": {"clients": 1}, "models": {"devices": "own"},
            "data": {"source": "digits", "test_fraction": 0.01}, "proxy": {"size": samples, "labelled": True},
        }
    )  # fmt: skip
    site = server_site(chosen, 1)
    assert site.proxy is not None and site.proxy.y is not None
    runner = NetworkRunner(site, None, {0: Member(0, "a", None, b"")}, "light.t")  # type: ignore[arg-type]
    asked = np.arange(samples, dtype=np.int64)
    body, _ = write_request(site, "light.t", 0, Nothing(), asked[:0], asked, None)
    key = key_of("light.t", 0, 0, -1, runner.outline, body)
    ask = Ask(run="light.t", client=0, round=0, key=key, experiment=runner.outline, request=body, proxy=runner.proxy)
    return ask, site.proxy.y


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    x, y = digits()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        project = {"project": "light", "server": {"host": "127.0.0.1"}, "clients": ["a"]}
        (folder / "project.yaml").write_text(yaml.safe_dump(project))
        provision(folder / "project.yaml", folder / "kits")
        kit = folder / "kits/a"
        model = MLPClassifier((64,), max_iter=200, random_state=1, early_stopping=True).fit(x, y)
        write_onnx(kit / "float.onnx", model)
        quantise(kit / "float.onnx", kit / "int8.onnx", x)
        linear = LogisticRegression(C=0.1, max_iter=500).fit(x, y)
        np.savez(folder / "linear.npz", w=linear.coef_, b=linear.intercept_)
        (folder / "edge.py").write_text(
            "from pathlib import Path\nimport numpy as np\n"
            "def numpy_model():\n"
            "    told = np.load(Path(__file__).with_name('linear.npz'))\n"
            "    class Model:\n"
            "        def predict_proba(self, x):\n"
            "            z = x @ told['w'].T + told['b']\n"
            "            e = np.exp(z - z.max(1, keepdims=True))\n"
            "            return e / e.sum(1, keepdims=True)\n"
            "    return Model()\n"
            "def sklearn_model():\n"
            "    from sklearn.linear_model import LogisticRegression\n"
            "    told, model = np.load(Path(__file__).with_name('linear.npz')), LogisticRegression()\n"
            "    model.coef_, model.intercept_, model.classes_ = told['w'], told['b'], np.arange(10)\n"
            "    return model\n"
        )
        ask, truth = request(folder / "kits", options.samples)
        words = {f.name: getattr(ask, f.name) for f in dataclasses.fields(ask)}
        sent = json.dumps(words, default=lambda data: base64.b64encode(data).decode())
        models = {
            "ONNX float32": {"path": "float.onnx", "gives": "logits"},
            "ONNX int8 (QDQ)": {"path": "int8.onnx", "gives": "logits"},
            "numpy, by predict_proba": {"factory": "edge:numpy_model"},
            "scikit-learn": {"factory": "edge:sklearn_model"},
        }
        print(f"{'model':<24} {'start s':>8} {'idle MB':>8} {'peak MB':>8} {'s per 1000':>11} {'right %':>8}")
        for name, said in models.items():
            (kit / "data.yaml").write_text(yaml.safe_dump({"model": said}))
            found = [_measure(kit, sent, folder) for _ in range(options.repeats)]
            start, idle, peak, labelled = (statistics.median(f[n] for f in found) for n in range(4))
            right = 100 * float((_labels(found[0][4], len(truth)).argmax(1) == truth).mean())
            print(
                f"{name:<24} {start:>8.2f} {idle / 1e6:>8.0f} {peak / 1e6:>8.0f} {1000 * labelled / len(truth):>11.3f} "
                f"{right:>8.1f}"
            )


def _measure(kit: Path, sent: str, folder: Path) -> tuple[float, float, float, float, str]:
    for box in (kit / "state").glob("runs/*/outbox/*"):
        box.unlink()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(folder), str(Path.cwd())])}
    done = subprocess.run([sys.executable, "-c", CHILD, str(kit)], input=sent, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(done.stderr)
    start, idle, peak, labelled, answer = json.loads(done.stdout)
    return start, idle, peak, labelled, answer


def _labels(answer: str, count: int) -> NDArray[np.float32]:
    from fedkd.wire import read_head

    return np.frombuffer(read_head(base64.b64decode(answer)).body, "<f4").reshape(count, 10)


if __name__ == "__main__":
    main()
