"""Answers that wait on the device's disk until the server has heard them, so that a retry sends the same bytes.

One file per answer, named by its round and the key of its request; the run is the folder. A power cut between training
and sending, or in the middle of sending, costs nothing: the request comes again, is found here, and is answered with the
very same bytes, without a second look at the records and without a second charge to the privacy ledger.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from fedkd.storage import write_atomic

NAME = re.compile(r"^(?P<round>[0-9]{6,})-(?P<key>[0-9a-f]{64})\.answer$")
DIGEST_BYTES = 32


@dataclass(frozen=True)
class Outbox:
    """The answers of one run in ``folder``; those of the last ``rounds`` rounds are kept."""

    folder: Path
    rounds: int = 2

    def find(self, round: int, key: str) -> bytes | None:
        """Return the answer to the request of ``key``, or None; a damaged file is as good as none."""
        try:
            data = self._path(round, key).read_bytes()
        except OSError:
            return None
        digest, body = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
        return body if hashlib.sha256(body).digest() == digest else None

    def put(self, round: int, key: str, answer: bytes) -> None:
        """Keep an answer, synced to disk, before it is sent.

        Raises:
            StorageError: the disk is full or read-only.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(round, key), hashlib.sha256(answer).digest() + answer)
        for path in self.folder.iterdir():
            found = NAME.match(path.name)
            if found and int(found["round"]) <= round - self.rounds:
                path.unlink(missing_ok=True)

    def _path(self, round: int, key: str) -> Path:
        return self.folder / f"{round:06d}-{key}.answer"
