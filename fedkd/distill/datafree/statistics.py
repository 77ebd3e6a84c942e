"""How far a batch is from what a teacher's batch normalisation saw in training.

H. Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020,
https://arxiv.org/abs/1912.08795, eq. (4): the sum over layers of ||mean(x) - E[mean]||_2 + ||var(x) - E[var]||_2.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def norm_layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the batch normalisations of ``model`` that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


class Statistics:
    """Watches what enters the batch normalisation of ``models``; a context manager, whose end removes its hooks.

    ``means``: also keep, for every input, the mean over positions of what enters each layer (CMI's features).

    Every forward pass between two calls of :meth:`take` adds to the sum.
    """

    def __init__(self, models: Sequence[nn.Module], means: bool = False) -> None:
        self._models, self._means = models, means
        self._value: Tensor | None = None
        self._features: list[Tensor] = []
        self._handles = [norm.register_forward_pre_hook(self._look) for model in models for norm in norm_layers(model)]

    def __enter__(self) -> Statistics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> Tensor:
        """Return the distance since the last call, as the mean over models, and start anew.

        Raises:
            RuntimeError: nothing has passed through the models.
        """
        if self._value is None:
            raise RuntimeError("no batch has passed through the teacher's batch normalisation since the last look")
        value, self._value = self._value, None
        return value / len(self._models)

    def features(self) -> Tensor:
        """Return the means [B, D] over positions of the last forward pass, all layers side by side, and forget them."""
        found, self._features = torch.cat(self._features, 1), []
        return found

    def _look(self, norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0]
        assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
        axes = [0, *range(2, x.dim())]
        var, mean = torch.var_mean(x, axes, correction=0)
        apart = (mean - norm.running_mean).norm() + (var - norm.running_var).norm()
        self._value = apart if self._value is None else self._value + apart
        if self._means:
            self._features.append(x if x.dim() == 2 else x.flatten(2).mean(2))
