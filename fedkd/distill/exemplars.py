"""A few exemplars stand for a class: herding, nearest class means, prototypes, and learning new classes beside old ones.

Raw exemplars are records, so that a memory of them leaks what it holds. :func:`remember` therefore makes synthetic ones
unless it is told otherwise.

Letters: N records, M exemplars, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.distill.loop import FEED, Batch, Epoch, Fit, Loop, Records, still
from fedkd.distill.taps import Taps
from fedkd.distill.terms import Term
from fedkd.errors import ConfigError
from fedkd.losses import KD, CrossEntropy
from fedkd.losses.base import unit
from fedkd.losses.exemplar import exemplar_graph, exemplar_relation
from fedkd.seeding import key

SMALLEST_GROUP = 10
"""Fewest records whose mean a synthetic exemplar may stand for."""


def herd(features: Tensor, count: int) -> Tensor:
    """Return indices [count] of the records [N, D] whose running mean stays nearest to the mean of all, in order.

    S. Rebuffi, A. Kolesnikov, G. Sperl, C. Lampert, "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017,
    https://arxiv.org/abs/1611.07725, algorithm 4, on features scaled to length 1. Any first part of the list is a herd of
    its own. Give the records of one class.

    Raises:
        ConfigError: there are fewer records than are to be chosen.
    """
    if count > len(features):
        raise ConfigError(f"{count} exemplars are asked of {len(features)} records: lower their number")
    x = unit(features.flatten(1).double())
    mean = x.mean(0)
    total, left = torch.zeros_like(mean), torch.ones(len(x), dtype=torch.bool)
    chosen = []
    for k in range(count):
        gap = (mean - (total + x) / (k + 1)).square().sum(1)
        place = int(gap.masked_fill(~left, torch.inf).argmin())
        chosen.append(place)
        left[place] = False
        total = total + x[place]
    return torch.tensor(chosen, dtype=torch.long)


@dataclass(frozen=True)
class NearestMean:
    """Classifies by the nearest class mean of features scaled to length 1 (iCaRL, algorithm 1).

    ``means``: [C, D], of length 1; a class without exemplars has a row of NaN and is never chosen.
    """

    means: Tensor

    @staticmethod
    def of(features: Tensor, labels: Tensor, classes: int) -> NearestMean:
        """Take the means of labelled features [M, D]."""
        return NearestMean(unit(class_means(unit(features.flatten(1)), labels, classes)))

    def __call__(self, features: Tensor) -> Tensor:
        """Return minus the squared distance to every class mean [N, C]."""
        gap = torch.cdist(unit(features.flatten(1)), self.means.nan_to_num()).square()
        return -gap.masked_fill(self.means.isnan().any(1), torch.inf)


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the prototypes: the mean features [C, D] of every class, NaN for a class without records."""
    flat = features.flatten(1)
    total = flat.new_zeros(classes, flat.shape[1]).index_add(0, labels, flat)
    count = torch.bincount(labels, minlength=classes).to(flat.dtype)
    return total / count.unsqueeze(1).masked_fill(count.unsqueeze(1) == 0, torch.nan)


@dataclass(frozen=True)
class Memory:
    """Exemplars x [M, *shape] with labels y [M]; ``kind`` says whether they are records."""

    x: Tensor
    y: Tensor
    kind: Literal["synthetic", "raw"]


def remember(
    model: nn.Module,
    layer: str,
    data: Records,
    per_class: int,
    *,
    kind: Literal["synthetic", "raw"] = "synthetic",
    group: int = SMALLEST_GROUP,
    steps: int = 200,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    seed: int = 1,
) -> Memory:
    """Make a memory of labelled records for a trained model.

    ``raw`` herds records. ``synthetic`` keeps none: the features of each class fall into ``per_class`` groups by k-means;
    from noise, an input is made whose features are the mean of a group's and which the model takes for the class (a small
    total variation keeps images smooth). A group of fewer than ``group`` records is given to its class's mean, so that no
    exemplar follows a few persons' records.

    Guarantee: none in numbers. Synthetic exemplars hold no record, but the model and the group means they are made from
    were computed from records without noise; epsilon is infinity.

    Args:
        layer: module path whose output is taken for features.
        bounds: least and greatest value of an input; None for none.
        steps: gradient steps (Adam, 0.05) on all synthetic inputs of a class together.
    Raises:
        ConfigError: records have no labels, or a class has too few of them.
    """
    if data.y is None:
        raise ConfigError("exemplars stand for classes, and these records have no labels")
    features = features_of(model, layer, data)
    found_x, found_y = [], []
    for c in sorted(set(data.y.tolist())):
        rows = torch.nonzero(data.y == c).flatten()
        if kind == "raw":
            chosen = rows[herd(features[rows], per_class)].numpy()
            found_x.append(data.x(chosen))
        else:
            goals = _group_means(features[rows], per_class, group, key(seed, "groups", int(c)) % 2**31)
            shape = tuple(data.x(np.zeros(1, np.int64)).shape[1:])
            found_x.append(_made(model, layer, goals, int(c), shape, steps, bounds, seed))
        found_y.append(torch.full((len(found_x[-1]),), int(c)))
    return Memory(torch.cat(found_x), torch.cat(found_y), kind)


@torch.no_grad()
def features_of(model: nn.Module, layer: str, data: Records) -> Tensor:
    """Return what ``layer`` gives for every record, flattened to [N, D]."""
    parts = []
    with still(model), Taps(model, [layer]) as taps:
        for start in range(0, data.size, FEED):
            model(data.x(np.arange(start, min(start + FEED, data.size))))
            parts.append(taps[layer].flatten(1))
    return torch.cat(parts)


def _group_means(features: Tensor, count: int, group: int, seed: int) -> Tensor:
    from sklearn.cluster import KMeans

    if len(features) < group:
        raise ConfigError(f"a class has {len(features)} records: synthetic exemplars need at least {group} (group)")
    wanted = min(count, len(features) // group)
    found = KMeans(wanted, n_init=2, random_state=seed).fit(features.double().numpy())
    place = torch.from_numpy(found.labels_.astype(np.int64))
    size = torch.bincount(place, minlength=wanted)
    means = class_means(features, place, wanted)
    means[size < group] = features.mean(0)
    return means[torch.arange(count) % wanted]


def _made(
    model: nn.Module,
    layer: str,
    goals: Tensor,
    label: int,
    shape: tuple[int, ...],
    steps: int,
    bounds: tuple[float, float] | None,
    seed: int,
) -> Tensor:
    stream = torch.Generator().manual_seed(key(seed, "exemplars", label))
    noise = torch.rand((len(goals), *shape), generator=stream)
    low, high = bounds if bounds is not None else (-1.0, 1.0)
    x = (low + (high - low) * noise).requires_grad_(True)
    optimizer = torch.optim.Adam([x], 0.05 * (high - low))
    labels = torch.full((len(goals),), label)
    scale = goals.square().mean().clamp(min=1e-12)
    with still(model), Taps(model, [layer]) as taps:
        for _ in range(steps):
            logits = model(x)
            loss = (taps[layer].flatten(1) - goals).square().mean() / scale + 0.1 * F.cross_entropy(logits, labels)
            if x.dim() == 4:
                loss = loss + 0.1 * (
                    (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
                )
            # Of the input alone: the model's own parameters must get no gradient from this.
            (x.grad,) = torch.autograd.grad(loss, x)
            optimizer.step()
            if bounds is not None:
                with torch.no_grad():
                    x.clamp_(*bounds)
    return x.detach()


def extend(
    model: nn.Module,
    old: nn.Module,
    new: Records,
    memory: Memory | None,
    old_classes: Sequence[int],
    *,
    layer: str,
    distil: Term | None = None,
    relation: float = 0.0,
    neighbours: int = 5,
    fit: Fit | None = None,
    seed: int = 1,
    checkpoint: Path | None = None,
    watch: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Teach ``model`` new classes from ``new`` records, and keep it to the old ones by ``old`` and a memory.

    CE on new records and exemplars together + KD of the old model on the old classes' logits (iCaRL, eq. (1), with a
    softmax in place of its sigmoids) + ``relation`` times the exemplar relation graph's loss
    (:func:`fedkd.losses.exemplar.exemplar_relation`).

    Args:
        memory: exemplars of the old classes; None for none. As many of them as of a new class are in every batch.
        distil: the distilling term on logits; by default KD at T = 2, weight 1.
        layer: module path of the features that the relation graph compares.
        checkpoint, watch: see :meth:`fedkd.distill.loop.Loop.run`.
    Raises:
        ConfigError: the new records have no labels, or a relation is asked for without a memory.
    """
    if new.y is None:
        raise ConfigError("new classes are learnt from labelled records, and these have none")
    if relation and memory is None:
        raise ConfigError("the exemplar relation graph needs a memory of exemplars")
    how, term = fit or Fit(), distil or Term(KD(temperature=2), 1.0)
    olds = torch.tensor(sorted(old_classes))
    extra = 0
    if memory is not None:
        fresh = max(1, len(set(new.y.tolist())))
        extra = min(len(memory.x), max(1, round(how.batch_size * len(olds) / (fresh + len(olds)))))
    graph: NDArray[np.int64] | None = None
    if relation and memory is not None:
        told = features_of(old, layer, Records.of(memory.x, memory.y))
        graph = exemplar_graph(told, neighbours)
    labels = new.y

    def step(batch: Batch) -> dict[str, tuple[Tensor, float]]:
        x, y = new.x(batch.index), labels[torch.from_numpy(batch.index)]
        if memory is not None:
            some = torch.from_numpy(batch.rng.permutation(len(memory.x))[:extra])
            x, y = torch.cat([x, memory.x[some]]), torch.cat([y, memory.y[some]])
        with torch.no_grad():
            before = old(x)
        logits = model(x)
        kept = term.loss(logits[:, olds], before[:, olds]), term.factor(batch.epoch)
        found = {"CrossEntropy": (CrossEntropy()(logits, logits, y), 1.0), type(term.loss).__name__: kept}
        if graph is not None and memory is not None:
            model(memory.x)
            found["relation"] = exemplar_relation(taps[layer].flatten(1), told, graph), relation
        return found

    with still(old), Taps(model, [layer]) as taps:
        loop = Loop({"student": model}, new.size, step, fit=how, seed=seed)
        return loop.run(checkpoint=checkpoint, watch=watch)


def nearest_mean(
    model: nn.Module, layer: str, memory: Memory, new: Records, per_class: int, classes: int
) -> NearestMean:
    """Return the classifier by nearest means of a memory of old classes and of herded records of new ones.

    Args:
        new: labelled records, which are still here; ``per_class`` of each class are herded.
    """
    fresh = remember(model, layer, new, per_class, kind="raw")
    x, y = torch.cat([memory.x, fresh.x]), torch.cat([memory.y, fresh.y])
    return NearestMean.of(features_of(model, layer, Records.of(x, y)), y, classes)
