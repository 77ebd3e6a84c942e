"""Two kinds of input: pairs, sides, and the compositional contrast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedkd.distill import Distiller, Fit, Records, Term
from fedkd.distill.crossmodal import pairs, partners
from fedkd.distill.terms import Bound
from fedkd.errors import ConfigError
from fedkd.losses import (
    CRD,
    DKD,
    KD,
    UNKNOWN,
    CompositionalContrast,
    CrossEntropy,
    InfoNCE,
    Loss,
    PrototypeAlignment,
)
from fedkd.losses.contrastive import class_contrast
from fedkd.models.registry import Classifier

Rows = np.ndarray


def unit(f: Rows) -> Rows:
    return f / np.linalg.norm(f, axis=1, keepdims=True)


def contrast(a: Rows, b: Rows, y: Rows, tau: float) -> float:
    z = unit(a) @ unit(b).T / tau
    logs = z - np.log(np.exp(z).sum(1, keepdims=True))
    return float(np.mean([-np.mean([logs[i, j] for j in range(len(y)) if y[j] == y[i]]) for i in range(len(y))]))


def test_class_contrast_is_the_formula() -> None:
    stream = torch.Generator().manual_seed(1)
    a, b = (torch.randn(6, 4, generator=stream, dtype=torch.float64) for _ in range(2))
    y = torch.tensor([0, 1, 0, 2, 1, 1])
    wanted = contrast(a.numpy(), b.numpy(), y.numpy(), 0.5)
    assert float(class_contrast(a, b, y, 0.5)) == pytest.approx(wanted, rel=1e-12)
    more = torch.cat([a, 9 * a[:2]]), torch.cat([b, b[:2]]), torch.cat([y, y[:2]])
    weight = torch.tensor([1 / 6] * 6 + [0.0] * 2, dtype=torch.float64)
    assert float(class_contrast(*more, 0.5, weight)) == pytest.approx(wanted, rel=1e-12)
    assert torch.autograd.gradcheck(lambda s: class_contrast(s, b, y, 0.5), a.requires_grad_())


def test_compositional_contrast_is_the_formula() -> None:
    stream = torch.Generator().manual_seed(2)
    f = {
        n: torch.randn(6, w, generator=stream, dtype=torch.float64) for n, w in (("v", 4), ("t", 5), ("s", 3), ("u", 3))
    }
    y = torch.tensor([0, 1, 0, 2, 1, 1])
    loss = CompositionalContrast(temperature=0.5, dimensions=7)
    torch.manual_seed(3)
    net = loss.build((f["v"].shape, f["s"].shape), (f["t"].shape, f["u"].shape), 10, 3).double()
    value = net((f["v"], f["s"]), (f["t"], f["u"]), y, None)

    def layer(name: str, x: Rows) -> Rows:
        part = net.get_submodule(name)
        assert isinstance(part, nn.Linear)
        return np.asarray(x @ part.weight.detach().numpy().T + part.bias.detach().numpy())

    def softmax(z: Rows) -> Rows:
        return np.asarray(np.exp(z) / np.exp(z).sum(1, keepdims=True))

    v, t = layer("student", f["v"].numpy()), layer("teacher", f["t"].numpy())
    m = t + layer("compose", np.concatenate([t, v], 1))
    q, p = softmax(layer("head", m)), softmax(f["s"].numpy())
    wanted = -np.mean(np.log(q[np.arange(6), y.numpy()]))
    wanted += np.mean([contrast(a, b, y.numpy(), 0.5) for a, b in ((v, m), (m, v), (v, t), (t, v), (m, t), (t, m))])
    wanted += np.mean((p * np.log(p / q)).sum(1) + (q * np.log(q / p)).sum(1)) / 2
    assert float(value.detach()) == pytest.approx(float(wanted), rel=1e-10)
    with pytest.raises(ValueError, match="needs true labels"):
        net((f["v"], f["s"]), (f["t"], f["u"]), None, None)
    with pytest.raises(ValueError, match="features and logits"):
        loss.build((f["v"].shape,), (f["t"].shape,), 10, 3)


def test_each_model_sees_its_side() -> None:
    own, other = torch.arange(24.0).reshape(4, 1, 2, 3), -torch.arange(20.0).reshape(4, 5)
    joined = pairs(own, other, torch.tensor([0, 1, 1, 0]))
    x = joined.records.x(np.arange(4))
    assert torch.equal(joined.student(nn.Identity())(x), own) and torch.equal(joined.teacher(nn.Identity())(x), other)
    with pytest.raises(ConfigError, match="one partner for each"):
        pairs(own, other[:3])
    labels, others = torch.tensor([1, 0, 1, 1]), torch.tensor([0, 1, 0, 1, 1])
    found = partners(labels, others, np.random.default_rng(1))
    assert torch.equal(others[torch.from_numpy(found)], labels) and len(set(found.tolist())) == 4
    with pytest.raises(ConfigError, match="class 2"):
        partners(torch.tensor([2]), others, np.random.default_rng(1))


def test_a_teacher_of_another_kind_teaches() -> None:
    """The student sees numbers that say nothing of the class without its partner's help but for their sign."""
    stream = torch.Generator().manual_seed(4)
    y = torch.randint(3, (120,), generator=stream)
    other = torch.nn.functional.one_hot(y, 3).float() * 4
    own = torch.randn(120, 6, generator=stream)
    own[torch.arange(120), y] += 1.5
    teacher = Classifier(nn.Identity(), nn.Identity())
    student = Classifier(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3))
    joined = pairs(own, other, y)
    taps = ("inner.body", "inner.head")
    terms = [
        Term(KD(temperature=1), 1.0),
        Term(InfoNCE(), 0.1, student="inner.body"),
        Term(CompositionalContrast(dimensions=4), 0.5, student=taps),
        Term(CrossEntropy(), 0.0),
    ]
    log = Distiller(joined.student(student), joined.teacher(teacher), terms, fit=Fit(epochs=8, lr=0.05)).fit(
        joined.records
    )
    assert all(log[-1].terms[n] < log[0].terms[n] for n in log[0].terms)
    with torch.no_grad():
        assert float((student(own).argmax(1) == y).double().mean()) > 0.7


# ---- records of which few have a label ------------------------------------------------------------------------------
def test_few_labels_are_kept_and_come_often() -> None:
    x, y = torch.arange(90.0).unsqueeze(1), torch.arange(90) % 3
    known = Records.of(x, y).knowing(2, np.random.default_rng(1), share=0.25)
    assert known.y is not None
    there = known.y != UNKNOWN
    assert float(there.double().mean()) == pytest.approx(0.25, abs=0.01)
    rows = known.x(np.arange(known.size)).squeeze(1)
    assert len(set(rows.tolist())) == 90 and len(set(rows[there].tolist())) == 6
    assert torch.equal(known.y[there], (rows[there] % 3).long()), "a label stays with its record"
    alone = known.labelled()
    assert alone.size == known.size and alone.y is not None and not bool((alone.y == UNKNOWN).any())
    assert set(alone.x(np.arange(alone.size)).squeeze(1).tolist()) == set(rows[there].tolist())
    assert len({known.identity, alone.identity, Records.of(x, y).identity}) == 3, "cached answers are told apart"


@pytest.mark.parametrize("loss", [CrossEntropy(), DKD(), PrototypeAlignment()], ids=lambda loss: type(loss).__name__)
def test_records_without_a_label_are_left_out_of_what_needs_one(loss: Loss) -> None:
    stream = torch.Generator().manual_seed(5)
    s, t = (torch.randn(6, 4, generator=stream, dtype=torch.float64) for _ in range(2))
    y = torch.tensor([0, UNKNOWN, 2, UNKNOWN, 1, UNKNOWN])
    known = y != UNKNOWN
    bound = Bound(Term(loss), [s], [t], 6, 4)
    assert torch.equal(bound([s], [t], y, torch.arange(6)), loss(s[known], t[known], y[known]))
    nothing = bound([s.requires_grad_()], [t], torch.full((6,), UNKNOWN), torch.arange(6))
    nothing.backward()
    assert float(nothing.detach()) == 0 and s.grad is not None and not bool(s.grad.any())


def test_contrasts_take_unlabelled_records_for_strangers() -> None:
    stream = torch.Generator().manual_seed(6)
    a, b = (torch.randn(5, 4, generator=stream, dtype=torch.float64) for _ in range(2))
    y, own = torch.tensor([0, UNKNOWN, 0, UNKNOWN, 1]), torch.tensor([0, 3, 0, 4, 1])
    assert torch.equal(class_contrast(a, b, y, 0.5), class_contrast(a, b, own, 0.5))
    u, v = (torch.randn(5, 3, generator=stream, dtype=torch.float64) for _ in range(2))
    net = CompositionalContrast(dimensions=4).build((a.shape, u.shape), (b.shape, v.shape), 5, 3).double()
    with torch.no_grad():
        net.head.weight.mul_(0)
        net.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
        values = [float(net((a, torch.zeros_like(u)), (b, v), labels, None)) for labels in (y, own.clamp(max=1))]
    assert np.isfinite(values[0]) and values[0] != values[1]
    values = []
    for labels in (torch.full((5,), UNKNOWN), None):
        torch.manual_seed(7)
        crd = CRD(negatives=64, dimensions=4).build((a.shape,), (b.shape,), 5, 3).double()
        values.append(float(crd((a,), (b,), labels, torch.arange(5)).detach()))
    assert values[0] == values[1]
