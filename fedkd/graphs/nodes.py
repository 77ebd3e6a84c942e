"""Node classification: a graph net teaches a perceptron that will never see an edge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedkd.distill.loop import Batch, Best, Epoch, Fit, Loop
from fedkd.errors import ConfigError
from fedkd.graphs.graph import Graph, NodeSplit
from fedkd.graphs.models import GraphNet, NodeMLP, mean_adjacency, sampled_adjacency, symmetric_adjacency
from fedkd.losses import KD, CrossEntropy
from fedkd.losses.graph import RepresentationSimilarity, local_structure
from fedkd.seeding import key


@dataclass(frozen=True, kw_only=True)
class NodeFit:
    """How long and how: Adam, the weights of the best validation accuracy are kept (the later of equals).

    ``patience``: epochs without a better one after which training ends. ``fan_out``: neighbours that a teacher draws per
    node and layer; None is all of them under a symmetric adjacency (GCN).
    """

    epochs: int = 200
    patience: int = 50
    lr: float = 0.01
    weight_decay: float = 5e-4
    batch: int = 512
    fan_out: int | None = 5

    def fit(self, batch: int) -> Fit:
        """Return it as the loop takes it, for batches of ``batch`` records."""
        return Fit(epochs=self.epochs, batch_size=batch, optimizer="adam", lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class GraphTerms:
    """What a student without edges learns by; 0 leaves a term out.

    soft: KL from the teacher's classes, T = 1, on all nodes of the graph. GLNN is this term alone: S. Zhang, Y. Liu, Y. Sun,
        N. Shah, "Graph-less Neural Networks", ICLR 2022, https://arxiv.org/abs/2110.08727, eq. (1) with lambda 0.
    labels: cross-entropy on training nodes.
    similarity: :class:`fedkd.losses.RepresentationSimilarity` of the last hidden layers (NOSMOG, section 4.2).
    adversarial: KL on features moved by up to ``radius`` in ``steps`` of projected gradient ascent (NOSMOG, section 4.3;
        published 0.1). Features are taken dense for it, which makes a step many times as costly.
    structure: :func:`fedkd.losses.graph.local_structure` of the last hidden layers (LSP) over a batch's neighbours.
    """

    soft: float = 1.0
    labels: float = 0.0
    similarity: float = 0.0
    adversarial: float = 0.0
    radius: float = 0.04
    steps: int = 5
    structure: float = 0.0


def node_accuracy(logits: Tensor, labels: Tensor, nodes: NDArray[np.int64]) -> float:
    """Return the share of ``nodes`` whose largest logit [N, C] is their label [N]."""
    index = torch.from_numpy(nodes)
    return float((logits[index].argmax(1) == labels[index]).double().mean())


def train_nodes(
    model: GraphNet | NodeMLP,
    graph: Graph,
    split: NodeSplit,
    fit: NodeFit,
    seed: int,
    *,
    checkpoint: Path | None = None,
    watch: Callable[[Epoch], None] | None = None,
) -> Tensor:
    """Train on the labels of ``split.train`` alone and return logits [N, C] of all nodes, by the best weights.

    An epoch is one step on all of them. ``checkpoint``, ``watch``: see :meth:`fedkd.distill.loop.Loop.run`.
    """
    labels, train = graph.labels, torch.from_numpy(split.train)
    x, full = graph.rows(), _full(graph, fit)
    few, held = graph.rows(split.train), graph.rows(split.validation)

    def step(batch: Batch) -> dict[str, tuple[Tensor, float]]:
        if isinstance(model, GraphNet):
            drawn = full if fit.fan_out is None else [
                sampled_adjacency(len(graph), graph.arcs, fit.fan_out, batch.rng) for _ in model.layers
            ]  # fmt: skip
            logits = model(x, drawn)[train]
        else:
            logits = model(few)
        return {"labels": (CrossEntropy()(logits, logits, labels[train]), 1.0)}

    def score() -> float:
        if isinstance(model, GraphNet):
            return node_accuracy(model(x, full), labels, split.validation)
        return _right(model(held), graph, split.validation)

    best = Best(score=score, patience=fit.patience, later=True)
    loop = Loop({"model": model}, len(train), step, fit=fit.fit(len(train)), seed=seed, best=best)
    loop.run(checkpoint=checkpoint, watch=watch)
    model.eval()
    with torch.no_grad():
        out: Tensor = model(x, full) if isinstance(model, GraphNet) else model(x)
    return out


def _right(logits: Tensor, graph: Graph, nodes: NDArray[np.int64]) -> float:
    """Return the share of right answers among logits [n, C] of ``nodes`` [n]."""
    return float((logits.argmax(1) == graph.labels[torch.from_numpy(nodes)]).double().mean())


def _full(graph: Graph, fit: NodeFit) -> Tensor:
    return (symmetric_adjacency if fit.fan_out is None else mean_adjacency)(len(graph), graph.arcs)


@torch.no_grad()
def answers(model: GraphNet, graph: Graph, fit: NodeFit) -> tuple[Tensor, Tensor]:
    """Return a teacher's logits [N, C] and last hidden values [N, D] over all neighbours."""
    model.eval()
    found = model.hidden(graph.rows(), _full(graph, fit))
    return found[-1], found[-2]


def distil_nodes(
    student: NodeMLP,
    graph: Graph,
    split: NodeSplit,
    teacher: tuple[Tensor, Tensor],
    terms: GraphTerms,
    fit: NodeFit,
    seed: int,
    *,
    checkpoint: Path | None = None,
    watch: Callable[[Epoch], None] | None = None,
) -> Tensor:
    """Train ``student`` on all nodes of ``graph`` by the teacher's logits and hidden values, return its logits [N, C].

    Labels of ``split.validation`` choose the epoch, as in the published experiments; labels of ``split.test`` are unread.
    Batches are full ones; the nodes left over in an epoch are elsewhere in the next. ``checkpoint``, ``watch``: see
    :meth:`fedkd.distill.loop.Loop.run`.

    Raises:
        ConfigError: no term has a weight.
    """
    if not any((terms.soft, terms.labels, terms.similarity, terms.adversarial, terms.structure)):
        raise ConfigError("a student of a graph needs at least one term with a weight above 0")
    logits, features = teacher
    labels = graph.labels
    known = torch.zeros(len(graph), dtype=torch.bool)
    known[torch.from_numpy(split.train)] = True
    parts: dict[str, nn.Module] = {"student": student}
    if terms.similarity:
        parts["projection"] = _projection(student, features, seed)
    kd, similar = KD(temperature=1), RepresentationSimilarity()
    arcs = graph.arcs
    held = graph.rows(split.validation)

    def step(batch: Batch) -> dict[str, tuple[Tensor, float]]:
        index, at = batch.index, torch.from_numpy(batch.index)
        into, around = arcs[:, :0], index[:0]
        if terms.structure:
            into = arcs[:, np.isin(arcs[1], index)]
            around = np.setdiff1d(into[0], index)
        nodes = np.concatenate([index, around])
        seen = student.hidden(graph.rows(nodes))
        own = seen[-1][: len(index)]
        found = {"soft": (kd(own, logits[at]), terms.soft)}
        if terms.labels:
            few = known[at]
            right = CrossEntropy()(own[few], own[few], labels[at][few]) if bool(few.any()) else own.sum() * 0
            found["labels"] = right, terms.labels
        if terms.similarity:
            found["similarity"] = similar(parts["projection"](seen[-2][: len(index)]), features[at]), terms.similarity
        if terms.structure:
            place = np.zeros(len(graph), np.int64)
            place[nodes] = np.arange(len(nodes))
            told = features[torch.from_numpy(nodes)]
            found["structure"] = local_structure(seen[-2], told, torch.from_numpy(place[into])), terms.structure
        if terms.adversarial:
            moved = _moved(student, graph.dense(index), logits[at], terms)
            found["adversarial"] = kd(student(moved), logits[at]), terms.adversarial
        return found

    def score() -> float:
        return _right(student(held), graph, split.validation)

    best = Best(score=score, patience=fit.patience, later=True)
    loop = Loop(parts, len(graph), step, fit=fit.fit(fit.batch), seed=seed, best=best, whole=True)
    loop.run(checkpoint=checkpoint, watch=watch)
    student.eval()
    with torch.no_grad():
        out: Tensor = student(graph.rows())
    return out


def _projection(student: NodeMLP, features: Tensor, seed: int) -> nn.Module:
    """Student's hidden values to the teacher's width, trained along (NOSMOG, section 4.2)."""
    last = student.layers[-1]
    assert isinstance(last, nn.Linear)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "projection"))
        return nn.Sequential(nn.Linear(last.in_features, features.shape[1]), nn.ReLU())


def _moved(student: NodeMLP, x: Tensor, logits: Tensor, terms: GraphTerms) -> Tensor:
    """Return features moved to where the student differs most, within ``radius`` (PGD, Madry et al. 2018)."""
    kd = KD(temperature=1)
    delta = (torch.rand(x.shape) * 2 - 1) * terms.radius
    for _ in range(terms.steps):
        delta.requires_grad_(True)
        (slope,) = torch.autograd.grad(kd(student(x + delta), logits), delta)
        delta = (delta.detach() + terms.radius / 4 * slope.sign()).clamp(-terms.radius, terms.radius)
    return x + delta
