"""Exemplars: herds follow the mean, synthetic ones are no records, and a memory keeps old classes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from fedkd.distill import Distiller, Fit, Records, Term, accuracy
from fedkd.distill.exemplars import NearestMean, class_means, extend, features_of, herd, remember
from fedkd.errors import ConfigError
from fedkd.losses import CrossEntropy, PrototypeAlignment
from fedkd.losses.exemplar import exemplar_graph, exemplar_relation
from fedkd.models import Architecture


def digits(low: int, high: int, part: slice) -> Records:
    bunch = load_digits()
    y = torch.from_numpy(np.asarray(bunch.target, np.int64))[part]
    x = torch.from_numpy(np.asarray(bunch.images, np.float32) / 16)[:, None][part]
    keep = (y >= low) & (y < high)
    return Records.of(x[keep], y[keep])


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    architecture = Architecture("mlp(hidden=[32])", (1, 8, 8), 10, torch.float32)
    net = architecture.module(architecture.initial(1))
    Distiller(net, None, [Term(CrossEntropy(), 1.0)], fit=Fit(epochs=10, lr=0.1)).fit(digits(0, 5, slice(1000)))
    return net


def test_a_herd_is_chosen_greedily() -> None:
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (features / features.norm(dim=1, keepdim=True)).numpy()
    chosen: list[int] = []
    for k in range(6):
        gaps = {
            i: np.linalg.norm(x.mean(0) - (x[chosen].sum(0) + x[i]) / (k + 1)) for i in range(30) if i not in chosen
        }
        chosen.append(min(gaps, key=lambda i: gaps[i]))
    assert herd(features, 6).tolist() == chosen
    assert herd(features, 3).tolist() == chosen[:3]
    with pytest.raises(ConfigError, match="exemplars are asked"):
        herd(features, 31)


def test_nearest_means_and_prototypes() -> None:
    features = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 3.0]])
    labels = torch.tensor([0, 0, 2])
    means = class_means(features, labels, 3)
    assert means[0].tolist() == [3, 0] and bool(means[1].isnan().all()) and means[2].tolist() == [0, 3]
    rule = NearestMean.of(features, labels, 3)
    scores = rule(torch.tensor([[9.0, 1.0], [1.0, 5.0]]))
    assert scores.argmax(1).tolist() == [0, 2] and bool((scores[:, 1] == -torch.inf).all())


def test_synthetic_exemplars_are_made_not_kept(trained: nn.Module) -> None:
    data = digits(0, 5, slice(600))
    before = copy.deepcopy(trained.state_dict())
    memory = remember(trained, "body", data, 3, steps=60)
    assert memory.kind == "synthetic" and memory.x.shape == (15, 1, 8, 8)
    assert float(memory.x.min()) >= 0 and float(memory.x.max()) <= 1
    assert all(torch.equal(t, before[n]) for n, t in trained.state_dict().items())
    gaps = torch.cdist(memory.x.flatten(1), data.x(np.arange(data.size)).flatten(1))
    assert float(gaps.min()) > 0.5, "no exemplar is a record"
    with torch.no_grad():
        assert float((trained(memory.x).argmax(1) == memory.y).double().mean()) > 0.9
    assert torch.equal(remember(trained, "body", data, 3, steps=60).x, memory.x), "made anew from the seed"
    raw = remember(trained, "body", data, 2, kind="raw")
    assert float(torch.cdist(raw.x.flatten(1), data.x(np.arange(data.size)).flatten(1)).min(1).values.max()) == 0
    few = Records.of(torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.long))
    with pytest.raises(ConfigError, match="at least 10"):
        remember(trained, "body", few, 2)


def test_a_memory_keeps_old_classes(trained: nn.Module) -> None:
    new, test = digits(5, 10, slice(600)), digits(0, 5, slice(1200, 1797))
    memory = remember(trained, "body", digits(0, 5, slice(600)), 5, steps=60)
    kept, lost = copy.deepcopy(trained), copy.deepcopy(trained)
    how = Fit(epochs=6, lr=0.05, batch_size=32)
    log = extend(kept, trained, new, memory, range(5), layer="body", relation=5.0, fit=how)
    extend(lost, trained, new, None, range(5), layer="body", fit=how)
    assert accuracy(kept, test) > accuracy(lost, test) + 0.1 and accuracy(kept, new) > 0.8
    assert set(log[0].terms) == {"CrossEntropy", "KD", "relation"}
    with pytest.raises(ConfigError, match="needs a memory"):
        extend(lost, trained, new, None, range(5), layer="body", relation=1.0)
    assert features_of(kept, "body", test).shape == (test.size, 32)


def test_relations_are_angles_of_the_graph() -> None:
    f = torch.randn(7, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    g = torch.randn(7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    triplets = exemplar_graph(f, 3)
    assert triplets.shape == (7 * 3, 3)

    def cosine(h: np.ndarray, i: int, j: int, k: int) -> float:
        a, b = h[j] - h[i], h[k] - h[i]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    gaps = [abs(cosine(g.numpy(), *t) - cosine(f.numpy(), *t)) for t in triplets.tolist()]
    wanted = np.mean([0.5 * x * x if x < 1 else x - 0.5 for x in gaps])
    assert float(exemplar_relation(g, f, triplets)) == pytest.approx(wanted, rel=1e-9)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64))[0]
    assert float(exemplar_relation(5 * f @ turn + 1, f, triplets)) < 1e-20


def test_prototypes_are_class_means_of_the_batch() -> None:
    stream = torch.Generator().manual_seed(5)
    s, t = (torch.randn(6, 3, generator=stream, dtype=torch.float64) for _ in range(2))
    y = torch.tensor([0, 1, 1, 0, 2, 1])
    gaps = class_means(s, y, 3) - class_means(t, y, 3)
    wanted = sum(float(gaps[c].square().mean()) * n / 6 for c, n in ((0, 2), (1, 3), (2, 1)))
    assert float(PrototypeAlignment()(s, t, y)) == pytest.approx(wanted, rel=1e-12)
