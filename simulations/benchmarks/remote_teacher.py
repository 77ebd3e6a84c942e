"""A teacher over loopback TLS against the same in one process: ``python -m simulations.benchmarks.remote_teacher``.

Labels ``--images`` images once with the teacher in this process and once with `fedkd teacher serve` in a process of its
own (TLS, token, accounts synced to disk, caller's cache on disk), at several batch sizes, interleaved; prints medians
of images/s and the median of the ratios of the passes, and kills a caller half-way to count what its resumption pays. One
thread each. Two cores share caches and clocks: the rate in this process beside a process that hashes on the other core says
how much of the difference is theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd.data import load as load_data
from fedkd.data.config import DataConfig
from fedkd.distill.teachers import load_teacher
from fedkd.models import Architecture
from fedkd.storage import pack_tensors, write_atomic
from fedkd.teacher.client import RemoteTeacher
from simulations.tables import HERE, made_with

BATCHES = (64, 256)
MODELS = ("lenet", "cnn(channels=[32, 64], features=128)")
BUSY = "import hashlib\nrows = b'x' * 3136\nwhile True: hashlib.sha256(rows)"
ASK = """
import sys, numpy as np, torch
from pathlib import Path
from fedkd.teacher.client import RemoteTeacher
remote = RemoteTeacher(sys.argv[1], Path(sys.argv[2]), batch=256)
remote.logits(torch.from_numpy(np.load(sys.argv[3])))
print(remote.asked)
"""


class Service:
    """`fedkd teacher serve` in a process of its own; ends it by its id."""

    def __init__(self, model: Path, folder: Path) -> None:
        command = [sys.executable, "-m", "fedkd", "teacher", "serve", str(model), "--policy", f"{folder}/policy.yaml"]
        subprocess.run(
            [sys.executable, "-m", "fedkd", "teacher", "init", str(folder), "--listen", "127.0.0.1:0"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        # Every pass asks afresh, so that the budget is that of all of them.
        rules = (folder / "policy.yaml").read_text().replace("queries: 100000", "queries: 1000000000")
        (folder / "policy.yaml").write_text(rules)
        self._log = (folder / "log").open("w")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self.process.stdout is not None
        self.folder, self.url = folder, ""
        while not self.url.startswith("grpcs://"):
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit(f"the service did not start: {(folder / 'log').read_text()[-500:]}")
            self.url = line.strip()

    def paid(self) -> int:
        """Return how many queries were charged so far."""
        with sqlite3.connect(f"file:{self.folder}/state/accounts.sqlite?mode=ro", uri=True) as db:
            row = db.execute("SELECT SUM(queries) FROM totals").fetchone()
        return int(row[0] or 0)

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait(timeout=30)
        self._log.close()


def local_rate(teacher: Any, x: Tensor, batch: int) -> float:
    """Images per second of the teacher in this process."""
    started = time.perf_counter()
    for part in x.split(batch):
        teacher.logits(part)
    return len(x) / (time.perf_counter() - started)


def crowded_rate(teacher: Any, x: Tensor, batch: int) -> float:
    """Images per second of the teacher in this process while another process keeps a core busy."""
    busy = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        time.sleep(0.2)
        return local_rate(teacher, x, batch)
    finally:
        busy.kill()
        busy.wait(timeout=30)


def remote_rate(url: str, x: Tensor, batch: int, cache: Path) -> float:
    """Images per second of the service, with an empty cache on the caller's side."""
    remote = RemoteTeacher(url, cache, batch=batch)
    started = time.perf_counter()
    remote.logits(x)
    rate = len(x) / (time.perf_counter() - started)
    assert remote.asked == len(x)
    remote.close()
    return rate


def killed_half_way(service: Service, x: Tensor, folder: Path) -> dict[str, int]:
    """Kill a caller when half is paid, resume it, and return what was paid before, in all, and asked the second time."""
    np.save(folder / "x.npy", x.numpy())
    before = service.paid()
    command = [sys.executable, "-c", ASK, service.url, str(folder / "killed.sqlite"), str(folder / "x.npy")]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while service.paid() - before < len(x) // 2 and first.poll() is None:
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=30)
    half = service.paid() - before
    second = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    return {"paid_at_the_kill": half, "paid_in_all": service.paid() - before, "asked_after": int(second.stdout)}


def rates(model: Path, train: Any, x: Tensor, batch: int, passes: int, folder: Path) -> dict[str, Any]:
    """Return medians over the passes of one teacher's rates, and the ratios over TLS to here."""
    teacher = load_teacher(model, train.shape, train.classes)
    here, crowded, away = [], [], []
    for number in range(-1, passes):
        # Accounts of a service remember: a service of its own for every pass, so that every answer is made.
        name = f"{model.stem}-{batch}-{number}"
        service = Service(model, folder / f"kit-{name}")
        try:
            found = (local_rate(teacher, x, batch), remote_rate(service.url, x, batch, folder / f"{name}.sqlite"))
        finally:
            service.close()
        if number >= 0:  # the first pass warms up
            here.append(found[0])
            away.append(found[1])
            crowded.append(crowded_rate(teacher, x, batch))
    ratios = [r / b for b, r in zip(here, away, strict=True)]
    return {
        "local_images_per_second": statistics.median(here),
        "crowded_images_per_second": statistics.median(crowded),
        "remote_images_per_second": statistics.median(away),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist", help="a source of data; mnist needs FEDKD_DATA")
    parser.add_argument("--model", action="append", help=f"may be given several times; default: {' and '.join(MODELS)}")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--json", type=Path, default=HERE / "benchmarks" / "remote_teacher.json")
    words = parser.parse_args(argv)
    # The service's process inherits it.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    train = load_data(DataConfig(source=words.data), 0).train
    x = torch.from_numpy(np.unique(train.inputs(np.arange(len(train)))[: 2 * words.images], axis=0)[: words.images])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    folder = Path(tempfile.mkdtemp(prefix="fedkd-remote-"))
    rows: list[dict[str, Any]] = []
    try:
        for name in words.model or MODELS:
            architecture = Architecture(name, train.shape, train.classes, torch.float32)
            model = folder / f"teacher-{len(rows)}.safetensors"
            note = {"architecture": name, "shape": train.shape, "classes": train.classes, "class_names": ()}
            write_atomic(model, pack_tensors(architecture.initial(1), {"fedkd": json.dumps(note)}))
            for batch in BATCHES:
                rows.append({"model": name, "batch": batch, **rates(model, train, x, batch, words.passes, folder)})
                row = rows[-1]
                print(
                    f"{name}, batch {batch}: {row['local_images_per_second']:,.0f} images/s here "
                    f"({row['crowded_images_per_second']:,.0f} beside a busy core), "
                    f"{row['remote_images_per_second']:,.0f} over TLS: {100 * row['ratio']:.0f} % "
                    f"({100 * min(row['ratios']):.0f} to {100 * max(row['ratios']):.0f} over {len(row['ratios'])} passes)"
                )
        service = Service(folder / "teacher-0.safetensors", folder / "kit-killed")
        try:
            killed = killed_half_way(service, x, folder)
        finally:
            service.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"a caller killed after {killed['paid_at_the_kill']:,} of {len(x):,} paid queries and started again paid "
        f"{killed['paid_in_all']:,} in all"
    )
    result = {
        "data": words.data,
        "images": len(x),
        "rows": rows,
        "killed": killed,
        "versions": made_with(),
    }
    words.json.parent.mkdir(parents=True, exist_ok=True)
    words.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
