"""The loop of central training over records: order, batches, learning rate, log, and checkpoints that go on bit for bit.

Whoever trains supplies a step, a function from a batch to named losses; everything else is here, once.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedkd.distill.cache import data_identity
from fedkd.losses.base import UNKNOWN
from fedkd.seeding import key, numpy_rng
from fedkd.storage import StorageError, pack_tensors, read_bundle, unpack_tensors, write_bundle
from fedkd.store import read_metadata

FEED = 512
"""Records per forward pass where no gradient is needed."""

FILE = "training.safetensors"

PAUSE = 1.0
"""Seconds between checkpoints: epochs of milliseconds would else spend their time on the disk."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a student is trained.

    ``milestones``: epochs after which the learning rate is multiplied by ``gamma``; ``cosine`` anneals it to 0. ``clip``:
    the largest norm of a step's gradient, of all parameters together; a longer one is shortened to it.
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
    clip: float | None = None

    def build(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser of ``parameters``."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
            )
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, self.lr, weight_decay=self.weight_decay)

    def descend(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Take one step of ``optimizer`` down ``loss``."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], self.clip)
        optimizer.step()

    def rate(self, epoch: int) -> float:
        """Return the learning rate of ``epoch``."""
        rate = self.lr * self.gamma ** sum(epoch >= m for m in self.milestones)
        return (
            rate * 0.5 * (1 + float(np.cos(np.pi * epoch / max(self.epochs, 1)))) if self.schedule == "cosine" else rate
        )


@dataclass(frozen=True, kw_only=True)
class Records:
    """What is trained on. ``x``: positions [n] -> inputs [n, *shape]; ``y``: labels [N], or None where there are none.

    Where some records have a label, those without have ``fedkd.losses.UNKNOWN``: terms that need labels take the mean over
    the records of a batch that have one, and are 0 for a batch without; all other terms read every record.
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

    def knowing(self, each: int, rng: np.random.Generator, share: float = 0.25) -> Records:
        """Return the same records, of which ``each`` of every class keep their label, and the rest have none.

        Those with a label come again and again, until they make up ``share`` of what an epoch reads: the few of a batch
        would else be one or two, whose mean is mostly noise.
        """
        assert self.y is not None
        classes = range(int(self.y.max()) + 1)
        own = [rng.permutation(np.flatnonzero(self.y.numpy() == c))[:each] for c in classes]
        kept = np.concatenate(own)
        more = max(0, round((share * self.size - len(kept)) / (1 - share)))
        at = np.concatenate([np.arange(self.size), kept[np.arange(more) % len(kept)]])
        y = torch.full_like(self.y, UNKNOWN)
        y[torch.from_numpy(kept)] = self.y[torch.from_numpy(kept)]
        return self._chosen(at, y)

    def labelled(self) -> Records:
        """Return the records that have a label, over and over until they are as many as all: as many steps in an epoch."""
        assert self.y is not None
        there = np.flatnonzero(self.y.numpy() != UNKNOWN)
        return self._chosen(there[np.arange(self.size) % len(there)], self.y)

    def _chosen(self, at: NDArray[np.int64], y: Tensor) -> Records:
        """Return the records at positions ``at`` [n], with labels from ``y`` [N]."""
        identity = None if self.identity is None else f"{self.identity} {data_identity([at])}"
        return Records(size=len(at), x=lambda index: self.x(at[index]), y=y[torch.from_numpy(at)], identity=identity)


@dataclass
class Epoch:
    """What an epoch cost: the mean of every term before its weight, and their weighted sum.

    ``score``: of the validation after it, where there was one.
    """

    epoch: int
    rate: float
    total: float
    terms: dict[str, float] = field(default_factory=dict)
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Best:
    """Early stopping: training ends when the score has not risen for long, and the best weights are kept.

    ``score``: of the modules in evaluation mode, without gradients; more is better. ``patience``: looks at the score
    without a better one after which training ends. ``every``: epochs between looks. ``later``: among equal scores the
    last is kept, not the first.
    """

    score: Callable[[], float]
    patience: int
    every: int = 1
    later: bool = False

    def waited(self, log: Sequence[Epoch]) -> int:
        """Return how many looks ago the best score was."""
        scores = [e.score for e in log if e.score is not None]
        if not scores:
            return 0
        return scores[::-1].index(max(scores)) if self.later else len(scores) - 1 - scores.index(max(scores))


@dataclass(frozen=True)
class Batch:
    """Positions [B] of a batch's records; ``rng`` is the epoch's own stream, for a step that draws more than them."""

    index: NDArray[np.int64]
    epoch: int
    rng: np.random.Generator


Step = Callable[[Batch], Mapping[str, tuple[Tensor, float]]]
"""A batch -> every term's loss and its weight; their weighted sum is what the batch is trained by."""


class Loop:
    """Trains modules by what ``step`` says of each batch.

    Everything random in an epoch follows from seed and epoch, so that a checkpoint holds no streams but those that losses
    keep for themselves (a ``torch.Generator`` named ``stream``).

    Args:
        parts: the modules that are trained, by the names that a checkpoint gives them.
        size: number of records N.
        step: called with every batch of at least 2 records (batch statistics and relations need company; a record that
            was left over is elsewhere in the next epoch).
        fit: batches and optimiser.
        seed: decides the order of records, and torch's stream during an epoch (dropout).
        best: early stopping, if it is wanted.
        whole: leave out what is left over after the last full batch, unless it is all there is.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        size: int,
        step: Step,
        *,
        fit: Fit,
        seed: int,
        best: Best | None = None,
        whole: bool = False,
    ) -> None:
        self.parts, self.size, self.step, self.how, self.seed = dict(parts), size, step, fit, seed
        self.best, self.whole = best, whole
        self.optimizer = fit.build([p for m in self.parts.values() for p in m.parameters() if p.requires_grad])
        self.log: list[Epoch] = []
        self._kept: dict[str, Tensor] = {}  # of the best epoch, by part and name

    def run(
        self,
        *,
        epochs: int | None = None,
        checkpoint: Path | None = None,
        watch: Callable[[Epoch], None] | None = None,
    ) -> list[Epoch]:
        """Train and return the log, one entry per epoch; the modules' modes are as they were.

        With early stopping the modules end with the weights of the best epoch; with the last where no score was taken.

        Args:
            epochs: replaces ``fit.epochs``.
            checkpoint: folder that is written after an epoch, once a second at most, and at the end; where it holds an
                epoch, training goes on from there, bit for bit.
            watch: called after every epoch.
        Raises:
            StorageError: the checkpoint is damaged, or of other modules.
        """
        first = self._restore(checkpoint) if checkpoint is not None and checkpoint.exists() else 0
        saved, when = first, time.monotonic()
        with contextlib.ExitStack() as stack:
            for module in self.parts.values():
                stack.enter_context(restored_mode(module))
            for epoch in range(first, self.how.epochs if epochs is None else epochs):
                if self.best is not None and self.best.waited(self.log) >= self.best.patience:
                    break
                self.log.append(self._epoch(epoch))
                self._look()
                if checkpoint is not None and time.monotonic() - when >= PAUSE:
                    self._save(checkpoint)
                    saved, when = len(self.log), time.monotonic()
                if watch is not None:
                    watch(self.log[-1])
        if checkpoint is not None and saved < len(self.log):
            self._save(checkpoint)
        if self._kept:
            self._load(self._kept)
        return self.log

    @torch.no_grad()
    def _look(self) -> None:
        """Take the score where it is due, and keep the weights if it is the best."""
        if self.best is None or len(self.log) % self.best.every:
            return
        for module in self.parts.values():
            module.eval()
        self.log[-1].score = float(self.best.score())
        if self.best.waited(self.log) == 0:
            self._kept = {name: t.clone() for name, t in self._weights().items()}

    def _weights(self) -> dict[str, Tensor]:
        return {f"{part}|{n}": t for part, module in self.parts.items() for n, t in module.state_dict().items()}

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        for part, module in self.parts.items():
            module.load_state_dict(below(weights, f"{part}|"))

    def _epoch(self, epoch: int) -> Epoch:
        rate = self.how.rate(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rng = numpy_rng(self.seed, "distill", epoch)
        order = rng.permutation(self.size)
        sums: dict[str, float] = {}
        total, count = 0.0, 0
        for module in self.parts.values():
            module.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(self.seed, "distill", epoch))
            for start in range(0, self.size, self.how.batch_size):
                index = order[start : start + self.how.batch_size]
                if len(index) < 2 or (self.whole and start and len(index) < self.how.batch_size):
                    continue
                found = self.step(Batch(index, epoch, rng))
                loss = torch.stack([value * factor for value, factor in found.values()]).sum()
                self.how.descend(loss, self.optimizer)
                for name, (value, factor) in found.items():
                    mean = float(value.detach())
                    sums[name] = sums.get(name, 0.0) + mean * len(index)
                    total += mean * factor * len(index)
                count += len(index)
        return Epoch(epoch, rate, total / max(count, 1), {n: v / max(count, 1) for n, v in sums.items()})

    # ---- checkpoints ------------------------------------------------------------------------------------------------
    def _save(self, folder: Path) -> None:
        tensors = self._weights() | {f"best|{n}": t for n, t in self._kept.items()}
        tensors |= {f"optimizer|{n}": t for n, t in optimizer_state(self.optimizer).items()}
        tensors |= {f"stream|{i}": s.get_state() for i, s in enumerate(self._streams())}
        note = {"log": [vars(e) for e in self.log]}
        write_bundle(folder, {FILE: pack_tensors(tensors, {"training": json.dumps(note)})})

    def _restore(self, folder: Path) -> int:
        file = _read(folder)
        tensors = unpack_tensors(file, str(folder))
        try:
            self._load(tensors)
            self._kept = below(tensors, "best|")
            load_optimizer(self.optimizer, below(tensors, "optimizer|"))
            for i, stream in enumerate(self._streams()):
                stream.set_state(tensors[f"stream|{i}"])
        except (RuntimeError, KeyError) as cause:
            raise StorageError(f"{folder} belongs to another student or other terms: {cause}") from cause
        self.log = _log(file)
        return len(self.log)

    def _streams(self) -> list[torch.Generator]:
        """Random streams of losses that draw by themselves (CRD's choice of others)."""
        modules = [m for part in self.parts.values() for m in part.modules()]
        return [s for m in modules if isinstance(s := getattr(m, "stream", None), torch.Generator)]


def logged(folder: Path) -> list[Epoch]:
    """Return the log of the training whose checkpoint is in ``folder``.

    Raises:
        StorageError: it holds none.
    """
    return _log(_read(folder))


def _log(file: bytes) -> list[Epoch]:
    return [Epoch(**entry) for entry in json.loads(read_metadata(file)["training"])["log"]]


def _read(folder: Path) -> bytes:
    files = read_bundle(folder)
    if FILE not in files:
        raise StorageError(f"{folder} holds {', '.join(files)}: expected {FILE}, the checkpoint of a training")
    return files[FILE]


# ---- what other loops share -----------------------------------------------------------------------------------------
def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimiser's moments by ``place|slot``, as a checkpoint holds them."""
    return {
        f"{place}|{slot}": torch.as_tensor(value)
        for place, slots in optimizer.state_dict()["state"].items()
        for slot, value in slots.items()
        if value is not None
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimiser the moments that :func:`optimizer_state` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, slot = name.split("|")
        state.setdefault(int(place), {})[slot] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def below(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``start``, named without it."""
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


@contextlib.contextmanager
def restored_mode(module: nn.Module) -> Iterator[None]:
    """Give every module its own mode back at the end."""
    before = {m: m.training for m in module.modules()}
    try:
        yield
    finally:
        for m, training in before.items():
            m.training = training


@contextlib.contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module gets its own mode back."""
    with restored_mode(module):
        module.eval()
        yield
