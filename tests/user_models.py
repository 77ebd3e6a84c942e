"""Models and learners as a user might bring them, for tests that name them by import path."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F


def tiny(shape: tuple[int, ...], classes: int, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), width), nn.ReLU(), nn.Linear(width, classes))


def wrong_width(shape: tuple[int, ...], classes: int) -> nn.Module:
    return tiny(shape, classes + 1)


def no_model(shape: tuple[int, ...], classes: int) -> Any:
    return {"not": "a model"}


def fails(shape: tuple[int, ...], classes: int) -> nn.Module:
    raise ValueError("needs a licence")


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        width = int(np.prod(shape))
        self.first, self.second, self.out = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, classes)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(F.relu(self.second(F.relu(self.first(x.flatten(1))))))
        return out


class Twice(nn.Module):
    """Calls one layer twice."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        width = int(np.prod(shape))
        self.inner, self.out = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(F.relu(self.inner(F.relu(self.inner(x.flatten(1))))))
        return out


class OwnNoise(nn.Module):
    """Draws from torch's global stream, as `F.dropout` does."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(int(np.prod(shape)), classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(F.dropout(x.flatten(1), 0.3, self.training))
        return out


class OddNorm(nn.Module):
    """Batch statistics that the library's layers know nothing of."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(1)
        self.out = nn.Linear(int(np.prod(shape)), classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.norm(x[:, :, None]).flatten(1))
        return out


class Centred(nn.Module):
    """What it makes of a record depends on the whole batch."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(int(np.prod(shape)), classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        out: Tensor = self.out(x - x.mean(0))
        return out


class Counting(nn.Module):
    """Keeps a count of its own of the records that it was trained on."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(int(np.prod(shape)), classes)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
        out: Tensor = self.out(x.flatten(1)) * (1 + self.seen / 1000)
        return out


class Picky(nn.Module):
    """Raises an error of its own where it is stacked."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(int(np.prod(shape)), classes)

    def forward(self, x: Tensor) -> Tensor:
        if torch._C._functorch.is_batchedtensor(self.out.weight):
            raise TypeError("takes plain tensors alone")
        out: Tensor = self.out(x.flatten(1))
        return out


def Dies(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Takes its process along, as a model does that needs more memory than there is."""
    os.kill(os.getpid(), signal.SIGKILL)
    return tiny(shape, classes)


def Notes(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Writes down what process it is built in."""
    note = {"pid": os.getpid(), "threads": torch.get_num_threads(), "omp": os.environ.get("OMP_NUM_THREADS")}
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        note["node"] = sys.modules["ray"].get_runtime_context().get_node_id()
    Path(os.environ["FEDKD_TEST_NOTES"], str(os.getpid())).write_text(json.dumps(note))
    return tiny(shape, classes)


class Unlucky:
    """A learner that cannot take few records."""

    def fit(self, x: NDArray[Any], y: NDArray[Any]) -> Self:
        if len(y) < 12:
            raise ValueError("too few records")
        self.inner = LogisticRegression(max_iter=50).fit(x, y)
        self.classes_ = self.inner.classes_
        return self

    def predict_proba(self, x: NDArray[Any]) -> NDArray[Any]:
        found: NDArray[Any] = self.inner.predict_proba(x)
        return found


class TopLabel:
    """Without gradients and without probabilities: the label of the nearest class mean, as one-hot rows."""

    def fit(self, x: NDArray[Any], y: NDArray[Any]) -> Self:
        self.classes_ = np.unique(y)
        self.means = np.stack([x[y == c].mean(0) for c in self.classes_])
        return self

    def predict_proba(self, x: NDArray[Any]) -> NDArray[Any]:
        distance = ((x[:, None, :] - self.means[None]) ** 2).sum(-1)
        return np.eye(len(self.classes_))[distance.argmin(1)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def wide(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Convolutions and max-pooling on an image enlarged by padding, as small as a LeNet gets."""
    body = nn.Sequential(
        nn.Conv2d(shape[0], 3, 5, padding=4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 5, 3), nn.ReLU(),
        nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(45, 16), nn.ReLU(),
    )  # fmt: skip
    return nn.Sequential(body, nn.Linear(16, classes))


class Elsewhere:
    """Trained elsewhere: answers, and has no ``fit``."""

    def predict_proba(self, x: NDArray[Any]) -> NDArray[Any]:
        found = np.full((len(x), 10), 0.05)
        found[:, 3] = 0.55
        return found


ELSEWHERE = Elsewhere()
"""One such object, to be named by its path."""


class Silent(Unlucky):
    """Its ``fit`` returns nothing, as nobody promised that it would."""

    def fit(self, x: NDArray[Any], y: NDArray[Any]) -> None:  # type: ignore[override]
        self.inner = LogisticRegression(max_iter=50).fit(x, y)
        self.classes_ = self.inner.classes_


class Refuses:
    """Cannot be fitted."""

    def fit(self, x: NDArray[Any], y: NDArray[Any]) -> Self:
        raise ValueError("the licence has ended")

    def predict_proba(self, x: NDArray[Any]) -> NDArray[Any]:
        raise NotImplementedError


class GivesNaN(Elsewhere):
    """Answers with what is no probability."""

    def predict_proba(self, x: NDArray[Any]) -> NDArray[Any]:
        return np.full((len(x), 10), np.nan)


class TooWide(Elsewhere):
    """Knows a class that nobody else does."""

    def predict_proba(self, x: NDArray[Any]) -> NDArray[Any]:
        return np.full((len(x), 11), 1 / 11)


class Cosine(nn.Module):
    """Uses the weight of its last layer beside that layer, as cosine classifiers and tied heads do."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 16), nn.ReLU())
        self.head = nn.Linear(16, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(x), self.head.weight) * 1e3
