"""Losses between a net that sees edges and one that does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fedkd.losses.base import Loss, Reads, mean, rows, same_shape


def local_structure(student: Tensor, teacher: Tensor, arcs: Tensor, width: float = 100.0) -> Tensor:
    """Return LSP: the mean over nodes of KL(teacher || student) between their softmaxes over a node's neighbours.

    Y. Yang, J. Qiu, M. Song, D. Tao, X. Wang, "Distilling Knowledge from Graph Convolutional Networks", CVPR 2020,
    https://arxiv.org/abs/2003.10477, eq. (4)-(6): LS_ij = softmax over j of SIM(h_i, h_j), with the kernel
    SIM = exp(-||h_i - h_j||^2 / (2 sigma^2)); ``width`` is 2 sigma^2.

    Args:
        student, teacher: node features [N, D] and [N, D']; widths may differ.
        arcs: [2, A] of int64, from neighbour to node; nodes without neighbours count 0 of the mean.
    """
    logs = [_edge_log_softmax(h, arcs, width) for h in (student, teacher)]
    divergence = logs[1].exp() * (logs[1] - logs[0])
    nodes = torch.unique(arcs[1]).numel()
    mean_of: Tensor = divergence.sum() / max(nodes, 1)
    return mean_of


def _edge_log_softmax(h: Tensor, arcs: Tensor, width: float) -> Tensor:
    gap = (h[arcs[0]] - h[arcs[1]]).square().sum(1)
    kernel = (-gap / width).exp()
    # Kernels lie in (0, 1], so that the exponential of the softmax needs no shift.
    total = torch.zeros(len(h), dtype=h.dtype).index_add(0, arcs[1], kernel.exp())
    return kernel - total[arcs[1]].log()


@final
@dataclass(frozen=True, kw_only=True)
class RepresentationSimilarity(Loss):
    """Mean squared difference of the inner products of all pairs of records, H H' against T T'.

    Y. Tian, C. Zhang, Z. Guo, X. Zhang, N. Chawla, "Learning MLPs on Graphs: A Unified View of Effectiveness, Robustness,
    and Efficiency" (NOSMOG), ICLR 2023, https://arxiv.org/abs/2208.10010, section 4.2. Not normalised, unlike SP.
    Published: weight 0.1 on Cora.
    """

    reads: ClassVar[Reads] = "features"
    published_weight: ClassVar[float] = 0.1
    paper: ClassVar[str] = "Tian et al. 2023"

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        s, w = rows(student, weight)
        t, _ = rows(teacher, weight)
        return ((s @ s.T - t @ t.T).square() * w.unsqueeze(0) * w.unsqueeze(1)).sum()


@final
@dataclass(frozen=True, kw_only=True)
class ContextRanking(Loss):
    """Hinge on the order of a node's scores with its context nodes: LLP's rank-based matching.

    Z. Guo, W. Shiao, S. Zhang, Y. Liu, N. Chawla, N. Shah, T. Zhao, "Linkless Link Prediction via Relational Distillation",
    ICML 2023, https://arxiv.org/abs/2210.05801, eq. (4): the mean over pairs (i, j) of contexts of
    max(0, -r (s_i - s_j) + margin), with r = 1 where the teacher puts i above j by more than the margin, -1 where below,
    0 where they are as good as equal. Scores are link probabilities, [B, M] for M contexts of each of B nodes.
    """

    paper: ClassVar[str] = "Guo et al. 2023"

    margin: float = 0.1  # delta

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        same_shape(self, student, teacher)
        i, j = torch.triu_indices(student.shape[1], student.shape[1], 1)
        told = teacher[:, i] - teacher[:, j]
        sign = (told > self.margin).to(told.dtype) - (told < -self.margin).to(told.dtype)
        return mean((self.margin - sign * (student[:, i] - student[:, j])).clamp(min=0).mean(1), weight)


def soft_assignment(embedding: Tensor, centres: Tensor) -> Tensor:
    """Return the chances [N, K] with which records [N, D] belong to centres [K, D], by Student's t with one degree.

    J. Xie, R. Girshick, A. Farhadi, "Unsupervised Deep Embedding for Clustering Analysis", ICML 2016,
    https://arxiv.org/abs/1511.06335, eq. (1).
    """
    near = 1 / (1 + torch.cdist(embedding, centres).square())
    return near / near.sum(1, keepdim=True)


def target_distribution(assignment: Tensor) -> Tensor:
    """Return the sharpened target [N, K]: q^2 / (sum of q over records), normalised (Xie et al. 2016, eq. (3))."""
    sharp = assignment.square() / assignment.sum(0)
    return sharp / sharp.sum(1, keepdim=True)
