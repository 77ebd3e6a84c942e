"""What makes each method without data that method, and that it needs none: one shot, no proxy set, privacy untouched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from harness import CNN, MLP, RESNET, assemble, assert_finite, assert_same, merged, play, section
from test_ideas import collect, normal, server
from torch.nn import functional as F

from fedkd.algorithms.catalogue import build, method_class
from fedkd.algorithms.co_boosting import Boosting
from fedkd.algorithms.dense import Boundary, boundary
from fedkd.collected import Collected
from fedkd.distill.datafree import AnswersGuide, DataFree, Form, ModelsGuide, Pool, Statistics, norm_layers
from fedkd.distill.loop import Fit
from fedkd.distill.teachers import ModuleTeacher
from fedkd.errors import ConfigError
from fedkd.models.registry import cnn
from fedkd.payloads import Bundle, Nothing, Weights

ONE_SHOT = ["dense", "co_boosting"]
TEACHER = "cnn(channels=[8, 16], features=32)"
SHOT: dict[str, Any] = {
    "rounds": 1,
    "seed": 3,
    "dtype": "float32",
    "proxy": None,
    "data": {"train_size": 400, "test_size": 200},
    "partition": {"clients": 3, "kind": "iid"},
    "models": {"student": TEACHER, "devices": [TEACHER]},
    "training": {"epochs": 15, "optimizer": {"momentum": 0.9, "lr": 0.05}},
}
QUICK = {"epochs": 8, "batch_size": 32, "lr": 0.03, "pool": 200, "anneal": False}
MAKE = {"steps": 10, "batch_size": 32, "noise": 16, "width": 4, "student_steps": 40, "temperature": 4.0}
FORM = Form(shape=(1, 8, 8), classes=3)


def teachers(count: int = 2) -> list[torch.nn.Module]:
    """Return models with opinions, whose batch normalisation has seen dark images."""
    torch.manual_seed(0)
    models = [cnn(FORM.shape, 3, channels=(3, 4), features=6) for _ in range(count)]
    for model in models:
        model(torch.rand(64, *FORM.shape) ** 4)
        for norm in norm_layers(model):
            norm.running_mean /= norm.momentum
            norm.running_var += (norm.running_var - 1) * (1 / norm.momentum - 1)
        model.head.weight.data *= 8
    return models


def work(settings: Any, *, epochs: int = 3, count: int = 2) -> DataFree:
    """Return a finished data-free run of two small ensembles' worth of work."""
    models = teachers(count + 1)
    found = DataFree(models.pop(), ModelsGuide(models), settings, FORM, fit=Fit(epochs=epochs, batch_size=8, lr=0.05))
    found.run()
    return found


# ---- all one-shot methods -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ONE_SHOT)
def test_a_student_learns_in_one_round_without_any_data(method: str) -> None:
    own = merged({"name": method, **QUICK, "make": MAKE}, {"make": {"statistics": 0.0}} if method == "dense" else {})
    played = play(merged(SHOT, {"algorithm": own, "models": {"student": MLP, "devices": [MLP]}}), awkward=False)
    assert len(played.records) == 1 and played.site.proxy is None
    record = played.records[0]
    assert record["answered"] == 3 and isinstance(played.progress.state.knowledge, Nothing)
    # Ten classes: chance is 0.1.
    start = played.rounds.begin().state
    assert played.rounds.student_correct(start).sum() / 200 < 0.4 < record["student_accuracy"]
    assert_finite(played)


@pytest.mark.parametrize("method", ONE_SHOT)
def test_devices_of_several_architectures_are_teachers_with_batch_statistics(method: str) -> None:
    raw = merged(SHOT, {"dtype": "float64", "training": {"epochs": 1}, "data": {"train_size": 100}})
    own = merged(section(method), {"make": {"statistics": 1.0}}) if method == "dense" else section(method)
    raw = merged(raw, {"algorithm": own, "models": {"student": CNN, "devices": [CNN, RESNET]}})
    assert_same(play(raw, awkward=False), play(raw, awkward=False, kind="stacked"), 1e-9)


@pytest.mark.parametrize("method", ONE_SHOT)
def test_an_answer_to_an_older_request_counts_for_less_in_the_ensemble(method: str) -> None:
    first, second = collect([Weights.from_tensors({"w": normal(2)}) for _ in range(2)])
    answers = Collected((first, replace(second, weight=0.25)))
    tools: Any = type("Tools", (), {"dtype": torch.float64})()
    told = build({"name": method}).aggregate(answers, server(), tools)
    assert isinstance(told, Bundle) and told.parts["shares"].tensors()["of"].tolist() == [0.8, 0.2]


@pytest.mark.parametrize("method", ONE_SHOT)
def test_what_follows_dp_sgd_costs_no_privacy(method: str) -> None:
    raw = {
        "rounds": 1,
        "models": {"student": MLP, "devices": [MLP]},
        "privacy": {"kind": "dp_sgd", "noise_multiplier": 1.0, "sampling_rate": 0.3},
        "training": {"steps": 3},
    }
    spent = [play(merged(raw, {"algorithm": one})).records[0]["epsilon"] for one in (section(method), "ds_fl")]
    assert spent[0] == spent[1] and 0 < spent[0] < np.inf


def test_parameters_of_a_section_within_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"dense\.make has no parameter 'stepz'\. Did you mean 'steps'"):
        build({"name": "dense", "make": {"stepz": 1}})


def test_every_one_shot_method_is_tried_here() -> None:
    from fedkd.algorithms.catalogue import METHODS
    from fedkd.algorithms.oneshot import OneShot

    assert set(ONE_SHOT) == {m for m in METHODS if issubclass(method_class(m), OneShot)}


# ---- DENSE ----------------------------------------------------------------------------------------------------------
def test_dense_refuses_devices_without_batch_normalisation_before_anything_is_trained() -> None:
    models = {"models": {"devices": [TEACHER, "cnn(norm=none)"]}}
    with pytest.raises(ConfigError, match=r"cnn\(norm=none\)', but dense compares batch-normalisation.*statistics=0"):
        assemble(merged(SHOT, {"algorithm": "dense", **models}), awkward=False)
    assemble(merged(SHOT, {"algorithm": {"name": "dense", "make": {"statistics": 0}}, **models}), awkward=False)


def test_dense_pushes_inputs_that_the_two_models_class_differently() -> None:
    told = torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    said = torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    each = F.kl_div(said.log_softmax(1), told.softmax(1), reduction="none").sum(1)
    assert torch.allclose(boundary(told, said), (each[1] + each[2]) / 3)
    how = {"steps": 25, "width": 4, "noise": 6, "batch_size": 8, "statistics": 0.0, "lr": 0.02}
    plain, opposed = (_apart(work(Boundary(**how, adversarial=a), epochs=1)) for a in (0.0, 50.0))
    assert opposed > 1.2 * plain


def _apart(found: DataFree) -> float:
    """Return the disagreement on the first batch with the student that it was made against."""
    with torch.no_grad():
        return float(boundary(found.guide(found.pool.x), teachers(3)[2].eval()(found.pool.x)))


def test_dense_makes_inputs_of_given_classes_and_of_the_devices_batch_statistics() -> None:
    how = {"steps": 25, "width": 4, "noise": 6, "batch_size": 16, "adversarial": 0.0, "lr": 0.02}
    near = []
    for weight in (0.0, 10.0):
        found = work(Boundary(**how, statistics=weight), epochs=1)
        with Statistics(found.guide.models) as watch, torch.no_grad():
            found.guide(found.pool.x)
            near.append(float(watch.take()))
    assert near[1] < 0.8 * near[0]
    few, many = (work(Boundary(**{**how, "steps": s}, statistics=0.0), epochs=1).maker.extra["told"] for s in (1, 25))
    # Classes are drawn alike: those of the better inputs are told with more certainty.
    assert many.softmax(1).max(1).values.mean() > few.softmax(1).max(1).values.mean() + 0.02


def test_dense_learns_on_all_batches_that_were_made_with_the_ensembles_answers() -> None:
    found = work(Boundary(steps=2, width=4, noise=6, batch_size=8), epochs=3)
    assert len(found.pool) == 24 and found.maker.student_steps() == 3
    with torch.no_grad():
        assert torch.allclose(found.maker.extra["told"], found.guide(found.pool.x), atol=1e-6)
    limited = DataFree(teachers(3)[2], found.guide, found.method, FORM, fit=Fit(epochs=3, batch_size=8), keep=10)
    limited.run()
    with torch.no_grad():
        assert torch.allclose(limited.maker.extra["told"], limited.guide(limited.pool.x), atol=1e-6)


# ---- Co-Boosting ----------------------------------------------------------------------------------------------------
BOOST = {"steps": 3, "width": 4, "noise": 6, "batch_size": 8}


def test_co_boosting_counts_inputs_that_the_ensemble_is_sure_of_for_little() -> None:
    told, y = torch.tensor([[4.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), torch.tensor([0, 0])
    p = told.softmax(1)[:, 0]
    assert torch.allclose(Boosting().hard(told, y), ((1 - p) * -p.log()).mean())
    assert torch.allclose(Boosting(hardness=0).hard(told, y), F.cross_entropy(told, y))


def test_co_boosting_raises_the_weight_of_models_that_are_right_about_the_pool() -> None:
    found = work(Boosting(**BOOST, weight_step=0.02), epochs=4)
    moved = found.guide.weights
    assert not torch.allclose(moved, torch.tensor([0.5, 0.5])) and moved.min() >= 0 and moved.max() <= 1
    assert work(Boosting(**BOOST, weight_step=0.0), epochs=4).guide.weights.tolist() == [0.5, 0.5]
    maker, right = found.maker, F.one_hot(found.maker.extra["y"], 3).float()
    maker.extra["each"] = torch.stack([-right, 3 * right])
    found.guide.weights = torch.tensor([0.5, 0.5])
    maker.weigh()
    step = 0.02 * 0.99**3
    assert torch.allclose(found.guide.weights, torch.tensor([0.5 - 4 * step, 0.5 + 4 * step]))  # 32 inputs, 8 at a time
    for _ in range(10):
        maker.weigh()
    assert found.guide.weights.tolist() == [0, 1]


def test_co_boosting_moves_inputs_to_where_the_ensemble_answers_otherwise() -> None:
    found = work(Boosting(**BOOST), epochs=1)
    x = FORM.clamp(found.pool.x)
    torch.manual_seed(1)
    moved = found.maker.moved(x)
    assert (moved - x).abs().max() <= 8 / 255 + 1e-6 and moved.min() >= 0 and moved.max() <= 1
    anyhow = FORM.clamp(x + 8 / 255 * torch.randn(x.shape).sign())
    with torch.no_grad():
        gap, chance = ((found.guide(v) - found.guide(x)).norm() for v in (moved, anyhow))
    assert gap > 2 * chance
    assert torch.equal(work(Boosting(**BOOST, move=0.0), epochs=1).maker.moved(x), x)


def test_co_boosting_needs_the_models_themselves() -> None:
    class Looks(AnswersGuide):
        differentiable = True

    with pytest.raises(ConfigError, match="weighs the models of an ensemble"):
        Boosting().start(Looks(ModuleTeacher(teachers(1)[0], 3)), FORM, Pool(10))
