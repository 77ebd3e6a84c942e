"""pfl-research doing the work of the throughput benchmark. Runs under torchrun in an environment that has pfl and torch.

``python -m torch.distributed.run --standalone --nproc-per-node 2 pfl_peer.py --socket S --work FOLDER --model mlp ...``

Tuned as its users would for speed: tensors kept in memory with their batches cached, no evaluation and no metrics, one
torch thread per process, a fused SGD step, channels-last images. A user's statistics are its soft labels, which pfl adds
up over users and processes, and averages; nothing else is sent.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import time
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from pfl.aggregate.simulate import SimulatedBackend  # noqa: E402
from pfl.algorithm.base import NNAlgorithmParams  # noqa: E402
from pfl.algorithm.federated_averaging import FederatedAveraging  # noqa: E402
from pfl.data.federated_dataset import FederatedDataset  # noqa: E402
from pfl.data.pytorch import PyTorchTensorDataset  # noqa: E402
from pfl.data.sampling import MinimizeReuseUserSampler  # noqa: E402
from pfl.hyperparam.base import NNTrainHyperParams  # noqa: E402
from pfl.internal.bridge import FrameworkBridgeFactory as bridges  # noqa: E402
from pfl.metrics import Metrics  # noqa: E402
from pfl.model.pytorch import PyTorchModel  # noqa: E402
from pfl.stats import MappedVectorStatistics  # noqa: E402
from throughput_work import BATCH, RATE, Classifier, Contender, Line, Setting, Work, serve  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402


class Net(nn.Module):
    """The model with the two methods that pfl asks for."""

    def __init__(self, inner: Classifier) -> None:
        super().__init__()
        self.inner = inner
        self.samples = 0

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy: against class numbers, or against probabilities on the proxy set."""
        self.samples += len(x)
        return F.cross_entropy(self.inner(x), target)

    def metrics(self, x: Tensor, target: Tensor) -> dict[str, Any]:
        """Never called: nothing is evaluated."""
        raise NotImplementedError


class Sgd(torch.optim.SGD):
    """Counts its steps."""

    taken = 0

    def step(self, closure: Any = None) -> Any:
        Sgd.taken += 1
        return super().step(closure)


class SoftLabelAveraging(FederatedAveraging):  # type: ignore[misc]
    """Federated distillation on pfl's hooks: a user distils, trains, and contributes its soft labels."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.proxy = PyTorchTensorDataset((work.proxy, work.teacher))
        self.inputs = work.proxy
        self.answered = 0
        self.last: Tensor | None = None
        self.mean: Tensor | None = None

    def train_one_user(self, initial_model_state, model, user_dataset, central_context):  # type: ignore[no-untyped-def]
        """Do a client-round; the model is put back to its starting weights by the caller."""
        sgd = bridges.sgd_bridge()
        sgd.do_sgd(model, self.proxy, central_context.model_train_params)
        sgd.do_sgd(model, user_dataset, central_context.model_train_params)
        with torch.no_grad():
            self.last = model.pytorch_model.inner(self.inputs).softmax(-1)
        self.answered += len(self.inputs)
        return MappedVectorStatistics({"labels": self.last}), Metrics()

    def process_aggregated_statistics(self, central_context, aggregate_metrics, model, statistics):  # type: ignore[no-untyped-def]
        """Average the soft labels; the server keeps no model."""
        statistics.average()
        self.mean = statistics["labels"]
        return model, Metrics()


class Pfl(Contender):
    """One central iteration of pfl is one round."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        super().__init__()
        self.clients = setting.clients
        work = Work.load(folder, setting)
        self.net = Net(work.net())
        self.model = PyTorchModel(
            self.net,
            local_optimizer_create=functools.partial(Sgd, fused=True),
            central_optimizer=torch.optim.SGD(self.net.parameters(), 1.0),
        )
        # Made once, so that pfl's cache of batches serves every round.
        datasets = [PyTorchTensorDataset((x, y)) for x, y in zip(work.x, work.y, strict=True)]
        users = FederatedDataset(datasets.__getitem__, MinimizeReuseUserSampler(range(self.clients)))
        self.backend = SimulatedBackend(training_data=users, val_data=users)
        self.algorithm = SoftLabelAveraging(work)
        self.params = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=RATE, local_batch_size=BATCH)
        # Iteration 0 would be evaluated, whatever the frequency.
        self.algorithm._current_central_iteration = 1

    def round(self) -> None:
        self.algorithm.run(
            NNAlgorithmParams(
                central_num_iterations=self.algorithm._current_central_iteration + 1,
                evaluation_frequency=1 << 60,
                train_cohort_size=self.clients,
                val_cohort_size=None,
            ),
            self.backend,
            self.model,
            self.params,
            send_metrics_to_platform=False,
        )

    def snapshot(self) -> Tensor:
        """Return what this process has counted so far."""
        return torch.tensor([Sgd.taken, self.net.samples, self.algorithm.answered], dtype=torch.int64)

    def begin(self, rounds: int) -> None:
        tell(rounds)
        self.before = self.snapshot()

    def end(self) -> None:
        done = self.snapshot() - self.before
        if size() > 1:
            torch.distributed.reduce(done, 0)
        steps, samples, answered = (int(n) for n in done)
        self.counts.steps += steps
        self.counts.samples += samples
        self.counts.answered += answered

    def stop(self) -> None:
        tell(0)

    def check(self) -> dict[str, NDArray[Any]]:
        assert self.algorithm.mean is not None
        return {"mean": self.algorithm.mean.numpy()}

    def facts(self) -> dict[str, Any]:
        from importlib.metadata import version

        return {**super().facts(), "pfl": version("pfl"), "processes": size()}


def size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def tell(rounds: int) -> int:
    """Carry the number of rounds from process 0 to the others, which wait for it here; 0: no more."""
    box = torch.tensor([rounds], dtype=torch.int64)
    if size() > 1:
        torch.distributed.broadcast(box, 0)
    return int(box)


def main() -> None:
    """Process 0 takes orders; the others play as many rounds as it says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--socket", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--check", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--clients", type=int, required=True)
    asked = parser.parse_args()
    setting = Setting(asked.model, tuple(int(n) for n in asked.shape.split(",")), asked.clients)
    torch.set_num_threads(1)
    asyncio.set_event_loop(asyncio.new_event_loop())
    torch.manual_seed(0)
    np.random.seed(0)  # pfl shares out its users by NumPy's global stream, the same in every process.
    if int(os.environ.get("RANK", "0")) == 0:
        serve(Line(asked.socket), lambda: Pfl(asked.work, setting), BEGAN, asked.check)
        return
    contender = Pfl(asked.work, setting)
    while rounds := tell(0):
        contender.before = contender.snapshot()
        for _ in range(rounds):
            contender.round()
        contender.end()


if __name__ == "__main__":
    main()
