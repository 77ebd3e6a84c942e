"""DP-SGD: Opacus's gradients in one pass, noise of the size claimed, a bound that no record breaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from harness import SMALL, merged
from torch import Tensor, nn

from fedkd.algorithms.base import Heard, Phase
from fedkd.data import prepare
from fedkd.engines.base import Engine, Task
from fedkd.errors import ConfigError
from fedkd.experiment import validate
from fedkd.payloads import Nothing
from fedkd.privacy import dpsgd, stacked_dpsgd
from fedkd.privacy.dpsgd import train_private
from fedkd.privacy.events import Event, epsilon
from fedkd.privacy.record_level import DpSgd, private_steps
from fedkd.runners.base import make_engine
from fedkd.site import Site

MLP, CNN, RESNET = "mlp(hidden=[16])", "cnn(channels=[3, 4], features=16, norm=group)", "resnet(width=4, norm=group)"
DP: dict[str, Any] = {"kind": "dp_sgd", "noise_multiplier": 1.0, "sampling_rate": 0.3, "seeded": True}


def site(model: str = MLP, **more: Any) -> Site:
    raw = merged(SMALL, {"models": {"student": model, "devices": [model]}, "algorithm": "ds_fl", "privacy": DP})
    experiment = validate(merged(raw, more))
    return Site(experiment, prepare(experiment.data, experiment.partition, experiment.proxy, experiment.seed))


def tasks(at: Site, clients: Sequence[int], poison: Mapping[int, float] | None = None) -> list[Task]:
    heard = Heard(knowledge=Nothing(), memory={}, round=0)
    made = []
    for k in clients:
        records = at.private(k)
        made.append(Task(at.cards[k], at.new_device(at.cards[k]), heard, records, None, None))
    return made


def phase(at: Site) -> Phase:
    return at.method.plan(Heard(knowledge=Nothing(), memory={}, round=0))[-1]


def moved(at: Site, kind: str, clients: Sequence[int], given: list[Task] | None = None) -> list[Tensor]:
    """Train and return every device's change of weights as one vector."""
    engine: Engine = make_engine(at, kind)
    work = given if given is not None else tasks(at, clients)
    before = [_flat(task) for task in work]
    train_private(engine, phase(at), work)
    return [_flat(task) - old for task, old in zip(work, before, strict=True)]


def _flat(task: Task) -> Tensor:
    return torch.cat([t.flatten() for t in task.state.models["model"].values()])


@pytest.fixture
def noiseless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No noise, the same Poisson batches: what is left is clipping, pinned to Opacus."""
    original = DpSgd.__init__

    def quiet(self: DpSgd, *args: Any) -> None:
        original(self, *args)
        self.noise_multiplier = 0.0

    monkeypatch.setattr(DpSgd, "__init__", quiet)


@pytest.mark.parametrize("model", [MLP, CNN, RESNET])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.usefixtures("noiseless")
def test_stacked_ghost_clipping_equals_opacus_hooks_and_opacus_ghost_clipping(
    model: str, dtype: str, tolerance: float
) -> None:
    clients = range(4)
    options = {"dtype": dtype, "training": {"steps": 3, "optimizer": {"momentum": 0.9}}, "privacy": {"clip": 0.7}}
    hooks = moved(site(model, **options), "serial", clients)
    ghost = moved(site(model, **merged(options, {"privacy": {"gradients": "ghost"}})), "serial", clients)
    stack = moved(site(model, **options), "stacked", clients)
    for a, b, c in zip(hooks, ghost, stack, strict=True):
        assert float(a.norm()) > 1e-3
        assert float((a - c).abs().max()) <= tolerance and float((a - b).abs().max()) <= tolerance


@pytest.mark.parametrize("kind", ["serial", "stacked"])
def test_noise_is_of_the_size_claimed_on_every_parameter(kind: str) -> None:
    """One step of rate 1: the change of weights is the mean gradient and the noise, whose size is known."""
    sigma, clip, batch = 50.0, 0.5, 4.0
    options = {
        "training": {"steps": 1, "optimizer": {"lr": 1.0}},
        "privacy": {"noise_multiplier": sigma, "clip": clip, "expected_batch": batch, "seeded": False},
    }
    at = site(**options)
    found = torch.cat(moved(at, kind, range(6))).numpy()
    wanted = sigma * clip / batch
    error = np.sqrt(2 / len(found))
    ratio = float(np.mean(np.square(found))) / wanted**2
    assert abs(ratio - 1) < 6 * error
    for wrong in (2 / 3, 3 / 2):
        assert abs(ratio / wrong**2 - 1) > 6 * error
    assert np.abs(np.corrcoef(found[: len(found) // 6], found[len(found) // 6 : 2 * (len(found) // 6)])[0, 1]) < 0.2


@pytest.mark.parametrize("kind", ["serial", "stacked"])
def test_noise_does_not_follow_the_seed(kind: str) -> None:
    options = {"training": {"steps": 1}, "privacy": {"seeded": False}}
    a, b = moved(site(**options), kind, [0])[0], moved(site(**options), kind, [0])[0]
    assert float((a - b).norm()) > 0.1 * float(a.norm())


@pytest.mark.usefixtures("noiseless")
@pytest.mark.parametrize(("kind", "gradients"), [("serial", "hooks"), ("serial", "ghost"), ("stacked", "hooks")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 0.0], ids=str)
def test_no_record_moves_the_sum_by_more_than_the_clip(kind: str, gradients: str, value: float) -> None:
    """With and without a record of zeros, of huge values, of NaN or of infinity: at most ``clip``, everything finite."""
    clip = 0.01
    options = {
        "training": {"steps": 1, "optimizer": {"lr": 1.0}},
        "privacy": {"clip": clip, "sampling_rate": 1.0, "expected_batch": 1.0, "gradients": gradients},
    }
    at = site(CNN, **options)
    # A record of its own in the pool, which device 0 holds besides its others.
    pool = at.silo.pool
    assert pool._x is not None
    stranger = int(at.silo.parts[1][0])
    pool._x[stranger] = value
    without = tasks(at, [0])
    index = torch.cat([without[0].private.index, torch.tensor([stranger])])
    with_it = [replace(tasks(at, [0])[0], private=replace(without[0].private, index=index))]
    a, b = moved(at, kind, [0], without)[0], moved(at, kind, [0], with_it)[0]
    assert bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())
    assert float(a.norm()) > clip
    assert float((a - b).norm()) <= clip * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["serial", "stacked"])
def test_a_device_without_records_takes_the_same_steps_on_noise_alone(kind: str) -> None:
    at = site(training={"steps": 2})
    empty = tasks(at, [0, 1])
    empty[0] = replace(empty[0], private=replace(empty[0].private, index=torch.zeros(0, dtype=torch.int64)))
    found = moved(at, kind, [], empty)
    assert all(float(f.norm()) > 0.05 for f in found)
    assert "train" not in empty[0].losses, "the loss on private records is not noted at all"


def test_steps_are_a_public_number() -> None:
    at = site(training={"epochs": 3, "steps": None})
    assert private_steps(at.experiment.training, 0.3) == 10
    assert cast(DpSgd, at.mechanism).price([phase(at)]) == [Event(sigma=1.0, q=0.3, count=10)]


@pytest.mark.parametrize("kind", ["serial", "stacked"])
def test_records_are_drawn_by_poisson_sampling(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch sizes scatter like binomials and records repeat across steps: shuffled batches would do neither."""
    seen: list[int] = []
    if kind == "serial":
        original = dpsgd.sample

        def spy(*args: Any) -> list[Tensor]:
            found = original(*args)
            seen.extend(len(t) for t in found)
            return found

        monkeypatch.setattr(dpsgd, "sample", spy)
    else:
        stacked = stacked_dpsgd._poisson

        def spy_stacked(*args: Any) -> list[np.ndarray]:
            rows = stacked(*args)
            seen.extend(len(t) for t in rows)
            return rows

        monkeypatch.setattr(stacked_dpsgd, "_poisson", spy_stacked)
    at = site("logreg", training={"steps": 300}, privacy={"sampling_rate": 0.2, "seeded": False})
    records = len(at.private(0))
    moved(at, kind, [0])
    sizes = np.array(seen)
    assert len(sizes) == 300
    assert abs(sizes.mean() / (0.2 * records) - 1) < 0.15
    assert 0.6 < sizes.var() / (records * 0.2 * 0.8) < 1.6


def test_models_that_mix_records_are_refused_with_the_replacement() -> None:
    with pytest.raises(ConfigError, match="GroupNorm: cnn"):
        site("cnn")

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.InstanceNorm1d(3, track_running_stats=True)

    assert dpsgd.unsupported(Odd()) is not None
    assert dpsgd.unsupported(nn.Sequential(nn.Linear(3, 3), nn.GroupNorm(1, 3))) is None


@pytest.mark.parametrize(
    ("algorithm", "reason"),
    [("fd", "private records"), ("fedproto", "private records"), ("fedavg", "count of records"), ("central", "pools")],
)
def test_methods_that_would_leak_are_refused_when_the_experiment_is_read(algorithm: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        validate({"algorithm": algorithm, "privacy": {"kind": "dp_sgd", "epsilon": 4}})


def test_a_loss_that_is_no_sum_over_records_is_refused() -> None:
    at = site()
    honest = phase(at)

    def mixed(net: Any, batch: Any, heard: Any) -> Tensor:
        return net(batch).mean(0).square().sum()

    def neighbours(net: Any, batch: Any, heard: Any) -> Tensor:
        logits = net(batch)
        return batch.mean((logits - logits.mean(0)).square().sum(-1))

    engine = make_engine(at, "stacked")
    for loss in (mixed, neighbours):
        with pytest.raises(ConfigError, match="bound"):
            train_private(engine, replace(honest, loss=loss, name=loss.__name__), tasks(at, [0]))


@pytest.mark.usefixtures("noiseless")
@pytest.mark.parametrize("gradients", ["hooks", "ghost"])
@pytest.mark.parametrize("kind", ["serial", "stacked"])
def test_a_weight_used_beside_its_layer_is_refused(kind: str, gradients: str) -> None:
    """Its gradient would come from every record and be in no norm: with a clip of 0.01 it moved the sum by 1,500."""
    at = site("user_models:Cosine", privacy={"gradients": gradients})
    with pytest.raises(ConfigError, match="beside the layer's own forward"):
        moved(at, kind, [0, 1])


@pytest.mark.usefixtures("noiseless")
def test_a_layer_that_is_called_twice_counts_whole_or_is_refused() -> None:
    """Stacked ghost clipping sees both calls, as Opacus's hooks do; Opacus's ghost clipping does not."""
    options = {"dtype": "float64", "privacy": {"clip": 0.05}}
    by_hooks, stacked = (moved(site("user_models:Twice", **options), kind, [0])[0] for kind in ("serial", "stacked"))
    assert float((by_hooks - stacked).abs().max()) < 1e-12
    ghost = merged(options, {"privacy": {"gradients": "ghost"}})
    assert float((moved(site("user_models:Twice", **ghost), "stacked", [0])[0] - stacked).abs().max()) < 1e-12
    with pytest.raises(ConfigError, match=r"'inner' more than once.*privacy\.gradients=hooks"):
        moved(site("user_models:Twice", **ghost), "serial", [0])


def test_what_reaches_a_weight_beside_its_layer_never_enters_the_stacked_sum(
    noiseless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should the check be passed by: the free gradient is taken without a record, so that the bound stands."""
    monkeypatch.setattr(dpsgd, "check_additive", lambda *_: None)
    at = site("user_models:Cosine", privacy={"clip": 0.01})
    mechanism = cast(DpSgd, at.mechanism)
    rate = at.experiment.training.optimizer.lr
    steps = mechanism.steps["training"]
    most = steps * rate * len(at.private(0)) * 0.01 / mechanism.expected_batch
    (change,) = moved(at, "stacked", [0])
    assert float(change.norm()) <= most


def test_a_term_without_records_is_added_whole_and_unclipped() -> None:
    """A proximal term has no record in it: it is neither clipped nor counted, on either engine."""
    options = {"training": {"steps": 2, "optimizer": {"lr": 0.1}}, "privacy": {"clip": 1e-3}}
    found = {}
    for kind, gradients in (("serial", "hooks"), ("serial", "ghost"), ("stacked", "hooks")):
        at = site(**merged(options, {"privacy": {"gradients": gradients}}))
        base = phase(at)

        def loss(net: Any, batch: Any, heard: Any, base: Phase = base) -> Tensor:
            return base.loss(net, batch, heard) + sum(p.square().sum() for p in net.parameters.values())

        engine, work = make_engine(at, kind), tasks(at, [0, 1])
        before = _flat(work[0])
        train_private(engine, replace(base, loss=loss, name="prox"), work)
        found[kind + gradients] = _flat(work[0])
        # Two steps of w <- w - 0.1 (2 w): the weights shrink to 64 %, up to what the clipped records add.
        assert float((found[kind + gradients] - 0.64 * before).norm()) < 0.05
    first = found["serialhooks"]
    assert all(float((first - other).abs().max()) < 1e-12 for other in found.values())


def test_dropout_and_augmentation_do_not_break_the_equality_of_two_backward_passes() -> None:
    at = site("mlp(hidden=[16], dropout=0.5)", training={"steps": 3}, privacy={"gradients": "ghost"})
    assert all(bool(torch.isfinite(f).all()) for f in moved(at, "serial", [0]))
    assert all(bool(torch.isfinite(f).all()) for f in moved(at, "stacked", [0, 1]))


def test_a_plan_is_calibrated_to_all_its_rounds() -> None:
    at = site(rounds=4, training={"steps": 5}, privacy={"epsilon": 2.0, "noise_multiplier": None})
    mechanism = cast(DpSgd, at.mechanism)
    total = mechanism.plan(mechanism.noise_multiplier)
    assert sum(e.count for e in total) == 20
    assert 1.97 <= epsilon(total, 1e-5) <= 2.0
