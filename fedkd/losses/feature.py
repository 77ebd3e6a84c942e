"""Losses on the features of inner layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.losses.base import Loss, Reads, TrainedLoss, mean, same_shape


@final
@dataclass(frozen=True, kw_only=True)
class FitNet(Loss):
    """Mean squared difference of hint and guided layer, MSE(r(f_s), f_t); r is the term's adapter.

    A. Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, https://arxiv.org/abs/1412.6550, eq. (3), as the
    mean over elements; trained together with the other terms instead of in a stage before them.
    """

    reads: ClassVar[Reads] = "features"
    aligned: ClassVar[bool] = True
    published_weight: ClassVar[float] = 100.0
    paper: ClassVar[str] = "Romero et al. 2015"

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        same_shape(self, student, teacher)
        return mean((student - teacher).flatten(1).square().mean(1), weight)


@final
@dataclass(frozen=True, kw_only=True)
class AttentionTransfer(Loss):
    """Mean squared difference of attention maps: channel means of squares, scaled to length 1.

    S. Zagoruyko, N. Komodakis, "Paying More Attention to Attention", ICLR 2017, https://arxiv.org/abs/1612.03928,
    section 3.1, F^2_sum and the L2 norm; the difference is squared and averaged over positions, as the published
    weight of 1000 goes with. Widths may differ; of maps of different size the larger is pooled to the smaller.

    Raises:
        ValueError: the features are no maps [B, C, H, W].
    """

    reads: ClassVar[Reads] = "features"
    published_weight: ClassVar[float] = 1000.0
    paper: ClassVar[str] = "Zagoruyko & Komodakis 2017"

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        student, teacher = _one_size(self, student, teacher)
        gap = _attention(student) - _attention(teacher)
        return mean(gap.square().mean(1), weight)


@final
@dataclass(frozen=True, kw_only=True)
class ReviewKD(TrainedLoss):
    """Knowledge review: fused student features against the teacher's, level by level, through a pyramid of poolings.

    P. Chen, S. Liu, H. Zhao, J. Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021,
    https://arxiv.org/abs/2104.09044, sections 3.2-3.4. Taps are given from shallow to deep. Going from the deepest tap
    up, an attention-based fusion (ABF) mixes the level's own features with what came from below; a hierarchical context
    loss (HCL) compares the result with the teacher's at full size and pooled to 4, 2 and 1, the pooled ones at weights
    1/2, 1/4, 1/8, all divided by their sum. Published: weight 5, warm-up of 20 epochs.
    """

    published_weight: ClassVar[float] = 5.0
    paper: ClassVar[str] = "Chen et al. 2021"

    middle: int = 64  # channels in which levels are fused

    def build(
        self, student: tuple[torch.Size, ...], teacher: tuple[torch.Size, ...], records: int, classes: int
    ) -> nn.Module:
        if any(len(s) != 4 for s in (*student, *teacher)):
            raise ValueError(f"ReviewKD needs maps [B, C, H, W] on every tap, got {[list(s) for s in student]}")
        return _Review(self.middle, student, teacher)


class _Fusion(nn.Module):
    """ABF: the level's features in ``middle`` channels, mixed with those from the level below by learnt attention."""

    def __init__(self, inputs: int, middle: int, outputs: int, fuse: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.leave = nn.Sequential(nn.Conv2d(middle, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.attend = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if fuse else None

    def forward(self, x: Tensor, below: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        x = self.enter(x)
        if self.attend is not None and below is not None:
            below = F.interpolate(below, x.shape[2:], mode="nearest")
            share = self.attend(torch.cat([x, below], 1))
            x = x * share[:, :1] + below * share[:, 1:]
        if x.shape[2:] != torch.Size(size):
            x = F.interpolate(x, size, mode="nearest")
        return self.leave(x), x


class _Review(nn.Module):
    def __init__(self, middle: int, student: tuple[torch.Size, ...], teacher: tuple[torch.Size, ...]) -> None:
        super().__init__()
        deepest = len(student) - 1
        self.levels = nn.ModuleList(
            _Fusion(s[1], middle, t[1], i < deepest) for i, (s, t) in enumerate(zip(student, teacher, strict=True))
        )

    def forward(
        self,
        student: tuple[Tensor, ...],
        teacher: tuple[Tensor, ...],
        labels: Tensor | None = None,
        index: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        below: Tensor | None = None
        total = student[0].new_zeros([])
        for level, s, t in reversed(list(zip(self.levels, student, teacher, strict=True))):
            fused, below = level(s, below, (t.shape[2], t.shape[3]))
            total = total + hierarchical_context(fused, t, weight)
        return total


def hierarchical_context(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return ReviewKD's HCL of two feature maps [B, C, H, W]."""
    total, factor, shares = mean((student - teacher).flatten(1).square().mean(1), weight), 1.0, 1.0
    for size in (4, 2, 1):
        if size >= min(student.shape[2:]):
            continue
        factor /= 2
        a, b = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
        total = total + factor * mean((a - b).flatten(1).square().mean(1), weight)
        shares += factor
    return total / shares


def _attention(features: Tensor) -> Tensor:
    return F.normalize(features.square().mean(1).flatten(1), dim=1)


def _one_size(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.dim() != 4 or teacher.dim() != 4:
        raise ValueError(
            f"{type(loss).__name__} needs maps [B, C, H, W]; the student's layer gives {list(student.shape)}, the "
            f"teacher's {list(teacher.shape)}: tap a convolution"
        )
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
