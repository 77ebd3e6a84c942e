"""Four hospitals as four natural clients: a linear model, a net, and clients that only answer ``predict_proba``."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fedkd import simulate
from fedkd.experiment import load

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("FEDKD_DATA", ROOT.parent / "shared" / "data")) / "heart_disease"


@pytest.mark.skipif(not DATA.is_dir(), reason="the heart disease files are not here")
def test_hospitals_with_different_learners_teach_one_student(tmp_path: Path) -> None:
    ((_, experiment),) = load(ROOT / "simulations/heart-disease.yaml", [f"data.path={DATA}"])
    done = simulate.start(experiment, tmp_path / "run")
    names = {client["architecture"] for client in done.summary["per_client"]}
    assert len(names) >= 3 and any(name.startswith("sklearn.") for name in names)
    assert done.summary["notes"] == [], "no answer was quarantined, no round failed"
    assert all(0.3 < client["local_only"] <= 1 for client in done.summary["per_client"])
    test = simulate.Site.load(experiment).test.y
    assert test is not None
    majority = np.bincount(test.numpy()).max() / len(test)
    assert done.summary["accuracy"]["student"] > majority + 0.05
