"""Our layers equal torch's where torch's are right, and a device sees the same numbers alone, padded and in a stack."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from fedkd.layers import BatchNorm1d, BatchNorm2d, Conv2d, Dropout, prepare, situation


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=rng(seed), dtype=torch.float64) + 0.5


def grown(norm: nn.Module) -> nn.Module:
    """Give a layer parameters that are not the identity."""
    norm = norm.double()
    with torch.no_grad():
        for i, parameter in enumerate(norm.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=50 + i))
    return norm


NORMS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.BatchNorm1d(3), (6, 3)),
    (lambda: nn.BatchNorm1d(3, momentum=0.3, eps=1e-2), (6, 3, 5)),
    (lambda: nn.BatchNorm2d(3), (4, 3, 5, 2)),
    (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 5, 2)),
    (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 5, 2)),
]


@pytest.mark.parametrize(("make", "shape"), NORMS)
def test_batch_normalisation_equals_torchs_on_full_batches(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    theirs = grown(make())
    ours = prepare(theirs)
    assert type(ours) in (BatchNorm1d, BatchNorm2d)
    weight = normal(*shape, seed=9)
    for step in range(3):
        x = normal(*shape, seed=step)
        a, b = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
        left, right = theirs(a), ours(b)
        assert torch.allclose(left, right, atol=1e-12)
        inputs = [(a, b), *zip(theirs.parameters(), ours.parameters(), strict=True)]
        for p, q in inputs:
            (g,) = torch.autograd.grad((left * weight).sum(), [p], retain_graph=True)
            (h,) = torch.autograd.grad((right * weight).sum(), [q], retain_graph=True)
            assert torch.allclose(g, h, atol=1e-11)
    for (name, old), new in zip(theirs.named_buffers(), ours.buffers(), strict=True):
        assert torch.allclose(old.double(), new.double(), atol=1e-13), name
    theirs.eval(), ours.eval()
    x = normal(*shape, seed=7)
    assert torch.allclose(theirs(x), ours(x), atol=1e-12)


@pytest.mark.parametrize(("make", "shape"), NORMS[:3])
def test_padding_does_not_enter_the_statistics(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    alone = prepare(grown(make()))
    padded = copy.deepcopy(alone)
    x = normal(*shape)
    wide = torch.cat([x, 1000 * normal(3, *shape[1:], seed=4)])
    mask = torch.tensor([True] * len(x) + [False] * 3)
    want = alone(x)
    with situation(mask=mask):
        got = padded(wide)
    assert torch.allclose(got[: len(x)], want, atol=1e-12)
    for old, new in zip(alone.buffers(), padded.buffers(), strict=True):
        assert torch.allclose(old.double(), new.double(), atol=1e-12)
    naive = copy.deepcopy(alone)
    assert not torch.allclose(naive(wide)[: len(x)], want, atol=1e-2)


def test_one_record_is_a_batch_too() -> None:
    norm = prepare(nn.BatchNorm1d(2).double())
    out = norm(torch.tensor([[3.0, -1.0]]).double())
    assert torch.equal(out, torch.zeros(1, 2).double())
    assert torch.allclose(norm.running_mean, torch.tensor([0.3, -0.1]).double())
    assert torch.allclose(norm.running_var, torch.tensor([0.9, 0.9]).double())
    with pytest.raises(ValueError, match="more than 1 value"):
        nn.BatchNorm1d(2)(torch.zeros(1, 2))


CONVS = [
    nn.Conv2d(2, 3, 3),
    nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False),
    nn.Conv2d(1, 4, (2, 3), stride=(1, 2), padding=(2, 0)),
    nn.Conv2d(3, 2, 1, stride=2),
    nn.Conv2d(2, 2, 5, padding=2, stride=3),
]


@pytest.mark.parametrize("conv", CONVS, ids=str)
@pytest.mark.parametrize("batched", ["both", "weights", "inputs"])
def test_convolution_under_vmap_equals_one_after_the_other(conv: nn.Conv2d, batched: str) -> None:
    ours = prepare(conv.double())
    assert type(ours) is Conv2d
    devices, size = 4, (3, conv.in_channels, 7, 8)
    names = [n for n, _ in conv.named_parameters()]
    weights = {n: normal(devices, *p.shape, seed=i) for i, (n, p) in enumerate(conv.named_parameters())}
    x = normal(devices, *size, seed=5)
    if batched == "weights":
        x = x[0]
    if batched == "inputs":
        weights = {n: w[0] for n, w in weights.items()}
    dims = (None if batched == "inputs" else 0, None if batched == "weights" else 0)
    leaves = [w.requires_grad_(True) for w in weights.values()] + [x.requires_grad_(True)]

    def one(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(ours, weights, (x,))
        return out

    got = vmap(one, in_dims=dims)(weights, x)
    want = []
    for k in range(devices):
        own = [weights[n] if batched == "inputs" else weights[n][k] for n in names]
        given = x if batched == "weights" else x[k]
        want.append(F.conv2d(given, own[0], own[1] if len(own) > 1 else None, conv.stride, conv.padding))
    expected = torch.stack(want)
    assert torch.allclose(got, expected, atol=1e-12)
    probe = normal(*got.shape, seed=8)
    left = torch.autograd.grad((got * probe).sum(), leaves)
    right = torch.autograd.grad((expected * probe).sum(), leaves)
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(left, right, strict=True))


def test_convolution_alone_equals_torchs_and_has_right_gradients() -> None:
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
    ours = prepare(conv)
    x = normal(2, 2, 6, 5).requires_grad_(True)
    assert torch.allclose(ours(x), conv(x), atol=1e-13)
    assert torch.autograd.gradcheck(ours, (x,))


def test_dropout_is_the_same_alone_and_in_a_stack() -> None:
    layer = Dropout(0.4)
    sizes, wide = [5, 2, 4], 5
    x = [normal(n, 6, seed=n) for n in sizes]
    alone = []
    for k, own in enumerate(x):
        with situation(mask=None, generators=[rng(k)]):
            alone.append((layer(own), layer(own)))
    stacked = torch.stack([F.pad(own, (0, 0, 0, wide - len(own))) for own in x])
    with situation(mask=None, generators=[rng(k) for k in range(3)], sizes=sizes):
        first, second = vmap(layer)(stacked), vmap(layer)(stacked)
    for k, n in enumerate(sizes):
        assert torch.equal(first[k, :n], alone[k][0]) and torch.equal(second[k, :n], alone[k][1])
    assert not torch.equal(first, second)


def test_dropout_on_shared_inputs_draws_for_each_device() -> None:
    """Proxy batches are one tensor for all devices; their masks must differ all the same."""
    layer, x = Dropout(0.5), normal(6, 4)
    weights = torch.ones(3, 4).double()

    def one(weight: Tensor) -> Tensor:
        with situation(mask=None, anchor=weight):
            out: Tensor = layer(x) * weight
        return out

    with situation(mask=None, generators=[rng(k) for k in range(3)], sizes=[6] * 3):
        got = vmap(one)(weights)
    for k in range(3):
        with situation(mask=None, generators=[rng(k)]):
            assert torch.equal(got[k], layer(x))


def test_dropout_keeps_the_mean_and_the_gradient_follows_the_mask() -> None:
    layer = Dropout(0.25)
    x = torch.ones(200, 100, dtype=torch.float64, requires_grad=True)
    with situation(mask=None, generators=[rng()]):
        out = layer(x)
    kept = (out != 0).double().mean().item()
    assert abs(kept - 0.75) < 5 * (0.25 * 0.75 / 20000) ** 0.5
    assert out.max().item() == pytest.approx(1 / 0.75)
    (grad,) = torch.autograd.grad(out.sum(), [x])
    assert torch.equal(grad, out.detach())
    layer.eval()
    assert layer(x) is x
    with pytest.raises(RuntimeError, match="random stream"):
        layer.train()(x)


def test_dropout_of_everything_gives_zeros() -> None:
    with situation(mask=None, generators=[rng()]):
        assert torch.equal(Dropout(1.0)(torch.ones(2, 3)), torch.zeros(2, 3))


def test_prepare_leaves_the_given_model_and_the_names_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.1), nn.Conv2d(2, 2, 3, groups=2))
    ours = prepare(model)
    assert [type(m) for m in ours] == [Conv2d, BatchNorm2d, Dropout, nn.Conv2d]
    assert [type(m) for m in model] == [nn.Conv2d, nn.BatchNorm2d, nn.Dropout, nn.Conv2d]
    assert ours.state_dict().keys() == model.state_dict().keys()
    assert ours[0].weight is not model[0].weight
