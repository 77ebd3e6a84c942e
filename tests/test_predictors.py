"""Clients that only answer ``predict_proba``, good and bad, and what a fault of one device does to the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from test_interruptions import TINY
from test_simulate import experiment, rows
from user_models import Elsewhere

from fedkd import simulate
from fedkd.algorithms.base import Phase
from fedkd.engines.base import SerialEngine, Task
from fedkd.engines.stacked import StackedEngine
from fedkd.payloads import Logits, Nothing, SoftLabels
from fedkd.predictors import learn, probabilities_of
from fedkd.privacy.build import LEDGER
from fedkd.privacy.ledger import Ledger
from fedkd.seeding import key

NET = "mlp(hidden=[8])"
GOOD = ["user_models:Elsewhere", "user_models:ELSEWHERE", "user_models:Silent"]
BAD = {
    "user_models:Refuses": "the licence has ended",
    "user_models:GivesNaN": "NaN",
    "user_models:TooWide": "11 columns",
}


@pytest.mark.parametrize("kind", ["serial", "stacked"])
def test_bad_clients_are_told_and_the_others_go_on(kind: str, tmp_path: Path) -> None:
    devices = [NET, *GOOD, *BAD, NET]
    more = {
        **TINY,
        "dtype": "float64",
        "models": {"student": NET, "devices": devices},
        "partition": {"clients": len(devices), "kind": "iid"},
        "runner": {"kind": kind, "threads": 1},
    }
    done = simulate.start(experiment("ds_fl", **more), tmp_path / "run")
    for row in rows(done.folder):
        assert row["answered"] == 5 and row["failed"] is None
        assert [q["client"] for q in row["quarantined"]] == [4, 5, 6]
        for told, said in zip(row["quarantined"], BAD.values(), strict=True):
            assert said in told["message"] and told["reason"] == "device"
    accuracy = [c["accuracy"] for c in done.summary["per_client"]]
    assert accuracy[1] == accuracy[2], "the class and the object are the same"
    assert all(a is not None for a in accuracy) and accuracy[3] > 0.3


@pytest.mark.parametrize("method", ["ds_fl", "fedmd"])
def test_a_client_without_gradients_is_scored_by_what_it_last_learnt(method: str, tmp_path: Path) -> None:
    """Its own records, and the teacher's labels: fitted here anew, from what the server said."""
    name = "sklearn.linear_model:LogisticRegression(max_iter=60)"
    more = {
        **TINY,
        "proxy": {"size": 30, "labelled": True},
        "models": {"student": NET, "devices": [NET, name]},
        "partition": {"clients": 6, "alpha": 0.2},
    }
    wanted = experiment(method, **more)
    done = simulate.start(wanted, tmp_path / "run")
    site = simulate.Site.load(wanted)
    assert site.proxy_pool is not None and site.test.y is not None
    seen: dict[str, Any] = {}
    # What the devices were taught in the last round is what the server knew after the one before.
    half = simulate.start(experiment(method, **{**more, "rounds": 1}), tmp_path / "half")
    checkpoint = next((half.folder / "checkpoints").iterdir())
    progress = simulate._restore(site, simulate.LocalRunner(site, SerialEngine(site)), half.folder)
    assert progress is not None and checkpoint.is_dir()
    taught = probabilities_of(progress.state.knowledge)
    assert taught is not None and len(taught) == 20
    proxy = site.proxy_pool.take(torch.from_numpy(progress.state.asked)).flatten(1).numpy()
    test = site.test.take(torch.arange(len(site.test))).flatten(1).numpy()
    for k in (1, 3, 5):
        x, y = (t.flatten(1).numpy() if t.ndim > 1 else t.numpy() for t in site.private(k).all() if t is not None)
        model = LogisticRegression(max_iter=60, random_state=key(1, "predictor", k) % 2**32)
        top = taught.max(-1)
        weight = np.concatenate([np.ones(len(y)), top.values.double().numpy()])
        model.fit(np.concatenate([x, proxy]), np.concatenate([y, top.indices.numpy()]), weight)
        seen[str(k)] = float((model.predict(test) == site.test.y.numpy()).mean())
    found = {str(c["client"]): c for c in done.summary["per_client"] if c["client"] in (1, 3, 5)}
    assert {k: c["accuracy"] for k, c in found.items()} == pytest.approx(seen)
    assert any(c["accuracy"] != c["local_only"] for c in found.values()), "the teacher makes a difference"


def test_learn_takes_objects_as_they_come() -> None:
    x, y = np.zeros((4, 2)), np.array([0, 1, 0, 1])
    ready = Elsewhere()
    assert learn(ready, (x, y), None, None) is ready
    assert probabilities_of(Nothing()) is None
    scores = torch.tensor([[1.0, 3.0]])
    told = probabilities_of(Logits(logits=scores))
    assert told is not None and torch.equal(told, scores.softmax(-1))
    assert probabilities_of(SoftLabels(labels=told)) is told


# ---- torch devices --------------------------------------------------------------------------------------------------
@pytest.fixture
def third_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make whatever trains device 2 by plain steps fail, alone or in a block."""
    for engine in (SerialEngine, StackedEngine):
        real = engine.train

        def train(self: Any, phase: Phase, tasks: Sequence[Task], real: Any = real) -> None:
            real(self, phase, tasks)
            if any(task.card.id == 2 for task in tasks):
                raise RuntimeError("out of memory")

        monkeypatch.setattr(engine, "train", train)


@pytest.mark.parametrize("kind", ["serial", "stacked"])
def test_an_error_of_one_device_stays_with_it(kind: str, tmp_path: Path, third_fails: None) -> None:
    more = {**TINY, "evaluation": {"local_only": False}, "runner": {"kind": kind, "threads": 1}}
    done = simulate.start(experiment("ds_fl", **more), tmp_path / "run")
    for row in rows(done.folder):
        assert [(q["client"], q["reason"]) for q in row["quarantined"]] == [(2, "device")]
        assert "RuntimeError: out of memory" in row["quarantined"][0]["message"]
        assert row["answered"] == 5 and row["failed"] is None


def test_devices_are_charged_once_where_one_of_their_block_fails(tmp_path: Path, third_fails: None) -> None:
    private = {"kind": "dp_sgd", "noise_multiplier": 1.0, "sampling_rate": 0.3, "seeded": True}
    done = simulate.start(experiment("ds_fl", **TINY, privacy=private), tmp_path / "run")
    assert [row["answered"] for row in rows(done.folder)] == [6, 5], "round 0 has no labels to digest"
    entries = Ledger(done.folder / LEDGER).entries
    charged = Counter((device, entry.round, entry.what) for entry in entries for device in entry.devices)
    assert {device for device, *_ in charged} == set(range(6)) and max(charged.values()) == 1
