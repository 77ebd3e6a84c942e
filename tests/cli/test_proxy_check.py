"""The figures of a proxy set mean what the page says, and tell a good set from a bad one."""

from __future__ import annotations

import math

import pytest
import torch

from fedkd.proxy_check import FIGURES, check, figures


def test_figures_of_certain_ambiguous_and_one_sided_answers() -> None:
    flags = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]])
    certain = torch.eye(4).double().expand(2, 4, 4)
    found = figures(certain, flags)
    assert {k: float(v) for k, v in found.items()} == pytest.approx(
        {"information": 1, "coverage": 1, "confidence": 1, "disagreement": 0, "selected": 0.5, "devices": 0.75}
    )
    flat = figures(torch.full((2, 4, 4), 0.25).double(), flags)
    assert float(flat["information"]) == pytest.approx(0) and float(flat["confidence"]) == 0.25
    same = torch.zeros(2, 4, 4).double()
    same[..., 0] = 1
    one = figures(same, flags)
    assert float(one["information"]) == 0 and float(one["coverage"]) == 0.25
    apart = same.clone()
    apart[1] = apart[1].roll(1, -1)  # each device is certain of another class
    assert float(figures(apart, flags)["disagreement"]) == pytest.approx(math.log(2) / math.log(4))


def test_real_inputs_tell_more_than_noise() -> None:
    raw = {
        "data": {"source": "digits", "train_size": 400},
        "partition": {"clients": 4, "alpha": 1.0},
        "models": {"student": "mlp(hidden=[16])", "devices": "mlp(hidden=[16])"},
        "training": {"steps": 40},
    }
    real, noise = (check({**raw, "proxy": {"kind": kind, "size": 60}}) for kind in ("holdout", "noise"))
    assert set(real) == set(FIGURES)
    assert real["information"] > 2 * noise["information"] and real["selected"] > noise["selected"]
