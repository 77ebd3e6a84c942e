"""The benchmark of the remote teacher, in a small form on the bundled digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulations.benchmarks import remote_teacher


@pytest.mark.slow
def test_it_answers_everything_and_pays_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_teacher, "BATCHES", (256,))
    path = tmp_path / "remote.json"
    remote_teacher.main(
        ["--data", "digits", "--model", "mlp", "--images", "1200", "--passes", "1", "--json", str(path)]
    )
    made = json.loads(path.read_text())
    assert made["rows"][0]["ratio"] > 0
    assert made["killed"]["paid_in_all"] == made["images"] > made["killed"]["paid_at_the_kill"]
