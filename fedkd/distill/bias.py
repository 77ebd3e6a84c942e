"""The bias of a class that a student never saw."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.errors import ConfigError


def tuned_bias(logits: Tensor, labels: Tensor, target: int) -> float:
    """Return what to add to the logit of class ``target`` so that accuracy on these records is highest.

    G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015,
    https://arxiv.org/abs/1503.02531, section 3: a student that never saw a class has learnt its features from the
    teacher, but too low a bias for it. They tuned it on the test set; give held-out records here.

    Exact, not a grid: a record turns to ``target`` once the addition passes the gap to its best other class, so that
    accuracy changes at these gaps only. Of equally good stretches the widest is taken, and its middle.

    Args:
        logits: [N, C] of held-out records, some of class ``target``.
        labels: [N].
    Raises:
        ConfigError: there is no record of class ``target``.
    """
    mine = labels == target
    if not bool(mine.any()):
        raise ConfigError(f"no held-out record has class {target}: its bias cannot be tuned without examples of it")
    others = logits.double().clone()
    others[:, target] = -torch.inf
    best, choice = others.max(1)
    gaps, order = (best - logits[:, target].double()).sort()
    # Above its gap a record of the class is right; below its gap any other is, if its best other class is its own.
    change = mine.long()[order] - ((choice == labels) & ~mine).long()[order]
    hits = torch.cat([torch.zeros(1, dtype=torch.long), change.cumsum(0)])
    edges = torch.cat([gaps[:1] - 1, gaps, gaps[-1:] + 1])
    widths = edges[1:] - edges[:-1]
    place = int(torch.where(hits == hits.max(), widths, torch.full_like(widths, -1.0)).argmax())
    return float((edges[place] + edges[place + 1]) / 2)
