"""What the library does for a method on the server."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.algorithms.base import Batch, Tensors
from fedkd.engines.base import fit, set_mode
from fedkd.nets import Net
from fedkd.records import Records, records
from fedkd.seeding import key, numpy_rng, torch_rng
from fedkd.site import Site
from fedkd.training import Schedule, schedule

HELD_OUT = 0.1
"""Share of the proxy samples that early stopping sets aside."""

CHECK_EVERY = 50
"""Steps between two looks at the held-out loss."""


class Tools:
    """Server-side tools for one round; see :class:`fedkd.algorithms.base.ServerTools`."""

    def __init__(
        self,
        site: Site,
        round: int,
        asked: np.ndarray,
        drawn: np.ndarray | None = None,
        heard: Sequence[int] = (),
        scratch: Path | None = None,
    ) -> None:
        self._site, self._round, self.heard, self._scratch = site, round, heard, scratch
        self.asked, self.drawn = asked, asked if drawn is None else drawn
        self.classes, self.shape, self.dtype = site.classes, site.shape, site.dtype
        self.bounds = site.federation.split.train.bounds
        self.devices, self.proxies = len(site.cards), 0 if site.proxy is None else len(site.proxy)

    def seed(self, *labels: str | int) -> int:
        """Return the seed of this round's stream named by ``labels``."""
        return key(self._site.experiment.seed, "server", self._round, *labels)

    def scratch(self, label: str, *given: Tensors) -> Path | None:
        """Return a folder for what long work on ``given`` leaves behind; work on other tensors gets another one.

        It outlives an interruption of this round, and is gone once the round is saved. None where no run folder is kept.
        """
        if self._scratch is None:
            return None
        digest = hashlib.sha256()
        for name, tensor in (item for tensors in given for item in sorted(tensors.items())):
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        return self._scratch / f"{self._round}-{label}-{digest.hexdigest()[:16]}"

    def initial(self, architecture: str, *labels: str | int) -> Tensors:
        """Return fresh weights, different for different ``labels`` and rounds."""
        return self._site.initial(architecture, "server", self._round, *labels)

    def public(self, indices: np.ndarray) -> Tensor:
        """Return proxy inputs [N, ...]."""
        return self._records(indices).all()[0]

    def labels(self, indices: np.ndarray) -> Tensor:
        """Return the labels [N] of proxy samples.

        Raises:
            TypeError: they have none.
        """
        found = self._records(indices).all()[1]
        if found is None:
            raise TypeError("these proxy samples have no labels")
        return found

    def trainable(self, architecture: str) -> tuple[str, ...]:
        """Return the names of a model's parameters; its other tensors are buffers."""
        return self._site.architecture(architecture).trainable

    def net(self, architecture: str, weights: Tensors, *, training: bool = False) -> Net:
        """Return a model as a function."""
        bound = self._site.architecture(architecture)
        set_mode({"model": bound}, training)
        return Net({"model": bound}, {"model": weights}, chunk=1024)

    def module(self, architecture: str, weights: Tensors) -> nn.Module:
        """Return a real module with a copy of these weights, for hooks and training loops of a method's own."""
        return self._site.architecture(architecture).module(weights)

    @torch.no_grad()
    def logits(self, models: Sequence[tuple[str, Tensors]], indices: np.ndarray) -> Iterator[Tensor]:
        """Yield each model's logits [N, C] on proxy samples."""
        x = self.public(indices)
        for architecture, weights in models:
            yield self.net(architecture, weights)(x)

    def train(
        self,
        architecture: str,
        weights: Tensors,
        loss: Callable[[Net, Batch], Tensor],
        indices: np.ndarray,
        *,
        label: str = "student",
    ) -> Tensors:
        """Train one model on proxy samples as ``server:`` of the experiment says.

        ``batch.index`` counts within ``indices``. With ``server.patience`` a tenth of the samples is held out, their
        loss is looked at every 50 steps, and the best weights seen are returned.
        """
        settings = self._site.experiment.server
        bound = {"model": self._site.architecture(architecture)}
        data = self._records(indices)
        rng = numpy_rng(self._site.experiment.seed, "server batches", self._round, label)
        held: np.ndarray | None = None
        plan = schedule(len(data), settings, rng)
        if settings.patience is not None and len(data) >= 10:
            order = rng.permutation(len(data))
            held, rest = np.sort(order[: int(len(data) * HELD_OUT)]), np.sort(order[int(len(data) * HELD_OUT) :])
            inner = schedule(len(rest), settings, rng)
            plan = Schedule(rest[inner.index], inner.sizes)
        judge = _EarlyStop(loss, data, held, settings.patience) if held is not None else None
        final, _, _ = fit(
            bound,
            {"model": weights},
            loss,
            data,
            plan,
            settings,
            round=self._round,
            stream=torch_rng(self._site.experiment.seed, "server dropout", self._round, label),
            stop=judge,
        )
        return judge.best if judge is not None and judge.best is not None else final["model"]

    def _records(self, indices: np.ndarray) -> Records:
        if self._site.proxy_pool is None:
            raise TypeError(f"{self._site.method.name} declares no proxy set, so that it cannot train on one")
        return records(self._site.proxy_pool, indices)


class _EarlyStop:
    """Stops when the held-out loss has not fallen for ``patience`` steps, and remembers the best weights."""

    def __init__(
        self, loss: Callable[[Net, Batch], Tensor], data: Records, held: np.ndarray, patience: int | None
    ) -> None:
        positions = torch.from_numpy(held)
        x = data.inputs(positions)
        weight = torch.full((len(held),), 1 / len(held), dtype=x.dtype)
        self._batch = Batch(x=x, y=data.labels(positions), index=positions, weight=weight)
        self._loss, self._patience = loss, patience or 0
        self._least, self._since = float("inf"), 0
        self.best: Tensors | None = None

    def __call__(self, step: int, net: Net) -> bool:
        if (step + 1) % CHECK_EVERY:
            return False
        net.mode(training=False)
        with torch.no_grad():
            value = float(self._loss(net, self._batch))
        net.mode(training=True)
        if value < self._least:
            self._least, self._since = value, 0
            self.best = {name: t.detach().clone() for name, t in net.weights.items()}
        else:
            self._since += CHECK_EVERY
        return self._since >= self._patience
