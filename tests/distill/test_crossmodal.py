"""Two kinds of input: pairs, sides, and the compositional contrast."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedkd.distill import Distiller, Fit, Term
from fedkd.distill.crossmodal import pairs, partners
from fedkd.errors import ConfigError
from fedkd.losses import KD, CompositionalContrast, CrossEntropy, InfoNCE
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
