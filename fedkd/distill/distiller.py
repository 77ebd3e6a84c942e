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
from fedkd.distill.teachers import EnsembleTeacher, ModuleTeacher, Teacher, scores
from fedkd.distill.terms import Bound, Term
from fedkd.errors import ConfigError
from fedkd.losses import UNKNOWN
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
        self.ready(data)
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
            own, told = term.sides((logits, seen), (answers.get("", logits), answers))
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
            # No layer is named by nothing: it is the place of the model's own answer.
            return {"": logits, **features}

        if self._cache_folder is None or data.identity is None:
            return lambda index, x: now(x)

        def missing(index: NDArray[np.int64]) -> dict[str, Tensor]:
            parts = [now(data.x(index[i : i + FEED])) for i in range(0, len(index), FEED)]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

        identity = "|".join([teacher.identity, data.identity, *paths])
        cache = AnswerCache(self._cache_folder, identity, data.size, missing)
        return lambda index, x: cache[index]

    def ready(self, data: Records) -> None:
        """Look at two records to learn the shapes, make adapters, and try the terms.

        Raises:
            ConfigError: a layer is unknown, or a term does not fit student, teacher and data.
        """
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
            logits = scores(self.student(x), "student")
            seen = taps.all()
        if not any(p.requires_grad for p in self.student.parameters()):
            raise ConfigError("the student has no weight that takes a gradient: nothing of it can be trained")
        labels = self._labels(data, logits.shape[1])
        answers: dict[str, Tensor] = {}
        if self.teacher is not None:
            told, answers = self.teacher.read(x, self._teacher_paths)
            answers = {"": told, **answers}
            if told.shape != logits.shape:
                raise ConfigError(
                    f"the student gives class scores {list(logits.shape)}, the teacher {list(told.shape)}: they need the "
                    "same classes"
                )
        bound: list[Bound] = []
        pair = logits, seen
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(self.seed, "adapters"))
            for term in self.terms:
                own, there = term.sides(pair, (answers.get("", logits), answers))
                try:
                    made = Bound(term, own, there, data.size, logits.shape[1]).to(logits.dtype)
                    if made.trained is None:
                        # Tried on two records, so that what does not fit is told before an epoch is spent.
                        with still(made), torch.no_grad():
                            made(own, there, labels, torch.arange(2))
                except ValueError as cause:
                    raise ConfigError(f"term {term.name}: {cause}") from cause
                bound.append(made)
        self._bound = nn.ModuleList(bound)

    def _labels(self, data: Records, classes: int) -> Tensor | None:
        """Return the labels of the first two records, once all are found to be labels of these classes."""
        if data.y is None:
            return None
        if len(data.y) != data.size:
            raise ConfigError(f"{data.size} records have {len(data.y)} labels: give one for each")
        if data.y.dim() == 1 and any(t.loss.supervised for t in self.terms):
            if data.y.is_floating_point():
                raise ConfigError(f"labels are {data.y.dtype}: expected whole numbers (int64)")
            low, high = int(data.y.min()), int(data.y.max())
            if low < UNKNOWN or high >= classes:
                raise ConfigError(
                    f"labels go from {low} to {high}, the student knows classes 0 to {classes - 1} ({UNKNOWN}: no label)"
                )
        return data.y[:2].clamp(min=0) if data.y.dim() == 1 else data.y[:2]


def _teacher(
    given: nn.Module | Teacher | Sequence[tuple[nn.Module | Teacher, float]] | None, classes: int | None
) -> Teacher | None:
    if given is None or isinstance(given, Teacher):
        return given
    if isinstance(given, nn.Module):
        return ModuleTeacher(given, classes or 0)
    pairs = [pair for pair in given if isinstance(pair, tuple) and len(pair) == 2]
    if len(pairs) != len(given):
        raise ConfigError("several teachers are given as pairs with weights: [(teacher, 1.0), (other, 2.0)]")
    return EnsembleTeacher([(t if isinstance(t, Teacher) else ModuleTeacher(t, classes or 0), w) for t, w in pairs])


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
