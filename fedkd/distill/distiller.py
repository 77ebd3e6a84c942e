"""A student learns from a teacher by a list of terms."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedkd.distill.cache import AnswerCache
from fedkd.distill.loop import FEED, Batch, Epoch, Fit, Loop, Records, still
from fedkd.distill.taps import Taps
from fedkd.distill.teachers import EnsembleTeacher, ModuleTeacher, Teacher
from fedkd.distill.terms import Bound, Term
from fedkd.errors import ConfigError
from fedkd.seeding import key


class Distiller:
    """Trains ``student`` under ``teacher`` by ``terms``.

    ```python
    Distiller(student, teacher, [
        Term(CrossEntropy(), 0.1),
        Term(KD(temperature=4), 0.9),
        Term(AttentionTransfer(), 1000, student="layer2", teacher="layer2"),
    ]).fit(x, y, epochs=20)
    ```

    Args:
        student: trained in place; its hooks are gone after :meth:`fit`.
        teacher: a module (kept in evaluation mode, without gradient), a :class:`Teacher`, or several modules or teachers
            with weights as pairs; None if no term reads it.
        terms: each is logged on its own.
        fit: batches and optimiser; ``seed`` decides their order and the student's dropout.
        cache: folder for the teacher's answers to fixed data, memory-mapped; None asks it anew in each epoch.
    Raises:
        ConfigError: a layer is unknown, a term reads layers of a teacher that only answers, or does not fit the data.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher | Sequence[tuple[nn.Module | Teacher, float]] | None,
        terms: Sequence[Term],
        *,
        fit: Fit | None = None,
        seed: int = 1,
        cache: Path | None = None,
        classes: int | None = None,
    ) -> None:
        if not terms:
            raise ConfigError("a student needs at least one term to learn by")
        self.student, self.terms, self.how, self.seed = student, tuple(terms), fit or Fit(), seed
        self.teacher = _teacher(teacher, classes)
        if self.teacher is None and any(t.loss.reads != "labels" for t in terms):
            raise ConfigError("some terms read a teacher, and none is given")
        self._cache_folder = cache
        self._bound: nn.ModuleList | None = None
        self._names = _unique([term.name for term in terms])
        self.log: list[Epoch] = []

    def fit(
        self,
        x: Tensor | Records,
        y: Tensor | None = None,
        *,
        epochs: int | None = None,
        checkpoint: Path | None = None,
        watch: Callable[[Epoch], None] | None = None,
    ) -> list[Epoch]:
        """Train and return the log, one entry per epoch.

        Args:
            x: inputs [N, *shape], or :class:`Records`.
            y: labels [N] (int64); needed by terms that read labels.
            epochs: replaces ``fit.epochs``.
            checkpoint: folder that is written after an epoch, once a second at most, and at the end; where it holds an
                epoch, training goes on from there, bit for bit.
            watch: called after every epoch.
        """
        data = x if isinstance(x, Records) else Records.of(x, y)
        if data.size < 2:
            raise ConfigError(f"{data.size} records are too few to learn from")
        self._bind(data)
        assert self._bound is not None
        ask = self._asker(data)
        with Taps(self.student, [p for t in self.terms for p in t.student_paths]) as taps:
            loop = Loop(
                {"student": self.student, "terms": self._bound},
                data.size,
                lambda batch: self._step(batch, data, taps, ask),
                fit=self.how,
                seed=self.seed,
            )
            self.log = loop.run(epochs=epochs, checkpoint=checkpoint, watch=watch)
        return self.log

    def _step(self, batch: Batch, data: Records, taps: Taps, ask: Any) -> dict[str, tuple[Tensor, float]]:
        assert self._bound is not None
        x, at = data.x(batch.index), torch.from_numpy(batch.index)
        labels = None if data.y is None else data.y[at]
        answers = ask(batch.index, x)
        logits = self.student(x)
        seen = taps.all()
        found: dict[str, tuple[Tensor, float]] = {}
        for name, term, bound in zip(self._names, self.terms, self._bound, strict=True):
            own, told = term.sides((logits, seen), (answers.get("logits", logits), answers))
            found[name] = bound(own, told, labels, at), term.factor(batch.epoch)
        return found

    # ---- teacher ----------------------------------------------------------------------------------------------------
    @property
    def _teacher_paths(self) -> list[str]:
        return list(dict.fromkeys(p for t in self.terms if t.loss.reads == "features" for p in t.teacher_paths))

    def _asker(self, data: Records) -> Callable[[NDArray[np.int64], Tensor], dict[str, Tensor]]:
        """Return the function from positions and inputs of a batch to the teacher's logits and features."""
        teacher, paths = self.teacher, self._teacher_paths
        if teacher is None or all(t.loss.reads == "labels" for t in self.terms):
            return lambda index, x: {}

        def now(x: Tensor) -> dict[str, Tensor]:
            logits, features = teacher.read(x, paths)
            return {"logits": logits, **features}

        if self._cache_folder is None or data.identity is None:
            return lambda index, x: now(x)

        def missing(index: NDArray[np.int64]) -> dict[str, Tensor]:
            parts = [now(data.x(index[i : i + FEED])) for i in range(0, len(index), FEED)]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

        identity = "|".join([teacher.identity, data.identity, *paths])
        cache = AnswerCache(self._cache_folder, identity, data.size, missing)
        return lambda index, x: cache[index]

    def _bind(self, data: Records) -> None:
        """Look at one batch to learn the shapes, and make adapters."""
        if self._bound is not None:
            return
        x = data.x(np.arange(min(2, data.size)))
        paths = [p for t in self.terms for p in t.student_paths]
        for term in self.terms:
            if term.loss.reads == "features" and not term.student_paths:
                raise ConfigError(f"{term.name} reads features: name a layer with student=..., such as 'body.3'")
            if len(term.student_paths) != len(term.teacher_paths):
                raise ConfigError(f"{term.name} has {len(term.student_paths)} layers of the student, "
                                  f"{len(term.teacher_paths)} of the teacher: they are compared pair by pair")  # fmt: skip
            if term.loss.supervised and data.y is None:
                raise ConfigError(f"{term.name} needs true labels, and the data have none: leave the term out")
        with still(self.student), Taps(self.student, paths) as taps, torch.no_grad():
            logits = self.student(x)
            seen = taps.all()
        answers: dict[str, Tensor] = {}
        if self.teacher is not None:
            told, answers = self.teacher.read(x, self._teacher_paths)
            if told.shape != logits.shape:
                raise ConfigError(
                    f"the student gives class scores {list(logits.shape)}, the teacher {list(told.shape)}: they need the "
                    "same classes"
                )
        bound = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(self.seed, "adapters"))
            for term in self.terms:
                own = [seen[p] for p in term.student_paths]
                told_features = [answers[p] for p in term.teacher_paths] if term.loss.reads == "features" else []
                try:
                    bound.append(Bound(term, own, told_features, data.size, logits.shape[1]))
                except ValueError as cause:
                    raise ConfigError(f"{term.name}: {cause}") from cause
        self._bound = nn.ModuleList(bound).to(logits.dtype)


def _teacher(
    given: nn.Module | Teacher | Sequence[tuple[nn.Module | Teacher, float]] | None, classes: int | None
) -> Teacher | None:
    if given is None or isinstance(given, Teacher):
        return given
    if isinstance(given, nn.Module):
        return ModuleTeacher(given, classes or 0)
    members = [(t if isinstance(t, Teacher) else ModuleTeacher(t, classes or 0), w) for t, w in given]
    return EnsembleTeacher(members)


def _unique(names: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return out


@torch.no_grad()
def accuracy(model: nn.Module | Teacher, data: Records) -> float:
    """Return the share of right answers on labelled records."""
    if data.y is None:
        raise ConfigError("accuracy needs labels")
    hits = 0
    context = still(model) if isinstance(model, nn.Module) else contextlib.nullcontext()
    with context:
        for start in range(0, data.size, FEED):
            index = np.arange(start, min(start + FEED, data.size))
            scores = model(data.x(index)) if isinstance(model, nn.Module) else model.logits(data.x(index))
            hits += int((scores.argmax(1) == data.y[index[0] : index[-1] + 1]).sum())
    return hits / data.size
