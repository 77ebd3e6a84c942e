"""Small nets whose answers are maps: a segmenter and a detector over one backbone with a feature pyramid."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = tuple[int, ...]

STRIDE = 4
"""Pixels per position of the pyramid's map, on which a detector answers."""


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )  # fmt: skip


class Pyramid(nn.Module):
    """Three stages at strides 2, 4 and 8, and a top-down path that ends at ``finest`` (2 or 4), in 2 x width channels.

    T. Lin, P. Dollar, R. Girshick, K. He, B. Hariharan, S. Belongie, "Feature Pyramid Networks for Object Detection", CVPR
    2017, https://arxiv.org/abs/1612.03144, figure 3, of which the finest map alone is given.
    """

    def __init__(self, channels: int, width: int, finest: int) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.stages = nn.ModuleList(
            nn.Sequential(_block(a, b, 2), _block(b, b)) for a, b in zip((channels, *widths[:2]), widths, strict=True)
        )
        self.levels = 3 if finest == 2 else 2
        self.lateral = nn.ModuleList(nn.Conv2d(w, 2 * width, 1) for w in widths[-self.levels :])
        self.smooth = nn.Conv2d(2 * width, 2 * width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        used = found[-self.levels :]
        top = self.lateral[-1](used[-1])
        for lateral, level in zip(list(self.lateral)[-2::-1], used[-2::-1], strict=True):
            top = lateral(level) + F.interpolate(top, level.shape[2:], mode="nearest")
        out: Tensor = self.smooth(top)
        return out


class Segmenter(nn.Module):
    """Scores [B, C, H, W] of every pixel's class. ``body`` gives the pyramid's map at half size, ``head`` its classes."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.body = Pyramid(channels, width, 2)
        self.head = nn.Sequential(_block(2 * width, 2 * width), nn.Conv2d(2 * width, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.head(self.body(x)), x.shape[2:], mode="bilinear", align_corners=False)


class Detector(nn.Module):
    """Class scores and side distances [B, C + 4, H / 4, W / 4] (:mod:`fedkd.losses.dense`). ``body`` gives the map that the
    head reads."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.body = Pyramid(channels, width, STRIDE)
        self.head = nn.Sequential(_block(2 * width, 2 * width), nn.Conv2d(2 * width, classes + 4, 1))
        last = self.head[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        with torch.no_grad():
            # Few positions hold an object: a start at chance 0.01 keeps the first steps calm (Lin et al. 2017, 3.3).
            last.bias[:classes] = -4.6

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.body(x))
        return torch.cat([out[:, : self.classes], F.softplus(out[:, self.classes :])], 1)


def segmenter(shape: Shape, classes: int, width: int = 8) -> nn.Module:
    """Segmentation: [B, channels, H, W] -> [B, classes, H, W]."""
    return Segmenter(_planes(shape, "segmenter"), classes, width)


def detector(shape: Shape, classes: int, width: int = 8) -> nn.Module:
    """Detection: [B, channels, H, W] -> [B, classes + 4, H / 4, W / 4]."""
    return Detector(_planes(shape, "detector"), classes, width)


def _planes(shape: Shape, name: str) -> int:
    if len(shape) != 3 or shape[1] % 8 or shape[2] % 8:
        from fedkd.errors import ConfigError

        raise ConfigError(
            f"model {name!r} wants images [channels, height, width] of sides that 8 divides, got {list(shape)}"
        )
    return shape[0]
