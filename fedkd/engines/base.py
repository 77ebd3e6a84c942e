"""What an engine does, and the serial engine: plain loops, one device after the other."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkd.algorithms.base import Algorithm, Batch, Card, DeviceState, Heard, Phase, Tensors, View
from fedkd.data.augment import apply, draw, join
from fedkd.experiment import Experiment, TrainingConfig
from fedkd.layers import situation
from fedkd.models import Architecture
from fedkd.nets import Net
from fedkd.payloads import Payload
from fedkd.records import Records
from fedkd.seeding import numpy_rng, torch_rng
from fedkd.training import Optimizer, Schedule, rates, schedule

if TYPE_CHECKING:
    from fedkd.site import Site


@dataclass
class Task:
    """One device's work in one round, as it goes through the phases."""

    card: Card
    state: DeviceState
    heard: Heard
    private: Records
    teach: Records | None
    ask: Records | None
    losses: dict[str, float] = field(default_factory=dict)


class Engine(ABC):
    """Runs phases and answers for many tasks. Engines differ in speed alone."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.experiment: Experiment = site.experiment
        self.method: Algorithm = site.method
        self._dealt: tuple[tuple[str, int, int], Schedule] | None = None

    @abstractmethod
    def train(self, phase: Phase, tasks: Sequence[Task]) -> None:
        """Run one phase for every task; replaces ``task.state`` and notes the mean loss."""

    @abstractmethod
    def answer(self, tasks: Sequence[Task]) -> list[Payload]:
        """Return every task's answer."""

    @abstractmethod
    def scores(self, cards: Sequence[Card], states: Sequence[DeviceState], x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (position in ``cards``, class scores [N, C] on inputs ``x``)."""

    # ---- shared -----------------------------------------------------------------------------------------------------
    def settings(self, phase: Phase) -> TrainingConfig:
        """Return the section of the experiment that governs ``phase``."""
        section: TrainingConfig = getattr(self.experiment, phase.settings)
        return section

    def records(self, phase: Phase, task: Task) -> Records | None:
        """Return the records that ``phase`` trains on."""
        if phase.data == "private":
            return task.private
        return task.teach if phase.data == "public" else self.site.proxy_all

    def deal(self, phase: Phase, task: Task, count: int) -> Schedule:
        """Deal the batches of one phase. All devices walk the proxy samples in one order, each its own records in its own."""
        shared = phase.data != "private"
        if shared and self._dealt is not None and self._dealt[0] == (phase.name, task.heard.round, count):
            return self._dealt[1]
        who: tuple[str | int, ...] = ("all",) if shared else (task.card.id,)
        rng = numpy_rng(self.experiment.seed, "batches", phase.name, task.heard.round, *who)
        plan = schedule(count, self.settings(phase), rng)
        if shared:
            self._dealt = ((phase.name, task.heard.round, count), plan)
        return plan

    def dropout_stream(self, phase: Phase, task: Task) -> torch.Generator:
        """Return the device's dropout stream for one phase."""
        return torch_rng(self.experiment.seed, "dropout", phase.name, task.heard.round, task.card.id)

    def augmenter(self, phase: Phase, tasks: Sequence[Task]) -> Augmenter | None:
        """Return what varies the batches of ``tasks`` in ``phase``; None where nothing is varied."""
        if phase.data != "private" or not self.experiment.data.augment.active:
            return None
        return Augmenter(self.experiment, phase, [(task.card.id, task.heard.round) for task in tasks])


class Augmenter:
    """Varies the batches of one phase on some devices (see :mod:`fedkd.data.augment`)."""

    def __init__(self, experiment: Experiment, phase: Phase, devices: Sequence[tuple[int, int]]) -> None:
        """Bind the devices, each as (id, round)."""
        self._config, self._seed = experiment.data.augment, experiment.seed
        self._phase, self._devices = phase.name, devices

    def __call__(self, step: int, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the varied batches [K, B, *shape] of the first K devices in ``step``; rows beyond ``sizes`` stay."""
        drawn = join(
            [
                draw(
                    self._config, numpy_rng(self._seed, "augment", self._phase, round, client, step), size, x.shape[2:]
                )
                for (client, round), size in zip(self._devices, sizes, strict=False)
            ]
        )
        real = torch.from_numpy(np.arange(x.shape[1]) < np.asarray(sizes)[:, None]).to(x.device)
        if bool(real.all()):
            return apply(self._config, x.flatten(0, 1), drawn).view(x.shape)
        x = x.clone()
        x[real] = apply(self._config, x[real], drawn)
        return x


def flat(models: Mapping[str, Tensors], roles: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of ``roles`` as ``role/name``."""
    return {f"{role}/{name}": t for role in roles for name, t in models[role].items()}


def nested(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Undo :func:`flat`."""
    models: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        role, name = key.split("/", 1)
        models.setdefault(role, {})[name] = value
    return models


def split_trainable(
    tensors: Mapping[str, Tensor], architectures: Mapping[str, Architecture], trains: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split ``role/name`` tensors into parameters that this phase trains and all the rest."""
    wanted = {f"{role}/{name}" for role in trains for name in architectures[role].trainable}
    params = {k: v for k, v in tensors.items() if k in wanted}
    return params, {k: v for k, v in tensors.items() if k not in wanted}


def set_mode(architectures: Mapping[str, Architecture], training: bool) -> None:
    """Put the templates into training or evaluation mode."""
    for architecture in architectures.values():
        architecture.template.train(training)


def fit(
    architectures: Mapping[str, Architecture],
    models: Mapping[str, Tensors],
    loss: Callable[[Net, Batch], Tensor],
    data: Records,
    plan: Schedule,
    settings: TrainingConfig,
    *,
    round: int,
    trains: Sequence[str] = ("model",),
    stream: torch.Generator | None = None,
    optimizer_state: Mapping[str, Tensor] | None = None,
    augment: Augmenter | None = None,
    stop: Callable[[int, Net], bool] | None = None,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], float]:
    """Train models by plain steps: the one loop behind serial devices and the server's student.

    Args:
        architectures, models: by role. ``models`` is left as it is.
        plan: which records form which step.
        stream: dropout stream.
        optimizer_state: to go on from, instead of a fresh optimiser.
        augment: varies the inputs of each step.
        stop: called after each step with the step's number and the net; True ends the training.
    Returns:
        The trained models by role, the optimiser's state, and the mean loss (NaN without a step).
    """
    tensors = {k: v.clone() for k, v in flat(models, list(models)).items()}
    params, rest = split_trainable(tensors, architectures, trains)
    for value in params.values():
        value.requires_grad_(True)
    optimizer = Optimizer(settings.optimizer)
    state = {k: v.clone() for k, v in optimizer_state.items()} if optimizer_state else optimizer.initial(params)
    rate = rates(settings, plan.steps, round)
    net = Net(architectures, nested({**params, **rest}))
    total, done = torch.zeros([]), 0
    set_mode(architectures, True)
    with _own_randomness(stream):
        for t in range(plan.steps):
            size = int(plan.sizes[t])
            positions = torch.from_numpy(plan.index[t, :size])
            x = data.inputs(positions)
            if augment is not None:
                x = augment(t, x[None], [size])[0]
            batch = Batch(
                x=x, y=data.labels(positions), index=positions, weight=torch.full((size,), 1 / size, dtype=x.dtype)
            )
            with situation(mask=None, generators=[stream] if stream is not None else None):
                value = loss(net, batch)
            grads = torch.autograd.grad(value, list(params.values()), materialize_grads=True)
            optimizer.step(params, grads, state, float(rate[t]))
            total, done = total + value.detach(), done + 1
            if stop is not None and stop(t, net):
                break
    final = {k: v.detach() for k, v in {**params, **rest}.items()}
    return nested(final), state, float(total / done) if done else float("nan")


@contextlib.contextmanager
def _own_randomness(stream: torch.Generator | None) -> Iterator[None]:
    """Key torch's global stream to the device, for models that draw from it by themselves (``F.dropout``, noise)."""
    with torch.random.fork_rng(devices=[]):
        if stream is not None:
            torch.manual_seed(stream.initial_seed())
        yield


class SerialEngine(Engine):
    """One device after the other, each by plain loops: the oracle that other engines must equal."""

    def train(self, phase: Phase, tasks: Sequence[Task]) -> None:
        for task in tasks:
            data = self.records(phase, task)
            if data is None or len(data) == 0:
                continue
            settings, plan = self.settings(phase), self.deal(phase, task, len(data))
            if plan.steps == 0:
                continue
            models, optimizer, mean = fit(
                self.site.architectures_of(task.card),
                task.state.models,
                lambda net, batch, task=task: phase.loss(net, batch, task.heard),  # type: ignore[misc]
                data,
                plan,
                settings,
                round=task.heard.round,
                trains=phase.trains,
                stream=self.dropout_stream(phase, task),
                optimizer_state=task.state.optimizers.get(phase.name),
                augment=self.augmenter(phase, [task]),
            )
            keep = (
                {**task.state.optimizers, phase.name: optimizer}
                if settings.optimizer.persist
                else task.state.optimizers
            )
            task.state = replace(task.state, models=models, optimizers=keep)
            task.losses[phase.name] = mean

    @torch.no_grad()
    def answer(self, tasks: Sequence[Task]) -> list[Payload]:
        payloads = []
        for task in tasks:
            architectures = self.site.architectures_of(task.card)
            set_mode(architectures, False)
            net = Net(architectures, task.state.models, chunk=1024)
            payloads.append(self.method.answer(net, self.view(task), task.heard))
        return payloads

    def view(self, task: Task) -> View:
        """Return what the method may look at for its answer."""
        private = None
        if self.method.reads_private:
            x, y = task.private.all()
            n = len(task.private)
            private = Batch(x=x, y=y, index=torch.arange(n), weight=torch.full((n,), 1 / max(n, 1), dtype=x.dtype))
        public = None if task.ask is None else task.ask.all()[0]
        return View(private=private, public=public, classes=self.site.classes)

    @torch.no_grad()
    def scores(self, cards: Sequence[Card], states: Sequence[DeviceState], x: Tensor) -> Iterator[tuple[int, Tensor]]:
        for k, (card, state) in enumerate(zip(cards, states, strict=True)):
            architectures = self.site.architectures_of(card)
            set_mode(architectures, False)
            net = Net(architectures, state.models, chunk=self.experiment.evaluation.batch_size)
            yield k, self.method.predict(net, x, state.memory)


def padded(sequences: Sequence[NDArray[np.int64]], width: int) -> NDArray[np.int64]:
    """Stack rows of different lengths, filling with zeros: [K, width]."""
    out = np.zeros((len(sequences), width), np.int64)
    for row, values in zip(out, sequences, strict=True):
        row[: len(values)] = values
    return out
