"""Losses on a model's response: logits and class probabilities.

The functions return one value per record [B], for ``batch.mean``; the classes are the published losses of the field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fedkd.losses.base import Loss, Reads, mean, same_shape, uniform


def softmax(logits: Tensor) -> Tensor:
    """Return class probabilities [..., C]; equal to torch's softmax but for rounding.

    torch's own takes seven times as long over a last dimension that is shorter than a vector of the processor, as classes
    often are.
    """
    odds = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    return odds / odds.sum(-1, keepdim=True)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return -log p(label) for logits [B, C] and labels [B] (int64) as [B]."""
    return -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def soft_cross_entropy(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross-entropy [B] of teacher probabilities [B, C] and the softmax of logits [B, C]."""
    return -(teacher * logits.log_softmax(-1)).sum(-1)


def kl_divergence(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(teacher || softmax(logits / T)) as [B], for teacher *probabilities* [B, C]; no T^2 factor.

    Entries of the teacher that are 0 count 0, as the limit of p log p says.
    """
    log_student = (logits / temperature).log_softmax(-1)
    log_teacher = teacher.clamp(min=torch.finfo(teacher.dtype).tiny).log()
    return (teacher * (log_teacher - log_student)).sum(-1)


def absolute_error(left: Tensor, right: Tensor) -> Tensor:
    """Return the mean over the last axis of |left - right| as [B]."""
    return (left - right).abs().mean(-1)


def squared_error(left: Tensor, right: Tensor) -> Tensor:
    """Return the mean over the last axis of (left - right)^2 as [B]."""
    return (left - right).square().mean(-1)


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy in nats of probabilities [..., C] as [...]."""
    p = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny)
    return -(probabilities * p.log()).sum(-1)


# ---- the published losses -------------------------------------------------------------------------------------------
@final
@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Loss):
    """Cross-entropy with the true labels; the teacher is not read."""

    reads: ClassVar[Reads] = "labels"
    supervised: ClassVar[bool] = True

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        return mean(cross_entropy(student, _needed(self, labels)), weight)


@final
@dataclass(frozen=True, kw_only=True)
class KD(Loss):
    """T^2 KL(softmax(t/T) || softmax(s/T)).

    G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015,
    https://arxiv.org/abs/1503.02531, section 2; T^2 keeps the gradient's size when T changes.
    """

    published_weight: ClassVar[float] = 0.9
    paper: ClassVar[str] = "Hinton et al. 2015"

    temperature: float = 4.0  # T

    def __post_init__(self) -> None:
        _positive(self.temperature)

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        same_shape(self, student, teacher)
        t = self.temperature
        return t**2 * mean(kl_divergence(student, (teacher / t).softmax(-1), t), weight)


@final
@dataclass(frozen=True, kw_only=True)
class LogitRegression(Loss):
    """Mean squared difference of logits.

    J. Ba, R. Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, https://arxiv.org/abs/1312.6184, eq. (1),
    here as the mean over classes instead of half the sum.
    """

    paper: ClassVar[str] = "Ba & Caruana 2014"

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        same_shape(self, student, teacher)
        return mean(squared_error(student, teacher), weight)


@final
@dataclass(frozen=True, kw_only=True)
class DKD(Loss):
    """Decoupled distillation: T^2 (alpha TCKD + beta NCKD).

    B. Zhao, Q. Cui, R. Song, Y. Qiu, J. Liang, "Decoupled Knowledge Distillation", CVPR 2022,
    https://arxiv.org/abs/2203.08679, eq. (7). TCKD compares (p_label, 1 - p_label), NCKD the other classes among
    themselves. Published with a warm-up of 20 epochs (``Term(DKD(), schedule=Warmup(20))``).

    Raises:
        ValueError: for two classes, where the other classes are one and NCKD is 0 for every student.
    """

    supervised: ClassVar[bool] = True
    paper: ClassVar[str] = "Zhao et al. 2022"

    temperature: float = 4.0  # T
    alpha: float = 1.0  # weight of the target class
    beta: float = 8.0  # weight of the other classes

    def __post_init__(self) -> None:
        _positive(self.temperature)

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        same_shape(self, student, teacher)
        if student.shape[-1] < 3:
            raise ValueError(
                "DKD needs at least three classes: with two, the classes beside the target are one, whose share among "
                "themselves is always 1, so that the decoupled part teaches nothing; use KD"
            )
        target, t = _needed(self, labels).unsqueeze(-1), self.temperature
        log_s, log_t = (student / t).log_softmax(-1), (teacher / t).log_softmax(-1)
        # The sum over the other classes is taken of logarithms: 1 - p would lose all digits where p is close to 1.
        mask = torch.zeros_like(log_s, dtype=torch.bool).scatter(-1, target, True)
        lowest = torch.finfo(log_s.dtype).min
        rest_s = log_s.masked_fill(mask, lowest).logsumexp(-1)
        rest_t = log_t.masked_fill(mask, lowest).logsumexp(-1)
        own_s, own_t = log_s.gather(-1, target).squeeze(-1), log_t.gather(-1, target).squeeze(-1)
        tckd = own_t.exp() * (own_t - own_s) + rest_t.exp() * (rest_t - rest_s)
        among_s = log_s.masked_fill(mask, lowest).log_softmax(-1)
        among_t = log_t.masked_fill(mask, lowest).log_softmax(-1)
        nckd = (among_t.exp() * (among_t - among_s).masked_fill(mask, 0.0)).sum(-1)
        return t**2 * mean(self.alpha * tckd + self.beta * nckd, weight)


@final
@dataclass(frozen=True, kw_only=True)
class DIST(Loss):
    """tau^2 (beta L_inter + gamma L_intra), each 1 - Pearson's correlation of class probabilities.

    T. Huang, S. You, F. Wang, C. Qian, C. Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022,
    https://arxiv.org/abs/2205.10536, eq. (6)-(9): inter over the classes of each record, intra over the records of each
    class.
    """

    paper: ClassVar[str] = "Huang et al. 2022"

    temperature: float = 1.0  # tau
    beta: float = 1.0  # weight of the relation between classes
    gamma: float = 1.0  # weight of the relation within a class

    def __post_init__(self) -> None:
        _positive(self.temperature)

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        same_shape(self, student, teacher)
        p, q = (student / self.temperature).softmax(-1), (teacher / self.temperature).softmax(-1)
        inter = mean(1 - _pearson(p, q, None), weight)
        share = uniform(p) if weight is None else weight
        intra = (1 - _pearson(p.T, q.T, share)).mean()
        return self.temperature**2 * (self.beta * inter + self.gamma * intra)


@final
@dataclass(frozen=True, kw_only=True)
class LogitStandardisedKD(Loss):
    """KD on logits that are standardised record by record: (z - mean) / (std T).

    S. Sun, W. Ren, J. Li, R. Wang, X. Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024,
    https://arxiv.org/abs/2403.01427, algorithm 1; the deviation divides by C. Published: T 2, weight 9.
    """

    published_weight: ClassVar[float] = 9.0
    paper: ClassVar[str] = "Sun et al. 2024"

    temperature: float = 2.0  # T

    def __post_init__(self) -> None:
        _positive(self.temperature)

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        same_shape(self, student, teacher)
        return KD(temperature=self.temperature)(_standard(student), _standard(teacher), None, weight)


@final
@dataclass(frozen=True, kw_only=True)
class BetaJensenShannon(Loss):
    """beta KL(t || m) + (1 - beta) KL(s || m) with m = beta t + (1 - beta) s.

    R. Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", ICLR 2024,
    https://arxiv.org/abs/2306.13649, eq. (1). Bounded; beta 0.5 is Jensen-Shannon's divergence.
    """

    paper: ClassVar[str] = "Agarwal et al. 2024"

    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _positive(self.temperature)
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta is {self.beta}, expected a share between 0 and 1, both left out: there it is 0 for all"
            )

    def __call__(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, weight: Tensor | None = None
    ) -> Tensor:
        same_shape(self, student, teacher)
        log_s, log_t = (student / self.temperature).log_softmax(-1), (teacher / self.temperature).log_softmax(-1)
        b = student.new_tensor(self.beta)
        log_m = torch.logaddexp(log_t + b.log(), log_s + (1 - b).log())
        teach = (log_t.exp() * (log_t - log_m)).sum(-1)
        learn = (log_s.exp() * (log_s - log_m)).sum(-1)
        return mean(self.beta * teach + (1 - self.beta) * learn, weight)


def _positive(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected a number above 0: logits are divided by it")


def _needed(loss: Loss, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError(f"{type(loss).__name__} needs true labels, and these records have none: leave the term out")
    return labels


def _standard(logits: Tensor) -> Tensor:
    return _centred(logits, uniform(logits.T))


def _pearson(left: Tensor, right: Tensor, weight: Tensor | None) -> Tensor:
    """Return the correlation of each row [R] of ``left`` and ``right`` [R, L]; columns are weighted by ``weight`` [L]."""
    share = uniform(left.T) if weight is None else weight
    a, b = _centred(left, share), _centred(right, share)
    return (a * b * share).sum(-1)


def _centred(values: Tensor, share: Tensor) -> Tensor:
    """Return rows of weighted mean 0 and variance 1; a constant row (a class that nobody predicts) becomes 0."""
    gap = values - (values * share).sum(-1, keepdim=True)
    # Scaled first, so that squares of tiny probabilities do not vanish; the scale cancels.
    gap = gap / gap.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    variance = (gap.square() * share).sum(-1, keepdim=True)
    return gap / torch.where(variance == 0, torch.ones_like(variance), variance).sqrt()
