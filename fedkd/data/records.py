"""What a reader hands to `load`, and how label and client columns become numbers."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedkd.data.scaling import Standardiser
from fedkd.errors import ConfigError, DataError


@dataclass(frozen=True)
class Part:
    """Raw records of one part (train or test): x uint8 or float32 [N, *shape], y int64 [N], natural int64
    [N]."""

    x: NDArray[np.generic]
    y: NDArray[np.int64]
    natural: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Records:
    """A whole source: `test` is None where the source has no test set of its own."""

    name: str
    train: Part
    classes: int
    test: Part | None = None
    class_names: tuple[str, ...] = ()
    client_names: tuple[str, ...] = ()
    constants: Standardiser | None = None  # public scaling that belongs to the source


def need_extra(package: str, extra: str, what: str) -> DataError:
    """The error for an optional package that is not installed."""
    return DataError(
        f"{what} needs the package `{package}`, which is not installed: run `pip install 'fedkd[{extra}]'`"
    )


def encode_labels(
    values: NDArray[np.generic], where: str, classes: int | None, class_names: tuple[str, ...]
) -> tuple[NDArray[np.int64], int, tuple[str, ...]]:
    """Class numbers int64 [N], number of classes and class names of raw label values [N].

    With `class_names` each value is looked up there. Whole numbers from 0 on are class numbers as they are;
    with a gap in them `classes` must say so, otherwise (as for text) the distinct values in sorted order are
    the classes.

    Raises DataError for a missing or unknown label, ConfigError if `classes` contradicts the values.
    """
    if class_names:
        lookup = {name: number for number, name in enumerate(class_names)}
        texts = [_text(value) for value in values]
        unknown = sorted({text for text in texts if text not in lookup})
        if unknown:
            raise DataError(
                f"{where}: label `{unknown[0]}` is not among data.class_names {list(class_names)}: add it or fix it"
            )
        return np.array([lookup[text] for text in texts], np.int64), len(class_names), class_names
    if values.dtype.kind == "f":
        if np.isnan(values).any():
            raise DataError(f"{where}: {int(np.isnan(values).sum())} records have no label: remove or label them")
        if np.array_equal(values, np.round(values)):
            values = values.astype(np.int64)
    if values.dtype.kind in "iub" and len(values) and int(values.min()) >= 0:
        numbers = values.astype(np.int64)
        top = int(numbers.max())
        if classes is not None:
            if top >= classes:
                raise ConfigError(
                    f"{where}: label {top} came but data.classes is {classes}: labels must be 0..{classes - 1}"
                )
            return numbers, classes, ()
        if len(np.unique(numbers)) == top + 1:
            return numbers, max(top + 1, 2), ()
    if values.dtype.kind in "OUST":
        absent = sum(1 for value in values if value is None or value != value)
        if absent:
            raise DataError(f"{where}: {absent} records have no label: remove or label them")
        values = np.array([_text(value) for value in values])
    distinct, codes = np.unique(values, return_inverse=True)
    if classes is not None and classes != len(distinct):
        raise ConfigError(
            f"{where}: {len(distinct)} distinct labels came but data.classes is {classes}: list all in data.class_names"
        )
    names = tuple(_text(value) for value in distinct)
    return codes.astype(np.int64), max(len(distinct), 2), names


def encode_clients(values: NDArray[np.generic], where: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Natural client numbers int64 [N] and their names, in sorted order of the values. Raises DataError if
    missing."""
    if values.dtype.kind in "OUST":
        if any(value is None or value != value for value in values):
            raise DataError(f"{where}: some records name no client: every record needs one")
        values = np.array([_text(value) for value in values])
    elif values.dtype.kind == "f" and np.isnan(values).any():
        raise DataError(f"{where}: some records name no client: every record needs one")
    distinct, codes = np.unique(values, return_inverse=True)
    return codes.astype(np.int64), tuple(_text(value) for value in distinct)


def _text(value: object) -> str:
    # A column of whole numbers with a missing value somewhere is read as real: 3.0 is still the label `3`.
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)
