"""Two terminals: one serves a teacher of the digits, the other distils from it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fedkd.cli.main import app
from fedkd.distill import ModuleTeacher
from fedkd.distill.run import start
from fedkd.errors import ConfigError
from fedkd.teacher.client import RemoteError, RemoteTeacher
from fedkd.teacher.kit import make_kit
from fedkd.teacher.policy import load_policy
from fedkd.teacher.service import TeacherService
from fedkd.teacher.sources import open_teacher


def test_a_remote_teacher_teaches_on_unlabelled_images(tmp_path: Path) -> None:
    """The README's demo, with a free port: train a teacher, serve it over TLS, distil from unlabelled pictures."""
    from PIL import Image
    from sklearn.datasets import load_digits

    from fedkd.distill.config import load

    ((_, teaching),) = load(None, ["teacher={model: mlp, training: {epochs: 8}}", "alone=false", "training.epochs=1"])
    start(teaching, tmp_path / "taught")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kit = tmp_path / "kit"
    tokens = make_kit(kit, ["localhost"], ["alice"], f"127.0.0.1:{port}")
    assert (kit / "server.key").stat().st_mode & 0o777 == 0o600 and tokens["alice"].stat().st_mode & 0o777 == 0o600
    command = [sys.executable, "-m", "fedkd", "teacher", "serve", str(tmp_path / "taught/teacher-1.safetensors")]
    server = subprocess.Popen(
        [*command, "--policy", str(kit / "policy.yaml")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        assert "serving soft labels of 10 classes" in server.stdout.readline()
        address = server.stdout.readline().strip()
        assert address.startswith(f"grpcs://localhost:{port}?ca=")
        pictures = tmp_path / "pictures"
        (pictures / "some").mkdir(parents=True)
        for i, image in enumerate(load_digits().images[:600]):
            Image.fromarray((image / 16 * 255).astype(np.uint8)).save(pictures / "some" / f"{i}.png")
        words = [
            f"teacher={address}",
            f"data={pictures}",
            "student=logreg",
            "training.epochs=15",
            "--out",
            str(tmp_path / "run"),
        ]
        done = CliRunner().invoke(app, ["distill", *words])
        assert done.exit_code == 0, (done.output, done.exception)
        summary = json.loads((tmp_path / "run/summary.json").read_text())
        assert summary["agreement"] > 0.9 and summary["accuracy"]["student"] is None
    finally:
        os.kill(server.pid, signal.SIGINT)
        out, err = server.communicate(timeout=30)
    assert "stopped" in out and server.returncode == 0
    answered = [json.loads(line)["log"] for line in err.splitlines() if '"answered"' in line]
    assert sum(a["charged"] for a in answered) <= 602 and "token" not in err


def test_teachers_that_say_too_little_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import numpy as np\nfrom sklearn.linear_model import LogisticRegression\n"
        "def make():\n    rng = np.random.default_rng(0)\n"
        "    return LogisticRegression().fit(rng.normal(size=(60, 64)), np.arange(60) % 10)\n"
        "def wrong():\n    return 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    teacher, shape = open_teacher(["mine:make"], None, (1, 8, 8), None)
    assert teacher.classes == 10 and shape == (1, 8, 8)
    both, _ = open_teacher(["mine:make", "mine:make"], None, (1, 8, 8), 10)
    assert both.classes == 10
    for names, more, says in (
        (["mine:make"], None, "--shape"),
        (["mine:wrong"], (1, 8, 8), "predict_proba"),
        (["mine:gone"], (1, 8, 8), "cannot be imported"),
        (["gone.safetensors"], None, "cannot read"),
        (["mine:make"], (2, 2), r"cannot answer inputs \[2, 2\] with 10 classes: X has 4 features"),
    ):
        with pytest.raises(ConfigError, match=says):
            open_teacher(names, None, more, None)
    with pytest.raises(ConfigError, match="with 7 classes: predict_proba gave 10 columns"):
        open_teacher(["mine:make"], None, (1, 8, 8), 7)
    with pytest.raises(ConfigError, match="not empty"):
        make_kit(tmp_path, ["localhost"], ["a"], "127.0.0.1:1")


def test_a_kit_for_mutual_tls_is_ready_to_be_served(taught: ModuleTeacher, tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    done = CliRunner().invoke(app, ["teacher", "init", str(kit), "--caller", "bob", "--caller", "eve", "--mutual",
                                    "--listen", "127.0.0.1:0"])  # fmt: skip
    assert done.exit_code == 0 and "bob.crt and .key" in done.output
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in kit.glob("certificates/*.key"))
    with TeacherService(taught, (1, 8, 8), load_policy(kit / "policy.yaml")) as service:

        def ask(token: str, certificate: str) -> int:
            pair = f"&cert={kit}/certificates/{certificate}.crt&key={kit}/certificates/{certificate}.key"
            remote = RemoteTeacher(f"grpcs://localhost:{service.port}?ca={kit}/ca.crt&token={kit}/tokens/{token}{pair}")
            return len(remote.logits(torch.rand(2, 1, 8, 8)))

        assert ask("bob", "bob") == 2
        with pytest.raises(RemoteError, match="unauthenticated"):
            ask("bob", "eve")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--caller", "../bob"], "name"),
        (["--caller", "bob", "--caller", "bob"], "two callers have one name"),
        (["--listen", "0.0.0.0"], "expected address:port"),
        (["--listen", "0.0.0.0:70000"], "expected address:port"),
    ],
)
def test_a_kit_that_cannot_be_meant_is_not_begun(words: list[str], says: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["teacher", "init", str(tmp_path / "kit"), *words])
    said = f"{done.output}{done.exception}"
    assert done.exit_code != 0 and says in said and "pydantic" not in said and not (tmp_path / "kit").exists()


def test_a_file_that_takes_one_input_at_a_time_is_refused_before_it_is_served(
    taught: ModuleTeacher, tmp_path: Path
) -> None:
    file = tmp_path / "one.onnx"
    torch.onnx.export(
        taught.module.eval(), (torch.rand(1, 1, 8, 8),), file, dynamo=True, external_data=False, verbose=False
    )
    with pytest.raises(ConfigError, match=r"one\.onnx cannot answer a batch of 2 inputs"):
        open_teacher([str(file)], None, None, None)
