"""Teacher assistants: nets of sizes between teacher and student, each taught by the one above it.

S. Mirzadeh, M. Farajtabar, A. Li, N. Levine, A. Matsukawa, H. Ghasemzadeh, "Improved Knowledge Distillation via Teacher
Assistant", AAAI 2020, https://arxiv.org/abs/1902.03393: a student far smaller than its teacher learns better through nets
between them, and a longer chain is no worse than one assistant (their section 4.3).
"""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from fedkd.errors import ConfigError
from fedkd.models import Architecture, options_of, resolve
from fedkd.models.registry import REGISTRY

WIDTHS = ("hidden", "width", "channels", "features")
"""Options of the registry's models that say how wide they are."""

STEP = 6.0
"""Largest ratio of parameters from one net of a chain to the next."""


def scaled(name: str, factor: float) -> str | None:
    """Return the registry's model ``name`` with every width multiplied by ``factor``; None if it has no width."""
    base = re.split(r"[(\s]", name.strip(), maxsplit=1)[0]
    build: Callable[..., nn.Module] | None = REGISTRY.get(base)
    if build is None:
        return None
    held: dict[str, Any] = {}
    if isinstance(build, partial):
        held, build = dict(build.keywords), build.func
        base = next(n for n, b in REGISTRY.items() if b is build)
    known = inspect.signature(build).parameters
    held = {n: p.default for n, p in known.items() if n in WIDTHS and p.default is not p.empty} | held
    held |= options_of(name)
    if not any(n in WIDTHS for n in held):
        return None

    def one(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [one(v) for v in value]
        return max(1, round(value * factor)) if isinstance(value, int) else round(value * factor, 4)

    said = {n: one(v) if n in WIDTHS else v for n, v in held.items()}
    return f"{base}({', '.join(f'{n}={v}' for n, v in said.items())})"


def size(name: str, shape: tuple[int, ...], classes: int) -> int:
    """Return the number of a model's parameters."""
    # On the meta device nothing is drawn and no memory is taken; a user's own factory may not bear it.
    ours = re.split(r"[(\s]", name.strip(), maxsplit=1)[0] in REGISTRY
    with torch.device("meta") if ours else contextlib.nullcontext():
        model = resolve(name)(shape, classes) if ours else Architecture(name, shape, classes, torch.float32).build(0)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {name!r} is no torch model, so that it has no size to go by")
    return sum(p.numel() for p in model.parameters())


def between(teacher: int | str, student: str, shape: tuple[int, ...], classes: int, step: float = STEP) -> list[str]:
    """Return assistants from large to small for a teacher (its name or number of parameters) and a student.

    Sizes are spaced evenly on a logarithmic scale, so many that no net has more than ``step`` times the parameters of the
    next. An assistant is the student's model, made wider; where that has no width, the teacher's, made narrower. A teacher
    at most twice as large needs none.

    Raises:
        ConfigError: neither model can be scaled.
    """
    small = size(student, shape, classes)
    big = teacher if isinstance(teacher, int) else size(teacher, shape, classes)
    if big <= 2 * small:
        return []
    count = max(1, math.ceil(math.log(big / small) / math.log(step)) - 1)
    for base in (student, *([teacher] if isinstance(teacher, str) else ())):
        if scaled(base, 1.0) is not None:
            goals = [big * (small / big) ** ((i + 1) / (count + 1)) for i in range(count)]
            found = [_of_size(base, goal, shape, classes) for goal in goals]
            return list(dict.fromkeys(found))
    raise ConfigError(
        f"assistants between the teacher and {student!r} cannot be made up: only the registry's models with a width can be "
        "scaled; name them, as in --assistants 'mlp(hidden=[64])'"
    )


def _of_size(base: str, goal: float, shape: tuple[int, ...], classes: int) -> str:
    """Return ``base`` at the factor whose number of parameters is nearest to ``goal`` (bisection on a log scale)."""
    # From the model itself outwards: a factor of 1000 at once would ask for nets that fit no memory.
    low, high = 1.0, 1.0
    while size(scaled(base, high) or base, shape, classes) < goal and high < 1e3:
        high *= 2
    while size(scaled(base, low) or base, shape, classes) > goal and low > 1e-3:
        low /= 2
    best: tuple[float, str] | None = None
    for _ in range(12):
        middle = math.sqrt(low * high)
        name = scaled(base, middle)
        assert name is not None
        now = size(name, shape, classes)
        gap = abs(math.log(now / goal))
        if best is None or gap < best[0]:
            best = (gap, name)
        low, high = (middle, high) if now < goal else (low, middle)
    assert best is not None
    return best[1]
