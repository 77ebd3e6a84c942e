"""What every engine shares: which records form which step, and the optimisers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkd.experiment import OptimizerConfig, TrainingConfig


@dataclass(frozen=True)
class Schedule:
    """The records of every step of one stretch of training.

    ``index`` int64 [T, B]: positions of the records of each step; rows of a short batch repeat position 0 beyond
    ``sizes`` [T], the count of real records.
    """

    index: NDArray[np.int64]
    sizes: NDArray[np.int64]

    @property
    def steps(self) -> int:
        """Number of steps T."""
        return len(self.sizes)


def schedule(records: int, settings: TrainingConfig, rng: np.random.Generator) -> Schedule:
    """Deal ``records`` into batches: a fresh permutation per epoch, the last batch of an epoch may be short.

    With ``settings.steps`` the epochs go on until that many steps are dealt.
    """
    batch = min(settings.batch_size, max(records, 1))
    per_epoch = math.ceil(records / batch) if records else 0
    wanted = per_epoch * settings.epochs if settings.steps is None else (settings.steps if records else 0)
    if wanted == 0:
        return Schedule(np.zeros((0, batch), np.int64), np.zeros(0, np.int64))
    epochs = math.ceil(wanted / per_epoch)
    if epochs == 1 and records == batch * wanted:
        return Schedule(rng.permutation(records).reshape(-1, batch), np.full(wanted, batch, np.int64))
    index = np.zeros((epochs, per_epoch * batch), np.int64)
    for e in range(epochs):
        index[e, :records] = rng.permutation(records)
    sizes = np.full((epochs, per_epoch), batch, np.int64)
    sizes[:, -1] = records - (per_epoch - 1) * batch
    return Schedule(index.reshape(-1, batch)[:wanted], sizes.reshape(-1)[:wanted])


def rates(settings: TrainingConfig, steps: int, round: int) -> NDArray[np.float64]:
    """Return the learning rate of each step [T] of a stretch in ``round`` (0-based)."""
    base = settings.optimizer.lr * settings.round_decay**round
    if settings.schedule == "cosine":
        return base * 0.5 * (1 + np.cos(np.pi * np.arange(steps) / max(steps, 1)))
    return np.full(steps, base)


State = dict[str, Tensor]


class Optimizer:
    """SGD (with momentum, Nesterov), Adam and AdamW as elementwise updates, equal to ``torch.optim``.

    Parameters may be one model's tensors, or a stack of K models' [K, ...]: the update is the same, and the learning
    rate and step count may differ from model to model. ``torch.optim`` cannot serve here because models that have
    finished their steps must stand still, momentum and weight decay included.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config

    def initial(self, params: Mapping[str, Tensor], stack: int | None = None) -> State:
        """Return the state before the first step for ``params``, stacked over ``stack`` models if that is given."""
        c = self.config
        if c.name == "sgd":
            names = ["momentum"] if c.momentum else []
        else:
            names = ["first", "second"]
        state = {f"{slot}/{name}": torch.zeros_like(p) for slot in names for name, p in params.items()}
        if names:
            # In float32 1 - 0.999^t would be off by 1e-4 in the first steps.
            state["steps"] = torch.zeros([] if stack is None else [stack], dtype=torch.float64)
        return state

    @torch.no_grad()
    def step(self, params: Mapping[str, Tensor], grads: tuple[Tensor, ...], state: State, rate: float | Tensor) -> None:
        """Update ``params`` and ``state`` in place; ``rate`` is a number or one per model [K]."""
        c = self.config
        values = list(params.values())
        grad = list(grads)
        if c.weight_decay and c.name != "adamw":
            grad = list(torch._foreach_add(grad, values, alpha=c.weight_decay))
        if c.name == "sgd":
            if c.momentum:
                slots = [state[f"momentum/{name}"] for name in params]
                # torch seeds the buffer with the first gradient: 0 * momentum + grad is the same number.
                torch._foreach_mul_(slots, c.momentum)
                torch._foreach_add_(slots, grad)
                state["steps"] += 1
                grad = list(torch._foreach_add(grad, slots, alpha=c.momentum)) if c.nesterov else slots
            self._descend(values, grad, rate)
            return
        state["steps"] += 1
        steps = state["steps"]
        first = [state[f"first/{name}"] for name in params]
        second = [state[f"second/{name}"] for name in params]
        torch._foreach_lerp_(first, grad, 1 - c.betas[0])
        torch._foreach_mul_(second, c.betas[1])
        torch._foreach_addcmul_(second, grad, grad, 1 - c.betas[1])
        if c.name == "adamw" and c.weight_decay:
            for p in values:
                p.mul_(1 - _wide(rate, p) * c.weight_decay)
        scale1, scale2 = 1 - c.betas[0] ** steps, (1 - c.betas[1] ** steps).sqrt()
        for p, m, v in zip(values, first, second, strict=True):
            p.sub_(_wide(rate / scale1, p) * m / (v.sqrt() / _wide(scale2, p) + c.eps))

    @staticmethod
    def _descend(values: list[Tensor], grad: list[Tensor], rate: float | Tensor) -> None:
        if isinstance(rate, float):
            torch._foreach_add_(values, grad, alpha=-rate)
            return
        for p, g in zip(values, grad, strict=True):
            p.sub_(_wide(rate, p) * g)


def _wide(value: Any, like: Tensor) -> Any:
    """View a per-model value [K] so that it broadcasts against a stacked tensor [K, ...]."""
    if isinstance(value, Tensor) and value.dim() == 1:
        return value.to(like.dtype).view(-1, *(1,) * (like.dim() - 1))
    return value
