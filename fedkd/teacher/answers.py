"""What leaves a teacher under a policy: probabilities made less exact, or private, in one place for service and check."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedkd.distill.teachers import Teacher
from fedkd.teacher.policy import AnswersConfig, CallerConfig
from fedkd.teacher.private import PrivateAnswers


class Answers:
    """Charges and makes answers as a policy says. Safe for several threads: they take turns.

    Args:
        folder: of the ledgers, where the policy has ``answers.privacy``.
    Raises:
        ConfigError: the policy asks for privacy that this teacher cannot give.
        LedgerError: a ledger cannot be trusted.
    """

    def __init__(self, teacher: Teacher, how: AnswersConfig, folder: Path) -> None:
        self.teacher, self.how = teacher, how
        self._private = PrivateAnswers(teacher, how.privacy, folder) if how.privacy is not None else None
        self._turn = threading.Lock()

    @property
    def covered(self) -> int:
        """Answers that the ledgers in the folder cover; 0 without ``answers.privacy``."""
        return 0 if self._private is None else self._private.charged

    def charge(self, caller: CallerConfig, count: int) -> None:
        """Charge the privacy of ``count`` new answers, before they are made; nothing without ``answers.privacy``.

        Raises:
            OverBudget: it would cost more than the policy allows; nothing is charged.
            LedgerError: the ledgers cannot be written; nothing may be answered.
        """
        if self._private is not None:
            with self._turn:
                self._private.charge(caller, count)

    def make(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the probabilities [n, C] that a caller may see of inputs [n, *shape]."""
        given = torch.from_numpy(np.array(x))
        with self._turn:
            if self._private is not None:
                probabilities = self._private.probabilities(given)
            else:
                probabilities = self.teacher.logits(given).softmax(-1).double()
        return blur(probabilities.numpy(), self.how)


def blur(probabilities: NDArray[np.float64], how: AnswersConfig) -> NDArray[np.float32]:
    """Return probabilities [n, C] as the policy lets them be seen; rows sum to 1.

    Noise is drawn from the operating system's entropy, so that a caller cannot repeat it.
    """
    p = probabilities
    classes = p.shape[1]
    if how.noise:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence()))
        p = np.clip(p + rng.normal(0.0, how.noise, p.shape), 0.0, None)
        total = p.sum(1, keepdims=True)
        p = np.where(total > 0, p / np.where(total > 0, total, 1), 1 / classes)
    if how.kind == "top1":
        hot: NDArray[np.float32] = np.eye(classes, dtype=np.float32)[p.argmax(1)]
        return hot
    if how.top_k is not None and how.top_k < classes:
        order = np.argsort(-p, axis=1, kind="stable")
        kept = np.zeros(p.shape, bool)
        np.put_along_axis(kept, order[:, : how.top_k], True, axis=1)
        rest = np.where(kept, 0.0, p).sum(1, keepdims=True) / (classes - how.top_k)
        p = np.where(kept, p, rest)
    if how.decimals is not None:
        p = np.round(p, how.decimals)
        total = p.sum(1, keepdims=True)
        p = np.where(total > 0, p / np.where(total > 0, total, 1), 1 / classes)
    return p.astype(np.float32)
