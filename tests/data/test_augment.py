"""Augmentation: what it does to inputs, and that runners, stacks and resumes cannot change it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from harness import CNN, assert_same, leftovers, merged, play

from fedkd.algorithms.base import Phase
from fedkd.data.augment import Draws, apply, draw, join
from fedkd.data.config import AugmentConfig
from fedkd.engines.base import Augmenter
from fedkd.errors import ConfigError
from fedkd.experiment import validate

X = torch.arange(2 * 3 * 5 * 7, dtype=torch.float64).view(2, 3, 5, 7)


def drawn(**known: Any) -> Draws:
    return Draws(**{**dict.fromkeys(("shift", "flip", "corner", "noise")), **known})


def test_flip_mirrors_columns_of_the_drawn_records_alone() -> None:
    out = apply(AugmentConfig(flip=True), X, drawn(flip=np.array([True, False])))
    assert torch.equal(out[0], X[0].flip(-1)) and torch.equal(out[1], X[1])


def test_crop_shifts_and_repeats_the_edge() -> None:
    out = apply(AugmentConfig(crop=2), X, drawn(shift=np.array([[1, -2], [0, 0]])))
    assert torch.equal(out[0, :, :4, 2:], X[0, :, 1:, :5])
    assert torch.equal(out[0, :, 4, 2:], X[0, :, 4, :5]) and torch.equal(out[0, :, 0, 0], X[0, :, 1, 0])
    assert torch.equal(out[1], X[1])


def test_crop_comes_before_flip() -> None:
    config, shift = AugmentConfig(crop=1, flip=True), np.array([[0, 1], [0, 0]])
    both = apply(config, X, drawn(shift=shift, flip=np.array([True, True])))
    assert torch.equal(both, apply(config, apply(config, X, drawn(shift=shift)), drawn(flip=np.array([True, True]))))


def test_erase_blanks_a_square_that_may_hang_over_the_edge() -> None:
    out = apply(AugmentConfig(erase=3), X + 1, drawn(corner=np.array([[1, 2], [-2, 6]])))
    assert (out[0] == 0).sum() == 3 * 9 and (out[0, :, 1:4, 2:5] == 0).all()
    assert (out[1] == 0).sum() == 3 and (out[1, :, 0, 6] == 0).all()


def test_draws_have_the_laws_they_claim() -> None:
    config = AugmentConfig(crop=2, flip=True, erase=3, noise=0.5)
    found = draw(config, np.random.default_rng(1), 20_000, (1, 4, 4))
    assert found.shift is not None and found.flip is not None and found.corner is not None
    assert set(np.unique(found.shift)) == {-2, -1, 0, 1, 2}
    assert abs(found.flip.mean() - 0.5) < 0.02
    out = apply(config, torch.zeros(20_000, 1, 4, 4), found)
    assert abs(out.std().item() - 0.5) < 0.01
    # Every pixel is blanked equally often: 9 of the 36 places of the square cover it.
    blanked = (apply(AugmentConfig(erase=3), torch.ones(20_000, 1, 4, 4), found) == 0).float().mean(0)
    assert (blanked - 9 / 36).abs().max() < 0.02


def test_joined_draws_are_the_draws_in_order() -> None:
    config = AugmentConfig(crop=1, flip=True, noise=1)
    parts = [draw(config, np.random.default_rng(k), n, (3, 5, 7)) for k, n in ((1, 1), (2, 1))]
    whole = apply(config, X, join(parts))
    assert torch.equal(whole, torch.cat([apply(config, X[k : k + 1], p) for k, p in enumerate(parts)]))


AUGMENT = {"crop": 1, "flip": True, "erase": 2, "noise": 0.1}
"""Ragged devices, dropout and batch normalisation besides: the awkward federation of the contract tests."""


@pytest.mark.parametrize("method", ["ds_fl", "fedavg"])
@pytest.mark.parametrize("block", [1, 3, 64])
def test_stacked_equals_serial(method: str, block: int) -> None:
    raw = {"algorithm": method, "rounds": 2, "data": {"augment": AUGMENT}, "models": {"student": CNN, "devices": [CNN]}}
    serial = play(raw)
    assert_same(serial, play(raw, kind="stacked", block=block), 1e-9)
    plain = play(merged(raw, {"data": {"augment": {"crop": 0, "flip": False, "erase": 0, "noise": 0}}}))
    assert any(not torch.equal(t, leftovers(plain)[name]) for name, t in leftovers(serial).items())


@pytest.mark.parametrize("one", ["crop", "flip", "erase", "noise"])
def test_each_alone_changes_training_and_agrees(one: str) -> None:
    raw: dict[str, Any] = {"algorithm": "local", "rounds": 1, "models": {"student": "logreg", "devices": ["logreg"]}}
    with_it = merged(raw, {"data": {"augment": {one: AUGMENT[one]}}})
    serial, plain = leftovers(play(with_it)), leftovers(play(raw))
    assert any(not torch.equal(serial[name], plain[name]) for name in plain)
    assert_same(play(with_it), play(with_it, kind="stacked"), 1e-9)


def test_steps_rounds_phases_and_devices_each_vary_anew() -> None:
    """Without this every epoch would see one and the same variation."""
    experiment = validate({"data": {"augment": {"noise": 1}}})

    def seen(client: int, round: int, step: int, name: str = "train") -> tuple[float, ...]:
        phase = Phase(name=name, data="private", loss=lambda *_: torch.zeros([]), settings="training")
        return tuple(Augmenter(experiment, phase, [(client, round)])(step, torch.zeros(1, 2, 3), [2]).ravel().tolist())

    assert len({seen(0, 0, 0), seen(1, 0, 0), seen(0, 1, 0), seen(0, 0, 1), seen(0, 0, 0, "other")}) == 5
    assert seen(3, 1, 2) == seen(3, 1, 2)


def test_pixels_of_tables_are_refused() -> None:
    table = {
        "data": {"source": "wine", "train_size": 100, "test_size": 20},
        "models": {"student": "mlp", "devices": ["mlp"]},
    }
    with pytest.raises(ConfigError, match="only noise suits them"):
        play({**table, "algorithm": "local", "data": {**table["data"], "augment": {"flip": True}}})
    with pytest.raises(ConfigError, match="never augmented"):
        play({"algorithm": "ds_fl", "proxy": {"kind": "dataset", "data": {"augment": {"flip": True}}}})
