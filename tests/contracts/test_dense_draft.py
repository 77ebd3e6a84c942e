"""The interface carries methods that are still to come, from outside the package and without a change to any runner."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import CNN, MLP, RESNET, assemble, assert_finite, assert_same, merged, play

from fedkd.errors import ConfigError
from fedkd.payloads import Bundle, Nothing

TEACHER = "cnn(channels=[8, 16], features=32)"
DENSE: dict[str, Any] = {
    "rounds": 1,
    "seed": 3,
    "dtype": "float32",
    "algorithm": {
        "name": "draft_dense:DENSE",
        "epochs": 6,
        "generator_steps": 15,
        "student_steps": 40,
        "batch_size": 48,
        "noise": 16,
        "student_lr": 0.03,
        "temperature": 4.0,
    },
    "proxy": None,
    "data": {"train_size": 400, "test_size": 200},
    "partition": {"clients": 3, "kind": "iid"},
    "models": {"student": TEACHER, "devices": [TEACHER]},
    "training": {"epochs": 15, "optimizer": {"momentum": 0.9, "lr": 0.05}},
}


def test_dense_learns_a_student_in_one_round_without_any_data() -> None:
    played = play(DENSE, awkward=False, kind="stacked")
    assert len(played.records) == 1 and played.site.proxy is None
    record = played.records[0]
    assert record["answered"] == 3 and isinstance(played.progress.state.knowledge, Nothing)
    start = assemble(DENSE, awkward=False)
    before = float(start.rounds.student_correct(start.progress.state).sum() / 200)
    # Ten classes: chance is 0.1, and 200 test records keep it below 0.2 with certainty.
    assert before < 0.3 and record["student_accuracy"] > 0.3
    assert_finite(played)


def test_dense_is_the_same_on_both_runners_with_mixed_architectures() -> None:
    small = {"algorithm": {"epochs": 1, "generator_steps": 3, "student_steps": 2, "batch_size": 8}}
    raw = merged(DENSE, {**small, "dtype": "float64", "training": {"epochs": 1}, "data": {"train_size": 100}})
    raw = merged(raw, {"models": {"student": CNN, "devices": [CNN, RESNET]}})
    assert_same(play(raw, awkward=False), play(raw, awkward=False, kind="stacked"), 1e-9)


def test_dense_refuses_a_teacher_without_batch_normalisation_before_anything_is_trained() -> None:
    with pytest.raises(ConfigError, match=r"batch-normalisation.*norm=none"):
        assemble(merged(DENSE, {"models": {"devices": [TEACHER, "cnn(norm=none)"]}}), awkward=False)


def test_dense_matches_the_statistics_of_real_batches_better_than_those_of_noise() -> None:
    from draft_dense import Statistics

    played = play(merged(DENSE, {"algorithm": {"epochs": 1, "generator_steps": 1, "student_steps": 0}}), awkward=False)
    site = played.site
    state = (
        play(merged(DENSE, {"algorithm": "local", "training": {"epochs": 6}}), awkward=False, kind="stacked")
        .runner.store.load(0, 1)
        .state
    )
    assert state is not None
    teacher = site.architecture(TEACHER).module(state.models["model"]).eval()
    watch = Statistics([teacher])
    x = site.private(0).all()[0]
    with torch.no_grad():
        teacher(x)
        real = watch.take()
        teacher(torch.rand(x.shape, generator=torch.Generator().manual_seed(0)))
        noise = watch.take()
    assert real < 0.5 * noise
    watch.close()
    assert not any(m._forward_pre_hooks for m in teacher.modules())


@pytest.mark.parametrize("kind", ["serial", "stacked"])
def test_a_device_with_a_private_and_a_shared_model_of_different_architectures(kind: str) -> None:
    raw = {
        "algorithm": "drafts:Mutual",
        "rounds": 3,
        "models": {"student": CNN, "devices": [MLP, RESNET, "logreg"]},
        "population": {"participation": 0.8, "dropout": 0.1, "late": 0.1},
        "training": {"optimizer": {"momentum": 0.9, "persist": True}},
    }
    played = play(raw, kind=kind)
    assert all(r["quarantined"] == [] for r in played.records) and sum(r["answered"] for r in played.records) > 8
    states = [played.runner.store.load(k, 3).state for k in range(len(played.site.cards))]
    kept = [s for s in states if s is not None]
    # The shared model is the server's, so that only the private one stays on a device.
    assert kept and all(set(s.models) == {"model"} for s in kept)
    start, end = played.rounds.begin().state.models["student"][1], played.progress.state.models["student"][1]
    assert not torch.allclose(start["head.weight"], end["head.weight"])
    if kind == "stacked":
        assert_same(play(raw), played, 1e-9)


def test_mutual_learning_teaches_both_models() -> None:
    """Without the exchange of the two, the private model would end where it ends alone."""
    raw = {"rounds": 1, "models": {"student": "logreg", "devices": ["logreg"]}, "dtype": "float64"}
    mutual, alone = play({**raw, "algorithm": "drafts:Mutual"}), play({**raw, "algorithm": "local"})
    a, b = mutual.runner.store.load(0, 1).state, alone.runner.store.load(0, 1).state
    assert a is not None and b is not None
    assert not torch.allclose(a.models["model"]["head.weight"], b.models["model"]["head.weight"], atol=1e-6)


@pytest.mark.parametrize("kind", ["serial", "stacked"])
def test_a_message_for_each_device_and_a_memory_between_rounds(kind: str) -> None:
    played = assemble({"algorithm": "drafts:Personal", "rounds": 4, "population": {"participation": 0.6}}, kind=kind)
    told: dict[int, int] = {}

    def look(progress: Any, record: dict[str, Any]) -> None:
        cohort = played.rounds.cohort(record["round"])
        for client in cohort.asked:
            told[client] = told.get(client, 0) + 1
        knowledge = progress.state.knowledge
        assert isinstance(knowledge, Bundle)
        assert set(knowledge.parts) == {str(k) for k in cohort.asked if len(played.site.private(k))}
        for client, part in knowledge.parts.items():
            assert part.tensors()["logits"].unique().tolist() == [100 * told[int(client)] + int(client)]

    played.rounds.play(played.progress, look)
    assert len(set(told.values())) > 1


@pytest.mark.parametrize("kind", ["serial", "stacked"])
def test_weights_and_a_generator_travel_down_together(kind: str) -> None:
    raw = {"algorithm": "drafts:WithGenerator", "rounds": 3, "population": {"participation": 0.7, "late": 0.2}}
    for codec in ("auto", "float64+delta+deflate"):
        played = play({**raw, "codec": {"down": codec}}, kind=kind)
        assert all(r["quarantined"] == [] and r["answered"] for r in played.records)
        if kind == "stacked":
            assert_same(play({**raw, "codec": {"down": codec}}), played, 1e-9)
