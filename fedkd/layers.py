"""Layers that give one device the same numbers alone and in a stack of devices.

``torch.func.vmap`` over a model is right for most layers and wrong or slow for three: a per-device convolution becomes
a grouped convolution (slow on a CPU), batch statistics would see the padding of ragged batches, and dropout would draw
from one stream for all. :func:`prepare` swaps these three for the layers below; names of parameters do not change.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class _Situation:
    """What the layers must know of the batch in flight; set by the engines."""

    mask: Tensor | None = None
    generators: list[torch.Generator] | None = None
    sizes: list[int] | None = None
    anchor: Tensor | None = None


_SITUATION = _Situation()


@contextlib.contextmanager
def situation(
    *,
    mask: Tensor | None,
    generators: list[torch.Generator] | None = None,
    sizes: list[int] | None = None,
    anchor: Tensor | None = None,
) -> Iterator[None]:
    """Tell the layers which records are real (``mask`` [B], 1 or 0; None if all are) and whose random streams to use.

    ``anchor`` is any tensor that differs from device to device of a stack: by it dropout knows of the stack even where
    its input is one tensor for all, such as a proxy batch.
    """
    before = (_SITUATION.mask, _SITUATION.generators, _SITUATION.sizes, _SITUATION.anchor)
    _SITUATION.mask = mask
    _SITUATION.generators = _SITUATION.generators if generators is None else generators
    _SITUATION.sizes = _SITUATION.sizes if sizes is None else sizes
    _SITUATION.anchor = _SITUATION.anchor if anchor is None else anchor
    try:
        yield
    finally:
        _SITUATION.mask, _SITUATION.generators, _SITUATION.sizes, _SITUATION.anchor = before


# ---- convolution ----------------------------------------------------------------------------------------------------
class _StackedConv(torch.autograd.Function):
    """K convolutions at once: im2col, one ``bmm`` per direction, and a backward written out.

    x [K, B, C, H, W], weight [K, O, C, kh, kw] -> [K, B, O, OH, OW]. The generic backward of ``unfold`` scatters
    element by element; kh*kw slice additions do the same work in long runs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        k, b, c, h, w = x.shape
        _, o, _, kh, kw = weight.shape
        (sh, sw), (ph, pw) = stride, padding
        oh, ow = (h + 2 * ph - kh) // sh + 1, (w + 2 * pw - kw) // sw + 1
        padded = F.pad(x, (pw, pw, ph, ph)) if ph or pw else x
        patches = padded.unfold(3, kh, sh).unfold(4, kw, sw)
        columns = patches.permute(0, 2, 5, 6, 1, 3, 4).reshape(k, c * kh * kw, b * oh * ow)
        out = torch.bmm(weight.reshape(k, o, -1), columns)
        ctx.save_for_backward(columns, weight)
        ctx.sizes = (k, b, c, h, w, o, kh, kw, sh, sw, ph, pw, oh, ow)
        return out.view(k, o, b, oh, ow).permute(0, 2, 1, 3, 4)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        columns, weight = ctx.saved_tensors
        k, b, c, h, w, o, kh, kw, sh, sw, ph, pw, oh, ow = ctx.sizes
        grad = grads[0].permute(0, 2, 1, 3, 4).reshape(k, o, b * oh * ow)
        grad_weight = grad_x = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.bmm(grad, columns.transpose(1, 2)).view_as(weight)
        if ctx.needs_input_grad[0]:
            spread = torch.bmm(weight.reshape(k, o, -1).transpose(1, 2), grad).view(k, c, kh, kw, b, oh, ow)
            total = grad.new_zeros(k, c, b, h + 2 * ph, w + 2 * pw)
            for i in range(kh):
                for j in range(kw):
                    total[..., i : i + sh * oh : sh, j : j + sw * ow : sw] += spread[:, :, i, j]
            grad_x = total[..., ph : ph + h, pw : pw + w].permute(0, 2, 1, 3, 4)
        return grad_x, grad_weight, None, None


class _Conv(torch.autograd.Function):
    """A convolution whose rule under ``vmap`` is :class:`_StackedConv` instead of a grouped convolution."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need = (bool(ctx.needs_input_grad[0]), bool(ctx.needs_input_grad[1]), False)
        gx, gw, _ = torch.ops.aten.convolution_backward(
            grads[0], x, weight, None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, need
        )
        return gx, gw, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, stride: Any, padding: Any
    ) -> tuple[Tensor, int]:
        x_dim, w_dim = in_dims[0], in_dims[1]
        if w_dim is None:
            x = x.movedim(x_dim, 0)
            flat = F.conv2d(x.flatten(0, 1), weight, None, stride, padding)
            return flat.unflatten(0, x.shape[:2]), 0
        weight = weight.movedim(w_dim, 0)
        x = x.expand(info.batch_size, *x.shape) if x_dim is None else x.movedim(x_dim, 0)
        return cast(Tensor, _StackedConv.apply(x, weight, stride, padding)), 0


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` that stays fast under ``vmap``."""

    def forward(self, input: Tensor) -> Tensor:
        out = cast(Tensor, _Conv.apply(input, self.weight, self.stride, self.padding))
        return out if self.bias is None else out + self.bias[:, None, None]


# ---- batch normalisation --------------------------------------------------------------------------------------------
class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation whose statistics leave out padding, and which takes a batch of one record.

    Equal to torch's layer on full batches. For a single value per channel the variance is 0 and the running variance
    takes the biased estimate (torch refuses such a batch; a device may well hold one record).
    """

    def _check_input_dim(self, input: Tensor) -> None:
        return None

    def forward(self, input: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (input.dim() - 2)
        if not self.training or self.running_mean is None or self.running_var is None:
            mean, var = self.running_mean, self.running_var
            if mean is None or var is None:
                mean, var, _ = self._statistics(input)
        else:
            mean, var, n = self._statistics(input)
            factor = cast(float, self.momentum)
            unbiased = var.detach() * (n / (n - 1).clamp(min=1))
            self.running_mean.mul_(1 - factor).add_(factor * mean.detach())
            self.running_var.mul_(1 - factor).add_(factor * unbiased)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale
        if self.bias is not None:
            shift = shift + self.bias
        return input * scale.view(shape) + shift.view(shape)

    def _statistics(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean [C], biased variance [C] and the count of values per channel."""
        axes = [0, *range(2, input.dim())]
        area = input[0, 0].numel()
        mask = _SITUATION.mask
        if mask is None or mask.shape[0] != input.shape[0]:
            n = torch.tensor(float(input.shape[0] * area), dtype=input.dtype, device=input.device)
            var, mean = torch.var_mean(input, axes, correction=0)
            return mean, var, n
        wide = mask.to(input.dtype).view(-1, *(1,) * (input.dim() - 1))
        n = (mask.sum() * area).to(input.dtype).clamp(min=1)
        mean = (input * wide).sum(axes) / n
        centred = (input - mean.view(1, -1, *(1,) * (input.dim() - 2))) * wide
        return mean, centred.square().sum(axes) / n, n


class BatchNorm1d(_BatchNorm):
    """Masked ``nn.BatchNorm1d``."""


class BatchNorm2d(_BatchNorm):
    """Masked ``nn.BatchNorm2d``."""


# ---- dropout --------------------------------------------------------------------------------------------------------
class _KeyedDropout(torch.autograd.Function):
    """Dropout that draws from each device's own stream, for its real records only."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, p: float, anchor: Tensor | None) -> tuple[Tensor, Tensor]:
        keep = _keep(x, p, 0)
        return x * keep, keep

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.saved_tensors[0], None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, p: float, anchor: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        keep = torch.stack([_keep(x[k], p, k) for k in range(info.batch_size)])
        out = cast("tuple[Tensor, Tensor]", _StackedDropout.apply(x, keep))
        return (out[0], out[1]), (0, 0)


class _StackedDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(keep)
        ctx.mark_non_differentiable(keep)
        return x * keep, keep

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.saved_tensors[0], None


def _keep(x: Tensor, p: float, client: int) -> Tensor:
    streams, sizes = _SITUATION.generators, _SITUATION.sizes
    if streams is None:
        raise RuntimeError("dropout in training mode needs the device's random stream")
    rows = x.shape[0] if sizes is None or sizes[client] > x.shape[0] else sizes[client]
    draw = torch.rand((rows, *x.shape[1:]), generator=streams[client], dtype=torch.float32)
    keep = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    if p < 1:
        keep[:rows] = (draw >= p).to(keep) / (1 - p)
    return keep


class Dropout(nn.Dropout):
    """Dropout keyed by device, so that a device sees the same masks alone and in a stack."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        return cast("tuple[Tensor, Tensor]", _KeyedDropout.apply(input, self.p, _SITUATION.anchor))[0]


# ---- swapping -------------------------------------------------------------------------------------------------------
def prepare(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` with convolutions, batch normalisation and dropout swapped for this module's layers."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            swapped = _swap(child)
            if swapped is not None:
                setattr(parent, name, swapped)
    return _swap(module) or module


def _swap(child: nn.Module) -> nn.Module | None:
    new: nn.Module | None = None
    if type(child) is nn.Conv2d and child.groups == 1 and child.dilation == (1, 1):
        if child.padding_mode == "zeros" and not isinstance(child.padding, str):
            new = Conv2d.__new__(Conv2d)
    elif type(child) is nn.BatchNorm1d and child.momentum is not None:
        new = BatchNorm1d.__new__(BatchNorm1d)
    elif type(child) is nn.BatchNorm2d and child.momentum is not None:
        new = BatchNorm2d.__new__(BatchNorm2d)
    elif type(child) is nn.Dropout:
        new = Dropout.__new__(Dropout)
    if new is not None:
        new.__dict__.update(child.__dict__)
    return new
