"""Random views of synthetic images, through which gradients flow, and their roughness. Other inputs pass as they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rolled(x: Tensor, pixels: int, flip: bool) -> Tensor:
    """Shift a batch [B, C, H, W] in a circle by up to ``pixels`` each way, all alike; mirror it with chance 1/2."""
    if x.dim() != 4:
        return x
    down, right = (int(torch.randint(-pixels, pixels + 1, ())) for _ in range(2))
    x = torch.roll(x, (down, right), (2, 3))
    return x.flip(3) if flip and bool(torch.rand(()) < 0.5) else x


def shifted(x: Tensor, pixels: int, flip: bool) -> Tensor:
    """Shift every image [B, C, H, W] by up to ``pixels`` each way, its edge repeated; mirror it with chance 1/2."""
    return _warp(x, torch.ones(len(x)), 2.0 * pixels, flip)


def zoomed(x: Tensor, least: float, flip: bool) -> Tensor:
    """Take a part of ``least`` to 1 of every image's area [B, C, H, W], brought to full size; mirror with chance 1/2."""
    side = (least + (1 - least) * torch.rand(len(x))).sqrt()
    return _warp(x, side, None, flip)


def _warp(x: Tensor, side: Tensor, pixels: float | None, flip: bool) -> Tensor:
    if x.dim() != 4:
        return x
    place = 2 * torch.rand(len(x), 2) - 1
    if pixels is None:
        move = place * (1 - side)[:, None]
    else:
        move = place * torch.tensor([pixels / x.shape[3], pixels / x.shape[2]])
    turn = torch.zeros(len(x), 2, 3)
    turn[:, 0, 0], turn[:, 1, 1], turn[:, :, 2] = side, side, move
    if flip:
        turn[:, 0, 0] *= 1 - 2 * (torch.rand(len(x)) < 0.5).to(turn)
    grid = F.affine_grid(turn.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def roughness(x: Tensor) -> Tensor:
    """Return the total variation of images [B, C, H, W]: L2 norms of the differences along rows, columns and diagonals.

    0 for inputs that are no images.
    """
    if x.dim() != 4:
        return x.new_zeros(())
    steps = (
        x[:, :, :, :-1] - x[:, :, :, 1:],
        x[:, :, :-1, :] - x[:, :, 1:, :],
        x[:, :, :-1, :-1] - x[:, :, 1:, 1:],
        x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
    )
    return torch.stack([step.norm() for step in steps]).sum()
