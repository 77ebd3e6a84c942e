"""A real server and its nodes under kill -9: runs resume, and end with the undisturbed run's student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulations.benchmarks.soak import main


@pytest.mark.slow
def test_killed_runs_end_with_the_undisturbed_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Seed 98 draws a node, the power cut, SuperLink and the run's own process first.
    words = ["--kills", "5", "--seed", "98", "--rounds", "5", "--minutes", "15"]
    main([*words, "--work", str(tmp_path / "soak"), "--json", str(tmp_path / "soak.json")])
    found = json.loads((tmp_path / "soak.json").read_text())
    assert {kill["victim"] for kill in found["kills"]} >= {"power cut", "node", "superlink", "run"}
    calm, *disturbed = found["runs"]
    assert calm["launches"] == 1 and sum(run["launches"] - 1 for run in disturbed) > 0
    for run in found["runs"]:
        assert run["difference"] < 1e-4 and run["same_rows"] and run["quarantined"] == 0, run
        assert run["answers_counted"] == 15
    assert "largest difference from the undisturbed student" in capsys.readouterr().out
