"""Models that only answer: any object with ``predict_proba``, and ONNX files. Needs no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedkd.errors import ConfigError

OWN = "own"
"""Name in an experiment of the model that a device has itself, and nobody else."""
FLOOR = 1e-6
"""Least probability that is answered: its logarithm has to be finite."""


def class_probabilities(predictor: Any, x: NDArray[np.generic], classes: int) -> NDArray[np.float64]:
    """Ask ``predictor.predict_proba(x)`` and return a row of probabilities [N, C] for each input, at least ``FLOOR``.

    A predictor that knows some of the classes says which by ``classes_``, as scikit-learn's do.

    Raises:
        ValueError: what it gave are no probabilities of these classes.
    """
    given = np.asarray(predictor.predict_proba(x), dtype=np.float64)
    if given.ndim != 2 or len(given) != len(x):
        raise ValueError(f"predict_proba gave {list(given.shape)} for {len(x)} inputs, expected a row for each")
    held = np.asarray(getattr(predictor, "classes_", np.arange(given.shape[1])))
    known = held.dtype.kind in "iu" and held.ndim == 1 and ((held >= 0) & (held < classes)).all()
    if not known or len(held) != given.shape[1]:
        raise ValueError(
            f"predict_proba gave {given.shape[1]} columns for the classes {held.tolist()}: expected a column for each, "
            f"of the classes 0 to {classes - 1}"
        )
    if not np.isfinite(given).all() or (given < 0).any():
        raise ValueError("predict_proba gave NaN, infinity or a negative number, expected probabilities")
    full = np.zeros((len(given), classes))
    full[:, held] = given
    full = np.clip(full, FLOOR, None)
    return np.asarray(full / full.sum(axis=1, keepdims=True))


class OnnxPredictor:
    """An ONNX file, run by onnxruntime on the CPU; int8 (QDQ) files run as float ones do.

    Args:
        gives: whether the output is logits or probabilities.
        output: its name; None takes the first output of floats [N, C].
        threads: that work on one batch. With one, memory is given back after every batch, since what a session keeps
            outweighs the model on a small device.

    Raises:
        ConfigError: onnxruntime is not installed, or the file is no such model.
    """

    def __init__(
        self,
        path: Path,
        gives: Literal["logits", "probabilities"],
        output: str | None = None,
        threads: int = 1,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as cause:
            raise ConfigError(f"{path} needs onnxruntime: pip install onnxruntime") from cause
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.enable_cpu_mem_arena = threads > 1
        try:
            data = path.read_bytes()
            self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except OSError as cause:
            raise ConfigError(f"cannot read the model {path}: {cause.strerror or cause}") from cause
        except Exception as cause:
            raise ConfigError(f"{path} cannot be read as ONNX: {' '.join(str(cause).split())[:200]}") from cause
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)":
            raise ConfigError(f"{path} takes {[i.type for i in inputs]}, expected one input of float32")
        fitting = [
            o.name
            for o in outputs
            if o.type in ("tensor(float)", "tensor(double)") and len(o.shape) == 2 and output in (None, o.name)
        ]
        if not fitting:
            named = {o.name: f"{o.type} {o.shape}" for o in outputs}
            raise ConfigError(f"{path} gives {named}: expected floats [N, C]" + (f" called {output}" if output else ""))
        self._input, self._output, self.gives = inputs[0].name, fitting[0], gives
        self._dims = inputs[0].shape[1:]
        size = next(o.shape[1] for o in outputs if o.name == self._output)
        self.classes: int | None = size if isinstance(size, int) else None
        """Number of classes C, where the file says so."""
        self.identity = hashlib.sha256(data + f"{gives} {self._output}".encode()).hexdigest()
        """Hash of what it answers by."""

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one input, None where the file leaves it open."""
        return tuple(self._dims) if all(isinstance(d, int) for d in self._dims) else None

    def predict_proba(self, x: NDArray[np.generic]) -> NDArray[np.float64]:
        """Return class probabilities [N, C] of inputs [N, ...]."""
        found = self.scores(x).astype(np.float64)
        if self.gives == "probabilities":
            return found
        found = np.exp(found - found.max(axis=1, keepdims=True))
        return np.asarray(found / found.sum(axis=1, keepdims=True))

    def scores(self, x: NDArray[np.generic]) -> NDArray[np.floating]:
        """Return what the file gives [N, C], logits or probabilities, for inputs [N, ...]."""
        x = np.asarray(x, np.float32)
        if self.shape is not None:
            x = x.reshape(len(x), *self.shape)
        return np.asarray(self._session.run([self._output], {self._input: x})[0])
