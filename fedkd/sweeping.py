"""Points of a sweep side by side: processes that divide the cores among themselves.

A process plays one point after another. It is told of them by lines on its standard input and tells of their rounds by
lines of JSON on its standard output. When its input ends, because the sweep is stopped or its parent is gone, it stops
as Ctrl-C would stop it, and leaves a point that can be gone on with.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from fedkd.errors import FedkdError

PATIENCE_SECONDS = 60.0
"""Time for processes to write down that they were stopped; then they are killed, which loses a round and no more."""

Heard = Callable[[Path, Mapping[str, Any]], None]


class PointNote(UserWarning):
    """What a process of a sweep warned of."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- the parent -----------------------------------------------------------------------------------------------------
class _Worker:
    """One process, and the point that it is at."""

    def __init__(self, threads: int, messages: SimpleQueue[tuple[_Worker, dict[str, Any] | None]]) -> None:
        # What users' models and methods are imported by is set on this process alone.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        self.folder: Path | None = None
        self._messages = messages
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedkd.sweeping"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, encoding="utf-8",
            # So that Ctrl-C at a terminal reaches the parent alone, which then ends all in order.
            start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()

    def give(self, folder: Path) -> None:
        """Let the process play the point in ``folder``."""
        self.folder = folder
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(str(folder.resolve())) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # its end is told by the listener

    def stop(self) -> None:
        """Tell the process that no more will come: it ends at once."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            return

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._messages.put((self, json.loads(line)))
        self.process.wait()
        self._messages.put((self, None))


def play_side_by_side(
    folders: Sequence[Path], jobs: int, threads: int, begun: Callable[[Path], None], heard: Heard
) -> dict[Path, str]:
    """Play the points in ``folders``, ``jobs`` at a time; return why points failed, by folder.

    Args:
        threads: of each process.
        begun: called when a point begins.
        heard: called with every round of a point: {"row": its record, "rounds": how many there will be}.
    Raises:
        Whatever ``begun`` and ``heard`` raise, and KeyboardInterrupt; all processes have ended then.
    """
    messages: SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = SimpleQueue()
    waiting, failed = deque(folders), {}
    workers: list[_Worker] = []
    busy: set[_Worker] = set()

    def next_for(worker: _Worker | None) -> None:
        if not waiting:
            return
        if worker is None:
            worker = _Worker(threads, messages)
            workers.append(worker)
        busy.add(worker)
        folder = waiting.popleft()
        begun(folder)
        worker.give(folder)

    try:
        for _ in range(min(jobs, len(folders))):
            next_for(None)
        while busy:
            worker, message = messages.get()
            folder = worker.folder
            if folder is None or worker not in busy:
                continue
            if message is None:
                busy.discard(worker)
                failed[folder] = f"its process ended with code {worker.process.returncode}"
                next_for(None)
            elif "row" in message:
                heard(folder, message)
            elif "note" in message:
                warnings.warn(f"{folder.name}: {message['note']}", PointNote, stacklevel=2)
            else:
                busy.discard(worker)
                if message["error"] is not None:
                    failed[folder] = str(message["error"])
                next_for(worker)
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            try:
                worker.process.wait(PATIENCE_SECONDS)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                worker.process.kill()
                worker.process.wait()
    return failed


# ---- the process ----------------------------------------------------------------------------------------------------
class _Orders:
    """The lines of standard input, and what their end means."""

    def __init__(self) -> None:
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self.playing = self.over = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self._lines.put(line)
        self.over = True
        # Looked at first: whoever waits for a line has nothing to be interrupted in.
        playing = self.playing
        self._lines.put(None)
        if playing:
            os.kill(os.getpid(), signal.SIGINT)

    def next(self) -> Path | None:
        """Return the next point's folder, or None when there is none."""
        self.playing = False
        line = self._lines.get()
        # In this order, so that an end that comes in between is seen by one side at least.
        self.playing = True
        return None if line is None or self.over else Path(json.loads(line))


def main() -> int:
    """Play points until standard input ends."""
    # Models that print must not break into the lines that the parent reads.
    told = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def tell(message: Mapping[str, Any]) -> None:
        told.write(json.dumps(message) + "\n")

    def note(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
        if category.__module__.startswith("fedkd"):
            tell({"note": str(message)})

    from fedkd import simulate

    warnings.showwarning = note
    orders = _Orders()
    try:
        while (folder := orders.next()) is not None:
            error = None
            try:
                simulate.play_point(folder, lambda row, rounds: tell({"row": row, "rounds": rounds}))
            except FedkdError as cause:
                error = str(cause)
            except Exception as cause:
                traceback.print_exc()
                error = repr(cause)
            tell({"error": error})
    except (KeyboardInterrupt, BrokenPipeError):
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
