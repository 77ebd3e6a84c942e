"""Losses of graphs against loops over their formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedkd.losses import ContextRanking, RepresentationSimilarity
from fedkd.losses.graph import local_structure, soft_assignment, target_distribution

N = 6
ARCS = torch.tensor([[0, 1, 2, 1, 3, 4, 0], [1, 0, 1, 2, 4, 3, 2]])


def features(seed: int, width: int = 3) -> torch.Tensor:
    return torch.randn(N, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_local_structure_is_the_formula() -> None:
    s, t = features(1), features(2, 5)

    def shares(h: np.ndarray, node: int) -> np.ndarray:
        near = [int(j) for j, i in ARCS.T if int(i) == node]
        kernel = np.array([np.exp(-np.sum((h[node] - h[j]) ** 2) / 7) for j in near])
        return np.asarray(np.exp(kernel) / np.exp(kernel).sum())

    wanted = 0.0
    for node in sorted({int(i) for i in ARCS[1]}):
        p, q = shares(t.numpy(), node), shares(s.numpy(), node)
        wanted += float((p * np.log(p / q)).sum()) / 5
    assert float(local_structure(s, t, ARCS, 7.0)) == pytest.approx(wanted, rel=1e-12)
    assert float(local_structure(t, t, ARCS)) == 0
    assert torch.autograd.gradcheck(lambda x: local_structure(x, t, ARCS, 7.0), s.requires_grad_())


def test_representation_similarity_knows_no_rotation() -> None:
    s, t = features(1), features(2, 5)
    turn = torch.linalg.qr(features(3)[:3, :3])[0]
    assert float(RepresentationSimilarity()(s @ turn, t)) == pytest.approx(
        float(RepresentationSimilarity()(s, t)), rel=1e-9
    )


def test_ranking_takes_near_scores_for_equal() -> None:
    t = torch.tensor([[0.5, 0.55, 0.9]], dtype=torch.float64)
    loss = ContextRanking()
    assert float(loss(t, t)) == pytest.approx(
        0.1 / 3
    )  # the pair within the margin costs the margin, whatever the student
    assert float(loss(t.flip(1), t)) > float(loss(t, t))


def test_cluster_targets_are_the_formulas() -> None:
    z, centres = features(1), features(2)[:2]
    near = 1 / (1 + ((z[:, None] - centres[None]) ** 2).sum(-1))
    q = near / near.sum(1, keepdim=True)
    assert torch.allclose(soft_assignment(z, centres), q, atol=1e-12)
    sharp = q**2 / q.sum(0)
    assert torch.allclose(target_distribution(q), sharp / sharp.sum(1, keepdim=True), atol=1e-12)
