"""Dense tasks: scenes fit their masks and boxes, a Distiller teaches maps, and figures come from torchmetrics."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from fedkd.data.scenes import Scenes, draw_scenes, targets
from fedkd.distill import Distiller, Fit, Records, Term
from fedkd.distill.dense import boxes_of, iou, mean_ap, mean_iou
from fedkd.errors import ConfigError
from fedkd.losses import ChannelWise, Detection, FeatureImitation, HeadDistillation, PixelCrossEntropy, PixelKD
from fedkd.models import Architecture, resolve
from fedkd.models.dense import STRIDE


def scenes(count: int, seed: int = 1) -> Scenes:
    bunch = load_digits()
    grey = np.asarray(bunch.images * 255 / 16, np.uint8)
    return draw_scenes(grey, np.asarray(bunch.target, np.int64), count, np.random.default_rng(seed), canvas=32, most=2)


def test_masks_and_boxes_fit() -> None:
    drawn = scenes(30)
    assert drawn.x.shape == (30, 1, 32, 32) and float(drawn.x.min()) >= 0 and float(drawn.x.max()) <= 1
    for mask, boxes, digits in zip(drawn.masks, drawn.boxes, drawn.digits, strict=True):
        outside = mask.clone()
        for (left, top, right, bottom), digit in zip(boxes.long().tolist(), digits.tolist(), strict=True):
            part = mask[top:bottom, left:right]
            assert bool((part == digit + 1).any())
            for edge in (part[0], part[-1], part[:, 0], part[:, -1]):
                assert bool((edge > 0).any()), "boxes are tight"
            outside[top:bottom, left:right] = 0
        assert not bool(outside.any()), "no ink outside boxes"
    again = scenes(30)
    assert torch.equal(again.x, drawn.x)
    with pytest.raises(ConfigError, match="do not fit"):
        draw_scenes(np.zeros((1, 8, 8), np.uint8), np.zeros(1, np.int64), 1, np.random.default_rng(1), canvas=16)


def test_targets_lead_back_to_their_boxes() -> None:
    drawn = scenes(20)
    wanted = targets(drawn.boxes, drawn.digits, 32 // STRIDE, STRIDE)
    perfect = torch.full((20, 14, 8, 8), -10.0)
    for n in range(20):
        for i, j in torch.nonzero(wanted[n, 0] >= 0).tolist():
            perfect[n, int(wanted[n, 0, i, j]), i, j] = 10.0
    perfect[:, 10:] = wanted[:, 1:]
    for n, found in enumerate(boxes_of(perfect, 10)):
        gaps = iou(found["boxes"], drawn.boxes[n])
        assert len(found["boxes"]) == len(drawn.boxes[n]) and bool((gaps.max(1).values > 0.99).all())
        assert found["labels"].tolist() == drawn.digits[n][gaps.argmax(1)].tolist()


def built(name: str, classes: int, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    made: nn.Module = resolve(name)((1, 32, 32), classes)
    return made


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_maps_are_taught(task: str) -> None:
    drawn = scenes(24)
    how = Fit(epochs=3, batch_size=8, optimizer="adam", lr=0.01, weight_decay=0.0)
    if task == "segment":
        student, teacher = built("segmenter(width=2)", 11), built("segmenter(width=3)", 11, 2)
        data = Records.of(drawn.x, drawn.masks)
        terms = [Term(PixelCrossEntropy(), 1.0), Term(PixelKD(), 1.0), Term(ChannelWise(), student="head"),
                 Term(ChannelWise(), 0.1, student="body")]  # fmt: skip
    else:
        student, teacher = built("detector(width=2)", 10), built("detector(width=3)", 10, 2)
        data = Records.of(drawn.x, targets(drawn.boxes, drawn.digits, 8, STRIDE))
        terms = [Term(Detection(), 1.0), Term(FeatureImitation(), 1.0, student="body"), Term(HeadDistillation(), 1.0)]
    log = Distiller(student, teacher, terms, fit=how).fit(data)
    assert log[-1].total < log[0].total and len(log[0].terms) == len(terms)


def test_such_models_are_not_taken_for_classifiers() -> None:
    with pytest.raises(ConfigError, match="expected logits"):
        Architecture("segmenter", (1, 32, 32), 11, torch.float32)
    with pytest.raises(ConfigError, match="8 divides"):
        built_wrong = resolve("detector")
        built_wrong((1, 30, 30), 10)


class Oracle(nn.Module):
    """Answers with what it was given, whatever it is asked."""

    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__()
        self.answer, self.at = answer, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.at += len(x)
        return self.answer[self.at - len(x) : self.at]


@pytest.mark.skipif(find_spec("torchmetrics") is None, reason="the extra `dense` is not installed")
def test_mean_iou_is_the_share_of_overlap() -> None:
    drawn = scenes(10)
    said = drawn.masks.clone()
    said[:, :16] = 0
    scores = torch.nn.functional.one_hot(said, 11).permute(0, 3, 1, 2).float()
    shares = []
    for c in range(11):
        a, b = said == c, drawn.masks == c
        if bool((a | b).any()):
            shares.append(float((a & b).sum() / (a | b).sum()))
    assert mean_iou(Oracle(scores), drawn, 11) == pytest.approx(np.mean(shares), rel=1e-5)


def test_mean_ap_of_an_oracle_is_one() -> None:
    drawn = scenes(12)
    wanted = targets(drawn.boxes, drawn.digits, 8, STRIDE)
    perfect = torch.full((12, 14, 8, 8), -10.0)
    perfect.scatter_(1, wanted[:, :1].long().clamp(min=0), torch.where(wanted[:, :1] >= 0, 10.0, -10.0))
    perfect[:, 10:] = wanted[:, 1:]
    if any(find_spec(name) is None for name in ("torchmetrics", "torchvision", "pycocotools")):
        with pytest.raises(ConfigError, match=r"fedkd\[dense\]"):
            mean_ap(Oracle(perfect), drawn, 10)
        return
    found = mean_ap(Oracle(perfect), drawn, 10)
    assert found["map"] > 0.99 and found["map_50"] > 0.99
