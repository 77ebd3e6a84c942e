"""Calls of the compiled kernels: a whole stretch of training, and single passes that torch can differentiate."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from fedkd.experiment import OptimizerConfig
from fedkd.kernels.build import Library, library
from fedkd.kernels.program import Program, programs
from fedkd.layers import prepare
from fedkd.models import Architecture

if TYPE_CHECKING:
    from fedkd.kernels.recognise import Known

_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
CHUNK = 32
"""Samples that a stretch of training takes through a net together; a larger batch is added up from such parts."""
AT_ONCE: ContextVar[int | None] = ContextVar("devices at once", default=None)
"""Threads among which whole devices are shared out; None: as many as torch has."""


def _threads() -> int:
    return AT_ONCE.get() or torch.get_num_threads()


class _Descent(ctypes.Structure):
    _fields_ = (("kind", _I), ("nesterov", _I), *((n, _D) for n in ("momentum", "decay", "beta1", "beta2", "eps")))


class _Training(ctypes.Structure):
    _fields_ = (
        ("layer", _P), ("extra", _P),
        *((n, _I) for n in ("layers", "devices", "params", "buffers", "steps", "batch", "threads", "chunk", "loss_kind",
                            "classes", "shared")),
        *((n, _P) for n in ("sizes_of", "buffer_sizes", "weights", "first", "second", "stats", "done", "pool", "index",
                            "labels", "table", "positions")),
        ("rows", _I), ("one_table", _I),
        *((n, _P) for n in ("sizes", "length", "rates", "masks", "losses")),
        ("descent", _Descent),
    )  # fmt: skip


class _Pass(ctypes.Structure):
    _fields_ = (
        ("layer", _P), ("extra", _P),
        *((n, _I) for n in ("layers", "devices", "params", "buffers", "samples", "threads", "shared", "want_x")),
        *((n, _P) for n in ("sizes_of", "buffer_sizes", "weights", "stats", "x", "out", "kept", "grads", "gx")),
    )  # fmt: skip


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return (_P * max(1, len(tensors)))(*(t.data_ptr() for t in tensors))


def _numbers(values: Sequence[int]) -> Any:
    return (_I * max(1, len(values)))(*values)


def _address(array: NDArray[Any] | None) -> int | None:
    return None if array is None else array.ctypes.data


def train(
    kernels: Library,
    program: Program,
    known: Known,
    optimizer: OptimizerConfig,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    *,
    pool: Tensor,
    index: NDArray[np.int64],
    labels: NDArray[np.int64] | None,
    positions: NDArray[np.int64],
    table: Tensor | None,
    sizes: NDArray[np.int64],
    length: NDArray[np.int64],
    rate: NDArray[np.float64],
    masks: Sequence[Tensor],
) -> NDArray[np.float64]:
    """Train K devices through all their steps; ``params``, ``buffers`` and ``state`` [K, ...] are changed in place.

    Args:
        params, buffers: by the program's names. state: the optimiser's, by ``slot/name`` of its parameters.
        pool: inputs [M, *shape]. index: rows of the pool [K or 1, T, B]; 1: all devices walk alike.
        labels: [K or 1, T, B], for a loss that reads them. positions: rows of ``table`` [K or 1, T, B].
        table: the teacher [N, C], or one per device [K, N, C].
        sizes: real records of each step [K, T]. length: steps [K]. rate: learning rates [K, T].
        masks: what dropout multiplies by, one tensor [K, T, B, *features] per dropout layer.
    Returns:
        The sum over steps of each device's mean losses [K].
    """
    weights = [params[n] for n in program.params]
    stats = [buffers[n] for n in program.buffers]
    slots = {
        slot: [state[f"{slot}/model/{n}"] for n in program.params]
        for slot in ("momentum", "first", "second")
        if any(n.startswith(f"{slot}/") for n in state)
    }
    first, second = slots.get("momentum", slots.get("first")), slots.get("second")
    count, steps = sizes.shape
    for tensors in (weights, stats, first or [], second or []):
        assert all(t.is_contiguous() and len(t) == count for t in tensors)
    done = state["steps"].numpy() if first is not None and second is not None else None
    losses = np.zeros(count)
    hold = {
        "layer": program.layers, "extra": program.extra,
        "sizes_of": _numbers([t[0].numel() for t in weights]), "buffer_sizes": _numbers([t[0].numel() for t in stats]),
        "weights": _pointers(weights), "stats": _pointers(stats),
        "first": _pointers(first) if first is not None else None,
        "second": _pointers(second) if second is not None else None,
        "masks": _pointers(masks) if masks else None,
    }  # fmt: skip
    job = _Training(
        layers=len(program.steps), devices=count, params=len(weights), buffers=len(stats), steps=steps,
        batch=index.shape[2], threads=_threads(), chunk=CHUNK, loss_kind=known.kind,
        classes=program.outputs, shared=int(len(index) == 1), done=_address(done), pool=pool.data_ptr(),
        index=_address(index), labels=_address(labels), table=None if table is None else table.data_ptr(),
        positions=_address(positions), rows=0 if table is None else table.shape[-2],
        one_table=int(table is None or table.dim() == 2), sizes=_address(sizes), length=_address(length),
        rates=_address(rate), losses=_address(losses),
        descent=_Descent(
            kind=("sgd", "adam", "adamw").index(optimizer.name), nesterov=int(optimizer.nesterov),
            momentum=optimizer.momentum, decay=optimizer.weight_decay, beta1=optimizer.betas[0],
            beta2=optimizer.betas[1], eps=optimizer.eps,
        ),
        **{name: None if value is None else ctypes.addressof(value) for name, value in hold.items()},
    )  # fmt: skip
    kernels.train(job)
    if done is None and "steps" in state:
        state["steps"] += torch.from_numpy(length)
    for name in program.counters:
        buffers[name] += torch.from_numpy(length)
    return losses


# ---- single passes --------------------------------------------------------------------------------------------------
def _pass(
    program: Program, weights: Sequence[Tensor], stats: Sequence[Tensor], **given: Any
) -> tuple[_Pass, list[Any]]:
    hold = [
        program.layers, program.extra, _numbers([t[0].numel() for t in weights]),
        _numbers([t[0].numel() for t in stats]), _pointers(weights), _pointers(stats),
    ]  # fmt: skip
    names = ("layer", "extra", "sizes_of", "buffer_sizes", "weights", "stats")
    job = _Pass(
        layers=len(program.steps), params=len(weights), buffers=len(stats), threads=_threads(),
        **dict(zip(names, map(ctypes.addressof, hold), strict=True)), **given,
    )  # fmt: skip
    return job, hold


class _Stacked(torch.autograd.Function):
    """K nets at once: x [K or 1, B, *shape], tensors [K, ...] -> [K, B, outputs]."""

    @staticmethod
    def forward(ctx: Any, program: Program, x: Tensor, *tensors: Tensor) -> Tensor:
        kernels = library(x.dtype)
        assert kernels is not None
        x = x.contiguous()
        held = [t.contiguous() for t in tensors]
        weights, stats = held[: len(program.params)], held[len(program.params) :]
        count, samples = len(weights[0]), x.shape[1]
        out = x.new_empty(count, samples, program.outputs)
        learns = any(ctx.needs_input_grad)
        kept = None
        if learns:
            size = kernels.kept(program.layers, len(program.steps), samples)
            # Lines of 64 bytes: the kernels read whole vectors.
            kept = x.new_zeros(count * size)
        job, hold = _pass(
            program, weights, stats, devices=count, samples=samples, shared=int(len(x) == 1), x=x.data_ptr(),
            out=out.data_ptr(), kept=None if kept is None else kept.data_ptr(),
        )  # fmt: skip
        if samples:
            kernels.forward(job)
        del hold
        if learns:
            ctx.program, ctx.sizes = program, (count, samples, len(x))
            ctx.save_for_backward(kept, *held)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept, *held = ctx.saved_tensors
        program, (count, samples, inputs) = ctx.program, ctx.sizes
        kernels = library(kept.dtype)
        assert kernels is not None
        g = grads[0].contiguous()
        weights, stats = held[: len(program.params)], held[len(program.params) :]
        made = [torch.empty_like(t) if samples else torch.zeros_like(t) for t in weights]
        # Frozen nets are asked for the gradient of their input alone.
        learn, want = any(ctx.needs_input_grad[2:]), bool(ctx.needs_input_grad[1])
        gx = g.new_empty(count, samples, *program.shape) if want else None
        slots = _pointers(made)
        job, hold = _pass(
            program, weights, stats, devices=count, samples=samples, want_x=int(want), out=g.data_ptr(),
            kept=kept.data_ptr(), grads=ctypes.addressof(slots) if learn else None,
            gx=None if gx is None else gx.data_ptr(),
        )  # fmt: skip
        if samples:
            kernels.backward(job)
        del hold
        if gx is not None and inputs == 1 != count:
            gx = gx.sum(0, keepdim=True)
        return None, gx, *(made if learn else (None for _ in made)), *(None for _ in stats)


class _Single(torch.autograd.Function):
    """One device's pass, as it is written under ``vmap``: its rule there is :class:`_Stacked`."""

    generate_vmap_rule = False

    @staticmethod
    def forward(program: Program, x: Tensor, *tensors: Tensor) -> Tensor:
        raise RuntimeError("the kernels' passes serve stacks of devices alone")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], program: Program, x: Tensor, *tensors: Tensor) -> tuple[Tensor, int]:
        x = x.unsqueeze(0) if in_dims[1] is None else x.movedim(in_dims[1], 0)
        stacked = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims[2:], strict=True)
        ]
        return cast(Tensor, _Stacked.apply(program, x, *stacked)), 0


def agreeing(kernels: Library | None, architecture: Architecture) -> dict[str, Program]:
    """Return the programs of a model by its methods, each tried out: the kernels must give what the model gives.

    A model may hide what it does from the reading of its layers; such a one is left to torch.
    """
    if kernels is None or not architecture.gradients:
        return {}
    found: dict[str, Program] = {}
    tensors = architecture.initial(1)
    template = architecture.template.eval()
    rng = torch.Generator().manual_seed(1)
    for method, program in programs(template.inner, architecture.shape).items():
        x = torch.randn(3, *program.shape, generator=rng, dtype=architecture.dtype)
        with torch.no_grad():
            want = functional_call(template, {f"inner.{n}": t for n, t in tensors.items()}, (method, x)).flatten(1)
            got = _Stacked.apply(program, x[None], *(tensors[n][None] for n in (*program.params, *program.buffers)))[0]
        if _near(got, want):
            found[method] = program
    return found


def _near(got: Tensor, want: Tensor) -> bool:
    near = 1e-9 if want.dtype == torch.float64 else 1e-3
    return got.shape == want.shape and bool(((got - want).abs() <= near * (1 + want.abs())).all())


def together(models: Sequence[nn.Module], shape: tuple[int, ...]) -> Callable[[Tensor], Tensor] | None:
    """Return the function x [B, *shape] -> logits [K, B, C] of K frozen models in evaluation mode, in compiled kernels.

    It carries a gradient with respect to x alone. None where the kernels cannot: no compiler, models that are no chains of
    the layers they know, differ from each other, or give something else than the kernels make of them.
    """
    dtype = next((t.dtype for t in models[0].parameters()), torch.float32)
    kernels = library(dtype)
    read = [programs(prepare(copy.deepcopy(model)), shape).get("forward") for model in models]
    if kernels is None or read[0] is None or any(program != read[0] for program in read):
        return None
    program, held = read[0], [model.state_dict() for model in models]
    tensors = [torch.stack([h[n].detach() for h in held]).contiguous() for n in (*program.params, *program.buffers)]

    def apply(x: Tensor) -> Tensor:
        return cast(Tensor, _Stacked.apply(program, x[None], *tensors))

    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    with torch.no_grad():
        want, got = torch.stack([model(x) for model in models]), apply(x)
    return apply if _near(got, want) else None


def run(program: Program, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return what ``program`` makes of x [B, *shape], under ``vmap`` over devices: [B, outputs]."""
    given = [tensors[n] for n in (*program.params, *program.buffers)]
    return cast(Tensor, _Single.apply(program, x, *given))
