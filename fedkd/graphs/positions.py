"""Where a node lies in the graph, as numbers that a perceptron can read."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkd.graphs.graph import Graph


def walks(graph: Graph, length: int, per_node: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return uniform random walks [N * per_node, length]; a node without neighbours stays where it is."""
    arcs = graph.arcs
    order = np.argsort(arcs[0], kind="stable")
    targets, sources = arcs[1][order], arcs[0][order]
    first = np.searchsorted(sources, np.arange(len(graph)))
    degree = np.bincount(sources, minlength=len(graph))
    now = np.concatenate([rng.permutation(len(graph)) for _ in range(per_node)])
    path = [now]
    for _ in range(length - 1):
        step = first[now] + (rng.random(len(now)) * degree[now]).astype(np.int64)
        now = np.where(degree[now] > 0, targets[np.minimum(step, max(len(targets) - 1, 0))], now)
        path.append(now)
    return np.stack(path, axis=1)


def deepwalk(
    graph: Graph,
    dimensions: int = 64,
    length: int = 50,
    per_node: int = 5,
    window: int = 5,
    epochs: int = 1,
    negatives: int = 5,
    rate: float = 0.025,
    batch: int = 512,
    seed: int = 1,
) -> Tensor:
    """Return an embedding [N, dimensions] by skip-gram over random walks.

    B. Perozzi, R. Al-Rfou, S. Skiena, "DeepWalk: Online Learning of Social Representations", KDD 2014,
    https://arxiv.org/abs/1403.6652, algorithms 1 and 2. Deviations: negative sampling from the walks' frequencies to the
    power 3/4 in place of hierarchical softmax (Mikolov et al. 2013; what most later code does), the window is drawn from 1
    to ``window`` as word2vec does, and plain SGD steps are taken on sums over ``batch`` pairs. The defaults are those of
    NOSMOG on Cora.
    """
    rng = np.random.default_rng(seed)
    paths = walks(graph, length, per_node, rng)
    nodes = len(graph)
    stream = torch.Generator().manual_seed(seed)
    centre = (torch.rand(nodes, dimensions, generator=stream) - 0.5) / dimensions
    context = torch.zeros(nodes, dimensions)
    frequency = np.bincount(paths.ravel(), minlength=nodes) ** 0.75
    table = torch.from_numpy(np.searchsorted(np.cumsum(frequency / frequency.sum()), rng.random(1_000_000)))
    table = table.clamp(max=nodes - 1)
    pairs = torch.from_numpy(_pairs(paths, window, rng))
    total, done = epochs * len(pairs), 0
    for _ in range(epochs):
        for chosen in pairs[torch.randperm(len(pairs), generator=stream)].split(batch):
            step = rate * max(1 - done / total, 1e-4)
            done += len(chosen)
            others = table[torch.randint(len(table), (len(chosen), negatives), generator=stream)]
            target = torch.cat([chosen[:, 1:], others], 1)
            u, v = centre[chosen[:, 0]], context[target]
            error = -torch.sigmoid(torch.bmm(v, u.unsqueeze(2)).squeeze(2))
            error[:, 0] += 1
            error = error * step
            centre.index_add_(0, chosen[:, 0], torch.bmm(error.unsqueeze(1), v).squeeze(1))
            context.index_add_(0, target.flatten(), (error.unsqueeze(2) * u.unsqueeze(1)).flatten(0, 1))
    return centre


def _pairs(paths: NDArray[np.int64], window: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return (node, node nearby) pairs [P, 2]; each place of a walk draws its own window."""
    reach = rng.integers(1, window + 1, size=paths.shape)
    found = []
    for gap in range(1, window + 1):
        left, right = paths[:, :-gap], paths[:, gap:]
        found.append(np.stack([left, right], -1)[reach[:, :-gap] >= gap])
        found.append(np.stack([right, left], -1)[reach[:, gap:] >= gap])
    return np.concatenate(found)
