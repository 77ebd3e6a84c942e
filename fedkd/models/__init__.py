"""Models by name, and the user's own by import path.

An architecture is named by a string: a registered name (``mlp``), a name with options (``mlp(hidden=[200, 200])``), or
``package.module:Factory``. A factory is called as ``factory(shape, classes)`` with the input shape without the batch, or
without arguments where it takes none (scikit-learn's classifiers); it returns a ``torch.nn.Module`` that maps [B, *shape]
to logits [B, C], or any object with ``predict_proba``. The path may also lead to such an object itself. One without
``fit`` was trained elsewhere and answers as it is.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from fedkd.errors import ConfigError
from fedkd.layers import BatchNorm1d, BatchNorm2d, prepare, situation
from fedkd.models.registry import DENSE, REGISTRY
from fedkd.named import imported

_SPEC = re.compile(r"^(?P<name>[A-Za-z_][\w.]*(:[A-Za-z_]\w*)?)(\((?P<options>.*)\))?$")


class _Methods(nn.Module):
    """Lets ``functional_call``, which only calls ``forward``, reach a model's body and head."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, method: str, x: Tensor) -> Tensor:
        out = self.inner(x) if method == "forward" else getattr(self.inner, method)(x)
        assert isinstance(out, Tensor)
        return out


class Architecture:
    """A named model family bound to an input shape and a number of classes. Holds no weights of its own.

    Attributes:
        name: the string it was asked by.
        gradients: False for an object with ``predict_proba`` that torch cannot differentiate.
        features: width D of the feature layer, or None where the model does not split into body and head.
        trainable: names of the parameters; the other tensors are buffers.
        unstackable: why devices of this architecture cannot be stacked, as far as its layers tell; None if they can.
    """

    def __init__(self, name: str, shape: tuple[int, ...], classes: int, dtype: torch.dtype) -> None:
        self.name, self.shape, self.classes, self.dtype = name, shape, classes, dtype
        self._factory = resolve(name)
        built = self.build(0)
        self.gradients = isinstance(built, nn.Module)
        self.features: int | None = None
        self.trainable: tuple[str, ...] = ()
        self.unstackable: str | None = None
        if isinstance(built, nn.Module):
            self.template = _Methods(prepare(built)).to(dtype)
            self.trainable = tuple(n.removeprefix("inner.") for n, _ in self.template.named_parameters())
            self._check()
            self.unstackable = unstackable(self.template, self.shape, dtype)
        elif not hasattr(built, "predict_proba"):
            raise ConfigError(
                f"model {name!r} gave a {type(built).__name__}: expected a torch.nn.Module or an object with predict_proba"
            )

    def build(self, seed: int) -> Any:
        """Return a fresh model, its random weights drawn from ``seed`` (the caller's global stream is untouched)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                model = self._factory(self.shape, self.classes)
            except ConfigError:
                raise
            except Exception as cause:
                reason = " ".join(str(cause).split())
                raise ConfigError(
                    f"model {self.name!r} cannot be built for inputs of shape {list(self.shape)}: {reason}"
                ) from cause
        # Without this scikit-learn draws from NumPy's global stream, and no run could be repeated.
        if hasattr(model, "set_params") and model.get_params().get("random_state", 0) is None:
            model.set_params(random_state=seed % 2**32)
        return model

    def initial(self, seed: int) -> dict[str, Tensor]:
        """Return fresh parameters and buffers by name, in this architecture's dtype."""
        model = self.build(seed)
        if not isinstance(model, nn.Module):
            return {}
        return {
            n: t.detach().to(self.dtype) if t.is_floating_point() else t.detach() for n, t in model.state_dict().items()
        }

    def module(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """Return a real module with these weights, for code that wants hooks or ``torch.export``."""
        model = self.build(0).to(self.dtype)
        model.load_state_dict(dict(weights))
        assert isinstance(model, nn.Module)
        return model

    @cached_property
    def forward_flops(self) -> float:
        """Floating-point operations of a forward pass of one record, matrix products and convolutions counted."""
        from fedkd.flops import Count

        self.template.eval()
        with torch.no_grad(), Count() as count:
            self.template("forward", torch.zeros(1, *self.shape, dtype=self.dtype))
        return float(count.total)

    def _check(self) -> None:
        names: dict[int, list[str]] = {}
        for n, parameter in self.template.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(n.removeprefix("inner."))
        tied = next((n for n in names.values() if len(n) > 1), None)
        if tied is not None:
            raise ConfigError(
                f"model {self.name!r} uses one weight under the names {' and '.join(tied)}: a model travels as tensors "
                "by name, which would part them; call one layer twice instead"
            )
        x = torch.zeros(2, *self.shape, dtype=self.dtype)
        self.template.eval()
        with torch.no_grad():
            try:
                out = self.template("forward", x)
            except Exception as cause:
                raise ConfigError(
                    f"model {self.name!r} does not take inputs of shape {list(self.shape)}: {cause}. "
                    "Name a model for this data, such as mlp for tables and cnn for images."
                ) from cause
            if tuple(out.shape) != (2, self.classes):
                raise ConfigError(
                    f"model {self.name!r} gives {list(out.shape)} for a batch of 2, expected logits [2, {self.classes}]"
                )
            inner = self.template.inner
            if hasattr(inner, "body") and hasattr(inner, "head"):
                self.features = int(self.template("body", x).flatten(1).shape[1])


def unstackable(model: _Methods, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    """Return why devices of a model cannot be stacked, or None: in a stack, smaller batches are filled up with padding.

    Read from the model's layers, and tried out: what a model in training makes of two records must not change with what
    a third row holds that is no record, nor with there being one.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            ours = isinstance(module, BatchNorm1d | BatchNorm2d)
            if not ours or module.running_mean is None:
                return f"{type(module).__name__} takes statistics of the batch in a way that stacks do not know of"
    rows = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    filled = torch.cat([rows[:2], torch.zeros_like(rows[:1])])
    try:
        made = [_pass(model, rows, 1), _pass(model, filled, 1)]
        if _alike(made[0], _pass(model, rows, 2)):
            # Whoever draws from torch's own stream draws otherwise for two rows than for three.
            made.append(_pass(model, rows[:2], 1))
    except Exception:  # what a model does not take in training is told where it trains
        return None
    if not all(_alike(made[0], other) for other in made[1:]):
        return "in training, what it makes of a record depends on the other rows of the batch or on their number"
    return None


def _pass(model: _Methods, x: Tensor, seed: int) -> dict[str, Tensor]:
    """Return what a copy of ``model`` in training makes of two records, the rest of ``x`` being padding, and its buffers."""
    mine = copy.deepcopy(model).train()
    mask = torch.tensor([1.0, 1.0, 0.0], dtype=x.dtype) if len(x) > 2 else None
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with situation(mask=mask, generators=[torch.Generator().manual_seed(1)], sizes=[2]):
            out = mine("forward", x)[:2]
    return {"": out, **dict(mine.named_buffers())}


def _alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    near = 1e-9 if other[""].dtype == torch.float64 else 1e-4
    return all(torch.allclose(one[n].double(), t.double(), near, near, equal_nan=True) for n, t in other.items())


def resolve(name: str) -> Callable[[tuple[int, ...], int], Any]:
    """Return the factory ``(shape, classes) -> model`` that a name stands for.

    Raises:
        ConfigError: there is none.
    """
    match = _SPEC.match(name.strip())
    if match is None:
        raise ConfigError(f"model {name!r} is not a name, name(option=value) or package.module:Factory")
    options = _options(name, match["options"])
    base = match["name"]
    if ":" not in base:
        if base not in REGISTRY and base not in DENSE:
            near = difflib.get_close_matches(base, REGISTRY, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"no model is named {base!r}.{hint} Known: {', '.join(sorted(REGISTRY))}.")
        factory: Any = REGISTRY[base] if base in REGISTRY else DENSE[base]
    else:
        factory = imported(base, "model")
        if inspect.isclass(factory) and hasattr(factory, "predict_proba"):
            return lambda shape, classes: factory(**options)
        if hasattr(factory, "predict_proba"):
            # An object that was made, and perhaps trained, elsewhere. A copy for each device, which may fit it.
            return lambda shape, classes: copy.deepcopy(factory)
    return lambda shape, classes: factory(shape, classes, **options)


def options_of(name: str) -> dict[str, Any]:
    """Return the options that an architecture's name carries, as in ``mlp(hidden=[64])``.

    Raises:
        ConfigError: it is no such name.
    """
    match = _SPEC.match(name.strip())
    if match is None:
        raise ConfigError(f"model {name!r} is not a name, name(option=value) or package.module:Factory")
    return _options(name, match["options"])


def _options(name: str, text: str | None) -> dict[str, Any]:
    if not text or not text.strip():
        return {}
    body = re.sub(r"(^|,)\s*([A-Za-z_]\w*)\s*=\s*", r"\1 \2: ", text)
    try:
        options = yaml.safe_load("{" + body + "}")
    except yaml.YAMLError as cause:
        raise ConfigError(f"the options of model {name!r} cannot be read, expected (option=value, ...)") from cause
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        raise ConfigError(f"the options of model {name!r} cannot be read, expected (option=value, ...)")
    return options
