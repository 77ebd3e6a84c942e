"""Scaling of inputs without a statistic that passes between devices.

Three ways, chosen by `data.normalise`:

- `none`: pixels are divided by 255, real features stay as they are. Missing values are then refused.
- `public`: constants that were fixed before anybody's records were seen: shipped with the source or given as
  `mean` and `std`. A missing value becomes the centre, that is 0 after scaling. Everything (private records,
  test set, proxy set) passes through the same constants. The right choice under differential privacy.
- `per_client`: every device scales its records by their own mean and standard deviation, after filling a
  missing value with its own median. What is not one device's is scaled so:
    - the proxy set by statistics of the proxy set itself, which is public;
    - a test record that belongs to a natural client by the constants of the one device that holds this
      client's training records (the hospital scales its patients at home), never by a statistic of the test
      set;
    - any other test record by the constants of the proxy set, or else by the source's public constants; with
      neither the experiment is refused.
  A device's feature with no value at all is taken from the public constants, or becomes 0.

Under `per_client` one record shifts all inputs of its device, outside of any mechanism: the noise of DP-SGD
does not account for that, so a differentially private experiment must use `public` or `none`.
"""

import warnings
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fedkd.errors import ConfigError

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Standardiser:
    """Maps raw inputs to `(value - center) / scale`, with `fill` for a missing (NaN) value.

    The three arrays are float32 and broadcast against one record: [D] for a table, [channels, 1, 1] for
    images.
    """

    center: NDArray[np.float32]
    scale: NDArray[np.float32]
    fill: NDArray[np.float32]

    @classmethod
    def constants(cls, mean: tuple[float, ...], std: tuple[float, ...], shape: tuple[int, ...]) -> Self:
        """Public constants for inputs of `shape` (without N): one per feature or channel, or one for all.

        Raises ConfigError if their number does not fit.
        """
        wanted = shape[0] if shape else 1
        if len(mean) not in (1, wanted):
            amount = "1" if wanted == 1 else f"1 or {wanted}"
            raise ConfigError(
                f"data.mean and data.std must have {amount} values for inputs of shape {shape}, "
                f"but {len(mean)} came: give one per {'channel' if len(shape) > 1 else 'feature'}"
            )
        form = (len(mean), *(1 for _ in shape[1:]))
        center = np.asarray(mean, np.float32).reshape(form)
        return cls(center, np.asarray(std, np.float32).reshape(form), center)

    @classmethod
    def fit(cls, x: Array, fallback: Self | None = None) -> Self:
        """Statistics of one device's own records, real [N, *shape] with NaN for missing; N may be 0.

        `fill` is the median, `center` and `scale` are mean and standard deviation after filling. A feature
        without any value takes `fallback`, or 0 and 1; a constant feature has scale 1, so one record alone
        becomes 0.
        """
        shape = x.shape[1:]
        back_center = np.broadcast_to(fallback.center if fallback else np.float32(0), shape)
        back_scale = np.broadcast_to(fallback.scale if fallback else np.float32(1), shape)
        if len(x) == 0:
            return cls(back_center.copy(), back_scale.copy(), back_center.copy())
        values = x.astype(np.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a column of NaN only, which is handled below
            median = np.nanmedian(values, axis=0)
        empty = np.isnan(median)
        fill = np.where(empty, back_center, median)
        values = np.where(np.isnan(values), fill, values)
        center, scale = values.mean(axis=0), values.std(axis=0)
        # Rounding leaves a constant column with a tiny spread that would blow up later values.
        constant = scale <= 1e-7 * np.maximum(1.0, np.abs(center))
        scale = np.where(empty, back_scale, np.where(constant, 1.0, scale))
        return cls(center.astype(np.float32), scale.astype(np.float32), fill.astype(np.float32))

    def apply(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scaled copy of float32 [N, *shape], without NaN."""
        filled = np.where(np.isnan(x), self.fill, x)
        return np.asarray((filled - self.center) / self.scale, dtype=np.float32)


def to_inputs(x: Array, index: NDArray[np.integer] | slice | None, scaling: Standardiser | None) -> NDArray[np.float32]:
    """Model inputs float32 [n, *shape] of stored records, always a new array."""
    chosen = x if index is None else x[index]
    if chosen.dtype == np.uint8:
        values = chosen.astype(np.float32)
        values /= np.float32(255)
    else:
        values = chosen.astype(np.float32, copy=True)
    return values if scaling is None else scaling.apply(values)
