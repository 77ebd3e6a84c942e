"""Losses on relations between the records of a batch. Widths of student and teacher may differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.losses.base import Loss, Reads, rows, unit


@final
@dataclass(frozen=True, kw_only=True)
class RKDDistance(Loss):
    """Smooth L1 of distances between records, each model's divided by their mean.

    W. Park, D. Kim, Y. Lu, M. Cho, "Relational Knowledge Distillation", CVPR 2019, https://arxiv.org/abs/1904.05068,
    eq. (4)-(6), as the mean over all B^2 pairs. Invariant to scale and translation of either model's features.
    """

    reads: ClassVar[Reads] = "features"
    published_weight: ClassVar[float] = 25.0
    paper: ClassVar[str] = "Park et al. 2019"

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        s, w = rows(student, weight)
        t, _ = rows(teacher, weight)
        gap = F.smooth_l1_loss(_distances(s, w), _distances(t, w), reduction="none")
        return (gap * w.unsqueeze(0) * w.unsqueeze(1)).sum()


@final
@dataclass(frozen=True, kw_only=True)
class RKDAngle(Loss):
    """Smooth L1 of the cosines of the angles that triplets of records form.

    Park et al. (see :class:`RKDDistance`), eq. (7)-(9), as the mean over all B^3 triplets. Invariant to scale,
    translation and rotation. Takes memory of B^3 numbers.
    """

    reads: ClassVar[Reads] = "features"
    published_weight: ClassVar[float] = 50.0
    paper: ClassVar[str] = "Park et al. 2019"

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        s, w = rows(student, weight)
        t, _ = rows(teacher, weight)
        gap = F.smooth_l1_loss(_angles(s), _angles(t), reduction="none")
        return torch.einsum("jik,i,j,k->", gap, w, w, w)


@final
@dataclass(frozen=True, kw_only=True)
class SimilarityPreserving(Loss):
    """|| rownorm(F_t F_t') - rownorm(F_s F_s') ||^2_F / B^2.

    F. Tung, G. Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, https://arxiv.org/abs/1907.09682,
    eq. (2)-(4). Invariant to rotation of either model's features.
    """

    reads: ClassVar[Reads] = "features"
    published_weight: ClassVar[float] = 3000.0
    paper: ClassVar[str] = "Tung & Mori 2019"

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        s, w = rows(student, weight)
        t, _ = rows(teacher, weight)
        gap = unit(s @ s.T) - unit(t @ t.T)
        return (gap.square() * w.unsqueeze(0) * w.unsqueeze(1)).sum()


@final
@dataclass(frozen=True, kw_only=True)
class ProbabilisticTransfer(Loss):
    """PKT: KL of the chances with which a record picks another as its neighbour, by (cosine + 1) / 2.

    N. Passalis, A. Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018,
    https://arxiv.org/abs/1803.10837, eq. (5)-(7), as the mean over all B^2 entries, which the published weight of 30,000
    goes with. A record's similarity with itself is kept, as in the authors' code.
    """

    reads: ClassVar[Reads] = "features"
    published_weight: ClassVar[float] = 30000.0
    paper: ClassVar[str] = "Passalis & Tefas 2018"

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        s, w = rows(student, weight)
        t, _ = rows(teacher, weight)
        p, q = _neighbours(t, w), _neighbours(s, w)
        tiny = torch.finfo(p.dtype).eps
        divergence = p * ((p + tiny) / (q + tiny)).log()
        return (divergence * w.unsqueeze(0) * w.unsqueeze(1)).sum()


@final
@dataclass(frozen=True, kw_only=True)
class CorrelationCongruence(Loss):
    """Mean squared difference of the Gaussian kernels of both models' features, scaled to length 1.

    B. Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, https://arxiv.org/abs/1904.01802,
    eq. (3) and (8): exp(-gamma ||x - y||^2), for unit vectors exp(-2 gamma) sum_p (2 gamma x.y)^p / p!, cut at order P.
    Published: gamma 0.4, P 2; ``order`` None is the kernel itself.
    """

    reads: ClassVar[Reads] = "features"
    published_weight: ClassVar[float] = 0.02
    paper: ClassVar[str] = "Peng et al. 2019"

    gamma: float = 0.4
    order: int | None = 2  # P

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        s, w = rows(student, weight)
        t, _ = rows(teacher, weight)
        gap = self._kernel(s) - self._kernel(t)
        return (gap.square() * w.unsqueeze(0) * w.unsqueeze(1)).sum()

    def _kernel(self, flat: Tensor) -> Tensor:
        x = unit(flat)
        product = 2 * self.gamma * (x @ x.T)
        if self.order is None:
            return (product - 2 * self.gamma).exp()
        series = sum(product**p / math.factorial(p) for p in range(self.order + 1))
        assert isinstance(series, Tensor)
        return math.exp(-2 * self.gamma) * series


def _distances(flat: Tensor, weight: Tensor) -> Tensor:
    """Return distances [B, B] divided by their mean over pairs of different records."""
    square = flat.square().sum(1)
    # As differences of rows, not as a^2 - 2ab + b^2, which loses all digits for large features.
    gaps = (flat.unsqueeze(0) - flat.unsqueeze(1)).square().sum(-1)
    none = gaps == 0
    lengths = torch.where(none, torch.zeros_like(gaps), torch.where(none, torch.ones_like(gaps), gaps).sqrt())
    pairs = weight.unsqueeze(0) * weight.unsqueeze(1)
    pairs = pairs - torch.diag(pairs.diagonal())
    centre = (lengths * pairs).sum() / pairs.sum().clamp(min=torch.finfo(square.dtype).tiny)
    return lengths / centre.clamp(min=torch.finfo(square.dtype).eps)


def _angles(flat: Tensor) -> Tensor:
    """Return cosines [j, i, k] of the angle at j between the directions to i and k; 0 where two of them coincide."""
    gaps = flat.unsqueeze(0) - flat.unsqueeze(1)
    square = gaps.square().sum(-1, keepdim=True)
    directions = gaps / torch.where(square == 0, torch.ones_like(square), square).sqrt()
    return directions @ directions.transpose(1, 2)


def _neighbours(flat: Tensor, weight: Tensor) -> Tensor:
    x = unit(flat)
    similar = (x @ x.T + 1) / 2 * (weight > 0).to(flat.dtype).unsqueeze(0)
    return similar / similar.sum(1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
