"""Devices on Flower's simulation engine: blocks of stacked devices on Ray workers.

Flower turns control round: it starts the workers and then calls the server's main. So there are two doors. With
:func:`run_on_flower` the engine is started from this process and calls back with a runner; ``flwr run .`` starts
``server/app.py`` and ``clients/app.py``, which call :func:`serve` and :func:`answer`. Both lead to the same
:class:`FlowerRunner` on one side and the same :class:`Desk` on the other.

Devices keep their state in a folder that the workers share (``<run>/devices``). A message names a run below the root
that a worker was started with; it brings no code, no path outside that root, and no experiment.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from fedkd.client import respond
from fedkd.engines.base import Engine
from fedkd.engines.stacked import Fallback, StackedEngine
from fedkd.errors import ConfigError, FedkdError
from fedkd.experiment import Experiment, RunnerConfig, load, read_yaml, validate
from fedkd.messages import Reply, Request

# Before Flower itself: it sets the switches that Flower reads when it is imported.
from fedkd.runners.flower_grid import ACTION, Asker, GridError, Order, pack_replies, unpack_order  # isort: skip
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedkd.privacy.build import open_ledger
from fedkd.runners.base import Inspection, Runner, inspect
from fedkd.site import Site
from fedkd.storage import write_atomic, write_json
from fedkd.store import FolderStore
from fedkd.virtual.work import work

T = TypeVar("T")

DEVICES, EXPERIMENT = "devices", "experiment.yaml"
PREDICTORS_PER_BLOCK = 64
NODES_PER_WORKER = 4
"""Flower hands a node one message per tenth of a second, so that a few nodes per worker keep the workers busy."""
WORKER_OPTIONS: Mapping[str, float] = {"max_restarts": 100, "max_task_retries": 1}
"""Flower hands them to Ray's `options`. Without restarts one crash of a worker spoils Flower's pool; without a retry a
block that meets a worker on its way back up looks as if it had crashed it."""
OBJECT_STORE_BYTES = 256 * 2**20
MAX_END_SECONDS = 10.0
log = logging.getLogger("flwr")


class Devices(FolderStore):
    """The devices of a run, each in a folder of its own.

    Several rounds are kept: a run may fall back to its oldest checkpoint, and must find its devices as they were then.
    """

    def __init__(self, run_folder: Path, experiment: Experiment) -> None:
        keep = experiment.checkpoint.every * experiment.checkpoint.keep + 1
        # The oldest checkpoint of a run in virtual time may hold a request that was still waiting for its device.
        super().__init__(run_folder / DEVICES, keep=keep + (experiment.virtual is not None))


# ---- the worker -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Desk:
    """What a worker process keeps at hand from block to block."""

    site: Site
    engine: Engine
    store: FolderStore

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        """Let a block of devices work; an exception in one device's work stays with that device."""
        try:
            return respond(self.site, self.engine, self.store, requests)
        except Exception:
            # Who of a stack it was cannot be told from outside. A device's state before this round is still there, so
            # that each can be asked once more by itself.
            return [self._alone(request) for request in requests]

    def _alone(self, request: Request) -> Reply:
        try:
            return respond(self.site, self.engine, self.store, [request])[0]
        except Exception as cause:
            reason = " ".join("".join(traceback.format_exception_only(cause)).split())
            return Reply(request.client, request.round, None, reason)


@lru_cache(maxsize=1)
def desk(root: Path, run: str, experiment_hash: str) -> Desk:
    """Read the experiment that lies in a run's folder, and its data: once per process and run.

    Raises:
        FedkdError: the folder is none of this root's, or holds another experiment, or the data cannot be read.
    """
    folder = (root / run).resolve()
    if not folder.is_relative_to(root.resolve()):
        raise GridError(f"run {run!r} lies outside {root}: a server may name runs below it only")
    path = folder / DEVICES / EXPERIMENT
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as cause:
        raise GridError(f"cannot read {path}: workers and server need to share the run's folder") from cause
    if digest(text) != experiment_hash:
        raise GridError(f"{path} is not the experiment that the server runs: start the run again")
    experiment = validate(read_yaml(path))
    # As many processes as the experiment has workers share the cores: each takes what Ray gave it and no more.
    torch.set_num_threads(experiment.runner.threads or max(1, int(experiment.runner.num_cpus)))
    site = Site.load(experiment)
    open_ledger(site, folder)
    return Desk(site, StackedEngine(site), Devices(folder, experiment))


def answer(message: Message, root: Path) -> Message:
    """Handle a message on a worker whose runs lie below ``root``."""
    order = unpack_order(message.content)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", Fallback)
        try:
            replies = desk(root, order.run, order.experiment).respond(order.requests)
        except FedkdError as cause:
            replies = [Reply(r.client, r.round, None, str(cause)) for r in order.requests]
    notes = list(dict.fromkeys(str(w.message) for w in seen))
    return Message(pack_replies(replies, notes, reveal_losses=True), reply_to=message)


def digest(text: str) -> str:
    """Return the hash by which a message names an experiment."""
    return hashlib.sha256(text.encode()).hexdigest()


# ---- the server -----------------------------------------------------------------------------------------------------
class FlowerRunner(Runner):
    """Carries rounds to Flower's workers. Lives in the server's process, which shares the run's folder with them."""

    name = "flower"

    def __init__(self, site: Site, asker: Asker, root: Path, run: str = ".") -> None:
        """Put the experiment where the workers look for it: ``<root>/<run>/devices``."""
        self.site, self.run, self._asker = site, run, asker
        folder = root / run
        self.store = Devices(folder, site.experiment)
        self.engine = StackedEngine(site)
        text = site.experiment.dump()
        self.store.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.store.folder / EXPERIMENT, text.encode())
        self._experiment = digest(text)
        self._begun = False
        self._warned: set[str] = set()

    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        self._clear(requests)
        yield from self._asker.ask([Order(self.run, self._experiment, block) for block in self.blocks(requests)])
        for note in self._asker.notes:
            if note not in self._warned:
                self._warned.add(note)
                warnings.warn(note, Fallback, stacklevel=2)

    def blocks(self, requests: Sequence[Request]) -> list[tuple[Request, ...]]:
        """Split requests into blocks of one architecture, small enough that every worker gets one.

        They depend on the experiment alone, never on the machine, so that a run gives the same numbers everywhere.
        """
        groups: dict[str, list[Request]] = {}
        for request in requests:
            groups.setdefault(self.site.cards[request.client].architecture, []).append(request)
        fair = -(-len(requests) // self.site.experiment.runner.workers)
        blocks = []
        for architecture, members in groups.items():
            stack = self._stack_size(architecture, self.site.cards[members[0].client].gradients)
            size = max(1, min(stack, fair))
            blocks += [tuple(members[start : start + size]) for start in range(0, len(members), size)]
        return blocks

    def _stack_size(self, architecture: str, gradients: bool) -> int:
        return self.engine.block_size(architecture) if gradients else PREDICTORS_PER_BLOCK

    def _clear(self, requests: Sequence[Request]) -> None:
        """Drop what an interrupted or an older run left behind for the rounds to come: it is none of this run's."""
        if not self._begun and requests:
            self._forget(min(request.round for request in requests) - 1)
            self._begun = True

    def work(self, requests: Sequence[Request]) -> list[float]:
        self._clear(requests)
        return work(self.site, self.engine, self.store, requests)

    def inspect(self, clients: Sequence[int], round: int) -> Inspection | None:
        return inspect(self.site, self.engine, self.store, clients, round)

    def restore(self, files: Mapping[str, bytes], round: int, waiting: Mapping[int, int]) -> None:
        self._forget(round)
        for client, asked in waiting.items():
            self.store.forget_after(asked - 1, [client])
        self._begun = True

    def _forget(self, round: int) -> None:
        self.store.forget_after(round, [card.id for card in self.site.cards])


# ---- the first door: the engine inside this process -------------------------------------------------------------------
class Session:
    """A running simulation engine, which serves any number of runs below one root, one after the other."""

    def __init__(self, grid: Grid, root: Path, stop: threading.Event | None = None, nodes_expected: int = 1) -> None:
        self._grid, self._root, self._stop, self._nodes = grid, root, stop, nodes_expected

    def runner(self, site: Site, run: str = ".") -> FlowerRunner:
        """Return a runner for ``site``, whose run lies in the folder ``run`` below the root."""
        return FlowerRunner(site, Asker(self._grid, stop=self._stop, nodes_expected=self._nodes), self._root, run)


def run_on_flower(experiment: Experiment, folder: Path, body: Callable[[Runner], T], *, site: Site | None = None) -> T:
    """Start Flower's simulation engine, call ``body`` with a runner inside its server, and end the engine.

    Args:
        experiment: says how many workers there are.
        folder: the run's folder; devices keep their state in ``devices`` below it.
        body: runs the rounds. It runs in a thread of its own; Ctrl-C raises KeyboardInterrupt in it at the next
            question to a device, as a runner in this process would.
        site: the experiment's site, if it is loaded already.
    Returns:
        What ``body`` returns.
    Raises:
        Whatever ``body`` raises.
        GridError: the engine did not start, or broke down.
    """
    at_hand = site if site is not None else Site.load(experiment)
    return in_session(lambda session: body(session.runner(at_hand)), folder, experiment.runner)


def in_session(body: Callable[[Session], T], root: Path, settings: RunnerConfig | None = None) -> T:
    """Start the engine once for several runs below ``root``; otherwise as :func:`run_on_flower`.

    ``settings`` says how many workers there are and what Ray gives each. With ``ray_address`` they spread over a cluster
    that is up; its machines share the folder ``root``, the data, and an installation of this library.
    """
    import ray
    from flwr.simulation import run_simulation

    root = root.resolve()
    outcome = _Outcome[T]()
    settings = settings if settings is not None else RunnerConfig()
    nodes = NODES_PER_WORKER * settings.workers

    def main(grid: Grid, context: Context) -> None:
        outcome.fill(lambda: body(Session(grid, root, outcome.stop, nodes)))

    server = ServerApp()
    server.main()(main)
    init: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    owned = not ray.is_initialized()
    # A short name: the paths of the sockets below it may have 107 characters at most.
    scratch_folder = tempfile.TemporaryDirectory(prefix="fkd-", ignore_cleanup_errors=True)
    with _same_environment(), _quiet_flower(outcome.stop), _orderly_end(outcome.stop), scratch_folder as scratch:
        if settings.ray_address is not None:
            init["address"] = settings.ray_address
        else:
            init |= {"num_cpus": math.ceil(settings.workers * settings.num_cpus), "_temp_dir": scratch}
            init |= {"object_store_memory": OBJECT_STORE_BYTES}
        try:
            run_simulation(
                server_app=server,
                client_app=client_app(root),
                num_supernodes=nodes,
                backend_config={
                    "init_args": init,
                    "client_resources": {
                        "num_cpus": settings.num_cpus,
                        "num_gpus": settings.num_gpus,
                        **WORKER_OPTIONS,
                    },
                },
            )
        except KeyboardInterrupt as interrupt:
            return outcome.take(interrupt)
        except Exception as cause:
            return outcome.take(cause)
        finally:
            outcome.stop.set()
            if owned and ray.is_initialized():
                ray.shutdown()
    return outcome.take(None)


def client_app(root: Path) -> ClientApp:
    """Return the app of workers whose runs lie below ``root``. It travels with every message, so it holds a path alone."""

    def handle(message: Message, context: Context) -> Message:
        return answer(message, root)

    app = ClientApp()
    app.train(ACTION.removeprefix("train."))(handle)
    return app


class _Outcome(Generic[T]):
    """What became of the body, which runs in the server's thread."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._begun, self._ended = threading.Event(), threading.Event()
        self._values: list[T] = []
        self._error: BaseException | None = None

    def fill(self, body: Callable[[], T]) -> None:
        """Run the body. Flower reports an Exception late and wrapped, and nothing else at all: keep it ourselves."""
        self._begun.set()
        try:
            self._values.append(body())
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def take(self, failure: BaseException | None) -> T:
        """Wait for the body; return its value or raise its error, or else what ended the engine."""
        self.stop.set()
        if self._begun.is_set():
            self._ended.wait()
        if self._values:
            return self._values[0]
        own = self._error
        # A body that was merely told to stop did not cause the end: say what did.
        if own is not None and (failure is None or not isinstance(own, KeyboardInterrupt)):
            raise own
        if isinstance(failure, KeyboardInterrupt):
            raise failure
        reason = f": {_root_cause(failure)}" if failure is not None else ""
        raise GridError(f"Flower's simulation engine ended before the run did{reason}") from failure


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:500]


@contextlib.contextmanager
def _same_environment() -> Iterator[None]:
    """Undo what Flower and Ray change in the environment of this process."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONBREAKPOINT", "OMP_NUM_THREADS")}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet_flower(stop: threading.Event) -> Iterator[None]:
    """Drop Flower's notice that `run_simulation` will go one day: the version is pinned. And what it says when stopped.

    Other messages stay.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not stop.is_set() and "run_simulation" not in record.getMessage()

    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)


@contextlib.contextmanager
def _orderly_end(stop: threading.Event) -> Iterator[None]:
    """Let Ctrl-C end the engine at any time without a worker or a thread left behind.

    While Ray comes up, an interrupt is kept until it is up, because Ray broken off half-way crashes when the interpreter
    exits. Later on the busy workers are ended as well: Flower asks only the idle ones to leave, and the thread that
    waits for a busy one would wait for ever.
    """
    import ray
    from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend

    build, terminate = RayBackend.build, RayBackend.terminate
    up = threading.Event()

    def build_and_tell(backend: Any, app_fn: Callable[[], ClientApp]) -> None:
        build(backend, app_fn)
        up.set()

    def terminate_all(backend: Any) -> None:
        stop.set()
        if backend.pool is not None and ray.is_initialized():
            working: dict[Any, Any] = backend.pool._future_to_actor
            # Idle ones too: asked to leave, as Flower asks them, they look to Ray as if they had failed, which it tells.
            for actor in [*working.values(), *backend.pool.pool]:
                ray.kill(actor)
            backend.pool.pool.clear()
            end = time.monotonic() + MAX_END_SECONDS
            while working and time.monotonic() < end:
                time.sleep(0.02)
        terminate(backend)

    def interrupted(number: int, frame: Any) -> None:
        if up.is_set() or stop.is_set():
            signal.default_int_handler(number, frame)
        stop.set()

    mine = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    RayBackend.build, RayBackend.terminate = build_and_tell, terminate_all
    if mine:
        signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        RayBackend.build, RayBackend.terminate = build, terminate
        if mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)


# ---- the second door: `flwr run .` ------------------------------------------------------------------------------------
def serve(grid: Grid, context: Context, home: Path) -> None:
    """Run the experiment that the run's configuration names; ``home`` is the app's own folder.

    ``experiment``: a YAML file, looked up in the working folder and then in ``home``; empty is the built-in one.
    ``run``: the run's folder, empty for ``runs/flower-<id of the run>``; one that holds a run is resumed.
    """
    from fedkd import simulate

    folder = run_folder(context)
    if (folder / simulate.CONFIG).is_file():
        experiment = validate(read_yaml(folder / simulate.CONFIG))
    else:
        experiment = _named_experiment(str(context.run_config.get("experiment", "")), home)
    session = Session(grid, folder)
    site = Site.load(experiment)
    if site.method.pools_data:
        raise ConfigError(f"{site.method.name} pools everybody's records: run it by `fedkd simulate`")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / simulate.CONFIG, experiment.dump().encode())
    write_json(folder / simulate.PARTITION, simulate._partition(site))
    finished = simulate.play(site, session.runner(site), folder, _tell)
    log.info("the run lies in %s", finished.folder)


def run_folder(context: Context) -> Path:
    """Return the folder of a run that was started by ``flwr run``; server and workers find the same one."""
    named = str(context.run_config.get("run", ""))
    return Path(named).absolute() if named else Path.cwd() / "runs" / f"flower-{context.run_id}"


def _named_experiment(named: str, home: Path) -> Experiment:
    if not named:
        return load(None, ["runner.kind=flower"])[0][1]
    given = Path(named)
    path = given if given.is_file() or given.is_absolute() else home / given
    return load(path, ["runner.kind=flower"])[0][1]


def _tell(record: Mapping[str, Any], rounds: int) -> None:
    log.info("round %d of %d: student %s", record["round"] + 1, rounds, record["student_accuracy"])
