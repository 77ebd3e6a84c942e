"""The benchmark of many devices, in a small form on the bundled digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulations.benchmarks import scale

SMALL = ["--data", "digits", "--models", "logreg", "--passes", "1", "--device-rounds", "20"]


def test_growth_compares_like_with_like_and_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scale.json"
    scale.main([*SMALL, "--only", "growth", "--growth", "10,20", "--json", str(path)])
    growth = json.loads(path.read_text())["growth"]
    assert growth["ms_per_device_round_ratio"]["10"] == 1
    small, large = growth["passes"]["10"][0], growth["passes"]["20"][0]
    assert (small["rounds"], large["rounds"]) == (3, 2) and small["participation"] == 1
    # Every device is told and says the same among many as among few; float32 labels of 100 samples are 4 kB.
    per_device = [row["mb_up"] * 1e6 / row["device_rounds"] for row in (small, large)]
    assert per_device[0] == pytest.approx(per_device[1], rel=0.02) and 4000 < per_device[0] < 4600
    assert 0.1 < small["peak_gib"] < 4 and small["disk_gib"] > 0
    assert "devices" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_ask_a_share_and_all_and_a_row_over_the_limit_fails(tmp_path: Path) -> None:
    path = tmp_path / "scale.json"
    scale.main(
        [*SMALL, "--only", "runs", "--clients", "40", "--rounds", "3", "--full-rounds", "2", "--json", str(path)]
    )
    part, full = json.loads(path.read_text())["runs"]
    assert (part["device_rounds"], full["device_rounds"]) == (3 * 2, 2 * 40)
    assert part["disk_gib"] < full["disk_gib"], "devices that were not asked took room"
    with pytest.raises(SystemExit, match="a row failed"):
        scale.main([*SMALL, "--only", "runs", "--clients", "40", "--limit-gib", "0.05", "--json", str(path)])
