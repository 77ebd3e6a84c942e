"""Scripted sessions: commands as a user types them, against servers and devices on free ports of the loopback."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from devices import free_ports
from safetensors.torch import load_file

from fedkd import simulate

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def environment() -> dict[str, str]:
    """Return what commands run in: this Python's commands first, one thread each."""
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


def shell(script: str, cwd: Path, seconds: float = 400) -> str:
    """Run commands as a user would paste them, the first failure ends them; returns what they said."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{_logs(cwd)}"
    return done.stdout


def _logs(cwd: Path) -> str:
    found = sorted((cwd / "kits").glob("*/state/logs/*"))
    return "\n".join(f"== {p.relative_to(cwd)}\n" + p.read_text(errors="replace")[-3000:] for p in found)


def project(source: Path, cwd: Path, **changes: str) -> Path:
    """Copy a project file to ``cwd``, its ports exchanged for free ones."""
    text = source.read_text()
    for name, port in zip(("port", "control_port", "ops_port"), free_ports(3), strict=True):
        text, found = re.subn(rf"\b{name}: \d+", f"{name}: {port}", text)
        assert found == 1, f"{source} names no {name}"
    target = cwd / source.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return target


@contextlib.contextmanager
def ended(cwd: Path) -> Iterator[None]:
    """End, afterwards, every server and device of ``cwd/kits``, by the pid that its kit names."""
    try:
        yield
    finally:
        from fedkd.deploy import client, server
        from fedkd.deploy.kit import ClientKit, ServerKit

        for folder in sorted((cwd / "kits").glob("*/client.yaml")):
            client.stop(ClientKit.read(folder.parent))
        if (cwd / "kits/server").exists():
            server.stop(ServerKit.read(cwd / "kits/server"))


def assert_same_student(ours: Path, theirs: Path, tolerance: float = 1e-4) -> None:
    """Compare the students of two runs' folders."""
    one, other = load_file(ours / simulate.STUDENT), load_file(theirs / simulate.STUDENT)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance)
