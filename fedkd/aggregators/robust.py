"""Robust aggregation in label space: centres of answers that a share of liars cannot move far.

Answers are class probabilities stacked to [K, N, C], K devices. Every rule returns rows [N, C] that sum to 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def median(stack: Tensor) -> Tensor:
    """Return the coordinate-wise median, scaled to rows that sum to 1 (uniform where all medians are 0).

    D. Yin, Y. Chen, K. Ramchandran, P. Bartlett, "Byzantine-Robust Distributed Learning", ICML 2018,
    https://arxiv.org/abs/1803.01498, definition 1; for an even K the mean of the two middle values.
    """
    return _rows(torch.quantile(stack.double(), 0.5, dim=0)).to(stack.dtype)


def trimmed_mean(stack: Tensor, share: float) -> Tensor:
    """Return the mean of each coordinate without its floor(share K) largest and smallest values, scaled to rows.

    Yin et al., definition 2.
    """
    cut = math.floor(share * len(stack))
    if 2 * cut >= len(stack):
        raise ValueError(f"trimming {cut} of {len(stack)} answers at either end leaves none")
    ordered = stack.double().sort(0).values
    return _rows(ordered[cut : len(stack) - cut].mean(0)).to(stack.dtype)


def geometric_median(stack: Tensor, steps: int = 32, smooth: float = 1e-6) -> Tensor:
    """Return the point of least summed Euclidean distance to the devices' whole answers, each a vector of N C numbers.

    K. Pillutla, S. Kakade, Z. Harchaoui, "Robust Aggregation for Federated Learning", IEEE TSP 2022,
    https://arxiv.org/abs/1912.13445, algorithm 2 (smoothed Weiszfeld), on answers instead of weights. Over the whole answer
    a liar is far on most samples, while honest devices of unlike data are far on some: sample by sample, the rule cannot
    tell them apart.
    """
    points = stack.double().flatten(1)
    centre = points.mean(0)
    for _ in range(steps):
        weight = 1 / (points - centre).norm(dim=-1, keepdim=True).clamp(min=smooth)
        centre = (points * weight).sum(0) / weight.sum(0)
    return _rows(centre.view(stack.shape[1:])).to(stack.dtype)


def spectral_filter(stack: Tensor, share: float) -> Tensor:
    """Return for each sample the mean after dropping, twice, the share / 2 of rows that stick out along the main axis.

    H. Chang, V. Shejwalkar, R. Shokri, A. Houmansadr, "Cronus: Robust and Heterogeneous Collaborative Learning with
    Black-Box Knowledge Transfer", 2019, https://arxiv.org/abs/1912.11279, section 4.2, after the robust mean of
    Diakonikolas et al. (ICML 2017). Rows are dropped by rank of their distance from the mean along the first principal
    direction instead of by a random threshold, so that the result depends on the answers alone.
    """
    points = stack.double().transpose(0, 1)  # [N, K, C]
    count = points.shape[1]
    kept = torch.ones(points.shape[:2], dtype=torch.bool)
    drop = math.ceil(share * count / 2)
    for _ in range(2):
        left = count - drop if bool(kept.all()) else count - 2 * drop
        if left < 1:
            break
        weight = kept.double().unsqueeze(-1)
        mean = (points * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        centred = (points - mean) * weight
        covariance = centred.transpose(1, 2) @ centred
        axis = torch.linalg.eigh(covariance).eigenvectors[..., -1:]
        distance = (centred @ axis).squeeze(-1).abs().masked_fill(~kept, math.inf)
        order = distance.argsort(dim=1, stable=True)
        kept = torch.zeros_like(kept).scatter(1, order[:, :left], True)
    weight = kept.double().unsqueeze(-1)
    return _rows((points * weight).sum(1) / weight.sum(1)).to(stack.dtype)


def outlier_scores(stack: Tensor) -> Tensor:
    """Return by how much each device lies farther [K] from the coordinate-wise median than devices of unlike data do.

    Distances d_k are mean total variation, within [0, 1]. What exceeds m + 2 s is counted, m being the median of all d_k
    and s their median deviation from m, times 1.4826, so that s is a standard deviation were d_k normal: honest devices
    lose no weight to each other over many rounds. A liar that stays within 2 s is not noticed.
    """
    distance = (stack - median(stack)).abs().sum(-1).mean(-1).double() / 2
    middle = distance.quantile(0.5)
    spread = 1.4826 * (distance - middle).abs().quantile(0.5)
    return (distance - middle - 2 * spread).clamp(min=0)


def by_history(stack: Tensor, scores: Tensor, rate: float) -> Tensor:
    """Return the mean weighted by exp(-rate (s_k - min s)), s_k a device's outlier score summed over its rounds.

    C. Roux, M. Zimmer, S. Pokutta, "On the Byzantine-Resilience of Distillation-Based Federated Learning", ICLR 2025,
    https://arxiv.org/abs/2402.12265, section 5 (ExpGuard): exponential weights of each device's history. Our score is
    the distance from the median of the round, so that the rule is ExpGuard-like and not the paper's to the letter.
    """
    weight = torch.exp(-rate * (scores - scores.min()))
    return _rows((stack.double() * weight[:, None, None]).sum(0) / weight.sum()).to(stack.dtype)


def _rows(values: Tensor) -> Tensor:
    total = values.sum(-1, keepdim=True)
    return torch.where(total > 0, values / torch.where(total > 0, total, 1.0), 1.0 / values.shape[-1])
