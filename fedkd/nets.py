"""A device's models as functions of their weights, as losses see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedkd.algorithms.base import Batch
from fedkd.distill.taps import Taps
from fedkd.kernels.jobs import run
from fedkd.kernels.program import Program
from fedkd.labeller import class_probabilities
from fedkd.losses.response import softmax
from fedkd.models import Architecture


class Net:
    """What a loss calls: ``net(batch)`` gives logits [B, C], ``net.features(batch)`` the features [B, D].

    A device with several models gives them by role: ``net["shared"](batch)``; ``net`` itself is the role ``model``.
    Works on plain tensors and under ``torch.func.vmap`` alike.
    """

    def __init__(
        self,
        architectures: Mapping[str, Architecture],
        tensors: Mapping[str, Mapping[str, Tensor]],
        role: str = "model",
        chunk: int | None = None,
        programs: Mapping[tuple[str, str], Program] | None = None,
    ) -> None:
        """Bind the models; ``programs``, by role and method, run in compiled kernels, under ``vmap`` alone."""
        self._architectures, self._tensors, self._role, self._chunk = architectures, tensors, role, chunk
        self._programs = programs or {}

    def __getitem__(self, role: str) -> Net:
        return Net(self._architectures, self._tensors, role, self._chunk, self._programs)

    def __call__(self, batch: Batch | Tensor) -> Tensor:
        """Return logits [B, C]."""
        return self._call("forward", batch)

    def features(self, batch: Batch | Tensor) -> Tensor:
        """Return what the model's body gives, flattened to [B, D]."""
        return self._call("body", batch).flatten(1)

    def read(self, batch: Batch | Tensor, layers: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits [B, C], and what the layers at module paths ``layers`` gave for them [B, ...].

        Raises:
            ConfigError: there is no such layer; the nearest ones are named.
        """
        with Taps(self._module(), layers) as taps:
            return self._call("forward", batch, whole=True), taps.all()

    def head(self, features: Tensor) -> Tensor:
        """Return logits [B, C] from features [B, D]."""
        return self._call("head", features)

    def probabilities(self, batch: Batch | Tensor) -> Tensor:
        """Return class probabilities [B, C]."""
        return softmax(self(batch))

    def mode(self, *, training: bool) -> None:
        """Put the models behind this net into training or evaluation mode."""
        for architecture in self._architectures.values():
            architecture.template.train(training)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers of this role's model."""
        return dict(self._tensors[self._role])

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trainable tensors of this role's model, without buffers."""
        tensors = self._tensors[self._role]
        return {name: tensors[name] for name in self._architectures[self._role].trainable}

    def _module(self) -> nn.Module:
        return self._architectures[self._role].template.inner

    def _call(self, method: str, batch: Batch | Tensor, whole: bool = False) -> Tensor:
        """``whole``: layer by layer, on all records at once."""
        x = batch.x if isinstance(batch, Batch) else batch
        template = self._architectures[self._role].template
        program = None if whole else self._programs.get((self._role, method))
        if program is not None and x.shape[1:] == program.shape and (program.trains_alike or not template.training):
            return run(program, x, self._tensors[self._role])
        tensors = {f"inner.{name}": value for name, value in self._tensors[self._role].items()}
        if whole or self._chunk is None or x.shape[0] <= self._chunk or torch.is_grad_enabled():
            out: Tensor = functional_call(template, tensors, (method, x))
            return out
        parts = [functional_call(template, tensors, (method, part)) for part in x.split(self._chunk)]
        return torch.cat(parts)


class PredictorNet(Net):
    """A client that is no torch model: logits are the logarithms of its ``predict_proba``, floored at 1e-6."""

    def __init__(self, predictor: object, classes: int, dtype: torch.dtype) -> None:
        super().__init__({}, {})
        self._predictor, self._classes, self._dtype = predictor, classes, dtype

    def __getitem__(self, role: str) -> Net:
        return self

    def _module(self) -> nn.Module:
        raise TypeError("a client with predict_proba has no layers")

    def _call(self, method: str, batch: Batch | Tensor, whole: bool = False) -> Tensor:
        if method != "forward":
            raise TypeError("a client with predict_proba has no features")
        x = batch.x if isinstance(batch, Batch) else batch
        found = class_probabilities(self._predictor, x.flatten(1).numpy(), self._classes)
        return torch.from_numpy(np.log(found)).to(self._dtype)
