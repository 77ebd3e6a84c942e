"""The contenders of the throughput benchmark that run in fedkd's own environment, each in a process of its own.

Started by :mod:`simulations.benchmarks.throughput`; of no use by itself.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

import argparse  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import tempfile  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from dataclasses import replace  # noqa: E402
from functools import lru_cache  # noqa: E402
from importlib.metadata import version  # noqa: E402
from multiprocessing import get_context  # noqa: E402
from multiprocessing.connection import Connection  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from torch import Tensor  # noqa: E402

from simulations.benchmarks.throughput_work import (  # noqa: E402
    BATCH,
    POOL,
    PROXY,
    RATE,
    RECORDS,
    Contender,
    Counts,
    Line,
    Plain,
    Setting,
    Work,
    serve,
)

if TYPE_CHECKING:
    from flwr.app import Context, Message
    from flwr.serverapp import Grid

    from fedkd.experiment import Experiment
    from fedkd.runners.base import Runner
    from fedkd.site import Site

FOREVER = 10**6
"""Rounds of the experiments: the benchmark stops long before, and the last round alone would be evaluated."""
CHECKED = 4
"""Clients whose weights are compared between fedkd's runners."""


# ---- fedkd ----------------------------------------------------------------------------------------------------------
def experiment(
    folder: Path,
    setting: Setting,
    seed: int,
    runner: dict[str, Any],
    dtype: str = "float32",
    clients: int | None = None,
) -> Experiment:
    """Return DS-FL with the benchmark's work, no server training and no evaluation."""
    from fedkd.experiment import validate

    stretch = {"epochs": 1, "batch_size": BATCH, "optimizer": {"lr": RATE}}
    return validate(
        {
            "name": "throughput",
            "seed": seed,
            "rounds": FOREVER,
            "dtype": dtype,
            "algorithm": "ds_fl",
            "data": {"source": "npz", "path": str(folder / POOL), "normalise": "none"},
            "partition": {"kind": "iid", "clients": clients or setting.clients},
            "proxy": {"size": PROXY},
            "models": {"student": setting.model, "devices": setting.model},
            "training": stretch,
            "digest": stretch,
            "server": {"epochs": 0},
            "evaluation": {"every": FOREVER, "local_only": False},
            "runner": runner,
        }
    )


def local_runner(site: Site) -> Runner:
    """Return the runner that `fedkd simulate` would use for the experiment."""
    from fedkd.runners.base import LocalRunner, make_engine

    if site.experiment.runner.threads is not None:
        torch.set_num_threads(site.experiment.runner.threads)
    return LocalRunner(site, make_engine(site, site.experiment.runner.kind))


class Fedkd(Contender):
    """fedkd's own round loop over one of its runners: requests, devices, checks of the answers, aggregation."""

    def __init__(self, site: Site, runner: Runner) -> None:
        from fedkd.engines.base import Engine
        from fedkd.rounds import Rounds

        super().__init__()
        self.site, self.runner = site, runner
        self.clients = len(site.cards)
        self.rounds = Rounds(site, runner, run="throughput")
        self.progress = self.rounds.begin()
        self.warnings: list[str] = []
        warnings.showwarning = lambda message, *rest: self.warnings.append(str(message))
        self._deal = Engine.deal
        self._count()

    def _count(self) -> None:
        """Count where the library deals batches to steps."""
        from fedkd.engines.base import Engine

        deal = self._deal

        def counting(engine: Any, phase: Any, task: Any, count: int) -> Any:
            plan = deal(engine, phase, task, count)
            self.counts.steps += plan.steps
            self.counts.samples += int(plan.sizes.sum())
            return plan

        Engine.deal = counting  # type: ignore[method-assign]

    def counted(self) -> None:
        from fedkd.engines.base import Engine

        Engine.deal = self._deal  # type: ignore[method-assign]

    def round(self) -> None:
        def done(progress: Any, record: dict[str, Any]) -> None:
            if record["answered"] != self.clients:
                raise RuntimeError(f"{record['answered']} of {self.clients} devices answered: {record['quarantined']}")
            self.counts.answered += record["answered"] * PROXY

        self.rounds.play(self.progress, done, until=self.progress.state.round + 1)

    def check(self) -> dict[str, NDArray[Any]]:
        found = {"labels": self.progress.state.knowledge.tensors()["labels"].numpy()}
        store = getattr(self.runner, "store", None)
        for client in range(min(CHECKED, self.clients) if store is not None else 0):
            state = store.load(client, self.progress.state.round).state
            found |= {f"{client}:{name}": t.numpy() for name, t in state.models["model"].items()}
        return found

    def facts(self) -> dict[str, Any]:
        tensors = []
        if (store := getattr(self.runner, "store", None)) is not None:
            state = store.load(0, self.progress.state.round).state
            tensors = [t for model in state.models.values() for t in model.values()]
        return {
            **super().facts(),
            "runner": self.site.experiment.runner.model_dump(mode="json"),
            "state_bytes": sum(t.numel() * t.element_size() for t in tensors),
            "warnings": sorted(set(self.warnings)),
        }


def fedkd(folder: Path, setting: Setting, seed: int, runner: dict[str, Any]) -> Fedkd:
    """Return fedkd in this process."""
    from fedkd.site import Site

    site = Site.load(experiment(folder, setting, seed, runner))
    return Fedkd(site, local_runner(site))


def crowd(folder: Path, setting: Setting, seed: int, runner: dict[str, Any]) -> Fedkd:
    """Return fedkd with many devices, each holding random positions of one small pool of records."""
    from fedkd.data import describe, prepare
    from fedkd.site import Site

    wanted = experiment(folder, setting, seed, runner)
    small = wanted.partition.model_copy(update={"clients": 2})
    federation = prepare(wanted.data, small, wanted.proxy, seed)
    rng = np.random.default_rng(seed)
    train = federation.split.train
    parts = tuple(rng.integers(0, len(train.y), (setting.clients, RECORDS)))
    site = Site(wanted, replace(federation, parts=parts, counts=describe(parts, train.y, train.classes)))
    return Fedkd(site, local_runner(site))


# ---- plain loops ----------------------------------------------------------------------------------------------------
class Loop(Contender):
    """The tuned peer: processes of one thread each, every one looping over its share of the clients."""

    def __init__(self, folder: Path, setting: Setting, processes: int) -> None:
        super().__init__()
        self.clients = setting.clients
        context = get_context("spawn")
        self.pipes, self.workers = [], []
        for rank in range(processes):
            here, there = context.Pipe()
            worker = context.Process(
                target=_loop, args=(there, folder, setting, range(rank, setting.clients, processes)), daemon=True
            )
            worker.start()
            self.pipes.append(here)
            self.workers.append(worker)
        for pipe in self.pipes:
            pipe.recv()
        self.mean = np.zeros(0)

    def round(self) -> None:
        for pipe in self.pipes:
            pipe.send(True)
        total = 0.0
        for pipe in self.pipes:
            answers, steps, samples, answered = pipe.recv()
            total = total + answers
            self.counts.steps += steps
            self.counts.samples += samples
            self.counts.answered += answered
        self.mean = np.asarray(total) / self.clients

    def stop(self) -> None:
        for pipe in self.pipes:
            pipe.send(False)
        for worker in self.workers:
            worker.join()

    def check(self) -> dict[str, NDArray[Any]]:
        return {"mean": self.mean}

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "threads": 1, "processes": len(self.workers)}


def _loop(pipe: Connection, folder: Path, setting: Setting, clients: Sequence[int]) -> None:
    torch.set_num_threads(1)
    work = Work.load(folder, setting)
    plain = Plain(work.net())
    pipe.send(True)
    while pipe.recv():
        counts = Counts()
        total = torch.zeros_like(work.teacher)
        for k in clients:
            total += plain.round(work.x[k], work.y[k], work.proxy, work.teacher, counts)
        pipe.send((total.numpy(), counts.steps, counts.samples, counts.answered))


# ---- Flower ---------------------------------------------------------------------------------------------------------
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray's workers stand back by 15 otherwise, so that whatever else this machine does would slow Flower alone.
    "RAY_worker_niceness": "0",
}
"""Keeps Flower and Ray off the network. Flower reads it at import."""


@lru_cache(maxsize=1)
def _client(folder: str, model: str, shape: str, clients: int) -> tuple[Work, Plain]:
    """Return what a Ray worker keeps from call to call."""
    torch.set_num_threads(1)
    work = Work.load(Path(folder), Setting(model, tuple(int(n) for n in shape.split(",")), clients))
    return work, Plain(work.net())


def flower_client(message: Message, context: Context) -> Message:
    """Flower's client: one call, one client-round. Soft labels come and go as raw arrays, its cheapest record."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

    config = message.content.config_records["work"]
    work, plain = _client(config["folder"], config["model"], config["shape"], config["clients"])
    teacher = torch.from_numpy(message.content.array_records["teacher"]["labels"].numpy())
    k, counts = int(context.node_config["partition-id"]), Counts()
    labels = plain.round(work.x[k], work.y[k], work.proxy, teacher, counts)
    answer = {"labels": Array(labels.numpy())}
    return Message(
        RecordDict({"answer": ArrayRecord(answer), "counts": ConfigRecord(vars(counts))}),
        reply_to=message,
    )


class FlowerLoop(Contender):
    """Flower's server side in a few lines: a message to every node, the mean of the answers."""

    def __init__(self, grid: Grid, folder: Path, setting: Setting) -> None:
        super().__init__()
        self.grid, self.clients = grid, setting.clients
        self.teacher = Work.load(folder, setting).teacher.numpy()
        self.config: dict[str, Any] = {
            "folder": str(folder),
            "model": setting.model,
            "shape": ",".join(map(str, setting.shape)),
            "clients": setting.clients,
        }
        while len(list(grid.get_node_ids())) < self.clients:
            time.sleep(0.05)
        self.mean = np.zeros(0)

    def round(self) -> None:
        from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

        content = RecordDict(
            {"work": ConfigRecord(self.config), "teacher": ArrayRecord({"labels": Array(self.teacher)})}
        )
        waiting = set(self.grid.push_messages([Message(content, n, "train.round") for n in self.grid.get_node_ids()]))
        total, heard = np.zeros_like(self.teacher), 0
        while waiting:
            replies = list(self.grid.pull_messages(list(waiting)))
            for reply in replies:
                waiting.discard(reply.metadata.reply_to_message_id)
                if reply.has_error():
                    raise RuntimeError(f"a Flower client failed: {reply.error.reason}")
                total += reply.content.array_records["answer"]["labels"].numpy()
                counts = reply.content.config_records["counts"]
                heard += 1
                self.counts.steps += int(counts["steps"])
                self.counts.samples += int(counts["samples"])
                self.counts.answered += int(counts["answered"])
            if waiting and not replies:
                time.sleep(0.02)
        self.mean = total / heard

    def check(self) -> dict[str, NDArray[Any]]:
        return {"mean": self.mean}

    def facts(self) -> dict[str, Any]:
        return {"threads": 1, "nodes": self.clients, "flwr": version("flwr"), "ray": version("ray")}


def flower(folder: Path, setting: Setting, play: Callable[[Callable[[], Contender]], None]) -> None:
    """Run ``play`` inside a ServerApp on Flower's simulation engine, with one node per client and one Ray worker per core.

    With fewer nodes Flower would look slower than it is: its engine takes one message per node every tenth of a second.
    """
    os.environ.update({k: v for k, v in QUIET.items() if k not in os.environ})
    import ray
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from simulations.benchmarks import throughput_peers

    server, client, faults = ServerApp(), ClientApp(), []

    # From the importable module, so that Flower ships a name with every call instead of code.
    client.train("round")(throughput_peers.flower_client)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            play(lambda: FlowerLoop(grid, folder, setting))
        except BaseException as fault:
            faults.append(fault)

    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        try:
            run_simulation(
                server_app=server,
                client_app=client,
                num_supernodes=setting.clients,
                backend_config={
                    "init_args": {
                        "num_cpus": cores,
                        "include_dashboard": False,
                        "log_to_driver": False,
                        "logging_level": "ERROR",
                        "object_store_memory": 256 * 2**20,
                        "_temp_dir": scratch,
                    },
                    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                },
            )
        finally:
            if ray.is_initialized():
                ray.shutdown()
    if faults:
        raise faults[0]


def fedkd_on_flower(
    folder: Path, setting: Setting, seed: int, block: int | None, play: Callable[[Callable[[], Contender]], None]
) -> None:
    """Run ``play`` over fedkd's Flower runner, a block of stacked devices per Ray task."""
    from fedkd.runners.flower import run_on_flower
    from fedkd.site import Site

    wanted = experiment(folder, setting, seed, {"kind": "flower", "block": block, "workers": os.cpu_count() or 1})
    site = Site.load(wanted)

    def main(runner: Runner) -> None:
        play(lambda: Fedkd(site, runner))

    with tempfile.TemporaryDirectory(prefix="run-") as scratch:
        run_on_flower(wanted, Path(scratch), main, site=site)


# ---- the machine ----------------------------------------------------------------------------------------------------
class Gemm:
    """Measures float32 matrix products: what the machine could do if training were nothing else."""

    SIZE = 1024

    def __init__(self) -> None:
        self.a, self.b = torch.randn(2, self.SIZE, self.SIZE)
        self.out = torch.empty(self.SIZE, self.SIZE)

    def rate(self, threads: int, seconds: float) -> float:
        """Return GFLOP/s, the best of several stretches."""
        torch.set_num_threads(threads)
        torch.mm(self.a, self.b, out=self.out)
        best, until = 0.0, time.perf_counter() + seconds
        while time.perf_counter() < until:
            t = time.perf_counter()
            for _ in range(4):
                torch.mm(self.a, self.b, out=self.out)
            best = max(best, 4 * 2 * self.SIZE**3 / (time.perf_counter() - t) / 1e9)
        return best


def gemm(line: Line) -> None:
    """Serve measurements of the matrix-product rate, with one thread and with all."""
    made, cores = Gemm(), os.cpu_count() or 1
    line.say({"facts": {"torch": torch.__version__, "size": Gemm.SIZE, "cores": cores, "cpu": platform.processor()}})
    while (order := line.hear()) is not None and order["do"] == "measure":
        line.say({str(n): made.rate(n, order["seconds"]) for n in sorted({1, 2, cores}) if n <= cores})


# ---- the same result ------------------------------------------------------------------------------------------------
def equality(folder: Path, setting: Setting, seed: int, clients: int = 5, rounds: int = 3) -> dict[str, float]:
    """Compare in float64: stacked with serial, and one of serial's client-rounds with the plain loop's.

    Returns:
        The largest absolute difference of weights or answers of each pair.
    """
    from fedkd.rounds import Rounds
    from fedkd.site import Site

    ends: dict[str, Fedkd] = {}
    for kind in ("serial", "stacked"):
        site = Site.load(experiment(folder, setting, seed, {"kind": kind}, "float64", clients))
        ends[kind] = made = Fedkd(site, local_runner(site))
        made.counted()
        for _ in range(rounds):
            made.round()
    one, other = ends["serial"].check(), ends["stacked"].check()
    found = {"stacked - serial": max(float(np.abs(one[name] - other[name]).max()) for name in one)}

    serial = ends["serial"]
    assert isinstance(serial.rounds, Rounds)
    site, state = serial.site, serial.progress.state
    before = serial.runner.store.load(0, state.round).state  # type: ignore[attr-defined]
    teacher = state.knowledge.tensors()["labels"]
    orders: list[Tensor] = []
    from fedkd.engines.base import Engine

    deal = Engine.deal

    def noted(engine: Any, phase: Any, task: Any, count: int) -> Any:
        plan = deal(engine, phase, task, count)
        if task.card.id == 0:
            orders.append(torch.from_numpy(plan.index).reshape(-1))
        return plan

    Engine.deal = noted  # type: ignore[method-assign]
    serial.round()
    Engine.deal = deal  # type: ignore[method-assign]
    after = serial.runner.store.load(0, state.round + 1).state  # type: ignore[attr-defined]
    assert site.proxy_all is not None
    shared, own = orders
    x, y = site.private(0).all()
    assert y is not None
    proxy = site.proxy_all.all()[0]
    work = Work(setting, x, y, proxy, teacher, dict(before.models["model"]))
    net = work.net().double()
    net.load_state_dict(work.start)
    plain = Plain(net)
    # The plain loop answers in the order it was given; here only the weights are compared.
    plain._epoch(proxy[shared], teacher[shared], Counts())
    plain._epoch(x[own], y[own], Counts())
    weights = net.state_dict()
    found["plain - serial"] = max(float((weights[n] - t).abs().max()) for n, t in after.models["model"].items())
    return found


def main() -> None:
    """Become the contender that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--check", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--block", type=int)
    asked = parser.parse_args()
    setting = Setting(asked.model, tuple(int(n) for n in asked.shape.split(",")), asked.clients)
    line = Line(asked.socket)

    def play(make: Callable[[], Contender]) -> None:
        serve(line, make, BEGAN, asked.check)

    kind, work, seed = asked.kind, asked.work, asked.seed
    if kind == "serial":
        play(lambda: fedkd(work, setting, seed, {"kind": "serial", "threads": 1}))
    elif kind == "stacked":
        play(lambda: fedkd(work, setting, seed, {"kind": "stacked", "block": asked.block}))
    elif kind == "crowd":
        play(lambda: crowd(work, setting, seed, {"kind": "stacked", "block": asked.block}))
    elif kind == "loop":
        play(lambda: Loop(work, setting, os.cpu_count() or 1))
    elif kind == "flower":
        flower(work, setting, play)
    elif kind == "fedkd_on_flower":
        fedkd_on_flower(work, setting, seed, asked.block, play)
    elif kind == "gemm":
        gemm(line)
    elif kind == "equality":
        line.say({"facts": {}, "differences": equality(work, setting, seed)})
    else:
        parser.error(f"no contender is called {kind!r}")


if __name__ == "__main__":
    main()
