"""Means over devices. Sums run in float64 in the order of client ids, so that block sizes cannot change them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fedkd.algorithms.base import Answer, Answers, Tensors


def weighted_mean(items: Iterable[tuple[Tensor, float]]) -> Tensor:
    """Return sum(w x) / sum(w) of tensors of one shape, walked once.

    Raises:
        ValueError: without items or with a total weight of 0.
    """
    total: Tensor | None = None
    weight_total, dtype = 0.0, torch.float32
    for value, weight in items:
        dtype = value.dtype if value.is_floating_point() else dtype
        term = value.double() * weight
        total = term if total is None else total.add_(term)
        weight_total += weight
    if total is None or weight_total <= 0:
        raise ValueError("a mean needs at least one item of positive weight")
    return (total / weight_total).to(dtype)


def mean_of(answers: Answers, pick: Callable[[Answer], Tensor], *, weighted: bool = False) -> Tensor:
    """Return the mean of one tensor of every answer by ``Answer.weight``, times training records if ``weighted``."""
    return weighted_mean((pick(a), share(a, weighted=weighted)) for a in answers)


def share(answer: Answer, *, weighted: bool) -> float:
    """Return what an answer counts in a mean."""
    return answer.weight * (answer.examples if weighted else 1.0)


def mean_weights(answers: Iterable[Answer], *, weighted: bool) -> Tensors:
    """Return the mean of model tensors by name; integer buffers (step counters) take the first answer's value."""
    sums: dict[str, Tensor] = {}
    first: Tensors = {}
    total = 0.0
    for answer in answers:
        weight = share(answer, weighted=weighted)
        tensors = answer.payload.tensors()
        first = first or tensors
        for name, value in tensors.items():
            if value.is_floating_point():
                term = value.double() * weight
                sums[name] = term if name not in sums else sums[name].add_(term)
        total += weight
    if total <= 0:
        raise ValueError("a mean needs at least one item of positive weight")
    return {name: (sums[name] / total).to(t.dtype) if name in sums else t for name, t in first.items()}


def enhanced_era(probabilities: Tensor, beta: float) -> Tensor:
    """Enhanced ERA: p^beta / sum p^beta over the classes of mean probabilities p [N, C]; beta = 1 is the identity.

    K. Azuma, T. Nishio, Y. Kitagawa, W. Nakano, T. Tanimura, "Soft-Label Caching and Sharpening for
    Communication-Efficient Federated Distillation", IEEE TMC 2026, https://arxiv.org/abs/2504.19602. A row's largest value
    is divided out first, so that no power underflows in all classes at once.
    """
    powered = (probabilities / probabilities.amax(-1, keepdim=True)) ** beta
    return powered / powered.sum(-1, keepdim=True)


def era(probabilities: Tensor, temperature: float) -> Tensor:
    """Entropy reduction aggregation: softmax(p / T) of mean *probabilities* p [N, C].

    Itahara et al., "Distillation-Based Semi-Supervised Federated Learning for Communication-Efficient Collaborative
    Training with Non-IID Private Data" (IEEE TMC 2021), the section on ERA. No temperature makes it the identity: at
    T = 1 it flattens, since probabilities lie within [0, 1].
    """
    return (probabilities / temperature).softmax(-1)
