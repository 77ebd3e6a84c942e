"""Teachers as a maker of inputs sees them: one model, an ensemble of clients, or something that only answers."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fedkd.distill.datafree.statistics import Statistics, norm_layers
from fedkd.distill.taps import Taps
from fedkd.distill.teachers import EnsembleTeacher, ModuleTeacher, Teacher
from fedkd.errors import ConfigError
from fedkd.kernels.jobs import together


class Guide(ABC):
    """Answers inputs [B, *shape] with class scores [B, C].

    Attributes:
        differentiable: whether the answer carries a gradient with respect to the inputs.
        models: the torch models [K] behind it; empty for one that only answers.
        queries: inputs answered so far: the price of a black box.
    """

    differentiable: bool
    models: tuple[nn.Module, ...] = ()
    queries: int = 0

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Return class scores [B, C]."""

    def layers(self, x: Tensor, paths: Sequence[str]) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Return class scores [B, C], and for every model what its layers at ``paths`` gave [B, ...].

        Raises:
            ConfigError: there are no layers to look at, or no such ones.
        """
        if paths:
            raise ConfigError(f"this teacher only answers, so that its layers ({', '.join(paths)}) cannot be read")
        return self(x), []

    def read(self, x: Tensor, path: str) -> tuple[Tensor, Tensor]:
        """Return class scores [B, C], and the features of the layer ``path``, all models side by side [B, D]."""
        told, found = self.layers(x, [path])
        return told, torch.cat([each[path].flatten(1) for each in found], 1)

    def to(self, device: str) -> None:
        """Bring the models behind it to a device; one that only answers stays where it is."""
        for model in self.models:
            model.to(device)

    def statistics(self, method: str, means: bool = False) -> Statistics:
        """Return an open watch on the batch normalisation of all models; see :class:`Statistics`.

        Raises:
            ConfigError: a model has no batch normalisation, or nothing can be seen of it.
        """
        if not self.models:
            raise ConfigError(
                f"{method} compares batch-normalisation statistics, and this teacher only answers: use dfad, dafl or zskt "
                "with a teacher whose weights are at hand"
            )
        bare = [i for i, model in enumerate(self.models) if not norm_layers(model)]
        if bare:
            which = "the teacher has" if len(self.models) == 1 else f"model {bare[0] + 1} of {len(self.models)} has"
            raise ConfigError(
                f"{method} compares batch-normalisation statistics, and {which} no batch normalisation with running "
                "statistics: use dfad, dafl or zskt, which need none, or a teacher such as cnn or resnet"
            )
        return Statistics(self.models, means)


class ModelsGuide(Guide):
    """Torch models that are all at hand: their weighted mean logits, with gradients with respect to the inputs.

    A single teacher is an ensemble of one. The models are set to evaluation mode and take no gradient themselves; their
    weights must stay as they are.

    Args:
        models: K models of one set of classes; their architectures may differ.
        weights: [K], or [K, C] for a weight per model and class; None for the plain mean. May be replaced at any time
            (methods that learn weights of the ensemble do so); it is not normalised.
    """

    differentiable = True

    def __init__(self, models: Sequence[nn.Module], weights: Tensor | None = None) -> None:
        if not models:
            raise ConfigError("an ensemble needs at least one model")
        self.models = tuple(model.eval().requires_grad_(False) for model in models)
        self.weights = torch.full((len(models),), 1.0 / len(models)) if weights is None else weights
        self._stacks: dict[tuple[int, ...], Callable[[Tensor], Tensor] | None] = {}

    def each(self, x: Tensor) -> Tensor:
        """Return the logits of every model, [K, B, C]."""
        self.queries += len(x)
        stack = self._stack(x)
        return torch.stack([model(x) for model in self.models]) if stack is None else stack(x)

    def _stack(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """Return what takes images through all models at once on a CPU, several times as fast; None: one by one."""
        if len(self.models) == 1 or x.dim() != 4 or not len(x) or x.device.type != "cpu" or self._watched():
            return None
        shape = tuple(x.shape[1:])
        if shape not in self._stacks:
            self._stacks[shape] = together(self.models, shape)
        return self._stacks[shape]

    def _watched(self) -> bool:
        """Return whether somebody looks into the models' layers, which only their own passes show."""
        return any(m._forward_hooks or m._forward_pre_hooks for model in self.models for m in model.modules())

    def __call__(self, x: Tensor) -> Tensor:
        if len(self.models) == 1 and self.weights.dim() == 1:
            self.queries += len(x)
            found: Tensor = self.models[0](x)
            return found * self.weights[0].to(found) if float(self.weights[0]) != 1.0 else found
        return self.mix(self.each(x))

    def layers(self, x: Tensor, paths: Sequence[str]) -> tuple[Tensor, list[dict[str, Tensor]]]:
        with contextlib.ExitStack() as stack:
            taps = [stack.enter_context(Taps(model, paths)) for model in self.models]
            return self(x), [t.all() for t in taps]

    def mix(self, logits: Tensor) -> Tensor:
        """Return the weighted mean [B, C] of logits [K, B, C]."""
        weights = self.weights.to(logits)
        return (logits * (weights[:, None, None] if weights.dim() == 1 else weights[:, None, :])).sum(0)


class AnswersGuide(Guide):
    """A teacher that only answers (a service, ONNX, scikit-learn): no gradient, and every input counts as a query."""

    differentiable = False

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        self.queries += len(x)
        return self.teacher.logits(x.detach().cpu()).to(x.device)


def guide(teacher: Teacher) -> Guide:
    """Return the guide for a teacher: with gradients where its weights are at hand.

    An ensemble becomes a guide with gradients if all its members are torch models and logits are mixed; a mixture of
    probabilities only answers, because its logarithm is floored.
    """
    if isinstance(teacher, ModuleTeacher):
        return ModelsGuide([teacher.module])
    if isinstance(teacher, EnsembleTeacher) and teacher.mix == "logits":
        modules = [t.module for t, _ in teacher.members if isinstance(t, ModuleTeacher)]
        if len(modules) == len(teacher.members):
            return ModelsGuide(modules, torch.tensor([w for _, w in teacher.members]))
    return AnswersGuide(teacher)
