"""What makers of inputs rest on: guides, statistics, forms, the pool, resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedkd.distill.datafree import (
    METHODS,
    AnswersGuide,
    DataFree,
    Form,
    ModelsGuide,
    Pool,
    Statistics,
    build,
    generator,
    guide,
)
from fedkd.distill.inputs import unlabelled
from fedkd.distill.loop import Fit, Records
from fedkd.distill.teachers import EnsembleTeacher, ModuleTeacher
from fedkd.errors import ConfigError
from fedkd.kernels.build import library
from fedkd.models.registry import cnn, mlp

FORM = Form(shape=(1, 8, 8), classes=3)


def test_an_ensemble_answers_with_its_weighted_mean_logits_and_a_gradient() -> None:
    torch.manual_seed(0)
    models = [mlp(FORM.shape, 3, hidden=(h,)) for h in (4, 6)]
    x = torch.rand(5, 1, 8, 8, requires_grad=True)
    one, two = (m(x) for m in models)
    both = ModelsGuide(models)
    assert torch.allclose(both(x), (one + two) / 2, atol=1e-6)
    both.weights = torch.tensor([0.25, 0.75])
    assert torch.allclose(both(x), 0.25 * one + 0.75 * two, atol=1e-6)
    both.weights = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    assert torch.allclose(both(x)[:, 1], two[:, 1], atol=1e-6) and torch.allclose(both(x)[:, 0], one[:, 0], atol=1e-6)
    both(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is None for m in models for p in m.parameters())
    assert both.queries == 25


@pytest.mark.skipif(library(torch.float32) is None, reason="no C++ compiler here")
def test_models_of_one_kind_go_through_the_kernels_at_once_unless_somebody_looks_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    models = [cnn(FORM.shape, 3, channels=(3, 4), features=6) for _ in range(3)]
    together = ModelsGuide(models)
    x = torch.rand(37, 1, 8, 8)

    def asked(ask: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        given = x.clone().requires_grad_(True)
        (out := ask(given)).square().sum().backward()
        assert given.grad is not None
        return out.detach(), given.grad

    def one_by_one(given: Tensor) -> Tensor:
        return torch.stack([model(given) for model in models])

    for got, want in zip(asked(together.each), asked(one_by_one), strict=True):
        assert torch.allclose(got, want, atol=1e-5)
    calls: list[nn.Module] = []
    plain = nn.Module.__call__

    def counted(model: nn.Module, given: Tensor) -> Tensor:
        calls.extend([model] if model in models else [])
        found: Tensor = plain(model, given)
        return found

    monkeypatch.setattr(nn.Module, "__call__", counted)
    together.each(x)
    assert not calls
    with together.statistics("dense"):
        together.each(x)
    assert len(calls) == 3
    mixed = ModelsGuide([*models, mlp(FORM.shape, 3)])
    assert mixed.each(x).shape == (4, 37, 3) and len(calls) == 6


def test_a_steps_gradient_is_clipped() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    for clip, moved in ((None, 6.0), (2.0, 2.0), (60.0, 6.0)):
        weight.data.zero_()
        fit = Fit(lr=1.0, momentum=0.0, weight_decay=0.0, clip=clip)
        fit.descend((weight * torch.tensor([2.0, 4.0, 4.0])).sum(), fit.build([weight]))
        assert torch.allclose(weight.norm(), torch.tensor(moved))


def test_a_teacher_becomes_the_guide_that_it_can_be() -> None:
    members = [(ModuleTeacher(mlp(FORM.shape, 3), 3, FORM.shape), w) for w in (1.0, 3.0)]
    assert guide(members[0][0]).differentiable
    mixed = guide(EnsembleTeacher(members, "logits"))
    assert isinstance(mixed, ModelsGuide) and mixed.weights.tolist() == [0.25, 0.75]
    x = torch.rand(4, 1, 8, 8)
    assert torch.allclose(mixed(x), EnsembleTeacher(members, "logits").logits(x), atol=1e-6)
    answers = guide(EnsembleTeacher(members, "probabilities"))
    assert isinstance(answers, AnswersGuide) and not answers.differentiable
    with pytest.raises(
        ConfigError, match=r"only answers: use a method for a black box.*several of them need mix=logits"
    ):
        DataFree(mlp(FORM.shape, 3), answers, build("dfad"), FORM)
    DataFree(mlp(FORM.shape, 3), answers, build("noise"), FORM)


def test_statistics_are_the_distance_to_what_the_norms_saw() -> None:
    torch.manual_seed(0)
    model = cnn(FORM.shape, 3, channels=(2, 4)).eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.running_mean = torch.randn(norm.num_features)
        norm.running_var = torch.rand(norm.num_features) + 0.5
    x = torch.rand(6, 1, 8, 8)
    first = model.body[0](x)
    entering = [first, model.body[3](torch.relu(norms[0](first)))]
    wanted = sum(
        (v.mean((0, 2, 3)) - n.running_mean).norm() + (v.var((0, 2, 3), unbiased=False) - n.running_var).norm()
        for v, n in zip(entering, norms, strict=True)
    )
    with Statistics([model], means=True) as watch:
        model(x)
        assert torch.allclose(watch.take(), wanted)
        assert torch.allclose(watch.features(), torch.cat([v.mean((2, 3)) for v in entering], 1))
        with pytest.raises(RuntimeError, match="no batch"):
            watch.take()
    assert not any(norm._forward_pre_hooks for norm in norms)


def test_a_teacher_without_batch_normalisation_is_refused_by_what_reads_it() -> None:
    with pytest.raises(ConfigError, match=r"the teacher has no batch normalisation.*use dfad, dafl or zskt"):
        ModelsGuide([mlp(FORM.shape, 3)]).statistics("deepinversion")
    with pytest.raises(ConfigError, match="model 2 of 2 has no batch"):
        ModelsGuide([cnn(FORM.shape, 3), mlp(FORM.shape, 3)]).statistics("cmi")
    with pytest.raises(ConfigError, match="only answers"):
        AnswersGuide(ModuleTeacher(cnn(FORM.shape, 3), 3)).statistics("cmi")


@pytest.mark.parametrize(
    ("form", "low", "high"),
    [
        (Form(shape=(3, 10, 7), classes=2), 0.0, 1.0),
        (Form(shape=(1, 28, 28), classes=2, low=-0.5, high=2.0), -0.5, 2.0),
        (Form(shape=(13,), classes=2, low=None, high=None), -np.inf, np.inf),
        (Form(shape=(1, 8, 8), classes=2, low=None, high=None), -np.inf, np.inf),
    ],
)
def test_generators_keep_shape_and_bounds(form: Form, low: float, high: float) -> None:
    torch.manual_seed(0)
    x = generator(form, 10, 8)(torch.randn(64, 10)).detach()
    assert x.shape == (64, *form.shape) and x.min() >= low and x.max() <= high
    if form.low is None:
        assert abs(float(x.mean())) < 0.05 and 0.9 < float(x.std()) < 1.1
    noise = form.noise(500)
    assert noise.shape == (500, *form.shape) and abs(float(noise.mean())) < 0.05 and 0.9 < float(noise.std()) < 1.1


def test_the_pool_drops_the_oldest_and_is_read_as_unlabelled_inputs(tmp_path: Path) -> None:
    pool = Pool(5)
    for value in range(4):
        pool.add(torch.full((2, 1, 2, 2), float(value)))
    assert pool.x[:, 0, 0, 0].tolist() == [1, 2, 2, 3, 3]
    assert sorted(pool.draw(5)[:, 0, 0, 0].tolist()) == [1, 2, 2, 3, 3] and len(pool.draw(9)) == 9
    pool.save(tmp_path / "pool.npz", torch.zeros(5, 3))
    back: Records = unlabelled(tmp_path / "pool.npz", (1, 2, 2))
    assert torch.equal(back.x(np.arange(5)), pool.x)


SMALL = {
    "noise": {"makes_per_epoch": 2},
    "dfad": {"makes_per_epoch": 2, "width": 4, "noise": 6, "anneal": True},
    "dafl": {"makes_per_epoch": 2, "width": 4, "noise": 6, "student_steps": 1},
    "zskt": {"makes_per_epoch": 2, "width": 4, "noise": 6, "layers": ["body.2"]},
    "deepinversion": {"steps": 3},
    "cmi": {"steps": 3, "width": 4, "noise": 6, "head": 5, "bank": 12, "others": 6},
    "dfme": {"makes_per_epoch": 2, "width": 4, "noise": 6},
    "ideal": {"steps": 2, "width": 4, "noise": 6},
    "fast": {"steps": 2, "width": 4, "noise": 6, "warmup": 0.3},
    "dense": {"steps": 2, "width": 4, "noise": 6},
    "co_boosting": {"steps": 2, "width": 4, "noise": 6},
}


def test_every_method_is_tried_here() -> None:
    assert set(SMALL) == set(METHODS)


@pytest.mark.parametrize("method", SMALL)
def test_a_method_goes_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    def work(epochs: int) -> DataFree:
        torch.manual_seed(0)
        teacher = cnn(FORM.shape, 3, channels=(2, 4), features=5)
        student = cnn(FORM.shape, 3, channels=(2,), features=4)
        student.head = nn.Sequential(nn.Dropout(0.2), student.head)  # type: ignore[arg-type]
        settings = {"name": method, "batch_size": 8, "student_steps": 2, **SMALL[method]}
        how = Fit(epochs=epochs, batch_size=8, lr=0.01)
        return DataFree(student, ModelsGuide([teacher]), build(settings), FORM, fit=how)

    whole = work(4)
    whole.run(checkpoint=tmp_path / "whole")
    torch.rand(3)  # what happens outside does not matter

    class Cut(Exception):
        pass

    def cut(epoch: object) -> None:
        if epoch.epoch == 1:  # type: ignore[attr-defined]
            raise Cut

    with pytest.raises(Cut):
        work(4).run(checkpoint=tmp_path / "cut", watch=cut)
    resumed = work(4)
    assert [e.epoch for e in resumed.run(checkpoint=tmp_path / "cut")] == [0, 1, 2, 3]
    for a, b in zip(whole.student.state_dict().values(), resumed.student.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(whole.pool.x, resumed.pool.x) and whole.guide.queries == resumed.guide.queries
    assert [vars(e) for e in whole.log] == [vars(e) for e in resumed.log]


def test_a_student_that_diverges_is_told() -> None:
    settings = {"name": "noise", "batch_size": 8, "makes_per_epoch": 40}
    how = Fit(epochs=3, batch_size=8, lr=1e20)
    torch.manual_seed(0)
    guide = ModelsGuide([mlp(FORM.shape, 3)])
    with pytest.raises(ConfigError, match=r"diverged; lower training\.lr"):
        DataFree(mlp(FORM.shape, 3), guide, build(settings), FORM, fit=how).run()


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("dfadd", "Did you mean 'dfad'"),
        ({"name": "dfad", "widht": 8}, "Did you mean 'width'"),
        ({"name": "dfad", "batch_size": 1}, "at least 2"),
        ({"name": "dfad", "batch_size": "many"}, "batch_size"),
        ({"width": 8}, "expected the name"),
        ({"name": "dfad", "width": 0}, r"dfad\.width is 0, expected at least 1"),
        ({"name": "zskt", "noise": 0}, "expected at least 1"),
        ({"name": "dafl", "generator_lr": -1}, "a finite number above 0"),
        ({"name": "deepinversion", "steps": 0}, "expected at least 1"),
        ({"name": "cmi", "lr": math.nan}, "a finite number above 0"),
        ({"name": "cmi", "bank": 0}, "expected at least 1"),
        ({"name": "fast", "warmup": 5}, "a share of the training"),
        ("json:dumps", "no frozen dataclass"),
    ],
)
def test_mistakes_are_one_sentence(section: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(section)  # type: ignore[arg-type]
