"""Answers under differential privacy: noisy votes or noisy mean labels of an ensemble, charged before they leave.

N. Papernot et al., "Scalable Private Learning with PATE", ICLR 2018, https://arxiv.org/abs/1802.08908: GNMax, the noisy
plurality of an ensemble whose members were trained on disjoint records.
"""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fedkd.distill.teachers import EnsembleTeacher, Teacher
from fedkd.errors import ConfigError
from fedkd.privacy.client_level import project_simplex
from fedkd.privacy.events import Event, Relation
from fedkd.privacy.ledger import Entry, Ledger, LedgerError
from fedkd.privacy.noise import NoiseSource
from fedkd.teacher.accounts import OverBudget
from fedkd.teacher.policy import CallerConfig, PrivateAnswersConfig

REACH: Final = math.sqrt(2)
RELATION: Final[Relation] = "replace_one"
LEDGER: Final = "ledger.jsonl"


class PrivateAnswers:
    """The mechanism of a service whose policy has ``answers.privacy``. Not safe for several threads: callers take turns.

    Guarantee:
        Unit: all the records of one member of the ensemble ("client"); a single record too, as it lies with one member.
            This needs members trained on disjoint records, which only their owner can know.
        Relation: replace-one: one member's records, and so its model, are any others.
        Sensitivity: one member moves the sum of votes, or of probabilities, of an input by at most sqrt(2) in L2, whatever
            the input is; noise N(0, sigma^2) on every class's sum, drawn from the operating system's entropy.
        Composition: over all inputs of a caller (its own ledger) and over all callers (the service's), who may share
            what they heard. Charged and synced before an answer is made. Inputs may be chosen in the light
            of earlier answers.
        Edge cases: a member that answers with NaN or infinity counts as one that knows nothing (labels) or votes for
            class 0 (votes).

    Args:
        folder: of the ledgers: ``ledger.jsonl`` of the service, ``ledger-NAME.jsonl`` of each caller.
    Raises:
        ConfigError: the teacher is no ensemble, or its members' weights differ.
        LedgerError: a ledger cannot be trusted.
    """

    def __init__(self, teacher: Teacher, config: PrivateAnswersConfig, folder: Path) -> None:
        if not isinstance(teacher, EnsembleTeacher) or len(teacher.members) < 2:
            raise ConfigError(
                "answers.privacy needs an ensemble, each member trained on records of its own: a single model's answers "
                "have no finite epsilon. Serve several models, or train the one with DP-SGD and leave answers.privacy out"
            )
        if len({member.identity for member, _ in teacher.members}) < len(teacher.members):
            raise ConfigError(
                "answers.privacy needs members trained on records of their own, and two of these are one model: its records "
                "would move the sum twice"
            )
        if len({weight for _, weight in teacher.members}) > 1:
            raise ConfigError("answers.privacy needs members of equal weight: unequal ones would move the sum by more")
        self.teacher, self.config, self._folder = teacher, config, folder
        self._life = Ledger(folder / LEDGER)
        self._ledgers: dict[str, Ledger] = {}
        self._noise = NoiseSource()

    def ledger(self, caller: str) -> Ledger:
        """Return a caller's ledger; what it charges is charged to the service's too, and first."""
        if caller not in self._ledgers:
            self._ledgers[caller] = Ledger(self._folder / f"ledger-{caller}.jsonl", self._life)
        return self._ledgers[caller]

    @property
    def charged(self) -> int:
        """Answers that the service's ledger holds, over all callers and its whole life."""
        self._life.refresh()
        return sum(entry.event.count for entry in self._life.entries)

    def price(self, count: int) -> Event:
        """Return what ``count`` answers cost."""
        # Event.sigma is relative to the add/remove sensitivity, which is 1 for a vote; labels are clipped likewise.
        return Event(sigma=self.config.sigma, count=count, reach=REACH)

    def charge(self, caller: CallerConfig, count: int) -> None:
        """Charge ``count`` answers to ``caller`` and to the service.

        Raises:
            OverBudget: the caller's epsilon, or that of all callers together, would be exceeded; nothing is charged.
            LedgerError: the ledgers cannot be written; nothing may be answered.
        """
        ledger, price, delta = self.ledger(caller.name), self.price(count), self.config.delta
        limits = ((ledger, caller.epsilon, caller.name), (self._life, self.config.epsilon, "all callers together"))
        entry = Entry(
            run=caller.name,
            round=0,
            what=f"{count} answers by noisy {self.config.kind}",
            mechanism=f"teacher {self.config.kind}",
            unit="client",
            relation=RELATION,
            event=price,
            devices=(0,),
        )
        # From the look to the charge: another process on these ledgers must not find the same budget free.
        with self._alone():
            for book, limit, who in limits:
                book.refresh()
                reason = book.would_exceed(0, [price], limit, delta, unit="client", relation=RELATION)
                if reason is not None:
                    raise OverBudget(f"{count} new inputs asked: {reason}, for {who}")
            ledger.charge([entry])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._folder / "ledger.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as cause:
            raise LedgerError(f"cannot lock the ledgers in {self._folder}: {cause.strerror or cause}") from cause
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def probabilities(self, x: Tensor) -> Tensor:
        """Return the noisy answers to inputs ``x`` [B, ...]: one-hot winners, or mean labels on the simplex, [B, C]."""
        total = torch.zeros(len(x), self.teacher.classes, dtype=torch.float64)
        for member, _ in self.teacher.members:
            p = member.logits(x).double().softmax(-1)
            if self.config.kind == "votes":
                total[torch.arange(len(x)), p.nan_to_num(nan=-1.0).argmax(-1)] += 1
            else:
                total += torch.where(p.isfinite().all(-1, keepdim=True), p, 1 / self.teacher.classes)
        dirty = total + self._noise.normal(tuple(total.shape), self.config.sigma)
        if self.config.kind == "votes":
            return torch.nn.functional.one_hot(dirty.argmax(-1), self.teacher.classes).double()
        return project_simplex(dirty / len(self.teacher.members))
