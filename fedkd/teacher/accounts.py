"""What every caller was answered: charged and written before it is sent, so that nothing is paid twice or for free."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedkd.errors import FedkdError

Answer = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Positions [n] of inputs in the batch -> answers [n, C]."""


def content_hashes(rows: NDArray[np.float32]) -> list[bytes]:
    """Return the names [n] of inputs [n, ...] in C order: 16 bytes of SHA-256, which processors compute by themselves."""
    data, width = rows.data.cast("B"), rows.nbytes // max(len(rows), 1)
    return [hashlib.sha256(data[i : i + width]).digest()[:16] for i in range(0, len(data), max(width, 1))]


class OverBudget(FedkdError):
    """A caller asks for more than its policy allows."""


@dataclass(frozen=True)
class Answered:
    """Answers that were made, of which some may not be on disk yet. ``charged``: how many of them were new."""

    charged: int
    _found: NDArray[np.float32]
    _waits: tuple[Future[None], ...]

    def release(self) -> NDArray[np.float32]:
        """Return the answers [n, C] once they, and all that they repeat, are charged on disk.

        Raises:
            OverBudget: another process on this file spent what was left in the meantime.
            sqlite3.Error: they cannot be written; nothing may be sent.
        """
        for wait in self._waits:
            wait.result()
        return self._found


class Accounts:
    """One SQLite file per service. Safe for several threads and after a killed process.

    An input that a caller asked for before costs nothing and gets the very answer that it got then: a retry after a cut
    connection is free, and noise cannot be averaged away by asking again.

    A thread of its own writes, so that the model need not wait for the disk: an answer is made while the one before it is
    written, and leaves when it is written itself.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._books = threading.Lock()
        self._turns: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._db, self._pen = (self._connect(folder / "accounts.sqlite") for _ in range(2))
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="accounts")
        self._names: dict[tuple[str, str], int] = {}
        self._spent: dict[str, int] = {}
        # On their way to the disk: number of new inputs by caller, and answers by account.
        self._flying: dict[str, int] = defaultdict(int)
        self._pending: dict[int, dict[bytes, tuple[bytes, Future[None]]]] = defaultdict(dict)
        self._buckets: dict[str, tuple[float, float]] = {}

    @staticmethod
    def _connect(path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        # FULL: a power cut cannot take back a charge whose answer has left.
        db.execute("PRAGMA synchronous=FULL")
        db.execute(
            "CREATE TABLE IF NOT EXISTS accounts (id INTEGER PRIMARY KEY, caller TEXT NOT NULL, service TEXT NOT NULL, "
            "UNIQUE (caller, service))"
        )
        db.execute(
            "CREATE TABLE IF NOT EXISTS replies (account INTEGER, input BLOB, answer BLOB, PRIMARY KEY (account, input)) "
            "WITHOUT ROWID"
        )
        db.execute("CREATE TABLE IF NOT EXISTS totals (caller TEXT PRIMARY KEY, queries INTEGER NOT NULL)")
        return db

    def close(self) -> None:
        """Write what is on its way, and close the file."""
        self._writer.shutdown(wait=True)
        with self._books:
            self._db.close()
            self._pen.close()

    def spent(self, caller: str) -> int:
        """Return how many different inputs ``caller`` has been charged, over all services on this file."""
        with self._books:
            return self._total(caller)

    def spent_by_all(self) -> int:
        """Return how many inputs all callers together have been charged, over all services on this file."""
        with self._books:
            return int(self._db.execute("SELECT COALESCE(SUM(queries), 0) FROM totals").fetchone()[0])

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
    ) -> Answered:
        """Answer the inputs of these hashes; what was not asked before is charged in the background.

        ``charge`` is told how many new answers there will be before any is made, and may refuse them.

        Raises:
            OverBudget: the inputs not asked before are more than what is left, or come too fast; nothing is charged.
        """
        # One caller's streams take turns: an input that two of them ask at once is made, and paid, once.
        with self._books:
            turn = self._turns[caller]
        with turn:
            with self._books:
                account = self._account(caller, service)
                known, waits = self._known(account, inputs)
                fresh = list(dict.fromkeys(h for h in inputs if h not in known))
                if fresh:
                    self._allow(caller, len(fresh), budget, rate)
            if fresh:
                charge(len(fresh))
                first = {h: i for i, h in reversed(list(enumerate(inputs)))}
                made = np.ascontiguousarray(make(np.array([first[h] for h in fresh])), "<f4")
                new = {h: a.tobytes() for h, a in zip(fresh, made, strict=True)}
                known |= new
                with self._books:
                    self._flying[caller] += len(fresh)
                    written = self._writer.submit(self._write, account, caller, new, budget)
                    self._pending[account] |= {h: (a, written) for h, a in new.items()}
                waits.add(written)
        found = np.frombuffer(b"".join(known[h] for h in inputs), "<f4").reshape(len(inputs), classes)
        return Answered(len(fresh), found, tuple(waits))

    def _write(self, account: int, caller: str, new: dict[bytes, bytes], budget: int | None) -> None:
        """Charge and keep new answers in one transaction; what does not get to the disk was never charged."""
        total: int | None = None
        try:
            self._pen.execute("BEGIN IMMEDIATE")
            try:
                self._pen.executemany("INSERT INTO replies VALUES (?, ?, ?)", [(account, *row) for row in new.items()])
                ((total,),) = self._pen.execute(
                    "INSERT INTO totals VALUES (?, ?) ON CONFLICT(caller) "
                    "DO UPDATE SET queries = queries + excluded.queries RETURNING queries",
                    (caller, len(new)),
                ).fetchall()
                if budget is not None and total > budget:
                    raise OverBudget(f"{len(new)} new inputs asked, and {budget} in all are allowed to {caller}")
                self._pen.execute("COMMIT")
            except BaseException:
                total = None
                # A full disk may have ended the transaction already.
                if self._pen.in_transaction:
                    self._pen.execute("ROLLBACK")
                raise
        finally:
            with self._books:
                self._flying[caller] -= len(new)
                if total is None:
                    self._spent.pop(caller, None)
                else:
                    self._spent[caller] = total
                for h in new:
                    self._pending[account].pop(h, None)

    # ---- with the books held ----------------------------------------------------------------------------------------
    def _account(self, caller: str, service: str) -> int:
        if (caller, service) not in self._names:
            self._db.execute("INSERT OR IGNORE INTO accounts (caller, service) VALUES (?, ?)", (caller, service))
            query = "SELECT id FROM accounts WHERE caller = ? AND service = ?"
            self._names[caller, service] = int(self._db.execute(query, (caller, service)).fetchone()[0])
        return self._names[caller, service]

    def _known(self, account: int, inputs: Sequence[bytes]) -> tuple[dict[bytes, bytes], set[Future[None]]]:
        """Return the answers that there are, and what has to be on disk before they may leave."""
        known: dict[bytes, bytes] = {}
        asked, flying = list(dict.fromkeys(inputs)), self._pending[account]
        for start in range(0, len(asked), 500):
            part = asked[start : start + 500]
            marks = ",".join("?" * len(part))
            query = f"SELECT input, answer FROM replies WHERE account = ? AND input IN ({marks})"
            known |= dict(self._db.execute(query, (account, *part)))
        late = {h: flying[h] for h in asked if h not in known and h in flying} if flying else {}
        return known | {h: a for h, (a, _) in late.items()}, {wait for _, wait in late.values()}

    def _total(self, caller: str) -> int:
        row = self._db.execute("SELECT queries FROM totals WHERE caller = ?", (caller,)).fetchone()
        return int(row[0]) if row else 0

    def _allow(self, caller: str, count: int, budget: int | None, rate: float | None) -> None:
        if budget is not None:
            if caller not in self._spent:
                self._spent[caller] = self._total(caller)
            left = budget - self._spent[caller] - self._flying[caller]
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
