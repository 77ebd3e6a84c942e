"""Who stands still keeps nobody out: half-open, idle and unread streams, of strangers and of callers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import Tensor

from fedkd.distill import ModuleTeacher
from fedkd.teacher import client as client_module
from fedkd.teacher import service as service_module
from fedkd.teacher import teacher_pb2 as pb
from fedkd.teacher.client import RemoteTeacher
from fedkd.teacher.policy import Policy, token_hash
from fedkd.teacher.service import SERVICE, TeacherService

HEALTH = "/grpc.health.v1.Health/"


@contextlib.contextmanager
def running(teacher: ModuleTeacher, folder: Path, names: str = "alice bob", **more: object) -> Iterator[TeacherService]:
    callers = [{"name": n, "token_sha256": token_hash(n)} for n in names.split()]
    raw = {"listen": "127.0.0.1:0", "callers": callers, "state": folder / "state", **more}
    with TeacherService(teacher, (1, 8, 8), Policy.model_validate(raw)) as service:
        yield service


@contextlib.contextmanager
def held(service: TeacherService, method: str, count: int, name: str | None = None) -> Iterator[list[Any]]:
    """Open ``count`` calls that never say anything."""
    done = threading.Event()

    def nothing() -> Iterator[bytes]:
        done.wait(60)
        yield from ()

    with grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        meta = [("authorization", f"Bearer {name}")] if name else []
        open_ = [channel.stream_stream(method)(nothing(), metadata=meta) for _ in range(count)]
        time.sleep(0.2)
        try:
            yield open_
        finally:
            done.set()


def remote(service: TeacherService, folder: Path, name: str) -> RemoteTeacher:
    (folder / name).write_text(name)
    return RemoteTeacher(f"grpc://127.0.0.1:{service.port}?token={folder / name}")


@pytest.mark.parametrize("method", [f"/{SERVICE}/Describe", f"/{SERVICE}/Answer", f"{HEALTH}Check", f"{HEALTH}Watch"])
def test_half_open_calls_of_strangers_keep_no_caller_out(taught: ModuleTeacher, tmp_path: Path, method: str) -> None:
    with running(taught, tmp_path, streams=1) as service, held(service, method, 40):
        began = time.monotonic()
        assert remote(service, tmp_path, "alice").logits(torch.rand(3, 1, 8, 8)).shape == (3, 10)
        assert time.monotonic() - began < 10, "no call of a stranger is waited for"


def test_health_is_told_again_when_half_open_calls_have_been_ended(
    taught: ModuleTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "STRANGERS_SECONDS", 0.3)
    with (
        running(taught, tmp_path) as service,
        held(service, f"{HEALTH}Check", 8) as calls,
        grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        with pytest.raises(grpc.RpcError) as seen:
            stub.Check(request, timeout=10)
        assert seen.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert {c.code() for c in calls} == {grpc.StatusCode.CANCELLED}
        assert stub.Check(request, timeout=10).status == health_pb2.HealthCheckResponse.SERVING


def test_a_caller_has_half_of_the_streams_and_loses_those_that_stand_still(
    taught: ModuleTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT_SECONDS", 0.01)
    x = torch.rand(3, 1, 8, 8)
    with (
        running(taught, tmp_path, streams=4, patience_seconds=0.6) as service,
        held(service, f"/{SERVICE}/Answer", 3, "alice") as calls,
    ):
        refused = [c for c in calls if c.done()]
        assert [c.code() for c in refused] == [grpc.StatusCode.RESOURCE_EXHAUSTED]
        assert "2 streams of alice" in refused[0].details()
        remote(service, tmp_path, "bob").logits(x)
        # Refused at first, and told to try again: by then the idle ones are gone.
        remote(service, tmp_path, "alice").logits(x)
        assert {c.code() for c in calls if c not in refused} == {grpc.StatusCode.CANCELLED}


def test_a_caller_that_takes_no_answers_is_ended(
    taught: ModuleTeacher, digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    part = digits[0][:1024].numpy().astype("<f4")
    question = pb.Question(count=len(part), floats=part.tobytes())

    def many() -> Iterator[pb.Question]:
        for _ in range(3000):
            yield question

    with running(taught, tmp_path, patience_seconds=0.5) as service:
        with grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel:
            ask = channel.stream_stream(f"/{SERVICE}/Answer", pb.Question.SerializeToString, pb.Reply.FromString)
            call = ask(many(), metadata=[("authorization", "Bearer alice")])
            deadline = time.monotonic() + 15
            while (not service._streams._open or service.accounts.spent("alice") == 0) and time.monotonic() < deadline:
                time.sleep(0.01)
            while service._streams._open and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not service._streams._open
            remote(service, tmp_path, "bob").logits(digits[0][:3])
            call.cancel()
        assert service.accounts.spent("alice") == len({r.tobytes() for r in part})


def test_a_stream_that_waits_for_the_service_does_not_stand_still(taught: ModuleTeacher, tmp_path: Path) -> None:
    class Slow(ModuleTeacher):
        def logits(self, x: Tensor) -> Tensor:
            time.sleep(1.0)
            return super().logits(x)

    with running(Slow(taught.module, 10, (1, 8, 8)), tmp_path, patience_seconds=0.2) as service:
        assert remote(service, tmp_path, "alice").logits(torch.rand(3, 1, 8, 8)).shape == (3, 10)
        assert service.accounts.spent("alice") == 3
