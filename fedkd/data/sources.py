"""`load`: one source, read, checked, split into train and test, and cut to size."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedkd.data import readers
from fedkd.data.audio import read_fsdd
from fedkd.data.config import DataConfig
from fedkd.data.dataset import Dataset, Split
from fedkd.data.records import Part, Records
from fedkd.data.scaling import Standardiser
from fedkd.data.seeds import stream
from fedkd.errors import ConfigError, DataError

# Published with the data sets (scikit-learn's descriptions of the UCI files): wine's mean and deviation, and
# for breast cancer the published minimum and maximum, whose middle and quarter of the range are taken. They
# describe all records of the source, so they are public knowledge about it and not a statistic that devices
# exchange.
_WINE_MEAN = (13.0, 2.34, 2.36, 19.5, 99.7, 2.29, 2.03, 0.36, 1.59, 5.1, 0.96, 2.61, 746)
_WINE_STD = (0.8, 1.12, 0.27, 3.3, 14.3, 0.63, 1.00, 0.12, 0.57, 2.3, 0.23, 0.71, 315)
_BREAST_MIN = (
    6.981, 9.71, 43.79, 143.5, 0.053, 0.019, 0.0, 0.0, 0.106, 0.05,
    0.112, 0.36, 0.757, 6.802, 0.002, 0.002, 0.0, 0.0, 0.008, 0.001,
    7.93, 12.02, 50.41, 185.2, 0.071, 0.027, 0.0, 0.0, 0.156, 0.055,
)  # fmt: skip
_BREAST_MAX = (
    28.11, 39.28, 188.5, 2501.0, 0.163, 0.345, 0.427, 0.201, 0.304, 0.097,
    2.873, 4.885, 21.98, 542.2, 0.031, 0.135, 0.396, 0.053, 0.079, 0.03,
    36.04, 49.54, 251.2, 4254.0, 0.223, 1.058, 1.252, 0.291, 0.664, 0.208,
)  # fmt: skip


def _bundled(config: DataConfig) -> Records:
    from sklearn import (
        datasets,
    )  # here, because importing scikit-learn takes a second that other sources need not pay

    bunch = getattr(datasets, f"load_{config.source}")()
    y = np.asarray(bunch.target, np.int64)
    if config.source == "digits":
        x = (np.asarray(bunch.images, np.float32) / np.float32(16))[:, None]  # grey levels are 0..16
        return Records("digits", Part(np.ascontiguousarray(x), y), 10, None, tuple("0123456789"))
    names = tuple(str(name) for name in bunch.target_names)
    if config.source == "wine":
        constants = Standardiser.constants(_WINE_MEAN, _WINE_STD, (13,))
    else:
        low, high = np.array(_BREAST_MIN), np.array(_BREAST_MAX)
        constants = Standardiser.constants(tuple((low + high) / 2), tuple((high - low) / 4), (30,))
    x = np.asarray(bunch.data, np.float32)
    return Records(config.source, Part(x, y), len(names), None, names, (), constants)


SOURCES: dict[str, Callable[[DataConfig], Records]] = {
    "digits": _bundled,
    "breast_cancer": _bundled,
    "wine": _bundled,
    "mnist": readers.read_mnist,
    "fashion_mnist": readers.read_mnist,
    "cifar10": readers.read_cifar10,
    "npz": readers.read_npz,
    "csv": readers.read_table,
    "parquet": readers.read_table,
    "images": readers.read_images,
    "heart_disease": readers.read_heart_disease,
    "fsdd": read_fsdd,
    "hf": readers.read_hub,
}


def load(config: DataConfig, seed: int) -> Split:
    """Read a source. `seed` decides which records are kept and, without a test set, which become the test
    set.

    The test part is drawn within each class (and natural client, where there are such), so that rare classes
    and small clients are in it. Features stay raw; `Dataset.inputs` scales them (see `fedkd.data.scaling`).

    Raises ConfigError for settings that do not fit the source, DataError for missing, corrupt or unfit files.
    """
    records = SOURCES[config.source](config)
    train, test = records.train, records.test
    if test is not None and test.x.shape[1:] != train.x.shape[1:]:
        raise DataError(
            f"{records.name}: a train input has shape {train.x.shape[1:]} but a test input "
            f"{test.x.shape[1:]}: "
            "they must be alike"
        )
    for part in (train, test):
        if part is not None and part.x.dtype != np.uint8 and np.isinf(part.x).any():
            raise DataError(f"{records.name}: an input is infinite: mark it as missing or remove the record")
    if len(train.y) == 0:
        raise DataError(f"{records.name} holds no records: check data.path")
    if test is None:
        keep, held = _held_out(train, config.test_fraction, stream(seed, "test"))
        train, test = _take(train, keep), _take(train, held)
    train = _cut(train, config.train_size, records, "train", stream(seed, "train size"))
    test = _cut(test, config.test_size, records, "test", stream(seed, "test size"))
    scaling, private = _scaling(config, records, (train, test))

    def dataset(part: Part) -> Dataset:
        return Dataset(
            part.x, part.y, records.classes, records.name, part.natural, records.class_names,
            records.client_names, scaling, private,
        )  # fmt: skip

    return Split(dataset(train), dataset(test))


def _scaling(config: DataConfig, records: Records, parts: tuple[Part, Part]) -> tuple[Standardiser | None, bool]:
    shape = tuple(records.train.x.shape[1:])
    constants = records.constants
    if config.mean is not None and config.std is not None:
        constants = Standardiser.constants(config.mean, config.std, shape)
    way = config.normalise
    if way == "auto":
        way = "none" if constants is None else "public"
    if way == "public" and constants is None:
        raise ConfigError(
            f"data.normalise is `public`, but no public constants are known for {records.name}: give "
            "data.mean and data.std"
        )
    if way == "per_client":
        if records.train.x.dtype == np.uint8:
            raise ConfigError(
                f"data.normalise `per_client` is for tables, but {records.name} holds images: use `none`, or "
                "`public` "
                "with data.mean and data.std"
            )
        return constants, True
    if way == "none":
        lacking = sum(int(np.isnan(part.x).sum()) for part in parts if part.x.dtype != np.uint8)
        if lacking:
            raise ConfigError(
                f"{records.name} has {lacking} missing values, which unscaled inputs cannot carry: set "
                "data.normalise "
                "to `per_client`, or to `public` with data.mean and data.std"
            )
        return None, False
    return constants, False


def _take(part: Part, index: NDArray[np.int64]) -> Part:
    natural = None if part.natural is None else part.natural[index]
    return replace(part, x=part.x[index], y=part.y[index], natural=natural)


def _strata(part: Part) -> list[NDArray[np.int64]]:
    """Indices of the records of each (natural client, class)."""
    key = part.y if part.natural is None else part.natural * (int(part.y.max()) + 1) + part.y
    order = np.argsort(key, kind="stable")
    bounds = np.flatnonzero(np.diff(key[order])) + 1
    return [np.asarray(group, np.int64) for group in np.split(order, bounds)]


def _held_out(part: Part, fraction: float, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorted indices of the kept and of the held-out records, `fraction` of every stratum (rounded)."""
    if len(part.y) < 2:
        raise DataError(f"splitting off a test set needs at least 2 records, but {len(part.y)} came: give more data")
    held = np.concatenate(_share(_strata(part), max(1, round(fraction * len(part.y))), rng))
    keep = np.setdiff1d(np.arange(len(part.y)), held)
    return keep, np.sort(held)


def _share(groups: list[NDArray[np.int64]], total: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """`total` members drawn from the groups in proportion to their sizes (largest remainder, ties by
    chance)."""
    sizes = np.array([len(group) for group in groups])
    exact = total * sizes / sizes.sum()
    counts = np.floor(exact).astype(int)
    order = np.lexsort((rng.random(len(groups)), -(exact - counts)))
    counts[order[: total - counts.sum()]] += 1
    return [rng.permutation(group)[:count] for group, count in zip(groups, counts, strict=True)]


def _cut(part: Part, size: int | None, records: Records, name: str, rng: np.random.Generator) -> Part:
    if size is None or size == len(part.y):
        return part
    if size > len(part.y):
        raise ConfigError(
            f"data.{name}_size is {size}, but {records.name} has only {len(part.y)} {name} records: lower it"
        )
    return _take(part, np.sort(np.concatenate(_share(_strata(part), size, rng))))
