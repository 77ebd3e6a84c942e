"""Dealing N labelled records to K devices. Letters: K clients, N samples, C classes."""

import warnings
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedkd.data.config import PartitionConfig
from fedkd.errors import ConfigError, DataError, DataWarning

Indices = NDArray[np.int64]
DEFAULT_CLIENTS = 20


def partition(
    config: PartitionConfig,
    y: NDArray[np.int64],
    classes: int,
    natural: NDArray[np.int64] | None,
    rng: np.random.Generator,
) -> list[Indices]:
    """Sorted index arrays int64, one per device, pairwise disjoint; some may be empty.

    y: labels [N] in 0..classes-1; natural: natural client numbers [N], or None where the source has none. The
    result depends on nothing but the arguments and the state of `rng`. Every record is dealt unless said
    otherwise. Kinds:

    - `iid`: a random permutation in K parts whose sizes differ by at most 1.
    - `dirichlet`: for each class, shares p ~ Dir(alpha, .., alpha) over the K devices, and the shuffled
      records of the class are cut at the cumulative shares. This is the per-class form of Yurochkin et al.,
      Bayesian Nonparametric Federated Learning of Neural Networks, ICML 2019
      (https://arxiv.org/abs/1905.12022); Hsu, Qi, Brown, Measuring the Effects of Non-Identical Data
      Distribution, 2019 (https://arxiv.org/abs/1909.06335) draw instead for each device a distribution over
      classes, with equal sizes. With `balance`, a device that holds N/K records or more gets no share of the
      next class (as FedGen's experiments do). The whole draw is repeated until every device
      has `min_size` records, at most `max_tries` times.
    - `shards`: records sorted by label (in random order within a label), cut into K * shards_per_client even
      pieces, which are dealt at random (McMahan et al., AISTATS 2017, https://arxiv.org/abs/1602.05629).
    - `classes`: device k holds n_k classes, n_k uniform on the integers of classes_per_client +- ways_std
      within 1..C. Without `shots`, classes are taken least-held first (ties by chance), so that all are held
      where the devices' classes suffice, and a class's records are shared evenly among its holders; records
      of a class that nobody holds are left out. With `shots`, classes are drawn at random and a device gets s
      records of each of them, s uniform on shots +- shots_std, never a record that another device has (the
      n-way k-shot set-up of FedProto: Tan et al., AAAI 2022, https://arxiv.org/abs/2105.00243); all other
      records are left out. A class that runs out gives what is left, with a warning.
    - `quantity`: sizes by one draw of Dir(alpha, .., alpha), labels at random; redrawn as `dirichlet` is.
    - `natural`: one device per natural client; with fewer `clients` than those, that many of them at random,
      and the records of the others are left out.

    Warns (DataWarning) of a class that no device holds. Raises ConfigError for zero clients, more devices
    than natural clients, or a `min_size` that is not reached; DataError where `natural` is needed and
    missing.
    """
    y = np.asarray(y, np.int64)
    if y.ndim != 1 or (len(y) and (int(y.min()) < 0 or int(y.max()) >= classes)):
        raise DataError(f"a partition needs labels [N] in 0..{classes - 1}, but other values came: check the labels")
    if config.clients is not None and config.clients < 1:
        raise ConfigError(
            f"partition.clients must be at least 1, but {config.clients} came: a federation needs devices"
        )
    if config.kind == "natural":
        parts = _natural(config, natural, rng)
    else:
        clients = DEFAULT_CLIENTS if config.clients is None else config.clients
        parts = _KINDS[config.kind](config, y, classes, clients, rng)
    parts = [np.sort(part).astype(np.int64) for part in parts]
    smallest = min(len(part) for part in parts)
    if smallest < config.min_size:
        raise ConfigError(
            f"partition.min_size is {config.min_size}, but a device of this `{config.kind}` partition of "
            f"{len(y)} records "
            f"gets {smallest}: lower min_size or clients, or raise alpha"
        )
    nobody = np.flatnonzero(describe(parts, y, classes).sum(axis=0) == 0)
    if len(nobody):
        warnings.warn(
            f"no device holds a record of class {', '.join(map(str, nobody))}: the student can learn it from nobody",
            DataWarning,
            stacklevel=2,
        )
    return parts


def describe(parts: Sequence[Indices], y: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """How many records of each class each device holds: int64 [K, C]."""
    counts = [np.bincount(y[part], minlength=classes) for part in parts]
    return np.array(counts, np.int64).reshape(len(parts), classes)


def _by_class(y: NDArray[np.int64], classes: int, rng: np.random.Generator) -> list[Indices]:
    return [rng.permutation(np.flatnonzero(y == number)) for number in range(classes)]


def _iid(
    config: PartitionConfig, y: NDArray[np.int64], classes: int, clients: int, rng: np.random.Generator
) -> list[Indices]:
    return list(np.array_split(rng.permutation(len(y)), clients))


def _shares(alpha: float, clients: int, rng: np.random.Generator) -> NDArray[np.float64]:
    shares = rng.dirichlet(np.full(clients, alpha))
    # For a tiny alpha every gamma draw may underflow to 0; the limit of the law is then one device that takes
    # all.
    if not np.isfinite(shares).all() or shares.sum() < 0.5:
        shares = np.zeros(clients)
        shares[rng.integers(clients)] = 1.0
    return shares


def _cut(records: Indices, shares: NDArray[np.float64]) -> list[Indices]:
    # Rounding, and a last cut at the very end, so that no record is lost to a cumulative sum of 0.9999.
    bounds = np.round(np.cumsum(shares)[:-1] * len(records)).astype(np.int64)
    return list(np.split(records, bounds))


def _redraw(draw: Callable[[], list[Indices]], config: PartitionConfig) -> list[Indices]:
    for _ in range(config.max_tries):
        parts = draw()
        if min(len(part) for part in parts) >= config.min_size:
            return parts
    raise ConfigError(
        f"partition.min_size {config.min_size} was not reached in {config.max_tries} draws of the "
        f"`{config.kind}` "
        f"partition with alpha {config.alpha}: lower min_size or clients, or raise alpha or max_tries"
    )


def _dirichlet(
    config: PartitionConfig, y: NDArray[np.int64], classes: int, clients: int, rng: np.random.Generator
) -> list[Indices]:
    def draw() -> list[Indices]:
        held: list[list[Indices]] = [[] for _ in range(clients)]
        sizes = np.zeros(clients, np.int64)
        for records in _by_class(y, classes, rng):
            shares = _shares(config.alpha, clients, rng)
            if config.balance:
                open_shares = shares * (sizes < len(y) / clients)
                # Only devices that are full already may have had all the mass of a very skewed draw.
                if open_shares.sum() > 0:
                    shares = open_shares / open_shares.sum()
            for client, piece in enumerate(_cut(records, shares)):
                held[client].append(piece)
                sizes[client] += len(piece)
        return [np.concatenate(pieces) for pieces in held]

    return _redraw(draw, config)


def _quantity(
    config: PartitionConfig, y: NDArray[np.int64], classes: int, clients: int, rng: np.random.Generator
) -> list[Indices]:
    return _redraw(lambda: _cut(rng.permutation(len(y)), _shares(config.alpha, clients, rng)), config)


def _shards(
    config: PartitionConfig, y: NDArray[np.int64], classes: int, clients: int, rng: np.random.Generator
) -> list[Indices]:
    each = config.shards_per_client
    pieces = np.array_split(np.concatenate(_by_class(y, classes, rng)), clients * each)
    order = rng.permutation(len(pieces)).reshape(clients, each)
    return [np.concatenate([pieces[number] for number in row]) for row in order]


def _classes(
    config: PartitionConfig, y: NDArray[np.int64], classes: int, clients: int, rng: np.random.Generator
) -> list[Indices]:
    if config.classes_per_client > classes:
        raise ConfigError(
            f"partition.classes_per_client is {config.classes_per_client}, but the data have {classes} "
            "classes: lower it"
        )
    low = max(1, config.classes_per_client - config.ways_std)
    high = min(classes, config.classes_per_client + config.ways_std)
    ways = rng.integers(low, high + 1, size=clients)
    pools = _by_class(y, classes, rng)
    if config.shots is not None:
        return _shots(config.shots, config.shots_std, ways, pools, rng)
    holders: list[list[int]] = [[] for _ in range(classes)]
    # A class without records is held by nobody, unless a device could otherwise not have its number of
    # classes.
    empty = np.array([len(pool) == 0 for pool in pools])
    for client in rng.permutation(clients):
        counts = np.array([len(holder) for holder in holders])
        order = np.lexsort((rng.random(classes), counts, empty))
        for number in order[: ways[client]]:
            holders[number].append(int(client))
    held: list[list[Indices]] = [[np.empty(0, np.int64)] for _ in range(clients)]
    for holder, pool in zip(holders, pools, strict=True):
        if holder:
            for client, piece in zip(holder, np.array_split(pool, len(holder)), strict=True):
                held[client].append(piece)
    return [np.concatenate(pieces) for pieces in held]


def _shots(
    shots: int, spread: int, ways: NDArray[np.int64], pools: list[Indices], rng: np.random.Generator
) -> list[Indices]:
    used = [0] * len(pools)
    short: set[int] = set()
    parts = []
    for way in ways:
        pieces = []
        each = int(rng.integers(shots - spread, shots + spread + 1))
        for number in rng.choice(len(pools), size=int(way), replace=False):
            piece = pools[number][used[number] : used[number] + each]
            used[number] += len(piece)
            if len(piece) < each:
                short.add(int(number))
            pieces.append(piece)
        parts.append(np.concatenate(pieces))
    if short:
        warnings.warn(
            f"class {', '.join(map(str, sorted(short)))} ran out of records before every device had its "
            f"{shots} shots: "
            "some devices hold fewer",
            DataWarning,
            stacklevel=4,
        )
    return parts


def _natural(config: PartitionConfig, natural: NDArray[np.int64] | None, rng: np.random.Generator) -> list[Indices]:
    if natural is None:
        raise DataError(
            "partition.kind `natural` needs records that name their client, but this source has none: set "
            "data.client "
            "to the column that does, or choose another kind"
        )
    present = np.unique(natural)
    clients = len(present) if config.clients is None else config.clients
    if clients > len(present) or clients < 1:
        raise ConfigError(
            f"partition.clients is {clients}, but the source has {len(present)} natural clients: lower it or "
            "leave it out"
        )
    if clients < len(present):
        present = np.sort(rng.choice(present, size=clients, replace=False))
    return [np.flatnonzero(natural == number) for number in present]


_KINDS: dict[str, Callable[[PartitionConfig, NDArray[np.int64], int, int, np.random.Generator], list[Indices]]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "shards": _shards,
    "classes": _classes,
    "quantity": _quantity,
}
