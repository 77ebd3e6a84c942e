"""Clients that are no torch models: any object with ``fit`` and ``predict_proba``, scikit-learn's included."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkd.payloads import SoftLabels


class Constant:
    """Predicts the class frequencies it was fitted on: what a learner that needs two classes is replaced by."""

    def __init__(self, labels: NDArray[np.int64]) -> None:
        self.classes_, counts = np.unique(labels, return_counts=True)
        self._share = counts / counts.sum()

    def predict_proba(self, x: NDArray[np.generic]) -> NDArray[np.float64]:
        """Return the same row of class frequencies for every input."""
        return np.tile(self._share, (len(x), 1))


def learn(
    predictor: Any,
    private: tuple[NDArray[np.generic], NDArray[np.int64]],
    public: NDArray[np.generic] | None,
    taught: SoftLabels | None,
) -> Any:
    """Fit on own records and, where a teacher has spoken, on the proxy samples under its most likely labels.

    A predictor has no gradient to distil by; the teacher's top label with its probability as the sample's weight is the
    part of soft labels that ``fit(X, y, sample_weight)`` can take. Without ``sample_weight`` every sample counts alike.
    """
    x, y = private
    x, y = x.reshape(len(x), -1), y.astype(np.int64)
    weight = np.ones(len(y))
    if public is not None and taught is not None:
        top = taught.labels.max(dim=-1)
        x = np.concatenate([x, public.reshape(len(public), -1)])
        y = np.concatenate([y, top.indices.numpy()])
        weight = np.concatenate([weight, top.values.numpy().astype(np.float64)])
    if len(np.unique(y)) < 2:
        return Constant(y)
    if "sample_weight" in inspect.signature(predictor.fit).parameters:
        return predictor.fit(x, y, sample_weight=weight)
    return predictor.fit(x, y)
