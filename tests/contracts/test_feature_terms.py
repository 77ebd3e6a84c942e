"""Losses on features and relations are terms of a federated method, by the same words as in `fedkd distill`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import pytest
import torch
from harness import CNN, MLP, assert_finite, assert_same, play

from fedkd.aggregators import mean_of
from fedkd.algorithms.base import Algorithm, Answers, Batch, Heard, ServerState, ServerTools, View, with_model
from fedkd.algorithms.catalogue import build
from fedkd.distill import Distiller, Fit
from fedkd.distill.terms import Term, TermConfig, between_nets
from fedkd.errors import ConfigError
from fedkd.losses import KD, AttentionTransfer, CrossEntropy, RKDDistance
from fedkd.models import Architecture
from fedkd.nets import Net, PredictorNet
from fedkd.payloads import Payload, SoftLabels

TERMS = [
    {"loss": "at", "weight": 30, "student": "body.2", "warmup": 2},
    {"loss": "rkd_distance", "weight": 2, "student": "body"},
    {"loss": "sp", "weight": 20, "student": "body.5", "teacher": "body.2"},
    {"loss": "kd", "weight": 0.5, "temperature": 2},
]
WIDE = "cnn(channels=[4, 6], features=16)"


def scene(method: str, terms: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    raw = {"algorithm": {"name": method, "terms": terms}, "models": {"student": CNN, "devices": [WIDE]}, "rounds": 2}
    return {**raw, **more}


@pytest.mark.parametrize("method", ["fml", "fedkd"])
def test_terms_on_layers_teach_alike_on_both_engines(method: str) -> None:
    one, many = (play(scene(method, TERMS), kind=kind) for kind in ("serial", "stacked"))
    assert_same(one, many, 1e-9)
    assert_finite(one)
    without = play(scene(method, []), kind="serial")
    there, gone = (p.progress.state.models["student"][1]["body.0.weight"] for p in (one, without))
    assert float((there - gone).abs().max()) > 1e-4, "the terms move the student"


def net(name: str, seed: int) -> Net:
    architecture = Architecture(name, (1, 8, 8), 10, torch.float64)
    architecture.template.eval()
    weights = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in architecture.initial(seed).items()}
    return Net({"model": architecture}, {"model": weights}, chunk=2)


def test_a_net_shows_its_layers_and_the_teacher_takes_no_gradient() -> None:
    student, teacher = net(CNN, 1), net(WIDE, 2)
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    weight = torch.tensor([0.25] * 4 + [0.0], dtype=torch.float64)
    batch = Batch(x=x, y=torch.arange(5), index=torch.arange(5), weight=weight)
    own, told = student.read(batch, ["body.2", "body"]), teacher.read(batch, ["body.2", "body"])
    with torch.no_grad():
        assert torch.equal(own[0], student(x)) or torch.allclose(own[0], student(x))
    assert set(own[1]) == {"body.2", "body"} and own[1]["body.2"].shape[:2] == (5, 3)
    terms = [
        Term(AttentionTransfer(), 2.0, student="body.2"),
        Term(RKDDistance(), 3.0, student="body"),
        Term(KD(temperature=2), 0.5),
    ]
    value = between_nets(terms, own, told, batch.y, weight, 0)
    # The same by the losses themselves, on the records that count.
    part = [t[:4] for t in (own[1]["body.2"], told[1]["body.2"], own[1]["body"], told[1]["body"], own[0], told[0])]
    wanted = 2 * AttentionTransfer()(part[0], part[1]) + 3 * RKDDistance()(part[2], part[3])
    wanted = wanted + 0.5 * KD(temperature=2)(part[4], part[5])
    assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-10)
    value.backward()
    assert student.weights["body.0.weight"].grad is not None
    assert teacher.weights["body.0.weight"].grad is None, "the teacher is not moved"
    with pytest.raises(ConfigError, match=r"no layer 'body.22'.*body\.2"):
        student.read(batch, ["body.22"])
    with pytest.raises(TypeError, match="no layers"):
        PredictorNet(object(), 10, torch.float64).read(batch, ["body"])


@pytest.mark.parametrize(
    ("terms", "told"),
    [
        ([{"loss": "att"}], "Did you mean 'at'"),
        ([{"loss": "at"}], "name one layer"),
        ([{"loss": "at", "student": ["body.0", "body.2"]}], "name one layer"),
        ([{"loss": "crd", "student": "body"}], "parts of its own to train"),
        ([{"loss": "at", "student": "body.2", "wait": 1}], "no parameter 'wait'"),
    ],
)
def test_wrong_terms_are_refused_when_read(terms: list[dict[str, Any]], told: str) -> None:
    for method in ("fml", "fedkd"):
        with pytest.raises(ConfigError, match=told):
            build({"name": method, "terms": terms})


def test_terms_that_do_not_fit_are_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="tap a convolution"):
        play(scene("fedkd", [{"loss": "at", "student": "body"}]), kind="serial")
    two = {"data": {"source": "breast_cancer"}, "models": {"student": MLP, "devices": [MLP]}}
    with pytest.raises(ConfigError, match="three classes"):
        play(scene("fml", [{"loss": "dkd"}], **two), kind="serial")
    with pytest.raises(ConfigError, match=r"no layer 'body.22'"):
        play(scene("fml", [{"loss": "at", "student": "body.2", "teacher": "body.22"}]), kind="serial")


@final
@dataclass(frozen=True, kw_only=True)
class Reviewed(Algorithm):
    """Mean soft labels; the server's student learns them, and its last self's layers by losses with parts to train."""

    name: ClassVar[str] = "reviewed"
    paper: ClassVar[str] = "none"
    upload: ClassVar[type[Payload]] = SoftLabels
    proxy: ClassVar[Literal["none", "unlabelled", "labelled"]] = "unlabelled"
    student: ClassVar[bool] = True

    terms: tuple[TermConfig, ...]

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.public is not None
        return SoftLabels(labels=net.probabilities(view.public))

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        return SoftLabels(labels=mean_of(answers, lambda a: a.payload.tensors()["labels"]))

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        name, weights = server.models["student"]
        student, last = (tools.module(name, weights) for _ in range(2))
        labels = knowledge.tensors()["labels"].argmax(1)
        terms = [Term(CrossEntropy()), *(config.term for config in self.terms)]
        fit = Fit(epochs=1, batch_size=16, lr=0.05)
        Distiller(student, last, terms, fit=fit, seed=tools.seed("student")).fit(tools.public(tools.asked), labels)
        return with_model(server, "student", name, dict(student.state_dict()))


def test_a_server_distils_by_losses_with_parts_of_their_own() -> None:
    terms = [
        {"loss": "crd", "student": "body", "negatives": 32, "dimensions": 8},
        {"loss": "reviewkd", "student": ["body.2", "body.5"], "middle": 4},
    ]
    raw = {"algorithm": {"name": "test_feature_terms:Reviewed", "terms": terms}, "rounds": 2}
    raw |= {"models": {"student": CNN, "devices": [MLP]}}
    one, many = (play(raw, kind=kind) for kind in ("serial", "stacked"))
    assert_same(one, many, 1e-9)
    assert_finite(one)
