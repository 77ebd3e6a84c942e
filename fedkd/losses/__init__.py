"""Losses as pure functions of tensors. They return one value per record [B]; take the mean with ``batch.mean``."""

from fedkd.losses.response import (
    absolute_error,
    cross_entropy,
    entropy,
    kl_divergence,
    soft_cross_entropy,
    squared_error,
)

__all__ = ["absolute_error", "cross_entropy", "entropy", "kl_divergence", "soft_cross_entropy", "squared_error"]
