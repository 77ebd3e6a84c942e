"""How much a sample resembles a device's own records: what weighs or selects a device's answers, sample by sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.algorithms.base import Batch

if TYPE_CHECKING:
    from fedkd.nets import Net


def density_ratio(x: Tensor, known: Tensor, noise: Tensor, sigma: float, ridge: float) -> Tensor:
    """Return the ratio r [N] of the densities of ``known`` [m, D] and ``noise`` [n, D] at ``x`` [N, D].

    Kernel unconstrained least squares, as Selective-FD uses it: the formula is in the text of that module.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / (2 * sigma**2))

    n, m = len(noise), len(known)
    system = kernel(noise, noise) / n + ridge * torch.eye(n, dtype=x.dtype)
    right = -kernel(noise, known).sum(1) / (n * m * ridge)
    ratio: Tensor = kernel(x, noise) @ torch.linalg.solve(system, right) + kernel(x, known).mean(1) / ridge
    return ratio


def logistic(h: Tensor, y: Tensor, weight: Tensor, ridge: float, steps: int = 12) -> Tensor:
    """Return the w [D] that minimises sum_i weight_i log(1 + exp(-y_i w·h_i)) + ridge/2 ‖w‖²; h [M, D], y [M] of ±1.

    The objective's gradient changes at most by 1/4 for ‖h‖ = 1, so that Newton's steps, halved at first, stay in bounds.
    """
    w = torch.zeros_like(h[0])
    for step in range(steps):
        miss = torch.sigmoid(-y * (h @ w))
        gradient = -(weight * y * miss) @ h + ridge * w
        curvature = (h * (weight * miss * (1 - miss))[:, None]).T @ h + ridge * torch.eye(h.shape[1], dtype=h.dtype)
        w = w - (0.5 if step < 3 else 1.0) * torch.linalg.solve(curvature, gradient)
    return w


def contrast(net: Net, batch: Batch) -> Tensor:
    """Return NT-Xent at temperature 0.5 of two views of each input: noise of a tenth of the range, a third masked."""
    spread = batch.x.max() - batch.x.min()
    views = [(batch.x + 0.1 * spread * torch.randn_like(batch.x)) * (torch.rand_like(batch.x) > 1 / 3) for _ in "ab"]
    z = F.normalize(torch.cat([net.features(x) for x in views]), dim=1)
    alike = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(alike, torch.arange(len(z)).roll(len(batch.x)))
