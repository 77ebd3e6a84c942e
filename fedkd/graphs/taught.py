"""A graph net is trained, a perceptron learns from it without edges, and another one alone: what `fedkd distill` asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fedkd.data.files import required
from fedkd.distill.loop import Epoch, logged
from fedkd.distill.stages import Stages
from fedkd.errors import ConfigError
from fedkd.graphs.clusters import ClusterFit, centres_of, cluster_scores, distil_clusters, embed
from fedkd.graphs.graph import Graph, per_class_split, read_graph
from fedkd.graphs.links import LinkFit, LinkModel, distil_links, split_links, train_links
from fedkd.graphs.models import GraphNet, NodeMLP
from fedkd.graphs.nodes import GraphTerms, NodeFit, answers, distil_nodes, node_accuracy, train_nodes
from fedkd.graphs.positions import deepwalk
from fedkd.losses.graph import soft_assignment
from fedkd.models import options_of
from fedkd.named import made
from fedkd.seeding import key, numpy_rng

Task = Literal["nodes", "links", "clusters"]
METRICS: Mapping[Task, str] = {"nodes": "accuracy", "links": "hits@20", "clusters": "cluster accuracy"}


@dataclass(frozen=True, kw_only=True)
class GraphWork:
    """What is to be learnt on a graph.

    ``path``: see :func:`fedkd.graphs.read_graph`, ``name``: which graph of a Planetoid folder. ``whole``: keep all parts of
    the graph, and the split that came with it, in place of the largest part under a split that the seed draws.
    ``per_class``, ``validation``: nodes of each class whose labels are known, and that choose the epoch (nodes).
    ``positions``: the student reads a node's place too (DeepWalk; nodes). ``terms``: parameters of ``GraphTerms`` (nodes).
    ``teach``, ``learn``: how teacher and student are trained, parameters of ``NodeFit``, ``LinkFit`` or ``ClusterFit``.
    """

    path: Path
    name: str = "cora"
    task: Task = "nodes"
    whole: bool = False
    per_class: int = 20
    validation: int = 30
    positions: bool = False
    terms: Mapping[str, Any]
    teach: Mapping[str, Any]
    learn: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """The ``student``, its widths and dropout as ``made_of`` says, its ``log``, and ``scores`` and ``sizes`` of all three."""

    student: nn.Module
    made_of: Mapping[str, Any]
    scores: Mapping[str, float | None]
    sizes: Mapping[str, int]
    log: Sequence[Epoch]


Teach = Callable[[Stages], Found]
"""Trains stage by stage, going on from the checkpoints that are there."""


def teaching(work: GraphWork, student: str, teacher: str, seed: int, alone: bool) -> Teach:
    """Return what trains the teacher on the graph, the student by it, and, if ``alone``, the same student on labels.

    Args:
        student: ``mlp(hidden=[128], dropout=0.6)``, for instance.
        teacher: ``sage(hidden=[128])`` or ``gcn(hidden=[64], dropout=0.8)``.
    Raises:
        ConfigError: a model or a parameter is unknown, or does not go with the task.
        DataError: the graph cannot be read, or a class has too few nodes.
    """
    if work.task != "nodes" and (work.positions or work.terms):
        raise ConfigError(f"graph.positions and graph.terms belong to task nodes; {work.task} has its weights in learn")
    kind, above = _model(teacher, ("sage", "gcn"))
    _, below = _model(student, ("mlp",))
    graph = read_graph(required(work.path, "graph", "graph.path"), work.name)
    graph = graph if work.whole else graph.largest_component()
    ready = {"nodes": _nodes, "links": _links, "clusters": _clusters}[work.task]
    return ready(work, graph, kind, above, below, seed, alone)


Options = dict[str, Any]


def _model(name: str, known: tuple[str, ...]) -> tuple[str, Options]:
    base = name.split("(")[0].strip()
    options = {"hidden": [128], "dropout": 0.0} | options_of(name)
    if base not in known or set(options) != {"hidden", "dropout"}:
        raise ConfigError(f"model {name!r}: on a graph expected {' or '.join(known)} with (hidden=[...], dropout=...)")
    return base, options


def _fresh(net: type[GraphNet | NodeMLP], inputs: int, outputs: int, options: Options, seed: int, who: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "graph model", who))
        return net([inputs, *options["hidden"], outputs], options["dropout"])


def _found(
    student: nn.Module, made_of: Options, teacher: nn.Module, scores: Mapping[str, float | None], stages: Stages
) -> Found:
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in (("student", student), ("teacher", teacher))}
    return Found(student, made_of, scores, sizes, logged(stages.place("student")))


def _nodes(work: GraphWork, graph: Graph, kind: str, above: Options, below: Options, seed: int, alone: bool) -> Teach:
    # A graph convolution reads all neighbours, GraphSAGE five that it draws.
    teach = made(NodeFit, "graph.teach", ({"fan_out": None} if kind == "gcn" else {}) | dict(work.teach))
    learn = made(NodeFit, "graph.learn", {"weight_decay": 5e-3, **work.learn})
    terms = made(GraphTerms, "graph.terms", work.terms)
    split = graph.split
    if split is None:
        split = per_class_split(graph.y, work.per_class, work.validation, numpy_rng("graph split", seed))
    d, c = graph.x.shape[1], graph.classes

    def run(stages: Stages) -> Found:
        teacher = _fresh(GraphNet, d, c, above, seed, "teacher")
        train_nodes(teacher, graph, split, teach, seed, **stages.kept("teacher 1", teach.epochs))
        told = answers(teacher, graph, teach)
        seen = graph.with_positions(deepwalk(graph, seed=seed)) if work.positions else graph
        inputs = seen.x.shape[1]
        student = _fresh(NodeMLP, inputs, c, below, seed, "student")
        kept = stages.kept("student", learn.epochs)
        scores: dict[str, float | None] = {"student": None, "teacher": None, "alone": None}
        logits = {"student": distil_nodes(student, seen, split, told, terms, learn, seed, **kept), "teacher": told[0]}
        if alone:
            other = _fresh(NodeMLP, inputs, c, below, seed, "student")
            logits["alone"] = train_nodes(other, seen, split, learn, seed, **stages.kept("alone", learn.epochs))
        scores |= {who: node_accuracy(z, graph.labels, split.test) for who, z in logits.items()}
        return _found(student, {"inputs": inputs, "outputs": c, **below}, teacher, scores, stages)

    return run


def _links(work: GraphWork, graph: Graph, kind: str, above: Options, below: Options, seed: int, alone: bool) -> Teach:
    if kind != "sage":
        raise ConfigError("links are taught by sage(...)")
    teach, learn = made(LinkFit, "graph.teach", work.teach), made(LinkFit, "graph.learn", work.learn)
    split, width, d = split_links(graph, 0.05, 0.15, numpy_rng("links", seed)), below["hidden"][-1], graph.x.shape[1]

    def model(net: type[GraphNet | NodeMLP], options: Options, who: str) -> LinkModel:
        encoder = _fresh(net, d, width, options, seed, who)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, "graph model", who, "score"))
            return LinkModel(encoder, width)

    def run(stages: Stages) -> Found:
        teacher, student = model(GraphNet, above, "teacher"), model(NodeMLP, below, "student")
        best = train_links(teacher, graph, split, teach, seed, **stages.kept("teacher 1", teach.epochs))
        kept = stages.kept("student", learn.epochs)
        found = distil_links(student, teacher, graph, split, learn, seed, **kept)
        scores: dict[str, float | None] = {"student": found["hits"], "teacher": best["hits"], "alone": None}
        if alone:
            other, kept = model(NodeMLP, below, "student"), stages.kept("alone", learn.epochs)
            scores["alone"] = train_links(other, graph, split, learn, seed, **kept)["hits"]
        return _found(student, {"inputs": d, "outputs": width, **below}, teacher, scores, stages)

    return run


def _clusters(
    work: GraphWork, graph: Graph, kind: str, above: Options, below: Options, seed: int, alone: bool
) -> Teach:
    if kind != "gcn":
        raise ConfigError("clusters are found by a graph autoencoder of gcn(...)")
    teach, learn = made(ClusterFit, "graph.teach", work.teach), made(ClusterFit, "graph.learn", work.learn)
    d, clusters, width = graph.x.shape[1], graph.classes, above["hidden"][-1]

    def run(stages: Stages) -> Found:
        # The last hidden width is the embedding's.
        teacher = _fresh(GraphNet, d, width, {**above, "hidden": above["hidden"][:-1]}, seed, "teacher")
        z = embed(teacher, graph, teach, seed, **stages.kept("teacher 1", teach.epochs))
        told = soft_assignment(z, centres_of(z, clusters, seed)).argmax(1).numpy()
        encoder = _fresh(NodeMLP, d, width, below, seed, "student")
        kept = stages.kept("student", learn.epochs)
        student = distil_clusters(encoder, graph, z, clusters, learn, seed, **kept)
        with torch.no_grad():
            named = {"student": student(graph.rows()).argmax(1).numpy(), "teacher": told}
        if alone:
            # Nothing is labelled: what a perceptron could do alone is what k-means finds in the features.
            rows = torch.from_numpy(np.asarray(graph.x.todense(), np.float32))
            named["alone"] = torch.cdist(rows, centres_of(rows, clusters, seed)).argmin(1).numpy()
        scores: dict[str, float | None] = {"student": None, "teacher": None, "alone": None}
        scores |= {who: cluster_scores(found, graph.y)["accuracy"] for who, found in named.items()}
        return _found(student, {"inputs": d, "outputs": width, **below}, teacher, scores, stages)

    return run
