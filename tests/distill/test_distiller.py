"""Central distillation: taps leave no trace, terms teach, answers are asked once, and a resumed run is the same run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from fedkd.distill import (
    Distiller,
    EnsembleTeacher,
    Fit,
    ModuleTeacher,
    PredictorTeacher,
    Records,
    SigmoidRamp,
    Taps,
    Term,
    Warmup,
    accuracy,
    load_teacher,
)
from fedkd.distill.cache import AnswerCache
from fedkd.distill.loop import Batch, Best, Epoch, Loop, logged
from fedkd.errors import ConfigError
from fedkd.losses import (
    CRD,
    DKD,
    KD,
    AttentionTransfer,
    CrossEntropy,
    FitNet,
    InfoNCE,
    ReviewKD,
    RKDDistance,
    SimilarityPreserving,
)
from fedkd.models import Architecture


def digits() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    x = torch.from_numpy(np.asarray(bunch.images, np.float32) / 16)[:, None]
    return x, torch.from_numpy(np.asarray(bunch.target, np.int64))


def model(name: str, seed: int) -> nn.Module:
    architecture = Architecture(name, (1, 8, 8), 10, torch.float32)
    return architecture.module(architecture.initial(seed))


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    net = model("mlp(hidden=[128])", 1)
    x, y = digits()
    Distiller(net, None, [Term(CrossEntropy(), 1.0)], fit=Fit(epochs=15, lr=0.05)).fit(x[:1300], y[:1300])
    return net


# ---- taps -----------------------------------------------------------------------------------------------------------
def test_taps_read_and_leave_no_trace() -> None:
    net = model("cnn", 1)
    before = {n: (len(m._forward_hooks), m.training) for n, m in net.named_modules()}
    x = torch.zeros(2, 1, 8, 8)
    with Taps(net, ["body.0", "head"]) as taps:
        out = net(x)
        assert taps["head"] is out and taps["body.0"].shape == (2, 6, 4, 4)
    assert {n: (len(m._forward_hooks), m.training) for n, m in net.named_modules()} == before
    with pytest.raises(RuntimeError), Taps(net, ["body.0"]):
        raise RuntimeError("boom")
    assert not any(m._forward_hooks for m in net.modules())


def test_an_unknown_layer_gets_the_nearest_names() -> None:
    with pytest.raises(ConfigError, match=r"no layer 'body.00'.*body\.0"):
        Taps(model("cnn", 1), ["body.00"])


# ---- terms ----------------------------------------------------------------------------------------------------------
def test_a_taught_student_needs_no_labels(teacher: nn.Module) -> None:
    x, y = digits()
    student = model("mlp(hidden=[16])", 2)
    log = Distiller(student, teacher, [Term(KD(temperature=2), 1.0)], fit=Fit(epochs=15, lr=0.05)).fit(x[:1300])
    assert log[-1].total < 0.3 * log[0].total
    test = Records.of(x[1300:], y[1300:])
    assert accuracy(student, test) > 0.85
    assert accuracy(student, test) > accuracy(teacher, test) - 0.08


@pytest.mark.parametrize(
    ("term", "adapted"),
    [
        (Term(FitNet(), student="body.0", teacher="body.0"), True),
        (Term(FitNet(), student="body.7", teacher="body.0"), True),
        (Term(FitNet(), student="body.0", teacher="head"), True),
        (Term(InfoNCE(), 1.0, student="body", teacher="body"), True),
        (Term(AttentionTransfer(), student="body.0", teacher="body.3"), False),
        (Term(RKDDistance(), student="body", teacher="body"), False),
        (Term(SimilarityPreserving(), student="body", teacher="body"), False),
        (Term(CRD(negatives=30), student="body", teacher="body"), False),
        (Term(ReviewKD(middle=8), student=("body.0", "body.3"), teacher=("body.0", "body.3")), False),
    ],
    ids=lambda v: v.name if isinstance(v, Term) else "",
)
def test_every_kind_of_term_teaches(term: Term, adapted: bool) -> None:
    """The tapped student layer moves, the teacher does not, and the parts of a term are trained along."""
    x, y = digits()
    student, big = model("cnn(channels=[3, 5], features=9)", 3), model("cnn(channels=[6, 8], features=20)", 4)
    still = {n: t.clone() for n, t in big.state_dict().items()}
    start = {n: p.detach().clone() for n, p in student.named_parameters()}
    distiller = Distiller(student, big, [term], fit=Fit(epochs=6, lr=0.02, momentum=0.5, weight_decay=0))
    log = distiller.fit(x[:200], y[:200])
    # ReviewKD's published weight is large for so short a training: what counts is that the loss falls.
    assert log[-1].terms[term.name] < log[0].terms[term.name]
    assert bool((student.state_dict()["body.0.weight"] != start["body.0.weight"]).any())
    assert all(bool((t == still[n]).all()) for n, t in big.state_dict().items())
    assert distiller._bound is not None and (distiller._bound[0].adapter is not None) == adapted


def test_terms_are_logged_and_scheduled(teacher: nn.Module) -> None:
    x, y = digits()
    terms = [Term(CrossEntropy(), 0.5), Term(KD(), 2.0, schedule=Warmup(4)), Term(KD(temperature=1), 0.0)]
    log = Distiller(model("logreg", 5), teacher, terms, fit=Fit(epochs=2)).fit(x[:200], y[:200])
    assert list(log[0].terms) == ["CrossEntropy", "KD", "KD #2"]
    for epoch, factor in enumerate((0.5, 1.0)):
        values = list(log[epoch].terms.values())
        assert log[epoch].total == pytest.approx(0.5 * values[0] + factor * values[1], rel=1e-6)
    assert [Warmup(4)(e) for e in (0, 3, 9)] == [0.25, 1.0, 1.0]
    ramp = SigmoidRamp(80)
    assert ramp(0) == pytest.approx(np.exp(-5)) and ramp(80) == ramp(200) == 1.0


def test_mistakes_are_told_before_training(teacher: nn.Module) -> None:
    x, y = digits()
    net = model("cnn", 6)

    def told(terms: list[Term], by: object = teacher, labels: Tensor | None = y) -> str:
        with pytest.raises(ConfigError) as seen:
            Distiller(net, by, terms).fit(x, labels)  # type: ignore[arg-type]
        return str(seen.value)

    assert "at least one term" in told([])
    assert "none is given" in told([Term(KD())], by=None)
    assert "name a layer" in told([Term(FitNet())])
    assert "no layer 'body.9x'" in told([Term(FitNet(), student="body.9x", teacher="body")])
    assert "have none" in told([Term(CrossEntropy(), 1.0)], labels=None)
    assert "pair by pair" in told([Term(ReviewKD(), student=("body.0", "body.3"), teacher="body")])
    assert "maps" in told([Term(ReviewKD(), student="head", teacher="head")])
    sk = PredictorTeacher(LogisticRegression(max_iter=50).fit(x[:300].flatten(1), y[:300]), 10, "sk")
    assert "of one torch model alone" in told([Term(FitNet(), student="body.0", teacher="body.0")], by=sk)


# ---- teachers -------------------------------------------------------------------------------------------------------
def test_teachers_of_every_kind(teacher: nn.Module, tmp_path: Path) -> None:
    x, y = digits()
    shape = (1, 8, 8)
    torch.save(teacher.state_dict(), tmp_path / "t.pt")
    loaded = load_teacher(tmp_path / "t.pt", shape, 10, "mlp(hidden=[128])")
    wanted = ModuleTeacher(teacher, 10).logits(x[:5])
    assert torch.equal(loaded.logits(x[:5]), wanted)
    with pytest.raises(ConfigError, match="which model"):
        load_teacher(tmp_path / "t.pt", shape, 10)
    with pytest.raises(ConfigError, match="do not fit"):
        load_teacher(tmp_path / "t.pt", shape, 10, "mlp(hidden=[64])")
    torch.save(teacher, tmp_path / "whole.pt")  # a pickle of code
    with pytest.raises(ConfigError, match="more than tensors"):
        load_teacher(tmp_path / "whole.pt", shape, 10, "mlp(hidden=[128])")
    with pytest.raises(ConfigError, match="cannot read"):
        load_teacher(tmp_path / "none.safetensors", shape, 10)

    sk = PredictorTeacher(LogisticRegression(max_iter=200).fit(x[:900].flatten(1), y[:900] % 9), 10, "sk")
    assert sk.logits(x[:5]).shape == (5, 10)
    assert torch.allclose(sk.logits(x[:5]).softmax(1).sum(1), torch.ones(5))
    assert float(sk.logits(x[:5]).softmax(1)[:, 9].max()) < 1e-5  # a class it never saw

    both = EnsembleTeacher([(ModuleTeacher(teacher, 10), 3.0), (sk, 1.0)])
    mixed = 0.75 * wanted.softmax(1) + 0.25 * sk.logits(x[:5]).softmax(1)
    assert torch.allclose(both.logits(x[:5]).softmax(1), mixed, atol=1e-5)
    student = model("mlp(hidden=[16])", 7)
    Distiller(student, both, [Term(KD(temperature=2), 1.0)], fit=Fit(epochs=8)).fit(x[:1300])
    assert accuracy(student, Records.of(x[1300:], y[1300:])) > 0.8


def test_an_onnx_teacher_answers_as_its_module(teacher: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x, _ = digits()
    path = tmp_path / "t.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        teacher.eval(), (x[:2],), str(path), dynamo=True, dynamic_shapes=({0: batch},), external_data=False,
        verbose=False,
    )  # fmt: skip
    loaded = load_teacher(path, (1, 8, 8), 10)
    assert torch.allclose(loaded.logits(x[:7]), ModuleTeacher(teacher, 10).logits(x[:7]), atol=1e-4)
    assert loaded.shape == (1, 8, 8) and load_teacher(path).classes == 10
    # The same numbers called probabilities are another teacher, of other answers.
    told = load_teacher(path, gives="probabilities")
    assert told.identity != loaded.identity and not torch.allclose(told.logits(x[:7]), loaded.logits(x[:7]))
    with pytest.raises(ConfigError, match="classes"):
        load_teacher(path, (1, 8, 8), 9)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="ONNX"):
        load_teacher(path, (1, 8, 8), 10)


# ---- answers on disk ------------------------------------------------------------------------------------------------
class Counting(ModuleTeacher):
    asked = 0

    def read(self, x, paths):  # type: ignore[no-untyped-def]
        self.asked += len(x)
        return super().read(x, paths)


def test_fixed_data_are_asked_once(teacher: nn.Module, tmp_path: Path) -> None:
    x, y = digits()
    terms = [Term(KD(), 1.0), Term(RKDDistance(), student="body", teacher="body")]
    plain, cached = model("mlp(hidden=[16])", 8), model("mlp(hidden=[16])", 8)
    Distiller(plain, teacher, terms, fit=Fit(epochs=3)).fit(x[:200], y[:200])
    counting = Counting(teacher, 10)
    Distiller(cached, counting, terms, fit=Fit(epochs=3), cache=tmp_path).fit(x[:200], y[:200])
    assert counting.asked == 200 + 2  # every record once, and two to learn the shapes
    for a, b in zip(plain.parameters(), cached.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    Distiller(cached, counting, terms, fit=Fit(epochs=1), cache=tmp_path).fit(x[:200], y[:200])
    assert counting.asked == 200 + 4, "another process finds the answers on disk"
    Distiller(cached, counting, terms, fit=Fit(epochs=1), cache=tmp_path).fit(x[1:201], y[1:201])
    assert counting.asked == 400 + 6, "other data are other questions"


def test_a_damaged_cache_is_asked_anew(tmp_path: Path) -> None:
    calls: list[int] = []

    def ask(rows: np.ndarray) -> dict[str, Tensor]:
        calls.extend(rows.tolist())
        return {"logits": torch.from_numpy(rows[:, None] * 1.0)}

    cache = AnswerCache(tmp_path, "id", 10, ask)
    assert cache[np.array([3, 1, 3])]["logits"].flatten().tolist() == [3, 1, 3]
    assert sorted(calls) == [1, 3] and cache.filled == 2
    again = AnswerCache(tmp_path, "id", 10, ask)
    assert again[np.array([1, 2])]["logits"].flatten().tolist() == [1, 2] and sorted(calls) == [1, 2, 3]
    (again.folder / "0.npy").write_bytes(b"\x93NUMPY garbage")
    assert AnswerCache(tmp_path, "id", 10, ask)[np.array([1])]["logits"].flatten().tolist() == [1]
    assert calls.count(1) == 2


# ---- resume ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_resumed_training_is_the_same_training(teacher: nn.Module, tmp_path: Path, optimizer: str) -> None:
    x, y = digits()
    terms = [Term(KD(), 0.9), Term(CRD(negatives=20, dimensions=8), 0.1, student="body", teacher="body")]
    how = Fit(epochs=4, optimizer=optimizer, lr=0.01, schedule="cosine")  # type: ignore[arg-type]

    def train(stop: list[int], place: Path) -> nn.Module:
        for epochs in stop:
            student = model("mlp(hidden=[16], dropout=0.2)", 9)
            log = Distiller(student, teacher, terms, fit=how).fit(x[:150], y[:150], epochs=epochs, checkpoint=place)
            assert [e.epoch for e in log] == list(range(epochs))
        return student

    whole, pieces = train([4], tmp_path / "a"), train([1, 3, 4], tmp_path / "b")
    for a, b in zip(whole.parameters(), pieces.parameters(), strict=True):
        assert torch.equal(a, b)


def test_early_stopping_survives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best weights, how long it was waited, and the end of training are the same bits after a resume."""
    monkeypatch.setattr("fedkd.distill.loop.PAUSE", 0.0)
    x, y = digits()
    x, y = x[:120], y[:120]
    scores = [0.1, 0.5, 0.3, 0.5, 0.4, 0.2, 0.9]

    def run(folder: Path, dies: int | None, later: bool) -> tuple[nn.Module, list[float | None]]:
        net = model("mlp(hidden=[8], dropout=0.3)", 1)

        def step(batch: Batch) -> dict[str, tuple[Tensor, float]]:
            at = torch.from_numpy(batch.index)
            return {"labels": (CrossEntropy()(net(x[at]), x, y[at]), 1.0)}

        def look() -> float:
            assert not net.training
            return scores[len(loop.log) - 1]

        def watch(epoch: Epoch) -> None:
            if epoch.epoch == dies:
                raise KeyboardInterrupt

        best = Best(score=look, patience=2, later=later)
        loop = Loop({"net": net}, 120, step, fit=Fit(epochs=7, batch_size=32), seed=1, best=best)
        loop.run(checkpoint=folder, watch=watch)
        return net, [e.score for e in loop.log]

    for later, ends in ((False, 4), (True, 6)):
        whole, log = run(tmp_path / f"whole {later}", None, later)
        assert log == scores[:ends], "two looks without a better score end it"
        for dies in (1, 2, ends - 1):
            place = tmp_path / f"{dies} {later}"
            with pytest.raises(KeyboardInterrupt):
                run(place, dies, later)
            again, log = run(place, None, later)
            assert log == scores[:ends]
            for name, tensor in whole.state_dict().items():
                assert torch.equal(tensor, again.state_dict()[name])
    # The best is epoch 1 of the first; of equal scores the later is epoch 3: the two differ.
    kept = [run(tmp_path / f"whole {later}", None, later)[0].state_dict()["head.weight"] for later in (False, True)]
    assert not torch.equal(*kept)
    assert [e.score for e in logged(tmp_path / "whole True")] == scores[:6]


def test_what_cannot_work_is_told_in_one_sentence(teacher: nn.Module) -> None:
    x, y = digits()
    x, y = x[:40], y[:40]
    two = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.idle = model("cnn", 1), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return self.inner(x), 1

    class Idle(Pair):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            out: Tensor = self.inner(x)
            return out

    kd = [Term(KD())]
    cases: list[tuple[str, Any, Any, Any, Tensor | None]] = [
        ("DKD needs at least three classes", two[0], two[1], [Term(DKD())], y % 2),
        ("compares element by element", model("cnn", 1), model("cnn(channels=[8])", 2),
         [Term(FitNet(), student="body.0", adapt="none")], None),
        ("expected a loss that was made", model("cnn", 1), teacher, lambda: [Term(KD, 1.0)], None),  # type: ignore[arg-type]
        ("expected a number", model("cnn", 1), teacher, lambda: [Term(KD(), float("nan"))], None),
        ("not layers", model("cnn", 1), teacher, lambda: [Term(KD(), student="body")], None),
        ("pairs with weights", model("cnn", 1), [teacher, teacher], kd, None),
        ("gives a tuple", Pair(), teacher, kd, None),
        ("'idle' is not called", Idle(), teacher, [Term(SimilarityPreserving(), student="idle", teacher="body")], None),
        ("no weight that takes a gradient", model("cnn", 1).requires_grad_(False), teacher, kd, None),
        ("40 records have 3 labels", model("cnn", 1), None, [Term(CrossEntropy())], y[:3]),
        ("expected whole numbers", model("cnn", 1), None, [Term(CrossEntropy())], y.float()),
        ("labels go from", model("cnn", 1), None, [Term(CrossEntropy())], y + 5),
        ("DKD needs true labels", model("cnn", 1), teacher, [Term(DKD())], None),
    ]  # fmt: skip
    for told, student, taught_by, terms, labels in cases:
        with pytest.raises(ConfigError, match=told):
            Distiller(student, taught_by, terms() if callable(terms) else terms).fit(x, labels, epochs=1)


def test_a_teacher_stays_as_it_is() -> None:
    x, _ = digits()
    net = model("cnn", 1).train()
    net.body.requires_grad_(False)
    before = {n: (p.requires_grad, p.clone()) for n, p in net.named_parameters()}
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    Distiller(model("cnn", 2), net, [Term(KD()), Term(FitNet(), student="body.0")]).fit(x[:80], epochs=1)
    assert net.training and all(m.training for m in net.modules())
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad == before[name][0] and torch.equal(parameter, before[name][1])
        assert parameter.grad is None
    assert all(torch.equal(b, buffers[n]) for n, b in net.named_buffers()), "it answers in evaluation mode"


def test_a_teacher_from_a_file_answers_many_threads(tmp_path: Path) -> None:
    """Its mode is evaluation once and for all: a thread that came back must not switch another's dropout on."""
    net = model("mlp(hidden=[16], dropout=0.5)", 1)
    torch.save(net.state_dict(), tmp_path / "t.pt")
    told = load_teacher(tmp_path / "t.pt", (1, 8, 8), 10, "mlp(hidden=[16], dropout=0.5)")
    assert isinstance(told, ModuleTeacher) and not any(m.training for m in told.module.modules())
    x, _ = digits()
    wanted = told.logits(x[:200])
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, wanted) for found in pool.map(lambda _: told.logits(x[:200]), range(40)))
