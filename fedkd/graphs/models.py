"""The two sides: a net that propagates along edges, and a perceptron that sees one node's features alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F


def mean_adjacency(nodes: int, arcs: NDArray[np.int64]) -> Tensor:
    """Return the sparse matrix [N, N] that averages a node with its neighbours.

    W. Hamilton, R. Ying, J. Leskovec, "Inductive Representation Learning on Large Graphs", NeurIPS 2017,
    https://arxiv.org/abs/1706.02216, eq. (2) (the GCN aggregator).
    """
    loops = np.arange(nodes)
    row, column = np.concatenate([arcs[1], loops]), np.concatenate([arcs[0], loops])
    share = 1.0 / np.bincount(row, minlength=nodes)
    return _sparse(row, column, share[row], nodes)


def symmetric_adjacency(nodes: int, arcs: NDArray[np.int64]) -> Tensor:
    """Return D^-1/2 (A + I) D^-1/2 [N, N].

    T. Kipf, M. Welling, "Semi-Supervised Classification with Graph Convolutional Networks", ICLR 2017,
    https://arxiv.org/abs/1609.02907, eq. (2).
    """
    loops = np.arange(nodes)
    row, column = np.concatenate([arcs[1], loops]), np.concatenate([arcs[0], loops])
    root = 1.0 / np.sqrt(np.bincount(row, minlength=nodes))
    return _sparse(row, column, root[row] * root[column], nodes)


def sampled_adjacency(nodes: int, arcs: NDArray[np.int64], fan_out: int, rng: np.random.Generator) -> Tensor:
    """Return :func:`mean_adjacency` of at most ``fan_out`` neighbours per node, drawn anew (Hamilton et al., 3.1)."""
    order = np.lexsort((rng.random(arcs.shape[1]), arcs[1]))
    target = arcs[1][order]
    first = np.searchsorted(target, target)
    keep = np.arange(len(target)) - first < fan_out
    return mean_adjacency(nodes, arcs[:, order[keep]])


def _sparse(row: NDArray[np.int64], column: NDArray[np.int64], value: NDArray[np.float64], nodes: int) -> Tensor:
    where = torch.from_numpy(np.stack([row, column]))
    values = torch.from_numpy(value.astype(np.float32))
    return torch.sparse_coo_tensor(where, values, (nodes, nodes), check_invariants=False).coalesce()


class _Linear(nn.Linear):
    """A linear layer that also takes a sparse input."""

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_sparse:
            return super().forward(input)
        out: Tensor = torch.sparse.mm(input, self.weight.T)
        return out if self.bias is None else out + self.bias


class GraphNet(nn.Module):
    """Layers ReLU(dropout(A (h W) + b)): GraphSAGE under a mean adjacency, GCN under a symmetric one.

    Args:
        widths: features, hidden widths, outputs.
        dropout: of hidden values.
    """

    def __init__(self, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Linear(a, b, bias=False) for a, b in itertools.pairwise(widths))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(b)) for b in widths[1:])
        self.dropout = nn.Dropout(dropout)
        for layer in self.layers:
            assert isinstance(layer, _Linear)
            nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(2))

    def forward(self, x: Tensor, adjacencies: Tensor | Sequence[Tensor]) -> Tensor:
        """Return outputs [N, C] for features [N, D]; one adjacency for all layers or one for each."""
        return self.hidden(x, adjacencies)[-1]

    def hidden(self, x: Tensor, adjacencies: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Return what every layer gives before its ReLU, the outputs last."""
        found, last = [], len(self.layers) - 1
        for i, (layer, bias) in enumerate(zip(self.layers, self.biases, strict=True)):
            a = adjacencies if isinstance(adjacencies, Tensor) else adjacencies[i]
            h = torch.sparse.mm(a, layer(x)) + bias
            found.append(h)
            x = h if i == last else self.dropout(F.relu(h))
        return found


class NodeMLP(nn.Module):
    """A perceptron on one node's features [B, D], sparse or dense: what is deployed. No edge is read.

    Args:
        widths: features, hidden widths, outputs.
        dropout: of hidden values.
    """

    def __init__(self, widths: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Linear(a, b) for a, b in itertools.pairwise(widths))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs [B, C]."""
        return self.hidden(x)[-1]

    def hidden(self, x: Tensor) -> list[Tensor]:
        """Return what every layer gives before its ReLU, the outputs last."""
        found, last = [], len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            h = layer(x)
            found.append(h)
            x = h if i == last else self.dropout(F.relu(h))
        return found
