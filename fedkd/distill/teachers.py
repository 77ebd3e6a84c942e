"""Teachers: whatever answers inputs with class scores, whether torch can look inside or not."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedkd.distill.taps import Taps
from fedkd.errors import ConfigError
from fedkd.models import Architecture
from fedkd.storage import StorageError, unpack_tensors
from fedkd.store import read_metadata

FLOOR = 1e-6
"""Least probability of a teacher that gives probabilities: their logarithms serve as logits."""


class Teacher(ABC):
    """Answers inputs [B, *shape] with logits [B, C].

    Attributes:
        shape: shape of one input, or None where the teacher does not say.
        classes: number of classes C.
        identity: hash of what it answers by; cached answers belong to it.
    """

    shape: tuple[int, ...] | None
    classes: int
    identity: str

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
                f"a {type(self).__name__} only answers, so that its layers ({', '.join(paths)}) cannot be read: use "
                "losses on the response, such as kd"
            )
        return self.logits(x), {}


class ModuleTeacher(Teacher):
    """A torch model; it stays in evaluation mode and takes no gradient."""

    def __init__(self, module: nn.Module, classes: int, shape: tuple[int, ...] | None = None) -> None:
        self.module = module.eval().requires_grad_(False)
        self.classes, self.shape = classes, shape
        digest = hashlib.sha256()
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        self.identity = digest.hexdigest()

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        return out

    @torch.no_grad()
    def read(self, x: Tensor, paths: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        with Taps(self.module, paths) as taps:
            logits = self.module(x)
            return logits, taps.all()


class OnnxTeacher(Teacher):
    """An ONNX file, run by onnxruntime on the CPU. ``gives``: whether its first output is logits or probabilities."""

    def __init__(self, path: Path, gives: Literal["logits", "probabilities"] = "logits") -> None:
        try:
            import onnxruntime
        except ImportError as cause:
            raise ConfigError("an ONNX teacher needs onnxruntime: pip install 'fedkd[onnx]'") from cause
        data = _bytes(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as cause:
            raise ConfigError(f"{path} cannot be read as ONNX: {' '.join(str(cause).split())[:200]}") from cause
        entry, exit_ = self._session.get_inputs()[0], self._session.get_outputs()[0]
        if entry.type != "tensor(float)":
            raise ConfigError(f"{path} takes {entry.type}, expected float inputs")
        self._input, self._gives = entry.name, gives
        self.shape = tuple(entry.shape[1:]) if all(isinstance(s, int) for s in entry.shape[1:]) else None
        if len(exit_.shape) != 2 or not isinstance(exit_.shape[1], int):
            raise ConfigError(f"{path} gives {exit_.shape}, expected class scores [batch, classes]")
        self.classes = exit_.shape[1]
        self.identity = hashlib.sha256(data + gives.encode()).hexdigest()

    def logits(self, x: Tensor) -> Tensor:
        found = np.asarray(self._session.run(None, {self._input: x.float().numpy()})[0])
        return torch.from_numpy(found).to(x.dtype) if self._gives == "logits" else log_probabilities(found, x.dtype)


class PredictorTeacher(Teacher):
    """Any object with ``predict_proba``, such as scikit-learn's classifiers; inputs are flattened to [B, D]."""

    def __init__(self, predictor: Any, classes: int, identity: str, shape: tuple[int, ...] | None = None) -> None:
        self._predictor, self.classes, self.identity, self.shape = predictor, classes, identity, shape

    def logits(self, x: Tensor) -> Tensor:
        given = np.asarray(self._predictor.predict_proba(x.flatten(1).numpy()), dtype=np.float64)
        held = np.asarray(getattr(self._predictor, "classes_", np.arange(given.shape[1])), dtype=np.int64)
        full = np.zeros((len(given), self.classes))
        full[:, held] = given
        return log_probabilities(full, x.dtype)


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
        text = mix + "".join(f"{t.identity}:{w!r};" for t, w in self.members)
        self.identity = hashlib.sha256(text.encode()).hexdigest()

    def logits(self, x: Tensor) -> Tensor:
        found = [(teacher.logits(x), weight) for teacher, weight in self.members]
        if self.mix == "logits":
            return torch.stack([z * w for z, w in found]).sum(0)
        return torch.stack([z.softmax(-1) * w for z, w in found]).sum(0).clamp(min=FLOOR).log()


def log_probabilities(probabilities: NDArray[np.floating], dtype: torch.dtype) -> Tensor:
    """Return logits for probabilities [B, C]: their logarithms, floored at :data:`FLOOR`."""
    full = np.clip(np.asarray(probabilities, np.float64), FLOOR, None)
    return torch.from_numpy(np.log(full / full.sum(axis=1, keepdims=True))).to(dtype)


# ---- reading --------------------------------------------------------------------------------------------------------
def load_teacher(path: Path, shape: tuple[int, ...], classes: int, model: str | None = None) -> Teacher:
    """Read a teacher from a file, by its ending.

    Args:
        path: ``.safetensors`` as fedkd writes it (``student.safetensors`` of a run), or any with ``model`` named;
            ``.onnx``; ``.pt``, ``.pth``: a state dict, read with ``weights_only=True``, with ``model`` named.
        shape, classes: what the data have; the teacher must fit.
        model: the architecture, where the file does not name it.
    Raises:
        ConfigError: the file is missing or damaged, names no model, or does not fit the data.
    """
    ending = path.suffix.lower()
    if ending == ".onnx":
        teacher: Teacher = OnnxTeacher(path)
    elif ending == ".safetensors":
        teacher = _from_safetensors(path, shape, classes, model)
    elif ending in (".pt", ".pth"):
        teacher = _module(_pickled(path), path, model, shape, classes)
    else:
        raise ConfigError(f"teacher {path}: expected a file ending in .safetensors, .onnx, .pt or .pth")
    if teacher.classes != classes:
        raise ConfigError(f"teacher {path} knows {teacher.classes} classes, the data have {classes}")
    if teacher.shape is not None and teacher.shape != tuple(shape):
        raise ConfigError(f"teacher {path} takes inputs {list(teacher.shape)}, the data have {list(shape)}")
    return teacher


def read_note(path: Path) -> dict[str, Any]:
    """Return what a student's file says of itself: architecture, shape, classes; empty for a file of another maker."""
    data = _bytes(path)
    try:
        return dict(json.loads(read_metadata(data)["fedkd"]))
    except (StorageError, KeyError, ValueError):
        return {}


def _from_safetensors(path: Path, shape: tuple[int, ...], classes: int, model: str | None) -> Teacher:
    note = read_note(path)
    name = model or note.get("architecture")
    own_shape, own_classes = tuple(note.get("shape", shape)), int(note.get("classes", classes))
    return _module(unpack_tensors(_bytes(path), str(path)), path, name, own_shape, own_classes)


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


def _module(
    weights: dict[str, Tensor], path: Path, model: str | None, shape: tuple[int, ...], classes: int
) -> ModuleTeacher:
    if model is None:
        raise ConfigError(f"{path} does not say which model its weights belong to: name it with teacher.model")
    try:
        module = Architecture(model, shape, classes, torch.float32).module(weights)
    except RuntimeError as cause:
        raise ConfigError(f"the weights of {path} do not fit {model}: {' '.join(str(cause).split())[:300]}") from cause
    return ModuleTeacher(module, classes, shape)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as cause:
        raise ConfigError(f"cannot read the teacher {path}: {cause.strerror or cause}") from cause
