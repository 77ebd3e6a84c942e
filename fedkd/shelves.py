"""A store for very many devices: in memory up to a budget, beyond it in memory-mapped files, with cheap snapshots.

Devices whose states are laid out alike share a file, a shelf, and each has a slot in it. What a snapshot refers to is
never overwritten while the snapshot is kept: a device that changes afterwards gets another slot. So a snapshot needs to
write what has changed since the last one, and a table of who lies where; going back to one costs nothing but a check
that every slot still holds what it held. A device that was never asked has no slot and no entry.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedkd.rows import Form, RowFile
from fedkd.storage import StorageError, pack_tensors, sync_folder, unpack_tensors
from fedkd.store import Kept, Store, flatten, read_metadata, unflatten

TABLE = "devices.safetensors"
BATCH_BYTES = 32 * 2**20
"""States that are put together before they are written."""

_Item = tuple[int, Mapping[str, Tensor], Mapping[str, Any]]
"""A device, its tensors and the rest of its state (see :func:`fedkd.store.flatten`)."""


class Place(NamedTuple):
    """Where a device lies: the shelf's name, the slot, the checksum of the slot, and the round of its last answer."""

    shelf: str
    slot: int
    checksum: int
    sent_round: int


@dataclass
class _Shelf:
    form: Form
    rows: RowFile
    slots: int = 0
    free: list[int] = field(default_factory=list)
    written: bool = False

    def take(self) -> int:
        """Return a slot that nobody needs."""
        if self.free:
            return self.free.pop()
        self.slots += 1
        return self.slots - 1


class ShelfStore(Store):
    """See the module text.

    Guarantee: after :meth:`snapshot` has returned and its table is on disk, :meth:`restore` brings back every device as
    it was then, whatever happened since: a kill in the middle of a round, a power cut, a full disk.
    """

    def __init__(self, folder: Path, budget_bytes: float, snapshots: int = 2) -> None:
        """Start without devices.

        Args:
            folder: for the files; made when the first one is needed. What an older run left there is overwritten.
            budget_bytes: memory for devices' states. Results do not depend on it.
            snapshots: how many of the last ones are kept.
        """
        super().__init__()
        self.folder, self._budget = folder, budget_bytes
        self._held: dict[int, tuple[Kept, int]] = {}
        self._held_bytes = 0
        self._dirty: set[int] = set()
        self._places: dict[int, Place] = {}
        self._fresh: set[int] = set()
        self._shelves: dict[str, _Shelf] = {}
        self._names: dict[Hashable, str] = {}
        self._kept: deque[dict[int, Place]] = deque(maxlen=max(1, snapshots))

    # ---- devices ----------------------------------------------------------------------------------------------------
    def load(self, client: int, round: int) -> Kept:
        if client in self._held:
            return self._held[client][0]
        if client not in self._places:
            return Kept()
        place = self._places[client]
        shelf = self._shelves[place.shelf]
        tensors = shelf.form.unpack(shelf.rows.read(place.slot))
        return unflatten(tensors, {**shelf.form.rest, "sent_round": place.sent_round})

    def save(self, client: int, round: int, kept: Kept) -> None:
        tensors, kind = flatten(kept)
        size = sum(t.nbytes for t in tensors.values())
        if client in self._held:
            self._held_bytes -= self._held.pop(client)[1]
        if self._held_bytes + size <= self._budget:
            self._held[client] = (kept, size)
            self._held_bytes += size
            self._dirty.add(client)
        else:
            self._dirty.discard(client)
            self._write([(client, tensors, kind)])

    @property
    def file_bytes(self) -> int:
        """Bytes of all shelves, slots that are free for use again included."""
        return sum(s.slots * s.rows.row_bytes for s in self._shelves.values())

    def close(self) -> None:
        """Let go of all files."""
        for shelf in self._shelves.values():
            shelf.rows.close()

    # ---- snapshots --------------------------------------------------------------------------------------------------
    def snapshot(self) -> Mapping[str, bytes]:
        batch: list[_Item] = []
        size = 0
        for client in sorted(self._dirty):
            batch.append((client, *flatten(self._held[client][0])))
            size += self._held[client][1]
            if size > BATCH_BYTES:
                self._write(batch)
                batch, size = [], 0
        self._write(batch)
        self._dirty.clear()
        written = [shelf for shelf in self._shelves.values() if shelf.written]
        for shelf in written:
            shelf.rows.sync()
            shelf.written = False
        if written:
            sync_folder(self.folder)
        self._fresh.clear()
        self._kept.append(dict(self._places))
        self._find_free()
        return {TABLE: self._table()}

    def restore(self, files: Mapping[str, bytes], round: int) -> None:
        """Bring back the devices of a snapshot.

        Raises:
            StorageError: the table cannot be read, or a slot does not hold what it held.
        """
        places = self._read_table(files[TABLE])
        for client, place in places.items():
            row = self._shelves[place.shelf].rows.read(place.slot)
            if zlib.crc32(row.numpy().data) != place.checksum:
                raise StorageError(
                    f"{self.folder}: what device {client} kept was damaged (its checksum does not match)"
                )
        self._held.clear()
        self._dirty.clear()
        self._fresh.clear()
        self._held_bytes, self._places = 0, dict(places)
        self._kept.clear()
        self._kept.append(places)
        self._find_free()

    def retain(self, files: Mapping[str, bytes]) -> None:
        places = self._read_table(files[TABLE])
        if len(self._kept) < (self._kept.maxlen or 1):
            self._kept.appendleft(places)
            self._find_free()

    # ---- slots ------------------------------------------------------------------------------------------------------
    def _write(self, items: Sequence[_Item]) -> None:
        """Put devices into slots, those of one shelf together."""
        groups: dict[str, list[_Item]] = {}
        for client, tensors, kind in items:
            rest = {name: value for name, value in kind.items() if name != "sent_round"}
            groups.setdefault(self._name(tensors, rest), []).append((client, tensors, kind))
        for name, members in groups.items():
            shelf = self._shelves[name]
            # By slot, so that neighbours are written in one go.
            placed = sorted((self._slot(client, name), i) for i, (client, _, _) in enumerate(members))
            rows = shelf.form.pack([members[i][1] for _, i in placed])
            begin = 0
            for end in range(1, len(placed) + 1):
                if end == len(placed) or placed[end][0] != placed[end - 1][0] + 1:
                    shelf.rows.write(placed[begin][0], rows[begin:end])
                    begin = end
            shelf.written = True
            for row, (slot, i) in zip(rows.numpy(), placed, strict=True):
                client, _, kind = members[i]
                self._fresh.add(client)
                self._places[client] = Place(name, slot, zlib.crc32(row.data), int(kind["sent_round"]))

    def _slot(self, client: int, name: str) -> int:
        """Return the slot on shelf ``name`` for a device's new state: its own, unless a snapshot needs that."""
        before = self._places.get(client)
        if before is not None and client in self._fresh:
            if before.shelf == name:
                return before.slot
            self._shelves[before.shelf].free.append(before.slot)
            self._fresh.discard(client)
        return self._shelves[name].take()

    def _name(self, tensors: Mapping[str, Tensor], rest: dict[str, Any]) -> str:
        """Return the name of the shelf for tensors like these."""
        layout = (*((name, t.dtype, t.shape) for name, t in tensors.items()), repr(rest))
        if layout not in self._names:
            self._names[layout] = self._shelf(Form.of(tensors, rest))[0]
        return self._names[layout]

    def _shelf(self, form: Form) -> tuple[str, _Shelf]:
        name = hashlib.sha256(form.text.encode()).hexdigest()[:16]
        if name not in self._shelves:
            rows = RowFile.open(self.folder / f"{name}.rows", form.bytes)
            self._shelves[name] = _Shelf(form, rows)
        return name, self._shelves[name]

    def _find_free(self) -> None:
        used: dict[str, set[int]] = {name: set() for name in self._shelves}
        for places in (self._places, *self._kept):
            for place in places.values():
                used[place.shelf].add(place.slot)
        for name, shelf in self._shelves.items():
            shelf.slots = max(shelf.slots, max(used[name], default=-1) + 1)
            # From the end, so that slots are handed out from the front of the file.
            shelf.free = [s for s in range(shelf.slots - 1, -1, -1) if s not in used[name]]

    # ---- the table --------------------------------------------------------------------------------------------------
    def _table(self) -> bytes:
        names = sorted({place.shelf for place in self._places.values()})
        rows = [(c, names.index(p.shelf), p.slot, p.checksum, p.sent_round) for c, p in sorted(self._places.items())]
        table = torch.tensor(rows, dtype=torch.int64).view(-1, 5)
        forms = [self._shelves[name].form.text for name in names]
        return pack_tensors({"places": table}, {"forms": json.dumps(forms)})

    def _read_table(self, data: bytes) -> dict[int, Place]:
        try:
            forms = json.loads(read_metadata(data)["forms"])
            names = [self._shelf(Form.parse(str(text)))[0] for text in forms]
            table = unpack_tensors(data, TABLE)["places"]
            return {c: Place(names[f], s, k, r) for c, f, s, k, r in table.tolist()}
        except (ValueError, KeyError, IndexError, TypeError) as cause:
            raise StorageError(f"the table of devices cannot be read: {cause!r}") from cause
