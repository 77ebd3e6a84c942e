"""Canaries: records with a wrong label, put into the training or left out by a fair coin."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedkd.data import Federation
from fedkd.data.partitions import describe
from fedkd.errors import ConfigError
from fedkd.seeding import numpy_rng

LARGEST_SHARE = 1 / 3
"""Canaries are at most this share of the training records, so that the run stays near the one that is audited."""


@dataclass(frozen=True)
class Canaries:
    """m training records with a label drawn from the wrong ones.

    ``index`` [m]: positions in the training set. ``device`` [m]: who holds each. ``label`` [m]: as trained.
    ``inside`` [m]: whether the coin put it in.
    """

    index: NDArray[np.int64]
    device: NDArray[np.int64]
    label: NDArray[np.int64]
    inside: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.index)


def insert(federation: Federation, wanted: int, seed: int, coins: int = 0) -> tuple[Federation, Canaries]:
    """Turn training records of all devices into canaries, and take those out that the coin leaves out.

    Args:
        wanted: number of canaries, if a third of the records is enough for it.
        seed: of the choice, the labels and the coins; independent of the experiment's seed.
        coins: number of the throw: the same canaries, other coins.
    Raises:
        ConfigError: too few records for 20 canaries.
    """
    rng = numpy_rng(seed, "audit canaries")
    holder = np.concatenate([np.full(len(part), k, np.int64) for k, part in enumerate(federation.parts)])
    record = np.concatenate(federation.parts).astype(np.int64)
    # A record that lies on several devices (replicas) would be known from the others.
    _, first, copies = np.unique(record, return_index=True, return_counts=True)
    alone = first[copies == 1]
    m = min(wanted, int(LARGEST_SHARE * len(alone)))
    if m < 20:
        raise ConfigError(f"{len(alone)} training records are too few for an audit: it needs at least 60")
    chosen = np.sort(rng.choice(alone, m, replace=False))
    index, device = record[chosen], holder[chosen]
    train = federation.split.train
    label = (train.y[index] + rng.integers(1, train.classes, m)) % train.classes
    inside = (rng if coins == 0 else numpy_rng(seed, "audit coins", coins)).random(m) < 0.5
    y = train.y.copy()
    y[index] = label
    out = set(index[~inside].tolist())
    parts = tuple(np.array([i for i in part if int(i) not in out], np.int64) for part in federation.parts)
    changed = replace(
        federation,
        split=replace(federation.split, train=replace(train, y=y)),
        parts=parts,
        counts=describe(parts, y, train.classes),
    )
    return changed, Canaries(index, device, label, inside)
