"""Planetoid's pickles are read as tables; a pickle that would run code is refused, and nothing of it runs."""

from __future__ import annotations

import collections
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from fedkd.errors import DataError
from fedkd.graphs import read_graph


def write(folder: Path, protocol: int) -> tuple[np.ndarray, np.ndarray]:
    """Nine nodes: five described by allx, test nodes 5, 7 and 8 out of order, and node 6 by none."""
    rng = np.random.default_rng(1)
    x = (rng.random((9, 7)) < 0.4).astype(np.float32)
    x[6] = 0
    y = np.arange(9) % 3
    y[6] = 0
    hot = np.eye(3, dtype=np.int32)[y]
    order = [8, 5, 7]
    graph = collections.defaultdict(list, {0: [1, 2], 1: [0], 2: [0, 8], 8: [2, 8], 5: [7]})
    parts = {
        "x": sparse.csr_matrix(x[:2]), "y": hot[:2], "allx": sparse.csr_matrix(x[:5]), "ally": hot[:5],
        "tx": sparse.csr_matrix(x[order]), "ty": np.asfortranarray(hot[order]), "graph": graph,
    }  # fmt: skip
    for name, value in parts.items():
        (folder / f"ind.tiny.{name}").write_bytes(pickle.dumps(value, protocol=protocol))
    (folder / "ind.tiny.test.index").write_text("8\n5\n7\n")
    return x, y


@pytest.mark.parametrize("protocol", [2, 4])
def test_the_files_are_read(tmp_path: Path, protocol: int) -> None:
    x, y = write(tmp_path, protocol)
    graph = read_graph(tmp_path, "tiny")
    assert np.array_equal(graph.x.toarray(), x) and np.array_equal(graph.y, y)
    assert graph.edges.T.tolist() == [[0, 1], [0, 2], [2, 8], [5, 7]]
    assert graph.split is not None
    assert graph.split.train.tolist() == [0, 1] and graph.split.validation.tolist() == [2, 3, 4]
    assert graph.split.test.tolist() == [5, 7, 8]


class Evil:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.system, (f"touch {self.flag}",)


def test_nothing_in_them_runs(tmp_path: Path) -> None:
    write(tmp_path, 2)
    (tmp_path / "ind.tiny.graph").write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol=2))
    with pytest.raises(DataError, match="asks to make"):
        read_graph(tmp_path, "tiny")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "ind.tiny.graph").write_bytes(pickle.dumps({0: [1]}, protocol=2)[:-4])
    with pytest.raises(DataError):
        read_graph(tmp_path, "tiny")
    (tmp_path / "ind.tiny.graph").unlink()
    with pytest.raises(DataError, match="cannot read"):
        read_graph(tmp_path, "tiny")
