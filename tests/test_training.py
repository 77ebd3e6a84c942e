"""The training loop does what torch's own optimisers and a hand-written loop do."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from harness import play
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.experiment import OptimizerConfig, TrainingConfig
from fedkd.seeding import numpy_rng
from fedkd.training import Optimizer, rates, schedule

OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "sgd"},
    {"name": "sgd", "weight_decay": 0.1},
    {"name": "sgd", "momentum": 0.9},
    {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"name": "adam"},
    {"name": "adam", "weight_decay": 0.1, "betas": (0.5, 0.9), "eps": 1e-3},
    {"name": "adamw", "weight_decay": 0.1},
]


def theirs(config: OptimizerConfig, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if config.name == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)


@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_optimizers_equal_torchs(options: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    rng = torch.Generator().manual_seed(0)
    config = OptimizerConfig(lr=0.05, **options)
    mine = {"a": torch.randn(3, 2, generator=rng, dtype=dtype), "b": torch.randn(4, generator=rng, dtype=dtype)}
    other = [t.clone().requires_grad_(True) for t in mine.values()]
    ours, torchs = Optimizer(config), theirs(config, other)
    state = ours.initial(mine)
    for _ in range(12):
        grads = tuple(torch.randn(p.shape, generator=rng, dtype=dtype) for p in other)
        for p, g in zip(other, grads, strict=True):
            p.grad = g.clone()
        torchs.step()
        ours.step(mine, grads, state, 0.05)
        for a, b in zip(mine.values(), other, strict=True):
            assert (a - b).abs().max() <= tolerance
    assert all(t.dtype == dtype for t in mine.values())


@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_stack_steps_like_its_members_each_at_its_own_rate(options: dict[str, Any], dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(1)
    optimizer = Optimizer(OptimizerConfig(lr=0.05, **options))
    rate = torch.tensor([0.05, 0.01, 0.2], dtype=dtype)
    start = torch.randn(3, 4, 2, generator=rng, dtype=dtype)
    stack = {"w": start.clone()}
    state = optimizer.initial(stack, stack=3)
    alone = [{"w": t.clone()} for t in start]
    states = [optimizer.initial(p) for p in alone]
    for step in range(6):
        active = 3 if step < 3 else 2  # the last model has finished
        grad = torch.randn(3, 4, 2, generator=rng, dtype=dtype)
        view = {"w": stack["w"][:active]}
        optimizer.step(view, (grad[:active],), {n: t[:active] for n, t in state.items()}, rate[:active])
        for k in range(active):
            optimizer.step(alone[k], (grad[k],), states[k], float(rate[k]))
    assert stack["w"].dtype == dtype
    for k in range(3):
        assert torch.allclose(stack["w"][k], alone[k]["w"], atol=1e-14 if dtype == torch.float64 else 1e-6)
        for name, value in states[k].items():
            assert torch.allclose(state[name][k], value, atol=1e-13 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize(("records", "batch"), [(10, 4), (12, 4), (1, 8), (7, 7), (5, 100)])
def test_the_schedule_deals_every_record_once_an_epoch(records: int, batch: int) -> None:
    settings = TrainingConfig(epochs=3, batch_size=batch)
    plan = schedule(records, settings, np.random.default_rng(0))
    per_epoch = -(-records // batch)
    assert plan.steps == 3 * per_epoch and plan.sizes.max() <= batch
    orders = []
    for e in range(3):
        steps = range(e * per_epoch, (e + 1) * per_epoch)
        dealt = [int(i) for t in steps for i in plan.index[t, : plan.sizes[t]]]
        assert sorted(dealt) == list(range(records))
        orders.append(dealt)
    if records > 4:
        assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("steps", [0, 1, 5, 11])
def test_steps_replace_epochs(steps: int) -> None:
    plan = schedule(10, TrainingConfig(epochs=9, steps=steps, batch_size=4), np.random.default_rng(0))
    assert plan.steps == steps and len(plan.index) == steps
    whole = schedule(10, TrainingConfig(epochs=4, batch_size=4), np.random.default_rng(0))
    assert np.array_equal(plan.index, whole.index[:steps])


def test_nobody_without_records_takes_a_step() -> None:
    assert schedule(0, TrainingConfig(epochs=3), np.random.default_rng(0)).steps == 0
    assert schedule(0, TrainingConfig(steps=3), np.random.default_rng(0)).steps == 0


def test_learning_rates() -> None:
    settings = TrainingConfig(optimizer=OptimizerConfig(lr=0.2), schedule="cosine", round_decay=0.5)
    found = rates(settings, 4, round=3)
    assert found[0] == pytest.approx(0.2 / 8) and found[2] == pytest.approx(0.1 / 8)
    assert (np.diff(found) < 0).all() and found[-1] > 0
    assert rates(TrainingConfig(optimizer=OptimizerConfig(lr=0.2)), 3, round=9).tolist() == [0.2] * 3


class HandWritten(nn.Module):
    """The registry's cnn(channels=[3], features=8), spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
            nn.Linear(48, 8), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


@pytest.mark.parametrize("persist", [False, True])
def test_the_serial_engine_trains_like_a_loop_written_by_hand(persist: bool) -> None:
    name = "cnn(channels=[3], features=8)"
    raw = {
        "algorithm": "local",
        "rounds": 2,
        "models": {"student": name, "devices": [name]},
        "training": {
            "epochs": 2,
            "batch_size": 6,
            "optimizer": {"momentum": 0.9, "lr": 0.05, "weight_decay": 0.01, "persist": persist},
        },
    }
    played = play(raw)
    site, client = played.site, 0
    data = site.private(client)
    x, y = data.all()
    assert y is not None and len(y) % 6 not in (0, 1), "torch refuses a batch of one record: take another size"
    model = HandWritten().double()
    model.load_state_dict(site.initial(name, "start", "model"))
    settings = site.experiment.training
    optimizer: torch.optim.Optimizer | None = None
    for round in range(2):
        if optimizer is None or not persist:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        plan = schedule(len(y), settings, numpy_rng(site.experiment.seed, "batches", "train", round, client))
        for t in range(plan.steps):
            index = torch.from_numpy(plan.index[t, : plan.sizes[t]])
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    state = played.runner.store.load(client, 2).state
    assert state is not None
    for key, value in model.state_dict().items():
        assert torch.allclose(value.double(), state.models["model"][key].double(), atol=1e-12), key


def test_training_leaves_the_models_it_was_given_alone() -> None:
    played = play({"algorithm": "local", "rounds": 1})
    site = played.site
    before = copy.deepcopy(dict(site.new_device(site.cards[0]).models["model"]))
    fresh = site.initial(site.cards[0].architecture, "start", "model")
    assert all(torch.equal(before[n], t) for n, t in fresh.items())
