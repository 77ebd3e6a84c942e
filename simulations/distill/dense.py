"""Segmentation and detection on scenes of scattered digits: ``python -m simulations.distill.dense [segment|detect]``.

Scenes of 32 x 32 pixels with 1 or 2 MNIST digits, pieces of digits as clutter, and noise. Teacher: width 12, 400 scenes;
student: width 4, 150 other scenes; 200 test scenes of MNIST's test digits. Segmentation: pixel-wise KD and CWD (on the class
maps), measured by mIoU; detection: imitation of the feature pyramid's map, and of the head, measured by COCO's mAP. Both by
torchmetrics: ``pip install 'fedkd[dense]'``. Scaled down for two cores; no published figure is for these scenes.

``--small`` draws a few scenes of the bundled digits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torch import nn

from fedkd.data import DataConfig, load
from fedkd.data.scenes import Scenes
from fedkd.distill import Distiller, Fit, Term
from fedkd.distill.dense import mean_ap, mean_iou
from fedkd.distill.tasks import Detect, Segment, drawn
from fedkd.losses.dense import ChannelWise, FeatureImitation, HeadDistillation, PixelKD
from fedkd.seeding import key
from simulations.distill.common import Report, options

CANVAS = 32
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
    counts = {"teacher": 12, "student": 8, "test": 6} if small else {"teacher": 400, "student": 150, "test": 200}
    segment = task == "segment"
    # Pixels of digits are few: a segmenter needs more steps than a detector before it sees anything but background.
    epochs, taught, batch = (1, 1, 10) if small else (60, 40, 10) if segment else (60, 20, 20)
    settings = {
        "scenes": f"{CANVAS} x {CANVAS}, {counts['teacher']} for the teacher, {counts['student']} for the student",
        "teacher": f"width 12, {taught} epochs of batches of {batch}",
        "student": f"width 4, {epochs} epochs of batches of 10",
        "optimizer": "adam 0.01, cosine",
    }
    columns = {"miou": "mIoU %"} if segment else {"map": "mAP %", "map_50": "mAP at IoU 0.5 %"}
    report = Report(f"dense {task}", settings, asked.seeds, columns, base="labels alone")
    rows = segmentation() if segment else detection()
    kind = Segment if segment else Detect
    classes = DIGITS + 1 if segment else DIGITS

    def score(net: nn.Module, scenes: Scenes) -> dict[str, float]:
        return {"miou": mean_iou(net, scenes, classes)} if segment else mean_ap(net, scenes, classes)

    def fit(length: int, batch: int) -> Fit:
        return Fit(epochs=length, batch_size=batch, optimizer="adam", lr=0.01, weight_decay=0.0, schedule="cosine")

    split = load(DataConfig(source="digits" if small else "mnist"), 1)
    for seed in asked.seeds:
        train, other, test = drawn(split, CANVAS, list(counts.values()), seed, most=2)
        makes = kind((1, CANVAS, CANVAS), classes, test)
        net = "segmenter" if segment else "detector"
        label = Term(makes.labels, 1.0)
        teacher = makes.make(f"{net}(width=12)", key("dense", task, "teacher", seed))
        Distiller(teacher, None, [label], fit=fit(taught, batch), seed=seed).fit(kind.records(train))
        report.add("(teacher)", **score(teacher, test))
        for name, terms in {"labels alone": [], **rows}.items():
            student = makes.make(f"{net}(width=4)", key("dense", task, "student", seed))
            learner = Distiller(student, teacher if terms else None, [label, *terms], fit=fit(epochs, 10), seed=seed)
            learner.fit(kind.records(other))
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


if __name__ == "__main__":
    main()
