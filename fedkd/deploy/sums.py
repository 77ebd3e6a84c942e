"""The secure sums that a device was asked to join: one session for a round of a run, for the device's whole life.

The same request is answered by the same bytes (:mod:`fedkd.deploy.outbox`). Another opening for a round that was opened
before would let a server try a second roster, so that it is refused, after a restart and after the run's folder was tidied
away, too.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedkd.privacy.secure.heads import KEYS, is_message, read_step
from fedkd.storage import StorageError, write_atomic

MOST_RUNS = 10_000
"""A server that makes up names of runs fills this register and no more; the device then takes part in no new sum."""


class SumRegister:
    """Keeps, in the file ``path``, the last round of every run for which a session was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def turn(self, run: str, round: int, request: bytes) -> Iterator[str | None]:
        """Hold the device's sums while one request is answered; gives why it must not be, or None.

        Two processes of one device (Flower's own node starts one per message) could otherwise answer a step twice.

        Raises:
            StorageError: the register cannot be read or written; nothing is answered then.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as cause:
            raise StorageError(f"cannot open the lock beside {self.path}: {cause.strerror or cause}") from cause
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            opens = is_message(request) and read_step(request) == KEYS
            yield self._open(run, round) if opens else None
        finally:
            os.close(lock)

    def _open(self, run: str, round: int) -> str | None:
        known = self._read()
        if round <= known.get(run, -1):
            return (
                f"secure sum refused: a session for round {known[run]} of {run} was opened already, and a round has one "
                "session alone"
            )
        if run not in known and len(known) >= MOST_RUNS:
            return f"secure sum refused: this device has joined sums of {MOST_RUNS} runs, and takes part in no other"
        # On disk before the keys leave.
        write_atomic(self.path, json.dumps({**known, run: round}).encode(), mode=0o600)
        return None

    def _read(self) -> dict[str, int]:
        try:
            return {str(run): int(round) for run, round in json.loads(self.path.read_bytes()).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as cause:
            # Taken for empty, it would let every round be opened once more.
            raise StorageError(
                f"cannot read {self.path}: {cause}; this device joins no secure sum until it can"
            ) from cause
