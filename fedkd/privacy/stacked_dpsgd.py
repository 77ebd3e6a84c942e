"""DP-SGD for a stack of devices: ghost clipping in one backward pass.

Layers are replaced, for the time of a step, by ones that keep their inputs and the gradients of their outputs and leave
the weights' gradients aside. From both follow every record's gradient norm, and then the sum of clipped gradients as one
product with scaled output gradients; no second backward pass. Norms from activations follow I. Goodfellow, "Efficient
Per-Example Gradient Computations", 2015, https://arxiv.org/abs/1510.01799; a convolution's gradients per record are
small and are formed by a batched product. Opacus gives the same sums (tests).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from fedkd.algorithms.base import Batch, Heard, Phase
from fedkd.engines.base import Engine, SerialEngine, Task, flat, nested, set_mode, split_trainable
from fedkd.layers import situation
from fedkd.models import Architecture
from fedkd.nets import Net
from fedkd.payloads import outline, rebuild
from fedkd.training import Optimizer, rates

if TYPE_CHECKING:
    from fedkd.privacy.noise import NoiseSource
    from fedkd.privacy.record_level import DpSgd

BLOCK_DENSE, BLOCK_CONV = 32, 8
"""Devices in one stack. The results do not depend on it."""


@dataclass
class Seen:
    """What a layer saw in one step: per call its input and the gradient of its output.

    Dense layers: [K, B, T, in] and [K, B, T, out] with T positions per record. Convolutions: columns [K, B, c, T] and
    gradients [K, B, out, T]. Scales (GroupNorm, LayerNorm): normalised input and gradient [K, B, channels, T].
    """

    kind: str
    inputs: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)


# ---- layers that keep what they see ---------------------------------------------------------------------------------
class _Dense(torch.autograd.Function):
    """x [K, B, ..., in], weight [K, out, in], bias [K, out] or None -> [K, B, ..., out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, seen: Seen) -> Tensor:
        k, b = x.shape[:2]
        wide = x.reshape(k, -1, x.shape[-1])
        if bias is None:
            out = torch.bmm(wide, weight.transpose(1, 2))
        else:
            out = torch.baddbmm(bias[:, None], wide, weight.transpose(1, 2))
        ctx.save_for_backward(weight)
        ctx.seen, ctx.place, ctx.shape = seen, len(seen.inputs), x.shape
        seen.inputs.append(x.reshape(k, b, -1, x.shape[-1]))
        seen.grads.append(x.new_empty(0))
        return out.view(*x.shape[:-1], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        k, b = ctx.shape[:2]
        grad = grads[0].reshape(k, -1, weight.shape[1])
        ctx.seen.grads[ctx.place] = grad.view(k, b, -1, weight.shape[1])
        back = torch.bmm(grad, weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return back, None, None, None


class _Conv(torch.autograd.Function):
    """x [K, B, C, H, W], weight [K, O, C, kh, kw], bias [K, O] or None -> [K, B, O, OH, OW], by im2col."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, seen: Seen
    ) -> Tensor:
        k, b, c, h, w = x.shape
        _, o, _, kh, kw = weight.shape
        (sh, sw), (ph, pw) = stride, padding
        oh, ow = (h + 2 * ph - kh) // sh + 1, (w + 2 * pw - kw) // sw + 1
        padded = F.pad(x, (pw, pw, ph, ph)) if ph or pw else x
        patches = padded.unfold(3, kh, sh).unfold(4, kw, sw)
        columns = patches.permute(0, 1, 2, 5, 6, 3, 4).reshape(k, b, c * kh * kw, oh * ow)
        out = torch.matmul(weight.reshape(k, 1, o, -1), columns)
        if bias is not None:
            out = out + bias[:, None, :, None]
        ctx.save_for_backward(weight)
        ctx.seen, ctx.place = seen, len(seen.inputs)
        ctx.sizes = (k, b, c, h, w, o, kh, kw, sh, sw, ph, pw, oh, ow)
        seen.inputs.append(columns)
        seen.grads.append(x.new_empty(0))
        return out.view(k, b, o, oh, ow)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        k, b, c, h, w, o, kh, kw, sh, sw, ph, pw, oh, ow = ctx.sizes
        grad = grads[0].reshape(k, b, o, oh * ow)
        ctx.seen.grads[ctx.place] = grad
        back = None
        if ctx.needs_input_grad[0]:
            spread = torch.matmul(weight.reshape(k, 1, o, -1).transpose(2, 3), grad).view(k, b, c, kh, kw, oh, ow)
            total = grad.new_zeros(k, b, c, h + 2 * ph, w + 2 * pw)
            for i in range(kh):
                for j in range(kw):
                    total[..., i : i + sh * oh : sh, j : j + sw * ow : sw] += spread[:, :, :, i, j]
            back = total[..., ph : ph + h, pw : pw + w]
        return back, None, None, None, None, None


class _Scale(torch.autograd.Function):
    """normalised x [K, B, C, T], weight and bias [K, C] -> weight x + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, seen: Seen) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.seen, ctx.place = seen, len(seen.inputs)
        seen.inputs.append(x)
        seen.grads.append(x.new_empty(0))
        return x * weight[:, None, :, None] + bias[:, None, :, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        ctx.seen.grads[ctx.place] = grads[0]
        return grads[0] * weight[:, None, :, None], None, None, None


class _Under(torch.autograd.Function):
    """Reaches through ``vmap`` to the stacked tensors, and calls there what is handed in."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, call: Callable[..., Tensor]) -> Tensor:
        return call(x[None], weight[None], None if bias is None else bias[None])[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError("stacked layers are differentiated outside of vmap")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor | None, call: Callable[..., Tensor]
    ) -> tuple[Tensor, int]:
        def front(t: Tensor, dim: int | None) -> Tensor:
            return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)

        bias = None if bias is None else front(bias, in_dims[2])
        return call(front(x, in_dims[0]), front(weight, in_dims[1]), bias), 0


def _patched(module: nn.Module, seen: Seen) -> Callable[[Tensor], Tensor]:
    """Return the forward of one layer that keeps what it sees."""
    if isinstance(module, nn.Linear):
        dense = module

        def run_dense(x: Tensor) -> Tensor:
            return cast(Tensor, _Under.apply(x, dense.weight, dense.bias, lambda a, w, b: _Dense.apply(a, w, b, seen)))

        return run_dense
    if isinstance(module, nn.Conv2d):
        conv = module

        def run_conv(x: Tensor) -> Tensor:
            return cast(
                Tensor,
                _Under.apply(
                    x,
                    conv.weight,
                    conv.bias,
                    lambda a, w, b: _Conv.apply(a, w, b, conv.stride, conv.padding, seen),
                ),
            )

        return run_conv
    norm = cast("nn.GroupNorm | nn.LayerNorm", module)

    def run_norm(x: Tensor) -> Tensor:
        if isinstance(norm, nn.GroupNorm):
            plain = F.group_norm(x, norm.num_groups, None, None, norm.eps)
            wide = plain.flatten(2) if plain.dim() > 2 else plain[:, :, None]
        else:
            plain = F.layer_norm(x, norm.normalized_shape, None, None, norm.eps)
            wide = plain.reshape(x.shape[0], -1, math.prod(norm.normalized_shape)).transpose(1, 2)
        weight, bias = norm.weight.flatten(), norm.bias.flatten()
        out = cast(Tensor, _Under.apply(wide, weight, bias, lambda a, w, b: _Scale.apply(a, w, b, seen)))
        if isinstance(norm, nn.LayerNorm):
            out = out.transpose(1, 2)
        return out.reshape(x.shape)

    return run_norm


def why_not(template: nn.Module) -> str | None:
    """Return which layer has no stacked form, or None."""
    for module in template.modules():
        own = list(module.parameters(recurse=False))
        if not own:
            continue
        if isinstance(module, nn.Linear):
            continue
        if isinstance(module, nn.Conv2d):
            plain = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
            if plain and not isinstance(module.padding, str):
                continue
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None and module.bias is not None:
            continue
        return f"{type(module).__name__} has no stacked gradients per record"
    return None


@contextmanager
def _watched(architectures: Mapping[str, Architecture], trains: Sequence[str]) -> Iterator[dict[str, Seen]]:
    """Let the layers of the models that are trained keep what they see; yields it by ``role/layer``."""
    found: dict[str, Seen] = {}
    # Two roles of one architecture share a template: its layers would not know for whom they work.
    if len({id(a) for a in architectures.values()}) < len(architectures):
        raise NotImplementedError("a device with two models of one architecture")
    changed = []
    for role in trains:
        for name, module in architectures[role].template.named_modules():
            if not list(module.parameters(recurse=False)):
                continue
            kind = "dense" if isinstance(module, nn.Linear) else "conv" if isinstance(module, nn.Conv2d) else "scale"
            seen = found[f"{role}/{name.removeprefix('inner.')}"] = Seen(kind)
            module.forward = _patched(module, seen)
            changed.append(module)
    try:
        yield found
    finally:
        for module in changed:
            del module.__dict__["forward"]


# ---- norms and sums -------------------------------------------------------------------------------------------------
def _joined(seen: Seen) -> tuple[Tensor, Tensor]:
    """Return inputs and gradients of all calls of a layer, as if they were further positions of each record."""
    dim = 2 if seen.kind == "dense" else 3
    if len(seen.inputs) == 1:
        return seen.inputs[0], seen.grads[0]
    return torch.cat(seen.inputs, dim), torch.cat(seen.grads, dim)


def clipped_sums(
    layers: Mapping[str, Seen],
    mask: Tensor,
    clip: float,
    bias: Callable[[str], bool],
    into: Mapping[str, Tensor],
    scale: float,
) -> None:
    """Add ``scale`` times the sum over records of clipped gradients to ``into`` [K, ...], by parameter.

    Guarantee: every record, masked ones and ones with a NaN or infinite gradient excepted (they add zero), adds a
    vector of norm at most ``clip``: norm and sum are taken from the same activations and gradients.

    Args:
        mask: bool [K, B], the real records. bias: tells whether a layer has a bias.
    """
    parts: list[tuple[str, Seen, Tensor, Tensor, Tensor | None]] = []
    total: Tensor | None = None
    for name, seen in layers.items():
        if not seen.inputs or not any(g.numel() for g in seen.grads):
            continue
        a, g = _joined(seen)
        each: Tensor | None = None
        if seen.kind == "dense":
            if a.shape[2] == 1:
                square = a.square().sum((2, 3))
                square = square + 1 if bias(name) else square
                square = square * g.square().sum((2, 3))
            else:
                k, b, t, _ = a.shape
                each = torch.bmm(g.reshape(k * b, t, -1).transpose(1, 2), a.reshape(k * b, t, -1)).view(k, b, -1)
                square = each.square().sum(2)
                if bias(name):
                    square = square + g.sum(2).square().sum(2)
        elif seen.kind == "conv":
            k, b, c, t = a.shape
            each = torch.bmm(g.reshape(k * b, -1, t), a.reshape(k * b, c, t).transpose(1, 2)).view(k, b, -1)
            square = each.square().sum(2)
            if bias(name):
                square = square + g.sum(3).square().sum(2)
        else:
            each = (a * g).sum(3)
            square = each.square().sum(2) + g.sum(3).square().sum(2)
        parts.append((name, seen, a, g, each))
        total = square if total is None else total + square
    if total is None:
        return
    good = mask & total.isfinite()
    factor = (clip / (total.sqrt() + 1e-6)).clamp(max=1.0)
    factor = torch.where(good, factor, torch.zeros_like(factor)) * scale
    # Zero times NaN is NaN: what a bad record left behind must go altogether.
    clean = bool(total.isfinite().all())
    for name, seen, a, g, each in parts:
        if not clean:
            keep = good[:, :, None, None]
            a, g = torch.where(keep, a, torch.zeros_like(a)), torch.where(keep, g, torch.zeros_like(g))
            each = None if each is None else torch.where(good[:, :, None], each, torch.zeros_like(each))
        weight = into[f"{name}.weight"]
        k, b = factor.shape
        if each is not None:
            weight.view(k, 1, -1).baddbmm_(factor[:, None], each)
        else:
            scaled = (g * factor[:, :, None, None]).reshape(k, -1, g.shape[-1])
            weight.baddbmm_(scaled.transpose(1, 2), a.reshape(k, -1, a.shape[-1]))
        if bias(name):
            flat_g = g.sum(2 if seen.kind == "dense" else 3)
            into[f"{name}.bias"].view(k, 1, -1).baddbmm_(factor[:, None], flat_g)


# ---- training -------------------------------------------------------------------------------------------------------
class Looped(UserWarning):
    """Devices that are trained one after the other, because their model has no stacked form under DP-SGD."""


def train_stacked(engine: Engine, mechanism: DpSgd, phase: Phase, tasks: Sequence[Task]) -> None:
    """Run one phase on private records for many devices, in stacks of one architecture."""
    from fedkd.privacy.dpsgd import check_additive, train_one

    for members in _groups(phase, tasks).values():
        check_additive(engine, phase, members[0])
        architectures = engine.site.architectures_of(members[0].card)
        reason = next((r for role in phase.trains if (r := why_not(architectures[role].template)) is not None), None)
        if reason is None and len({id(a) for a in architectures.values()}) < len(architectures):
            reason = "a device has two models of one architecture"
        if reason is not None:
            name = members[0].card.architecture
            warnings.warn(f"{name} is trained by DP-SGD one device after the other: {reason}", Looped, stacklevel=2)
            serial = SerialEngine(engine.site)
            for task in members:
                train_one(serial, mechanism, phase, task)
            continue
        convolves = any(isinstance(m, nn.Conv2d) for a in architectures.values() for m in a.template.modules())
        size = BLOCK_CONV if convolves else BLOCK_DENSE
        for start in range(0, len(members), size):
            _train_block(engine, mechanism, phase, members[start : start + size])


def _groups(phase: Phase, tasks: Sequence[Task]) -> dict[Hashable, list[Task]]:
    groups: dict[Hashable, list[Task]] = {}
    for task in tasks:
        told = _signature(task.heard.knowledge.tensors())
        kept = _signature(task.state.optimizers.get(phase.name, {}))
        place = (task.card.architecture, told, _signature(task.heard.memory), kept, task.heard.round)
        groups.setdefault(place, []).append(task)
    return groups


def _signature(tensors: Mapping[str, Tensor]) -> Hashable:
    return tuple(sorted((name, tuple(t.shape)) for name, t in tensors.items()))


def _train_block(engine: Engine, mechanism: DpSgd, phase: Phase, tasks: Sequence[Task]) -> None:
    from fedkd.privacy.dpsgd import augmenter, stream

    site, settings = engine.site, engine.settings(phase)
    steps, count, dtype = mechanism.steps[phase.settings], len(tasks), site.dtype
    architectures = site.architectures_of(tasks[0].card)
    stacked = _stack([flat(task.state.models, list(task.state.models)) for task in tasks])
    params, rest = split_trainable(stacked, architectures, phase.trains)
    optimizer = Optimizer(settings.optimizer)
    stored = [task.state.optimizers.get(phase.name) for task in tasks]
    fresh = optimizer.initial({k: v[0] for k, v in params.items()})
    state = _stack([dict(s) if s is not None else fresh for s in stored])
    rate = rates(settings, steps, tasks[0].heard.round)
    # One stream serves a block; in the seeded mode each device has its own, as it would have alone.
    streams = [stream(mechanism, phase, task) for task in tasks] if mechanism.config.seeded else [mechanism.noise()]
    chosen = [
        _poisson(streams[k % len(streams)], mechanism.q, steps, len(task.private)) for k, task in enumerate(tasks)
    ]
    # Dropout and augmentation too come from the system's entropy: drawn from the seed, by place in the batch, one record
    # more would change what its neighbours see.
    luck = [int(streams[k % len(streams)].bits(1)[0]) for k in range(count)]
    dropouts = [torch.Generator().manual_seed(seed) for seed in luck]
    vary = augmenter(engine, phase, tasks, luck[0])
    heard, put = _hear(tasks)
    sizes = {name: value[0].numel() for name, value in params.items()}
    noise = torch.empty(count * sum(sizes.values()), dtype=dtype)
    scale = 1 / mechanism.expected_batch
    deviation = mechanism.noise_multiplier * mechanism.clip * scale

    set_mode(architectures, True)
    has_free = True
    with _watched(architectures, phase.trains) as layers:
        for t in range(steps):
            grads = _draw(streams, noise, params, sizes, deviation)
            taken = [c[t] for c in chosen]
            width = max(len(i) for i in taken)
            live = {k: v.detach().requires_grad_(True) for k, v in params.items()}
            extra: dict[str, Tensor] = {}
            if has_free:
                extra = _free(engine, phase, count, architectures, layers, live, rest, heard, put)
                # Which weights a loss reaches without a record is its form, and the same in every step.
                has_free = bool(extra)
            _one_step(
                engine, phase, tasks, architectures, layers, live, rest, taken, width, dropouts, heard, put,
                None if vary is None else partial(vary, t),
            )  # fmt: skip
            with torch.no_grad():
                if width:
                    mask = torch.from_numpy(np.arange(width) < np.array([len(i) for i in taken])[:, None])
                    clipped_sums(layers, mask, mechanism.clip, lambda name: f"{name}.bias" in params, grads, scale)
                for name, value in extra.items():
                    grads[name] += value
                optimizer.step(params, tuple(grads.values()), state, float(rate[t]))
    final = {**params, **rest}
    for k, task in enumerate(tasks):
        optimizers = dict(task.state.optimizers)
        if settings.optimizer.persist:
            optimizers[phase.name] = {name: v[k].clone() for name, v in state.items()}
        models = nested({name: v[k].clone() for name, v in final.items()})
        task.state = replace(task.state, models=models, optimizers=optimizers)


def _draw(
    streams: Sequence[NoiseSource],
    noise: Tensor,
    params: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    deviation: float,
) -> dict[str, Tensor]:
    """Return fresh noise in the shape of the parameters; the sums of gradients are added to it."""
    count = len(next(iter(params.values())))
    found, at = {}, 0
    if len(streams) == 1 and count > 0:
        streams[0].normal_(noise).mul_(deviation)
        for name, value in params.items():
            found[name] = noise[at : at + count * sizes[name]].view(value.shape)
            at += count * sizes[name]
        return found
    rows = torch.stack([s.normal((sum(sizes.values()),), deviation, noise.dtype) for s in streams])
    for name, value in params.items():
        found[name] = rows[:, at : at + sizes[name]].reshape(value.shape)
        at += sizes[name]
    return found


def _one_step(
    engine: Engine,
    phase: Phase,
    tasks: Sequence[Task],
    architectures: Mapping[str, Architecture],
    layers: Mapping[str, Seen],
    live: dict[str, Tensor],
    still: dict[str, Tensor],
    taken: Sequence[np.ndarray],
    width: int,
    dropouts: list[torch.Generator],
    heard: dict[str, Tensor],
    put: Callable[[dict[str, Any]], Heard],
    vary: Callable[[Tensor, Sequence[int]], Tensor] | None,
) -> None:
    """Run forward and backward on the records taken; the layers keep what they see.

    Gradients that reach a weight beside its layer are thrown away: nothing has bounded them.
    """
    sizes = [len(i) for i in taken]
    own: dict[str, Tensor] = {}
    wide = max(width, 1)
    positions = np.zeros((len(tasks), wide), np.int64)
    for row, index in zip(positions, taken, strict=True):
        row[: len(index)] = index
    mask = torch.from_numpy(np.arange(wide) < np.array(sizes)[:, None])
    own["index"] = torch.from_numpy(positions)
    own["weight"] = mask.to(engine.site.dtype)
    own["x"], own["y"] = _gather(tasks, positions, sizes, wide, engine)
    if vary is not None and width:
        own["x"] = vary(own["x"], sizes)
    _pass(phase, architectures, layers, live, still, own, sizes, dropouts, heard, put)


def _free(
    engine: Engine,
    phase: Phase,
    count: int,
    architectures: Mapping[str, Architecture],
    layers: Mapping[str, Seen],
    live: dict[str, Tensor],
    still: dict[str, Tensor],
    heard: dict[str, Tensor],
    put: Callable[[dict[str, Any]], Heard],
) -> dict[str, Tensor]:
    """Return the gradient of what the loss adds without any record, such as a proximal term, by parameter [K, ...].

    Guarantee: no record is touched: the batch is one input of zeros that counts for nothing. Parameters that no such
    term reaches are left out, whatever their values.
    """
    site = engine.site
    zeros = torch.zeros(count, 1, dtype=torch.int64)
    nobody = {
        "x": torch.zeros(count, 1, *site.shape, dtype=site.dtype),
        "y": zeros,
        "index": zeros,
        "weight": torch.zeros(count, 1, dtype=site.dtype),
    }
    still_streams = [torch.Generator().manual_seed(0) for _ in range(count)]
    return _pass(phase, architectures, layers, live, still, nobody, [0] * count, still_streams, heard, put)


def uses_of_layers(engine: Engine, phase: Phase, task: Task) -> tuple[bool, str | None]:
    """Tell whether a record's gradient reaches a weight beside the layer that owns it, and name a layer called twice.

    A gradient beside the layers (a layer's weight used by ``F.linear``, a tied head) is in no norm per record. Tried out on
    made-up records and fresh weights, on layers that have a stacked form.
    """
    site, count = engine.site, 3
    architectures = site.architectures_of(task.card)
    rng = torch.Generator().manual_seed(1)
    own = {
        "x": torch.rand(1, count, *site.shape, generator=rng, dtype=torch.float64).to(site.dtype),
        "y": (torch.arange(count) % site.classes)[None],
        "index": torch.zeros(1, count, dtype=torch.int64),
    }
    models = {r: site.initial(architectures[r].name, "probe") for r in task.state.models}
    params, rest = split_trainable(_stack([flat(models, list(models))]), architectures, phase.trains)
    heard, put = _hear([task])
    found = []
    set_mode(architectures, False)
    with _watched(architectures, phase.trains) as layers:
        for weight in (1.0, 0.0):
            live = {k: v.clone().requires_grad_(True) for k, v in params.items()}
            given = {**own, "weight": torch.full((1, count), weight, dtype=site.dtype)}
            stream = [torch.Generator().manual_seed(0)]
            direct = _pass(phase, architectures, layers, live, rest, given, [count], stream, heard, put)
            found.append({k: direct.get(k, torch.zeros_like(v)) for k, v in live.items()})
        twice = next((name.partition("/")[2] for name, seen in layers.items() if len(seen.inputs) > 1), None)
    gap = max(float((found[0][k] - found[1][k]).norm()) for k in params)
    size = max(float(found[0][k].norm()) for k in params)
    return gap > 1e-6 * size + 1e-9, twice


def _pass(
    phase: Phase,
    architectures: Mapping[str, Architecture],
    layers: Mapping[str, Seen],
    live: dict[str, Tensor],
    still: dict[str, Tensor],
    own: dict[str, Tensor],
    sizes: Sequence[int],
    dropouts: list[torch.Generator],
    heard: dict[str, Tensor],
    put: Callable[[dict[str, Any]], Heard],
) -> dict[str, Tensor]:
    """Run forward and backward; the layers keep what they see. Returns the gradients that came beside the layers."""
    for seen in layers.values():
        seen.inputs.clear()
        seen.grads.clear()

    def loss(
        live: dict[str, Tensor], still: dict[str, Tensor], own: dict[str, Tensor], told: dict[str, Tensor]
    ) -> Tensor:
        made = Batch(x=own["x"], y=own["y"], index=own["index"], weight=own["weight"])
        anchor = next(iter(live.values())).detach()
        with situation(mask=None, generators=dropouts, sizes=list(sizes), anchor=anchor):
            return phase.loss(Net(architectures, nested({**live, **still})), made, put(told))

    if heard:
        values = vmap(loss)(live, still, own, heard)
    else:
        values = vmap(lambda a, b, c: loss(a, b, c, {}))(live, still, own)
    # The layers return no gradient for their weights: what comes out here came another way.
    found = torch.autograd.grad(values.sum(), list(live.values()), allow_unused=True)
    return {name: g for name, g in zip(live, found, strict=True) if g is not None}


def _gather(
    tasks: Sequence[Task], positions: np.ndarray, sizes: Sequence[int], width: int, engine: Engine
) -> tuple[Tensor, Tensor]:
    """Return inputs [K, B, ...] and labels [K, B]; places without a record hold zeros."""
    pools = {id(task.private.pool) for task in tasks}
    if len(pools) == 1 and all(len(task.private) for task in tasks):
        index = torch.stack([task.private.index[torch.from_numpy(p)] for task, p in zip(tasks, positions, strict=True)])
        pool = tasks[0].private.pool
        assert pool.y is not None
        return pool.take(index), pool.y[index]
    x = torch.zeros(len(tasks), width, *engine.site.shape, dtype=engine.site.dtype)
    y = torch.zeros(len(tasks), width, dtype=torch.int64)
    for k, (task, size) in enumerate(zip(tasks, sizes, strict=True)):
        if size:
            where = torch.from_numpy(positions[k, :size])
            x[k, :size] = task.private.inputs(where)
            labels = task.private.labels(where)
            assert labels is not None
            y[k, :size] = labels
    return x, y


def _poisson(source: NoiseSource, q: float, steps: int, records: int) -> list[np.ndarray]:
    return [np.flatnonzero(row) for row in source.bernoulli(q, (steps, records))]


def _hear(tasks: Sequence[Task]) -> tuple[dict[str, Tensor], Callable[[dict[str, Any]], Heard]]:
    """Return what differs from device to device of the things heard [K, ...], and how to put the whole together."""
    first = tasks[0].heard
    stacked: dict[str, Tensor] = {}
    common = all(task.heard.knowledge is first.knowledge for task in tasks)
    if not common:
        stacked |= {f"k/{n}": t for n, t in _stack([dict(task.heard.knowledge.tensors()) for task in tasks]).items()}
    stacked |= {f"m/{n}": t for n, t in _stack([dict(task.heard.memory) for task in tasks]).items()}

    def put(told: dict[str, Any]) -> Heard:
        knowledge = first.knowledge
        if not common and knowledge.tensors():
            knowledge = rebuild(outline(knowledge), {k[2:]: v for k, v in told.items() if k.startswith("k/")})
        memory = {k[2:]: v for k, v in told.items() if k.startswith("m/")}
        return Heard(knowledge=knowledge, memory=memory, round=first.round)

    return stacked, put


def _stack(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}
