"""The work that every contender of the throughput benchmark does, and how a contender takes orders.

One *client-round*: distil for one epoch on the proxy set (soft cross-entropy against given soft labels), train for one
epoch on the client's own records (cross-entropy), both in batches of 32 by plain SGD, and answer the proxy set with
class probabilities. Everything here is PyTorch and NumPy alone, because pfl-research runs it in an environment of its
own, where fedkd is not installed.
"""

from __future__ import annotations

import json
import math
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

RECORDS = 320
PROXY = 320
BATCH = 32
CLASSES = 10
RATE = 0.05
STEPS = math.ceil(RECORDS / BATCH) + math.ceil(PROXY / BATCH)
"""Optimiser steps of one client-round."""
WARM_ROUNDS = 3
"""Rounds before any clock counts: one without a teacher, one that compiles, one that shows the steady pace."""

WORK, POOL = "work.npz", "pool.npz"


@dataclass(frozen=True)
class Setting:
    """A model, the shape of its inputs, and how many clients a round has."""

    model: str
    shape: tuple[int, ...]
    clients: int

    @property
    def image(self) -> bool:
        """Whether the model convolves."""
        return len(self.shape) == 3


SETTINGS: Mapping[str, Setting] = {
    "mlp": Setting("mlp", (64,), 256),
    "lenet": Setting("lenet", (1, 28, 28), 32),
    "logreg": Setting("logreg", (64,), 512),
}
"""Rounds are long enough that no contender is slowed by what it pays once per round."""


class Classifier(nn.Module):
    """The same layers and names as fedkd's model of that name; its weights are copied in, so that a slip shows."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        width = math.prod(setting.shape)
        if setting.model == "logreg":
            self.body: nn.Module = nn.Flatten()
        elif setting.model == "mlp":
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(width, 128), nn.ReLU())
            width = 128
        else:
            self.body = nn.Sequential(
                nn.Conv2d(setting.shape[0], 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
            )  # fmt: skip
            width = 84
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


@dataclass
class Counts:
    """What was done, counted where it is done."""

    steps: int = 0
    samples: int = 0
    answered: int = 0

    def each(self, clients: int) -> dict[str, float]:
        """Return the counts per client."""
        return {name: value / clients for name, value in vars(self).items()}


@dataclass(frozen=True)
class Work:
    """The inputs of a round as plain tensors: what the plain loop, Flower's plain client and pfl-research train on."""

    setting: Setting
    x: Tensor
    y: Tensor
    proxy: Tensor
    teacher: Tensor
    start: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path, setting: Setting) -> Work:
        """Read what :func:`save` wrote; images come in channels-last layout, the faster one on a CPU."""
        with np.load(folder / WORK, allow_pickle=False) as file:
            t = {name: torch.from_numpy(file[name]) for name in file.files}
        start = {name.removeprefix("start:"): value for name, value in t.items() if name.startswith("start:")}
        x, proxy = t["x"], t["proxy"]
        if setting.image:
            flat = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
            x = flat.unflatten(0, x.shape[:2])
            proxy = proxy.contiguous(memory_format=torch.channels_last)
        return cls(setting, x, t["y"], proxy, t["teacher"], start)

    def net(self) -> Classifier:
        """Return a model with the starting weights."""
        net = Classifier(self.setting)
        net.load_state_dict(self.start)
        return net.to(memory_format=torch.channels_last) if self.setting.image else net


def save(folder: Path, arrays: Mapping[str, NDArray[Any]], start: Mapping[str, Tensor]) -> None:
    """Write the inputs of a round for :meth:`Work.load`."""
    weights = {f"start:{name}": value.numpy() for name, value in start.items()}
    np.savez(folder / WORK, **dict(arrays), **weights)  # type: ignore[arg-type]


class Plain:
    """A client-round in plain PyTorch, as fast as eager mode goes: no optimiser object, no data loader, no metrics."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.params = list(net.parameters())
        self.start = [p.detach().clone() for p in self.params]

    def round(self, x: Tensor, y: Tensor, proxy: Tensor, teacher: Tensor, counts: Counts) -> Tensor:
        """Start from the starting weights, distil, train, and return the probabilities of the proxy set."""
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.start)
        return self.go_on(x, y, proxy, teacher, counts)

    def go_on(self, x: Tensor, y: Tensor, proxy: Tensor, teacher: Tensor, counts: Counts) -> Tensor:
        """Like :meth:`round`, from the weights as they are."""
        self._epoch(proxy, teacher, counts)
        self._epoch(x, y, counts)
        with torch.no_grad():
            counts.answered += len(proxy)
            return self.net(proxy).softmax(-1)

    def _epoch(self, x: Tensor, target: Tensor, counts: Counts) -> None:
        for xb, tb in zip(x.split(BATCH), target.split(BATCH), strict=True):
            grads = torch.autograd.grad(F.cross_entropy(self.net(xb), tb), self.params)
            with torch.no_grad():
                torch._foreach_add_(self.params, grads, alpha=-RATE)
            counts.steps += 1
            counts.samples += len(xb)


def flops(setting: Setting) -> int:
    """Count the multiplications and additions of matrix products and convolutions in one client-round."""
    from torch.utils.flop_counter import FlopCounterMode

    plain = Plain(Classifier(setting))
    x = torch.zeros(RECORDS, *setting.shape)
    with FlopCounterMode(display=False) as counter:
        plain.round(
            x, torch.zeros(RECORDS, dtype=torch.int64), x[:PROXY], torch.full((PROXY, CLASSES), 1 / CLASSES), Counts()
        )
    return int(counter.get_total_flops())


# ---- taking orders --------------------------------------------------------------------------------------------------
class Contender(ABC):
    """Something that can play rounds of all clients, one after the other."""

    clients: int

    def __init__(self) -> None:
        self.counts = Counts()

    @abstractmethod
    def round(self) -> None:
        """Let every client work once, and gather the answers."""

    @abstractmethod
    def check(self) -> dict[str, NDArray[Any]]:
        """Return arrays that are equal for contenders that did the same work, after the same number of rounds."""

    def begin(self, rounds: int) -> None:
        """Called before ``rounds`` rounds, outside the clock: tell helpers in other processes."""

    def end(self) -> None:
        """Called after the rounds, outside the clock: gather what helpers counted."""

    def counted(self) -> None:
        """Called once the work is counted, before any clock counts: stop what only counts."""

    def stop(self) -> None:
        """Called at last: let helpers end."""

    def facts(self) -> dict[str, Any]:
        """Return what the report should know: versions, settings, warnings."""
        return {"torch": torch.__version__, "threads": torch.get_num_threads()}


class Line:
    """The contender's end of the conversation: JSON, one object a line, over a Unix socket."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._file = self._socket.makefile("rw", encoding="utf-8")

    def say(self, message: Mapping[str, Any]) -> None:
        """Send one message."""
        self._file.write(json.dumps(message) + "\n")
        self._file.flush()

    def hear(self) -> dict[str, Any] | None:
        """Wait for an order; None when the other end is gone."""
        text = self._file.readline()
        found: dict[str, Any] | None = json.loads(text) if text else None
        return found


def serve(line: Line, make: Callable[[], Contender], began: float, check_file: Path) -> None:
    """Prepare a contender, warm it up, count its work, and measure on demand until told to stop.

    Args:
        began: when this process started (``time.perf_counter()``), for the start-up time.
        check_file: receives the arrays of :meth:`Contender.check`.
    """
    contender = make()
    startup = time.perf_counter() - began

    def play(rounds: int) -> float:
        contender.begin(rounds)
        t = time.perf_counter()
        for _ in range(rounds):
            contender.round()
        seconds = time.perf_counter() - t
        contender.end()
        return seconds

    try:
        warm = [play(1) for _ in range(WARM_ROUNDS)]
        contender.counts = Counts()
        steady = play(1)
        contender.counted()
        np.savez(check_file, **contender.check())  # type: ignore[arg-type]
        line.say(
            {
                "startup_seconds": startup,
                "first_rounds_seconds": warm,
                "steady_round_seconds": steady,
                "counts": contender.counts.each(contender.clients),
                "facts": contender.facts(),
            }
        )
        while (order := line.hear()) is not None and order["do"] == "measure":
            rounds = max(1, math.ceil(order["seconds"] / steady))
            seconds = play(rounds)
            steady = seconds / rounds
            line.say({"rounds": rounds, "seconds": seconds})
    finally:
        contender.stop()
