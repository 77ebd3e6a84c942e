"""The compiled kernels give torch's numbers, are taken where they fit and nowhere else, and are never needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_same, play
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from fedkd.algorithms.base import Batch, Heard
from fedkd.algorithms.catalogue import build, resolve
from fedkd.engines.stacked import StackedEngine
from fedkd.kernels import build as building
from fedkd.kernels.build import NoKernels, library
from fedkd.kernels.jobs import agreeing, run
from fedkd.kernels.program import Program, programs
from fedkd.kernels.recognise import ABSOLUTE, LABELS, SOFT, Known, recognise
from fedkd.layers import prepare
from fedkd.losses import cross_entropy, soft_cross_entropy
from fedkd.models import Architecture
from fedkd.payloads import Logits, Nothing, SoftLabels

needs_kernels = pytest.mark.skipif(library(torch.float64) is None, reason="no C++ compiler here")


def net(*layers: nn.Module) -> nn.Module:
    return prepare(nn.Sequential(*layers).double())


NETS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (net(nn.Linear(5, 3)), (5,)),
    (net(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 13, bias=False)), (3, 2, 2)),
    (net(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(45, 4)), (2, 9, 8)),
    (net(nn.Conv2d(1, 3, (2, 3), stride=(2, 1), padding=(1, 2)), nn.AvgPool2d(2, 1), nn.Flatten()), (1, 7, 6)),
    (net(nn.Conv2d(3, 7, 5, stride=3, padding=2, bias=False), nn.MaxPool2d(3, 1), nn.ReLU()), (3, 11, 13)),
    (net(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (2, 6, 7)),
    (net(nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 2), nn.Dropout(0.5)), (6,)),
]  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("case", range(len(NETS)))
@pytest.mark.parametrize("batch", [1, 3, 4, 33])
@pytest.mark.parametrize("shared", [False, True])
def test_a_pass_and_its_gradients_are_torchs(case: int, batch: int, shared: bool) -> None:
    model, shape = NETS[case]
    model = model.eval()
    program = programs(model, shape)["forward"]
    rng = torch.Generator().manual_seed(case)
    devices = 3
    tensors = {n: torch.randn(devices, *t.shape, generator=rng).double() for n, t in model.named_parameters()}
    still = {n: torch.rand(devices, *t.shape, generator=rng).double() + 0.5 for n, t in model.named_buffers()}
    x = torch.randn(*((batch,) if shared else (devices, batch)), *shape, generator=rng).double()
    leaves = [t.requires_grad_(True) for t in tensors.values()] + [x.requires_grad_(True)]
    dims = (0, 0, None if shared else 0)
    got = vmap(lambda w, b, x: run(program, x, {**w, **b}), in_dims=dims)(tensors, still, x)
    want = vmap(lambda w, b, x: functional_call(model, {**w, **b}, (x,)).flatten(1), in_dims=dims)(tensors, still, x)
    assert (got - want).abs().max() < 1e-11
    probe = torch.randn(got.shape, generator=rng).double()
    for a, b in zip(
        torch.autograd.grad((got * probe).sum(), leaves), torch.autograd.grad((want * probe).sum(), leaves), strict=True
    ):
        assert (a - b).abs().max() < 1e-10 * max(1, b.abs().max().item())
    with torch.no_grad():
        assert torch.equal(vmap(lambda w, b, x: run(program, x, {**w, **b}), in_dims=dims)(tensors, still, x), got)


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.layer(x))
        return out


class Around(nn.Module):
    """A way around a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + x
        return out


class Functions(nn.Module):
    """Layers written as functions: still a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(F.relu(self.a(torch.flatten(x, 1))))
        return out


class Unused(Functions):
    """A weight that no step reads."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(2, 2)


class Looks(Functions):
    """What it does depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def test_only_chains_of_known_layers_are_read() -> None:
    assert [s.clip for s in programs(Functions(), (2, 2))["forward"].steps] == [True, False]
    strange = [
        nn.GroupNorm(2, 4), nn.MaxPool2d(2, padding=1), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, groups=2),
        nn.MaxPool2d(2, ceil_mode=True), nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh(), nn.Linear(5, 5),
    ]  # fmt: skip
    for odd in (Twice(), Around(), Unused(), Looks()):
        assert not programs(odd, (4,)), type(odd).__name__
    for layer in strange:
        assert not programs(prepare(nn.Sequential(nn.Conv2d(1, 4, 1), layer)), (1, 5, 5)), str(layer)
    hooked = nn.Sequential(nn.Linear(4, 2))
    hooked[0].register_forward_hook(lambda module, given, out: 2 * out)
    assert not programs(hooked, (4,))


@needs_kernels
def test_a_program_that_gives_other_numbers_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedkd.kernels import jobs

    architecture = Architecture("mlp", (4,), 3, torch.float64)
    kernels = library(torch.float64)
    assert agreeing(kernels, architecture).keys() == {"forward", "body", "head"}

    def wrong(inner: nn.Module, shape: tuple[int, ...]) -> dict[str, Program]:
        found = programs(inner, shape)
        first = found["forward"]
        bent = replace(first, steps=(replace(first.steps[0], clip=False), *first.steps[1:]))
        return {**found, "forward": bent}

    monkeypatch.setattr(jobs, "programs", wrong)
    assert agreeing(kernels, architecture).keys() == {"body", "head"}


# ---- losses ---------------------------------------------------------------------------------------------------------
SOFT_LABELS = Heard(knowledge=SoftLabels(labels=torch.full((6, 3), 1 / 3)), memory={"m": torch.ones(3)}, round=2)


def seen(loss: Any, heard: Heard = SOFT_LABELS, labels: bool = True) -> Known | None:
    return recognise(loss, heard, (4,), 3, torch.float32, labels=labels)


def test_the_methods_own_losses_are_recognised() -> None:
    for name in ("ds_fl", "cfd", "fedavg", "local"):
        method = build(resolve(name))
        assert seen(method.private_loss) == Known(LABELS)
    assert seen(build(resolve("ds_fl")).public_loss) == Known(SOFT, "labels")
    logits = replace(SOFT_LABELS, knowledge=Logits(logits=torch.zeros(6, 3)))
    assert seen(build(resolve("fedmd")).public_loss, logits) == Known(ABSOLUTE, "logits")
    assert seen(build(resolve("fedprox")).private_loss) is None
    assert seen(build(resolve("fedproto")).private_loss) is None


def base(net: Any, batch: Batch, heard: Heard) -> Tensor:
    return batch.mean(cross_entropy(net(batch), batch.labels))


def in_place(net: Any, batch: Batch, heard: Heard) -> Tensor:
    z = net(batch)
    z.mul_(2)
    return batch.mean(cross_entropy(z, batch.labels))


def by_value(net: Any, batch: Batch, heard: Heard) -> Tensor:
    return base(net, batch, heard) if batch.labels[0] == 0 else 2 * base(net, batch, heard)


def noisy(net: Any, batch: Batch, heard: Heard) -> Tensor:
    z = net(batch)
    return batch.mean(cross_entropy(z + torch.rand(z.shape), batch.labels))


def moved(net: Any, batch: Batch, heard: Heard) -> Tensor:
    return batch.mean(cross_entropy(net(batch.x + 1), batch.labels))


def other_role(net: Any, batch: Batch, heard: Heard) -> Tensor:
    return base(net["shared"], batch, heard)


def other_rows(net: Any, batch: Batch, heard: Heard) -> Tensor:
    return batch.mean(soft_cross_entropy(net(batch), heard.knowledge.tensors()["labels"][batch.labels]))


def detached(net: Any, batch: Batch, heard: Heard) -> Tensor:
    return batch.mean(cross_entropy(net(batch).detach(), batch.labels))


def plain_mean(net: Any, batch: Batch, heard: Heard) -> Tensor:
    return cross_entropy(net(batch), batch.labels).mean()


@pytest.mark.parametrize("loss", [
    in_place, by_value, noisy, moved, other_role, other_rows, detached, plain_mean,
    lambda net, batch, heard: 2 * base(net, batch, heard),
    lambda net, batch, heard: base(net, batch, heard) + net.parameters["w"].sum(),
    lambda net, batch, heard: base(net, batch, heard) + heard.memory["m"].sum(),
])  # fmt: skip
def test_a_loss_that_is_a_little_different_is_not(loss: Callable[..., Tensor]) -> None:
    assert seen(base) == Known(LABELS)
    assert seen(loss) is None


def test_records_without_labels_have_no_labels_loss() -> None:
    assert seen(base, labels=False) is None
    assert seen(base, replace(SOFT_LABELS, knowledge=Nothing())) == Known(LABELS)


# ---- whole runs -----------------------------------------------------------------------------------------------------
@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Count the stretches of training that the kernels run, and those that go step by step."""
    counts = {"compiled": 0, "stepwise": 0}
    compiled, stepwise = StackedEngine._compiled, StackedEngine._stepwise

    def first(self: StackedEngine, work: Any) -> Any:
        found = compiled(self, work)
        counts["compiled"] += found is not None
        return found

    def second(self: StackedEngine, *given: Any) -> Any:
        counts["stepwise"] += 1
        return stepwise(self, *given)

    monkeypatch.setattr(StackedEngine, "_compiled", first)
    monkeypatch.setattr(StackedEngine, "_stepwise", second)
    yield counts


LENET = "lenet(width=0.5)"
MODELS = ["logreg", "mlp(hidden=[16], dropout=0.3)", "cnn(channels=[3, 4], features=16)", LENET]
SGD = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2, "persist": True, "lr": 0.05}
ADAM = {"name": "adam", "lr": 0.01, "eps": 1e-6, "weight_decay": 1e-2, "persist": True}


@needs_kernels
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("first", "second"), [(SGD, ADAM), ({**ADAM, "name": "adamw"}, {"weight_decay": 0.1}), ({}, {"momentum": 0.5})]
)
def test_compiled_training_is_serial_training(
    model: str, first: dict[str, Any], second: dict[str, Any], counted: dict[str, int]
) -> None:
    """Ragged data, one device with one record and one with none, batches above and below a chunk, soft labels."""
    raw = {
        "algorithm": "ds_fl",
        "rounds": 2,
        "models": {"student": model, "devices": [model]},
        "training": {"epochs": 2, "batch_size": 40, "schedule": "cosine", "optimizer": first},
        "digest": {"batch_size": 16, "optimizer": second},
        "server": {"epochs": 0},
    }
    if model == LENET:
        raw["data"] = {"source": "digits", "train_size": 220, "test_size": 60}
        raw["models"] = {"student": "user_models:wide", "devices": ["user_models:wide"]}
    assert_same(play(raw), play(raw, kind="stacked"), 1e-9)
    assert counted["compiled"] == 3 and counted["stepwise"] == 0


@needs_kernels
def test_a_loss_that_they_do_not_know_passes_through_them_step_by_step(counted: dict[str, int]) -> None:
    raw = {
        "algorithm": "fedproto",
        "rounds": 2,
        "models": {"student": "mlp(hidden=[16])", "devices": ["mlp(hidden=[16])"]},
    }
    assert_same(play(raw), play(raw, kind="stacked"), 1e-9)
    assert counted["compiled"] == 0 and counted["stepwise"] == 2


@needs_kernels
def test_threads_blocks_and_pixels_held_as_bytes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {"algorithm": "ds_fl", "rounds": 2}
    once = play(raw, kind="stacked")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert_same(once, play(raw, kind="stacked", block=3), 1e-12)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr("fedkd.records.FLOAT_BUDGET_BYTES", 0)
    assert_same(once, play(raw, kind="stacked"), 1e-12)


# ---- building -------------------------------------------------------------------------------------------------------
def test_without_a_compiler_torch_does_the_work_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, counted: dict[str, int]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "")
    raw = {"algorithm": "ds_fl", "rounds": 2}
    library.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", NoKernels)
            played = play(raw, kind="stacked")
        assert [str(w.message) for w in said if w.category is NoKernels] == [
            "no compiled kernels, torch does the work instead: no C++ compiler (g++ or clang++) was found"
        ]
    finally:
        library.cache_clear()
    assert counted == {"compiled": 0, "stepwise": 3}
    assert_same(play(raw), played, 1e-9)


def test_knobs_switch_them_off(monkeypatch: pytest.MonkeyPatch, counted: dict[str, int]) -> None:
    play({"algorithm": "local", "rounds": 1, "runner": {"kernels": False}}, kind="stacked")
    assert counted == {"compiled": 0, "stepwise": 1}
    monkeypatch.setenv(building.SWITCH, "off")
    library.cache_clear()
    try:
        assert library(torch.float64) is None
    finally:
        library.cache_clear()


@needs_kernels
def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(building, "FLAGS", ("--no-such-flag",))
    with pytest.raises(RuntimeError, match=r"(g|clang|c)\+\+ failed: .*no-such-flag"):
        building.compiled("float")
    assert not list((tmp_path / "fedkd").iterdir())


@needs_kernels
def test_a_cache_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match=r"file/fedkd cannot be written .*XDG_CACHE_HOME"):
        building.compiled("float")


@needs_kernels
def test_a_compiled_library_is_kept() -> None:
    path, fresh = building.compiled("double")
    again, anew = building.compiled("double")
    assert path == again and path.exists() and not anew
    assert path.parent == building.cache_folder() and not fresh
