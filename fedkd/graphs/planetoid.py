"""Planetoid's raw files, read without running what is in them.

Z. Yang, W. Cohen, R. Salakhutdinov, "Revisiting Semi-Supervised Learning with Graph Embeddings", ICML 2016, gave out Cora,
Citeseer and Pubmed as pickles, and a pickle may run a stranger's code. Here its instructions are only listed, by
``pickletools.genops``, and a small machine carries out those few that build arrays, sparse matrices, dictionaries and
lists. Whatever else a file asks for is refused.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from fedkd.errors import DataError
from fedkd.graphs.graph import Graph, NodeSplit, unique_edges

VALIDATION = 500
"""Nodes after the labelled ones that choose the epoch, in the public split."""

MATRICES = ("scipy.sparse.csr csr_matrix", "scipy.sparse._csr csr_matrix")
ARRAYS = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")


@dataclass
class _Name:
    """Something that a file names, such as a class; it is never looked up."""

    text: str


@dataclass
class _Thing:
    """An object being built: ``kind`` and the state that it was given."""

    kind: str
    given: Any = None
    state: Any = None


@dataclass
class _Machine:
    where: str
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, data: bytes) -> Any:
        try:
            for code, argument, _ in pickletools.genops(data):
                self._step(code.name, argument)
                if code.name == "STOP":
                    return _finished(self.stack.pop(), self.where)
        except (IndexError, KeyError, ValueError, TypeError, AttributeError) as cause:
            raise DataError(f"{self.where} is damaged: {cause}") from cause
        raise DataError(f"{self.where} ends too early")

    def _since_mark(self) -> list[Any]:
        place = self.marks.pop()
        found = self.stack[place:]
        del self.stack[place:]
        return found

    def _step(self, name: str, argument: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        if name in ("PROTO", "FRAME", "STOP"):
            return
        if name in ("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "BINFLOAT", "SHORT_BINSTRING", "BINSTRING",
                    "BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "STRING", "BINBYTES", "SHORT_BINBYTES"):  # fmt: skip
            push(argument)
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE"):
            push({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}[name]())
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name in ("TUPLE", "LIST", "DICT"):
            found = self._since_mark()
            push(tuple(found) if name == "TUPLE" else found if name == "LIST" else dict(_pairs(found)))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            found = self.stack[-count:]
            del self.stack[-count:]
            push(tuple(found))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            push(self.memo[int(argument)])
        elif name == "APPEND":
            item = pop()
            self.stack[-1].append(item)
        elif name == "APPENDS":
            found = self._since_mark()
            self.stack[-1].extend(found)
        elif name == "SETITEM":
            value, key = pop(), pop()
            self.stack[-1][key] = value
        elif name == "SETITEMS":
            found = self._since_mark()
            self.stack[-1].update(_pairs(found))
        elif name == "GLOBAL":
            push(_Name(argument))
        elif name == "STACK_GLOBAL":
            second, first = pop(), pop()
            push(_Name(f"{first} {second}"))
        elif name in ("REDUCE", "NEWOBJ"):
            given, what = pop(), pop()
            push(self._made(what, given))
        elif name == "BUILD":
            state = pop()
            self.stack[-1].state = state
        else:
            raise DataError(f"{self.where} asks for {name}, which no table of numbers needs: it is refused")

    def _made(self, what: Any, given: tuple[Any, ...]) -> Any:
        kind = what.text if isinstance(what, _Name) else "nothing that has a name"
        if kind in ARRAYS:
            return _Thing("array")
        if kind == "numpy dtype":
            return _Thing("dtype", given)
        if kind == "_codecs encode":
            return str(given[0]).encode("latin-1")
        if kind in ("collections defaultdict", "__builtin__ list", "builtins list"):
            return {} if kind.endswith("defaultdict") else []
        if kind == "copy_reg _reconstructor" or kind == "copyreg _reconstructor":
            kind = given[0].text if isinstance(given[0], _Name) else kind
        if kind in MATRICES:
            return _Thing("matrix")
        raise DataError(f"{self.where} asks to make {kind!r}, which no table of numbers needs: it is refused")


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))


def _finished(value: Any, where: str) -> Any:
    """Return arrays and matrices for what was collected of them."""
    if not isinstance(value, _Thing):
        return value
    if value.kind == "array":
        _, shape, dtype, by_columns, raw = value.state
        kind = np.dtype(str(dtype.given[0]))
        if kind.hasobject:
            raise DataError(f"{where} holds an array of objects: it is refused")
        order = dtype.state[1] if dtype.state else "="
        content = raw.encode("latin-1") if isinstance(raw, str) else raw
        found = np.frombuffer(content, kind.newbyteorder(">" if order == ">" else "<" if order == "<" else "="))
        return found.reshape(shape, order="F" if by_columns else "C")
    state = {str(k): v for k, v in value.state.items()}
    parts = [_finished(state[k], where) for k in ("data", "indices", "indptr")]
    shape = state.get("_shape", state.get("shape"))
    return sparse.csr_matrix((parts[0].astype(np.float32), parts[1], parts[2]), shape=shape)


def read_planetoid(folder: Path, name: str) -> Graph:
    """Read ``ind.NAME.x tx allx y ty ally graph test.index`` with the public split.

    Test nodes that no file describes (Citeseer has some without edges) get features of 0 and class 0, and are in no split.

    Raises:
        DataError: a file is missing, damaged, or asks for more than tables of numbers.
    """
    held: dict[str, Any] = {}
    for part in ("y", "tx", "allx", "ty", "ally", "graph"):
        path = folder / f"ind.{name}.{part}"
        held[part] = _Machine(str(path)).run(_bytes(path))
    text = _bytes(folder / f"ind.{name}.test.index").decode("ascii", errors="replace")
    try:
        asked = np.array([int(word) for word in text.split()], np.int64)
        first, count = int(asked.min()), int(asked.max()) + 1
        x = sparse.lil_matrix((count, held["allx"].shape[1]), dtype=np.float32)
        x[:first], x[asked] = held["allx"], held["tx"]
        y = np.zeros(count, np.int64)
        y[:first], y[asked] = held["ally"].argmax(1), held["ty"].argmax(1)
        pairs = [(int(a), int(b)) for a, near in held["graph"].items() for b in near]
    except (ValueError, AttributeError, TypeError) as cause:
        raise DataError(f"the parts of graph {name!r} in {folder} do not fit: {cause}") from cause
    labelled = len(held["y"])
    split = NodeSplit(np.arange(labelled), np.arange(labelled, min(labelled + VALIDATION, first)), np.sort(asked))
    return Graph(x.tocsr(), y, unique_edges(np.array(pairs, np.int64).reshape(-1, 2).T), split)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as cause:
        raise DataError(f"cannot read {path}: {cause.strerror or cause}") from cause
