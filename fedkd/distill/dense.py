"""How good a segmenter or a detector is: mIoU and mAP, by torchmetrics (``pip install 'fedkd[dense]'``)."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor, nn

from fedkd.data.scenes import Scenes
from fedkd.distill.loop import still
from fedkd.errors import ConfigError
from fedkd.models.dense import STRIDE
from fedkd.named import imported

FEED = 64


@torch.no_grad()
def mean_iou(model: nn.Module, scenes: Scenes, classes: int) -> float:
    """Return the mean over classes, background among them, of intersection over union on all pixels together."""
    metric = _metric("classification:MulticlassJaccardIndex", num_classes=classes, average="macro")
    with still(model):
        for start in range(0, len(scenes), FEED):
            metric.update(model(scenes.x[start : start + FEED]).argmax(1), scenes.masks[start : start + FEED])
    return float(metric.compute())


@torch.no_grad()
def mean_ap(model: nn.Module, scenes: Scenes, classes: int) -> dict[str, float]:
    """Return COCO's ``map`` (IoU 0.50 to 0.95) and ``map_50`` of a detector's boxes."""
    metric = _metric("detection:MeanAveragePrecision", box_format="xyxy")
    with still(model):
        for start in range(0, len(scenes), FEED):
            found = boxes_of(model(scenes.x[start : start + FEED]), classes)
            stop = start + len(found)
            truth = [
                {"boxes": b, "labels": d}
                for b, d in zip(scenes.boxes[start:stop], scenes.digits[start:stop], strict=True)
            ]
            metric.update(found, truth)
    result = metric.compute()
    return {name: float(result[name]) for name in ("map", "map_50")}


def boxes_of(
    answers: Tensor, classes: int, threshold: float = 0.05, overlap: float = 0.5, most: int = 20
) -> list[dict[str, Tensor]]:
    """Return each scene's ``boxes`` [k, 4] in pixels, ``scores`` and ``labels``, for a detector's answers [B, C + 4, H, W].

    Positions of a chance above ``threshold`` are taken, the best first, and one that overlaps a better box of its class by
    more than ``overlap`` (IoU) is dropped.
    """
    found = []
    size_y, size_x = answers.shape[2:]
    y = ((torch.arange(size_y) + 0.5) * STRIDE).view(-1, 1).expand(size_y, size_x)
    x = ((torch.arange(size_x) + 0.5) * STRIDE).view(1, -1).expand(size_y, size_x)
    for answer in answers:
        chances, labels = answer[:classes].sigmoid().max(0)
        d = answer[classes:] * STRIDE
        boxes = torch.stack([x - d[0], y - d[1], x + d[2], y + d[3]], -1)
        keep = chances > threshold
        scores, order = chances[keep].sort(descending=True)
        boxes, labels = boxes[keep][order], labels[keep][order]
        chosen: list[int] = []
        for i in range(len(scores)):
            same = [j for j in chosen if int(labels[j]) == int(labels[i])]
            if not same or float(iou(boxes[i : i + 1], boxes[same]).max()) <= overlap:
                chosen.append(i)
            if len(chosen) == most:
                break
        found.append({"boxes": boxes[chosen], "scores": scores[chosen], "labels": labels[chosen]})
    return found


def iou(left: Tensor, right: Tensor) -> Tensor:
    """Return intersection over union [n, m] of boxes [n, 4] and [m, 4]."""
    low = torch.maximum(left[:, None, :2], right[None, :, :2])
    high = torch.minimum(left[:, None, 2:], right[None, :, 2:])
    inner = (high - low).clamp(min=0).prod(-1)
    area = [(b[:, 2:] - b[:, :2]).clamp(min=0).prod(-1) for b in (left, right)]
    return inner / (area[0][:, None] + area[1][None] - inner).clamp(min=1e-9)


def _metric(name: str, **options: Any) -> Any:
    _declare_operators()
    try:
        return imported(f"torchmetrics.{name}", "metric")(**options)
    except (ConfigError, ImportError) as cause:
        raise ConfigError(f"{cause}; pip install 'fedkd[dense]', with a torchvision that fits this torch") from cause


_declared: torch.library.Library | None = None


def _declare_operators() -> None:
    """Let torchvision be imported beside a torch for the CPU.

    PyPI's torchvision is built for CUDA. Beside a torch without it, its compiled operators stay unloaded, and the import
    ends where it describes two of them, which then do not exist. torchmetrics only calls functions that are written in
    Python, so that it is enough that the operators have names.
    """
    global _declared
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for part in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[part]
        _declared = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except ImportError:
        return  # torchmetrics says what is missing
