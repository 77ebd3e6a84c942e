"""Scenes of digits scattered on a canvas, with masks and boxes: small real-ish data for segmentation and detection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fedkd.errors import ConfigError

INK = 0.3
"""Least value of a pixel that belongs to a digit."""


@dataclass(frozen=True)
class Scenes:
    """``x`` [N, 1, H, W] in 0..1; ``masks`` [N, H, W]: 0 background, 1 + digit; per scene ``boxes`` [k, 4] (left, top,
    right, bottom, in pixels) and ``digits`` [k]."""

    x: Tensor
    masks: Tensor
    boxes: list[Tensor]
    digits: list[Tensor]

    def __len__(self) -> int:
        return len(self.x)


def draw_scenes(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    count: int,
    rng: np.random.Generator,
    *,
    canvas: int = 48,
    most: int = 3,
    sizes: tuple[int, int] = (14, 24),
    clutter: int = 4,
    noise: float = 0.1,
) -> Scenes:
    """Scatter 1 to ``most`` digits over each of ``count`` canvases.

    Args:
        images: grey images [M, H, W] of one digit each, such as MNIST's; a scene draws its digits from them.
        labels: [M].
        sizes: least and greatest height of a digit in pixels; boxes are tight around its ink.
        clutter: pieces of other digits, a third as large, that belong to the background.
        noise: deviation of Gaussian noise on every pixel.
    Raises:
        ConfigError: the largest digit does not fit the canvas.
    """
    if sizes[1] > canvas:
        raise ConfigError(f"digits of {sizes[1]} pixels do not fit a canvas of {canvas}")
    x = np.zeros((count, canvas, canvas), np.float32)
    masks = np.zeros((count, canvas, canvas), np.int64)
    boxes, digits = [], []
    for n in range(count):
        for _ in range(clutter):
            piece = _resized(images[rng.integers(len(images))], int(rng.integers(*sizes)))
            cut = piece[: len(piece) // 3, : len(piece) // 3]
            top, left = rng.integers(0, canvas - len(cut) + 1, size=2)
            area = x[n, top : top + len(cut), left : left + len(cut)]
            np.maximum(area, cut, out=area)
        placed: list[tuple[int, int, int, int]] = []
        kinds = []
        for _ in range(int(rng.integers(1, most + 1))):
            chosen = int(rng.integers(len(images)))
            digit = _resized(images[chosen], int(rng.integers(sizes[0], sizes[1] + 1)))
            ink = digit > INK
            if not ink.any():
                continue
            for _ in range(20):
                top, left = (int(v) for v in rng.integers(0, canvas - len(digit) + 1, size=2))
                rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
                box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
                if all(box[2] <= b[0] or b[2] <= box[0] or box[3] <= b[1] or b[3] <= box[1] for b in placed):
                    break
            else:
                continue
            window = np.s_[n, top : top + len(digit), left : left + len(digit)]
            x[window] = np.where(ink, digit, x[window])
            masks[window] = np.where(ink, labels[chosen] + 1, masks[window])
            placed.append(tuple(int(v) for v in box))  # type: ignore[arg-type]
            kinds.append(int(labels[chosen]))
        boxes.append(torch.tensor(placed, dtype=torch.float32).reshape(-1, 4))
        digits.append(torch.tensor(kinds, dtype=torch.int64))
    x = np.clip(x + rng.normal(0, noise, x.shape), 0, 1).astype(np.float32)
    return Scenes(torch.from_numpy(x)[:, None], torch.from_numpy(masks), boxes, digits)


def _resized(image: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    grey = torch.from_numpy(image.astype(np.float32) / 255)[None, None]
    out: NDArray[np.float32] = F.interpolate(grey, (size, size), mode="bilinear", antialias=True)[0, 0].numpy()
    return out


def targets(boxes: Sequence[Tensor], digits: Sequence[Tensor], size: int, stride: int, radius: float = 1.0) -> Tensor:
    """Return a detector's targets [N, 5, size, size]: class or -1, and distances to the box's sides in strides.

    A position belongs to a box if it lies inside and within ``radius`` strides of its centre in both directions (FCOS's
    centre sampling); to the smallest, if to several.
    """
    centres = (torch.arange(size, dtype=torch.float32) + 0.5) * stride
    found = torch.zeros(len(boxes), 5, size, size)
    found[:, 0] = -1
    for n, (scene, kinds) in enumerate(zip(boxes, digits, strict=True)):
        area = (scene[:, 2] - scene[:, 0]) * (scene[:, 3] - scene[:, 1])
        for k in area.argsort(descending=True).tolist():
            left, top, right, bottom = scene[k].tolist()
            sides = torch.stack(
                [(centres - left).expand(size, size), (centres - top).unsqueeze(1).expand(size, size),
                 (right - centres).expand(size, size), (bottom - centres).unsqueeze(1).expand(size, size)]
            )  # fmt: skip
            away_x = ((centres - (left + right) / 2).abs() <= radius * stride).expand(size, size)
            away_y = ((centres - (top + bottom) / 2).abs() <= radius * stride).unsqueeze(1).expand(size, size)
            here = (sides.amin(0) > 0) & away_x & away_y
            found[n, 0][here] = float(kinds[k])
            found[n, 1:][:, here] = sides[:, here] / stride
    return found
