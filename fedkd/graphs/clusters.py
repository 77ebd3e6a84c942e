"""Clustering: a graph autoencoder finds an embedding and clusters, and a perceptron learns both without edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.distill.loop import Batch, Epoch, Fit, Loop
from fedkd.graphs.graph import Graph
from fedkd.graphs.models import GraphNet, NodeMLP, symmetric_adjacency
from fedkd.losses.graph import soft_assignment, target_distribution


@dataclass(frozen=True, kw_only=True)
class ClusterFit:
    """``embedding``: weight of the squared difference of embeddings; ``target``: of KL(P || Q) of cluster chances."""

    epochs: int = 150
    lr: float = 0.01
    weight_decay: float = 5e-4
    batch: int = 512
    embedding: float = 1.0
    target: float = 1.0


class ClusterNet(nn.Module):
    """A perceptron with an embedding [B, D] and K centres in it; gives cluster chances [B, K]."""

    def __init__(self, encoder: NodeMLP, centres: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.centres = nn.Parameter(centres.clone())

    def forward(self, x: Tensor) -> Tensor:
        return soft_assignment(self.encoder(x), self.centres)


def embed(
    model: GraphNet,
    graph: Graph,
    fit: ClusterFit,
    seed: int,
    *,
    checkpoint: Path | None = None,
    watch: Callable[[Epoch], None] | None = None,
) -> Tensor:
    """Train a graph autoencoder and return its embedding [N, D].

    T. Kipf, M. Welling, "Variational Graph Auto-Encoders", 2016, https://arxiv.org/abs/1611.07308, section 2, the
    non-variational GAE: sigmoid(z_i . z_j) is to say whether i and j are linked. Deviation: as many pairs without an edge
    are drawn in every epoch as there are edges, in place of all N^2 pairs with weights.
    """
    x, adjacency = graph.rows(), symmetric_adjacency(len(graph), graph.arcs)
    links = torch.from_numpy(graph.edges)

    def step(batch: Batch) -> dict[str, tuple[Tensor, float]]:
        z = model(x, adjacency)
        none = torch.from_numpy(batch.rng.integers(len(graph), size=graph.edges.shape))
        there = -F.logsigmoid((z[links[0]] * z[links[1]]).sum(1)).mean()
        return {"links": (there, 1.0), "no links": (-F.logsigmoid(-(z[none[0]] * z[none[1]]).sum(1)).mean(), 1.0)}

    # A graph net reads all nodes at once: one batch is the whole graph.
    how = Fit(epochs=fit.epochs, batch_size=len(graph), optimizer="adam", lr=fit.lr, weight_decay=0.0)
    Loop({"autoencoder": model}, len(graph), step, fit=how, seed=seed).run(checkpoint=checkpoint, watch=watch)
    model.eval()
    with torch.no_grad():
        out: Tensor = model(x, adjacency)
    return out


def centres_of(embedding: Tensor, clusters: int, seed: int) -> Tensor:
    """Return the centres [K, D] of k-means."""
    from sklearn.cluster import KMeans

    found = KMeans(clusters, n_init=10, random_state=seed).fit(embedding.double().numpy())
    return torch.from_numpy(found.cluster_centers_).to(embedding.dtype)


def distil_clusters(
    encoder: NodeMLP,
    graph: Graph,
    embedding: Tensor,
    clusters: int,
    fit: ClusterFit,
    seed: int,
    *,
    checkpoint: Path | None = None,
    watch: Callable[[Epoch], None] | None = None,
) -> ClusterNet:
    """Train a perceptron on the teacher's embedding [N, D] and on the target distribution of its clusters.

    The target P is the teacher's soft assignment, sharpened (Xie et al. 2016, eq. (3)); the student's own assignment Q
    follows it by KL(P || Q). No label is read.
    """
    centres = centres_of(embedding, clusters, seed)
    target = target_distribution(soft_assignment(embedding, centres))
    student = ClusterNet(encoder, centres)

    def step(batch: Batch) -> dict[str, tuple[Tensor, float]]:
        at = torch.from_numpy(batch.index)
        z = student.encoder(graph.rows(batch.index))
        q, p = soft_assignment(z, student.centres), target[at]
        return {
            "target": ((p * (p.log() - q.log())).sum(1).mean(), fit.target),
            "embedding": ((z - embedding[at]).square().mean(), fit.embedding),
        }

    how = Fit(epochs=fit.epochs, batch_size=fit.batch, optimizer="adam", lr=fit.lr, weight_decay=fit.weight_decay)
    Loop({"student": student}, len(graph), step, fit=how, seed=seed).run(checkpoint=checkpoint, watch=watch)
    return student.eval()


def cluster_scores(found: NDArray[np.int64], truth: NDArray[np.int64]) -> dict[str, float]:
    """Return ``accuracy`` under the best matching of clusters to classes, ``nmi`` and ``ari``."""
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, confusion_matrix, normalized_mutual_info_score

    counts = confusion_matrix(truth, found)
    rows, columns = linear_sum_assignment(-counts)
    return {
        "accuracy": float(counts[rows, columns].sum() / len(truth)),
        "nmi": float(normalized_mutual_info_score(truth, found)),
        "ari": float(adjusted_rand_score(truth, found)),
    }
