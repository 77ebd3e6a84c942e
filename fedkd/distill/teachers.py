"""Teachers: whatever answers inputs with class scores, whether torch can look inside or not."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedkd.distill.loop import still
from fedkd.distill.taps import Taps
from fedkd.errors import ConfigError
from fedkd.labeller import FLOOR, OnnxPredictor, class_probabilities
from fedkd.models import Architecture
from fedkd.storage import StorageError, unpack_tensors
from fedkd.store import read_metadata


class Teacher(ABC):
    """Answers inputs [B, *shape] with logits [B, C].

    Attributes:
        shape: shape of one input, or None where the teacher does not say.
        classes: number of classes C.
        identity: hash of what it answers by; cached answers belong to it.
        priced: whether every new input costs a query, so that it is asked for nothing but to learn from it.
        queries_left: new inputs that it will still answer; None where there is no limit.
        paid: different inputs paid so far, over all processes of a run; None where nothing is.
        told: what a service says of its answers and of their privacy; None for a teacher that is at hand.
    """

    shape: tuple[int, ...] | None
    classes: int
    identity: str
    priced: bool = False
    queries_left: int | None = None

    @property
    def paid(self) -> int | None:
        return None

    @property
    def told(self) -> str | None:
        return None

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Return class scores [B, C] without gradient."""

    def read(self, x: Tensor, paths: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits, and the features of the layers at ``paths``.

        Raises:
            ConfigError: the teacher has no layers to look at.
        """
        if paths:
            raise ConfigError(
                f"layers ({', '.join(paths)}) can be read of one torch model alone, and the teacher is of the kind "
                f"{type(self).__name__}: use losses on the response, such as kd"
            )
        return self.logits(x), {}


class ModuleTeacher(Teacher):
    """A torch model; it answers in evaluation mode without gradient, and stays as it is."""

    def __init__(self, module: nn.Module, classes: int, shape: tuple[int, ...] | None = None) -> None:
        self.module = module
        self.classes, self.shape = classes, shape
        digest = hashlib.sha256()
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        self.identity = digest.hexdigest()

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        return self.read(x, ())[0]

    @torch.no_grad()
    def read(self, x: Tensor, paths: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        with still(self.module), Taps(self.module, paths) as taps:
            return scores(self.module(x), "teacher"), taps.all()


def scores(found: object, who: str) -> Tensor:
    """Return what a model gave, if it is one tensor.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"the {who} gives a {type(found).__name__}: expected one tensor of class scores; wrap it in one that picks it"
        )
    return found


class OnnxTeacher(Teacher):
    """An ONNX file, run by onnxruntime on the CPU with torch's number of threads.

    Args:
        gives: whether its first output of floats [N, C] is logits or probabilities.
    Raises:
        ConfigError: onnxruntime is not installed, the file is no such model, or does not say how many classes it knows.
    """

    def __init__(self, path: Path, gives: Literal["logits", "probabilities"] = "logits") -> None:
        self._file = OnnxPredictor(path, gives, threads=torch.get_num_threads())
        if self._file.classes is None:
            raise ConfigError(f"{path} leaves the number of classes open: export it with a fixed last axis")
        self.shape, self.classes, self.identity = self._file.shape, self._file.classes, self._file.identity

    def logits(self, x: Tensor) -> Tensor:
        found = self._file.scores(x.numpy())
        return (
            torch.from_numpy(found).to(x.dtype) if self._file.gives == "logits" else log_probabilities(found, x.dtype)
        )


class PredictorTeacher(Teacher):
    """Any object with ``predict_proba``, such as scikit-learn's classifiers; inputs are flattened to [B, D]."""

    def __init__(self, predictor: Any, classes: int, identity: str, shape: tuple[int, ...] | None = None) -> None:
        self._predictor, self.classes, self.identity, self.shape = predictor, classes, identity, shape

    def logits(self, x: Tensor) -> Tensor:
        found = class_probabilities(self._predictor, x.flatten(1).numpy(), self.classes)
        return torch.from_numpy(np.log(found)).to(x.dtype)


class EnsembleTeacher(Teacher):
    """Several teachers with weights: the logarithm of their weighted mean probability, or their weighted mean logit."""

    def __init__(
        self, members: Sequence[tuple[Teacher, float]], mix: Literal["probabilities", "logits"] = "probabilities"
    ) -> None:
        if not members or any(w < 0 for _, w in members) or sum(w for _, w in members) <= 0:
            raise ConfigError("an ensemble needs at least one teacher, and weights of at least 0 that are not all 0")
        counts = sorted({teacher.classes for teacher, _ in members})
        if len(counts) > 1:
            raise ConfigError(f"the teachers of an ensemble speak of {counts} classes: they need the same classes")
        total = sum(w for _, w in members)
        self.members, self.mix = [(t, w / total) for t, w in members], mix
        self.classes = counts[0]
        self.shape = next((t.shape for t, _ in members if t.shape is not None), None)
        self.priced = any(t.priced for t, _ in members)
        self.queries_left = min((t.queries_left for t, _ in members if t.queries_left is not None), default=None)
        text = mix + "".join(f"{t.identity}:{w!r};" for t, w in self.members)
        self.identity = hashlib.sha256(text.encode()).hexdigest()

    @property
    def paid(self) -> int | None:
        known = [t.paid for t, _ in self.members if t.paid is not None]
        return sum(known) if known else None

    @property
    def told(self) -> str | None:
        return "; ".join(t.told for t, _ in self.members if t.told is not None) or None

    def logits(self, x: Tensor) -> Tensor:
        found = [(teacher.logits(x), weight) for teacher, weight in self.members]
        if self.mix == "logits":
            return torch.stack([z * w for z, w in found]).sum(0)
        return torch.stack([z.softmax(-1) * w for z, w in found]).sum(0).clamp(min=FLOOR).log()


def log_probabilities(probabilities: NDArray[np.floating], dtype: torch.dtype) -> Tensor:
    """Return logits for probabilities [B, C]: their logarithms, floored at :data:`fedkd.labeller.FLOOR`."""
    full = np.clip(np.asarray(probabilities, np.float64), FLOOR, None)
    return torch.from_numpy(np.log(full / full.sum(axis=1, keepdims=True))).to(dtype)


# ---- reading --------------------------------------------------------------------------------------------------------
Make = Callable[[str, int], nn.Module]
"""Name of a model and a seed -> the model, fresh: see :mod:`fedkd.distill.tasks`."""


def load_teacher(
    path: Path,
    shape: tuple[int, ...] | None = None,
    classes: int | None = None,
    model: str | None = None,
    gives: Literal["logits", "probabilities"] = "logits",
    make: Make | None = None,
) -> Teacher:
    """Read a teacher from a file, by its ending.

    Args:
        path: ``.safetensors`` as fedkd writes it (``student.safetensors`` of a run), or any with ``model`` named;
            ``.onnx``; ``.pt``, ``.pth``: a state dict, read with ``weights_only=True``, with ``model`` named.
        shape, classes: what the data have, and the teacher must fit; None where the file tells.
        model: the architecture, where the file does not name it.
        gives: of an ONNX file.
        make: makes the model by its name; None makes classifiers.
    Raises:
        ConfigError: the file is missing or damaged, names no model, says too little, or does not fit the data.
    """
    ending = path.suffix.lower()
    if ending == ".onnx":
        teacher: Teacher = OnnxTeacher(path, gives)
    elif ending in (".safetensors", ".pt", ".pth"):
        note = read_note(path) if ending == ".safetensors" else {}
        own_shape, own_classes = note.get("shape", shape), note.get("classes", classes)
        if own_shape is None or own_classes is None:
            raise ConfigError(
                f"{path} does not say what it takes and gives: the shape of one input and the number of classes must be "
                "named beside it, by labelled `data` or by --shape and --classes"
            )
        form = tuple(own_shape), int(own_classes)
        if make is None or form != (shape, classes):
            make = classifier(*form)
        weights = unpack_tensors(_bytes(path), str(path)) if ending == ".safetensors" else _pickled(path)
        teacher = _module(weights, path, model or note.get("architecture"), *form, make)
    else:
        raise ConfigError(f"teacher {path}: expected a file ending in .safetensors, .onnx, .pt or .pth")
    if classes is not None and teacher.classes != classes:
        raise ConfigError(f"teacher {path} knows {teacher.classes} classes, the data have {classes}")
    if shape is not None and teacher.shape is not None and teacher.shape != tuple(shape):
        raise ConfigError(f"teacher {path} takes inputs {list(teacher.shape)}, the data have {list(shape)}")
    return teacher


def read_note(path: Path) -> dict[str, Any]:
    """Return what a student's file says of itself: architecture, shape, classes; empty for a file of another maker."""
    data = _bytes(path)
    try:
        return dict(json.loads(read_metadata(data)["fedkd"]))
    except (StorageError, KeyError, ValueError):
        return {}


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as cause:
        raise ConfigError(
            f"{path} holds more than tensors, or is damaged; only weights are read from a pickle: save the state dict, "
            "or better a .safetensors file"
        ) from cause
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ConfigError(f"{path} holds no state dict: expected a mapping of names to tensors")
    return found


def classifier(shape: tuple[int, ...], classes: int) -> Make:
    """Return what makes classifiers of inputs [B, *shape]; it refuses a model that torch cannot train."""

    def make(name: str, seed: int) -> nn.Module:
        architecture = Architecture(name, shape, classes, torch.float32)
        if not architecture.gradients:
            raise ConfigError(f"{name!r} is no torch model, so that it can be neither trained nor loaded here")
        return architecture.module(architecture.initial(seed))

    return make


def _module(
    weights: dict[str, Tensor], path: Path, model: str | None, shape: tuple[int, ...], classes: int, make: Make
) -> ModuleTeacher:
    if model is None:
        raise ConfigError(
            f"{path} does not say which model its weights belong to: name it, as in teacher={{path: {path}, model: lenet}} "
            "(fedkd teacher: --model lenet)"
        )
    module = make(model, 0)
    try:
        module.load_state_dict(weights)
    except RuntimeError as cause:
        raise ConfigError(f"the weights of {path} do not fit {model}: {' '.join(str(cause).split())[:300]}") from cause
    # Nobody trains it, and a service asks it from several threads at once, of which none may change its mode.
    return ModuleTeacher(module.eval().requires_grad_(False), classes, shape)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as cause:
        raise ConfigError(f"cannot read the teacher {path}: {cause.strerror or cause}") from cause
