"""What every caller was answered: charged and written before it is sent, so that nothing is paid twice or for free."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedkd.errors import FedkdError

Answer = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Positions [n] of inputs in the batch -> answers [n, C]."""


class OverBudget(FedkdError):
    """A caller asks for more than its policy allows."""


class Accounts:
    """One SQLite file per service. Safe for several threads and after a killed process.

    An input that a caller asked for before costs nothing and gets the very answer that it got then: a retry after a cut
    connection is free, and noise cannot be averaged away by asking again.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(folder / "accounts.sqlite", check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        # FULL: a power cut cannot take back a charge whose answer has left.
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS answers (caller TEXT, service TEXT, input BLOB, answer BLOB, "
            "PRIMARY KEY (caller, service, input)) WITHOUT ROWID"
        )
        self._db.execute("CREATE TABLE IF NOT EXISTS totals (caller TEXT PRIMARY KEY, queries INTEGER NOT NULL)")
        self._buckets: dict[str, tuple[float, float]] = {}

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def spent(self, caller: str) -> int:
        """Return how many different inputs ``caller`` has been answered, over all services on this file."""
        with self._lock:
            return self._spent(caller)

    def answer(
        self,
        caller: str,
        service: str,
        inputs: Sequence[bytes],
        classes: int,
        make: Answer,
        *,
        budget: int | None,
        rate: float | None,
        charge: Callable[[int], None] = lambda count: None,
    ) -> tuple[NDArray[np.float32], int]:
        """Return answers [n, C] to the inputs of these hashes, and how many of them were charged.

        ``charge`` is told how many new answers there will be before any is made, and may refuse them.

        Raises:
            OverBudget: the inputs not asked before are more than what is left, or come too fast; nothing is charged.
        """
        with self._lock:
            known = self._known(caller, service, inputs)
            fresh = list(dict.fromkeys(h for h in inputs if h not in known))
            if fresh:
                self._allow(caller, len(fresh), budget, rate)
                charge(len(fresh))
                first = {h: i for i, h in reversed(list(enumerate(inputs)))}
                made = np.ascontiguousarray(make(np.array([first[h] for h in fresh])), "<f4")
                rows = [(caller, service, h, a.tobytes()) for h, a in zip(fresh, made, strict=True)]
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    self._db.executemany("INSERT INTO answers VALUES (?, ?, ?, ?)", rows)
                    self._db.execute(
                        "INSERT INTO totals VALUES (?, ?) "
                        "ON CONFLICT(caller) DO UPDATE SET queries = queries + excluded.queries",
                        (caller, len(fresh)),
                    )
                    self._db.execute("COMMIT")
                except BaseException:
                    self._db.execute("ROLLBACK")
                    raise
                known |= {h: a for _, _, h, a in rows}
        found = np.frombuffer(b"".join(known[h] for h in inputs), "<f4").reshape(len(inputs), classes)
        return found, len(fresh)

    def _known(self, caller: str, service: str, inputs: Sequence[bytes]) -> dict[bytes, bytes]:
        known: dict[bytes, bytes] = {}
        asked = list(dict.fromkeys(inputs))
        for start in range(0, len(asked), 500):
            part = asked[start : start + 500]
            marks = ",".join("?" * len(part))
            query = f"SELECT input, answer FROM answers WHERE caller = ? AND service = ? AND input IN ({marks})"
            known |= dict(self._db.execute(query, (caller, service, *part)))
        return known

    def _spent(self, caller: str) -> int:
        row = self._db.execute("SELECT queries FROM totals WHERE caller = ?", (caller,)).fetchone()
        return int(row[0]) if row else 0

    def _allow(self, caller: str, count: int, budget: int | None, rate: float | None) -> None:
        if budget is not None:
            left = budget - self._spent(caller)
            if count > left:
                raise OverBudget(f"{count} new inputs asked, {max(left, 0)} of {budget} are left to {caller}")
        if rate is None:
            return
        # A bucket that fills at `rate` and holds a second's worth, or one batch if that is more.
        now = time.monotonic()
        level, then = self._buckets.get(caller, (max(rate, count), now))
        level = min(max(rate, count), level + (now - then) * rate)
        if level < count:
            wait = (count - level) / rate
            raise OverBudget(f"{caller} may ask {rate:g} inputs a second: try again in {wait:.1f} s")
        self._buckets[caller] = (level - count, now)
