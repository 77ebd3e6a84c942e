"""A run of central distillation: a folder on disk, resume, the student alone for comparison, and the summary."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedkd.data import load as load_data
from fedkd.data.dataset import Dataset
from fedkd.distill.cache import data_identity
from fedkd.distill.config import DistillExperiment, FitConfig, TeacherConfig
from fedkd.distill.distiller import Distiller, Epoch, Records, accuracy
from fedkd.distill.inputs import unlabelled
from fedkd.distill.teachers import EnsembleTeacher, ModuleTeacher, OnnxTeacher, Teacher, load_teacher, read_note
from fedkd.distill.terms import Term
from fedkd.errors import ConfigError
from fedkd.experiment import build, read_yaml
from fedkd.losses import CrossEntropy
from fedkd.models import Architecture
from fedkd.seeding import key
from fedkd.simulate import git_revision, versions
from fedkd.storage import StorageError, pack_tensors, read_bundle, write_atomic, write_json

CONFIG, SUMMARY, LOG, STUDENT = "config.yaml", "summary.json", "epochs.jsonl", "student.safetensors"
Watch = Callable[[str, Epoch, int], None]
"""Called after every epoch with the stage (``teacher 1``, ``student``, ``alone``), the epoch, and their number."""


@dataclass(frozen=True)
class Distilled:
    """A run's folder and its summary."""

    folder: Path
    summary: Mapping[str, Any]


def start(experiment: DistillExperiment, folder: Path, watch: Watch | None = None) -> Distilled:
    """Run ``experiment`` into a new folder.

    Raises:
        ConfigError: the folder holds a run already, or experiment, teacher and data do not fit.
    """
    if (folder / CONFIG).exists():
        raise ConfigError(f"{folder} holds a run already: go on with --resume, or choose another --out")
    work = _Work(experiment, folder, watch)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / CONFIG, experiment.dump().encode())
    return work.run()


def resume(folder: Path, watch: Watch | None = None) -> Distilled:
    """Go on with an interrupted run, or return it if it is finished.

    Raises:
        ConfigError: the folder holds no run.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} holds no run: expected a {CONFIG} in it")
    if (folder / SUMMARY).is_file():
        return Distilled(folder, json.loads((folder / SUMMARY).read_text()))
    return _Work(build(DistillExperiment, read_yaml(folder / CONFIG)), folder, watch).run()


class _Work:
    def __init__(self, experiment: DistillExperiment, folder: Path, watch: Watch | None) -> None:
        self.experiment, self.folder, self.watch = experiment, folder, watch
        self.full: Records | None = None
        self.test: Records | None = None
        self.class_names: tuple[str, ...] = ()
        # A teacher that is there already tells the form of unlabelled inputs.
        self.ready = [self._found(config) for config in experiment.teacher] if experiment.inputs is not None else []
        if experiment.inputs is None:
            self._labelled()
        else:
            form = next((t.shape for t in self.ready if t is not None and t.shape is not None), None)
            self.train = unlabelled(experiment.inputs, form)
            self.shape = tuple(self.train.x(np.zeros(1, np.int64)).shape[1:])
            self.classes = next(t.classes for t in self.ready if t is not None)
        # Built before anything is trained, so that a wrong name costs nothing.
        self.student = self._model(experiment.student, "student")

    def _labelled(self) -> None:
        experiment = self.experiment
        split = load_data(experiment.data, experiment.seed)
        self.shape, self.classes = split.train.shape, split.train.classes
        self.class_names = split.train.class_names
        if any(c >= self.classes for c in experiment.omit):
            raise ConfigError(f"omit names class {max(experiment.omit)}, the data have classes 0 to {self.classes - 1}")
        self.full, self.test = _records(split.train), _records(split.test)
        seen = np.flatnonzero(~np.isin(split.train.y, experiment.omit))
        self.train = _records(split.train.select(seen)) if experiment.omit else self.full
        if not experiment.labels:
            self.train = Records(size=self.train.size, x=self.train.x, identity=self.train.identity)

    def run(self) -> Distilled:
        began = time.perf_counter()
        experiment = self.experiment
        teachers = [self._teacher(i, config) for i, config in enumerate(experiment.teacher)]
        members = [(t, c.weight) for t, c in zip(teachers, experiment.teacher, strict=True)]
        teacher: Teacher = teachers[0] if len(teachers) == 1 else EnsembleTeacher(members, experiment.mix)
        cache = self.folder / "answers" if experiment.cache else None
        distiller = Distiller(
            self.student,
            teacher,
            [t.term for t in experiment.chosen],
            fit=experiment.training.fit,
            seed=experiment.seed,
            cache=cache,
        )
        self._fit(distiller, self.train, "student", experiment.training)
        summary = {
            "schema": 1,
            "kind": "distill",
            "name": experiment.name,
            "seed": experiment.seed,
            "accuracy": {
                "student": self._accuracy(self.student),
                "teacher": self._accuracy(teacher),
                "alone": None,
            },
            "agreement": agreement(self.student, teacher, self.train),
            "accuracy_by_class": {
                "student": self._by_class(self.student),
                "teacher": self._by_class(teacher),
            },
            "parameters": {"student": _size(self.student), "teacher": _teacher_size(teachers)},
            "log": [vars(e) for e in distiller.log],
        }
        if experiment.alone and self.train.y is not None:
            alone = self._model(experiment.student, "student")
            lonely = Distiller(
                alone, None, [Term(CrossEntropy(), 1.0)], fit=experiment.training.fit, seed=experiment.seed
            )
            self._fit(lonely, self.train, "alone", experiment.training)
            summary["accuracy"]["alone"] = self._accuracy(alone)  # type: ignore[index]
            summary["accuracy_by_class"]["alone"] = self._by_class(alone)  # type: ignore[index]
        summary |= {"seconds": time.perf_counter() - began, "versions": versions(), "git_revision": git_revision()}
        self._keep(self.student, experiment.student, self.folder / STUDENT)
        write_json(self.folder / SUMMARY, summary)
        return Distilled(self.folder, summary)

    def _teacher(self, place: int, config: TeacherConfig) -> Teacher:
        found = self.ready[place] if self.ready else self._found(config)
        if found is not None:
            if found.classes != self.classes or (found.shape is not None and found.shape != self.shape):
                raise ConfigError(
                    f"the teacher takes inputs {list(found.shape or ())} and knows {found.classes} classes, the data have "
                    f"{list(self.shape)} and {self.classes}"
                )
            return found
        assert config.model is not None and self.full is not None
        stage = f"teacher {place + 1}"
        model = self._model(config.model, stage)
        trained = Distiller(
            model,
            None,
            [Term(CrossEntropy(), 1.0)],
            fit=config.training.fit,
            seed=key(self.experiment.seed, stage) % 2**31,
        )
        self._fit(trained, self.full, stage, config.training)
        self._keep(model, config.model, self.folder / f"teacher-{place + 1}.safetensors")
        return ModuleTeacher(model, self.classes, self.shape)

    def _found(self, config: TeacherConfig) -> Teacher | None:
        """Return a teacher that is there already; None for one that is to be trained."""
        if config.url is not None:
            from fedkd.teacher.client import RemoteTeacher

            return RemoteTeacher(config.url, self.folder / "answers" / "remote.sqlite")
        if config.path is None:
            return None
        note = read_note(config.path) if self.experiment.inputs is not None else {}
        shape = tuple(note.get("shape", ())) or getattr(self, "shape", None)
        classes = int(note.get("classes", 0)) or getattr(self, "classes", None)
        if shape is None or classes is None:
            if config.path.suffix.lower() == ".onnx":
                return OnnxTeacher(config.path)
            raise ConfigError(f"{config.path} does not say what it takes and gives: name labelled `data` beside it")
        return load_teacher(config.path, shape, classes, config.model)

    def _accuracy(self, model: nn.Module | Teacher) -> float | None:
        return None if self.test is None else accuracy(model, self.test)

    def _fit(self, distiller: Distiller, data: Records, stage: str, how: FitConfig) -> None:
        place = self.folder / "checkpoints" / stage.replace(" ", "-")
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            try:
                read_bundle(place)
            except StorageError as cause:
                raise StorageError(f"{cause}; remove {place} to train this stage from its beginning") from cause

        def watch(epoch: Epoch) -> None:
            if self.watch is not None:
                self.watch(stage, epoch, how.epochs)

        distiller.fit(data, checkpoint=place, watch=watch)

    def _model(self, name: str, stage: str) -> nn.Module:
        architecture = Architecture(name, self.shape, self.classes, torch.float32)
        if not architecture.gradients:
            raise ConfigError(f"{stage} {name!r} is no torch model, so that it cannot be trained here")
        return architecture.module(architecture.initial(key(self.experiment.seed, "initial", stage, name)))

    def _by_class(self, model: nn.Module | Teacher) -> list[float | None]:
        found: list[float | None] = []
        if self.test is None or self.test.y is None:
            return found
        test, labels = self.test, self.test.y.numpy()
        for c in range(self.classes):
            rows = np.flatnonzero(labels == c)
            if not len(rows):
                found.append(None)
                continue
            part = Records(
                size=len(rows),
                x=lambda index, rows=rows: test.x(rows[index]),  # type: ignore[misc]
                y=torch.full((len(rows),), c),
            )
            found.append(accuracy(model, part))
        return found

    def _keep(self, model: nn.Module, name: str, path: Path) -> None:
        note = {"architecture": name, "shape": self.shape, "classes": self.classes, "class_names": self.class_names}
        write_atomic(path, pack_tensors(dict(model.state_dict()), {"fedkd": json.dumps(note)}))


def _records(data: Dataset) -> Records:
    identity = data_identity([np.asarray(data.x)]) + repr(data.scaling)
    return Records(
        size=len(data),
        x=lambda index: torch.from_numpy(data.inputs(index)),
        y=torch.from_numpy(data.y),
        identity=identity,
    )


@torch.no_grad()
def agreement(student: nn.Module, teacher: Teacher, data: Records, most: int = 2000) -> float:
    """Return the share of (at most ``most``) inputs on which student and teacher choose one class."""
    index = np.linspace(0, data.size - 1, min(most, data.size)).astype(np.int64)
    before = student.training
    student.eval()
    same = 0
    for start in range(0, len(index), 500):
        x = data.x(index[start : start + 500])
        same += int((student(x).argmax(1) == teacher.logits(x).argmax(1)).sum())
    student.train(before)
    return same / len(index)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _teacher_size(teachers: list[Teacher]) -> int | None:
    sizes = [_size(t.module) for t in teachers if isinstance(t, ModuleTeacher)]
    return sum(sizes) if len(sizes) == len(teachers) else None
