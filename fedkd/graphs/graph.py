"""A graph in memory, and how one is read: ``.npz`` files and the raw Planetoid files.

Letters: N nodes, E undirected edges, D features, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph
from torch import Tensor

from fedkd.errors import DataError


@dataclass(frozen=True)
class NodeSplit:
    """Indices of nodes with known labels, of those that choose the epoch, and of those that are asked at the end."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]


@dataclass(frozen=True)
class Graph:
    """An undirected graph.

    ``x``: features [N, D], CSR float32. ``y``: classes [N] (int64). ``edges``: [2, E], each pair once, without loops.
    ``split``: the split that came with the file, if any.
    """

    x: Any
    y: NDArray[np.int64]
    edges: NDArray[np.int64]
    split: NodeSplit | None = None

    def __post_init__(self) -> None:
        if self.x.shape[0] != len(self.y):
            raise DataError(f"the graph has features of {self.x.shape[0]} nodes, but {len(self.y)} labels")
        _columns(self.edges)
        if len(self.y) and self.y.min() < 0:
            raise DataError(f"a node has the label {int(self.y.min())}: every node needs a class from 0 on")
        if not np.isfinite(self.x.data).all():
            raise DataError("a feature is not finite: replace it before it is given")
        for name, part in vars(self.split).items() if self.split is not None else ():
            if not len(part) or part.min() < 0 or part.max() >= len(self.y):
                raise DataError(f"the {name} part of the split is empty, or names a node that is not there")
        if self.edges.size and (self.edges.min() < 0 or self.edges.max() >= len(self.y)):
            raise DataError(f"an edge leads to node {int(self.edges.max())}, the graph has {len(self.y)}")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return int(self.y.max()) + 1

    @property
    def labels(self) -> Tensor:
        """Classes [N] as a tensor."""
        return torch.from_numpy(self.y)

    @property
    def arcs(self) -> NDArray[np.int64]:
        """Both directions of every edge, [2, 2E]."""
        return np.concatenate([self.edges, self.edges[::-1]], axis=1)

    def rows(self, index: NDArray[np.int64] | None = None) -> Tensor:
        """Return features of some nodes as a sparse tensor [n, D]: bags of words are nearly empty."""
        part = (self.x if index is None else self.x[index]).tocoo()
        where = torch.from_numpy(np.stack([part.row, part.col]).astype(np.int64))
        values = torch.from_numpy(part.data)
        return torch.sparse_coo_tensor(where, values, part.shape, is_coalesced=True, check_invariants=False)

    def dense(self, index: NDArray[np.int64] | None = None) -> Tensor:
        """Return features of some nodes as a dense tensor [n, D]."""
        return torch.from_numpy(np.asarray((self.x if index is None else self.x[index]).todense(), np.float32))

    def with_edges(self, edges: NDArray[np.int64]) -> Graph:
        """Return the same nodes under other edges."""
        return replace(self, edges=edges)

    def with_positions(self, positions: Tensor) -> Graph:
        """Return the graph with ``positions`` [N, P] appended to the features."""
        return replace(self, x=sparse.hstack([self.x, sparse.csr_matrix(positions.numpy())]).tocsr())

    def induced(self, nodes: NDArray[np.int64]) -> Graph:
        """Return the part on ``nodes`` [n], which are renumbered in their order; a split is dropped."""
        place = np.full(len(self), -1, np.int64)
        place[nodes] = np.arange(len(nodes))
        edges = place[self.edges]
        return Graph(self.x[nodes], self.y[nodes], edges[:, (edges >= 0).all(0)])

    def largest_component(self) -> Graph:
        """Return the largest connected part; a split that came with the file is dropped, as its indices no longer hold."""
        ones = np.ones(self.edges.shape[1], np.int8)
        adjacency = sparse.csr_matrix((ones, tuple(self.edges)), shape=(len(self), len(self)))
        _, part = csgraph.connected_components(adjacency, directed=False)
        return self.induced(np.flatnonzero(part == np.bincount(part).argmax()))


def per_class_split(labels: NDArray[np.int64], train: int, validation: int, rng: np.random.Generator) -> NodeSplit:
    """Draw ``train`` and ``validation`` nodes of each class; the rest is the test set.

    Raises:
        DataError: a class has too few nodes.
    """
    first, second = [], []
    for c in range(int(labels.max()) + 1):
        own = rng.permutation(np.flatnonzero(labels == c))
        if len(own) <= train + validation:
            raise DataError(f"class {c} has {len(own)} nodes: too few for {train} + {validation} and a test set")
        first.append(own[:train])
        second.append(own[train : train + validation])
    a, b = np.concatenate(first), np.concatenate(second)
    return NodeSplit(np.sort(a), np.sort(b), np.setdiff1d(np.arange(len(labels)), np.concatenate([a, b])))


def read_graph(path: Path, name: str = "cora") -> Graph:
    """Read a graph.

    Args:
        path: an ``.npz`` file, either with ``indptr indices data shape labels edges`` and, if it has a split,
            ``train_idx val_idx test_idx``, or with ``adj_* attr_* labels`` (CSR parts, as the graphs of Shchur et al. 2018
            come); or a folder with the raw files of Planetoid (``ind.NAME.x`` and so on).
        name: which graph of a Planetoid folder.
    Raises:
        DataError: it cannot be read as either.
    """
    if path.is_dir():
        from fedkd.graphs.planetoid import read_planetoid

        return read_planetoid(path, name)
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {key: file[key] for key in file.files if file[key].dtype != object}
    except (OSError, ValueError) as cause:
        raise DataError(f"{path} cannot be read as a graph in .npz form: {cause}") from cause
    try:
        if "adj_indptr" in held:
            return _csr_form(held)
        x = sparse.csr_matrix(
            (held["data"].astype(np.float32), held["indices"], held["indptr"]), shape=tuple(held["shape"])
        )
        edges = unique_edges(held["edges"].astype(np.int64))
        split = None
        if "train_idx" in held:
            split = NodeSplit(*(held[k].astype(np.int64) for k in ("train_idx", "val_idx", "test_idx")))
        return Graph(x, held["labels"].astype(np.int64), edges, split)
    except (KeyError, ValueError) as cause:
        raise DataError(f"{path} lacks a part of a graph, or its parts do not fit: {cause}") from cause


def _csr_form(held: dict[str, NDArray[Any]]) -> Graph:
    shape = tuple(held["adj_shape"])
    adjacency = sparse.csr_matrix((held["adj_data"], held["adj_indices"], held["adj_indptr"]), shape=shape).tocoo()
    if "attr_matrix" in held:
        x = sparse.csr_matrix(held["attr_matrix"].astype(np.float32))
    else:
        parts = held["attr_data"].astype(np.float32), held["attr_indices"], held["attr_indptr"]
        x = sparse.csr_matrix(parts, shape=tuple(held["attr_shape"]))
    edges = unique_edges(np.stack([adjacency.row, adjacency.col]).astype(np.int64))
    return Graph(x, held["labels"].astype(np.int64), edges)


def unique_edges(pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return undirected pairs [2, E] once each, without loops."""
    _columns(pairs)
    low, high = pairs.min(0), pairs.max(0)
    found: NDArray[np.int64] = np.unique(np.stack([low, high])[:, low != high], axis=1)
    return found


def _columns(edges: NDArray[np.int64]) -> None:
    if edges.ndim != 2 or edges.shape[0] != 2:
        raise DataError(f"edges have the shape {list(edges.shape)}: expected [2, E], one edge in a column")
