"""The throughput benchmark runs, ends its processes, and writes what it promises. No time is ever asserted here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
WORK_FILE = ROOT / "simulations" / "benchmarks" / "throughput_work.py"


def load_work() -> Any:
    spec = importlib.util.spec_from_file_location("throughput_work", WORK_FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["throughput_work"] = module
    spec.loader.exec_module(module)
    return module


work = load_work()


def bench(*options: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "simulations.benchmarks.throughput", *options]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True, timeout=540
    )


def processes(mark: str) -> list[str]:
    """Command lines that mention ``mark``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if mark in text:
            found.append(text)
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("q")
    out = folder / "deep" / "throughput.json"
    done = bench(
        "--quick", "--models=logreg", "--skip=flower", f"--out={out}", "--pfl-python=/nowhere/python",
        environment={"TMPDIR": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert not processes(str(folder)), "contenders are still running"
    left = [p.name for p in folder.iterdir() if p != out.parent and not p.name.startswith("torchinductor")]
    assert not left, "files are left behind"
    found: dict[str, Any] = json.loads(out.read_text())
    found["printed"] = done.stdout
    return found


def test_json_says_where_and_how(quick: dict[str, Any]) -> None:
    assert quick["quick"] and quick["seed"] == 1 and quick["passes"] == 1
    assert quick["machine"]["cores"] == os.cpu_count()
    assert quick["versions"]["torch"] == torch.__version__
    assert {"before", "after"} == quick["load"].keys()
    assert all(value > 0 for value in quick["gemm_gflops"].values())


def test_json_holds_every_contender_or_why_not(quick: dict[str, Any]) -> None:
    made = quick["models"]["logreg"]
    assert made["contenders"].keys() == {"loop", "serial", "stacked"}
    assert made["skipped"].keys() == {"flower", "flower_blocks", "pfl_1", "pfl_2"}
    assert "/nowhere/python" in made["skipped"]["pfl_2"]
    assert "skipped" in quick["printed"]
    for contender in made["contenders"].values():
        low, high = contender["spread"]
        assert low <= contender["client_rounds_per_second"] <= high
        assert contender["startup_seconds"] > 0 and contender["warm_up_seconds"] >= 0
        assert contender["memory_bytes"] > 0 and contender["share_of_gemm"] > 0
    assert made["ratios"].keys() == {"loop", "serial"}
    assert [p["rates"].keys() for p in made["passes"]] == [{"loop", "serial", "stacked"}]


def test_all_did_the_same_work_with_the_same_result(quick: dict[str, Any]) -> None:
    checks = quick["models"]["logreg"]["checks"]
    assert checks["wanted"] == {"steps": 20, "samples": 640, "answered": 320}
    assert checks["same_work"] == {"loop": True, "serial": True, "stacked": True}
    assert checks["float64_apart"].keys() == {"stacked - serial", "plain - serial"}
    assert all(value <= 1e-9 for value in checks["float64_apart"].values())
    assert checks["float32_apart"]["stacked - serial"] <= 1e-4
    assert checks["float32_apart"]["pfl_1 - loop"] is None


def test_cost_against_devices(quick: dict[str, Any]) -> None:
    devices = quick["devices"]["devices"]
    assert devices.keys() == {"5", "10", "20"}
    assert all(one["same_work"] and one["seconds_per_device_round"] > 0 for one in devices.values())
    assert devices["20"]["state_bytes"] == 4 * (64 * 128 + 128 + 128 * 10 + 10)
    assert any("device-round" in one["what"] for one in quick["must_show"])


@pytest.mark.parametrize(
    ("model", "layers"),
    # (multiplications per sample, whether the layer's inputs need a gradient)
    [
        ("logreg", [(64 * 10, False)]),
        ("mlp", [(64 * 128, False), (128 * 10, True)]),
        (
            "lenet",
            [
                (28 * 28 * 25 * 6, False),
                (10 * 10 * 25 * 6 * 16, True),
                (400 * 120, True),
                (120 * 84, True),
                (840, True),
            ],
        ),
    ],
)
def test_flops_are_counted_exactly(model: str, layers: list[tuple[int, bool]]) -> None:
    trained, answered = work.RECORDS + work.PROXY, work.PROXY
    wanted = sum(2 * size * (trained * (3 if inner else 2) + answered) for size, inner in layers)
    assert work.flops(work.SETTINGS[model]) == wanted


@pytest.mark.parametrize("model", list(work.SETTINGS))
def test_plain_models_are_fedkds(model: str) -> None:
    from fedkd.models import Architecture

    setting = work.SETTINGS[model]
    architecture = Architecture(model, setting.shape, work.CLASSES, torch.float32)
    start = architecture.initial(3)
    plain = work.Classifier(setting)
    plain.load_state_dict(start)
    x = torch.randn(4, *setting.shape)
    assert torch.allclose(plain(x), architecture.module(start)(x), atol=1e-6)


def test_unknown_names_are_refused() -> None:
    done = bench("--models=resnet")
    assert done.returncode == 2 and "resnet" in done.stderr and "lenet" in done.stderr


@pytest.mark.slow
def test_with_flower_and_pfl(tmp_path: Path) -> None:
    """Flower always, pfl-research where FEDKD_PFL_PYTHON names an interpreter that has it."""
    out = tmp_path / "t.json"
    done = bench("--quick", "--models=mlp", "--skip=crowds", f"--out={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads(out.read_text())["models"]["mlp"]
    expected = {"loop", "serial", "stacked", "flower", "flower_blocks"}
    if os.environ.get("FEDKD_PFL_PYTHON"):
        expected |= {"pfl_1", "pfl_2"}
    assert made["contenders"].keys() == expected
    assert all(made["checks"]["same_work"].values())
    assert all(value is None or value <= 1e-4 for value in made["checks"]["float32_apart"].values())
