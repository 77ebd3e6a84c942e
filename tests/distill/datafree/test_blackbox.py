"""Teachers that only answer: estimated gradients, inputs asked once, and the price in queries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fedkd.distill.datafree import AnswersGuide, DataFree, Form, ModelsGuide, ProbingGuide, build
from fedkd.distill.loop import Fit
from fedkd.distill.teachers import ModuleTeacher
from fedkd.errors import ConfigError
from fedkd.models.registry import mlp

FORM = Form(shape=(1, 3, 3), classes=3)


class Counted(ModuleTeacher):
    """A teacher that counts for itself what it is asked."""

    asked = 0
    seen: list[Tensor]

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, FORM.classes, FORM.shape)
        self.seen = []

    def logits(self, x: Tensor) -> Tensor:
        self.asked += len(x)
        self.seen.append(x.clone())
        return super().logits(x)


def teacher() -> Counted:
    torch.manual_seed(0)
    return Counted(mlp(FORM.shape, 3, hidden=(8,)))


def test_probed_gradients_are_right_on_average() -> None:
    exact = teacher()
    exact.module.double()
    x = torch.rand(2, *FORM.shape, dtype=torch.float64, requires_grad=True)
    wanted = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0]], dtype=torch.float64)
    (true,) = torch.autograd.grad((exact.module(x) * wanted).sum(), x)
    torch.manual_seed(1)
    asked = ProbingGuide(AnswersGuide(exact), probes=6000, step=1e-5)
    told = asked(x)
    assert torch.allclose(told, exact.module(x))
    (found,) = torch.autograd.grad((told * wanted).sum(), x)
    off = (found - true).norm() / true.norm()
    # One probe of D = 9 values is off by about sqrt(D + 1), the mean of 6,000 by 0.04; half or twice as much would show.
    assert off < 0.12
    assert asked.queries == exact.asked == 2 * 6001
    with torch.no_grad():
        asked(x)
    assert asked.queries == exact.asked == 2 * 6001 + 2


def test_rounded_answers_have_no_slope() -> None:
    class Rounded(AnswersGuide):
        def __call__(self, x: Tensor) -> Tensor:
            return (super().__call__(x) * 10).round() / 10

    x = torch.rand(4, *FORM.shape, requires_grad=True)
    ProbingGuide(Rounded(teacher()), step=1e-6)(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().max()) == 0
    with pytest.raises(ConfigError, match="at least 1 probe"):
        ProbingGuide(AnswersGuide(teacher()), probes=0)


@pytest.mark.parametrize("section", [
    {"name": "dfme", "batch_size": 6, "makes_per_epoch": 2, "width": 4, "noise": 5, "probes": 3, "student_steps": 2},
    {"name": "ideal", "batch_size": 6, "makes_per_epoch": 2, "width": 4, "noise": 5, "steps": 2, "most_steps": 3},
    {"name": "noise", "batch_size": 6, "makes_per_epoch": 2, "student_steps": 3},
], ids=lambda s: s["name"])  # fmt: skip
def test_queries_are_counted_exactly_and_told_before(section: dict[str, object]) -> None:
    asked, fit = teacher(), Fit(epochs=3, batch_size=4, lr=0.01)
    work = DataFree(mlp(FORM.shape, 3), AnswersGuide(asked), build(section), FORM, fit=fit)
    work.run()
    each = work.method.queries_per_epoch(fit)
    assert each is not None and work.guide.queries == asked.asked == 3 * each > 0
    # What the pool keeps was asked on the way, so that its answers cost nothing more.
    known = {row.numpy().tobytes() for x in asked.seen for row in x}
    assert len(work.pool) and all(row.numpy().tobytes() in known for row in work.pool.x)


def test_dfme_recovers_logits_up_to_a_constant() -> None:
    logits, said = torch.randn(5, 3), torch.randn(5, 3)
    method = build("dfme")
    wanted = (said - (logits - logits.mean(1, keepdim=True))).abs().mean()
    assert float(method.student_loss(said, logits.log_softmax(1))) == pytest.approx(float(wanted), abs=1e-6)


def test_dfme_pulls_student_and_teacher_apart() -> None:
    torch.manual_seed(0)
    student = mlp(FORM.shape, 3, hidden=(4,))
    section = {"name": "dfme", "width": 4, "noise": 6, "batch_size": 32, "generator_lr": 0.02, "probes": 4}
    maker = DataFree(student, AnswersGuide(teacher()), build(section), FORM, fit=Fit(epochs=1)).maker
    exact = teacher()
    z = torch.randn(256, 6)

    def distance() -> float:
        with torch.no_grad():
            x = maker.modules["generator"](z)
            return float(maker.settings.student_loss(student(x), exact.module(x)))

    before = distance()
    for _ in range(20):
        maker.make(student)
    assert distance() > 1.05 * before


def test_ideal_by_hand() -> None:
    said = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    y = torch.tensor([0, 2])
    p = said.softmax(1)
    sure = -(math.log(p[0, 0]) + math.log(p[1, 2])) / 2
    spread = sum(float(v) * math.log(v) for row in p for v in row) / 6
    assert float(build({"name": "ideal", "info": 3}).generator_loss(said, y)) == pytest.approx(  # type: ignore[attr-defined]
        sure + 3 * spread, abs=1e-6
    )
    # Soft or one-hot answers: the loss is the cross-entropy where the answer is certain.
    told = torch.tensor([[0.0, -100.0, -100.0], [-100.0, 0.0, -100.0]])
    wanted = -(math.log(p[0, 0]) + math.log(p[1, 1])) / 2
    assert float(build("ideal").student_loss(said, told)) == pytest.approx(wanted, abs=1e-5)


def test_ideal_keeps_each_answer_with_its_input_and_learns_on_a_growing_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = teacher()
    section = {"name": "ideal", "batch_size": 6, "width": 4, "noise": 5, "steps": 2, "passes": 2.0, "most_steps": 7}
    work = DataFree(
        mlp(FORM.shape, 3), AnswersGuide(asked), build(section), FORM, fit=Fit(epochs=4, batch_size=4), keep=16
    )
    steps, real = [], work.maker.student_steps

    def noted() -> int:
        steps.append(real())
        return steps[-1]

    monkeypatch.setattr(work.maker, "student_steps", noted)
    work.run()
    assert steps == [3, 6, 7, 7] and asked.asked == 24 and len(work.pool) == 16
    told = work.maker.extra["told"]
    assert len(told) == 16 and torch.allclose(told, asked.module(work.pool.x), atol=1e-6)
    # Every class was wanted of each batch equally often, of a student and by no query.
    x = ModelsGuide([asked.module])
    before = x.queries
    maker = DataFree(mlp(FORM.shape, 3), x, build(section), FORM, fit=Fit(epochs=1)).maker
    maker.fresh(mlp(FORM.shape, 3))  # type: ignore[attr-defined]
    assert x.queries == before
