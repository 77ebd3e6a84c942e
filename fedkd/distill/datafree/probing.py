"""Gradients through a teacher that only answers: estimated by asking it at neighbouring inputs.

J.-B. Truong, P. Maini, R. J. Walls, N. Papernot, "Data-Free Model Extraction", CVPR 2021, https://arxiv.org/abs/2011.14779
(forward differences, m = 1, step 1e-3), after S. Kariyappa, A. Prakash, M. Qureshi, "MAZE: Data-Free Model Stealing Attack
Using Zeroth-Order Gradient Estimation", CVPR 2021, https://arxiv.org/abs/2005.03161 (m = 10). For a loss L of the answers
T(x), inputs of D values and random unit directions u_1 ... u_m,

    dL/dx  ~  D/m · sum over i of  <dL/dT, T(x + step · u_i) - T(x)> / step · u_i

Deviations: both papers take differences of the whole loss, student included; here only the teacher's part is estimated, by
its answers, and the rest of the chain (the student, the loss) has its exact gradient, which costs no query and lessens the
variance. Directions are drawn in the space of the inputs, and DFME's before the generator's last tanh. So a guide is all
that is new, and any method that seeks inputs by the teacher's gradient runs on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkd.distill.datafree.guides import Guide
from fedkd.errors import ConfigError


class ProbingGuide(Guide):
    """Asks ``inner``, and gives its answers a gradient with respect to the inputs, at ``probes`` more queries per input.

    Inputs that carry no gradient cost one query each.

    Args:
        inner: the teacher; counts the queries.
        probes: m, directions per input.
        step: length of a probe; answers rounded to less than they change over it have a gradient of 0.
    """

    differentiable = True

    def __init__(self, inner: Guide, probes: int = 1, step: float = 1e-3) -> None:
        if probes < 1 or not step > 0:
            raise ConfigError(f"gradients are estimated by at least 1 probe of a length above 0, got {probes}, {step}")
        self.inner, self.probes, self.step = inner, probes, step

    @property
    def queries(self) -> int:
        """Inputs answered so far, probes included."""
        return self.inner.queries

    @queries.setter
    def queries(self, value: int) -> None:
        self.inner.queries = value

    def __call__(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.inner(x)
        answers: Tensor = _Probed.apply(x, self)
        return answers

    def probe(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return answers [B, C], unit directions [m, B, *shape], and the answers' slopes along them [m, B, C]."""
        u = torch.randn(self.probes, *x.shape, device=x.device, dtype=x.dtype)
        u = u / u.flatten(2).norm(dim=2).clamp(min=torch.finfo(x.dtype).tiny).view(*u.shape[:2], *(1,) * (x.dim() - 1))
        # One question for all of them: a remote teacher then answers in one stream.
        told = self.inner(torch.cat([x[None], x + self.step * u]).flatten(0, 1)).view(self.probes + 1, len(x), -1)
        return told[0], u, (told[1:] - told[0]) / self.step


class _Probed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, guide: ProbingGuide) -> Tensor:
        # Probed here rather than in `backward`, which may run in another thread, away from the loop's random stream.
        told, u, slopes = guide.probe(x.detach())
        ctx.save_for_backward(u, slopes)
        return told.clone()

    @staticmethod
    def backward(ctx: Any, *wanted: Tensor) -> tuple[Tensor, None]:
        u, slopes = ctx.saved_tensors
        size = u[0, 0].numel()
        along = (slopes * wanted[0]).sum(-1)
        return size * (along.view(*along.shape, *(1,) * (u.dim() - 2)) * u).mean(0), None
