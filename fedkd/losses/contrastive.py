"""Losses that tell a record's own teacher features from those of other records."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.losses.base import UNKNOWN, Loss, Reads, TrainedLoss, rows, same_shape, unit


@final
@dataclass(frozen=True, kw_only=True)
class InfoNCE(Loss):
    """-log of the softmax share of a record's own teacher features among the batch's.

    A. van den Oord, Y. Li, O. Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018,
    https://arxiv.org/abs/1807.03748, eq. (4), on cosines / temperature. ``symmetric``: the mean of both directions.
    """

    reads: ClassVar[Reads] = "features"
    aligned: ClassVar[bool] = True
    paper: ClassVar[str] = "van den Oord et al. 2018"

    temperature: float = 0.1
    symmetric: bool = True

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        same_shape(self, student, teacher)
        s, w = rows(student, weight)
        t, _ = rows(teacher, weight)
        scores = unit(s) @ unit(t).T / self.temperature
        absent = (w == 0).unsqueeze(0)
        lowest = torch.finfo(scores.dtype).min
        forward = (scores.masked_fill(absent, lowest).log_softmax(1).diagonal() * w).sum()
        if not self.symmetric:
            return -forward
        backward = (scores.T.masked_fill(absent, lowest).log_softmax(1).diagonal() * w).sum()
        return -(forward + backward) / 2


@final
@dataclass(frozen=True, kw_only=True)
class CRD(TrainedLoss):
    """Contrastive representation distillation: noise-contrastive estimation against two memory banks.

    Y. Tian, D. Krishnan, P. Isola, "Contrastive Representation Distillation", ICLR 2020,
    https://arxiv.org/abs/1910.10699, eq. (18)-(19): h = e / (e + K/N) with e = exp(g_s . g_t / tau) / Z; the loss is
    -log h(own pair) - sum over K others of log(1 - h), in both directions. Banks follow by momentum, and Z is fixed by
    the first batch (Wu et al. 2018, section 3.2). Others are drawn from all records, and those of the record's own class
    are left out of the sum. Deviation: labels are learnt batch by batch, so that in the first epoch others whose label has
    not come yet are taken for strangers.
    Published: weight 0.8, K 16384, tau 0.07, momentum 0.5, 128 dimensions.
    """

    published_weight: ClassVar[float] = 0.8
    paper: ClassVar[str] = "Tian et al. 2020"

    negatives: int = 16384  # K
    temperature: float = 0.07  # tau
    momentum: float = 0.5
    dimensions: int = 128
    seed: int = 0  # of the banks' first content and the choice of others

    def build(
        self, student: tuple[torch.Size, ...], teacher: tuple[torch.Size, ...], records: int, classes: int
    ) -> nn.Module:
        if len(student) != 1 or len(teacher) != 1:
            raise ValueError(f"CRD takes one tap of each model, got {len(student)} and {len(teacher)}")
        return _Contrast(self, math.prod(student[0][1:]), math.prod(teacher[0][1:]), records)


class _Contrast(nn.Module):
    bank_student: Tensor
    bank_teacher: Tensor
    constants: Tensor
    classes_seen: Tensor

    def __init__(self, loss: CRD, student: int, teacher: int, records: int) -> None:
        super().__init__()
        self.loss, self.records = loss, records
        self.student, self.teacher = nn.Linear(student, loss.dimensions), nn.Linear(teacher, loss.dimensions)
        self.stream = torch.Generator().manual_seed(loss.seed)
        bound = 1 / math.sqrt(loss.dimensions / 3)
        for name in ("bank_student", "bank_teacher"):
            start = (torch.rand(records, loss.dimensions, generator=self.stream) * 2 - 1) * bound
            self.register_buffer(name, start)
        self.register_buffer("constants", torch.full((2,), -1.0))  # Z of both directions
        self.register_buffer("classes_seen", torch.full((records,), -1, dtype=torch.int64))

    def forward(
        self,
        student: tuple[Tensor, ...],
        teacher: tuple[Tensor, ...],
        labels: Tensor | None,
        index: Tensor,
        weight: Tensor | None = None,
    ) -> Tensor:
        s = F.normalize(self.student(student[0].flatten(1)), dim=1)
        t = F.normalize(self.teacher(teacher[0].flatten(1)), dim=1)
        others = torch.randint(self.records, (len(index), self.loss.negatives), generator=self.stream)
        allowed = others != index.unsqueeze(1)
        if labels is not None:
            self.classes_seen[index] = labels
            # Of records without a label nobody knows whether they are of one class.
            own = labels.unsqueeze(1)
            allowed &= (self.classes_seen[others] != own) | (own == UNKNOWN)
        total = self._one_way(0, s, t, self.bank_teacher, index, others, allowed, weight)
        total = total + self._one_way(1, t, s, self.bank_student, index, others, allowed, weight)
        with torch.no_grad():
            for bank, fresh in ((self.bank_student, s), (self.bank_teacher, t)):
                mixed = self.loss.momentum * bank[index] + (1 - self.loss.momentum) * fresh.to(bank.dtype)
                bank[index] = F.normalize(mixed, dim=1)
        return total

    def _one_way(
        self,
        way: int,
        anchor: Tensor,
        own: Tensor,
        bank: Tensor,
        index: Tensor,
        others: Tensor,
        allowed: Tensor,
        weight: Tensor | None,
    ) -> Tensor:
        """Anchor's own pair is the bank's entry of the same record; the others are the bank's too."""
        tau = self.loss.temperature
        mine = (anchor * bank[index].to(anchor.dtype)).sum(1) / tau
        rest = torch.einsum("bd,bkd->bk", anchor, bank[others].to(anchor.dtype)) / tau
        if float(self.constants[way]) < 0:
            # Z makes e a share of the N records on average, so that h can be compared with chance.
            self.constants[way] = rest.detach().exp().mean() * self.records
        log_z = self.constants[way].to(anchor.dtype).log()
        log_noise = math.log(self.loss.negatives / self.records)
        mine, rest = mine - log_z - log_noise, rest - log_z - log_noise
        # h = e / (e + K/N) is a sigmoid of log e - log(K/N).
        missed = (F.logsigmoid(-rest) * allowed).sum(1)
        values = -(F.logsigmoid(mine) + missed)
        return values.mean() if weight is None else (values * weight).sum()


@final
@dataclass(frozen=True, kw_only=True)
class CompositionalContrast(TrainedLoss):
    """CCL: student, teacher and their composition drawn together class by class, across kinds of input.

    Y. Chen, Y. Xian, A. Koepke, Y. Shan, Z. Akata, "Distilling Audio-Visual Knowledge by Compositional Contrastive Learning",
    CVPR 2021, https://arxiv.org/abs/2104.10955. With f_t and f_v the teacher's and the student's features in one width, the
    composition is f_m = f_t + Linear([f_t; f_v]) and has a classifier of its own. The loss is CE of that classifier +
    class-aware noise contrast both ways between each two of student, composition and teacher (a record's positives are all
    records of its class in the batch; the mean of the six directions) + the symmetric KL of the student's and the
    composition's class probabilities. Published temperature: 0.5 for audio, 0.1 for image teachers.

    Taps: features and logits of both models, ``student=("inner.body", "inner.head")``. Needs labels, though not of all
    records: one without a label is its own only positive, and is left out of the composition's cross-entropy.
    Deviations: both models' features pass a linear layer to ``dimensions``, as their widths differ; the three parts have
    one weight.
    """

    supervised: ClassVar[bool] = True
    paper: ClassVar[str] = "Chen et al. 2021"

    temperature: float = 0.1  # tau
    dimensions: int = 64

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}, expected a number above 0")

    def build(
        self, student: tuple[torch.Size, ...], teacher: tuple[torch.Size, ...], records: int, classes: int
    ) -> nn.Module:
        if len(student) != 2 or len(teacher) != 2:
            raise ValueError(
                f"CompositionalContrast takes features and logits of both models, got {len(student)} and {len(teacher)}: "
                "name both layers, such as student=('body', 'head')"
            )
        return _Composition(self, math.prod(student[0][1:]), math.prod(teacher[0][1:]), classes)


class _Composition(nn.Module):
    def __init__(self, loss: CompositionalContrast, student: int, teacher: int, classes: int) -> None:
        super().__init__()
        self.loss = loss
        self.student, self.teacher = nn.Linear(student, loss.dimensions), nn.Linear(teacher, loss.dimensions)
        self.compose = nn.Linear(2 * loss.dimensions, loss.dimensions)
        self.head = nn.Linear(loss.dimensions, classes)

    def forward(
        self,
        student: tuple[Tensor, ...],
        teacher: tuple[Tensor, ...],
        labels: Tensor | None,
        index: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        if labels is None:
            raise ValueError("CompositionalContrast needs true labels, and these records have none: leave the term out")
        v, t = self.student(student[0].flatten(1)), self.teacher(teacher[0].flatten(1))
        m = t + self.compose(torch.cat([t, v], 1))
        shares = torch.full((len(v),), 1 / len(v), dtype=v.dtype) if weight is None else weight
        own = self.head(m)
        known = shares * (labels != UNKNOWN)
        right = F.cross_entropy(own, labels, reduction="none", ignore_index=UNKNOWN)
        total = (right * known).sum() / known.sum().clamp(min=torch.finfo(v.dtype).tiny)
        ways = [(v, m), (m, v), (v, t), (t, v), (m, t), (t, m)]
        total = (
            total + torch.stack([class_contrast(a, b, labels, self.loss.temperature, shares) for a, b in ways]).mean()
        )
        p, q = student[1].log_softmax(-1), own.log_softmax(-1)
        apart = ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2
        found: Tensor = total + (apart * shares).sum()
        return found


def class_contrast(
    anchors: Tensor, others: Tensor, labels: Tensor, temperature: float, weight: Tensor | None = None
) -> Tensor:
    """Return the mean over anchors of -mean over others of the same class of log softmax(cosine / temperature).

    Args:
        anchors, others: [B, D], row by row of the same records.
        labels: [B]; a record whose label is unknown is of no class but its own.
        weight: [B], sums to 1, 0 for padding.
    """
    shares = torch.full((len(anchors),), 1 / len(anchors), dtype=anchors.dtype) if weight is None else weight
    scores = unit(anchors) @ unit(others).T / temperature
    scores = scores.masked_fill((shares == 0).unsqueeze(0), torch.finfo(scores.dtype).min)
    same = (labels.unsqueeze(0) == labels.unsqueeze(1)) & (labels != UNKNOWN)
    same = (same | torch.eye(len(labels), dtype=torch.bool, device=labels.device)) & (shares > 0).unsqueeze(0)
    logs = scores.log_softmax(1).masked_fill(~same, 0.0)
    return -(logs.sum(1) / same.sum(1).clamp(min=1) * shares).sum()
