"""Losses on maps against loops over their formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkd.losses import ChannelWise, Detection, FeatureImitation, HeadDistillation, Loss, PixelCrossEntropy, PixelKD
from fedkd.losses.dense import overlap

B, C, H, W = 3, 4, 2, 3


def maps(seed: int, channels: int = C) -> Tensor:
    return torch.randn(B, channels, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def answers(seed: int) -> Tensor:
    out = maps(seed, C + 4)
    out[:, C:] = out[:, C:].abs() + 0.1
    return out


TARGET = torch.full((B, 5, H, W), -1.0, dtype=torch.float64)
TARGET[:, 1:] = 0
for n, i, j, c in ((0, 0, 1, 2.0), (1, 1, 2, 0.0), (1, 0, 0, 3.0)):
    TARGET[n, :, i, j] = torch.tensor([c, 0.5, 1.0, 1.5, 0.7], dtype=torch.float64)
PIXELS = torch.randint(C, (B, H, W), generator=torch.Generator().manual_seed(9))


def softmax(z: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(z) / np.exp(z).sum())


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def box_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Of two boxes around one position, by their corners."""
    ax, bx = (-a[0], -a[1], a[2], a[3]), (-b[0], -b[1], b[2], b[3])
    w, h = min(ax[2], bx[2]) - max(ax[0], bx[0]), min(ax[3], bx[3]) - max(ax[1], bx[1])
    inner = max(w, 0) * max(h, 0)
    area = [(v[2] - v[0]) * (v[3] - v[1]) for v in (ax, bx)]
    return float(inner / (area[0] + area[1] - inner))


def each() -> list[tuple[int, int, int]]:
    return [(n, i, j) for n in range(B) for i in range(H) for j in range(W)]


def test_pixels_follow_their_formulas() -> None:
    s, t = maps(1), maps(2)
    p, q = ({k: softmax(z[k[0], :, k[1], k[2]].numpy() / 2) for k in each()} for z in (t, s))
    wanted = np.mean([4 * (p[k] * np.log(p[k] / q[k])).sum() for k in each()])
    assert float(PixelKD(temperature=2)(s, t)) == pytest.approx(wanted, rel=1e-12)
    plain = [-math.log(softmax(s[n, :, i, j].numpy())[int(PIXELS[n, i, j])]) for n, i, j in each()]
    assert float(PixelCrossEntropy()(s, t, PIXELS)) == pytest.approx(np.mean(plain), rel=1e-12)


def test_channels_are_distributions_over_positions() -> None:
    s, t = maps(1), maps(2)
    values = []
    for n in range(B):
        for c in range(C):
            p, q = softmax(t[n, c].numpy().ravel() / 4), softmax(s[n, c].numpy().ravel() / 4)
            values.append(16 * (p * np.log(p / q)).sum())
    assert float(ChannelWise()(s, t)) == pytest.approx(np.mean(values), rel=1e-12)
    moved = s + torch.randn(1, C, 1, 1, dtype=torch.float64)
    assert float(ChannelWise()(moved, t)) == pytest.approx(np.mean(values), rel=1e-9), "a channel's level says nothing"
    with pytest.raises(ValueError, match="tap a convolution"):
        ChannelWise()(s.flatten(1), t.flatten(1))


def test_imitation_looks_at_objects() -> None:
    s, t = maps(1), maps(2)
    there = [k for k in each() if TARGET[k[0], 0, k[1], k[2]] >= 0]
    gaps = {k: float((s[k[0], :, k[1], k[2]] - t[k[0], :, k[1], k[2]]).square().mean()) for k in each()}
    assert float(FeatureImitation()(s, t, TARGET)) == pytest.approx(np.mean([gaps[k] for k in there]) / 2, rel=1e-12)
    whole = np.mean(list(gaps.values())) / 2
    assert float(FeatureImitation(everywhere=True)(s, t)) == pytest.approx(whole, rel=1e-12)
    with pytest.raises(ValueError, match="layer that the head reads"):
        FeatureImitation()(s[:, :, :1], t[:, :, :1], TARGET)


def test_detection_is_focal_loss_and_overlap() -> None:
    s = answers(1)
    total, count = 0.0, 0
    for n, i, j in each():
        kind = int(TARGET[n, 0, i, j])
        for c in range(C):
            p = sigmoid(float(s[n, c, i, j]))
            total += -0.25 * (1 - p) ** 2 * math.log(p) if c == kind else -0.75 * p**2 * math.log(1 - p)
        if kind >= 0:
            count += 1
            total += 1 - box_iou(s[n, C:, i, j].numpy(), TARGET[n, 1:, i, j].numpy())
    assert float(Detection()(s, s, TARGET)) == pytest.approx(total / count, rel=1e-9)


def test_a_head_follows_the_teachers() -> None:
    s, t = answers(1), answers(2)
    total, sure = 0.0, 0.0
    for n, i, j in each():
        chances = [sigmoid(float(t[n, c, i, j])) for c in range(C)]
        for c, p in enumerate(chances):
            q = sigmoid(float(s[n, c, i, j]))
            total += (p - q) ** 2 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
        total += max(chances) * (1 - box_iou(s[n, C:, i, j].numpy(), t[n, C:, i, j].numpy()))
        sure += max(chances)
    assert float(HeadDistillation()(s, t)) == pytest.approx(total / sure, rel=1e-9)
    assert float(HeadDistillation()(t, t)) == pytest.approx(0, abs=1e-12)
    assert bool((overlap(t[:, C:], t[:, C:]) - 1).abs().max() < 1e-9)


@pytest.mark.parametrize(
    ("loss", "labels", "channels"),
    [(PixelCrossEntropy(), PIXELS, C), (PixelKD(), None, C), (ChannelWise(), None, C), (FeatureImitation(), TARGET, C),
     (Detection(), TARGET, C + 4), (HeadDistillation(), None, C + 4)],
    ids=lambda v: type(v).__name__ if isinstance(v, Loss) else "",
)  # fmt: skip
def test_gradients_padding_and_extremes(loss: Loss, labels: Tensor | None, channels: int) -> None:
    make = answers if channels > C else maps
    s, t = make(1).requires_grad_(True), make(2)
    assert torch.autograd.gradcheck(lambda x: loss(x, t, labels), s)
    more = None if labels is None else torch.cat([labels, labels[:1]])
    weight = torch.tensor([1 / B] * B + [0.0], dtype=torch.float64)
    padded = loss(torch.cat([s.detach(), 50 * s.detach()[:1]]), torch.cat([t, -t[:1]]), more, weight)
    assert float(padded) == pytest.approx(float(loss(s, t, labels).detach()), rel=1e-9)
    big = (1e4 * s.detach()).requires_grad_(True)
    value = loss(big, 1e4 * t, labels)
    (grad,) = torch.autograd.grad(value, big)
    assert math.isfinite(float(value.detach())) and bool(torch.isfinite(grad).all())
    if labels is not None:
        with pytest.raises(ValueError, match="needs true labels"):
            loss(s, t)
