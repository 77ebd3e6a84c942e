"""Link prediction: a graph net scores pairs of nodes, and a perceptron learns its scores without edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.distill.loop import Batch, Best, Epoch, Fit, Loop
from fedkd.errors import DataError
from fedkd.graphs.graph import Graph
from fedkd.graphs.models import GraphNet, NodeMLP, mean_adjacency
from fedkd.graphs.positions import walks
from fedkd.losses import KD
from fedkd.losses.graph import ContextRanking


@dataclass(frozen=True)
class LinkSplit:
    """Edges [2, n] to learn from, to choose the epoch by, and to be asked at the end; and pairs that are no edges."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    validation_none: NDArray[np.int64]
    test_none: NDArray[np.int64]


def split_links(graph: Graph, validation: float, test: float, rng: np.random.Generator) -> LinkSplit:
    """Draw shares of the edges for validation and test, and as many pairs without an edge for each.

    Raises:
        DataError: there are too few edges for that, or too few pairs without one.
    """
    order = rng.permutation(graph.edges.shape[1])
    v, t = round(validation * len(order)), round(test * len(order))
    if min(v, t, len(order) - v - t) < 2:
        raise DataError(f"{len(order)} edges are too few for validation, test and training")
    none = _no_edges(graph, v + t, rng)
    edges = graph.edges[:, order]
    return LinkSplit(edges[:, v + t :], edges[:, :v], edges[:, v : v + t], none[:, :v], none[:, v:])


def _no_edges(graph: Graph, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    nodes = len(graph)
    free = nodes * (nodes - 1) // 2 - graph.edges.shape[1]
    if free < 2 * count:
        raise DataError(
            f"the graph is nearly complete: {free} pairs are without an edge, and {count} are to be drawn of them"
        )
    taken = set((graph.edges[0] * nodes + graph.edges[1]).tolist())
    found: list[int] = []
    while len(found) < count:
        a, b = rng.integers(nodes, size=2)
        code = int(min(a, b)) * nodes + int(max(a, b))
        if a != b and code not in taken:
            taken.add(code)
            found.append(code)
    codes = np.array(found, np.int64)
    return np.stack([codes // nodes, codes % nodes])


class LinkModel(nn.Module):
    """Node embeddings by ``encoder``, and the chance of a link from the product of two of them.

    Args:
        encoder: a :class:`GraphNet` (teacher) or a :class:`NodeMLP` (student) that gives [N, width].
    """

    def __init__(self, encoder: GraphNet | NodeMLP, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def embed(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Return embeddings [N, width]; a perceptron does not read the adjacency."""
        out: Tensor = self.encoder(x, adjacency) if isinstance(self.encoder, GraphNet) else self.encoder(x)
        return out

    def logits(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the logit of a link [...] for embeddings [..., width] of both ends."""
        out: Tensor = self.score(left * right).squeeze(-1)
        return out


@dataclass(frozen=True, kw_only=True)
class LinkFit:
    """How long and how, and the weights of LLP's terms.

    ``anchors``: nodes per step whose contexts are compared; each has ``near`` walks of ``hops`` steps and as many random
    nodes. ``labels``, ``distribution``, ``ranking``: weights of the three terms. ``every``: epochs between validations.
    """

    epochs: int = 150
    every: int = 5
    patience: int = 20
    lr: float = 0.005
    k: int = 20  # of hits at k on validation
    anchors: int = 1000
    near: int = 3
    hops: int = 2
    labels: float = 1.0
    distribution: float = 1.0
    ranking: float = 1.0
    margin: float = 0.1


def hits_at(k: int, links: Tensor, none: Tensor) -> float:
    """Return the share of true links [n] that score above the k-th best of the pairs without an edge [m]."""
    if len(none) < k:
        return 1.0
    return float((links > none.topk(k).values[-1]).double().mean())


def train_links(
    model: LinkModel,
    graph: Graph,
    split: LinkSplit,
    fit: LinkFit,
    seed: int,
    *,
    checkpoint: Path | None = None,
    watch: Callable[[Epoch], None] | None = None,
) -> dict[str, float]:
    """Train on true links alone; return ``hits`` at k and ``auc`` on the test pairs.

    ``checkpoint``, ``watch``: see :meth:`fedkd.distill.loop.Loop.run`.
    """
    return _train(model, graph, split, fit, seed, None, checkpoint, watch)


def distil_links(
    student: LinkModel,
    teacher: LinkModel,
    graph: Graph,
    split: LinkSplit,
    fit: LinkFit,
    seed: int,
    *,
    checkpoint: Path | None = None,
    watch: Callable[[Epoch], None] | None = None,
) -> dict[str, float]:
    """Train by true links and by the teacher's scores of every anchor with its context nodes.

    Z. Guo et al., "Linkless Link Prediction via Relational Distillation", ICML 2023, https://arxiv.org/abs/2210.05801:
    weights * (BCE of links, KL of the softmax over contexts of both models' link chances, ranking of contexts). Contexts
    are the nodes on short walks from the anchor and as many random nodes (section 4.3).
    """
    return _train(student, graph, split, fit, seed, teacher, checkpoint, watch)


def _train(
    model: LinkModel,
    graph: Graph,
    split: LinkSplit,
    fit: LinkFit,
    seed: int,
    teacher: LinkModel | None,
    checkpoint: Path | None,
    watch: Callable[[Epoch], None] | None,
) -> dict[str, float]:
    known = graph.with_edges(split.train)
    x, adjacency = graph.rows(), mean_adjacency(len(graph), known.arcs)
    positive = torch.from_numpy(split.train)
    told: Tensor | None = None
    if teacher is not None:
        teacher.eval()
        with torch.no_grad():
            told = teacher.embed(x, adjacency)

    def step(batch: Batch) -> dict[str, tuple[Tensor, float]]:
        h = model.embed(x, adjacency)
        negative = torch.from_numpy(_no_edges(known, positive.shape[1], batch.rng))
        pairs = torch.cat([positive, negative], 1)
        truth = torch.cat([torch.ones(positive.shape[1]), torch.zeros(negative.shape[1])])
        right = F.binary_cross_entropy_with_logits(model.logits(h[pairs[0]], h[pairs[1]]), truth)
        found = {"labels": (right, fit.labels)}
        if teacher is not None and told is not None:
            found |= _contexts(model, teacher, h, told, known, fit, batch.rng)
        return found

    def score() -> float:
        return _measure(model, x, adjacency, split.validation, split.validation_none, fit.k)["hits"]

    # A step reads all links at once: one batch is all of them.
    size = positive.shape[1]
    how = Fit(epochs=fit.epochs, batch_size=size, optimizer="adam", lr=fit.lr, weight_decay=0.0, clip=1.0)
    best = Best(score=score, patience=fit.patience, every=fit.every)
    Loop({"model": model}, size, step, fit=how, seed=seed, best=best).run(checkpoint=checkpoint, watch=watch)
    return _measure(model, x, adjacency, split.test, split.test_none, fit.k)


def _contexts(
    model: LinkModel, teacher: LinkModel, h: Tensor, told: Tensor, graph: Graph, fit: LinkFit, rng: np.random.Generator
) -> dict[str, tuple[Tensor, float]]:
    anchors = rng.permutation(len(graph))[: fit.anchors]
    paths = walks(graph, fit.hops + 1, fit.near, rng)
    # A walk's first entry is its node: each node has `near` of them.
    order = np.argsort(paths[:, 0], kind="stable").reshape(len(graph), fit.near)
    nearby = paths[order[anchors]][:, :, 1:].reshape(len(anchors), -1)
    random = rng.integers(len(graph), size=nearby.shape)
    context = torch.from_numpy(np.concatenate([nearby, random], axis=1))
    at = torch.from_numpy(anchors)
    own = model.logits(h[at].unsqueeze(1), h[context]).sigmoid()
    with torch.no_grad():
        wanted = teacher.logits(told[at].unsqueeze(1), told[context]).sigmoid()
    return {
        "distribution": (KD(temperature=1)(own, wanted), fit.distribution),
        "ranking": (ContextRanking(margin=fit.margin)(own, wanted), fit.ranking),
    }


@torch.no_grad()
def _measure(
    model: LinkModel, x: Tensor, adjacency: Tensor, links: NDArray[np.int64], none: NDArray[np.int64], k: int
) -> dict[str, float]:
    from sklearn.metrics import roc_auc_score

    model.eval()
    h = model.embed(x, adjacency)
    yes, no = (model.logits(h[torch.from_numpy(p[0])], h[torch.from_numpy(p[1])]) for p in (links, none))
    truth = np.concatenate([np.ones(len(yes)), np.zeros(len(no))])
    return {"hits": hits_at(k, yes, no), "auc": float(roc_auc_score(truth, torch.cat([yes, no]).numpy()))}
