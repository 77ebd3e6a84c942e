"""Generators: noise (and classes) -> inputs. All methods take theirs from here."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.distill.datafree.base import Form


class ImageGenerator(nn.Module):
    """Noise [B, Z] -> images [B, channels, height, width].

    The generator of DAFL and DFAD: dense -> 2w maps of a quarter of the size -> BN -> up -> conv 2w-BN-LeakyReLU -> up ->
    conv w-BN-LeakyReLU -> conv -> tanh -> BN without parameters (published w: 64). Where inputs are bounded, a sigmoid
    between the bounds stands in place of the last two, as in CMI, DENSE and Co-Boosting: normalised values lie evenly around
    the middle of the bounds, and no batch could be dark or bright as a whole. With ``even`` they do so before the sigmoid,
    which gives contrast to a generator of few steps. Sizes that 4 does not divide are cut from the next one.

    Args:
        noise: Z.
        form: of the images and their bounds.
        width: w.
        even: normalise bounded values too.
    """

    def __init__(self, noise: int, form: Form, width: int = 64, even: bool = False) -> None:
        super().__init__()
        channels, height, across = form.shape
        self.form, self.noise, self.width = form, noise, width
        self.start = math.ceil(height / 4), math.ceil(across / 4)
        self.dense = nn.Linear(noise, 2 * width * self.start[0] * self.start[1])
        self.grow = nn.Sequential(
            nn.BatchNorm2d(2 * width), nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
        )  # fmt: skip
        self.squash = nn.Tanh() if form.low is None else nn.Identity()
        self.norm = nn.BatchNorm2d(channels, affine=False) if even or form.low is None else nn.Identity()
        # Convolutions of few channels are about twice as fast in this layout on a CPU.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, z: Tensor) -> Tensor:
        maps = self.dense(z).view(-1, 2 * self.width, *self.start).contiguous(memory_format=torch.channels_last)
        _, height, across = self.form.shape
        out = self.norm(self.squash(self.grow(maps)[:, :, :height, :across]))
        return self.form.place(out).contiguous()


class TableGenerator(nn.Module):
    """Noise [B, Z] -> inputs [B, *shape] of any other form, by two dense layers of ``width`` with BN and LeakyReLU."""

    def __init__(self, noise: int, form: Form, width: int = 64) -> None:
        super().__init__()
        self.form, self.noise = form, noise
        size = math.prod(form.shape)
        self.layers = nn.Sequential(
            nn.Linear(noise, width), nn.BatchNorm1d(width), nn.LeakyReLU(0.2),
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.LeakyReLU(0.2),
            nn.Linear(width, size), nn.BatchNorm1d(size, affine=False),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.layers(z)
        return self.form.place(out).view(-1, *self.form.shape)


class LatentGenerator(nn.Module):
    """Noise [B, Z] and classes [B] -> features [B, D]: dense -> BN -> ReLU -> dense on noise and one-hot class.

    The generator of FedGen (its published width is 256, Z = D = 32 for MNIST).
    """

    def __init__(self, noise: int, classes: int, features: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.first, self.norm = nn.Linear(noise + classes, width), nn.BatchNorm1d(width)
        self.last = nn.Linear(width, features)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        given = torch.cat([noise, F.one_hot(labels, self.classes).to(noise)], -1)
        out: Tensor = self.last(F.relu(self.norm(self.first(given))))
        return out

    @staticmethod
    def function(tensors: Mapping[str, Tensor], noise: Tensor, labels: Tensor) -> Tensor:
        """Return what a generator with this state gives in evaluation mode: a pure function, for ``torch.func.vmap``."""
        classes = tensors["first.weight"].shape[1] - noise.shape[-1]
        given = torch.cat([noise, F.one_hot(labels, classes).to(noise)], -1)
        inner = given @ tensors["first.weight"].T + tensors["first.bias"]
        inner = (inner - tensors["norm.running_mean"]) * (tensors["norm.running_var"] + 1e-5).rsqrt()
        inner = F.relu(inner * tensors["norm.weight"] + tensors["norm.bias"])
        return inner @ tensors["last.weight"].T + tensors["last.bias"]


def generator(form: Form, noise: int, width: int, even: bool = False) -> nn.Module:
    """Return the generator for inputs of this form: images [channels, height, width], or anything else as a table.

    ``even`` is said of :class:`ImageGenerator`; a table always has its last normalisation.
    """
    return ImageGenerator(noise, form, width, even) if len(form.shape) == 3 else TableGenerator(noise, form, width)


def renew(module: nn.Module) -> None:
    """Give a generator fresh weights: normal with deviation 0.02 around 0, and around 1 for normalisations (CMI)."""
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Conv2d):
            nn.init.normal_(m.weight, 0.0, 0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.reset_running_stats()
            if m.affine:
                nn.init.normal_(m.weight, 1.0, 0.02)
                nn.init.zeros_(m.bias)
