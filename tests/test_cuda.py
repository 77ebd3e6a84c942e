"""What a GPU computes; left out where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import assert_same, play

from fedkd.distill.config import load
from fedkd.distill.run import resume, start

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CNN = "cnn(channels=[3, 4], features=16)"


@pytest.mark.parametrize(("method", "model"), [("ds_fl", CNN), ("fedproto", "mlp(hidden=[16])"), ("fedprox", CNN)])
def test_devices_stacked_on_a_gpu_learn_as_on_the_processor(method: str, model: str) -> None:
    raw = {"algorithm": method, "rounds": 2, "models": {"student": model, "devices": [model]}}
    assert_same(play(raw, kind="stacked"), play({**raw, "runner": {"device": "cuda"}}, kind="stacked"), 1e-3)


@pytest.mark.parametrize("method", ["dfad", "dafl", "zskt", "deepinversion", "cmi", "fast", "noise"])
def test_a_student_learns_without_data_on_a_gpu_and_goes_on_after_an_interruption(method: str, tmp_path: Path) -> None:
    words = [f"teacher={{model: '{CNN}', training: {{epochs: 2}}}}", "training.epochs=1", "alone=false", "device=cuda"]
    start(load(None, words)[0][1], tmp_path / "teacher")
    teacher = tmp_path / "teacher/teacher-1.safetensors"
    words = [f"teacher={teacher}", f"student={CNN}", "data=none", "device=cuda", "training.epochs=3"]
    words += [f"method={method}", "method.batch_size=32", "method.makes_per_epoch=2", "method.student_steps=2"]
    words += [f"method.{name}" for name in {"noise": [], "deepinversion": ["steps=3"]}.get(method, ["width=8"])]
    ((_, experiment),) = load(None, words)
    whole = start(experiment, tmp_path / "whole").summary

    def stop(stage: str, epoch: object, epochs: int) -> None:
        if epoch.epoch == 1:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(experiment, tmp_path / "cut", stop)
    again = resume(tmp_path / "cut").summary
    assert again["queries"] == whole["queries"] > 0
    for one, other in zip(again["log"], whole["log"], strict=True):
        assert one["total"] == pytest.approx(other["total"], rel=0.2)  # a GPU adds up in no fixed order
