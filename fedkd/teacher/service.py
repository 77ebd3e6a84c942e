"""The service: gRPC over TLS or mutual TLS, one account per caller, every byte checked before it is used."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from cryptography import x509
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from numpy.typing import NDArray

from fedkd.distill.teachers import Teacher
from fedkd.errors import ConfigError
from fedkd.privacy.ledger import LedgerError
from fedkd.teacher import teacher_pb2 as pb
from fedkd.teacher.accounts import Accounts, Answered, OverBudget, content_hashes
from fedkd.teacher.answers import Answers
from fedkd.teacher.pixels import unpacked
from fedkd.teacher.policy import CallerConfig, Policy, token_hash
from fedkd.teacher.private import LEDGER
from fedkd.teacher.streams import STRANGERS, Busy, Guarded, Streams

SERVICE = "fedkd.teacher.v1.Teacher"
IDENTITY = "fedkd-identity"
"""Metadata by which a caller of ``Answer`` says whose answers it wants: ``Description.identity``."""
INPUT_CAP = 1e6
ENVELOPE = 64
"""Bytes of a message that are not its inputs, at most."""
# Of strangers: streams at once, and seconds in which the one message of each must be there.
STRANGERS_MOST, STRANGERS_SECONDS = 8, 2.0
log = logging.getLogger("fedkd.teacher")


class TeacherService:
    """A running service. A context manager: it ends the server and closes the accounts.

    Args:
        shape: shape of one input.
    Raises:
        ConfigError: the address is taken, or certificate and key do not fit.
    """

    def __init__(self, teacher: Teacher, shape: tuple[int, ...], policy: Policy) -> None:
        self.teacher, self.shape, self.policy = teacher, shape, policy
        # Answers of another teacher or under another policy are other answers.
        text = teacher.identity + policy.answers.model_dump_json()
        self.identity = hashlib.sha256(text.encode()).hexdigest()
        self.accounts = Accounts(policy.state)
        self._answers = Answers(teacher, policy.answers, policy.state)
        self._refuse_mixed_state()
        size = policy.max_message_bytes
        self._most = size - ENVELOPE
        if 4 * math.prod(shape) > self._most:
            wide = f"one input of shape {list(shape)} takes {4 * math.prod(shape)} bytes"
            raise ConfigError(f"max_message_bytes is {size}, and {wide}: raise it")
        # Half of the streams for one caller, so that two must join to keep a third one waiting.
        each = policy.streams if len(policy.callers) == 1 else max(1, policy.streams // 2)
        self._streams = Streams(policy.streams, each, policy.patience_seconds, _stood)
        self._strangers = Streams(STRANGERS_MOST, STRANGERS_MOST, STRANGERS_SECONDS, _stood)
        # Threads beyond those that streams can hold: to refuse, and to describe, without waiting in line.
        threads = policy.streams + STRANGERS_MOST + 8
        self._server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="teacher"),
            interceptors=[Guarded(self._strangers, SERVICE)],
            maximum_concurrent_rpcs=threads + 256,
            options=[
                ("grpc.max_receive_message_length", size),
                ("grpc.max_send_message_length", size),
                ("grpc.so_reuseport", 0),
                ("grpc.max_metadata_size", 8192),
                ("grpc.max_concurrent_streams", 64),
                ("grpc.server_handshake_timeout_ms", 10_000),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
            ],
        )
        handlers = {
            # A stream whose messages are never waited for: who calls must be known, and nothing else.
            "Describe": grpc.stream_unary_rpc_method_handler(
                self._describe, pb.DescribeRequest.FromString, pb.Description.SerializeToString
            ),
            "Answer": grpc.stream_stream_rpc_method_handler(
                self._answer, pb.Question.FromString, pb.Reply.SerializeToString
            ),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if policy.reflection:
            from grpc_reflection.v1alpha import reflection

            reflection.enable_server_reflection((SERVICE, reflection.SERVICE_NAME), self._server)
        self.port = self._listen()

    def __enter__(self) -> TeacherService:
        self._server.start()
        for name in ("", SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return self

    def __exit__(self, *_: object) -> None:
        self._health.enter_graceful_shutdown()
        # Bounded: a call that a stranger left half-open must not hold the end up.
        self._server.stop(grace=1).wait(timeout=5)
        for streams in (self._streams, self._strangers):
            streams.end()
        self.accounts.close()

    def wait(self) -> None:
        """Serve until the process is told to end."""
        self._server.wait_for_termination()

    def _refuse_mixed_state(self) -> None:
        """Refuse a folder where answers with and without noise meet: its ledger would not cover all that callers heard."""
        state, fresh = self.policy.state, "if this is another teacher, give it a `state` of its own"
        if self.policy.answers.privacy is None:
            if (state / LEDGER).exists():
                raise ConfigError(
                    f"{state} holds a ledger of private answers, and exact ones would make its epsilon untrue: keep "
                    f"answers.privacy; {fresh}"
                )
        elif self.accounts.spent_by_all() > self._answers.covered:
            raise ConfigError(f"{state} tells of answers without noise, which no epsilon covers: {fresh}")

    def _listen(self) -> int:
        tls = self.policy.tls
        try:
            if tls is None:
                port: int = self._server.add_insecure_port(self.policy.listen)
            else:
                pair = (tls.key.read_bytes(), tls.certificate.read_bytes())
                _valid(tls.certificate, pair[1])
                roots = tls.client_ca.read_bytes() if tls.client_ca is not None else None
                credentials = grpc.ssl_server_credentials([pair], roots, require_client_auth=roots is not None)
                port = self._server.add_secure_port(self.policy.listen, credentials)
        except (RuntimeError, OSError) as cause:
            raise ConfigError(f"cannot listen on {self.policy.listen}: {' '.join(str(cause).split())[:200]}") from cause
        return port

    # ---- calls ------------------------------------------------------------------------------------------------------
    def _describe(self, requests: Iterator[Any], context: Any) -> Any:
        caller = self._caller(context)
        private, epsilon = self.policy.answers.privacy, self._epsilon(caller)
        left = None if caller.queries is None else max(0, caller.queries - self.accounts.spent(caller.name))
        return pb.Description(
            shape=self.shape,
            classes=self.teacher.classes,
            identity=self.identity,
            max_batch=self.policy.max_batch,
            max_bytes=self._most,
            answers=self.policy.answers.words,
            queries_left=left,
            epsilon=epsilon,
            delta=private.delta if private is not None and epsilon is not None else None,
        )

    def _epsilon(self, caller: CallerConfig) -> float | None:
        """Return the most that all answers to ``caller`` may ever cost; None is infinity."""
        private = self.policy.answers.privacy
        caps = [c for c in (caller.epsilon, private.epsilon) if c is not None] if private is not None else []
        return min(caps, default=None)

    def _answer(self, questions: Iterator[Any], context: Any) -> Iterator[Any]:
        """Answer in order. Three questions are at work at once: one is checked, one made, and one written and sent."""
        caller = self._caller(context)
        if dict(context.invocation_metadata()).get(IDENTITY, self.identity) != self.identity:
            _log("refused", caller.name, reason="another teacher")
            why = "the service answers by another teacher or policy than was described: begin anew"
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, why)
        try:
            stream = self._streams.open(caller.name, context)
        except Busy as cause:
            _log("refused", caller.name, reason="streams")
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(cause))
        try:
            for made in _ahead(self._made(caller, stream.read(questions))):
                if isinstance(made, _Refusal):
                    context.abort(made.code, made.why)
                question, asked, answered = made
                try:
                    found = answered.release()
                except OverBudget as cause:
                    refusal = _over_budget(caller, asked, cause)
                    context.abort(refusal.code, refusal.why)
                except sqlite3.Error as cause:
                    log.error(json.dumps({"event": "accounts", "caller": caller.name, "why": str(cause)}))
                    context.abort(grpc.StatusCode.INTERNAL, "the service cannot write its accounts: nothing is charged")
                _log("answered", caller.name, asked=asked, charged=answered.charged)
                yield from stream.send(pb.Reply(id=question, probabilities=found.tobytes()))
        finally:
            self._streams.close(stream)

    def _made(self, caller: CallerConfig, questions: Iterator[Any]) -> Iterator[tuple[int, int, Answered] | _Refusal]:
        """Make answers, which are being charged but must not leave yet, or a refusal, which is the last."""
        for question, checked in _ahead((int(question.id), self._check(question)) for question in questions):
            if isinstance(checked, str):
                _log("refused", caller.name, reason="input")
                yield _Refusal(grpc.StatusCode.INVALID_ARGUMENT, checked)
                return
            x, hashes = checked
            try:
                answered = self.accounts.answer(
                    caller.name,
                    self.identity,
                    hashes,
                    self.teacher.classes,
                    lambda rows, x=x: self._answers.make(x[rows]),  # type: ignore[misc]
                    budget=caller.queries,
                    rate=caller.rate,
                    charge=lambda count: self._answers.charge(caller, count),
                )
            except OverBudget as cause:
                yield _over_budget(caller, len(hashes), cause)
                return
            except LedgerError as cause:
                log.error(json.dumps({"event": "ledger", "caller": caller.name, "why": str(cause)}))
                yield _Refusal(grpc.StatusCode.FAILED_PRECONDITION, "the service's privacy ledger cannot be written")
                return
            except Exception as cause:
                # Its words may quote inputs: they are neither logged nor sent.
                log.error(json.dumps({"event": "failed", "caller": caller.name, "what": type(cause).__name__}))
                yield _Refusal(grpc.StatusCode.INTERNAL, "the service failed on these inputs: no query is charged")
                return
            yield question, len(hashes), answered

    def _check(self, question: Any) -> tuple[NDArray[np.float32], list[bytes]] | str:
        """Check a question's bytes and return its inputs [n, *shape] and their hashes, or why it is refused."""
        count, width = int(question.count), math.prod(self.shape)
        if not 1 <= count <= self.policy.max_batch:
            return f"{count} inputs in a question, expected 1 to {self.policy.max_batch}"
        # Pixels grow fourfold once they are here.
        if 4 * count * width > self._most:
            return f"{count} inputs of {4 * width} bytes in a question, expected at most {self._most} bytes"
        form = question.WhichOneof("inputs")
        data, size = getattr(question, form or "floats"), count * width * (1 if form == "pixels" else 4)
        if len(data) != size:
            what = "uint8" if form == "pixels" else "little-endian float32"
            return f"{len(data)} bytes for {count} inputs of shape {list(self.shape)}, expected {size} ({what})"
        if form == "pixels":
            x = unpacked(data).reshape(count, width)
        else:
            x = np.frombuffer(data, "<f4").reshape(count, width)
            # One comparison serves both: NaN compares false.
            if not bool((np.abs(x) <= INPUT_CAP).all()):
                return f"an input is NaN, infinite or beyond {INPUT_CAP:g}: expected finite numbers"
        return x.reshape(count, *self.shape), content_hashes(x)

    def _caller(self, context: Any) -> CallerConfig:
        """Return who calls; ends the call where nobody of the policy does."""
        given = dict(context.invocation_metadata()).get("authorization", "")
        token = given.removeprefix("Bearer ") if str(given).startswith("Bearer ") else None
        names = [n.decode("utf-8", "replace") for n in context.auth_context().get("x509_common_name", [])]
        for caller in self.policy.callers:
            by_token = caller.token_sha256 is None or (
                token is not None and hmac.compare_digest(token_hash(token), caller.token_sha256)
            )
            by_certificate = caller.certificate is None or caller.certificate in names
            if by_token and by_certificate:
                return caller
        _log("refused", STRANGERS, reason="identity")
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "no caller of the policy has this token or certificate")
        raise AssertionError("abort raises")


@dataclass(frozen=True)
class _Refusal:
    code: grpc.StatusCode
    why: str


def _valid(path: Path, pem: bytes) -> None:
    """Refuse a certificate that callers would refuse, and log one that soon will be such."""
    try:
        ends = x509.load_pem_x509_certificate(pem).not_valid_after_utc
    except ValueError as cause:
        raise ConfigError(f"{path} holds no certificate in PEM: {cause}") from cause
    left = (ends - datetime.now(UTC)).total_seconds() / 86_400
    if left <= 0:
        raise ConfigError(
            f"the certificate {path} ended on {ends:%Y-%m-%d}: `fedkd teacher init` makes another; put its server.crt, "
            "server.key and ca.crt in the place of these"
        )
    if left < 14:
        log.warning(json.dumps({"event": "certificate", "days_left": int(left)}))


def _stood(caller: str) -> None:
    _log("refused", caller, reason="stood still")


def _over_budget(caller: CallerConfig, asked: int, cause: OverBudget) -> _Refusal:
    _log("refused", caller.name, reason="budget", asked=asked)
    return _Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, str(cause))


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yield ``items``, of which the next is made by a thread of its own while the one before is at work."""
    reader, end = ThreadPoolExecutor(1, thread_name_prefix="ahead"), object()
    try:
        coming = reader.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = reader.submit(next, items, end)
            yield item
    finally:
        # Not waited for: a refused caller may keep its stream open, and hears why only when this is left.
        reader.shutdown(wait=False)


def _log(event: str, caller: str, **facts: object) -> None:
    """One JSON object per line: who, what, how many. Never an input, an answer or a token."""
    log.info(json.dumps({"event": event, "caller": caller, **facts}))
