"""Matrices as truncated singular value decompositions.

A tensor of two or more dimensions is read as a matrix [m, n], its first dimension against the rest, and travels as three
tensors NAME/u [m, r], NAME/s [r] and NAME/v [r, n] with matrix = u diag(s) v. Where factors would be no shorter than the
matrix itself, ``u`` is the whole matrix and ``s`` and ``v`` are empty. Other tensors travel as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedkd.payloads import Contract, Range, Weights, range_of


def rank(singular: Tensor, energy: float) -> int:
    """Return the least r whose r largest singular values hold the share ``energy`` of the sum of squares.

    Full rank where only full rank holds it; 0 for a matrix of zeros.
    """
    squares = singular.double().square()
    total = squares.sum()
    if total <= 0:
        return 0
    # Rounding may leave the last share a hair below 1: then no prefix is enough, and all are kept.
    return min(int((squares.cumsum(0) < energy * total).sum()) + 1, len(singular))


def compress(tensors: Mapping[str, Tensor], energy: float | None) -> dict[str, Tensor]:
    """Return the tensors with their matrices as factors; ``energy`` None sends every matrix whole."""
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not _is_matrix(value):
            out[name] = value
            continue
        matrix = value.flatten(1)
        m, n = matrix.shape
        whole = matrix, matrix.new_zeros(0), matrix.new_zeros(0, n)
        if energy is not None:
            u, s, v = torch.linalg.svd(matrix, full_matrices=False)
            r = rank(s, energy)
            if r * (m + n + 1) < m * n:
                whole = u[:, :r].contiguous(), s[:r].clone(), v[:r].contiguous()
        out |= {f"{name}/{part}": t for part, t in zip("usv", whole, strict=True)}
    return out


def expand(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`compress`; ``like`` gives the names and shapes. Factors that do not fit each other say nothing: zeros."""
    out: dict[str, Tensor] = {}
    for name, value in like.items():
        if not _is_matrix(value):
            out[name] = tensors[name]
            continue
        u, s, v = (tensors[f"{name}/{part}"] for part in "usv")
        if len(s) == 0 and u.shape[1] == v.shape[1]:
            out[name] = u.reshape(value.shape)
        elif u.shape[1] == len(s) == len(v):
            out[name] = ((u * s) @ v).reshape(value.shape)
        else:
            out[name] = torch.zeros_like(value)
    return out


def contract(like: Mapping[str, Tensor]) -> Contract:
    """Return what a receiver accepts of :func:`compress`, ranks being free."""
    shapes: dict[str, tuple[int | None, ...]] = {}
    ranges: dict[str, Range] = {}
    for name, value in like.items():
        if not _is_matrix(value):
            shapes[name], ranges[name] = tuple(value.shape), range_of(value)
            continue
        m, n = value.flatten(1).shape
        shapes |= {f"{name}/u": (m, None), f"{name}/s": (None,), f"{name}/v": (None, n)}
        ranges |= {f"{name}/{part}": "real" for part in "usv"}
    return Contract(kind=Weights, shapes=shapes, ranges=ranges, classes=0)


def _is_matrix(value: Tensor) -> bool:
    return value.is_floating_point() and value.dim() >= 2
