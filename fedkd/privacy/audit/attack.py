"""Attack a run: run it again from its configuration with canaries in the training, and look where an attacker may look.

A finished run had no canaries, so the membership attacks need a run of their own: the same experiment, models, rounds,
mechanism and noise, a ledger of its own (nothing is charged to the run), and up to a third of the training records with a
wrong label, each of which a coin has left out or not. What is attacked is thus the procedure that made the run.

An attacker who knows all but the coins can throw coins of his own and repeat the run with them, as often as he likes: his
shadow runs say how each canary's label is answered anyway. N. Carlini et al., "Membership Inference Attacks From First
Principles", S&P 2022, https://arxiv.org/abs/2112.03570; here the mean of all shadow runs is taken off, instead of a
likelihood ratio from those with and those without the canary, which are too few to be told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedkd.algorithms.base import Batch, DeviceState, Tensors
from fedkd.engines.base import Engine, SerialEngine, Task, fit
from fedkd.engines.stacked import StackedEngine
from fedkd.experiment import Experiment
from fedkd.losses import cross_entropy, soft_cross_entropy
from fedkd.nets import Net
from fedkd.payloads import Logits, Payload, SoftLabels, Votes
from fedkd.privacy.audit.bounds import auc, mean_total_variation, one_run, shared, tpr_at
from fedkd.privacy.audit.canaries import Canaries, insert
from fedkd.records import Records
from fedkd.rounds import Progress, Rounds
from fedkd.runners.base import LocalRunner
from fedkd.seeding import numpy_rng
from fedkd.server_tools import Tools
from fedkd.site import Site
from fedkd.training import schedule

CANARIES = 600
REFERENCES = 4
SHADOWS = 4


@dataclass(frozen=True)
class View:
    """What one attacker found. ``epsilon`` is the lower bound at 95 %; ``right`` of ``guesses`` guesses made it.

    ``joint``: the bound where this is one of several tests that share the error probability.
    """

    name: str
    who: str
    auc: float
    tpr_at_1_percent_fpr: float
    epsilon: float
    joint: float
    guesses: int
    right: int

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


@dataclass(frozen=True)
class LabelInference:
    """How well soft labels tell a device's label distribution: mean total variation to the truth, and that of a guess.

    ``prior``: of one who guesses every device to hold the federation's mean distribution.
    """

    attack: float
    prior: float


# ---- the run with canaries ------------------------------------------------------------------------------------------
class _Watch(Engine):
    """Keeps what every device last had in its hands when it answered."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.seen: dict[int, tuple[DeviceState, Payload]] = {}

    def answer(self, tasks: Sequence[Task]) -> list[Payload]:
        payloads = super().answer(tasks)  # type: ignore[safe-super]
        for task, payload in zip(tasks, payloads, strict=True):
            self.seen[task.card.id] = (task.state, payload)
        return payloads


class _WatchSerial(_Watch, SerialEngine):
    pass


class _WatchStacked(_Watch, StackedEngine):
    pass


@dataclass(frozen=True)
class Rerun:
    """The run with canaries: everything that some attacker may see of it."""

    site: Site
    canaries: Canaries
    progress: Progress
    asked: NDArray[np.int64]
    devices: Mapping[int, tuple[DeviceState, Payload]]
    scores: Tensor


def rerun(experiment: Experiment, canaries: int = CANARIES, seed: int = 0, coins: int = 0) -> Rerun:
    """Run ``experiment`` with canaries, in memory; ``coins`` numbers the throw of the coins.

    ``scores`` [K', m, C]: class scores of the devices in ``devices``, in their order, on the canaries' inputs.
    """
    changed, planted = insert(Site.load(experiment).federation, canaries, seed, coins)
    site = Site(experiment, changed)
    kind = experiment.runner.kind
    engine: _Watch = _WatchSerial(site) if kind == "serial" else _WatchStacked(site)
    rounds = Rounds(site, LocalRunner(site, engine), run="audit")
    progress = rounds.play(rounds.begin(), lambda progress, record: None)
    x = site.silo.pool.take(torch.from_numpy(planted.index))
    cards = [site.cards[k] for k in engine.seen]
    states = [state for state, _ in engine.seen.values()]
    found = torch.zeros(len(cards), len(planted), site.classes)
    for k, scores in engine.scores(cards, states, x):
        found[k] = scores.float()
    return Rerun(site, planted, progress, progress.state.asked, engine.seen, found)


# ---- views ----------------------------------------------------------------------------------------------------------
def membership(run: Rerun, shadows: Sequence[Mapping[str, NDArray[np.floating]]] = ()) -> list[View]:
    """Attack the local models, the soft labels through surrogates, and the student; whatever of them there is.

    Args:
        shadows: what :func:`outside` gives of runs with other coins. Without them, models that learned from the test set say
            how easy a canary's label is.
    """
    found: list[tuple[str, str, NDArray[np.floating]]] = []
    if run.devices:
        clients = list(run.devices)
        scores = calibrated(run.scores, clients, run.canaries)
        found.append(("local model", "whoever holds a device's model", scores))
        sent = labels_of(run)
        if sent is not None:
            surrogates = torch.stack([_surrogate(run, labels) for labels in sent])
            scores = calibrated(surrogates, clients, run.canaries)
            found.append(("soft labels", "whoever sees a device's answers", scores))
    seen = outside(run)
    usual = _reference(run) if seen and not shadows else None
    for name, margin in seen.items():
        known = [shadow[name] for shadow in shadows if name in shadow] if usual is None else [usual]
        found.append((name, OUTSIDERS[name], margin - np.mean(known, axis=0) if known else margin))
    # The audit of the mechanism is one test more.
    return [judge(name, who, scores, run, len(found) + 1) for name, who, scores in found]


OUTSIDERS = {"published labels": "other devices", "student": "whoever holds the student"}


def outside(run: Rerun) -> dict[str, NDArray[np.floating]]:
    """Return each canary's margin [m] in what leaves the server: its labels, by a surrogate, and the student."""
    found: dict[str, NDArray[np.floating]] = {}
    published = probabilities(run.progress.state.knowledge)
    if published is not None and len(published) == len(run.asked):
        found["published labels"] = margins(_surrogate(run, published), run.canaries.label).numpy()
    if "student" in run.progress.state.models:
        architecture, weights = run.progress.state.models["student"]
        found["student"] = margins(_score(run, architecture, weights), run.canaries.label).numpy()
    return found


def judge(name: str, who: str, scores: NDArray[np.floating], run: Rerun, tests: int) -> View:
    """Turn one attacker's scores [m] into what they prove, alone and as one of ``tests`` tests."""
    inside, delta = run.canaries.inside, run.site.experiment.privacy.delta
    found = one_run(scores, inside, delta)
    return View(
        name,
        who,
        auc(scores, inside),
        tpr_at(scores, inside),
        found.epsilon,
        one_run(scores, inside, delta, shared(tests)).epsilon,
        found.guesses,
        found.right,
    )


def margins(scores: Tensor, labels: NDArray[np.int64]) -> Tensor:
    """Return log p(label) - log(1 - p(label)) [..., m] of class scores [..., m, C]: near normal, as attacks want it.

    N. Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022, section IV.
    """
    logs = scores.double().log_softmax(-1)
    own = torch.from_numpy(labels).view(-1, 1).expand(*logs.shape[:-1], 1)
    target = logs.gather(-1, own).squeeze(-1)
    others = logs.scatter(-1, own, -torch.inf).logsumexp(-1)
    return target - others


def calibrated(scores: Tensor, clients: Sequence[int], canaries: Canaries) -> NDArray[np.floating]:
    """Return each canary's margin under its device's model less the mean margin under the others' [m].

    The other devices never had the canary: their margins say how easy its label is anyway.
    """
    margin = margins(scores, canaries.label).numpy()
    place = {k: i for i, k in enumerate(clients)}
    found = np.zeros(len(canaries))
    total = margin.sum(0)
    for i, device in enumerate(canaries.device):
        if int(device) in place:
            own = margin[place[int(device)], i]
            rest = (total[i] - own) / max(len(clients) - 1, 1)
            found[i] = own - rest if len(clients) > 1 else own
    return found


def probabilities(payload: Payload) -> Tensor | None:
    """Return the class probabilities [N, C] that a payload carries for proxy samples, or None."""
    if isinstance(payload, SoftLabels):
        return payload.labels
    if isinstance(payload, Logits):
        return payload.logits.softmax(-1)
    return None


def labels_of(run: Rerun) -> list[Tensor] | None:
    """Return what every device answered for the proxy samples, where answers can be told apart by somebody."""
    if not len(run.asked) or run.site.mechanism.sums_securely:
        return None
    found = []
    for _, payload in run.devices.values():
        labels = probabilities(payload)
        if isinstance(payload, Votes):
            labels = torch.nn.functional.one_hot(payload.votes, run.site.classes).float()
        if labels is None or len(labels) != len(run.asked):
            return None
        found.append(labels)
    return found


def _surrogate(run: Rerun, labels: Tensor) -> Tensor:
    """Return the scores [m, C] of a model that learned nothing but ``labels`` [N, C] of the proxy samples."""
    site = run.site
    labels = labels.to(site.dtype)
    tools = Tools(site, site.experiment.rounds, run.asked)
    name = site.experiment.models.student

    def loss(net: Net, batch: Batch) -> Tensor:
        return batch.mean(soft_cross_entropy(net(batch), labels[batch.index]))

    # All start from one point, so that they differ by what they were told alone.
    weights = tools.train(name, tools.initial(name, "surrogate"), loss, run.asked, label="surrogate")
    return _score(run, name, weights)


def _reference(run: Rerun) -> NDArray[np.floating]:
    """Return the mean margin [m] of models of an attacker with records of the same kind: the test set. No canary is in it."""
    site = run.site
    settings = site.experiment.server
    data = Records(site.test, torch.arange(len(site.test)))
    name = site.experiment.models.student
    if not site.architecture(name).gradients:
        return np.zeros(len(run.canaries))
    bound = {"model": site.architecture(name)}
    found = []
    for i in range(REFERENCES):
        models, _, _ = fit(
            bound,
            {"model": site.initial(name, "reference", i)},
            lambda net, batch: batch.mean(cross_entropy(net(batch), batch.labels)),
            data,
            schedule(len(data), settings, numpy_rng(i, "reference")),
            settings,
            round=0,
        )
        found.append(margins(_score(run, name, models["model"]), run.canaries.label).numpy())
    return np.asarray(np.mean(found, axis=0))


@torch.no_grad()
def _score(run: Rerun, architecture: str, weights: Tensors) -> Tensor:
    x = run.site.silo.pool.take(torch.from_numpy(run.canaries.index))
    return Tools(run.site, 0, run.asked).net(architecture, weights)(x)


# ---- label distributions --------------------------------------------------------------------------------------------
def label_inference(run: Rerun) -> LabelInference | None:
    """Guess every device's label distribution from its soft labels; None where nobody sees them one by one.

    A device's model leans towards the labels that it was trained on. The guess is the federation's mean distribution times
    how much more often the device names a class than devices do on average.
    """
    sent = labels_of(run)
    if sent is None or len(sent) < 2:
        return None
    counts = run.site.federation.counts[list(run.devices)].astype(float)
    held = counts.sum(1) > 0
    truth = counts[held] / counts[held].sum(1, keepdims=True)
    prior = truth.mean(0)
    named = torch.stack(sent).double().mean(1).numpy()[held]
    guess = prior * named / np.maximum(named.mean(0), 1e-9)
    guess /= np.maximum(guess.sum(1, keepdims=True), 1e-12)
    return LabelInference(
        attack=mean_total_variation(list(guess), list(truth)),
        prior=mean_total_variation([prior] * len(truth), list(truth)),
    )
