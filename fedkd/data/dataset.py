"""Records in memory: `Dataset` and the pair of train and test set, `Split`."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fedkd.data.scaling import Standardiser, to_inputs
from fedkd.errors import DataError

Index = NDArray[np.integer] | slice


@dataclass(frozen=True)
class Dataset:
    """N labelled records.

    x: uint8 images [N, channels, height, width], kept as uint8 because float copies are four times as large,
    or
        float32 [N, *shape] with NaN for a missing value.
    y: int64 [N], each in 0..classes-1.
    natural: int64 [N], the natural client of each record, if the source knows such.
    client_names: names of the natural clients, indexed by `natural`.
    scaling: constants that `inputs` applies; under `private` only the fall-back for a device's empty
    features.
    private: inputs are to be scaled per device, which `standardise` still has to do; `inputs` refuses until
    then.
    scaled_at_home: inputs were scaled by statistics of a device's own records, so that one record moves all of them.
    """

    x: NDArray[np.generic]
    y: NDArray[np.int64]
    classes: int
    name: str
    natural: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] = ()
    client_names: tuple[str, ...] = ()
    scaling: Standardiser | None = None
    private: bool = False
    scaled_at_home: bool = False

    def __post_init__(self) -> None:
        if self.x.dtype not in (np.dtype(np.uint8), np.dtype(np.float32)):
            raise DataError(f"{self.name}: inputs must be uint8 or float32, but {self.x.dtype} came: convert them")
        if self.y.dtype != np.dtype(np.int64) or self.y.ndim != 1:
            raise DataError(f"{self.name}: labels must be int64 [N], but {self.y.dtype} {self.y.shape} came")
        if len(self.x) != len(self.y):
            raise DataError(f"{self.name}: {len(self.x)} inputs but {len(self.y)} labels came: one label per input")
        if len(self.y) and (self.y.min() < 0 or self.y.max() >= self.classes):
            raise DataError(
                f"{self.name}: labels must lie in 0..{self.classes - 1}, but {self.y.min()}..{self.y.max()} "
                "came: "
                "set data.classes to the true number"
            )
        if self.natural is not None and self.natural.shape != self.y.shape:
            raise DataError(f"{self.name}: {len(self.natural)} client numbers for {len(self.y)} records came")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input, without N."""
        return tuple(self.x.shape[1:])

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The bounds of a model's inputs as far as they are public: pixels lie between 0 and 1 before any scaling."""
        if len(self.shape) != 3 or self.private:
            return None
        if self.scaling is None:
            return 0.0, 1.0
        ends = [(end - self.scaling.center) / self.scaling.scale for end in (np.float32(0), np.float32(1))]
        return float(ends[0].min()), float(ends[1].max())

    def inputs(self, index: Index | None = None) -> NDArray[np.float32]:
        """Model inputs float32 [n, *shape] of the records `index`: pixels / 255, then the public scaling if
        any.

        Raises DataError if inputs are to be scaled per device and `standardise` has not been called.
        """
        if self.private:
            raise DataError(
                f"{self.name}: data.normalise is `per_client` but no device has scaled its records yet: "
                "call fedkd.data.standardise (or prepare) after the partition"
            )
        return to_inputs(self.x, index, self.scaling)

    def select(self, index: Index) -> Self:
        """The records `index` (integers or a slice) as a data set of their own."""
        natural = None if self.natural is None else self.natural[index]
        return replace(self, x=self.x[index], y=self.y[index], natural=natural)

    def fit_private(self, index: Index | None = None) -> Standardiser:
        """The scaling of the one device that holds the records `index` (all by default), from these records
        only.

        What a real device calls on its own data; `standardise` calls it for every device of a simulation.
        """
        if self.x.dtype == np.uint8:
            raise DataError(f"{self.name}: images are scaled by public constants, so fit_private takes tables only")
        chosen = self.x if index is None else self.x[index]
        return Standardiser.fit(chosen, self.scaling)

    def scaled_by(self, scaling: Standardiser | None) -> Self:
        """The same raw records with `inputs` scaled by these constants."""
        return replace(self, scaling=scaling, private=False)


@dataclass(frozen=True)
class Split:
    """Private training records (to be dealt to devices) and test records for the evaluation."""

    train: Dataset
    test: Dataset
