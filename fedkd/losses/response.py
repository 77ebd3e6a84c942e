"""Losses on a model's response: logits and class probabilities."""

from __future__ import annotations

import torch
from torch import Tensor


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
