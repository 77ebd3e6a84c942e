"""A teacher's answers to fixed data, kept on disk as memory-mapped arrays, so that each record is asked once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkd.storage import write_json

Ask = Callable[[NDArray[np.int64]], dict[str, Tensor]]
"""Positions [n] of records -> the teacher's tensors [n, ...] by name."""

Map = np.memmap[Any, np.dtype[Any]]


class AnswerCache:
    """Rows of several arrays, filled as they are asked for; survives the process.

    Args:
        folder: made if need be; holds one ``.npy`` per tensor, ``have.npy`` that tells which rows are filled, and
            ``cache.json`` with the identity.
        identity: what the answers belong to (teacher, data, layers); a folder of another identity is refused by
            starting anew below a name of its own.
        records: number of records N.
        ask: gives the rows that are missing.
    """

    def __init__(self, folder: Path, identity: str, records: int, ask: Ask) -> None:
        self.folder = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self._identity, self._records, self._ask = identity, records, ask
        self._arrays: dict[str, Map] = {}
        self._have: Map | None = None
        self._reopen()

    def __getitem__(self, index: NDArray[np.int64]) -> dict[str, Tensor]:
        """Return the rows ``index`` [n] of every tensor, asking the teacher for those that it was never asked."""
        missing = np.unique(index if self._have is None else index[~self._have[index]])
        if len(missing):
            self._fill(missing)
        return {name: torch.from_numpy(np.array(array[index])) for name, array in self._arrays.items()}

    @property
    def filled(self) -> int:
        """Number of records that were answered."""
        return 0 if self._have is None else int(self._have.sum())

    def _fill(self, rows: NDArray[np.int64]) -> None:
        found = {name: t.detach().cpu().numpy() for name, t in self._ask(rows).items()}
        if self._have is None:
            self._create(found)
        assert self._have is not None
        for name, values in found.items():
            self._arrays[name][rows] = values
            self._arrays[name].flush()
        # Marked last: a row that is marked is a row that is there.
        self._have[rows] = True
        self._have.flush()

    def _create(self, found: dict[str, NDArray[np.generic]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        names = sorted(found)
        for i, name in enumerate(names):
            shape = (self._records, *found[name].shape[1:])
            self._arrays[name] = np.lib.format.open_memmap(
                self.folder / f"{i}.npy", mode="w+", dtype=found[name].dtype, shape=shape
            )
        self._have = np.lib.format.open_memmap(
            self.folder / "have.npy", mode="w+", dtype=np.bool_, shape=(self._records,)
        )
        write_json(self.folder / "cache.json", {"identity": self._identity, "records": self._records, "names": names})

    def _reopen(self) -> None:
        note = self.folder / "cache.json"
        if not note.is_file():
            return
        said = json.loads(note.read_text())
        if said.get("identity") != self._identity or said.get("records") != self._records:
            return
        try:
            arrays = {name: _open(self.folder / f"{i}.npy", self._records) for i, name in enumerate(said["names"])}
            have = _open(self.folder / "have.npy", self._records)
        except (OSError, ValueError):
            return
        self._arrays, self._have = arrays, have


def _open(path: Path, records: int) -> Map:
    array: Map = np.load(path, mmap_mode="r+", allow_pickle=False)
    if len(array) != records:
        raise ValueError(f"{path} has {len(array)} rows")
    return array


def data_identity(arrays: Sequence[NDArray[np.generic]]) -> str:
    """Return a hash of the content of ``arrays``."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    return digest.hexdigest()
