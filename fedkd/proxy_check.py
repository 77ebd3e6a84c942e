"""How well a proxy set will serve, told before rounds are spent: ``fedkd proxy check X.yaml``.

Every device trains for one round as the experiment says, answers all proxy samples, and tells which of them resemble its
own records (Selective-FD's selector, computed on the device). From the answers:

* ``confidence``: mean over devices and samples of the largest probability.
* ``disagreement``: mean over samples of H(p̄) - mean_k H(p_k), over log C: how far devices are from saying the same.
* ``information``: H(mean_x p̄) - mean_x H(p̄), over log C: the mutual information of sample and ensemble's answer. It is
  high if the ensemble is certain of each sample and yet says all classes; a student can learn no more than that.
* ``coverage``: exp of the entropy of the ensemble's top classes, over C: the share of classes that come up.
* ``selected``: share of samples that some device holds for like its own; ``devices``: devices for each sample, on average.

What the figures predicted of four proxy sets stands in docs/simulator.md: coverage had their order right, information nearly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import torch
from torch import Tensor

from fedkd.algorithms.base import Algorithm, Answers, Heard, ServerState, ServerTools, Shapes, View
from fedkd.algorithms.selective_fd import SelectiveFD
from fedkd.errors import ConfigError
from fedkd.experiment import validate
from fedkd.losses import entropy
from fedkd.payloads import Bundle, Chosen, Contract, Payload, SoftLabels, Weights
from fedkd.rounds import Rounds
from fedkd.runners.base import LocalRunner, make_engine
from fedkd.site import Site

if TYPE_CHECKING:
    from fedkd.nets import Net

FIGURES = ("information", "coverage", "confidence", "disagreement", "selected", "devices")


@final
@dataclass(frozen=True, kw_only=True)
class ProxyCheck(Algorithm):
    """One round that measures a proxy set. See the module text."""

    name: ClassVar[str] = "proxy_check"
    paper: ClassVar[str] = "fedkd"
    upload: ClassVar[type[Payload]] = Bundle
    proxy: ClassVar[Literal["none", "unlabelled", "labelled"]] = "unlabelled"
    reads_private: ClassVar[bool] = True
    stackable: ClassVar[bool] = False

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        assert view.public is not None and view.private is not None
        chosen = Chosen(chosen=SelectiveFD().select(view.private.x, view.public))
        return Bundle(parts={"labels": SoftLabels(labels=net.probabilities(view.public)), "chosen": chosen})

    def contract_up(self, shapes: Shapes) -> Contract:
        labels, chosen = Contract.of(SoftLabels, shapes.dims), Contract.of(Chosen, shapes.dims)
        return Contract.bundle({"labels": labels, "chosen": chosen})

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        told = [a.payload.tensors() for a in answers]
        labels = torch.stack([t["labels/labels"] for t in told])
        return Weights.from_tensors(figures(labels, torch.stack([t["chosen/chosen"] for t in told])))


def figures(labels: Tensor, chosen: Tensor) -> dict[str, Tensor]:
    """Return the figures of the module text from answers [K, N, C] and selections [K, N]."""
    p, scale, chosen = labels.mean(0), log(labels.shape[-1]), chosen.to(labels.dtype)
    own, top = entropy(labels).mean(0), torch.bincount(p.argmax(-1), minlength=p.shape[-1]) / len(p)
    return {
        "information": (entropy(p.mean(0)) - entropy(p).mean()) / scale,
        "coverage": entropy(top.to(p.dtype)).exp() / p.shape[-1],
        "confidence": labels.amax(-1).mean(),
        "disagreement": (entropy(p) - own).mean() / scale,
        "selected": (chosen.sum(0) > 0).to(p.dtype).mean(),
        "devices": chosen.sum(0).mean(),
    }


def check(raw: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of the proxy set of an experiment, given as a plain mapping.

    Raises:
        ConfigError: it has no proxy set, or nobody answered.
    """
    named = {"algorithm": {"name": "fedkd.proxy_check:ProxyCheck"}, "rounds": 1, "proxy_per_round": None}
    dropped = ("codec", "privacy", "aggregator", "attack", "virtual", "population", "checkpoint")
    experiment = validate({**{k: v for k, v in raw.items() if k not in dropped}, **named})
    site = Site.load(experiment)
    rounds = Rounds(site, LocalRunner(site, make_engine(site, experiment.runner.kind)), "proxy check")
    progress = rounds.play(rounds.begin(), lambda *_: None)
    found = progress.state.knowledge.tensors()
    if not found:
        raise ConfigError("no device answered the proxy samples: do devices hold records?")
    return {name: float(found[name]) for name in FIGURES}
