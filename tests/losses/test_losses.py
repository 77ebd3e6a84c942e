"""Losses against the papers' formulas written out with plain loops in float64, and what the formulas promise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkd.losses import (
    CRD,
    DIST,
    DKD,
    KD,
    LOSSES,
    AttentionTransfer,
    BetaJensenShannon,
    ChannelWise,
    CompositionalContrast,
    ContextRanking,
    CorrelationCongruence,
    CrossEntropy,
    Detection,
    FeatureImitation,
    FitNet,
    HeadDistillation,
    InfoNCE,
    LogitRegression,
    LogitStandardisedKD,
    Loss,
    PixelCrossEntropy,
    PixelKD,
    ProbabilisticTransfer,
    PrototypeAlignment,
    RepresentationSimilarity,
    ReviewKD,
    RKDAngle,
    RKDDistance,
    SimilarityPreserving,
    TrainedLoss,
)
from fedkd.losses.feature import hierarchical_context

B, C = 5, 4
Rows = np.ndarray


def tensors(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    student = torch.randn(shape, generator=stream, dtype=torch.float64)
    teacher = torch.randn(shape, generator=stream, dtype=torch.float64)
    return student, teacher, torch.randint(C, (shape[0],), generator=stream)


def softmax(z: Rows) -> Rows:
    e = np.exp(z - z.max())
    return e / e.sum()


def kl(p: Rows, q: Rows) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


# ---- the formulas, record by record ---------------------------------------------------------------------------------
def f_ce(s: Rows, t: Rows, y: Rows) -> float:
    return float(np.mean([-math.log(softmax(z)[k]) for z, k in zip(s, y, strict=True)]))


def f_kd(s: Rows, t: Rows, y: Rows) -> float:
    return float(np.mean([16 * kl(softmax(b / 4), softmax(a / 4)) for a, b in zip(s, t, strict=True)]))


def f_logits(s: Rows, t: Rows, y: Rows) -> float:
    return float(np.mean((s - t) ** 2))


def f_dkd(s: Rows, t: Rows, y: Rows) -> float:
    total = []
    for a, b, k in zip(s, t, y, strict=True):
        p, q = softmax(b / 4), softmax(a / 4)
        rest = [i for i in range(C) if i != k]
        tckd = kl(np.array([p[k], 1 - p[k]]), np.array([q[k], 1 - q[k]]))
        nckd = kl(p[rest] / p[rest].sum(), q[rest] / q[rest].sum())
        total.append(16 * (tckd + 8 * nckd))
    return float(np.mean(total))


def f_dist(s: Rows, t: Rows, y: Rows) -> float:
    p, q = np.array([softmax(z) for z in s]), np.array([softmax(z) for z in t])
    inter = np.mean([1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(B)])
    intra = np.mean([1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(C)])
    return float(inter + intra)


def f_lskd(s: Rows, t: Rows, y: Rows) -> float:
    def z(v: Rows) -> Rows:
        return (v - v.mean()) / v.std()

    return float(np.mean([4 * kl(softmax(z(b) / 2), softmax(z(a) / 2)) for a, b in zip(s, t, strict=True)]))


def f_beta(s: Rows, t: Rows, y: Rows) -> float:
    total = []
    for a, b in zip(s, t, strict=True):
        p, q = softmax(b), softmax(a)
        m = 0.3 * p + 0.7 * q
        total.append(0.3 * kl(p, m) + 0.7 * kl(q, m))
    return float(np.mean(total))


def f_rkd_d(s: Rows, t: Rows, y: Rows) -> float:
    def d(f: Rows) -> Rows:
        gaps = np.array([[np.linalg.norm(a - b) for b in f] for a in f])
        return np.asarray(gaps / (gaps.sum() / (B * (B - 1))))

    return sum(huber(d(s)[i, j] - d(t)[i, j]) for i in range(B) for j in range(B)) / B**2


def f_rkd_a(s: Rows, t: Rows, y: Rows) -> float:
    def angle(f: Rows, i: int, j: int, k: int) -> float:
        if i == j or j == k:
            return 0.0
        a, b = f[i] - f[j], f[k] - f[j]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    r = range(B)
    return sum(huber(angle(s, i, j, k) - angle(t, i, j, k)) for i in r for j in r for k in r) / B**3


def f_sp(s: Rows, t: Rows, y: Rows) -> float:
    def g(f: Rows) -> Rows:
        return np.array([row / np.linalg.norm(row) for row in f @ f.T])

    return float(((g(t) - g(s)) ** 2).sum() / B**2)


def cosines(f: Rows) -> Rows:
    u = np.array([row / np.linalg.norm(row) for row in f])
    return u @ u.T


def f_pkt(s: Rows, t: Rows, y: Rows) -> float:
    def p(f: Rows) -> Rows:
        k = (cosines(f) + 1) / 2
        return np.array([row / row.sum() for row in k])

    return float((p(t) * np.log(p(t) / p(s))).mean())


def f_cc(s: Rows, t: Rows, y: Rows) -> float:
    def k(f: Rows) -> Rows:
        x = 0.8 * cosines(f)
        return np.asarray(math.exp(-0.8) * (1 + x + x**2 / 2))

    return float(((k(s) - k(t)) ** 2).mean())


def f_cc_exact(s: Rows, t: Rows, y: Rows) -> float:
    def k(f: Rows) -> Rows:
        u = np.array([row / np.linalg.norm(row) for row in f])
        return np.array([[math.exp(-0.4 * ((a - b) ** 2).sum()) for b in u] for a in u])

    return float(((k(s) - k(t)) ** 2).mean())


def f_nce(s: Rows, t: Rows, y: Rows) -> float:
    u, v = (np.array([row / np.linalg.norm(row) for row in f]) for f in (s, t))
    z = u @ v.T / 0.1
    rows = [-math.log(softmax(z[i])[i]) for i in range(B)]
    columns = [-math.log(softmax(z[:, i])[i]) for i in range(B)]
    return float(np.mean(rows) + np.mean(columns)) / 2


def f_inner(s: Rows, t: Rows, y: Rows) -> float:
    return float(((s @ s.T - t @ t.T) ** 2).mean())


def f_ranking(s: Rows, t: Rows, y: Rows) -> float:
    values = []
    for a, b in zip(s, t, strict=True):
        for i in range(C):
            for j in range(i + 1, C):
                r = 1 if b[i] - b[j] > 0.1 else -1 if b[j] - b[i] > 0.1 else 0
                values.append(max(0.0, -r * (a[i] - a[j]) + 0.1))
    return float(np.mean(values))


def f_prototypes(s: Rows, t: Rows, y: Rows) -> float:
    gaps = [((s[y == c].mean(0) - t[y == c].mean(0)) ** 2).mean() for c in y]
    return float(np.mean(gaps))


FORMULAS: list[tuple[Loss, Callable[[Rows, Rows, Rows], float]]] = [
    (CrossEntropy(), f_ce),
    (KD(), f_kd),
    (LogitRegression(), f_logits),
    (DKD(), f_dkd),
    (DIST(), f_dist),
    (LogitStandardisedKD(), f_lskd),
    (BetaJensenShannon(beta=0.3), f_beta),
    (FitNet(), f_logits),
    (RKDDistance(), f_rkd_d),
    (RKDAngle(), f_rkd_a),
    (SimilarityPreserving(), f_sp),
    (ProbabilisticTransfer(), f_pkt),
    (CorrelationCongruence(), f_cc),
    (CorrelationCongruence(order=None), f_cc_exact),
    (InfoNCE(), f_nce),
    (RepresentationSimilarity(), f_inner),
    (ContextRanking(), f_ranking),
    (PrototypeAlignment(), f_prototypes),
]
RELATIONS: list[Loss] = [
    RKDDistance(),
    RKDAngle(),
    SimilarityPreserving(),
    ProbabilisticTransfer(),
    CorrelationCongruence(),
]
PURE = [loss for loss, _ in FORMULAS] + [AttentionTransfer()]


def shape_of(loss: Loss) -> tuple[int, ...]:
    return (B, 3, 4, 4) if isinstance(loss, AttentionTransfer) else (B, C)


@pytest.mark.parametrize(("loss", "formula"), FORMULAS, ids=lambda x: type(x).__name__ if isinstance(x, Loss) else "")
def test_value_of_the_paper(loss: Loss, formula: Callable[[Rows, Rows, Rows], float]) -> None:
    student, teacher, labels = tensors((B, C), 1)
    wanted = formula(student.numpy(), teacher.numpy(), labels.numpy())
    assert wanted > 1e-4
    assert float(loss(student, teacher, labels)) == pytest.approx(wanted, rel=1e-10)


def test_attention_transfer_of_the_paper() -> None:
    s, _, _ = tensors((B, 3, 4, 4), 2)
    t, _, _ = tensors((B, 7, 4, 4), 3)  # another width
    total = []
    for a, b in zip(s.numpy(), t.numpy(), strict=True):
        p, q = (a**2).mean(0).ravel(), (b**2).mean(0).ravel()
        total.append(((p / np.linalg.norm(p) - q / np.linalg.norm(q)) ** 2).mean())
    assert float(AttentionTransfer()(s, t)) == pytest.approx(float(np.mean(total)), rel=1e-10)
    assert float(AttentionTransfer()(s, t[:, :, ::2, ::2])) > 0
    with pytest.raises(ValueError, match="tap a convolution"):
        AttentionTransfer()(s.flatten(1), t)


@pytest.mark.parametrize("loss", PURE, ids=lambda x: type(x).__name__)
def test_gradient(loss: Loss) -> None:
    student, teacher, labels = tensors(shape_of(loss), 4)
    student.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, labels), [student])


@pytest.mark.parametrize("loss", PURE, ids=lambda x: type(x).__name__)
def test_padding_changes_nothing(loss: Loss) -> None:
    """A stacked batch is padded: rows of weight 0 must not be felt, whatever lies in them."""
    student, teacher, labels = tensors(shape_of(loss), 5)
    wanted = loss(student, teacher, labels)
    rest, junk, _ = tensors((2, *shape_of(loss)[1:]), 6)
    weight = torch.tensor([1 / B] * B + [0.0] * 2, dtype=torch.float64)
    padded = [torch.cat([x, 100 * y]).requires_grad_(True) for x, y in ((student, rest), (teacher, junk))]
    value = loss(padded[0], padded[1], torch.cat([labels, labels[:2]]), weight)
    assert float(value.detach()) == pytest.approx(float(wanted), rel=1e-9)
    (grad,) = torch.autograd.grad(value, padded[0])
    assert bool((grad[B:] == 0).all())


@pytest.mark.parametrize("loss", PURE, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_tensors_give_no_nan(loss: Loss, dtype: torch.dtype) -> None:
    student, teacher, labels = tensors(shape_of(loss), 7)
    cases = [
        (1e4 * student, 1e4 * teacher),
        (0 * student, teacher),
        (student, 0 * teacher),
        (1e4 * student, 1e-8 * teacher),
    ]
    cases += [(student[:1].expand_as(student), teacher), (1e-12 * student, 1e-12 * teacher)]
    for s, t in cases:
        s = s.to(dtype).detach().clone().requires_grad_(True)
        value = loss(s, t.to(dtype), labels)
        (grad,) = torch.autograd.grad(value, s, materialize_grads=True)
        assert math.isfinite(float(value)) and bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("loss", [p for p in PURE if p.reads != "labels"], ids=lambda x: type(x).__name__)
def test_nothing_to_learn_from_oneself(loss: Loss) -> None:
    student, _, labels = tensors(shape_of(loss), 8)
    least = float(loss(student, student, labels))
    other, _, _ = tensors(shape_of(loss), 9)
    assert least < float(loss(other, student, labels))
    if not isinstance(loss, InfoNCE):
        assert least == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", [p for p in PURE if type(p) is not AttentionTransfer], ids=lambda x: type(x).__name__)
def test_stacks_of_devices_give_what_each_gives(loss: Loss) -> None:
    """Any loss may be a term of a federated method, whose devices are trained under vmap."""
    student, teacher, labels = tensors((3 * B, C), 10)
    s, t, y = student.view(3, B, C), teacher.view(3, B, C), labels.view(3, B)
    weight = torch.full((3, B), 1 / B, dtype=torch.float64)
    together = torch.func.vmap(loss)(s, t, y, weight)
    alone = torch.stack([loss(s[k], t[k], y[k], weight[k]) for k in range(3)])
    assert torch.allclose(together, alone, rtol=1e-12, atol=0)


# ---- what the papers promise ----------------------------------------------------------------------------------------
def rotation(seed: int) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(C, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return q


@pytest.mark.parametrize("loss", RELATIONS, ids=lambda x: type(x).__name__)
def test_relations_do_not_feel_a_rotation_of_features(loss: Loss) -> None:
    s, t, _ = tensors((B, C), 11)
    assert float(loss(s @ rotation(1), t @ rotation(2))) == pytest.approx(float(loss(s, t)), rel=1e-9)


@pytest.mark.parametrize("loss", [RKDDistance(), RKDAngle()], ids=lambda x: type(x).__name__)
def test_rkd_feels_neither_scale_nor_translation(loss: Loss) -> None:
    s, t, _ = tensors((B, C), 12)
    assert float(loss(7 * s + 3, 0.01 * t - 5)) == pytest.approx(float(loss(s, t)), rel=1e-7)


@pytest.mark.parametrize("loss", RELATIONS, ids=lambda x: type(x).__name__)
def test_relations_take_another_width(loss: Loss) -> None:
    s, _, _ = tensors((B, 3), 13)
    t, _, _ = tensors((B, 9), 14)
    assert math.isfinite(float(loss(s, t)))


def test_dist_feels_no_scale_of_probabilities_but_kd_does() -> None:
    """Pearson's correlation is invariant to a positive affine map of either side: here of standardised logits."""
    s, t, _ = tensors((B, C), 15)
    assert float(LogitStandardisedKD()(5 * s + 2, t)) == pytest.approx(float(LogitStandardisedKD()(s, t)), rel=1e-9)
    assert abs(float(KD()(5 * s + 2, t)) - float(KD()(s, t))) > 0.1


def test_dkd_with_equal_weights_is_kd_decoupled() -> None:
    """Zhao et al., eq. (5): KD = TCKD + (1 - p_target) NCKD; so with alpha 1 and beta 0 the rest is what is missing."""
    s, t, y = tensors((1, C), 16)
    p = float((t / 4).softmax(-1)[0, y[0]])
    tckd = float(DKD(alpha=1, beta=0)(s, t, y))
    nckd = float(DKD(alpha=0, beta=1)(s, t, y))
    assert tckd + (1 - p) * nckd == pytest.approx(float(KD()(s, t)), rel=1e-10)


def test_dkd_refuses_two_classes() -> None:
    s, t, _ = tensors((B, 2), 17)
    with pytest.raises(ValueError, match="at least three classes"):
        DKD()(s, t, torch.zeros(B, dtype=torch.int64))


def test_losses_say_what_they_lack() -> None:
    s, t, _ = tensors((B, C), 18)
    with pytest.raises(ValueError, match="needs true labels"):
        CrossEntropy()(s, t)
    with pytest.raises(ValueError, match="element by element"):
        FitNet()(s, t[:, :3])
    with pytest.raises(ValueError, match="temperature"):
        KD(temperature=0)
    with pytest.raises(TypeError, match="build"):
        CRD()(s, t)


def test_every_loss_has_a_name() -> None:
    maps = {ChannelWise, Detection, FeatureImitation, HeadDistillation, PixelCrossEntropy, PixelKD}  # their own file
    assert {type(loss) for loss in PURE} | {CRD, CompositionalContrast, ReviewKD} | maps == set(LOSSES.values())


# ---- losses with parts of their own ---------------------------------------------------------------------------------
def built(loss: TrainedLoss, student: Tensor, teacher: Tensor, records: int = 50) -> torch.nn.Module:
    torch.manual_seed(0)
    return loss.build((student.shape,), (teacher.shape,), records, C).double()


def embedded(module: torch.nn.Module, student: Tensor, teacher: Tensor) -> list[Tensor]:
    pairs = ((module.get_submodule("student"), student), (module.get_submodule("teacher"), teacher))
    return [torch.nn.functional.normalize(layer(x), dim=1) for layer, x in pairs]


def test_hierarchical_context_of_the_paper() -> None:
    s, t, _ = tensors((2, 3, 8, 8), 19)

    def pooled(x: Tensor, size: int) -> Rows:
        a = x.numpy()
        k = 8 // size
        return np.asarray(a.reshape(2, 3, size, k, size, k).mean((3, 5)))

    total = ((s - t).numpy() ** 2).mean()
    for size, factor in ((4, 0.5), (2, 0.25), (1, 0.125)):
        total += factor * ((pooled(s, size) - pooled(t, size)) ** 2).mean()
    assert float(hierarchical_context(s, t)) == pytest.approx(total / 1.875, rel=1e-10)


def test_review_teaches_every_level() -> None:
    s1, _, _ = tensors((B, 3, 8, 8), 20)
    s2, _, _ = tensors((B, 6, 4, 4), 21)
    t1, _, _ = tensors((B, 5, 8, 8), 22)
    t2, _, _ = tensors((B, 10, 4, 4), 23)
    torch.manual_seed(0)
    module = ReviewKD(middle=8).build((s1.shape, s2.shape), (t1.shape, t2.shape), 50, C).double()
    s1.requires_grad_(True), s2.requires_grad_(True)
    value = module((s1, s2), (t1, t2))
    shallow, deep = torch.autograd.grad(value, [s1, s2])
    assert float(shallow.abs().sum()) > 0 and float(deep.abs().sum()) > 0
    with pytest.raises(ValueError, match="maps"):
        ReviewKD().build((s1.flatten(1).shape,), (t1.flatten(1).shape,), 50, C)


def test_review_fuses_what_came_from_below() -> None:
    """Chen et al. 2021, section 3.2: the deep level's features, enlarged, are mixed with the shallow level's by attention."""
    deep, shallow = tensors((2, 6, 4, 4), 26)[0], tensors((2, 3, 8, 8), 27)[0]
    t1, t2 = tensors((2, 5, 8, 8), 28)[0], tensors((2, 10, 4, 4), 29)[0]
    torch.manual_seed(0)
    module = ReviewKD(middle=8).build((shallow.shape, deep.shape), (t1.shape, t2.shape), 50, C).double().eval()
    upper, lower = (module.get_submodule(f"levels.{i}") for i in range(2))
    with torch.no_grad():
        x, below = upper.get_submodule("enter")(shallow), lower.get_submodule("enter")(deep)
        wanted = hierarchical_context(lower.get_submodule("leave")(below), t2)
        grown = below.repeat_interleave(2, 2).repeat_interleave(2, 3)
        conv = upper.get_submodule("attend.0")
        assert isinstance(conv, torch.nn.Conv2d) and conv.bias is not None
        mix = torch.einsum("om,bmhw->bohw", conv.weight[:, :, 0, 0], torch.cat([x, grown], 1)) + conv.bias.view(
            1, 2, 1, 1
        )
        share = 1 / (1 + (-mix).exp())
        wanted = wanted + hierarchical_context(
            upper.get_submodule("leave")(share[:, :1] * x + share[:, 1:] * grown), t1
        )
        assert float(module((shallow, deep), (t1, t2))) == pytest.approx(float(wanted), rel=1e-10)


def test_crd_of_the_paper() -> None:
    """One direction and the other, with the banks' entries and the estimate of Z taken from the module."""
    student, _, _ = tensors((B, 6), 24)
    teacher, _, _ = tensors((B, 7), 25)
    loss = CRD(negatives=20, dimensions=8)
    module = built(loss, student, teacher)
    index, labels = torch.arange(B) * 3, torch.tensor([0, 1, 2, 3, 0])
    banks = {n: getattr(module, n).clone().double() for n in ("bank_student", "bank_teacher")}
    state = module.stream.get_state()  # type: ignore[union-attr]
    value = float(module((student,), (teacher,), labels, index))
    replay = torch.Generator()
    replay.set_state(state)
    others = torch.randint(50, (B, 20), generator=replay)
    seen = {int(i): int(y) for i, y in zip(index, labels, strict=True)}
    with torch.no_grad():
        sides = embedded(module, student, teacher)
    total = 0.0
    for anchor, bank in zip(sides, (banks["bank_teacher"], banks["bank_student"]), strict=True):
        e = torch.exp(torch.einsum("bd,bkd->bk", anchor, bank[others]) / 0.07)
        z = float(e.mean()) * 50
        for i in range(B):
            own = math.exp(float(anchor[i] @ bank[index[i]]) / 0.07) / z
            total -= math.log(own / (own + 20 / 50)) / B
            for k in range(20):
                j = int(others[i, k])
                if j == int(index[i]) or seen.get(j) == int(labels[i]):
                    continue
                h = float(e[i, k]) / z
                total -= math.log(1 - h / (h + 20 / 50)) / B
    assert value == pytest.approx(total, rel=1e-5)  # the banks are float32
    for name in banks:
        assert bool((getattr(module, name)[index] != banks[name][index]).any()), "the memory must follow"


def test_crd_pulls_pairs_together() -> None:
    torch.manual_seed(0)
    student = torch.randn(40, 6)
    teacher = student @ torch.randn(6, 7)
    module = CRD(negatives=30, dimensions=8).build((student.shape,), (teacher.shape,), 40, C)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    index = torch.arange(40)
    for _ in range(150):
        optimizer.zero_grad()
        module((student,), (teacher,), None, index).backward()
        optimizer.step()
    with torch.no_grad():
        s, t = embedded(module, student, teacher)
    best = (s @ t.T).argmax(1)
    assert float((best == index).float().mean()) > 0.8
