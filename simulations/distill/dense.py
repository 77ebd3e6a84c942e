"""Segmentation and detection on scenes of scattered digits: ``python -m simulations.distill.dense [segment|detect]``.

Scenes of 48 x 48 pixels with 1 to 3 MNIST digits, pieces of digits as clutter, and noise. Teacher: width 16, 600 scenes;
student: width 4, 150 other scenes; 300 test scenes of MNIST's test digits. Segmentation: pixel-wise KD and CWD (on the class
maps), measured by mIoU; detection: imitation of the feature pyramid's map, and of the head, measured by COCO's mAP. Both by
torchmetrics: ``pip install 'fedkd[dense]'``. Scaled down for two cores; no published figure is for these scenes.

``--small`` draws a few scenes of the bundled digits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fedkd.data import DataConfig, load
from fedkd.data.scenes import Scenes, draw_scenes, targets
from fedkd.distill import Distiller, Fit, Records, Term
from fedkd.distill.dense import mean_ap, mean_iou
from fedkd.losses.dense import ChannelWise, Detection, FeatureImitation, HeadDistillation, PixelCrossEntropy, PixelKD
from fedkd.models import resolve
from fedkd.models.dense import STRIDE
from fedkd.seeding import key, numpy_rng
from simulations.distill.common import Report, options

CANVAS = 48
DIGITS = 10


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the two."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("task", nargs="?", choices=["segment", "detect"], default="segment")
    own, rest = parser.parse_known_args(words)
    task = own.task
    asked = options(__doc__, f"dense_{task}", 3, rest)
    small = asked.small
    counts = {"teacher": 12, "student": 8, "test": 6} if small else {"teacher": 600, "student": 150, "test": 300}
    epochs, taught = (1, 1) if small else (30, 12)
    settings = {
        "scenes": f"{CANVAS} x {CANVAS}, {counts['teacher']} for the teacher, {counts['student']} for the student",
        "teacher": f"width 16, {taught} epochs",
        "student": f"width 4, {epochs} epochs",
        "optimizer": "adam 0.003, cosine, batch 20",
    }
    segment = task == "segment"
    columns = {"miou": "mIoU %"} if segment else {"map": "mAP %", "map_50": "mAP at IoU 0.5 %"}
    report = Report(f"dense {task}", settings, asked.seeds, columns, base="labels alone")
    rows = segmentation() if segment else detection()
    label = PixelCrossEntropy() if segment else Detection()
    classes = DIGITS + 1 if segment else DIGITS

    def score(net: nn.Module, scenes: Scenes) -> dict[str, float]:
        return {"miou": mean_iou(net, scenes, classes)} if segment else mean_ap(net, scenes, classes)

    def net(width: int, *stream: str | int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key("dense", task, width, *stream))
            kind = "segmenter" if segment else "detector"
            made: nn.Module = resolve(f"{kind}(width={width})")((1, CANVAS, CANVAS), classes)
        return made

    def fit(length: int) -> Fit:
        return Fit(epochs=length, batch_size=20, optimizer="adam", lr=0.003, weight_decay=0.0, schedule="cosine")

    for seed in asked.seeds:
        train, other, test = drawn(small, seed, counts)
        teacher = net(16, seed)
        Distiller(teacher, None, [Term(label, 1.0)], fit=fit(taught), seed=seed).fit(records(train, segment))
        report.add("(teacher)", **score(teacher, test))
        for name, terms in {"labels alone": [], **rows}.items():
            student = net(4, "student", seed)
            Distiller(student, teacher if terms else None, [Term(label, 1.0), *terms], fit=fit(epochs), seed=seed).fit(
                records(other, segment)
            )
            report.add(name, **score(student, test))
    report.write(asked.json)


def segmentation() -> dict[str, list[Term]]:
    """Return the rows of segmentation, beside cross-entropy."""
    pixel, channel = Term(PixelKD(), 1.0), Term(ChannelWise(), student="head")
    return {"pixel-wise KD": [pixel], "CWD": [channel], "pixel-wise KD + CWD": [pixel, channel]}


def detection() -> dict[str, list[Term]]:
    """Return the rows of detection, beside focal loss and IoU."""
    imitation, head = Term(FeatureImitation(), 1.0, student="body"), Term(HeadDistillation(), 1.0)
    return {"FPN imitation": [imitation], "head": [head], "FPN imitation + head": [imitation, head]}


def records(scenes: Scenes, segment: bool) -> Records:
    """Return scenes as training records of the task."""
    if segment:
        return Records.of(scenes.x, scenes.masks)
    return Records.of(scenes.x, targets(scenes.boxes, scenes.digits, CANVAS // STRIDE, STRIDE))


def drawn(small: bool, seed: int, counts: dict[str, int]) -> list[Scenes]:
    """Return the scenes of teacher, student and test; training digits are never in test scenes."""
    split = load(DataConfig(source="digits" if small else "mnist"), 1)
    parts = []
    for name, count in counts.items():
        data = split.test if name == "test" else split.train
        grey = np.asarray(data.inputs()[:, 0] * 255, np.uint8)
        parts.append(draw_scenes(grey, data.y, count, numpy_rng("scenes", name, seed), canvas=CANVAS))
    return parts


if __name__ == "__main__":
    main()
