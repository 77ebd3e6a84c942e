"""Source, proxy set, partition and scaling in the right order."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedkd.data.config import DataConfig, PartitionConfig, ProxyConfig
from fedkd.data.dataset import Dataset, Split
from fedkd.data.partitions import describe, partition
from fedkd.data.proxy import ProxySet, build_proxy
from fedkd.data.scaling import Standardiser
from fedkd.data.seeds import stream
from fedkd.data.sources import load
from fedkd.errors import ConfigError, DataError


@dataclass(frozen=True)
class Federation:
    """All records of a simulated federation, ready for models.

    parts: for each of K devices the int64 indices of its records in `split.train`; counts: int64 [K, C]
    labels.
    client_names: for a natural partition the name of each device, else empty.
    """

    split: Split
    parts: tuple[NDArray[np.int64], ...]
    proxy: ProxySet | None
    counts: NDArray[np.int64]
    client_names: tuple[str, ...] = ()


def prepare(
    data: DataConfig, partition_config: PartitionConfig, proxy_config: ProxyConfig | None, seed: int
) -> Federation:
    """Load, set the public part aside, deal the rest to devices, scale. The same seed gives the same
    federation.

    `proxy_config` is None for a method that needs no public inputs. Raises what the four steps raise.
    """
    split = load(data, seed)
    proxy = None
    if proxy_config is not None:
        split, proxy = build_proxy(proxy_config, split, seed)
    train = split.train
    parts = partition(partition_config, train.y, train.classes, train.natural, stream(seed, "partition"))
    names: tuple[str, ...] = ()
    if partition_config.kind == "natural" and train.natural is not None and train.client_names:
        names = tuple(train.client_names[int(train.natural[part[0]])] for part in parts)
    counts = describe(parts, train.y, train.classes)
    split, proxy = standardise(split, parts, proxy)
    return Federation(split, tuple(parts), proxy, counts, names)


def standardise(
    split: Split, parts: Sequence[NDArray[np.int64]], proxy: ProxySet | None
) -> tuple[Split, ProxySet | None]:
    """Scale every device's records by their own statistics, if `data.normalise` is `per_client`; else a
    no-op.

    The train records of device k are replaced by what device k alone computes from them; records of no device
    become 0. For the proxy set and the test records see `fedkd.data.scaling`. Raises ConfigError where
    nothing public or local is known by which a test record may be scaled.
    """
    train, test = split.train, split.test
    if not train.private:
        return split, proxy
    fitted = [train.fit_private(part) for part in parts]
    x = np.zeros(train.x.shape, np.float32)
    for part, scaling in zip(parts, fitted, strict=True):
        x[part] = scaling.apply(train.x[part].astype(np.float32))
    public = train.scaling
    if proxy is not None:
        # Mixtures and hold-outs are public, so their statistics are too.
        own = Standardiser.fit(proxy.x, public)
        proxy = replace(proxy, scaling=own, private=False)
        public = own
    test = _scale_test(test, _homes(train, parts), fitted, public)
    return Split(replace(train, x=x, scaling=None, private=False, scaled_at_home=True), test), proxy


def _homes(train: Dataset, parts: Sequence[NDArray[np.int64]]) -> dict[int, int]:
    """Natural client -> the one device that holds its training records (absent if several share them)."""
    if train.natural is None:
        return {}
    holders: dict[int, set[int]] = {}
    for client, part in enumerate(parts):
        for number in np.unique(train.natural[part]):
            holders.setdefault(int(number), set()).add(client)
    return {number: clients.pop() for number, clients in holders.items() if len(clients) == 1}


def _scale_test(
    test: Dataset, homes: dict[int, int], fitted: list[Standardiser], public: Standardiser | None
) -> Dataset:
    raw = test.x.astype(np.float32)
    x = np.zeros(raw.shape, np.float32)
    elsewhere = np.ones(len(test), bool)
    if test.natural is not None:
        for number, client in homes.items():
            rows = test.natural == number
            x[rows] = fitted[client].apply(raw[rows])
            elsewhere &= ~rows
    if elsewhere.any():
        if public is None:
            raise ConfigError(
                f"data.normalise is `per_client`, but {int(elsewhere.sum())} test records of {test.name} "
                "belong to no "
                "device, and there is neither a proxy set nor public constants to scale them by: add "
                "data.mean and "
                "data.std or a proxy, or use a natural partition"
            )
        x[elsewhere] = public.apply(raw[elsewhere])
    if np.isnan(x).any():
        raise DataError(f"{test.name}: scaling left missing values in the test set; please report this")
    return replace(test, x=x, scaling=None, private=False)
