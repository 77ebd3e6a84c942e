"""The models that come with the library: small nets for edge devices, each split into ``body`` and ``head``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.labeller import OWN
from fedkd.models.dense import detector, segmenter

Shape = tuple[int, ...]


class Classifier(nn.Module):
    """A body that gives features [B, D] and a head that gives logits [B, C]."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def logreg(shape: Shape, classes: int) -> nn.Module:
    """Multinomial logistic regression."""
    return Classifier(nn.Flatten(), nn.Linear(math.prod(shape), classes))


def mlp(shape: Shape, classes: int, hidden: Sequence[int] = (128,), dropout: float = 0.0) -> nn.Module:
    """A perceptron with ReLU layers of the widths ``hidden``."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(shape)
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
        width = size
    return Classifier(nn.Sequential(*layers), nn.Linear(width, classes))


def _image(shape: Shape, name: str) -> tuple[int, int, int]:
    if len(shape) != 3:
        from fedkd.errors import ConfigError

        raise ConfigError(f"model {name!r} wants images [channels, height, width], got inputs of shape {list(shape)}")
    return shape[0], shape[1], shape[2]


def lenet(shape: Shape, classes: int, width: float = 1.0) -> nn.Module:
    """LeNet-5-like: two 5x5 convolutions with max-pooling, then 120-84. ``width`` scales every layer (0.5: half)."""
    channels, height, across = _image(shape, "lenet")
    a, b, c, d = (max(1, round(n * width)) for n in (6, 16, 120, 84))
    size = [((s - 0) // 2 - 4) // 2 for s in (height, across)]
    if min(size) < 1:
        raise ValueError(f"images of {height}x{across} are too small for two 5x5 convolutions; use cnn")
    body = nn.Sequential(
        nn.Conv2d(channels, a, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(a, b, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(b * size[0] * size[1], c), nn.ReLU(), nn.Linear(c, d), nn.ReLU(),
    )  # fmt: skip
    return Classifier(body, nn.Linear(d, classes))


def cnn(
    shape: Shape, classes: int, channels: Sequence[int] = (6, 16), features: int = 32, norm: str = "batch"
) -> nn.Module:
    """3x3 stride-2 convolutions with ReLU and a normalisation (``batch``, ``group`` or ``none``), then one dense layer.

    The default is the classifier of Zhu et al., "Data-Free Knowledge Distillation for Heterogeneous Federated Learning"
    (ICML 2021), table 5: conv6-conv16, FC 784->32 on MNIST, FC 10.
    """
    inputs, height, across = _image(shape, "cnn")
    layers: list[nn.Module] = []
    for width in channels:
        layers.append(nn.Conv2d(inputs, width, 3, stride=2, padding=1))
        layers += _norm(norm, width)
        layers.append(nn.ReLU())
        inputs, height, across = width, (height + 1) // 2, (across + 1) // 2
    layers += [nn.Flatten(), nn.Linear(inputs * height * across, features), nn.ReLU()]
    return Classifier(nn.Sequential(*layers), nn.Linear(features, classes))


def _norm(kind: str, width: int) -> list[nn.Module]:
    if kind == "batch":
        return [nn.BatchNorm2d(width)]
    if kind == "group":
        return [nn.GroupNorm(math.gcd(width, 4), width)]
    if kind == "none":
        return []
    raise ValueError(f"norm is {kind!r}, expected batch, group or none")


class _Residual(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, norm: str) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, width, 3, stride, 1, bias=False), *_norm(norm, width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), *_norm(norm, width))
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.short = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), *_norm(norm, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.short(x))


def resnet(shape: Shape, classes: int, width: int = 16, norm: str = "batch") -> nn.Module:
    """A ResNet-8: a stem and three residual blocks of ``width``, 2x and 4x channels, then global average pooling."""
    inputs, _, _ = _image(shape, "resnet")
    body = nn.Sequential(
        nn.Conv2d(inputs, width, 3, 1, 1, bias=False), *_norm(norm, width), nn.ReLU(),
        _Residual(width, width, 1, norm), _Residual(width, 2 * width, 2, norm),
        _Residual(2 * width, 4 * width, 2, norm), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    return Classifier(body, nn.Linear(4 * width, classes))


class Own:
    """Stands for the model that a device on a real network has itself, and that nobody else knows."""

    def predict_proba(self, x: object) -> object:
        """Refuse: the model is not here.

        Raises:
            ConfigError: always.
        """
        from fedkd.errors import ConfigError

        raise ConfigError("model 'own' is on its device, which labels by it on a real network: it cannot be asked here")


def own(shape: Shape, classes: int) -> Own:
    """A device's own model, named in its data.yaml."""
    return Own()


REGISTRY: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "logreg": logreg,
        "mlp": mlp,
        "lenet": lenet,
        "lenet_half": partial(lenet, width=0.5),
        "cnn": cnn,
        "resnet": resnet,
        OWN: own,
    }
)

DENSE: Mapping[str, Callable[..., nn.Module]] = MappingProxyType({"segmenter": segmenter, "detector": detector})
"""Models by name whose answers are maps; no classifiers, so that no experiment offers them."""
