"""The loop of distillation without data: inputs are made, the student learns on them, in turns."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fedkd.distill.datafree.base import Form, Maker, Synthesizer
from fedkd.distill.datafree.guides import Guide
from fedkd.distill.datafree.pool import Pool
from fedkd.distill.loop import Epoch, Fit, below, load_optimizer, optimizer_state
from fedkd.errors import ConfigError
from fedkd.seeding import key
from fedkd.storage import StorageError, pack_tensors, read_bundle, unpack_tensors, write_bundle
from fedkd.store import read_metadata

POOL = 10_240
"""Inputs that a pool keeps by default."""


class DataFree:
    """Trains ``student`` under ``guide`` on inputs that ``method`` makes.

    ```python
    DataFree(student, ModelsGuide(clients), DFAD(batch_size=128), Form(shape=(1, 28, 28), classes=10), fit=Fit(...)).run()
    ```

    Args:
        student: trained in place.
        guide: the teacher, or the ensemble of clients.
        method: what makes the inputs.
        form: shape, classes and bounds of an input: all that is known of the data.
        fit: optimiser, schedule, epochs and the student's batch.
        seed: decides everything that is random.
        keep: inputs in the pool; a growing pool's oldest inputs give way beyond it.
        device: what computes, such as ``cuda``; student and teacher are moved there.
    Raises:
        ConfigError: the method and the teacher do not fit.
    """

    def __init__(
        self,
        student: nn.Module,
        guide: Guide,
        method: Synthesizer,
        form: Form,
        *,
        fit: Fit | None = None,
        seed: int = 1,
        keep: int = POOL,
        device: str = "cpu",
    ) -> None:
        self.student, self.guide, self.method, self.how, self.seed = student, guide, method, fit or Fit(), seed
        self.pool, self.device = Pool(keep), device
        self.dtype = next(student.parameters()).dtype
        self.student.to(device)
        self.guide.to(device)
        with _seeded(seed, device, self.dtype, "start"):
            self.maker: Maker = method.start(guide, form, self.pool)
        self.maker.student_batch = self.how.batch_size
        self.log: list[Epoch] = []

    def run(
        self, *, checkpoint: Path | None = None, pause: float = 0.0, watch: Callable[[Epoch], None] | None = None
    ) -> list[Epoch]:
        """Train for ``fit.epochs`` and return the log, one entry per epoch with the student's mean loss.

        Args:
            checkpoint: folder that is written after every epoch; where it holds an earlier epoch, training goes on from
                there, bit for bit.
            pause: seconds that pass at least between two writes of it.
            watch: called after every epoch.
        Raises:
            ConfigError: the student diverged.
            StorageError: the checkpoint is of another student or method.
        """
        optimizer = self.how.build([p for p in self.student.parameters() if p.requires_grad])
        first = self._restore(checkpoint, optimizer) if checkpoint is not None else 0
        before, saved = self.student.training, -math.inf
        for epoch in range(first, self.how.epochs):
            with _seeded(self.seed, self.device, self.dtype, "epoch", epoch):
                self.log.append(self._epoch(epoch, optimizer))
            if checkpoint is not None and time.monotonic() - saved >= pause:
                self._save(checkpoint, optimizer, epoch + 1)
                saved = time.monotonic()
            if watch is not None:
                watch(self.log[-1])
        self.student.train(before)
        return self.log

    def _epoch(self, epoch: int, optimizer: torch.optim.Optimizer) -> Epoch:
        rate = self.how.rate(epoch)
        for group in optimizer.param_groups:
            group["lr"] = rate
        total, steps = 0.0, 0
        makes = self.method.makes_per_epoch
        for make in range(makes):
            self.maker.progress = (epoch + make / makes) / self.how.epochs
            with _opposed(self.student):
                made = self.maker.make(self.student)
            if not self.method.streams or make == makes - 1:
                self.pool.add(made)
            self.student.train()
            for _ in range(self.maker.student_steps()):
                loss = self.maker.loss(self.student, self.how.batch_size)
                self.how.descend(loss, optimizer)
                total, steps = total + float(loss.detach()), steps + 1
        mean = total / max(steps, 1)
        if not math.isfinite(mean):
            raise ConfigError(
                f"the student's loss is {mean} in epoch {epoch + 1} of {self.method.name}: it diverged; lower "
                "training.lr (in a federation algorithm.lr)"
            )
        return Epoch(epoch, rate, mean, {self.method.name: mean, "queries": float(self.guide.queries)})

    def taught(self) -> dict[str, Tensor]:
        """Return the student's tensors by name, as they are now."""
        return {name: t.detach().clone() for name, t in self.student.state_dict().items()}

    def memory(self) -> dict[str, Tensor]:
        """Return all that the maker must remember, by name, for a later run to go on from (:meth:`remember`)."""
        tensors: dict[str, Tensor] = {}
        for name, module in self.maker.modules.items():
            tensors |= {f"module|{name}|{n}": t.detach().clone() for n, t in module.state_dict().items()}
        for name, one in self.maker.optimizers.items():
            tensors |= {f"optimizer|{name}|{n}": t.clone() for n, t in optimizer_state(one).items()}
        return tensors | {f"extra|{name}": t for name, t in self.maker.extra.items()}

    def remember(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`memory` gave; what it lacks of optimisers is as in a new one.

        Raises:
            RuntimeError: it belongs to another method, or to other settings.
        """
        for name, module in self.maker.modules.items():
            module.load_state_dict(below(tensors, f"module|{name}|"))
        for name, one in self.maker.optimizers.items():
            load_optimizer(one, below(tensors, f"optimizer|{name}|"))
        self.maker.extra |= below(tensors, "extra|")
        self.maker.restored()

    # ---- checkpoints ------------------------------------------------------------------------------------------------
    def _save(self, folder: Path, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        tensors: dict[str, Tensor] = {f"student|{n}": t for n, t in self.student.state_dict().items()}
        tensors |= {f"optimizer||{n}": t for n, t in optimizer_state(optimizer).items()} | self.memory()
        if len(self.pool):
            tensors["pool"] = self.pool.x
        note = {"epoch": epoch, "log": [vars(e) for e in self.log], "queries": self.guide.queries}
        write_bundle(folder, {"datafree.safetensors": pack_tensors(tensors, {"datafree": json.dumps(note)})})

    def _restore(self, folder: Path, optimizer: torch.optim.Optimizer) -> int:
        if not folder.exists():
            return 0
        data = read_bundle(folder)["datafree.safetensors"]
        note = json.loads(read_metadata(data)["datafree"])
        tensors = {name: t.to(self.device) for name, t in unpack_tensors(data, str(folder)).items()}
        try:
            self.student.load_state_dict(below(tensors, "student|"))
            load_optimizer(optimizer, below(tensors, "optimizer||"))
            self.pool.restore(tensors.get("pool"))
            self.remember(tensors)
        except RuntimeError as cause:
            raise StorageError(f"{folder} belongs to another student or method: {cause}") from cause
        self.guide.queries = int(note["queries"])
        self.log = [Epoch(**entry) for entry in note["log"]]
        return int(note["epoch"])


@contextlib.contextmanager
def _seeded(seed: int, device: str, dtype: torch.dtype, *labels: str | int) -> Iterator[None]:
    """Lend torch's global stream to what happens inside, seeded by what it is for; new tensors are of ``dtype`` there, and
    come up on ``device``."""
    place = torch.device(device) if device != "cpu" else contextlib.nullcontext()
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), place:
        torch.manual_seed(key(seed, "datafree", *labels))
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@contextlib.contextmanager
def _opposed(student: nn.Module) -> Iterator[None]:
    """Hold the student still: evaluation mode, and no gradient for its parameters, which saves a third of the work."""
    wanted = [p for p in student.parameters() if p.requires_grad]
    student.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
