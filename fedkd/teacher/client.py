"""A remote teacher as a :class:`fedkd.distill.Teacher`: asks in streams, remembers answers, retries, resumes."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import grpc
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedkd.distill.teachers import Teacher, log_probabilities
from fedkd.errors import ConfigError, FedkdError
from fedkd.teacher import teacher_pb2 as pb
from fedkd.teacher.accounts import content_hashes
from fedkd.teacher.pixels import packed
from fedkd.teacher.service import IDENTITY, SERVICE

TRIES, FIRST_WAIT_SECONDS, CALL_SECONDS = 6, 0.2, 120.0
# A service that asks for more patience than this is not believed.
LONGEST_WAIT_SECONDS = 3600.0
PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
)
CROWDED = re.compile(r"try again in (\d{1,9}(?:\.\d{1,3})?) s|Concurrent RPC limit exceeded")


class RemoteError(FedkdError):
    """The remote teacher refused, or cannot be reached."""


class RemoteTeacher(Teacher):
    """Asks a service of `fedkd teacher serve`.

    Args:
        url: ``grpcs://host:port`` (TLS) or ``grpc://localhost:port`` (in the clear). Query parameters name files:
            ``ca`` (the service's CA; default: the system's), ``token`` (a file with the caller's token), ``cert`` and
            ``key`` (mutual TLS).
        cache: SQLite file of answers by content, so that no input is ever sent twice; None keeps them in memory.
        batch: inputs per question.
    Raises:
        ConfigError: the address or a file is wrong.
        RemoteError: the service cannot be reached or refuses this caller.
    """

    priced = True

    def __init__(self, url: str, cache: Path | None = None, batch: int = 256) -> None:
        self._channel, self._metadata = _connect(url)
        self._url = url.split("?")[0]
        self._describe = self._channel.unary_unary(
            f"/{SERVICE}/Describe", pb.DescribeRequest.SerializeToString, pb.Description.FromString
        )
        self._answer = self._channel.stream_stream(
            f"/{SERVICE}/Answer", pb.Question.SerializeToString, pb.Reply.FromString
        )
        said = self._retry(lambda: self._describe(pb.DescribeRequest(), metadata=self._metadata, timeout=10))
        self.shape = tuple(int(s) for s in said.shape)
        self.classes, self.identity = int(said.classes), str(said.identity)
        if not re.fullmatch(r"[\w.-]{1,256}", self.identity, re.ASCII):
            raise RemoteError(f"{self._url} gives no name to its teacher: no teacher can be so")
        self.answers = _plain(str(said.answers))
        self.queries_left = int(said.queries_left) if said.HasField("queries_left") else None
        self.epsilon = float(said.epsilon) if said.HasField("epsilon") else None
        self.delta = float(said.delta) if said.HasField("delta") else None
        if not (
            2 <= self.classes <= 100_000
            and 1 <= len(self.shape) <= 8
            and all(s >= 1 for s in self.shape)
            and math.prod(self.shape) <= 1 << 26
            and int(said.max_batch) >= 1
            and int(said.max_bytes) >= 4 * math.prod(self.shape)
        ):
            raise RemoteError(
                f"{self._url} speaks of inputs {list(self.shape[:8])}, {self.classes} classes and questions of "
                f"{int(said.max_batch)} inputs and {int(said.max_bytes)} bytes: no teacher can be so"
            )
        self._batch = min(batch, int(said.max_batch), int(said.max_bytes) // (4 * math.prod(self.shape)))
        self.asked = 0
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
        place = str(cache) if cache is not None else ":memory:"
        self._db, self._turn = sqlite3.connect(place, isolation_level=None, check_same_thread=False), threading.Lock()
        self._db.execute("PRAGMA journal_mode=WAL")
        # What a power cut takes from here the service still has, and gives for nothing.
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS replies (service INTEGER, input BLOB, answer BLOB, PRIMARY KEY (service, input)) "
            "WITHOUT ROWID"
        )
        self._service = int.from_bytes(hashlib.sha256(self.identity.encode()).digest()[:7], "little")

    @property
    def paid(self) -> int:
        """Different inputs that the cache holds answers to: those of earlier processes of a run too."""
        with self._turn:
            row = self._db.execute("SELECT COUNT(*) FROM replies WHERE service = ?", (self._service,)).fetchone()
        return int(row[0])

    @property
    def told(self) -> str:
        """What the service says that its answers are, and what they may cost its records at most."""
        if self.epsilon is None or self.delta is None:
            return f"{self.answers}; epsilon infinity"
        return (
            f"{self.answers}; epsilon at most {self.epsilon:g} at delta {self.delta:g} over all that this caller hears, for "
            "the records of one member"
        )

    def close(self) -> None:
        """End the connection."""
        self._channel.close()
        self._db.close()

    def logits(self, x: Tensor) -> Tensor:
        """Return the logarithms of the service's probabilities [B, C].

        Raises:
            ConfigError: inputs of another shape.
            RemoteError: with the service's reason; answers that came before it are kept.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ConfigError(f"{self._url} takes inputs {list(self.shape or ())}, got {list(x.shape[1:])}")
        rows = np.ascontiguousarray(x.detach().float().numpy().reshape(len(x), -1), "<f4")
        known: dict[bytes, bytes] = {}
        hashes: dict[int, list[bytes]] = {}
        tries = 0
        while True:
            before = self.asked
            try:
                for part, answers in self._ask(rows, hashes, known):
                    self._keep(part, answers)
                    known |= {h: a.tobytes() for h, a in zip(part, answers, strict=True)}
                    self.asked += len(part)
                break
            except grpc.RpcError as cause:
                tries = tries + 1 if before == self.asked else 1
                self._wait_or_give_up(cause, tries)
        names = [h for start in sorted(hashes) for h in hashes[start]]
        # A stream that ends well may have ended before the last question was even sent.
        if len(names) < len(rows) or any(h not in known for h in names):
            raise RemoteError(f"{self._url} ended its answers early, after {len(known)} of {len(rows)} inputs")
        answered = b"".join(known[h] for h in names)
        found = np.frombuffer(answered, "<f4").reshape(len(x), self.classes)
        return log_probabilities(found, x.dtype)

    def _ask(
        self, rows: NDArray[np.float32], hashes: dict[int, list[bytes]], known: dict[bytes, bytes]
    ) -> Iterator[tuple[list[bytes], NDArray[np.float32]]]:
        """Ask about the rows that nobody was asked about, and yield their hashes and answers, a question at a time.

        ``hashes`` (by the place of their first row) and ``known`` are filled on the way, from the cache too, while the
        service is at work.
        """
        sent: deque[list[bytes]] = deque()
        questions = self._questions(rows, hashes, known, sent)
        first = next(questions, None)
        if first is None:
            return
        # One deadline for a stream of any length would be wrong: it grows with what is asked.
        timeout = CALL_SECONDS + 0.5 * len(rows) / self._batch
        stream = itertools.chain([first], questions)
        # A service that came back as another one refuses, rather than be paid for answers that are kept as the old one's.
        metadata = [*self._metadata, (IDENTITY, self.identity)]
        call = self._answer(stream, metadata=metadata, timeout=timeout)
        try:
            for wanted, reply in enumerate(call):
                if not sent or reply.id != wanted:
                    raise RemoteError(f"{self._url} answered question {reply.id}, expected {wanted}")
                part = sent.popleft()
                if len(reply.probabilities) != 4 * len(part) * self.classes:
                    raise RemoteError(f"{self._url} sent {len(reply.probabilities)} bytes for {len(part)} answers")
                found = np.frombuffer(reply.probabilities, "<f4").reshape(len(part), self.classes)
                if not bool((found >= 0).all()) or not np.allclose(found.sum(1), 1, atol=1e-3):
                    raise RemoteError(f"{self._url} sent rows that are no probabilities")
                yield part, found
        finally:
            # A service that never ends its answers must not be listened to further.
            call.cancel()
        if sent:
            raise RemoteError(f"{self._url} ended its answers {sum(map(len, sent))} inputs early")

    def _questions(
        self,
        rows: NDArray[np.float32],
        hashes: dict[int, list[bytes]],
        known: dict[bytes, bytes],
        sent: deque[list[bytes]],
    ) -> Iterator[Any]:
        """Yield the questions of a stream, and note in ``sent`` what each is about. Runs in a thread of gRPC's."""
        waiting: dict[bytes, int] = {}
        asked: set[bytes] = set()
        numbers = itertools.count()
        for start in range(0, len(rows), self._batch):
            end = min(start + self._batch, len(rows))
            if start not in hashes:
                hashes[start] = content_hashes(rows[start:end])
            part = hashes[start]
            known |= self._known([h for h in part if h not in known])
            waiting |= {h: start + i for i, h in enumerate(part) if h not in known and h not in asked}
            while len(waiting) >= self._batch or (waiting and end == len(rows)):
                chosen = list(itertools.islice(waiting.items(), self._batch))
                for h, _ in chosen:
                    del waiting[h]
                    asked.add(h)
                sent.append([h for h, _ in chosen])
                inputs = rows[[i for _, i in chosen]]
                pixels = packed(inputs)
                form = {"floats": inputs.tobytes()} if pixels is None else {"pixels": pixels}
                yield pb.Question(id=next(numbers), count=len(chosen), **form)

    def _wait_or_give_up(self, cause: grpc.RpcError, tries: int) -> None:
        code, details = cause.code(), _plain(str(cause.details()))
        crowded = CROWDED.search(details) if code == grpc.StatusCode.RESOURCE_EXHAUSTED else None
        if not (code in PASSING or crowded) or tries >= TRIES:
            hint = "; is it served there, over TLS, and with a certificate of the authority named by ?ca= ?"
            why = details + (hint if code == grpc.StatusCode.UNAVAILABLE else "")
            raise RemoteError(f"{self._url}: {code.name.lower().replace('_', ' ')}: {why}") from cause
        told = float(crowded[1]) if crowded is not None and crowded[1] is not None else 0.0
        if told > LONGEST_WAIT_SECONDS:
            raise RemoteError(f"{self._url}: {details}: too long to wait for; ask in smaller batches") from cause
        time.sleep(max(told, FIRST_WAIT_SECONDS * 2**tries))

    def _retry(self, call: Callable[[], Any]) -> Any:
        for tries in range(1, TRIES + 1):
            try:
                return call()
            except grpc.RpcError as cause:
                self._wait_or_give_up(cause, tries)
        raise AssertionError("the last try returns or raises")

    def _known(self, hashes: Sequence[bytes]) -> dict[bytes, bytes]:
        known: dict[bytes, bytes] = {}
        asked = list(dict.fromkeys(hashes))
        for start in range(0, len(asked), 500):
            part = asked[start : start + 500]
            query = f"SELECT input, answer FROM replies WHERE service = ? AND input IN ({','.join('?' * len(part))})"
            with self._turn:
                known |= dict(self._db.execute(query, (self._service, *part)))
        return {h: a for h, a in known.items() if len(a) == 4 * self.classes}

    def _keep(self, hashes: Sequence[bytes], answers: NDArray[np.float32]) -> None:
        rows = [(self._service, h, a.tobytes()) for h, a in zip(hashes, answers, strict=True)]
        with self._turn:
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", rows)
            self._db.execute("COMMIT")


def _plain(text: str) -> str:
    """Return what a service says as one line of at most 300 signs that a terminal shows and does not obey."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split())[:300])


def _connect(url: str) -> tuple[grpc.Channel, list[tuple[str, str]]]:
    parts = urlsplit(url)
    if parts.scheme not in ("grpc", "grpcs") or not parts.hostname or not parts.port:
        raise ConfigError(f"{url!r} is no address of a teacher: expected grpcs://host:port")
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    unknown = set(query) - {"ca", "token", "cert", "key", "name"}
    if unknown:
        raise ConfigError(f"{url!r}: unknown {', '.join(sorted(unknown))}; known are ca, token, cert, key, name")
    options: list[tuple[str, object]] = [("grpc.max_receive_message_length", 256 << 20)]
    metadata = [("authorization", f"Bearer {_read(query['token']).decode().strip()}")] if "token" in query else []
    target = f"{parts.hostname}:{parts.port}"
    if parts.scheme == "grpc":
        if parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise ConfigError(f"{url!r} is in the clear: inputs and token would cross the network; use grpcs://")
        return grpc.insecure_channel(target, options), metadata
    if "name" in query:
        options.append(("grpc.ssl_target_name_override", query["name"]))
    pair = [_read(query[k]) if k in query else None for k in ("key", "cert")]
    roots = _read(query["ca"]) if "ca" in query else None
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(roots, *pair), options), metadata


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as cause:
        raise ConfigError(f"cannot read {path}: {cause.strerror or cause}") from cause
