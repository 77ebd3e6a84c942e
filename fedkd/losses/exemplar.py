"""Losses on exemplars and class means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fedkd.losses.base import Loss, Reads, mean, rows


def exemplar_graph(features: Tensor, neighbours: int) -> NDArray[np.int64]:
    """Return triplets [T, 3] (i, j, k): every exemplar i with all pairs of its nearest others j < k in ``features`` [M, D].

    S. Dong, X. Hong, X. Tao, X. Chang, X. Wei, Y. Gong, "Few-Shot Class-Incremental Learning via Relation Knowledge
    Distillation" (ERDIL), AAAI 2021: a graph of exemplars whose relations are angles. Deviation: the graph joins each
    exemplar with its nearest ones; the paper's construction by degrees is not followed.
    """
    gaps = torch.cdist(features.double(), features.double())
    gaps.fill_diagonal_(torch.inf)
    near = gaps.topk(min(neighbours, len(features) - 1), largest=False).indices.numpy()
    left, right = np.triu_indices(near.shape[1], 1)
    centre = np.repeat(np.arange(len(features)), len(left))
    return np.stack([centre, near[:, left].ravel(), near[:, right].ravel()], axis=1)


def exemplar_relation(student: Tensor, teacher: Tensor, triplets: NDArray[np.int64]) -> Tensor:
    """Return the mean smooth L1 of the cosines of the angles at i between the directions to j and k.

    ERDIL (see :func:`exemplar_graph`), its loss on angular relations. Invariant to scale, translation and rotation.

    Args:
        student, teacher: features [M, D] and [M, D'] of the same exemplars.
        triplets: [T, 3] of the graph.
    """
    angles = [_cosines(f, torch.from_numpy(triplets)) for f in (student, teacher)]
    return F.smooth_l1_loss(angles[0], angles[1].to(angles[0].dtype))


def _cosines(features: Tensor, triplets: Tensor) -> Tensor:
    at, left, right = (features[triplets[:, i]] for i in range(3))
    return F.cosine_similarity(left - at, right - at, dim=1)


@final
@dataclass(frozen=True, kw_only=True)
class PrototypeAlignment(Loss):
    """Mean squared difference of both models' class means within a batch, over the classes that occur.

    Prototypes as J. Snell, K. Swersky, R. Zemel, "Prototypical Networks for Few-shot Learning", NeurIPS 2017,
    https://arxiv.org/abs/1703.05175, eq. (1), has them; aligned as FedProto aligns them (Tan et al., AAAI 2022), with the
    teacher's in place of the global ones. A class counts by its records.
    """

    reads: ClassVar[Reads] = "features"
    aligned: ClassVar[bool] = True
    supervised: ClassVar[bool] = True
    paper: ClassVar[str] = "Snell et al. 2017; Tan et al. 2022"

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        if labels is None:
            raise ValueError("PrototypeAlignment needs true labels, and these records have none: leave the term out")
        s, w = rows(student, weight)
        t, _ = rows(teacher, weight)
        same = (labels.unsqueeze(0) == labels.unsqueeze(1)).to(s.dtype) * w.unsqueeze(0)
        share = same / same.sum(1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
        return mean((share @ s - share @ t).square().mean(1), w)
