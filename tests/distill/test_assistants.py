"""Assistants: nets of sizes in between are found, and `fedkd distill` teaches through them."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedkd.cli.main import app
from fedkd.distill.assistants import STEP, between, scaled, size
from fedkd.errors import ConfigError

IMAGE = (1, 28, 28)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("mlp(hidden=[1200])", "mlp(hidden=[12])"),
        ("lenet(width=3)", "lenet_half"),
        ("mlp(hidden=[300, 200])", "cnn(channels=[2, 3], features=8)"),
        ("cnn(channels=[16, 32], features=512)", "logreg"),
    ],
)
def test_sizes_fall_evenly(teacher: str, student: str) -> None:
    names = between(teacher, student, IMAGE, 10)
    sizes = [size(n, IMAGE, 10) for n in (teacher, *names, student)]
    assert names and sizes == sorted(sizes, reverse=True)
    ratios = [math.log(a / b) for a, b in itertools.pairwise(sizes)]
    assert max(ratios) < math.log(STEP) + 0.3, "no step is much larger than the largest allowed"
    assert max(ratios) - min(ratios) < 0.6, "and all are about alike"


def test_what_cannot_be_scaled_is_told() -> None:
    assert scaled("lenet_half", 2) == "lenet(width=1.0)" and scaled("logreg", 2) is None
    assert between("mlp(hidden=[20])", "mlp(hidden=[12])", IMAGE, 10) == [], "no gap to bridge"
    with pytest.raises(ConfigError, match="name them"):
        between(10**6, "logreg", IMAGE, 10)


def test_the_command_teaches_through_assistants(tmp_path: Path) -> None:
    words = ["teacher={model: 'mlp(hidden=[128])', training: {epochs: 2}}", "student=mlp(hidden=[4])"]
    words += ["training.epochs=2", "terms=[{loss: ce, weight: 0.1}, {loss: kd, temperature: 2}]", "alone=false"]
    place = tmp_path / "run"
    done = CliRunner().invoke(app, ["distill", *words, "--assistants", "auto", "--out", str(place)])
    assert done.exit_code == 0, done.output
    summary = json.loads((place / "summary.json").read_text())
    found = summary["assistants"]
    sizes = [summary["parameters"]["teacher"], *(a["parameters"] for a in found), summary["parameters"]["student"]]
    assert len(found) >= 1 and sizes == sorted(sizes, reverse=True)
    assert all(0 <= a["accuracy"] <= 1 for a in found) and "assistant" in done.output
    assert (place / "assistant-1.safetensors").is_file()
    one = CliRunner().invoke(
        app, ["distill", *words, "--assistants", "mlp(hidden=[32]); mlp(hidden=[16])", "--out", str(tmp_path / "b")]
    )
    assert one.exit_code == 0, one.output
    named = [a["model"] for a in json.loads((tmp_path / "b/summary.json").read_text())["assistants"]]
    assert named == ["mlp(hidden=[32])", "mlp(hidden=[16])"]
