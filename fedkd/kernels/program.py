"""Reads a torch model as a chain of layers that the compiled kernels know, or tells why it is none."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fedkd.layers import BatchNorm1d, BatchNorm2d, Conv2d, Dropout

LINEAR, CONV, RELU, MAXPOOL, AVGPOOL, NORM, DROPOUT = range(7)
_KNOWN = (
    nn.Linear, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity,
    BatchNorm1d, BatchNorm2d, Conv2d, Dropout,
)  # fmt: skip
_RELU = (F.relu, torch.relu)


@dataclass(frozen=True)
class Step:
    """One layer: kind, shape in (c, h, w) and out (o, oh, ow), window, stride and padding, its tensors by name.

    ``clip``: a ReLU follows and is done in passing. ``image``: records are images here.
    ``extra``: eps and momentum of a normalisation, p of a dropout.
    """

    kind: int
    inside: tuple[int, int, int]
    outside: tuple[int, int, int]
    window: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    weight: str | None = None
    bias: str | None = None
    mean: str | None = None
    var: str | None = None
    clip: bool = False
    image: bool = False
    extra: tuple[float, float] = (0.0, 0.0)

    @property
    def features(self) -> tuple[int, ...]:
        """Shape of one record before the layer."""
        return self.inside if self.image else (self.inside[0],)


@dataclass(frozen=True)
class Program:
    """A chain of layers, as the kernels read it.

    ``params`` and ``buffers`` name the tensors by the numbers that the layers refer to. ``counters`` are the step
    counters of normalisations, which the caller advances.
    """

    steps: tuple[Step, ...]
    params: tuple[str, ...]
    buffers: tuple[str, ...]
    counters: tuple[str, ...]
    shape: tuple[int, ...]
    outputs: int

    @property
    def layers(self) -> ctypes.Array[ctypes.c_int64]:
        """The layers as 20 integers each (see ``struct Layer``)."""
        numbers: list[int] = []
        dropouts = 0
        for s in self.steps:
            drop = -1
            if s.kind == DROPOUT:
                drop, dropouts = dropouts, dropouts + 1
            numbers += [s.kind, *s.inside, *s.outside, *s.window, *s.stride, *s.padding]
            numbers += [-1 if n is None else self.params.index(n) for n in (s.weight, s.bias)]
            numbers += [-1 if n is None else self.buffers.index(n) for n in (s.mean, s.var)]
            numbers += [drop, int(s.clip), 0]
        return (ctypes.c_int64 * len(numbers))(*numbers)

    @property
    def extra(self) -> ctypes.Array[ctypes.c_double]:
        """Two real numbers per layer."""
        numbers = [v for s in self.steps for v in s.extra]
        return (ctypes.c_double * len(numbers))(*numbers)

    @property
    def dropouts(self) -> tuple[Step, ...]:
        """The dropout layers in order."""
        return tuple(s for s in self.steps if s.kind == DROPOUT)

    @property
    def trains_alike(self) -> bool:
        """Whether training differs from evaluation in nothing that a plain pass would have to know."""
        return all(s.kind not in (NORM, DROPOUT) for s in self.steps)


class _Unknown(Exception):
    """The model is no chain of known layers."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in _KNOWN or super().is_leaf_module(m, module_qualified_name)


def programs(inner: nn.Module, shape: tuple[int, ...]) -> dict[str, Program]:
    """Return the programs of ``forward``, ``body`` and ``head`` of a model for inputs of ``shape``, where there are any."""
    found: dict[str, Program] = {}
    try:
        found["forward"] = _read(inner, "", shape)
        if isinstance(getattr(inner, "body", None), nn.Module) and isinstance(getattr(inner, "head", None), nn.Module):
            body: nn.Module = inner.body  # type: ignore[assignment]
            head: nn.Module = inner.head  # type: ignore[assignment]
            middle = _read(body, "body.", shape)
            if middle.steps:
                found["body"] = middle
            found["head"] = _read(head, "head.", (middle.outputs,))
    except _Unknown:
        pass
    return {name: program for name, program in found.items() if program.steps}


def _read(module: nn.Module, prefix: str, shape: tuple[int, ...]) -> Program:
    if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
        raise _Unknown("hooks")
    if type(module) in _KNOWN:
        calls: list[tuple[Any, str]] = [(module, "")]
    else:
        calls = _chain(module)
    steps: list[Step] = []
    counters: list[str] = []
    now = shape
    for call, name in calls:
        now = _append(steps, counters, call, f"{prefix}{name}." if name else prefix, now)
    params = tuple(n for s in steps for n in (s.weight, s.bias) if n is not None)
    buffers = tuple(n for s in steps for n in (s.mean, s.var) if n is not None)
    if len(set(params)) != len(params):
        raise _Unknown("a layer is called twice")
    every = {prefix + n for n, _ in module.named_parameters()}
    if every != set(params):
        raise _Unknown("parameters that no layer of the chain holds")
    return Program(tuple(steps), params, buffers, tuple(counters), shape, math.prod(now))


def _chain(module: nn.Module) -> list[tuple[Any, str]]:
    """Return the calls of a model in order, as (module or a word, name of the module)."""
    try:
        graph = _Tracer().trace(module)
    except Exception as cause:  # a model may do anything while it is traced
        raise _Unknown(str(cause)) from cause
    calls: list[tuple[Any, str]] = []
    last: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            if last is not None:
                raise _Unknown("several inputs")
        elif node.op == "output":
            if node.args != (last,):
                raise _Unknown("another output than the last layer's")
            return calls
        elif not node.args or node.args[0] is not last or node.all_input_nodes != [last]:
            raise _Unknown("not a chain")
        elif node.op == "call_module":
            if node.kwargs or len(node.args) != 1:
                raise _Unknown("a layer with options")
            calls.append((module.get_submodule(str(node.target)), str(node.target)))
        elif (node.op == "call_function" and node.target in _RELU) or (node.op, node.target) == ("call_method", "relu"):
            if len(node.args) != 1 or any(v for v in node.kwargs.values()):
                raise _Unknown("relu with options")
            calls.append((nn.ReLU(), ""))
        elif node.target in (torch.flatten, "flatten"):
            if node.args[1:] != (1,) or node.kwargs:
                raise _Unknown("flatten with options")
            calls.append((nn.Flatten(), ""))
        else:
            raise _Unknown(str(node.target))
        last = node
    raise _Unknown("no output")


def _append(steps: list[Step], counters: list[str], call: Any, name: str, now: tuple[int, ...]) -> tuple[int, ...]:
    """Add one call to ``steps``; returns the shape after it."""
    kind = type(call)
    if kind is nn.Identity:
        return now
    if kind is nn.Flatten:
        if (call.start_dim, call.end_dim) != (1, -1):
            raise _Unknown("flatten")
        return (math.prod(now),)
    if kind is nn.Linear:
        if len(now) != 1 or now[0] != call.in_features:
            raise _Unknown("a dense layer on images")
        bias = f"{name}bias" if call.bias is not None else None
        steps.append(Step(LINEAR, (now[0], 1, 1), (call.out_features, 1, 1), weight=f"{name}weight", bias=bias))
        return (call.out_features,)
    box = _box(now)
    if kind is nn.ReLU:
        if steps and steps[-1].kind in (LINEAR, CONV) and not steps[-1].clip:
            steps[-1] = replace(steps[-1], clip=True)
        else:
            steps.append(Step(RELU, box, box))
        return now
    if kind is Dropout:
        if call.p:
            steps.append(Step(DROPOUT, box, box, image=len(now) == 3, extra=(float(call.p), 0.0)))
        return now
    if kind in (BatchNorm1d, BatchNorm2d):
        if call.running_mean is None or call.momentum is None or len(now) != (1 if kind is BatchNorm1d else 3):
            raise _Unknown("normalisation")
        w = f"{name}weight" if call.weight is not None else None
        b = f"{name}bias" if call.bias is not None else None
        extra = (float(call.eps), float(call.momentum))
        steps.append(
            Step(NORM, box, box, weight=w, bias=b, mean=f"{name}running_mean", var=f"{name}running_var", extra=extra)
        )
        if call.num_batches_tracked is not None:
            counters.append(f"{name}num_batches_tracked")
        return now
    if len(now) != 3:
        raise _Unknown("an image layer on rows")
    if kind is Conv2d:
        window, stride, padding = _pair(call.kernel_size), _pair(call.stride), _pair(call.padding)
        after = (call.out_channels, *_after(box, window, stride, padding))
        bias = f"{name}bias" if call.bias is not None else None
        steps.append(Step(CONV, box, after, window, stride, padding, weight=f"{name}weight", bias=bias))
        return after
    if kind is nn.AdaptiveAvgPool2d and _pair(call.output_size) == (1, 1):
        steps.append(Step(AVGPOOL, box, (now[0], 1, 1), box[1:], box[1:]))
        return (now[0], 1, 1)
    if kind in (nn.MaxPool2d, nn.AvgPool2d):
        stride = _pair(call.stride if call.stride is not None else call.kernel_size)
        odd = call.dilation not in (1, (1, 1)) or call.return_indices if kind is nn.MaxPool2d else call.divisor_override
        if odd or call.ceil_mode or _pair(call.padding) != (0, 0):
            raise _Unknown("pooling")
        window = _pair(call.kernel_size)
        after = (now[0], *_after(box, window, stride, (0, 0)))
        steps.append(Step(MAXPOOL if kind is nn.MaxPool2d else AVGPOOL, box, after, window, stride))
        return after
    raise _Unknown(kind.__name__)


def _box(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return math.prod(shape), 1, 1


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _after(
    box: tuple[int, int, int], window: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> tuple[int, int]:
    high, wide = ((box[1 + i] + 2 * padding[i] - window[i]) // stride[i] + 1 for i in range(2))
    if high < 1 or wide < 1:
        raise _Unknown("an image smaller than its window")
    return high, wide
