"""Clients that are no torch models: any object with ``predict_proba``, scikit-learn's included.

One without ``fit`` answers as it is: it was trained elsewhere.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedkd.payloads import Logits, Payload, SoftLabels


class Constant:
    """Predicts the class frequencies it was fitted on: what a learner that needs two classes is replaced by.

    Without any label it has no classes, which stands for all of them alike.
    """

    def __init__(self, labels: NDArray[np.int64]) -> None:
        self.classes_, counts = np.unique(labels, return_counts=True)
        self._share = counts / counts.sum()

    def predict_proba(self, x: NDArray[np.generic]) -> NDArray[np.float64]:
        """Return the same row of class frequencies for every input."""
        return np.tile(self._share, (len(x), 1))


def probabilities_of(knowledge: Payload) -> Tensor | None:
    """Return what a teacher said of the proxy samples, as class probabilities [N, C]; None if it said nothing of them."""
    if isinstance(knowledge, SoftLabels):
        return knowledge.labels
    return knowledge.logits.softmax(-1) if isinstance(knowledge, Logits) else None


def learn(
    predictor: Any,
    private: tuple[NDArray[np.generic], NDArray[np.int64]],
    public: NDArray[np.generic] | None,
    taught: Tensor | None,
) -> Any:
    """Return what has learnt from own records and, where a teacher has spoken, from the proxy samples' likeliest labels.

    A predictor has no gradient to distil by; the teacher's top label with its probability as the sample's weight is the
    part of soft labels that ``fit(X, y, sample_weight)`` can take. Without ``sample_weight`` every sample counts alike.

    Args:
        public, taught: proxy samples [N, ...] and class probabilities [N, C], or None.
    """
    if not hasattr(predictor, "fit"):
        return predictor
    x, y = private
    x, y = x.reshape(len(x), math.prod(x.shape[1:])), y.astype(np.int64)
    weight = np.ones(len(y))
    if public is not None and taught is not None:
        top = taught.max(dim=-1)
        x = np.concatenate([x, public.reshape(len(public), -1)])
        y = np.concatenate([y, top.indices.numpy()])
        weight = np.concatenate([weight, top.values.numpy().astype(np.float64)])
    if len(np.unique(y)) < 2:
        return Constant(y)
    # What `fit` returns is scikit-learn's custom and nobody's duty.
    if _takes_weights(predictor):
        predictor.fit(x, y, sample_weight=weight)
    else:
        predictor.fit(x, y)
    return predictor


def _takes_weights(predictor: Any) -> bool:
    try:
        return "sample_weight" in inspect.signature(predictor.fit).parameters
    except (TypeError, ValueError):
        return False
