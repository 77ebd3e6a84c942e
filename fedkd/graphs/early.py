"""Early stopping: the weights of the best validation score are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn


def keep_best(
    model: nn.Module,
    seed: int,
    epoch: Callable[[int], None],
    score: Callable[[], float],
    *,
    epochs: int,
    patience: int,
    every: int = 1,
    later: bool = False,
) -> None:
    """Train until the score has not risen for ``patience`` looks, and leave the best weights, in evaluation mode.

    Args:
        seed: of torch's stream while it trains (dropout).
        epoch: trains one epoch, given its number.
        score: of the model in evaluation mode, without gradients.
        every: epochs between looks at the score.
        later: among equal scores the last is kept, not the first.
    """
    best, waited, state = -1.0, 0, copy.deepcopy(model.state_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number in range(epochs):
            model.train()
            epoch(number)
            if (number + 1) % every:
                continue
            model.eval()
            with torch.no_grad():
                reached = score()
            if reached > best or (later and reached == best):
                best, waited, state = reached, 0, copy.deepcopy(model.state_dict())
            else:
                waited += 1
            if waited >= patience:
                break
    model.load_state_dict(state)
    model.eval()
