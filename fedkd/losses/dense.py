"""Losses on maps: segmentation and detection.

Letters: B batch, C classes, D channels, H and W height and width of a map.

A detector gives one tensor [B, C + 4, H, W]: class scores, and the distances from a position to the four sides of a box
(left, top, right, bottom) in units of the map's stride. Its target is a float tensor [B, 5, H, W]: the class, -1 for
background, and the four distances (:func:`fedkd.data.scenes.targets`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkd.losses.base import Loss, Reads, mean, same_shape


@final
@dataclass(frozen=True, kw_only=True)
class PixelCrossEntropy(Loss):
    """Mean cross-entropy of every pixel's class: scores [B, C, H, W], labels [B, H, W]."""

    reads: ClassVar[Reads] = "labels"
    supervised: ClassVar[bool] = True

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return mean(F.cross_entropy(student, _given(self, labels), reduction="none").flatten(1).mean(1), weight)


@final
@dataclass(frozen=True, kw_only=True)
class PixelKD(Loss):
    """T^2 KL of every pixel's classes, as the mean over pixels.

    Y. Liu, K. Chen, C. Liu, Z. Qin, Z. Luo, J. Wang, "Structured Knowledge Distillation for Semantic Segmentation", CVPR
    2019, https://arxiv.org/abs/1903.04197, eq. (2) (pixel-wise), with a temperature as KD has it.
    """

    paper: ClassVar[str] = "Liu et al. 2019"

    temperature: float = 1.0  # T

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}, expected a number above 0: logits are divided by it")

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        same_shape(self, student, teacher)
        p, q = ((z / self.temperature).log_softmax(1) for z in (teacher, student))
        return self.temperature**2 * mean((p.exp() * (p - q)).sum(1).flatten(1).mean(1), weight)


@final
@dataclass(frozen=True, kw_only=True)
class ChannelWise(Loss):
    """CWD: tau^2 KL of every channel's distribution over positions, as the mean over channels.

    C. Shu, Y. Liu, J. Gao, Z. Yan, C. Shen, "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021,
    https://arxiv.org/abs/2011.13256, eq. (5)-(7), tau 4. Name the layer that gives the class maps, for which the default
    weight of 3 is published, or one of features, for which the paper's is 50.
    """

    reads: ClassVar[Reads] = "features"
    aligned: ClassVar[bool] = True
    published_weight: ClassVar[float] = 3.0
    paper: ClassVar[str] = "Shu et al. 2021"

    temperature: float = 4.0  # tau

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}, expected a number above 0: maps are divided by it")

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        same_shape(self, student, teacher)
        if student.dim() != 4:
            raise ValueError(f"ChannelWise needs maps [B, D, H, W], got {list(student.shape)}: tap a convolution")
        p, q = ((z.flatten(2) / self.temperature).log_softmax(2) for z in (teacher, student))
        return self.temperature**2 * mean((p.exp() * (p - q)).sum(2).mean(1), weight)


@final
@dataclass(frozen=True, kw_only=True)
class FeatureImitation(Loss):
    """Mean squared difference of a feature pyramid's map at the positions of objects.

    T. Wang, L. Yuan, X. Zhang, J. Feng, "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR 2019,
    https://arxiv.org/abs/1906.03609, eq. (4): sum over masked positions and channels of the squared difference / (2 N), N
    the number of masked positions. Deviations: the mask is of the positions inside the boxes' centres (those of the
    target), in place of the anchors that overlap a box; the mean over channels is taken, so that the weight does not hang
    on the width. ``everywhere`` imitates the whole map.
    """

    reads: ClassVar[Reads] = "features"
    aligned: ClassVar[bool] = True
    paper: ClassVar[str] = "Wang et al. 2019"

    everywhere: bool = False

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        same_shape(self, student, teacher)
        gap = (student - teacher).square().mean(1)
        if self.everywhere:
            return mean(gap.flatten(1).mean(1), weight) / 2
        there = (_given(self, labels)[:, 0] >= 0).to(gap.dtype)
        if there.shape != gap.shape:
            raise ValueError(f"the target is a map {list(there.shape)}, the features are {list(gap.shape)}: tap the "
                             "layer that the head reads")  # fmt: skip
        shares = gap.new_full((len(gap),), 1 / len(gap)) if weight is None else weight
        there = there * shares.view(-1, 1, 1)
        return (gap * there).sum() / (2 * there.sum()).clamp(min=torch.finfo(gap.dtype).tiny)


@final
@dataclass(frozen=True, kw_only=True)
class Detection(Loss):
    """Focal loss of the classes + 1 - IoU of the boxes, both by the number of positions with an object.

    T. Lin, P. Goyal, R. Girshick, K. He, P. Dollar, "Focal Loss for Dense Object Detection", ICCV 2017,
    https://arxiv.org/abs/1708.02002, eq. (5), alpha 0.25, gamma 2; boxes as distances to their sides as in Z. Tian, C. Shen,
    H. Chen, T. He, "FCOS", ICCV 2019, https://arxiv.org/abs/1904.01355, eq. (1), without its centre-ness branch.
    """

    reads: ClassVar[Reads] = "labels"
    supervised: ClassVar[bool] = True

    alpha: float = 0.25
    gamma: float = 2.0

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        target = _given(self, labels)
        classes = student.shape[1] - 4
        shares = student.new_full((len(student),), 1 / len(student)) if weight is None else weight
        there = target[:, 0] >= 0
        count = (there.flatten(1).sum(1) * shares).sum().clamp(min=1e-6)
        hot = F.one_hot(target[:, 0].long().clamp(min=0), classes).permute(0, 3, 1, 2) * there.unsqueeze(1)
        scores = student[:, :classes]
        p = scores.sigmoid()
        right = torch.where(hot > 0, p, 1 - p)
        balance = torch.where(hot > 0, self.alpha, 1 - self.alpha)
        cross = F.binary_cross_entropy_with_logits(scores, hot.to(scores.dtype), reduction="none")
        focal = (balance * (1 - right) ** self.gamma * cross).flatten(1).sum(1)
        missed = ((1 - overlap(student[:, classes:], target[:, 1:])) * there).flatten(1).sum(1)
        return ((focal + missed) * shares).sum() / count


@final
@dataclass(frozen=True, kw_only=True)
class HeadDistillation(Loss):
    """A detector's head after the teacher's: class chances everywhere, boxes where the teacher is sure of an object.

    After G. Chen, W. Choi, X. Yu, T. Han, M. Chandraker, "Learning Efficient Object Detection Models with Knowledge
    Distillation", NeurIPS 2017, sections 3.2 and 3.3, for a head with sigmoids: binary cross-entropy with the teacher's
    chances, weighted by the squared gap of both (as quality focal loss does: X. Li et al., NeurIPS 2020, eq. (7)), and 1 -
    IoU of the boxes weighted by the teacher's best chance; both divided by the sum of these best chances. Deviation: boxes
    follow the teacher's outright, where the paper lets it only bound the error.
    """

    paper: ClassVar[str] = "Chen et al. 2017"

    boxes: float = 1.0  # weight of the boxes

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        same_shape(self, student, teacher)
        classes = student.shape[1] - 4
        shares = student.new_full((len(student),), 1 / len(student)) if weight is None else weight
        wanted = teacher[:, :classes].sigmoid()
        scores = student[:, :classes]
        cross = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none")
        # The entropy of the teacher's own chances is taken off, so that agreement costs nothing.
        own = F.binary_cross_entropy(wanted, wanted, reduction="none")
        gap = (wanted - scores.sigmoid()).square()
        sure = wanted.amax(1)
        count = (sure.flatten(1).sum(1) * shares).sum().clamp(min=1e-6)
        agree = (gap * (cross - own)).flatten(1).sum(1)
        missed = (sure * (1 - overlap(student[:, classes:], teacher[:, classes:]))).flatten(1).sum(1)
        return ((agree + self.boxes * missed) * shares).sum() / count


def overlap(left: Tensor, right: Tensor) -> Tensor:
    """Return the IoU [B, H, W] of boxes given as distances [B, 4, H, W] from one position to their sides."""
    a, b = left.clamp(min=0), right.clamp(min=0)
    low = torch.minimum(a, b)
    inner = (low[:, 0] + low[:, 2]) * (low[:, 1] + low[:, 3])
    area = [(d[:, 0] + d[:, 2]) * (d[:, 1] + d[:, 3]) for d in (a, b)]
    return inner / (area[0] + area[1] - inner).clamp(min=1e-6)


def _given(loss: Loss, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError(f"{type(loss).__name__} needs true labels, and these records have none: leave the term out")
    return labels
