"""Graphs: a network that sees edges teaches a perceptron that does not. Nodes, links and clusters; sparse torch only.

Sparse torch was enough: two layers of propagation are two sparse products, so that no further package carries its weight.
"""

from fedkd.graphs.clusters import ClusterFit, ClusterNet, cluster_scores, distil_clusters, embed
from fedkd.graphs.graph import Graph, NodeSplit, per_class_split, read_graph
from fedkd.graphs.links import LinkFit, LinkModel, LinkSplit, distil_links, hits_at, split_links, train_links
from fedkd.graphs.models import GraphNet, NodeMLP, mean_adjacency, sampled_adjacency, symmetric_adjacency
from fedkd.graphs.nodes import GraphTerms, NodeFit, answers, distil_nodes, node_accuracy, train_nodes
from fedkd.graphs.positions import deepwalk

__all__ = [
    "ClusterFit",
    "ClusterNet",
    "Graph",
    "GraphNet",
    "GraphTerms",
    "LinkFit",
    "LinkModel",
    "LinkSplit",
    "NodeFit",
    "NodeMLP",
    "NodeSplit",
    "answers",
    "cluster_scores",
    "deepwalk",
    "distil_clusters",
    "distil_links",
    "distil_nodes",
    "embed",
    "hits_at",
    "mean_adjacency",
    "node_accuracy",
    "per_class_split",
    "read_graph",
    "sampled_adjacency",
    "split_links",
    "symmetric_adjacency",
    "train_links",
    "train_nodes",
]
