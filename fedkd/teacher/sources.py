"""What a service answers by: files, objects with ``predict_proba``, or several of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fedkd.distill.teachers import (
    EnsembleTeacher,
    PredictorTeacher,
    Teacher,
    load_teacher,
)
from fedkd.errors import ConfigError
from fedkd.labeller import class_probabilities
from fedkd.named import imported


def open_teacher(
    models: Sequence[str],
    model: str | None,
    shape: tuple[int, ...] | None,
    classes: int | None,
    gives: Literal["logits", "probabilities"] = "logits",
) -> tuple[Teacher, tuple[int, ...]]:
    """Return the teacher (an ensemble of equal weights, where several are named) and the shape of one input.

    Args:
        models: files, or ``package.module:factory``: the owner's own function that returns a fitted object with
            ``predict_proba``.
        model: architecture, where a file does not name it.
        shape, classes: of the inputs and answers, where no file tells.
        gives: of ONNX files.
    Raises:
        ConfigError: a file is missing or says too little, or the teachers do not fit each other.
    """
    found = [
        _imported(name, shape, classes)
        if ":" in name and not Path(name).exists()
        else load_teacher(Path(name), shape, classes, model, gives)
        for name in models
    ]
    shapes = sorted({t.shape for t in found if t.shape is not None})
    if len(shapes) > 1:
        raise ConfigError(f"the teachers take inputs of different shapes: {shapes}")
    form = shapes[0] if shapes else shape
    if form is None:
        raise ConfigError("no file tells the shape of one input: give --shape, such as 1x28x28")
    teacher = found[0] if len(found) == 1 else EnsembleTeacher([(t, 1.0) for t in found])
    for name, one in zip(models, found, strict=True):
        _tried(name, one, form)
    return teacher, form


def _tried(name: str, teacher: Teacher, form: tuple[int, ...]) -> None:
    """Let a teacher answer before callers pay for it.

    Raises:
        ConfigError: it cannot.
    """
    try:
        answer = teacher.logits(torch.zeros(2, *form))
    except Exception as cause:
        why = " ".join(str(cause).split())[:200]
        raise ConfigError(f"teacher {name} cannot answer a batch of 2 inputs {list(form)}: {why}") from cause
    if tuple(answer.shape) != (2, teacher.classes):
        raise ConfigError(f"teacher {name} gave {list(answer.shape)} for 2 inputs, expected {[2, teacher.classes]}")


def _imported(name: str, shape: tuple[int, ...] | None, classes: int | None) -> Teacher:
    made = imported(name, "teacher")()
    if not hasattr(made, "predict_proba"):
        raise ConfigError(f"teacher {name!r} gave a {type(made).__name__}: expected a fitted object with predict_proba")
    held = np.asarray(getattr(made, "classes_", np.zeros(0)))
    count = classes or (int(held.max()) + 1 if held.size and np.issubdtype(held.dtype, np.integer) else 0)
    if not count or shape is None:
        raise ConfigError(f"teacher {name!r} does not say what it takes and gives: add --shape and --classes")
    # What it answers to a fixed probe names it: a fitted object has no bytes of its own to hash.
    probe = np.random.default_rng(0).normal(size=(16, int(np.prod(shape)))).astype(np.float32)
    try:
        said = class_probabilities(made, probe, count)
    except Exception as cause:
        why = " ".join(str(cause).split())[:200]
        raise ConfigError(f"teacher {name} cannot answer inputs {list(shape)} with {count} classes: {why}") from cause
    identity = hashlib.sha256(name.encode() + np.ascontiguousarray(said, "<f8").tobytes()).hexdigest()
    return PredictorTeacher(made, count, identity, shape)
