"""What a student of `fedkd distill` is to do: name classes, segment scenes, or detect what is in them.

A task makes models, names the loss by which labels teach, and says how good a model is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from fedkd.data.dataset import Dataset, Split
from fedkd.data.scenes import Scenes, draw_scenes, targets
from fedkd.distill.dense import mean_ap, mean_iou
from fedkd.distill.distiller import accuracy
from fedkd.distill.loop import Records
from fedkd.distill.teachers import ModuleTeacher, Teacher, classifier
from fedkd.errors import ConfigError
from fedkd.losses import CrossEntropy, Detection, Loss, PixelCrossEntropy
from fedkd.models import resolve
from fedkd.models.dense import STRIDE
from fedkd.seeding import numpy_rng


@dataclass
class Classify:
    """Class scores [B, C] for inputs [B, *shape]; measured on ``test``, labelled records, by the share of right answers."""

    shape: tuple[int, ...]
    classes: int
    test: Records | None = None

    metric: ClassVar[str] = "accuracy"
    labels: ClassVar[Loss] = CrossEntropy()

    def make(self, name: str, seed: int) -> nn.Module:
        """Return a fresh model by its name, its weights drawn from ``seed``.

        Raises:
            ConfigError: it is not a model of this task, or torch cannot train it.
        """
        return classifier(self.shape, self.classes)(name, seed)

    def score(self, model: nn.Module | Teacher) -> float | None:
        """Return how good a model is; None where there is nothing to measure it by, or where each question costs."""
        if self.test is None or (isinstance(model, Teacher) and model.priced):
            return None
        return accuracy(model, self.test)


@dataclass
class Maps:
    """Answers that are maps, for scenes [B, 1, H, W]; measured on scenes that nobody learns on."""

    shape: tuple[int, ...]
    classes: int
    test: Scenes

    net: ClassVar[str]  # a model of the registry that does it

    def make(self, name: str, seed: int) -> nn.Module:
        """Return a fresh model by its name, its weights drawn from ``seed``.

        Raises:
            ConfigError: its answers are no maps of this task.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = resolve(name)(self.shape, self.classes)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"{name!r} is no torch model, so that it cannot be trained here")
        with torch.no_grad():
            found = tuple(model.eval()(torch.zeros(2, *self.shape)).shape)
        if found != (2, *self.answers):
            raise ConfigError(
                f"model {name!r} gives {list(found[1:])} for a scene, expected {list(self.answers)}: name a {self.net}, such "
                f"as {self.net}(width=4)"
            )
        return model.train()

    @property
    def answers(self) -> tuple[int, ...]:
        """Shape of the answer to one scene."""
        raise NotImplementedError

    def measured(self, model: nn.Module) -> float:
        """Return how good a model is on the test scenes."""
        raise NotImplementedError

    def score(self, model: nn.Module | Teacher) -> float | None:
        """Return how good a model is, None for a teacher that is no torch model."""
        if isinstance(model, ModuleTeacher):
            model = model.module
        return self.measured(model) if isinstance(model, nn.Module) else None


class Segment(Maps):
    """Class scores [B, C, H, W] of every pixel, class 0 the background; measured by mean IoU."""

    net: ClassVar[str] = "segmenter"
    metric: ClassVar[str] = "mean IoU"
    labels: ClassVar[Loss] = PixelCrossEntropy()

    @property
    def answers(self) -> tuple[int, ...]:
        return (self.classes, *self.shape[1:])

    def measured(self, model: nn.Module) -> float:
        return mean_iou(model, self.test, self.classes)

    @staticmethod
    def records(scenes: Scenes) -> Records:
        """Return scenes as training records."""
        return Records.of(scenes.x, scenes.masks)


class Detect(Maps):
    """Class scores and side distances [B, C + 4, H / 4, W / 4]; measured by COCO's mAP (IoU 0.50 to 0.95)."""

    net: ClassVar[str] = "detector"
    metric: ClassVar[str] = "mAP"
    labels: ClassVar[Loss] = Detection()

    @property
    def answers(self) -> tuple[int, ...]:
        return (self.classes + 4, self.shape[1] // STRIDE, self.shape[2] // STRIDE)

    def measured(self, model: nn.Module) -> float:
        return mean_ap(model, self.test, self.classes)["map"]

    @staticmethod
    def records(scenes: Scenes) -> Records:
        """Return scenes as training records."""
        return Records.of(scenes.x, targets(scenes.boxes, scenes.digits, scenes.x.shape[2] // STRIDE, STRIDE))


def drawn(split: Split, canvas: int, counts: Sequence[int], seed: int, most: int = 3) -> tuple[Scenes, Scenes, Scenes]:
    """Scatter grey images of one thing each over scenes for a teacher, for a student and for the test.

    Images of the training set are never in a test scene.

    Args:
        canvas: side of a scene in pixels.
        counts: number of scenes of teacher, student and test.
        most: things in a scene, at most.
    Raises:
        ConfigError: the images are not grey, or do not fit the canvas.
    """

    def one(data: Dataset, name: str, count: int) -> Scenes:
        if len(data.shape) != 3 or data.shape[0] != 1 or data.scaling is not None:
            raise ConfigError(f"scenes are drawn from grey images of 0 to 1, and {data.name} has {list(data.shape)}")
        grey = np.asarray(data.inputs()[:, 0] * 255, np.uint8)
        return draw_scenes(grey, data.y, count, numpy_rng("scenes", name, seed), canvas=canvas, most=most)

    teacher, student, test = counts
    return one(split.train, "teacher", teacher), one(split.train, "student", student), one(split.test, "test", test)
