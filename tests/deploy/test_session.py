"""The README's Deploy door, typed in as it stands there."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest
from devices import until
from session import ROOT, assert_same_student, ended, environment, project, shell

from fedkd.deploy import server
from fedkd.deploy.kit import ServerKit
from fedkd.deploy.supervise import Process

pytestmark = pytest.mark.slow

README = re.compile(r"<!-- deploy -->\n```bash\n(.*?)```", re.S)


def has(source: str) -> bool:
    data = os.environ.get("FEDKD_DATA")
    return source == "digits" or (data is not None and (Path(data) / source).exists())


@pytest.mark.parametrize("source", ["digits", "mnist"])
def test_the_readmes_session_ends_with_the_simulators_student(source: str, tmp_path: Path) -> None:
    if not has(source):
        pytest.skip(f"{source} is not below FEDKD_DATA")
    (script,) = README.findall((ROOT / "README.md").read_text())
    script = script.replace("digits", source)
    shutil.copytree(ROOT / "simulations", tmp_path / "simulations", ignore=shutil.ignore_patterns("__pycache__"))
    project(ROOT / f"server/{source}-trial.yaml", tmp_path)
    with ended(tmp_path):
        said = shell(script, tmp_path)
    run = tmp_path / f"kits/server/state/runs/{source}-trial"
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [(row["answered"], row["failed"], row["quarantined"]) for row in rows] == [(3, None, [])] * 5, said
    assert "round 5/5" in said
    # The devices' own logs: each answered the five rounds (an answer that came late is sent once more, from the outbox).
    for name in ("hospital-a", "hospital-b", "hospital-c"):
        log = (tmp_path / f"kits/{name}/state/logs/client.jsonl").read_text()
        assert set(re.findall(r"round (\d) of \S+ answered", log)) == set("01234"), log
    shell(f"fedkd simulate simulations/{source}-trial.yaml", tmp_path)
    assert_same_student(run, tmp_path / f"runs/{source}-trial")


def watched(command: str, cwd: Path, last: str) -> tuple[subprocess.Popen[str], str]:
    """Start a command at a terminal of its own; returns it, and what it said up to a line with ``last``."""
    process = subprocess.Popen(
        command.split(), cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if last in line:
            return process, said
    raise AssertionError(f"{command} ended before it said {last!r}: {said}")


def left(process: subprocess.Popen[str]) -> str:
    """Press Ctrl-C; returns what the command still said."""
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    return said


def get(port: int, target: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{target}", timeout=10) as answer:
        return str(answer.read().decode())


def assert_logs_keep_silent(kits: Path) -> None:
    """No key, secret or seed in any log of server and clients, SuperLink's and SuperExec's own included."""
    logs = {path: path.read_bytes() for path in kits.glob("*/state/logs/*") if path.is_file()}
    assert {path.name for path in logs} >= {"client.jsonl", "run.jsonl", "gate.jsonl", "server.jsonl", "superlink.log"}
    secret = (kits / "server/superexec.secret").read_bytes()
    secrets = [secret, secret.hex().encode(), base64.b64encode(secret)]
    for path in kits.glob("*/*.key"):
        lines = path.read_bytes().splitlines()
        secrets.append(lines[len(lines) // 2])
    assert len(secrets) > 10 and min(map(len, secrets)) > 30
    for path, text in logs.items():
        assert not [word for word in secrets if word in text], path
        assert b"seed" not in text.lower(), path


def test_an_operators_day(tmp_path: Path) -> None:
    """Left alone, come back to, killed, resumed to the simulator's student; then renewed, joined and revoked."""
    shutil.copytree(ROOT / "simulations", tmp_path / "simulations", ignore=shutil.ignore_patterns("__pycache__"))
    project(ROOT / "server/digits-trial.yaml", tmp_path)
    chosen, name = "simulations/digits-trial.yaml rounds=40", "digits-trial"
    clients = ("hospital-a", "hospital-b", "hospital-c")
    with ended(tmp_path):
        shell("fedkd provision server/digits-trial.yaml && fedkd server start kits/server", tmp_path)
        shell(" && ".join(f"fedkd client start kits/{client}" for client in clients), tmp_path)
        kit = ServerKit.read(tmp_path / "kits/server")

        run, _ = watched(f"fedkd run {chosen} --on kits/server", tmp_path, "round 1/40")
        assert f"fedkd attach {name} --on kits/server" in left(run)
        attached, said = watched(f"fedkd attach {name} --on kits/server", tmp_path, "round 2/40")
        assert "Still running" in left(attached), said

        # A power cut: every process of the server at once, in the middle of the run.
        attached, _ = watched(f"fedkd attach {name} --on kits/server", tmp_path, "round 3/40")
        status = server.status(kit)
        worker = int(json.loads((kit.runs / name / "network.json").read_text())["pid"])
        processes = [Process(int(row["pid"]), float(row["began"])) for row in status["processes"].values()]
        processes += [found for found in [Process.of(worker)] if found is not None]
        for process in processes:
            process.signal(signal.SIGKILL)
        until(lambda: not any(process.alive for process in processes))
        said, _ = attached.communicate(timeout=120)
        assert attached.returncode == 2 and f"fedkd run --resume {name}" in " ".join(said.split()), said
        done = len((kit.runs / name / "rounds.jsonl").read_text().splitlines())
        assert 3 <= done < 40

        said = shell(f"fedkd server start kits/server && fedkd run --resume {name} --on kits/server", tmp_path)
        assert "round 40/40" in said
        rows = [json.loads(line) for line in (kit.runs / name / "rounds.jsonl").read_text().splitlines()]
        assert [(row["round"], row["answered"], row["failed"]) for row in rows] == [(k, 3, None) for k in range(40)]
        shell(f"fedkd simulate {chosen}", tmp_path)
        assert_same_student(kit.runs / name, tmp_path / f"runs/{name}")

        # What an operator's tools see.
        now = json.loads(shell("fedkd server status kits/server --json", tmp_path))
        assert now["ready"] and now["runs"][0]["rounds"] == 40
        assert {row["name"]: row["status"] for row in now["clients"]} == dict.fromkeys(clients, "online")
        assert get(kit.ops_port, "/health/ready") == "ready\n"
        metrics = get(kit.ops_port, "/metrics")
        assert f'fedkd_run_rounds_total{{outcome="completed",run="{name}"}} 40.0' in metrics
        assert f'fedkd_run_epsilon{{run="{name}"}} +Inf' in metrics and "fedkd_server_ready 1.0" in metrics

        # A renewed certificate, a client more and one less; the next run is the others'.
        before = (tmp_path / "kits/hospital-a/client.crt").read_bytes()
        shell("fedkd provision renew hospital-a && fedkd provision add client hospital-d", tmp_path)
        assert (tmp_path / "kits/hospital-a/client.crt").read_bytes() != before
        shell("fedkd client stop kits/hospital-a && fedkd client start kits/hospital-a", tmp_path)
        shell("fedkd provision revoke hospital-b", tmp_path)
        (tmp_path / "kits/hospital-d/data.yaml").write_bytes((tmp_path / "kits/hospital-c/data.yaml").read_bytes())
        shell("fedkd client start kits/hospital-d", tmp_path)
        wanted = {"hospital-a": "online", "hospital-b": "revoked", "hospital-c": "online", "hospital-d": "online"}
        until(lambda: {row["name"]: row["status"] for row in server.status(kit)["clients"]} == wanted, 60)
        shell(
            "fedkd run simulations/digits-trial.yaml rounds=2 partition.clients=4 --name second --on kits/server",
            tmp_path,
        )
        rows = [json.loads(line) for line in (kit.runs / "second/rounds.jsonl").read_text().splitlines()]
        assert [(row["answered"], row["failed"]) for row in rows] == [(3, None), (3, None)]
        assert all({q["client"] for q in row["quarantined"]} <= {1} for row in rows)
    assert_logs_keep_silent(tmp_path / "kits")
