"""What makes each method without data that method, and that it needs none: one shot, no proxy set, privacy untouched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import CNN, MLP, RESNET, assemble, assert_finite, assert_same, merged, play, section, tapped
from test_ideas import C, batch, collect, direct, normal, server
from torch.nn import functional as F

from fedkd import simulate
from fedkd.algorithms.base import Heard
from fedkd.algorithms.catalogue import build, method_class
from fedkd.algorithms.co_boosting import Boosting, normalised
from fedkd.algorithms.dense import Boundary, boundary
from fedkd.algorithms.fedftg import Hard
from fedkd.algorithms.fedgen import FedGen, Latent
from fedkd.collected import Collected
from fedkd.distill.datafree import (
    AnswersGuide,
    DataFree,
    Form,
    LatentGenerator,
    ModelsGuide,
    Pool,
    Statistics,
    norm_layers,
)
from fedkd.distill.loop import Fit
from fedkd.distill.teachers import ModuleTeacher
from fedkd.errors import ConfigError
from fedkd.experiment import validate
from fedkd.models.registry import cnn
from fedkd.payloads import Bundle, Nothing, Weights
from fedkd.server_tools import Tools

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
MAKE = {"steps": 20, "batch_size": 32, "noise": 16, "width": 4, "lr": 0.01, "student_steps": 40, "temperature": 4.0}
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


def test_an_interruption_within_the_round_costs_little_of_the_servers_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = merged(SHOT, {"algorithm": merged(section("co_boosting"), {"epochs": 4}), "training": {"epochs": 1}})
    wanted = validate(merged(raw, {"models": {"student": MLP, "devices": [MLP]}, "data": {"train_size": 60}}))
    simulate.start(wanted, tmp_path / "a" / "run")
    epochs: list[int] = []
    plain, scratch = DataFree._epoch, tmp_path / "b" / "run" / "scratch"

    def cut(work: DataFree, epoch: int, optimizer: Any) -> Any:
        epochs.append(epoch)
        if epochs == [0, 1, 2]:
            raise KeyboardInterrupt
        return plain(work, epoch, optimizer)

    monkeypatch.setattr(DataFree, "_epoch", cut)
    monkeypatch.setattr("fedkd.algorithms.oneshot.PAUSE", 0.0)
    with pytest.raises(KeyboardInterrupt):
        simulate.start(wanted, tmp_path / "b" / "run")
    assert len(list(scratch.iterdir())) == 1
    simulate.resume(tmp_path / "b" / "run")
    assert epochs == [0, 1, 2, 2, 3] and not scratch.exists()
    student = [(tmp_path / side / "run" / "student.safetensors").read_bytes() for side in "ab"]
    assert student[0] == student[1]


def test_what_is_left_of_work_on_other_models_is_not_taken_up(tmp_path: Path) -> None:
    site = assemble({"algorithm": "local"}).site
    tools = Tools(site, 0, np.zeros(0, np.int64), scratch=tmp_path)
    one, other = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    assert tools.scratch("dense", one) == tools.scratch("dense", {"w": torch.zeros(2)}) != tools.scratch("dense", other)
    assert tools.scratch("dense", one, other) != tools.scratch("dense", other, one)
    assert Tools(site, 0, np.zeros(0, np.int64)).scratch("dense", one) is None


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
    how = {**BOOST, "steps": 40, "batch_size": 16, "lr": 0.02, "adversarial": 0.0}
    easy, harder = (_sure(work(Boosting(**how, hardness=h), epochs=1)) for h in (0.0, 5.0))
    assert harder < 0.9 * easy


def _sure(found: DataFree) -> float:
    """Return the ensemble's mean probability of the classes that inputs were made for."""
    told = found.guide.mix(found.maker.extra["each"]).softmax(1)
    return float(told.gather(1, found.maker.extra["y"][:, None]).mean())


def test_co_boosting_raises_the_weight_of_models_that_are_right_about_the_pool() -> None:
    found = work(Boosting(**BOOST, weight_step=0.02), epochs=4)
    moved = found.guide.weights
    assert not torch.allclose(moved, torch.tensor([0.5, 0.5])) and torch.allclose(moved.sum(), torch.tensor(1.0))
    assert work(Boosting(**BOOST, weight_step=0.0), epochs=4).guide.weights.tolist() == [0.5, 0.5]
    maker, right = found.maker, F.one_hot(found.maker.extra["y"], 3).float()
    maker.extra["each"] = torch.stack([-right, 3 * right])
    maker.extra["weights"] = torch.tensor([0.5, 0.7])
    maker.weigh()
    step = 4 * 0.02 * 0.99**3  # 32 inputs, 8 at a time
    assert torch.allclose(maker.extra["weights"], w := torch.tensor([0.5 - step, 0.7 + step]))
    assert torch.allclose(found.guide.weights, w / w.sum())
    for _ in range(10):
        maker.weigh()
    assert found.guide.weights.tolist() == [0, 1]
    assert normalised(torch.zeros(4)).tolist() == [0.25] * 4
    maker.extra["weights"] = torch.zeros(2)
    maker.weigh()
    assert found.guide.weights.tolist() == [0.5, 0.5]


def test_co_boostings_inputs_pull_student_and_ensemble_apart_by_a_scaled_divergence() -> None:
    told, said, y = 3 * torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    apart = 9 * F.kl_div((said / 3).log_softmax(1), (told / 3).softmax(1), reduction="batchmean")
    assert torch.allclose(Boosting(adversarial=2.0).hardship(told, said, y), Boosting().hard(told, y) - 2 * apart)


@pytest.mark.parametrize("method", ONE_SHOT)
def test_made_images_may_be_dark_as_a_whole(method: str) -> None:
    maker: Any = work({"dense": Boundary, "co_boosting": Boosting}[method](**BOOST), epochs=1).maker
    maker.generator.grow[-1].bias.data -= 5
    assert maker.generator(torch.randn(8, 6)).max() < 0.1


def test_co_boosting_moves_inputs_to_where_the_ensemble_answers_otherwise() -> None:
    found = work(Boosting(**BOOST), epochs=1)
    x = FORM.clamp(found.pool.x)
    torch.manual_seed(1)
    moved = found.maker.moved(x)
    assert (moved - x).abs().max() <= 4 / 255 + 1e-6 and moved.min() >= 0 and moved.max() <= 1
    anyhow = FORM.clamp(x + 4 / 255 * torch.randn(x.shape).sign())
    with torch.no_grad():
        gap, chance = ((found.guide(v) - found.guide(x)).norm() for v in (moved, anyhow))
    assert gap > 2 * chance
    assert torch.equal(work(Boosting(**BOOST, move=0.0), epochs=1).maker.moved(x), x)
    found.maker.moved = lambda drawn: torch.zeros(4, *FORM.shape)
    student, none = found.student.eval(), torch.zeros(4, *FORM.shape)
    assert torch.allclose(found.maker.loss(student, 4), found.method.student_loss(student(none), found.guide(none)))


def test_co_boosting_needs_the_models_themselves() -> None:
    class Looks(AnswersGuide):
        differentiable = True

    with pytest.raises(ConfigError, match="weighs the models of an ensemble"):
        Boosting().start(Looks(ModuleTeacher(teachers(1)[0], 3)), FORM, Pool(10))


# ---- FedGen and FedFTG ----------------------------------------------------------------------------------------------
FEATURES = Form(shape=(6,), classes=3, low=None, high=None)


def heads() -> list[torch.nn.Module]:
    """Return a head that reads class c off feature c, and one that reads the class before."""
    models = [torch.nn.Linear(6, 3) for _ in range(2)]
    for shift, model in enumerate(models):
        model.weight.data = 5 * torch.eye(6)[:3].roll(shift, 0)
        model.bias.data.zero_()
    return models


def latent(weights: Any, **more: Any) -> DataFree:
    """Return a generator of features that has learnt from two heads."""
    how = Latent(makes_per_epoch=60, noise=4, width=16, lr=0.02, weight_decay=0.0, **more)
    guide = ModelsGuide(heads(), torch.tensor(weights))
    found = DataFree(torch.nn.Linear(6, 3), guide, how, FEATURES, fit=Fit(epochs=1))
    found.run()
    return found


def features(found: DataFree, classes: list[int]) -> torch.Tensor:
    torch.manual_seed(0)
    y = torch.tensor(classes).repeat_interleave(20)
    with torch.no_grad():
        made: torch.Tensor = found.maker.modules["generator"].eval()(torch.rand(len(y), 4), y)
    return made


def test_fedgens_generator_believes_of_a_class_whoever_holds_it() -> None:
    made = features(latent([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), [0, 1])
    right, shifted = heads()
    assert (right(made[:20]).argmax(1) == 0).all() and (shifted(made[20:]).argmax(1) == 1).all()
    assert (right(made[20:]).argmax(1) == 0).all(), "what the other head calls class 1 is class 0 to this one"


def test_fedgens_generator_makes_features_that_differ() -> None:
    spread = [float(features(latent([[0.5] * 3] * 2, diversity=d), [0]).std(0).mean()) for d in (0.0, 50.0)]
    assert spread[1] > 2 * spread[0]


def test_fedgens_generator_is_on_a_device_what_it_is_on_the_server() -> None:
    generator = latent([[0.5] * 3] * 2).maker.modules["generator"].eval()
    noise, y = torch.rand(5, 4), torch.tensor([0, 1, 2, 1, 0])
    assert torch.allclose(LatentGenerator.function(generator.state_dict(), noise, y), generator(noise, y), atol=1e-6)


def test_fedgen_teaches_devices_from_round_1_on_by_what_heads_say_of_made_features() -> None:
    method, net, x, y = FedGen(alpha=2.0, beta=3.0, bank=4), direct(6), normal(5, 6), [0, 1, 2, 3, 0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = LatentGenerator(method.make.noise, C, 6, 8).double().eval()
    told = {"model": {}, "generator": made.state_dict()}
    knowledge = Bundle(parts={name: Weights.from_tensors(tensors) for name, tensors in told.items()})
    memory = {"noise": normal(2, 4, method.make.noise), "labels": torch.tensor([3, 2, 1, 0])}
    plain = F.cross_entropy(net(x), torch.tensor(y))
    first = Heard(knowledge=knowledge, memory=memory, round=0)
    assert torch.allclose(method.private_loss(net, batch(x, y), first), plain)
    place = torch.arange(5) % 4
    target = net.head(made(memory["noise"][0, place], torch.tensor(y))).softmax(1)
    soft = F.kl_div(net(x).log_softmax(1), target, reduction="batchmean")
    drawn = memory["labels"][place]
    hard = F.cross_entropy(net.head(made(memory["noise"][1, place], drawn)), drawn)
    got = method.private_loss(net, batch(x, y), replace(first, round=2))
    assert torch.allclose(got, plain + 0.98**2 * (2 * hard + 3 * soft))


def test_fedgen_without_its_generators_terms_is_fedavg() -> None:
    raw = {"rounds": 3, "proxy": None, "models": {"student": MLP, "devices": [MLP]}}
    off = merged(section("fedgen"), {"alpha": 0.0, "beta": 0.0})
    plain, without, whole = (play(merged(raw, {"algorithm": a})) for a in ("fedavg", off, section("fedgen")))
    for name, value in plain.progress.state.models["student"][1].items():
        assert torch.allclose(without.progress.state.models["student"][1][name], value, atol=1e-12)
    weights = [p.progress.state.models["student"][1]["head.weight"] for p in (plain, whole)]
    assert not torch.allclose(*weights, atol=1e-4)


@pytest.mark.parametrize("method", ["fedgen", "fedftg"])
def test_counts_of_labels_leave_a_device_so_that_dp_sgd_refuses(method: str) -> None:
    played, tap = tapped({"algorithm": section(method), "rounds": 1, "proxy": None})
    for client, (payload, _) in tap.uploads(0).items():
        _, y = played.site.private(client).all()
        assert payload.tensors()["counts/counts"].tolist() == np.bincount(y, minlength=10).tolist()
    privacy = {"kind": "dp_sgd", "noise_multiplier": 1.0, "sampling_rate": 0.3}
    with pytest.raises(ConfigError, match="makes its answer from the private records themselves"):
        assemble({"algorithm": method, "privacy": privacy, "models": {"student": MLP, "devices": [MLP]}})


def hard(counts: Any, **more: Any) -> DataFree:
    models = teachers(3)
    how = Hard(**{"makes_per_epoch": 25, "batch_size": 16, "width": 4, "noise": 4, "student_steps": 0, **more})
    found = DataFree(models.pop(), ModelsGuide(models, torch.tensor(counts)), how, FORM, fit=Fit(epochs=1, lr=0.05))
    found.run()
    return found


def test_fedftg_draws_classes_and_believes_devices_by_their_counts() -> None:
    maker: Any = hard([[9.0, 0.0, 0.0], [0.0, 0.0, 1.0]], makes_per_epoch=1).maker
    torch.manual_seed(0)
    drawn = torch.cat([maker.draw()[1] for _ in range(40)]).bincount(minlength=3)
    assert drawn[1] == 0 and 0.84 < drawn[0] / drawn.sum() < 0.96  # 640 draws at 0.9: 5 deviations
    each, said, y = torch.randn(2, 2, 3), torch.randn(2, 3), torch.tensor([0, 2])
    own = torch.stack([F.kl_div(said.log_softmax(1), t.softmax(1), reduction="none").sum(1) for t in each])
    assert torch.allclose(maker.discrepancy(each, said, y), (own[0, 0] + own[1, 1]) / 2)


def test_fedftg_seeks_inputs_on_which_the_average_is_wrong_and_mends_it_there() -> None:
    counts = [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]

    def gap(found: DataFree) -> float:
        maker: Any = found.maker
        with torch.no_grad():
            return float(maker.discrepancy(maker.each, found.student.eval()(maker.x), maker.y))

    plain = {"classes": 0.0, "diversity": 0.0}
    assert gap(hard(counts, **plain)) > 2 * gap(hard(counts, makes_per_epoch=1, lr=1e-12, **plain))
    assert gap(hard(counts, student_steps=5, **plain)) < 0.5 * gap(hard(counts, **plain))


def test_fedftgs_inputs_are_of_their_classes_and_differ() -> None:
    counts = [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    adrift, classed, spread = (
        hard(counts, classes=c, diversity=d).maker for c, d in ((0.0, 0.0), (20.0, 0.0), (0.0, 50.0))
    )
    right = [float((m.each.mean(0).argmax(1) == m.y).float().mean()) for m in (adrift, classed)]
    assert right[1] > 0.9 > 0.6 > right[0]
    assert spread.x.flatten(1).std(0).mean() > 3 * adrift.x.flatten(1).std(0).mean()
