"""The interface carries methods that are still to come, from outside the package and without a change to any runner."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import CNN, MLP, RESNET, assemble, assert_same, play

from fedkd.payloads import Bundle


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
