"""The ledger: what was released, charged and synced to disk before it left; append-only lines, each bound to the last.

A line is one JSON object. ``sum`` is the SHA-256 of the line before and of this line's content, so that a line which is
changed, moved or taken out is found; the file ``<name>.head`` holds the number of lines and the last sum, so that lines
cut off at the end are found too. A last line without its line break was torn by a crash: its charge was never confirmed,
so that nothing was released on it, and it is set aside. Processes that share a ledger take turns by a file lock.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from fedkd.errors import ConfigError, FedkdError
from fedkd.privacy.events import Event, Relation, Unit, epsilon, exceeds, merge
from fedkd.storage import sync_folder, write_atomic

VERSION: Final = 1
SERVER: Final = -1
"""The party that releases an aggregate under client-level privacy; devices are 0, 1, 2, ..."""
START: Final = "0" * 64


class LedgerError(FedkdError):
    """A ledger that cannot be trusted or written. Nothing may be released on it."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One release, or several alike: the same event charged to each of ``devices``.

    ``what`` says in words what leaves; ``unit`` and ``relation`` say what the event protects. ``seeded``: the noise can
    be foreseen (tests), so that the claim is void.
    """

    run: str
    round: int
    what: str
    mechanism: str
    unit: Unit
    relation: Relation
    event: Event
    devices: tuple[int, ...]
    seeded: bool = False
    time: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "time": self.time or datetime.now(UTC).isoformat(timespec="milliseconds"),
            "run": self.run,
            "round": self.round,
            "what": self.what,
            "mechanism": self.mechanism,
            "unit": self.unit,
            "relation": self.relation,
            "event": self.event.to_json(),
            "devices": _ranges(self.devices),
            "seeded": self.seeded,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Entry:
        """Undo :meth:`to_json`; raises KeyError, TypeError or ValueError for anything else."""
        if data["unit"] not in ("record", "client") or data["relation"] not in ("add_remove", "replace_one"):
            raise ValueError(f"unit {data['unit']!r} or relation {data['relation']!r} is unknown")
        return cls(
            run=str(data["run"]),
            round=int(data["round"]),
            what=str(data["what"]),
            mechanism=str(data["mechanism"]),
            unit=data["unit"],
            relation=data["relation"],
            event=Event.from_json(data["event"]),
            devices=tuple(i for first, last in data["devices"] for i in range(int(first), int(last) + 1)),
            seeded=bool(data["seeded"]),
            time=str(data["time"]),
        )


@dataclass(frozen=True)
class Spent:
    """Composed cost of a ledger: the unit, epsilon at ``delta`` under ``relation``, and whether noise was seeded."""

    unit: Unit
    epsilon: float
    delta: float
    relation: Relation
    void: bool


class Ledger:
    """See the module text. ``path`` None keeps it in memory, for tests and dry runs.

    ``life``: a ledger of everything that the same party ever released. It is charged too, and first, so that a crash
    between the two makes it say more than was released, and never less.

    Raises:
        LedgerError: the file was changed, cut or cannot be read.
    """

    def __init__(self, path: Path | None = None, life: Ledger | None = None) -> None:
        self.path, self.life = path, life
        self._entries: list[Entry] = []
        self._spent: dict[tuple[int, Unit], dict[Event, int]] = {}
        self._by_run: dict[tuple[int, Unit, str], dict[Event, int]] = {}
        self._strict: set[tuple[int, Unit]] = set()
        self._seeded: set[tuple[int, Unit]] = set()
        self._offset, self._lines, self._last = 0, 0, START
        self.refresh()

    # ---- reading ----------------------------------------------------------------------------------------------------
    @property
    def entries(self) -> tuple[Entry, ...]:
        """All charges, oldest first."""
        return tuple(self._entries)

    @property
    def devices(self) -> list[tuple[int, Unit]]:
        """Parties that were charged, with their units."""
        return sorted(self._spent)

    @property
    def head(self) -> tuple[int, str]:
        """Number of lines and sum of the last: keep it elsewhere to notice a ledger that was set back."""
        return self._lines, self._last

    def events(self, device: int, unit: Unit = "record", run: str | None = None) -> tuple[Event, ...]:
        """Return everything charged to a party, in its whole life or in one run."""
        found = self._spent.get((device, unit), {}) if run is None else self._by_run.get((device, unit, run), {})
        return merge(e.times(n) for e, n in found.items())

    def charged(self, run: str, round: int, unit: Unit | None) -> set[int]:
        """Return who was charged for one round of one run."""
        found = (e.devices for e in self._entries if e.round == round and e.run == run and e.unit == unit)
        return {device for devices in found for device in devices}

    def relation(self, device: int, unit: Unit) -> Relation:
        """The stronger of the neighbouring relations that a party's releases were claimed under."""
        return "replace_one" if (device, unit) in self._strict else "add_remove"

    def epsilon(self, delta: float, device: int, unit: Unit = "record") -> float:
        """Return a party's composed epsilon, whole life."""
        return epsilon(self.events(device, unit), delta, self.relation(device, unit))

    def spent(self, delta: float, *, disjoint: bool = True) -> list[Spent]:
        """Return the cost for each unit that occurs.

        Guarantee: a record lives on one device if ``disjoint``, so that the largest epsilon over devices holds for
        every record; otherwise all devices' releases are composed as if each held everybody's records. Likewise for
        clients, each of which is a device.
        """
        found = []
        for unit in ("client", "record"):
            parties = [d for d, u in self._spent if u == unit]
            if not parties:
                continue
            strict = any((d, unit) in self._strict for d in parties)
            relation: Relation = "replace_one" if strict else "add_remove"
            # The server's releases touch every client; a device's own touch the client that it is.
            shared = self.events(SERVER, unit)
            own = [self.events(d, unit) for d in parties if d != SERVER] or [()]
            groups: Iterable[tuple[Event, ...]] = {merge([*shared, *events]) for events in own}
            if not disjoint:
                groups = [merge(e for d in parties for e in self.events(d, unit))]
            worst = max(epsilon(g, delta, relation) for g in groups)
            void = any((d, unit) in self._seeded for d in parties)
            found.append(Spent(unit, worst, delta, relation, void))
        return found

    def would_exceed(
        self,
        device: int,
        events: Sequence[Event],
        limit: float | None,
        delta: float,
        *,
        unit: Unit = "record",
        relation: Relation = "add_remove",
        run: str | None = None,
    ) -> str | None:
        """Return why ``events`` on top of what is spent would cost more than ``limit``; None if they would not.

        ``run`` counts that run's releases alone; without it the device's whole life counts.
        """
        if limit is None:
            return None
        strict = relation == "replace_one" or self.relation(device, unit) == "replace_one"
        stronger: Relation = "replace_one" if strict else "add_remove"
        total = merge([*self.events(device, unit, run), *events])
        # Calibration rounds epsilon to the limit from below; a last digit of floats is no overspending.
        if not exceeds(total, limit * (1 + 1e-9), delta, stronger):
            return None
        return f"the {unit}'s epsilon would be {epsilon(total, delta, stronger):.3f} at delta {delta:g}, over {limit:g}"

    # ---- writing ----------------------------------------------------------------------------------------------------
    def charge(self, entries: Sequence[Entry]) -> None:
        """Append ``entries`` and sync them to disk; when this returns, their releases may leave.

        Raises:
            LedgerError: the disk is full or read-only, or the file was tampered with. Nothing may be released then.
        """
        if not entries:
            return
        if self.life is not None:
            self.life.charge(entries)
        if self.path is None:
            for entry in entries:
                self._take(entry)
            return
        with self._locked() as handle:
            self._read(handle, repair=True)
            self._append(handle, [{"kind": "charge", **entry.to_json()} for entry in entries])

    def refresh(self) -> None:
        """Read what other processes have added."""
        if self.path is None:
            return
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError as cause:
            if not self._lines and not self._head_path.exists():
                return
            raise LedgerError(f"the ledger {self.path} is gone: restore it from a copy; nothing is released") from cause
        except OSError as cause:
            raise LedgerError(f"cannot read the ledger {self.path}: {cause.strerror or cause}") from cause
        try:
            # Lines and head belong together: nobody may write between reading the one and the other.
            fcntl.flock(handle, fcntl.LOCK_SH)
            self._read(handle, repair=False)
        finally:
            os.close(handle)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not self.path.exists()
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as cause:
            raise LedgerError(
                f"cannot write the ledger {self.path}: {cause.strerror or cause}; nothing is released"
            ) from cause
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if fresh:
                sync_folder(self.path.parent)
            if not os.fstat(handle).st_size and not self._head_path.exists():
                self._write_head()
            yield handle
        finally:
            os.close(handle)

    def _append(self, handle: int, rows: Sequence[dict[str, Any]]) -> None:
        assert self.path is not None
        data, last, taken = b"", self._last, []
        for number, row in enumerate(rows, self._lines):
            content = {"v": VERSION, "n": number, **row}
            text = _canonical(content)
            last = _chain(last, text)
            data += text[:-1] + b',"sum":"' + last.encode() + b'"}\n'
            taken.append(content)
        size = os.fstat(handle).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view) :]
            os.fsync(handle)
        except OSError as cause:
            os.ftruncate(handle, size)
            raise LedgerError(
                f"cannot write the ledger {self.path}: {cause.strerror or cause}; nothing is released"
            ) from cause
        self._offset, self._lines, self._last = size + len(data), self._lines + len(rows), last
        for content in taken:
            if content["kind"] == "charge":
                self._take(Entry.from_json(content))
        self._write_head()

    def _write_head(self) -> None:
        try:
            write_atomic(self._head_path, json.dumps({"lines": self._lines, "sum": self._last}).encode())
        except FedkdError as cause:
            raise LedgerError(f"{cause}; nothing is released") from cause

    @property
    def _head_path(self) -> Path:
        assert self.path is not None
        return self.path.with_name(self.path.name + ".head")

    def _read(self, handle: int, *, repair: bool) -> None:
        """Check and take in the lines after those known; with ``repair`` (under the lock) set a torn one aside."""
        size = os.fstat(handle).st_size
        if size < self._offset:
            raise LedgerError(f"the ledger {self.path} became shorter: it was tampered with or set back")
        data = os.pread(handle, size - self._offset, self._offset)
        whole, _, torn = data.rpartition(b"\n")
        sums = {self._lines: self._last}
        for line in whole.splitlines() if whole else []:
            self._line(line)
            sums[self._lines] = self._last
        self._offset += len(data) - len(torn)
        self._check_head(sums)
        if torn and repair:
            os.ftruncate(handle, self._offset)
            self._append(handle, [{"kind": "torn", "bytes": len(torn), "time": datetime.now(UTC).isoformat()}])

    def _line(self, line: bytes) -> None:
        where = f"line {self._lines + 1} of the ledger {self.path}"
        try:
            row = json.loads(line)
            found = row.pop("sum")
            wanted = _chain(self._last, _canonical(row))
            if found != wanted or row["n"] != self._lines:
                raise LedgerError(
                    f"{where} does not follow from the one before: it was changed, moved or a line before it was taken "
                    "out. Nothing is released on it; restore the file from a copy, or start a new ledger and count the "
                    "old one as spent"
                )
            if row["v"] != VERSION:
                raise LedgerError(f"{where} is of version {row['v']}, this release reads {VERSION}: use a newer fedkd")
            if row["kind"] == "charge":
                self._take(Entry.from_json(row))
        except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as cause:
            raise LedgerError(
                f"{where} cannot be read ({cause}): the file is damaged. Nothing is released on it"
            ) from cause
        self._lines, self._last = self._lines + 1, found

    def _check_head(self, sums: Mapping[int, str]) -> None:
        try:
            head = json.loads(self._head_path.read_text())
            lines, last = int(head["lines"]), str(head["sum"])
        except FileNotFoundError as cause:
            # It is written before the first line.
            if not self._lines:
                return
            raise LedgerError(
                f"{self._head_path} is gone, which says how many lines {self.path} has: lines may have been taken away. "
                "Nothing is released on it; restore it from a copy"
            ) from cause
        except (OSError, ValueError, KeyError, TypeError) as cause:
            raise LedgerError(
                f"{self._head_path} cannot be read ({cause}): restore it, or the ledger, from a copy"
            ) from cause
        if lines > self._lines or (lines in sums and sums[lines] != last):
            raise LedgerError(
                f"the ledger {self.path} has {self._lines} lines, but {lines} were charged: lines were taken away or "
                "changed. Nothing is released on it"
            )

    def _take(self, entry: Entry) -> None:
        self._entries.append(entry)
        one = Event(**{**vars(entry.event), "count": 1})
        for device in entry.devices:
            place = (device, entry.unit)
            for counts in (self._spent.setdefault(place, {}), self._by_run.setdefault((*place, entry.run), {})):
                counts[one] = counts.get(one, 0) + entry.event.count
            if entry.relation == "replace_one":
                self._strict.add(place)
            if entry.seeded:
                self._seeded.add(place)


def _canonical(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, sort_keys=False, separators=(",", ":"), allow_nan=False).encode()


def _chain(last: str, text: bytes) -> str:
    return hashlib.sha256(last.encode() + text).hexdigest()


def _ranges(devices: Sequence[int]) -> list[list[int]]:
    """Return inclusive ranges, so that ten thousand devices alike take one short line."""
    found: list[list[int]] = []
    for device in sorted(set(devices)):
        if found and device == found[-1][1] + 1:
            found[-1][1] = device
        else:
            found.append([device, device])
    return found
