"""Plays an experiment on a small federation made to be awkward, and compares what two runs leave behind."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedkd.data import Federation, prepare
from fedkd.engines.stacked import Fallback
from fedkd.experiment import Experiment, validate
from fedkd.messages import Reply, Request
from fedkd.papers import merged
from fedkd.payloads import Payload
from fedkd.rounds import Progress, Rounds
from fedkd.runners.base import Inspection, LocalRunner, Runner, make_engine
from fedkd.site import Site
from fedkd.store import flatten

# Feature width 16 throughout, so that FedProto can compare; dropout and batch normalisation are among them.
MLP = "mlp(hidden=[16], dropout=0.3)"
CNN = "cnn(channels=[3, 4], features=16)"
RESNET = "resnet(width=4)"

CLIENTS = 8
ONE_RECORD, NO_DATA, TWO_CLASSES = 1, 4, 6


CORE = ("local", "central", "fedavg", "fedprox", "fd", "fedmd", "ds_fl", "cfd", "feddf", "fedproto")
"""Methods that go through every contract in each run of the tests; the others' full matrix is slow."""


_BRIEF = {"epochs": 2, "batch_size": 8, "make": {"steps": 2, "batch_size": 8, "width": 4, "noise": 4}}
OWN: dict[str, dict[str, Any]] = {
    "selective_fd": {"tau": 2.0},
    "dense": merged(_BRIEF, {"make": {"statistics": 0.0}}),
    "co_boosting": _BRIEF,
    "fedftg": {"make": {"makes_per_epoch": 2, "student_steps": 2, "batch_size": 8, "width": 4, "noise": 4}},
    "fedgen": {"make": {"makes_per_epoch": 3, "batch_size": 8}},
}
"""Parameters for short runs: without them one would leave out what a method is about, or take minutes."""


def section(method: str) -> dict[str, Any]:
    """Return the section ``algorithm`` of a short run."""
    return {"name": method, **OWN.get(method, {})}


def each(methods: Iterable[str], fast: Sequence[str] = CORE) -> list[Any]:
    """Return a test's parameters: ``methods``, of which those outside ``fast`` are marked slow."""
    return [pytest.param(m, marks=[] if m in fast else pytest.mark.slow) for m in methods]


@dataclass
class Played:
    """A finished run."""

    site: Site
    rounds: Rounds
    runner: LocalRunner
    progress: Progress
    records: list[dict[str, Any]]

    @property
    def seen(self) -> Inspection:
        seen = self.rounds.inspect(self.progress.state)
        assert seen is not None
        return seen


SMALL: dict[str, Any] = {
    "rounds": 3,
    "dtype": "float64",
    "data": {"source": "digits", "train_size": 220, "test_size": 60},
    "partition": {"clients": CLIENTS, "alpha": 0.3},
    "proxy": {"size": 40, "labelled": True},
    "models": {"student": CNN, "devices": [CNN]},
    "training": {"epochs": 1, "batch_size": 10},
    "digest": {"epochs": 1, "batch_size": 16},
    "pretrain": {"epochs": 1, "batch_size": 16},
    "server": {"epochs": 1, "batch_size": 16},
    "evaluation": {"local_only": False},
}


@cache
def _prepared(text: str) -> Federation:
    experiment = Experiment.model_validate_json(text)
    return prepare(experiment.data, experiment.partition, experiment.proxy, experiment.seed)


def federation(experiment: Experiment, *, awkward: bool = True) -> Federation:
    """Return the experiment's federation; ``awkward`` leaves three devices with little or nothing."""
    bare = Experiment(
        algorithm="local",
        seed=experiment.seed,
        data=experiment.data,
        partition=experiment.partition,
        proxy=experiment.proxy,
    )
    found = _prepared(bare.model_dump_json())
    if not awkward:
        return found
    parts, labels = list(found.parts), found.split.train.y
    longest = max(parts, key=len)
    parts[ONE_RECORD] = longest[:1]
    parts[NO_DATA] = longest[:0]
    held = np.unique(labels[longest])[:2]
    parts[TWO_CLASSES] = longest[np.isin(labels[longest], held)]
    return replace(found, parts=tuple(parts))


def assemble(raw: Mapping[str, Any], *, awkward: bool = True, kind: str = "serial", block: int | None = None) -> Played:
    """Make ready an experiment laid over :data:`SMALL`, its rounds still to be played."""
    experiment = validate(merged(merged(SMALL, raw), {"runner": {"kind": kind, "block": block}}))
    site = Site(experiment, federation(experiment, awkward=awkward))
    runner = LocalRunner(site, make_engine(site, kind))
    rounds = Rounds(site, runner, "run")
    return Played(site, rounds, runner, rounds.begin(), [])


def play(raw: Mapping[str, Any], *, awkward: bool = True, kind: str = "serial", block: int | None = None) -> Played:
    """Run an experiment laid over :data:`SMALL`. A model that cannot be stacked is an error here."""
    return finish(assemble(raw, awkward=awkward, kind=kind, block=block))


def finish(played: Played) -> Played:
    """Play the rounds that are left."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Fallback)
        played.rounds.play(played.progress, lambda _, record: played.records.append(record))
    return played


class Tap(Runner):
    """Remembers the requests and replies that a runner carries."""

    def __init__(self, inner: LocalRunner) -> None:
        self.inner, self.site = inner, inner.site
        self.requests: list[Request] = []
        self.replies: list[Reply] = []

    def ask(self, requests: Sequence[Request]) -> Iterator[Reply]:
        self.requests.extend(requests)
        for reply in self.inner.ask(requests):
            self.replies.append(reply)
            yield reply

    def inspect(self, clients: Sequence[int], round: int) -> Inspection | None:
        return self.inner.inspect(clients, round)

    def uploads(self, round: int, samples: int = 0) -> dict[int, tuple[Payload, float]]:
        """Return what every device with records sent in ``round``, and its count of examples."""
        found = {}
        for reply in self.replies:
            if reply.round == round and reply.body is not None and len(self.site.private(reply.client)):
                contract = self.site.contract_up(self.site.cards[reply.client], samples)
                payload, envelope = self.site.codec_up.decode(reply.body, contract)
                found[reply.client] = (payload, envelope.examples)
        return found


def tapped(raw: Mapping[str, Any]) -> tuple[Played, Tap]:
    """Play with a tap between the rounds and the devices."""
    played = assemble(raw)
    tap = Tap(played.runner)
    played.rounds.runner = tap
    return finish(played), tap


def leftovers(played: Played) -> dict[str, Tensor]:
    """Return every tensor that server and devices are left with, by name."""
    state = played.progress.state
    found = {f"server/{role}/{n}": t for role, (_, w) in state.models.items() for n, t in w.items()}
    found |= {f"knowledge/{n}": t for n, t in state.knowledge.tensors().items()}
    found |= {f"memory/{n}": t for n, t in state.memory.items()}
    for card in played.site.cards:
        tensors, _ = flatten(played.runner.store.load(card.id, state.round))
        found |= {f"device {card.id}/{name}": t for name, t in tensors.items()}
    return found


def assert_same(left: Played, right: Played, tolerance: float) -> None:
    """Check that two runs leave the same tensors and said the same of every round."""
    a, b = leftovers(left), leftovers(right)
    assert a.keys() == b.keys()
    for name in a:
        gap = (a[name].double() - b[name].double()).abs().max().item() if a[name].numel() else 0.0
        assert gap <= tolerance, f"{name} differs by {gap:.3g}"
    assert np.array_equal(left.seen.correct, right.seen.correct)
    assert np.abs(left.seen.ensemble - right.seen.ensemble).max() <= tolerance
    squeezed = any("deflate" in spec or "entropy" in spec for spec in left.site.experiment.codecs)
    for mine, other in zip(left.records, right.records, strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - {"seconds", "loss"}:
            if name in ("bytes_up", "bytes_down") and squeezed:
                # Rounding changes last bits, and so how well floats can be squeezed.
                assert abs(mine[name] - other[name]) <= 0.02 * mine[name]
            else:
                assert mine[name] == other[name], name
        assert mine["loss"].keys() == other["loss"].keys()
        for name, value in mine["loss"].items():
            assert abs(value - other["loss"][name]) <= max(tolerance, 1e-9) * max(1, abs(value))


def assert_finite(played: Played) -> None:
    """Check that no tensor left behind holds NaN or infinity."""
    for name, tensor in leftovers(played).items():
        assert bool(torch.isfinite(tensor.double()).all()), name
