"""Graph nets to perceptrons on Cora: ``python -m simulations.distill.graphs [nodes|links|clusters]``.

nodes: GLNN (S. Zhang et al., ICLR 2022), NOSMOG (Y. Tian et al., ICLR 2023) and LSP (Y. Yang et al., CVPR 2020). Settings
are those published with GLNN: the largest component, 20 labels per class, 30 per class for validation, at most 200 epochs,
patience 50, Adam 0.01; teacher GraphSAGE 2 x 128 without dropout, weight decay 5e-4, five neighbours drawn per layer; student
MLP 2 x 128, dropout 0.6, weight decay 5e-3, batches of 512. ``--all`` adds NOSMOG and LSP.
``--inductive`` holds a fifth of the test nodes out of the graph that teacher and students learn on, and measures on them
alone.

links: LLP (Z. Guo et al., ICML 2023); 5 % of edges for validation, 15 % for test. Its public code has 256
hidden units and up to 20,000 epochs; here 64 and 150.

clusters: a graph autoencoder (32-16) to a perceptron of the same embedding; no published figure for this pair.

Without Cora under FEDKD_DATA, and with ``--small``, a random graph of four communities is used.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import sparse

from fedkd.graphs import (
    ClusterFit,
    Graph,
    GraphNet,
    GraphTerms,
    LinkFit,
    LinkModel,
    NodeFit,
    NodeMLP,
    NodeSplit,
    answers,
    cluster_scores,
    deepwalk,
    distil_clusters,
    distil_links,
    distil_nodes,
    embed,
    node_accuracy,
    per_class_split,
    read_graph,
    split_links,
    train_links,
    train_nodes,
)
from fedkd.graphs.clusters import centres_of
from fedkd.losses.graph import soft_assignment
from fedkd.seeding import key, numpy_rng
from simulations.distill.common import Report, options

PUBLISHED = {
    "teacher, GraphSAGE": "78.78±1.92",
    "MLP on labels": "58.95±1.66",
    "GLNN": "79.39±1.64",
}
INDUCTIVE = {"teacher, GraphSAGE": "81.33", "MLP on labels": "59.09", "GLNN": "73.82"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one of the three."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("task", nargs="?", choices=["nodes", "links", "clusters"], default="nodes")
    parser.add_argument("--inductive", action="store_true")
    parser.add_argument("--all", action="store_true", help="nodes: NOSMOG and LSP beside GLNN; several times as long")
    own, rest = parser.parse_known_args(words)
    {"nodes": nodes, "links": links, "clusters": clusters}[own.task](rest, own)


def cora(small: bool) -> Graph:
    """Return the largest component of Cora, or a small random graph."""
    path = Path(os.environ.get("FEDKD_DATA", "")) / "planetoid" / "cora.npz"
    if small or not path.is_file():
        if not small:
            print("no planetoid/cora.npz under FEDKD_DATA: a random graph is used", file=sys.stderr)
        return communities(240)
    return read_graph(path).largest_component()


def communities(size: int, seed: int = 1) -> Graph:
    """Return a graph of four communities with weak features (a stochastic block model)."""
    rng = np.random.default_rng(seed)
    y = np.sort(np.arange(size) % 4).astype(np.int64)
    chance = np.where(y[:, None] == y[None], 8 / size, 1 / size)
    edges = np.stack(np.nonzero(np.triu(rng.random((size, size)) < chance, 1))).astype(np.int64)
    means = rng.random((4, 40)) * 0.1 + 0.05
    means[np.arange(4), np.arange(4)] = 0.4
    x = sparse.csr_matrix((rng.random((size, 40)) < means[y]).astype(np.float32))
    return Graph(x, y, edges)


def _seeded(seed: int, name: str) -> None:
    torch.manual_seed(key(seed, "graph model", name))


# ---- nodes ----------------------------------------------------------------------------------------------------------
def nodes(argv: Sequence[str], own: argparse.Namespace) -> None:
    """GLNN and its kin."""
    command = "graphs nodes" + (" --inductive" if own.inductive else " --all" if own.all else "")
    words = options(__doc__, command.replace(" --", "_").replace(" ", "_"), 3 if own.all else 10, argv)
    whole = cora(words.small)
    hidden, epochs = (16, 20) if words.small else (128, 200)
    per, held = (5, 5) if words.small else (20, 30)
    teach = NodeFit(epochs=epochs, weight_decay=5e-4)
    learn = NodeFit(epochs=epochs, weight_decay=5e-3)
    students = {
        "GLNN": (GraphTerms(), False),
        "GLNN + LSP": (GraphTerms(structure=100.0), False),
        "NOSMOG without adversarial features": (GraphTerms(similarity=0.1), True),
        "NOSMOG": (GraphTerms(similarity=0.1, adversarial=0.1), True),
    }
    if not own.all or own.inductive:
        students = {"GLNN": students["GLNN"]}
    settings = {
        "graph": f"{len(whole)} nodes, {whole.edges.shape[1]} edges",
        "hidden": hidden,
        "epochs": epochs,
        "students": list(students),
    }
    report = Report(
        command,
        settings,
        words.seeds,
        {"accuracy": "test nodes right %"},
        base="MLP on labels",
        published={} if words.small else INDUCTIVE if own.inductive else PUBLISHED,
    )
    positions = None
    if any(p for _, p in students.values()):
        positions = deepwalk(whole, seed=1) if not words.small else deepwalk(whole, 16, 10, 2)
    for seed in words.seeds:
        split = per_class_split(whole.y, per, held, numpy_rng("graph split", seed))
        graph, inside = whole, split
        if own.inductive:
            graph, inside, unseen = _observed(whole, split, seed)
        c, d = whole.classes, whole.x.shape[1]
        asked = unseen if own.inductive else split.test

        _seeded(seed, "teacher")
        teacher = GraphNet([d, hidden, c])
        train_nodes(teacher, graph, inside, teach, seed)
        report.add("teacher, GraphSAGE", accuracy=node_accuracy(answers(teacher, whole, teach)[0], whole.labels, asked))
        told = answers(teacher, graph, teach)

        _seeded(seed, "student")
        alone = NodeMLP([d, hidden, c], 0.6)
        train_nodes(alone, graph, inside, learn, seed)
        report.add("MLP on labels", accuracy=_accuracy(alone, whole, asked))
        for name, (terms, placed) in students.items():
            seen, full = (graph.with_positions(positions),) * 2 if placed and positions is not None else (graph, whole)
            _seeded(seed, "student")
            student = NodeMLP([seen.x.shape[1], hidden, c], 0.6)
            distil_nodes(student, seen, inside, told, terms, learn, seed)
            report.add(name, accuracy=_accuracy(student, full, asked))
    report.write(words.json)


@torch.no_grad()
def _accuracy(student: NodeMLP, graph: Graph, asked: np.ndarray) -> float:
    return node_accuracy(student(graph.rows()), graph.labels, asked)


def _observed(graph: Graph, split: NodeSplit, seed: int) -> tuple[Graph, NodeSplit, np.ndarray]:
    """Hold a fifth of the test nodes out; return what is seen, its split in its own numbers, and the unseen nodes."""
    order = numpy_rng("unseen", seed).permutation(split.test)
    unseen, rest = np.sort(order[: len(order) // 5]), np.sort(order[len(order) // 5 :])
    kept = np.sort(np.concatenate([split.train, split.validation, rest]))
    inner = NodeSplit(*(np.searchsorted(kept, part) for part in (split.train, split.validation, rest)))
    return graph.induced(kept), inner, unseen


# ---- links ----------------------------------------------------------------------------------------------------------
def links(argv: Sequence[str], own: argparse.Namespace) -> None:
    """LLP."""
    words = options(__doc__, "graphs_links", 5, argv)
    graph = cora(words.small)
    width = 16 if words.small else 64
    fit = LinkFit(epochs=10 if words.small else 150, anchors=100 if words.small else 1000)
    settings = {"graph": f"{len(graph)} nodes, {graph.edges.shape[1]} edges", "hidden": width, "epochs": fit.epochs}
    report = Report(
        "graphs links",
        settings,
        words.seeds,
        {"hits": "hits@20 %", "auc": "AUC %"},
        base="MLP on labels",
    )
    for seed in words.seeds:
        split = split_links(graph, 0.05, 0.15, numpy_rng("links", seed))
        widths = [graph.x.shape[1], width, width]
        _seeded(seed, "teacher")
        teacher = LinkModel(GraphNet(widths, 0.5), width)
        report.add("teacher, GraphSAGE", **train_links(teacher, graph, split, fit, seed))
        _seeded(seed, "student")
        report.add("MLP on labels", **train_links(LinkModel(NodeMLP(widths, 0.5), width), graph, split, fit, seed))
        for name, weights in {"LLP": (1.0, 1.0), "distribution alone": (1.0, 0.0), "ranking alone": (0.0, 1.0)}.items():
            _seeded(seed, "student")
            student = LinkModel(NodeMLP(widths, 0.5), width)
            how = LinkFit(**{**vars(fit), "distribution": weights[0], "ranking": weights[1]})
            report.add(name, **distil_links(student, teacher, graph, split, how, seed))
    report.write(words.json)


# ---- clusters -------------------------------------------------------------------------------------------------------
def clusters(argv: Sequence[str], own: argparse.Namespace) -> None:
    """A graph autoencoder's clusters, learnt without edges."""
    words = options(__doc__, "graphs_clusters", 5, argv)
    graph = cora(words.small)
    fit = ClusterFit(epochs=15 if words.small else 150)
    settings = {
        "graph": f"{len(graph)} nodes, {graph.edges.shape[1]} edges",
        "embedding": "32-16",
        "epochs": fit.epochs,
    }
    report = Report(
        "graphs clusters",
        settings,
        words.seeds,
        {"accuracy": "accuracy %", "nmi": "NMI %", "ari": "ARI %"},
        base="k-means on features",
    )
    from sklearn.cluster import KMeans

    for seed in words.seeds:
        d, k = graph.x.shape[1], graph.classes
        plain = KMeans(k, n_init=3, random_state=seed).fit_predict(graph.x.toarray())
        report.add("k-means on features", **cluster_scores(plain.astype(np.int64), graph.y))
        _seeded(seed, "teacher")
        z = embed(GraphNet([d, 32, 16]), graph, fit, seed)
        told = soft_assignment(z, centres_of(z, k, seed)).argmax(1).numpy()
        report.add("teacher, graph autoencoder", **cluster_scores(told, graph.y))
        for name, weights in {"embedding and target": (1.0, 1.0), "embedding alone": (1.0, 0.0)}.items():
            _seeded(seed, "student")
            how = ClusterFit(**{**vars(fit), "embedding": weights[0], "target": weights[1]})
            student = distil_clusters(NodeMLP([d, 128, 16], 0.3), graph, z, k, how, seed)
            with torch.no_grad():
                found = student(graph.rows()).argmax(1).numpy()
            report.add(f"perceptron, {name}", **cluster_scores(found, graph.y))
    report.write(words.json)


if __name__ == "__main__":
    main()
