"""Graphs: files are read, matrices and losses are what the formulas say, and a perceptron learns what edges tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from fedkd.errors import ConfigError, DataError
from fedkd.graphs import (
    ClusterFit,
    Graph,
    GraphNet,
    GraphTerms,
    LinkFit,
    LinkModel,
    NodeFit,
    NodeMLP,
    answers,
    cluster_scores,
    deepwalk,
    distil_clusters,
    distil_links,
    distil_nodes,
    embed,
    hits_at,
    mean_adjacency,
    node_accuracy,
    per_class_split,
    read_graph,
    sampled_adjacency,
    split_links,
    symmetric_adjacency,
    train_links,
    train_nodes,
)
from fedkd.graphs.graph import unique_edges
from fedkd.graphs.positions import walks


def blocks(size: int = 160, noise: float = 1.0, seed: int = 1) -> Graph:
    """Four communities; features tell a node's community poorly, edges tell it well."""
    rng = np.random.default_rng(seed)
    y = (np.arange(size) % 4).astype(np.int64)
    chance = np.where(y[:, None] == y[None], 12 / size, 0.5 * noise / size)
    edges = np.stack(np.nonzero(np.triu(rng.random((size, size)) < chance, 1))).astype(np.int64)
    means = np.full((4, 24), 0.1)
    for c in range(4):
        means[c, 3 * c : 3 * c + 3] = 0.4
    x = sparse.csr_matrix((rng.random((size, 24)) < means[y]).astype(np.float32))
    return Graph(x, y, edges)


# ---- files ----------------------------------------------------------------------------------------------------------
def test_both_npz_forms_are_read(tmp_path: Path) -> None:
    graph = blocks(40)
    flat = {"indptr": graph.x.indptr, "indices": graph.x.indices, "data": graph.x.data, "shape": graph.x.shape}
    np.savez(
        tmp_path / "a.npz", **flat, labels=graph.y, edges=graph.edges[::-1], train_idx=[1], val_idx=[2], test_idx=[3]
    )
    arcs = graph.arcs
    adjacency = sparse.csr_matrix((np.ones(arcs.shape[1]), (arcs[0], arcs[1])), shape=(40, 40))
    parts = {f"adj_{k}": getattr(adjacency, k) for k in ("data", "indices", "indptr", "shape")}
    parts |= {f"attr_{k}": v for k, v in flat.items()}
    np.savez(tmp_path / "b.npz", **parts, labels=graph.y)
    for name in ("a", "b"):
        read = read_graph(tmp_path / f"{name}.npz")
        assert np.array_equal(read.edges, unique_edges(graph.edges)) and np.array_equal(read.y, graph.y)
        assert (read.x != graph.x).nnz == 0
    assert read_graph(tmp_path / "a.npz").split is not None
    np.savez(tmp_path / "c.npz", **flat, labels=graph.y)
    with pytest.raises(DataError, match="lacks a part"):
        read_graph(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", labels=np.array([{}], dtype=object))
    with pytest.raises(DataError):
        read_graph(tmp_path / "d.npz")


def test_a_graph_that_cannot_be_is_refused(tmp_path: Path) -> None:
    graph = blocks(40)
    rows = np.ascontiguousarray(graph.edges.T)
    with pytest.raises(DataError, match=r"expected \[2, E\]"):
        graph.with_edges(rows)
    flat = {"indptr": graph.x.indptr, "indices": graph.x.indices, "data": graph.x.data, "shape": graph.x.shape}
    np.savez(tmp_path / "rows.npz", **flat, labels=graph.y, edges=rows)
    with pytest.raises(DataError, match=r"expected \[2, E\]"):
        read_graph(tmp_path / "rows.npz")
    with pytest.raises(DataError, match="label -1"):
        Graph(graph.x, np.where(np.arange(40) == 3, -1, graph.y), graph.edges)
    broken = graph.x.copy()
    broken.data[0] = np.nan
    with pytest.raises(DataError, match="not finite"):
        Graph(broken, graph.y, graph.edges)
    np.savez(
        tmp_path / "split.npz", **flat, labels=graph.y, edges=graph.edges, train_idx=[1], val_idx=[40], test_idx=[2]
    )
    with pytest.raises(DataError, match="validation part of the split"):
        read_graph(tmp_path / "split.npz")
    full = graph.with_edges(np.stack(np.triu_indices(40, 1)))
    with pytest.raises(DataError, match="nearly complete"):
        split_links(full, 0.05, 0.2, np.random.default_rng(1))
    with pytest.raises(DataError, match="too few for validation"):
        split_links(graph.with_edges(graph.edges[:, :9]), 0.05, 0.2, np.random.default_rng(1))


def test_the_largest_component_is_kept() -> None:
    graph = Graph(sparse.eye(6, format="csr", dtype=np.float32), np.arange(6), np.array([[0, 1, 4], [1, 5, 2]]))
    kept = graph.largest_component()
    assert kept.y.tolist() == [0, 1, 5] and kept.edges.tolist() == [[0, 1], [1, 2]]
    with pytest.raises(DataError, match="leads to node"):
        graph.with_edges(np.array([[0], [6]]))


# ---- matrices -------------------------------------------------------------------------------------------------------
def test_adjacencies_follow_their_formulas() -> None:
    graph = blocks(30)
    dense = np.zeros((30, 30))
    dense[graph.arcs[1], graph.arcs[0]] = 1
    loops = dense + np.eye(30)
    degree = loops.sum(1)
    mean = mean_adjacency(30, graph.arcs).to_dense().numpy()
    assert np.allclose(mean, loops / degree[:, None], atol=1e-6)
    symmetric = symmetric_adjacency(30, graph.arcs).to_dense().numpy()
    assert np.allclose(symmetric, loops / np.sqrt(degree[:, None] * degree[None]), atol=1e-6)
    few = sampled_adjacency(30, graph.arcs, 2, np.random.default_rng(1)).to_dense().numpy()
    assert ((few > 0) <= (loops > 0)).all() and (few > 0).sum(1).max() == 3
    assert np.allclose(few.sum(1), 1, atol=1e-6)


def test_walks_follow_edges_and_positions_tell_communities() -> None:
    graph = blocks(120, noise=0.3)
    paths = walks(graph, 6, 2, np.random.default_rng(1))
    dense = np.eye(120, dtype=bool)
    dense[graph.arcs[0], graph.arcs[1]] = True
    assert dense[paths[:, :-1], paths[:, 1:]].all() and np.bincount(paths[:, 0]).tolist() == [2] * 120
    z = deepwalk(graph, 8, length=20, per_node=6, rate=0.1)
    unit = torch.nn.functional.normalize(z, dim=1)
    near = unit @ unit.T
    same = torch.from_numpy(graph.y[:, None] == graph.y[None])
    assert float(near[same].mean()) > float(near[~same].mean()) + 0.2


# ---- nodes ----------------------------------------------------------------------------------------------------------
def test_sparse_and_dense_features_give_the_same(tmp_path: Path) -> None:
    graph, net = blocks(30), NodeMLP([24, 8, 4])
    assert torch.allclose(net(graph.rows()), net(graph.dense()), atol=1e-6)


def test_a_perceptron_learns_what_edges_tell() -> None:
    graph = blocks(240)
    split = per_class_split(graph.y, 8, 10, np.random.default_rng(1))
    fit = NodeFit(epochs=40, patience=30, batch=60, weight_decay=1e-3)
    torch.manual_seed(1)
    teacher, alone = GraphNet([24, 16, 4]), NodeMLP([24, 16, 4])
    train_nodes(teacher, graph, split, fit, 1)
    train_nodes(alone, graph, split, fit, 1)
    told = answers(teacher, graph, fit)
    scores = {"teacher": node_accuracy(told[0], graph.labels, split.test)}
    torch.manual_seed(1)
    student = NodeMLP([24, 16, 4])
    logits = distil_nodes(student, graph, split, told, GraphTerms(structure=1.0, labels=0.1), fit, 1)
    scores["student"] = node_accuracy(logits, graph.labels, split.test)
    scores["alone"] = node_accuracy(alone(graph.rows()), graph.labels, split.test)
    assert scores["teacher"] > scores["student"] > scores["alone"] + 0.02, scores
    placed = graph.with_positions(torch.randn(len(graph), 3))
    one = NodeFit(epochs=1, batch=120)
    terms = GraphTerms(similarity=0.1, adversarial=0.1, steps=2)
    assert distil_nodes(NodeMLP([27, 16, 4]), placed, split, told, terms, one, 1).shape == (240, 4)
    with pytest.raises(ConfigError, match="at least one term"):
        distil_nodes(student, graph, split, told, GraphTerms(soft=0), one, 1)


# ---- links and clusters ---------------------------------------------------------------------------------------------
def test_links_are_scored_and_taught() -> None:
    assert hits_at(2, torch.tensor([5.0, 1.0, 3.0]), torch.tensor([2.0, 4.0, 0.0])) == pytest.approx(2 / 3)
    graph = blocks(160, noise=0.2)
    split = split_links(graph, 0.05, 0.2, np.random.default_rng(1))
    known = set(map(tuple, graph.edges.T.tolist()))
    assert not known & set(map(tuple, split.test_none.T.tolist()))
    assert sum(p.shape[1] for p in (split.train, split.validation, split.test)) == graph.edges.shape[1]
    fit = LinkFit(epochs=20, anchors=40, k=5, lr=0.02)
    torch.manual_seed(1)
    teacher = LinkModel(GraphNet([24, 16, 16]), 16)
    assert train_links(teacher, graph, split, fit, 1)["auc"] > 0.7
    student = LinkModel(NodeMLP([24, 16, 16]), 16)
    found = distil_links(student, teacher, graph, split, LinkFit(**{**vars(fit), "labels": 0.0}), 1)
    assert found["auc"] > 0.6, "the teacher's scores alone teach"


def test_clusters_are_learnt_without_edges() -> None:
    assert cluster_scores(np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1])) == {"accuracy": 1.0, "nmi": 1.0, "ari": 1.0}
    graph = blocks(160, noise=0.2)
    torch.manual_seed(1)
    fit = ClusterFit(epochs=60, batch=80)
    z = embed(GraphNet([24, 16, 8]), graph, fit, 1)
    student = distil_clusters(NodeMLP([24, 32, 8]), graph, z, 4, fit, 1)
    with torch.no_grad():
        found = student(graph.rows()).argmax(1).numpy()
    assert cluster_scores(found, graph.y)["accuracy"] > 0.6
