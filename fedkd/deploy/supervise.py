"""Processes that outlive their caller: pid files that never name a stranger, detaching, stopping, restarting."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedkd.errors import FedkdError
from fedkd.storage import write_json

_PR_SET_PDEATHSIG = 1
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
STEADY_SECONDS = 60.0
"""A process that ran this long has earned the first, short pause again."""


class SuperviseError(FedkdError):
    """A process could not be started, or is running already."""


@dataclass(frozen=True)
class Process:
    """A process, and when it began: a pid alone may have passed on to somebody else."""

    pid: int
    began: float

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """Return the process with that pid, None if there is none."""
        began = started_at(pid)
        return None if began is None else cls(pid, began)

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return started_at(self.pid) == self.began

    def signal(self, number: int) -> None:
        """Send a signal, to this process or to nobody."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def stop(self, patience_seconds: float) -> bool:
        """End the process: a request first, by force after ``patience_seconds``. Returns whether it ran at all."""
        if not self.alive:
            return False
        self.signal(signal.SIGTERM)
        deadline = time.monotonic() + patience_seconds
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.05)
        self.signal(signal.SIGKILL)
        while self.alive:
            time.sleep(0.02)
        return True


def started_at(pid: int) -> float | None:
    """Return when a process began, in clock ticks since boot; None if there is none or it is only waited for.

    Where there is no /proc (macOS) `ps` says it.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else float(fields[19])
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return None
    except OSError:
        return None
    done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    if done.returncode:
        return None
    return time.mktime(time.strptime(done.stdout.strip(), "%a %b %d %H:%M:%S %Y"))


def rss_bytes(pid: int) -> int | None:
    """Return the memory that a process holds, None where that cannot be told."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None


class PidFile:
    """Says who works on a folder, so that nobody starts twice and `stop` ends the right process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Process | None:
        """Return the process that works here, None if nobody does."""
        try:
            found = json.loads(self.path.read_text())
            process = Process(int(found["pid"]), float(found["began"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return process if process.alive else None

    def take(self) -> None:
        """Enter this process.

        Raises:
            SuperviseError: somebody else works here.
        """
        other = self.read()
        if other is not None and other.pid != os.getpid():
            raise SuperviseError(f"{self.path.parent.parent} is in use already, by process {other.pid}")
        own = Process.of(os.getpid())
        assert own is not None
        write_json(self.path, {"pid": own.pid, "began": own.began})

    def leave(self) -> None:
        """Remove the entry if it is this process's."""
        process = self.read()
        if process is None or process.pid == os.getpid():
            self.path.unlink(missing_ok=True)


def stop_process(file: PidFile, patience_seconds: float) -> bool:
    """Stop who works there; returns whether anybody did."""
    process = file.read()
    return process is not None and process.stop(patience_seconds)


def detach(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a command that goes on when this process ends; what it prints is appended to ``log``."""
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=handle,
            start_new_session=True,
            env=dict(environment) if environment is not None else None,
        )
    finally:
        os.close(handle)


def rotate(path: Path, above_bytes: int) -> None:
    """Move what a running process has printed aside, keeping one older part; it goes on appending to the same file."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > above_bytes:
            older = path.with_name(path.name + ".1")
            shutil.copyfile(path, older)
            os.chmod(older, 0o600)
            os.truncate(path, 0)


def environment_of(kit: Path) -> dict[str, str]:
    """Return the environment of Flower's processes: no telemetry, update check, install, or inherited Flower switch.

    ``FEDKD_KIT`` tells an app that Flower starts which kit it works for.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_")}
    here = str(Path(sys.executable).parent)
    return kept | {
        "PATH": os.pathsep.join([here, kept.get("PATH", os.defpath)]),
        "FEDKD_KIT": str(kit),
        "FLWR_HOME": str(kit / "state" / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "PYTHONUNBUFFERED": "1",
    }


def executable(name: str) -> str:
    """Return the path of a command that was installed beside this Python.

    Raises:
        SuperviseError: it was not.
    """
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise SuperviseError(f"the command {name} is missing: reinstall fedkd with its dependencies")
    return found


class Child:
    """A process that is started again whenever it ends, after pauses that grow from 1 s to 60 s."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str], cwd: Path) -> None:
        self.name, self.command, self.log, self.environment, self.cwd = name, list(command), log, environment, cwd
        self.restarts = 0
        self.process: Process | None = None
        self._running: subprocess.Popen[bytes] | None = None
        self._pause = FIRST_PAUSE
        self._begun = self._next = time.monotonic()

    @property
    def up_seconds(self) -> float:
        """How long it has been running; 0 if it is not."""
        return time.monotonic() - self._begun if self._running is not None else 0.0

    def watch(self) -> str | None:
        """Start it if it is time to; returns what happened: "started", "ended with ...", or None."""
        now = time.monotonic()
        if self._running is None:
            if now < self._next:
                return None
            self._start()
            return "started"
        code = self._running.poll()
        if code is None:
            if self.up_seconds > STEADY_SECONDS:
                self._pause = FIRST_PAUSE
            return None
        # Whoever it started must not go on beside its successor.
        _kill_group(self._running.pid)
        self._running, self.process = None, None
        self.restarts += 1
        self._next = now + self._pause
        how = f"signal {-code}" if code < 0 else f"code {code}"
        said = f"ended with {how}, starts again in {self._pause:.0f} s"
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        return said

    def _start(self) -> None:
        handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self._running = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=handle,
                env=dict(self.environment),
                cwd=self.cwd,
                process_group=0,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        except OSError as cause:
            raise SuperviseError(f"cannot start {self.command[0]}: {cause.strerror or cause}") from cause
        finally:
            os.close(handle)
        self.process = Process.of(self._running.pid)
        self._begun = time.monotonic()

    @property
    def log_tail(self) -> str:
        """The last line that it printed."""
        with contextlib.suppress(OSError):
            lines = self.log.read_text(errors="replace").strip().splitlines()
            return lines[-1][:300] if lines else ""
        return ""

    def ask_to_stop(self) -> None:
        """Ask it to end, and do not start it again."""
        self._next = float("inf")
        if self._running is not None:
            with contextlib.suppress(ProcessLookupError):
                self._running.terminate()

    def wait(self, patience_seconds: float) -> None:
        """Wait until it has ended, with all that it started; by force after ``patience_seconds``."""
        if self._running is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._running.wait(patience_seconds)
        _kill_group(self._running.pid)
        self._running.wait()
        self._running, self.process = None, None


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _die_with_parent() -> None:
    """In the child: end when the supervisor does, also when that was killed by force."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
