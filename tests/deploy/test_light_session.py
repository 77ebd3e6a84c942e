"""A client that cannot import torch, in a real federation over TLS beside two that train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from session import ROOT, ended, project, shell
from test_light import fitted, write_onnx

pytestmark = pytest.mark.slow


def test_a_light_client_takes_part_over_tls(tmp_path: Path) -> None:
    project(ROOT / "server/digits-trial.yaml", tmp_path)
    (tmp_path / "without/torch").mkdir(parents=True)
    (tmp_path / "without/torch/__init__.py").write_text("raise ImportError('torch is not installed here')\n")
    with ended(tmp_path):
        shell("fedkd provision server/digits-trial.yaml && fedkd server start kits/server", tmp_path)
        shell("fedkd client start kits/hospital-a && fedkd client start kits/hospital-b", tmp_path)
        kit = tmp_path / "kits/hospital-c"
        write_onnx(kit / "model.onnx", fitted())
        (kit / "data.yaml").write_text("model: {path: model.onnx}\n")
        subprocess.run(
            [sys.executable, "-m", "fedkd", "client", "start", str(kit)], check=True, timeout=120,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "without"), str(ROOT)])},
        )  # fmt: skip
        experiment = ROOT / "simulations/digits-trial.yaml"
        said = shell(f"fedkd run {experiment} rounds=2 'models.devices=[mlp,mlp,own]' --on kits/server", tmp_path)
        run = tmp_path / "kits/server/state/runs/digits-trial"
        rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
        assert [(row["answered"], row["failed"], row["quarantined"]) for row in rows] == [(3, None, [])] * 2, said
        status = json.loads(shell("fedkd client status kits/hospital-c --json", tmp_path))
        assert status["running"] and status["rss_bytes"] < 200e6
