"""A student learns from a teacher by a list of terms: the loop of central distillation."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedkd.distill.cache import AnswerCache, data_identity
from fedkd.distill.taps import Taps
from fedkd.distill.teachers import ModuleTeacher, Teacher
from fedkd.distill.terms import Bound, Term
from fedkd.errors import ConfigError
from fedkd.seeding import key, numpy_rng
from fedkd.storage import StorageError, pack_tensors, read_bundle, unpack_tensors, write_bundle
from fedkd.store import read_metadata

FEED = 512
"""Records per forward pass where no gradient is needed."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a student is trained.

    ``milestones``: epochs after which the learning rate is multiplied by ``gamma``; ``cosine`` anneals it to 0.
    """

    epochs: int = 20
    batch_size: int = 64
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: Literal["constant", "cosine"] = "constant"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser of ``parameters``."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
            )
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, self.lr, weight_decay=self.weight_decay)

    def rate(self, epoch: int) -> float:
        """Return the learning rate of ``epoch``."""
        rate = self.lr * self.gamma ** sum(epoch >= m for m in self.milestones)
        return (
            rate * 0.5 * (1 + float(np.cos(np.pi * epoch / max(self.epochs, 1)))) if self.schedule == "cosine" else rate
        )


@dataclass(frozen=True, kw_only=True)
class Records:
    """What is trained on. ``x``: positions [n] -> inputs [n, *shape]; ``y``: labels [N], or None where there are none.

    ``identity`` names the content for cached answers; None switches the cache off (augmented or streamed inputs).
    """

    size: int
    x: Callable[[NDArray[np.int64]], Tensor]
    y: Tensor | None = None
    identity: str | None = None

    @staticmethod
    def of(x: Tensor, y: Tensor | None = None) -> Records:
        """Wrap tensors x [N, *shape] and labels y [N]."""
        arrays = [x.detach().cpu().numpy()]
        return Records(size=len(x), x=lambda index: x[torch.from_numpy(index)], y=y, identity=data_identity(arrays))


@dataclass
class Epoch:
    """What an epoch cost: the mean of every term before its weight, and their weighted sum."""

    epoch: int
    rate: float
    total: float
    terms: dict[str, float] = field(default_factory=dict)


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
            checkpoint: folder that is written after every epoch; where it holds an earlier epoch, training goes on from
                there, bit for bit.
            watch: called after every epoch.
        """
        data = x if isinstance(x, Records) else Records.of(x, y)
        if data.size < 2:
            raise ConfigError(f"{data.size} records are too few to learn from")
        wanted = self.how.epochs if epochs is None else epochs
        self._bind(data)
        assert self._bound is not None
        parameters = [p for p in (*self.student.parameters(), *self._bound.parameters()) if p.requires_grad]
        optimizer = self.how.build(parameters)
        first = self._restore(checkpoint, optimizer) if checkpoint is not None else 0
        student_paths = [p for t in self.terms for p in t.student_paths]
        ask = self._asker(data)
        with _restored_mode(self.student), Taps(self.student, student_paths) as taps:
            for epoch in range(first, wanted):
                done = self._epoch(epoch, data, optimizer, taps, ask)
                self.log.append(done)
                if checkpoint is not None:
                    self._save(checkpoint, optimizer, epoch + 1)
                if watch is not None:
                    watch(done)
        return self.log

    # ---- one epoch --------------------------------------------------------------------------------------------------
    def _epoch(self, epoch: int, data: Records, optimizer: torch.optim.Optimizer, taps: Taps, ask: Any) -> Epoch:
        assert self._bound is not None
        rate = self.how.rate(epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        order = numpy_rng(self.seed, "distill", epoch).permutation(data.size)
        factors = [term.factor(epoch) for term in self.terms]
        sums, count = np.zeros(len(self.terms)), 0
        self.student.train()
        self._bound.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(self.seed, "distill", epoch))
            for start in range(0, data.size, self.how.batch_size):
                index = order[start : start + self.how.batch_size]
                if len(index) < 2:
                    # Batch statistics and relations need company; in the next epoch the record is elsewhere.
                    continue
                values = self._step(index, data, taps, ask, factors, optimizer)
                sums += values * len(index)
                count += len(index)
        means = sums / max(count, 1)
        named = _unique([term.name for term in self.terms])
        return Epoch(epoch, rate, float(means @ np.asarray(factors)), dict(zip(named, means.tolist(), strict=True)))

    def _step(
        self,
        index: NDArray[np.int64],
        data: Records,
        taps: Taps,
        ask: Any,
        factors: Sequence[float],
        optimizer: torch.optim.Optimizer,
    ) -> NDArray[np.float64]:
        assert self._bound is not None
        x = data.x(index)
        labels = None if data.y is None else data.y[torch.from_numpy(index)]
        answers = ask(index, x)
        logits = self.student(x)
        values = []
        for term, bound in zip(self.terms, self._bound, strict=True):
            if term.loss.reads == "features":
                own = [taps[p] for p in term.student_paths]
                told = [answers[p].to(logits.dtype) for p in term.teacher_paths]
            else:
                own = [logits]
                told = [answers["logits"].to(logits.dtype)] if term.loss.reads == "logits" else [logits]
            values.append(bound(own, told, labels, torch.from_numpy(index)))
        total = torch.stack([value * factor for value, factor in zip(values, factors, strict=True)]).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()
        return np.array([float(v.detach()) for v in values])

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
            if term.loss.reads == "labels" and data.y is None:
                raise ConfigError(f"{term.name} needs true labels, and the data have none: leave the term out")
        with _evaluating(self.student), Taps(self.student, paths) as taps, torch.no_grad():
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

    # ---- checkpoints ------------------------------------------------------------------------------------------------
    def _save(self, folder: Path, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        assert self._bound is not None
        tensors = {f"student|{n}": t for n, t in self.student.state_dict().items()}
        tensors |= {f"terms|{n}": t for n, t in self._bound.state_dict().items()}
        steps = optimizer.state_dict()["state"]
        for place, slots in steps.items():
            tensors |= {f"optimizer|{place}|{slot}": v for slot, v in slots.items() if isinstance(v, Tensor)}
        streams = {str(i): s.get_state() for i, s in enumerate(self._streams())}
        tensors |= {f"stream|{i}": s for i, s in streams.items()}
        note = {"epoch": epoch, "log": [vars(e) for e in self.log]}
        write_bundle(folder, {"distiller.safetensors": pack_tensors(tensors, {"distiller": json.dumps(note)})})

    def _restore(self, folder: Path, optimizer: torch.optim.Optimizer) -> int:
        assert self._bound is not None
        if not folder.exists():
            return 0
        data = read_bundle(folder)["distiller.safetensors"]
        note = json.loads(read_metadata(data)["distiller"])
        groups: dict[str, dict[str, Tensor]] = {"student": {}, "terms": {}, "optimizer": {}, "stream": {}}
        for name, tensor in unpack_tensors(data, str(folder)).items():
            section, rest = name.split("|", 1)
            groups[section][rest] = tensor
        try:
            self.student.load_state_dict(groups["student"])
            self._bound.load_state_dict(groups["terms"])
        except RuntimeError as cause:
            raise StorageError(f"{folder} belongs to another student or other terms: {cause}") from cause
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in groups["optimizer"].items():
            place, slot = name.split("|")
            state.setdefault(int(place), {})[slot] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for stream, (_, saved) in zip(self._streams(), sorted(groups["stream"].items()), strict=True):
            stream.set_state(saved)
        self.log = [Epoch(**entry) for entry in note["log"]]
        return int(note["epoch"])

    def _streams(self) -> list[torch.Generator]:
        """Random streams of losses that draw by themselves (CRD's choice of others)."""
        assert self._bound is not None
        return [s for m in self._bound.modules() if isinstance(s := getattr(m, "stream", None), torch.Generator)]


def _teacher(
    given: nn.Module | Teacher | Sequence[tuple[nn.Module | Teacher, float]] | None, classes: int | None
) -> Teacher | None:
    if given is None or isinstance(given, Teacher):
        return given
    if isinstance(given, nn.Module):
        return ModuleTeacher(given, classes or 0)
    from fedkd.distill.teachers import EnsembleTeacher

    members = [(t if isinstance(t, Teacher) else ModuleTeacher(t, classes or 0), w) for t, w in given]
    return EnsembleTeacher(members)


def _unique(names: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return out


@contextlib.contextmanager
def _restored_mode(module: nn.Module) -> Iterator[None]:
    before = {m: m.training for m in module.modules()}
    try:
        yield
    finally:
        for m, training in before.items():
            m.training = training


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    with _restored_mode(module):
        module.eval()
        yield


@torch.no_grad()
def accuracy(model: nn.Module | Teacher, data: Records) -> float:
    """Return the share of right answers on labelled records."""
    if data.y is None:
        raise ConfigError("accuracy needs labels")
    hits = 0
    context = _evaluating(model) if isinstance(model, nn.Module) else contextlib.nullcontext()
    with context:
        for start in range(0, data.size, FEED):
            index = np.arange(start, min(start + FEED, data.size))
            scores = model(data.x(index)) if isinstance(model, nn.Module) else model.logits(data.x(index))
            hits += int((scores.argmax(1) == data.y[index[0] : index[-1] + 1]).sum())
    return hits / data.size
