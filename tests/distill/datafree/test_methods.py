"""Each method against its equations, written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fedkd.distill.datafree import DataFree, Form, Maker, ModelsGuide, build, divergence
from fedkd.distill.datafree.cmi import _Cmi
from fedkd.distill.datafree.dafl import DAFL
from fedkd.distill.datafree.deepinversion import between
from fedkd.distill.datafree.views import rolled, roughness, shifted, zoomed
from fedkd.distill.loop import Fit
from fedkd.errors import ConfigError
from fedkd.models.registry import cnn, mlp

FORM = Form(shape=(1, 8, 8), classes=3)


def maker(section: dict[str, object], teacher: nn.Module, student: nn.Module) -> Maker:
    return DataFree(student, ModelsGuide([teacher]), build(section), FORM, fit=Fit(epochs=1)).maker


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return cnn(FORM.shape, 3, channels=(2, 4), features=5), cnn(FORM.shape, 3, channels=(2,), features=4)


def test_dfad_student_and_generator_pull_the_same_distance_apart() -> None:
    method = build("dfad")
    said, told = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.5, 0.0]])
    assert float(method.student_loss(said, told)) == pytest.approx((1 + 2 + 0.5 + 0) / 4)
    teacher, student = pair()
    work = maker({"name": "dfad", "width": 4, "batch_size": 32, "generator_lr": 0.02}, teacher, student.eval())
    torch.manual_seed(1)
    z = work.z(256)  # type: ignore[attr-defined]

    def distance() -> float:
        with torch.no_grad():
            x = work.modules["generator"](z)
            return float(method.student_loss(student(x), teacher(x)))

    before = distance()
    for _ in range(15):
        work.make(student)
    assert distance() > 1.05 * before


def test_dafl_by_hand() -> None:
    told = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    features = torch.tensor([[1.0, -3.0], [0.0, 2.0]])
    sure = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    p = [(math.exp(2) / (math.exp(2) + 1) + 1 / (1 + math.e)) / 2]
    p.append(1 - p[0])
    even = sum(v * math.log(v) for v in p)
    wanted = 2 * sure + 3 * even - 0.5 * (1 + 3 + 0 + 2) / 4
    method = DAFL(one_hot=2, balance=3, activation=0.5)
    assert float(method.generator_loss(told, features)) == pytest.approx(wanted)
    # Even classes cost less than one class for all.
    flat = torch.zeros(2, 1)
    assert method.generator_loss(told, flat) < method.generator_loss(told[[0, 0]], flat)


def test_zskt_repeats_its_inputs_and_adds_attention() -> None:
    teacher, student = pair()
    section = {"name": "zskt", "width": 4, "batch_size": 8, "noise": 6, "layers": ["body.2"], "attention": 250.0}
    work = maker(section, teacher, student)
    torch.manual_seed(1)
    x = work.make(student.eval())
    loss = work.loss(student, 8)

    def attention(m: nn.Module) -> Tensor:
        a = m.body[:3](x).square().mean(1).flatten(1)  # type: ignore[index]
        return a / a.norm(dim=1, keepdim=True).clamp(min=1e-12)

    wanted = divergence(teacher(x), student(x)).mean() / 3  # classes
    wanted = wanted + 250 * (attention(student) - attention(teacher)).square().mean()
    assert torch.allclose(loss, wanted, atol=1e-6) and torch.equal(loss, work.loss(student, 8))


@pytest.mark.parametrize(
    "section",
    [
        {"name": "deepinversion", "batch_size": 16, "steps": 60, "lr": 0.05, "adversarial": 0.0, "shift": 0},
        {"name": "cmi", "batch_size": 16, "steps": 40, "width": 4, "noise": 16, "lr": 0.01},
        {"name": "fast", "batch_size": 16, "steps": 40, "width": 4, "noise": 16, "lr": 0.01, "adversarial": 0.0},
    ],
    ids=lambda s: s["name"],
)
def test_inversion_brings_inputs_closer_to_what_the_teacher_knows(section: dict[str, object]) -> None:
    teacher, student = pair()
    norms = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.manual_seed(3)
    # A teacher that has seen smooth, dark inputs.
    seen = torch.rand(256, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3) * 0.4
    teacher.train()
    for _ in range(60):
        teacher(seen)
    work = maker(section, teacher.eval(), student.eval())
    torch.manual_seed(2)
    made = work.make(student)
    assert made.shape == (16, 1, 8, 8) and made.min() >= 0 and made.max() <= 1

    def apart(x: Tensor) -> float:
        with work.guide.statistics("test") as watch:
            teacher(x)
            return float(watch.take())

    assert norms and apart(made) < 0.6 * apart(FORM.noise(16))


def test_methods_on_statistics_refuse_a_teacher_without_any() -> None:
    for name in ("deepinversion", "cmi", "fast"):
        with pytest.raises(ConfigError, match=rf"{name} compares .* use dfad, dafl or zskt"):
            maker({"name": name}, mlp(FORM.shape, 3), mlp(FORM.shape, 3))


def test_cmi_contrast_by_hand() -> None:
    teacher, student = pair()
    section = {"name": "cmi", "width": 4, "batch_size": 2, "noise": 4, "head": 3, "tau": 0.5, "others": 10}
    work = maker(section, teacher, student)
    assert isinstance(work, _Cmi)
    size = work.extra["bank"].shape[2]
    torch.manual_seed(5)
    part, whole, bank = torch.randn(2, size), torch.randn(2, size), torch.randn(1, 2, size)

    def h(f: Tensor) -> Tensor:
        out = work.head(f)
        return out / out.norm(dim=-1, keepdim=True)

    scores = (h(part) @ h(whole).T / 0.5).exp()
    wanted = -(scores.diagonal() / scores.sum(1)).log().mean()
    assert torch.allclose(work.contrast(part, whole), wanted)
    work.extra["bank"] = bank
    lefts, rights = torch.cat([part, bank[:, 0]]), torch.cat([whole, bank[:, 1]])
    scores = (h(lefts) @ h(rights).T / 0.5).exp()
    each = -(scores.diagonal() / scores.sum(1)).log()
    assert torch.allclose(work.contrast(part, whole), each[:2].mean() + each[2])


def test_fast_moves_its_meta_generator_along_the_sum_of_gradients_and_the_student_waits() -> None:
    teacher, student = pair()
    section = {"name": "fast", "batch_size": 8, "steps": 1, "width": 4, "noise": 6, "warmup": 0.5, "shift": 0}
    work = maker(section, teacher, student.eval())
    before = {n: p.detach().clone() for n, p in work.modules["generator"].named_parameters()}
    torch.manual_seed(4)
    work.make(student)
    grads = [p.grad for p in work.modules["generator"].parameters()]
    assert all(g is not None for g in grads)
    # Adam's first step goes against the gradient by its rate, whatever the gradient's size.
    for (name, old), g in zip(before.items(), grads, strict=True):
        new = dict(work.modules["generator"].named_parameters())[name]
        clear = g.abs() > 1e-6  # type: ignore[union-attr]
        assert torch.allclose((new - old)[clear], -3e-3 * g.sign()[clear], atol=1e-4)  # type: ignore[union-attr]
    assert work.student_steps() == 0
    work.progress = 0.5
    assert work.student_steps() == 400


def test_divergences() -> None:
    torch.manual_seed(0)
    t, s = torch.randn(5, 4), torch.randn(5, 4)
    p, q = (t / 2).softmax(1), (s / 2).softmax(1)
    assert torch.allclose(divergence(t, s, 2.0), (p * (p / q).log()).sum(1), atol=1e-6)
    m = (p + q) / 2
    wanted = ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)).mean() / 2
    assert torch.allclose(between(t, s, 2.0), wanted, atol=1e-6) and float(between(t, t, 1.0)) == pytest.approx(
        0, abs=1e-6
    )


def test_views_keep_form_and_gradient() -> None:
    torch.manual_seed(0)
    x = torch.rand(6, 1, 8, 8, requires_grad=True)
    for view in (rolled(x, 2, True), shifted(x, 3, True), zoomed(x, 0.25, True)):
        assert view.shape == x.shape and view.min() >= 0 and view.max() <= 1
        (grad,) = torch.autograd.grad(view.sum(), x, retain_graph=True)
        assert grad.abs().sum() > 0
    assert torch.allclose(shifted(x, 0, False), x, atol=1e-5) and torch.allclose(zoomed(x, 1.0, False), x, atol=1e-5)
    # A whole shift of one pixel is the neighbour's value.
    flat = torch.arange(8.0).repeat(8, 1)[None, None].repeat(500, 1, 1, 1)
    moved = shifted(flat, 2, False)[:, 0, 4, 4]
    assert moved.min() >= 2 - 1e-4 and moved.max() <= 6 + 1e-4 and moved.std() > 0.5
    assert float(roughness(torch.ones(2, 1, 4, 4))) == 0 and float(
        roughness(torch.eye(2)[None, None])
    ) == pytest.approx(2 * math.sqrt(2) + 0 + 0, abs=1e-6)
