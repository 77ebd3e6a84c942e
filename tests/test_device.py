"""The stacked engine on a GPU: no test machine has one, so that what can be shown is that nothing stays behind.

torch's device ``meta`` has shapes and no values, and refuses to be mixed with the CPU as a GPU does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import assemble, assert_same, play
from torch import Tensor

from fedkd.engines import stacked
from fedkd.engines.stacked import StackedEngine
from fedkd.errors import ConfigError

CNN = "cnn(channels=[3, 4], features=16)"
MLP = "mlp(hidden=[16], dropout=0.3)"


def test_auto_and_cpu_are_the_same_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    raw = {"algorithm": "ds_fl", "rounds": 2}
    assert_same(play(raw, kind="stacked"), play({**raw, "runner": {"device": "auto"}}, kind="stacked"), 0.0)
    with pytest.raises(ConfigError, match="no GPU here"):
        play({**raw, "runner": {"device": "cuda"}}, kind="stacked")


@pytest.mark.parametrize(("method", "model"), [("ds_fl", CNN), ("fedproto", MLP), ("fedprox", CNN)])
def test_everything_that_a_step_touches_moves_to_the_gpu(
    method: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged batches, BatchNorm, dropout, Adam and momentum that persist; the second round has heard of the first."""
    optimizer = {"name": "adam", "persist": True} if model == CNN else {"momentum": 0.9, "persist": True}
    raw = {
        "algorithm": method,
        "rounds": 2,
        "models": {"student": model, "devices": [model]},
        "training": {"schedule": "cosine", "optimizer": optimizer},
    }
    again = assemble(raw, kind="stacked")
    monkeypatch.setattr(stacked, "device", lambda wanted, key: torch.device("meta"))
    engine = StackedEngine(again.site)
    seen: list[str] = []

    def train(phase: Any, tasks: list[Any]) -> None:
        before = [t.state for t in tasks]
        work = captured(engine, phase, tasks)
        assert {t.device.type for t in (*work.params.values(), *work.rest.values(), *work.state.values())} == {"meta"}
        total = engine._stepwise(work, again.site.architectures_of(tasks[0].card))
        assert total.device.type == "meta"
        seen.append(phase.name)
        for task, state in zip(tasks, before, strict=True):
            task.state = state

    def captured(engine: StackedEngine, phase: Any, tasks: list[Any]) -> Any:
        found: list[Any] = []

        class Enough(Exception):
            pass

        def take(work: Any) -> Tensor | None:
            found.append(work)
            raise Enough

        with monkeypatch.context() as patch:
            patch.setattr(engine, "_compiled", take)
            with pytest.raises(Enough):
                engine._train(phase, tasks)
        return found[0]

    inner: Any = again.runner.engine

    def both(phase: Any, tasks: list[Any]) -> None:
        for block in inner._blocks(phase.name, tasks):
            if any(len(t.private) for t in block):
                train(phase, block)
        StackedEngine.train(inner, phase, tasks)

    monkeypatch.setattr(inner, "train", both)
    again.rounds.play(again.progress, lambda *_: None)
    assert len(seen) >= 2
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(2) + torch.zeros(2, device="meta")
