"""The teacher's service on loopback: who may ask, how much, what is refused, and that nothing is paid twice."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import Tensor

from fedkd.distill import ModuleTeacher
from fedkd.errors import ConfigError
from fedkd.teacher import client as client_module
from fedkd.teacher import teacher_pb2 as pb
from fedkd.teacher.accounts import Accounts, OverBudget
from fedkd.teacher.answers import blur
from fedkd.teacher.client import RemoteError, RemoteTeacher
from fedkd.teacher.policy import AnswersConfig, CallerConfig, Policy, TlsConfig, load_policy, token_hash
from fedkd.teacher.service import SERVICE, TeacherService

Digits = tuple[Tensor, Tensor]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT_SECONDS", 0.01)


def caller(name: str = "alice", **more: object) -> CallerConfig:
    return CallerConfig(name=name, token_sha256=token_hash(f"secret of {name}"), **more)  # type: ignore[arg-type]


def policy(folder: Path, *callers: CallerConfig, **more: object) -> Policy:
    raw = {"listen": "127.0.0.1:0", "callers": callers or (caller(),), "state": folder / "state", **more}
    return Policy.model_validate(raw)


@contextlib.contextmanager
def running(teacher: ModuleTeacher, how: Policy) -> Iterator[TeacherService]:
    with TeacherService(teacher, (1, 8, 8), how) as service:
        yield service


def url(service: TeacherService, folder: Path, name: str = "alice") -> str:
    token = folder / f"{name}.token"
    token.write_text(f"secret of {name}\n")
    return f"grpc://127.0.0.1:{service.port}?token={token}"


def test_a_remote_teacher_answers_as_the_local_one(taught: ModuleTeacher, digits: Digits, tmp_path: Path) -> None:
    x, _ = digits
    with running(taught, policy(tmp_path)) as service:
        remote = RemoteTeacher(url(service, tmp_path), batch=64)
        assert remote.shape == (1, 8, 8) and remote.classes == 10 and remote.answers == "soft labels"
        found = remote.logits(x[:300]).softmax(1)
        assert torch.allclose(found, taught.logits(x[:300]).softmax(1), atol=2e-5)
        assert service.accounts.spent("alice") == len({r.numpy().tobytes() for r in x[:300]})
        with pytest.raises(ConfigError, match="takes inputs"):
            remote.logits(x[:2, :, :4])
        remote.close()


def test_no_query_is_paid_twice(taught: ModuleTeacher, digits: Digits, tmp_path: Path) -> None:
    x, _ = digits
    with running(taught, policy(tmp_path, caller(queries=120))) as service:
        first = RemoteTeacher(url(service, tmp_path), tmp_path / "cache" / "a.sqlite", batch=32)
        assert first.queries_left == 120
        answers = first.logits(x[:100])
        assert first.asked == service.accounts.spent("alice") == 100
        first.logits(x[:100])
        assert first.asked == 100, "what is remembered is not sent"
        first.close()
        again = RemoteTeacher(url(service, tmp_path), tmp_path / "cache" / "a.sqlite")
        assert torch.equal(again.logits(x[:100]), answers) and again.asked == 0
        forgetful = RemoteTeacher(url(service, tmp_path))
        assert torch.equal(forgetful.logits(x[:100]), answers)
        assert forgetful.asked == 100 and service.accounts.spent("alice") == 100, "what was paid for is free again"
        with pytest.raises(RemoteError, match=r"resource exhausted: 21 new inputs asked, 20 of 120 are left to alice"):
            forgetful.logits(x[100:121])
        assert service.accounts.spent("alice") == 100, "a refusal costs nothing"
        forgetful.logits(x[100:120])
    with running(taught, policy(tmp_path, caller(queries=120))) as service:  # a restart forgets nothing
        late = RemoteTeacher(url(service, tmp_path))
        assert late.queries_left == 0
        with pytest.raises(RemoteError, match="0 of 120"):
            late.logits(x[200:201])
        late.logits(x[50:120])


def test_noise_cannot_be_averaged_away(taught: ModuleTeacher, digits: Digits, tmp_path: Path) -> None:
    x, _ = digits
    with running(taught, policy(tmp_path, caller(), caller("bob"), answers=AnswersConfig(noise=0.1))) as service:
        twice = [RemoteTeacher(url(service, tmp_path)).logits(x[:20]) for _ in range(2)]
        assert torch.equal(twice[0], twice[1])
        other = RemoteTeacher(url(service, tmp_path, "bob")).logits(x[:20])
        assert not torch.allclose(twice[0], other, atol=1e-2)


@pytest.mark.parametrize("name", ["mallory", None])
def test_strangers_are_refused(taught: ModuleTeacher, tmp_path: Path, name: str | None, quick: None) -> None:
    with running(taught, policy(tmp_path)) as service:
        address = url(service, tmp_path, name) if name else f"grpc://127.0.0.1:{service.port}"
        with pytest.raises(RemoteError, match="unauthenticated"):
            RemoteTeacher(address)


def raw_ask(service: TeacherService, question: pb.Question) -> grpc.StatusCode:
    with grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        call = channel.stream_stream(f"/{SERVICE}/Answer", pb.Question.SerializeToString, pb.Reply.FromString)
        meta = [("authorization", "Bearer secret of alice")]
        try:
            list(call(iter([question]), metadata=meta, timeout=20))
        except grpc.RpcError as cause:
            return cause.code()  # type: ignore[no-any-return]
    return grpc.StatusCode.OK


def test_malformed_and_huge_input_is_refused_and_the_service_goes_on(
    taught: ModuleTeacher, digits: Digits, tmp_path: Path
) -> None:
    x, _ = digits
    one = x[:1].numpy().astype("<f4").tobytes()
    bad = {
        "nothing": pb.Question(count=0, floats=b""),
        "more than it says": pb.Question(count=1, floats=one * 2),
        "less than it says": pb.Question(count=2, floats=one),
        "a count of 4 billion": pb.Question(count=2**32 - 1, floats=one),
        "over the batch": pb.Question(count=65, floats=one * 65),
        "NaN": pb.Question(count=1, floats=np.full(64, np.nan, "<f4").tobytes()),
        "more pixels than it says": pb.Question(count=1, pixels=bytes(65)),
        "floats as pixels": pb.Question(count=1, pixels=one),
        "neither": pb.Question(count=1),
        "infinity": pb.Question(count=1, floats=np.full(64, -np.inf, "<f4").tobytes()),
        "1e30": pb.Question(count=1, floats=np.full(64, 1e30, "<f4").tobytes()),
    }
    with running(taught, policy(tmp_path, max_batch=64, max_message_bytes=1 << 20)) as service:
        for name, question in bad.items():
            assert raw_ask(service, question) == grpc.StatusCode.INVALID_ARGUMENT, name
        huge = pb.Question(count=64, floats=bytes(2 << 20))
        assert raw_ask(service, huge) == grpc.StatusCode.RESOURCE_EXHAUSTED
        with grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel:
            junk = channel.stream_stream(f"/{SERVICE}/Answer")
            with pytest.raises(grpc.RpcError):
                list(junk(iter([b"\xff" * 1000]), metadata=[("authorization", "Bearer secret of alice")], timeout=20))
        assert service.accounts.spent("alice") == 0
        assert raw_ask(service, pb.Question(count=1, floats=one)) == grpc.StatusCode.OK


def test_pixels_are_answered_as_the_floats_that_they_stand_for(taught: ModuleTeacher, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 1, 8, 8), dtype=np.uint8)
    x = torch.from_numpy(pixels.astype(np.float32) / np.float32(255))
    sizes: list[int] = []
    with running(taught, policy(tmp_path)) as service:
        teacher = RemoteTeacher(url(service, tmp_path))
        inner = teacher._answer

        def watched(stream: Iterator[pb.Question], **more: Any) -> Any:
            return inner((sizes.append(len(q.pixels)) or q for q in stream), **more)  # type: ignore[func-returns-value]

        teacher._answer = watched
        assert torch.allclose(teacher.logits(x).exp(), taught.logits(x).softmax(-1), atol=1e-6)
        assert sum(sizes) == 100 * 64 and service.accounts.spent("alice") == 100
        # The same as floats: nothing is paid twice.
        assert raw_ask(service, pb.Question(count=1, floats=x[:1].numpy().tobytes())) == grpc.StatusCode.OK
        assert service.accounts.spent("alice") == 100


def test_questions_are_no_larger_than_the_service_takes(taught: ModuleTeacher, digits: Digits, tmp_path: Path) -> None:
    """64 values of 4 bytes: 7 inputs fit into 2,048 bytes, however they are sent."""
    pixels = (digits[0][:40] * 15).round() / 255
    with running(taught, policy(tmp_path, max_message_bytes=2048)) as service:
        RemoteTeacher(url(service, tmp_path)).logits(digits[0][:40])
        RemoteTeacher(url(service, tmp_path)).logits(pixels)
        assert service.accounts.spent("alice") == 80
        one = bytes(64)
        assert raw_ask(service, pb.Question(count=8, pixels=8 * one)) == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(ConfigError, match="one input of shape"):
        TeacherService(taught, (1, 32, 32), policy(tmp_path / "other", max_message_bytes=2048))


def test_a_refused_caller_that_keeps_its_stream_open_holds_nobody_up(
    taught: ModuleTeacher, digits: Digits, tmp_path: Path
) -> None:
    one = digits[0][:1].numpy().astype("<f4").tobytes()
    ended = threading.Event()

    def never_done() -> Iterator[pb.Question]:
        yield pb.Question(count=1, floats=one)
        yield pb.Question(count=7, floats=one)
        ended.wait(60)

    with running(taught, policy(tmp_path, streams=1)) as service:
        with grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel:
            ask = channel.stream_stream(f"/{SERVICE}/Answer", pb.Question.SerializeToString, pb.Reply.FromString)
            call = ask(never_done(), metadata=[("authorization", "Bearer secret of alice")], timeout=60)
            with pytest.raises(grpc.RpcError) as refused:
                list(call)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert raw_ask(service, pb.Question(count=1, floats=one)) == grpc.StatusCode.OK
            ended.set()
        deadline = time.monotonic() + 20
        while any(t.name.startswith("ahead") for t in threading.enumerate()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(t.name.startswith("ahead") for t in threading.enumerate())


def test_a_teacher_that_fails_tells_nothing_of_the_inputs_and_charges_nothing(
    taught: ModuleTeacher, digits: Digits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(ModuleTeacher):
        def logits(self, x: Tensor) -> Tensor:
            raise ValueError(f"private {x.sum()}")

    with running(Broken(taught.module, 10, (1, 8, 8)), policy(tmp_path)) as service:
        with pytest.raises(RemoteError, match="internal: the service failed on these inputs: no query is charged"):
            RemoteTeacher(url(service, tmp_path)).logits(digits[0][:5])
        assert service.accounts.spent("alice") == 0
    assert "private" not in caplog.text and '"what": "ValueError"' in caplog.text


def test_accounts_that_cannot_be_written_end_the_answers(
    taught: ModuleTeacher, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(taught, policy(tmp_path)) as service:
        remote = RemoteTeacher(url(service, tmp_path))

        def full(*_: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(service.accounts, "_write", full)
            with pytest.raises(
                RemoteError, match="internal: the service cannot write its accounts: nothing is charged"
            ):
                remote.logits(digits[0][:5])
        assert remote.paid == 0 and service.accounts.spent("alice") == 0


def test_the_rate_is_held_and_waited_for(taught: ModuleTeacher, tmp_path: Path, quick: None) -> None:
    with running(taught, policy(tmp_path, caller(rate=2000))) as service:
        remote = RemoteTeacher(url(service, tmp_path), batch=500)
        began = time.monotonic()
        remote.logits(torch.rand(4000, 1, 8, 8))
        assert time.monotonic() - began >= (4000 - 2000) / 2000 * 0.9, "a second's worth at once, the rest at the rate"
        assert service.accounts.spent("alice") == 4000


def test_health_is_told_to_anybody_and_methods_to_nobody(taught: ModuleTeacher, tmp_path: Path) -> None:
    with running(taught, policy(tmp_path)) as service, grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        said = stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
        assert said.status == health_pb2.HealthCheckResponse.SERVING
        listing = channel.unary_unary("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.RpcError) as seen:
            listing(b"", timeout=10)
        assert seen.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_logs_tell_counts_and_no_content(
    taught: ModuleTeacher, digits: Digits, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fedkd.teacher")
    with running(taught, policy(tmp_path)) as service:
        RemoteTeacher(url(service, tmp_path)).logits(digits[0][:7])
        with pytest.raises(RemoteError):
            RemoteTeacher(url(service, tmp_path, "mallory"))
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "fedkd.teacher"]
    assert {"event": "answered", "caller": "alice", "asked": 7, "charged": 7} in lines
    assert {"event": "refused", "caller": "-", "reason": "identity"} in lines
    assert "secret" not in caplog.text


# ---- TLS ------------------------------------------------------------------------------------------------------------
def test_mutual_tls_tells_callers_by_their_certificates(
    taught: ModuleTeacher, digits: Digits, tmp_path: Path, quick: None, new_ca: Any
) -> None:
    x, _ = digits
    ca, wrong = new_ca(tmp_path / "ca"), new_ca(tmp_path / "wrong")
    certificate, key = ca.issue("server")
    tls = TlsConfig(certificate=certificate, key=key, client_ca=ca.folder / "ca.crt")
    how = policy(tmp_path, CallerConfig(name="alice", certificate="alice"), tls=tls)

    def address(authority: Any, name: str, trust: Any = ca) -> str:
        mine = ""
        if authority is not None:
            cert, own = authority.issue(name)
            mine = f"&cert={cert}&key={own}"
        return f"grpcs://localhost:{service.port}?ca={trust.folder / 'ca.crt'}{mine}"

    with running(taught, how) as service:
        remote = RemoteTeacher(address(ca, "alice"))
        assert torch.allclose(remote.logits(x[:9]).softmax(1), taught.logits(x[:9]).softmax(1), atol=2e-5)
        with pytest.raises(RemoteError, match="unauthenticated"):
            RemoteTeacher(address(ca, "bob"))  # known to the CA, not to the policy
        for stranger in (address(wrong, "alice"), address(None, "alice"), address(ca, "alice", trust=wrong)):
            with pytest.raises(RemoteError, match="unavailable"):
                RemoteTeacher(stranger)
        with pytest.raises(RemoteError, match="unavailable"):
            RemoteTeacher(f"grpc://127.0.0.1:{service.port}")  # in the clear
        remote.logits(x[9:20])
        assert service.accounts.spent("alice") == 20


def test_a_certificate_that_ended_is_refused_and_one_that_soon_will_is_told(
    taught: ModuleTeacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from fedkd.deploy.ca import SERVER, Authority, certificate_pem, key_pem, new_key

    def tls(days: int) -> TlsConfig:
        authority, key = Authority.new("test"), new_key()
        leaf = authority.leaf("teacher", key.public_key(), usage=SERVER, hosts=["localhost"], days=days)
        (tmp_path / "server.crt").write_bytes(certificate_pem(leaf))
        (tmp_path / "server.key").write_bytes(key_pem(key))
        return TlsConfig(certificate=tmp_path / "server.crt", key=tmp_path / "server.key")

    with pytest.raises(ConfigError, match=r"server\.crt ended on .*fedkd teacher init"):
        TeacherService(taught, (1, 8, 8), policy(tmp_path, tls=tls(-1)))
    with running(taught, policy(tmp_path, tls=tls(90))):
        assert "days_left" not in caplog.text
    with running(taught, policy(tmp_path, tls=tls(7))):
        assert '"event": "certificate", "days_left": 6' in caplog.text
    (tmp_path / "server.crt").write_text("nonsense")
    broken = TlsConfig(certificate=tmp_path / "server.crt", key=tmp_path / "server.key")
    with pytest.raises(ConfigError, match="holds no certificate in PEM"):
        TeacherService(taught, (1, 8, 8), policy(tmp_path, tls=broken))


# ---- killed and resumed ---------------------------------------------------------------------------------------------
ASK = """
import sys, torch
from fedkd.teacher import client
client.FIRST_WAIT_SECONDS = 0.05
remote = client.RemoteTeacher(sys.argv[1], __import__("pathlib").Path(sys.argv[2]), batch=10)
x = torch.rand(2000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
print("ready", flush=True)
remote.logits(x)
print("done", remote.asked, flush=True)
"""


def test_a_killed_caller_pays_nothing_twice(taught: ModuleTeacher, tmp_path: Path) -> None:
    cache = tmp_path / "answers.sqlite"
    with running(taught, policy(tmp_path, caller(queries=2000))) as service:
        command = [sys.executable, "-c", ASK, url(service, tmp_path), str(cache)]
        first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert first.stdout is not None and first.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 60
        while service.accounts.spent("alice") < 300 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGKILL)
        first.wait(timeout=30)
        paid = service.accounts.spent("alice")
        assert 300 <= paid < 2000, "it was to be killed half-way"
        second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        asked = int(second.stdout.split()[-1])
        assert service.accounts.spent("alice") == 2000, (
            "the budget is 2,000 for 2,000 inputs: one paid twice would fail"
        )
        assert asked < 2000, "what had arrived before the kill is remembered"


def test_a_service_that_comes_back_is_found_again(
    taught: ModuleTeacher, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT_SECONDS", 0.3)
    x, _ = digits
    with running(taught, policy(tmp_path)) as service:
        port = service.port
        remote = RemoteTeacher(url(service, tmp_path))
        remote.logits(x[:5])
    import threading

    def later() -> None:
        time.sleep(0.5)
        with running(taught, policy(tmp_path, listen=f"127.0.0.1:{port}")):
            done.wait(30)

    done = threading.Event()
    thread = threading.Thread(target=later)
    thread.start()
    try:
        assert remote.logits(x[:10]).shape == (10, 10)
    finally:
        done.set()
        thread.join()


def test_a_service_that_comes_back_as_another_is_not_believed(
    taught: ModuleTeacher, digits: Digits, tmp_path: Path, quick: None
) -> None:
    with running(taught, policy(tmp_path)) as service:
        port = service.port
        remote = RemoteTeacher(url(service, tmp_path))
        remote.logits(digits[0][:5])
    other = policy(tmp_path, listen=f"127.0.0.1:{port}", answers=AnswersConfig(decimals=1))
    with running(taught, other) as service:
        with pytest.raises(RemoteError, match=r"failed precondition: .* by another teacher or policy"):
            remote.logits(digits[0][:10])
        assert remote.paid == service.accounts.spent("alice") == 5


# ---- parts ----------------------------------------------------------------------------------------------------------
def test_accounts_are_all_or_nothing(tmp_path: Path) -> None:
    accounts = Accounts(tmp_path)

    def broken(rows: np.ndarray) -> np.ndarray:
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError):
        accounts.answer("a", "s", [b"1", b"2"], 3, broken, budget=5, rate=None)
    assert accounts.spent("a") == 0
    answered = accounts.answer(
        "a", "s", [b"1", b"2", b"1"], 2, lambda rows: np.stack([rows, rows], 1).astype("f4"), budget=2, rate=None
    )
    assert answered.charged == 2 and answered.release()[:, 0].tolist() == [0, 1, 0] and accounts.spent("a") == 2
    with pytest.raises(OverBudget):
        accounts.answer("a", "s", [b"3"], 2, lambda rows: np.zeros((1, 2), "f4"), budget=2, rate=None)
    accounts.answer("z", "s", [b"3"], 2, lambda rows: np.zeros((1, 2), "f4"), budget=None, rate=0.1)
    with pytest.raises(OverBudget, match="try again"):
        accounts.answer("z", "s", [b"4"], 2, lambda rows: np.zeros((1, 2), "f4"), budget=None, rate=0.1)


def pairs(rows: np.ndarray) -> np.ndarray:
    return np.stack([rows, rows], 1).astype("f4")


def test_an_answer_leaves_only_when_it_and_what_it_repeats_are_charged(tmp_path: Path) -> None:
    accounts = Accounts(tmp_path)
    held, disk = threading.Event(), accounts._pen

    class FullDisk:
        """Waits, so that a second question comes while the first is on its way to the disk, and fails."""

        in_transaction = False

        def execute(self, *words: object) -> None:
            held.wait(30)
            raise sqlite3.OperationalError("database or disk is full")

    accounts._pen = FullDisk()  # type: ignore[assignment]
    first = accounts.answer("a", "s", [b"1", b"2"], 2, pairs, budget=3, rate=None)
    repeated = accounts.answer("a", "s", [b"2"], 2, pairs, budget=3, rate=None)
    assert first.charged == 2 and repeated.charged == 0
    with pytest.raises(OverBudget, match="1 of 3 are left"):
        accounts.answer("a", "s", [b"3", b"4"], 2, pairs, budget=3, rate=None)
    held.set()
    for answered in (first, repeated):
        with pytest.raises(sqlite3.OperationalError, match="full"):
            answered.release()
    accounts._pen = disk
    assert accounts.spent("a") == 0
    again = accounts.answer("a", "s", [b"1", b"2", b"3"], 2, pairs, budget=3, rate=None)
    assert again.release().shape == (3, 2) and accounts.spent("a") == 3
    accounts.close()


def test_a_budget_holds_across_processes_on_one_file(tmp_path: Path) -> None:
    one, other = Accounts(tmp_path), Accounts(tmp_path)
    one.answer("a", "s", [b"1"], 2, pairs, budget=2, rate=None).release()
    other.answer("a", "t", [b"2"], 2, pairs, budget=2, rate=None).release()
    with pytest.raises(OverBudget, match="2 in all"):
        one.answer("a", "s", [b"3"], 2, pairs, budget=2, rate=None).release()
    assert one.spent("a") == other.spent("a") == 2
    with pytest.raises(OverBudget, match="0 of 2 are left"):
        one.answer("a", "s", [b"3"], 2, pairs, budget=2, rate=None)


def test_what_two_streams_ask_at_once_is_made_and_paid_once(tmp_path: Path) -> None:
    accounts, made = Accounts(tmp_path), []

    def slow(rows: np.ndarray) -> np.ndarray:
        made.append(len(rows))
        time.sleep(0.05)
        return np.random.default_rng().random((len(rows), 2)).astype("f4")

    found: list[np.ndarray] = []

    def ask() -> None:
        found.append(accounts.answer("a", "s", [b"1", b"2"], 2, slow, budget=None, rate=None).release())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [2] and accounts.spent("a") == 2 and all((f == found[0]).all() for f in found)


def test_answers_tell_no_more_than_the_policy_says() -> None:
    p = np.array([[0.61, 0.3, 0.06, 0.03], [0.1, 0.2, 0.3, 0.4]])
    assert blur(p, AnswersConfig()) == pytest.approx(p, abs=1e-7)
    assert blur(p, AnswersConfig(kind="top1")).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert blur(p, AnswersConfig(top_k=1))[0] == pytest.approx([0.61, 0.13, 0.13, 0.13], abs=1e-6)
    assert blur(p, AnswersConfig(top_k=2))[0] == pytest.approx([0.61, 0.3, 0.045, 0.045], abs=1e-6)
    assert blur(p, AnswersConfig(decimals=1))[0] == pytest.approx([0.6, 0.3, 0.1, 0.0], abs=1e-6)
    noisy = np.concatenate([blur(p, AnswersConfig(noise=0.01)) for _ in range(400)])
    assert noisy.sum(1) == pytest.approx(1, abs=1e-5) and noisy.min() >= 0
    deviation = noisy[::2, 0].std()
    assert 0.0067 < deviation < 0.015, "2/3 and 3/2 of the noise would be another policy"


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"callers": []}, "callers"),
        ({"callers": [{"name": "a"}]}, "token_sha256, certificate, or both"),
        ({"callers": [{"name": "a", "certificate": "a"}]}, "client_ca"),
        ({"callers": [{"name": "a", "token_sha256": "0" * 64}] * 2}, "two callers"),
        ({"callers": [{"name": "a", "token_sha256": "0" * 64}], "listen": "0.0.0.0:1"}, "without tls"),
        ({"callers": [{"name": "a", "token_sha256": "0" * 64}], "lisen": "x"}, "Did you mean 'listen'"),
        ({"callers": [{"name": "a", "token_sha256": "0" * 64}], "tls": {"certificate": "c", "key": "k"}}, "not beside"),
    ],
)
def test_policies_that_cannot_be_meant_are_refused(raw: dict[str, object], says: str, tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=says):
        load_policy(path)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://localhost:1", "grpcs://host:port"),
        ("grpcs://localhost", "grpcs://host:port"),
        ("grpc://example.org:1", "in the clear"),
        ("grpcs://localhost:1?cacert=x", "unknown cacert"),
        ("grpcs://localhost:1?ca=/none", "cannot read /none"),
    ],
)
def test_addresses_that_cannot_be_meant_are_refused(address: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RemoteTeacher(address)


def test_the_generated_code_is_that_of_the_proto(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    root = Path(client_module.__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", f"-I{root}", f"--python_out={tmp_path}", "fedkd/teacher/teacher.proto"],
        check=True, cwd=root, timeout=60,
    )  # fmt: skip
    fresh = (tmp_path / "fedkd/teacher/teacher_pb2.py").read_text().splitlines()
    held = (root / "fedkd/teacher/teacher_pb2.py").read_text().splitlines()
    assert [r for r in fresh if "AddSerializedFile" in r] == [r for r in held if "AddSerializedFile" in r]
