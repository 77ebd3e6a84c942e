"""A service that lies, and one that is busy: what a caller believes, how long it waits, and what it says."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from fedkd.distill import ModuleTeacher
from fedkd.teacher import client as client_module
from fedkd.teacher import teacher_pb2 as pb
from fedkd.teacher.client import RemoteError, RemoteTeacher
from fedkd.teacher.policy import Policy, token_hash
from fedkd.teacher.service import SERVICE, TeacherService

GOOD: dict[str, Any] = {"shape": [1, 8, 8], "classes": 3, "identity": "x", "max_batch": 4, "max_bytes": 1 << 20}
Answer = Callable[[Iterator[Any], Any], Iterator[Any]]


def even(count: int) -> bytes:
    return np.full((count, 3), 1 / 3, "<f4").tobytes()


@contextlib.contextmanager
def lying(answer: Answer, **says: Any) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    handlers = {
        "Describe": grpc.unary_unary_rpc_method_handler(
            lambda request, context: pb.Description(**GOOD | says),
            pb.DescribeRequest.FromString, pb.Description.SerializeToString,
        ),
        "Answer": grpc.stream_stream_rpc_method_handler(answer, pb.Question.FromString, pb.Reply.SerializeToString),
    }  # fmt: skip
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.stop(None).wait(5)


def honest(questions: Iterator[Any], context: Any) -> Iterator[Any]:
    for q in questions:
        yield pb.Reply(id=q.id, probabilities=even(q.count))


@pytest.mark.parametrize(
    "says",
    [
        {"classes": 1},
        {"classes": 2**31},
        {"shape": []},
        {"shape": [0, 8, 8]},
        {"shape": [2**20, 2**20]},
        {"shape": [1] * 1000},
        {"max_batch": 0},
        {"max_bytes": 255},
        {"identity": ""},
        {"identity": "x\ny"},
    ],
    ids=str,
)
def test_a_description_that_no_teacher_can_have_is_refused(says: dict[str, Any]) -> None:
    with lying(honest, **says) as url, pytest.raises(RemoteError, match="no teacher can be so"):
        RemoteTeacher(url)


def test_what_a_service_says_of_its_answers_obeys_no_terminal() -> None:
    with lying(honest, answers="\x1b[2J\nsoft" + "x" * 9000) as url:
        assert RemoteTeacher(url).answers.startswith(" [2J soft") and len(RemoteTeacher(url).answers) == 300


def endless(questions: Iterator[Any], context: Any) -> Iterator[Any]:
    first = next(questions)
    for i in itertools.count():
        if not context.is_active():
            return
        yield pb.Reply(id=i, probabilities=even(first.count))


def one_early(questions: Iterator[Any], context: Any) -> Iterator[Any]:
    first = next(questions)
    yield pb.Reply(id=0, probabilities=even(first.count))


LIES: dict[str, tuple[Answer, str]] = {
    "the wrong id": (lambda qs, c: (pb.Reply(id=7, probabilities=even(q.count)) for q in qs), "answered question 7"),
    "too few bytes": (lambda qs, c: (pb.Reply(id=q.id, probabilities=b"abc") for q in qs), "sent 3 bytes for 4"),
    "too many": (lambda qs, c: (pb.Reply(id=q.id, probabilities=even(400)) for q in qs), "sent 4800 bytes for 4"),
    "NaN": (lambda qs, c: (pb.Reply(id=q.id, probabilities=b"\xff" * 12 * q.count) for q in qs), "no probabilities"),
    "all 0": (lambda qs, c: (pb.Reply(id=q.id, probabilities=bytes(12 * q.count)) for q in qs), "no probabilities"),
    "no end": (endless, r"answered question \d+, expected \d+"),
    "an early end": (one_early, "early"),
    "nothing": (lambda qs, c: iter(()), "ended its answers"),
}


@pytest.mark.parametrize("lie", LIES)
def test_answers_that_cannot_be_are_refused_and_not_remembered(lie: str, tmp_path: Path) -> None:
    answer, why = LIES[lie]
    with lying(answer) as url:
        remote = RemoteTeacher(url, tmp_path / "cache.sqlite")
        with pytest.raises(RemoteError, match=why):
            remote.logits(torch.rand(8, 1, 8, 8))
        assert remote.paid <= 8 - 4 * (lie != "no end")
        remote.close()


def test_a_service_that_always_ends_the_call_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT_SECONDS", 0.001)

    def gone(questions: Iterator[Any], context: Any) -> Iterator[Any]:
        context.cancel()
        yield from ()

    with lying(gone) as url, pytest.raises(RemoteError, match="cancelled"):
        RemoteTeacher(url).logits(torch.rand(2, 1, 8, 8))


def test_a_caller_waits_as_long_as_it_is_told_and_no_longer(
    taught: ModuleTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT_SECONDS", 0.0001)
    caller = {"name": "alice", "token_sha256": token_hash("alice"), "rate": 100}
    (tmp_path / "token").write_text("alice")
    raw = {"listen": "127.0.0.1:0", "callers": [caller], "state": tmp_path / "state"}
    with TeacherService(taught, (1, 8, 8), Policy.model_validate(raw)) as service:
        url = f"grpc://127.0.0.1:{service.port}?token={tmp_path / 'token'}"
        began = time.monotonic()
        RemoteTeacher(url, batch=100).logits(torch.rand(200, 1, 8, 8))
        assert time.monotonic() - began > 0.8, "a second's worth at once, the rest at the rate"

    def slow(questions: Iterator[Any], context: Any) -> Iterator[Any]:
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "try again in 999999999.9 s")
        yield from ()

    with lying(slow) as url, pytest.raises(RemoteError, match="too long to wait for"):
        RemoteTeacher(url).logits(torch.rand(2, 1, 8, 8))
