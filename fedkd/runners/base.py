"""A runner carries requests to devices and replies back, and lets a simulation look at the devices' models."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkd.algorithms.base import Card, DeviceState
from fedkd.client import fit_predictor, respond
from fedkd.engines.base import Engine, SerialEngine
from fedkd.engines.stacked import StackedEngine
from fedkd.errors import ConfigError
from fedkd.losses.response import softmax
from fedkd.messages import Reply, Request
from fedkd.site import Site
from fedkd.storage import StorageError
from fedkd.store import MemoryStore, Store
from fedkd.virtual.work import work

log = logging.getLogger(__name__)

SLICE = 256
"""Devices that go through the procedure together at most; bounds the memory of states in flight."""


@dataclass(frozen=True)
class Inspection:
    """What devices' models make of the test set.

    ``correct`` int64 [K, C]: right answers per device looked at and class. ``ensemble`` float64 [N, C]: their mean
    probabilities.
    """

    correct: NDArray[np.int64]
    ensemble: NDArray[np.float64]


class Runner(ABC):
    """Carries a round to devices and back."""

    name: str

    @abstractmethod
    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        """Yield a reply for every request, in any order."""

    def work(self, requests: Sequence[Request]) -> list[float]:
        """Return the floating-point operations that every request costs its device, for virtual time.

        Raises:
            ConfigError: nobody may look (a real network).
        """
        raise ConfigError(f"virtual time is for simulations, and {self.name} asks real devices: take out `virtual:`")

    @abstractmethod
    def inspect(self, clients: Sequence[int], round: int) -> Inspection | None:
        """Return what the devices' models are worth before ``round``; None where nobody may look (a real network)."""

    def save(self) -> Mapping[str, bytes]:
        """Return files for a checkpoint; empty where devices keep their own state."""
        return {}

    def restore(self, files: Mapping[str, bytes], round: int, waiting: Mapping[int, int]) -> None:
        """Go back to the checkpoint made after ``round``.

        Args:
            waiting: devices that were asked by then and had not worked yet, and the round that asked.
        Raises:
            StorageError: what devices kept then cannot be read.
        """

    def retain(self, files: Mapping[str, bytes]) -> None:
        """Keep what an older checkpoint refers to, should the run have to fall back to it."""


def make_engine(site: Site, kind: str) -> Engine:
    """Return the engine called ``kind``."""
    return SerialEngine(site) if kind == "serial" else StackedEngine(site)


class LocalRunner(Runner):
    """All devices in this process."""

    def __init__(self, site: Site, engine: Engine, store: Store | None = None) -> None:
        self.site, self.engine = site, engine
        self.store: Store = store if store is not None else MemoryStore()
        self.name = site.experiment.runner.kind

    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        for start in range(0, len(requests), SLICE):
            yield from respond(self.site, self.engine, self.store, requests[start : start + SLICE])

    def work(self, requests: Sequence[Request]) -> list[float]:
        return work(self.site, self.engine, self.store, requests)

    def inspect(self, clients: Sequence[int], round: int) -> Inspection | None:
        return inspect(self.site, self.engine, self.store, clients, round)

    def save(self) -> Mapping[str, bytes]:
        return self.store.snapshot()

    def restore(self, files: Mapping[str, bytes], round: int, waiting: Mapping[int, int]) -> None:
        self.store.restore(files, round)

    def retain(self, files: Mapping[str, bytes]) -> None:
        self.store.retain(files)


class Only(Runner):
    """Lets some devices alone take part; of the others an error comes back at once."""

    def __init__(self, inner: Runner, clients: Collection[int]) -> None:
        self.inner, self.name, self._clients = inner, inner.name, frozenset(clients)

    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        for request in requests:
            if request.client not in self._clients:
                yield Reply(request.client, request.round, None, "left out")
        yield from self.inner.ask([request for request in requests if request.client in self._clients])

    def inspect(self, clients: Sequence[int], round: int) -> Inspection | None:
        return self.inner.inspect(clients, round)


@torch.no_grad()
def inspect(site: Site, engine: Engine, store: Store, clients: Sequence[int], round: int) -> Inspection:
    """Evaluate the models of ``clients`` on the test set, as they stand before ``round``."""
    x = site.test.take(torch.arange(len(site.test)))
    assert site.test.y is not None
    labels = site.test.y
    cards = [site.cards[k] for k in clients]
    correct = np.zeros((len(clients), site.classes), np.int64)
    ensemble = np.zeros((len(labels), site.classes))
    # In slices, so that not all states are in memory at one time.
    for start in range(0, len(cards), SLICE):
        kept = {i: _kept(site, store, cards[i], round) for i in range(start, min(start + SLICE, len(cards)))}
        nets = [(i, state) for i, state in kept.items() if state is not None and cards[i].gradients]
        found = engine.scores([cards[i] for i, _ in nets], [state for _, state in nets], x) if nets else iter(())
        for k, scores in found:
            place = nets[k][0]
            correct[place] = count_correct(scores, labels, site.classes)
            ensemble += softmax(scores).numpy()
        for place in sorted(kept.keys() - {i for i, _ in nets}):
            scores = _predictor_scores(site, cards[place], kept[place], x)
            correct[place] = count_correct(scores, labels, site.classes)
            ensemble += softmax(scores).numpy()
    return Inspection(correct, ensemble / max(len(clients), 1))


def _kept(site: Site, store: Store, card: Card, round: int) -> DeviceState | None:
    """Return what a device kept; None if it cannot be read, for which its next request is quarantined."""
    try:
        return store.load(card.id, round).state or site.new_device(card)
    except StorageError as cause:
        log.debug("device %d cannot be looked at", card.id, exc_info=cause)
        return None


def count_correct(scores: Tensor, labels: Tensor, classes: int) -> NDArray[np.int64]:
    """Return the number of right answers per class [C]."""
    hit = labels[scores.argmax(-1) == labels]
    found: NDArray[np.int64] = torch.bincount(hit, minlength=classes).numpy()
    return found


def _predictor_scores(site: Site, card: Card, state: DeviceState | None, x: Tensor) -> Tensor:
    """Return what a client without gradients makes of ``x`` [N, C] by what it last learnt from; zeros if it cannot."""
    if state is not None and not card.gradients and len(site.private(card.id)):
        try:
            return fit_predictor(site, card, state.memory)(x)
        except Exception as cause:
            log.debug("device %d cannot be looked at", card.id, exc_info=cause)
    return torch.zeros(len(x), site.classes, dtype=site.dtype)
