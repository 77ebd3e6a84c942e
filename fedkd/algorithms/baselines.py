"""The two ends between which every federated method lies: devices alone, and all records in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from fedkd.algorithms.base import Algorithm


@final
@dataclass(frozen=True, kw_only=True)
class Local(Algorithm):
    """Baseline: every device trains on its own records and nothing is exchanged.

    No paper. Messages are empty (their few header bytes are counted all the same).
    """

    name: ClassVar[str] = "local"
    paper: ClassVar[str] = "baseline"
    predictors: ClassVar[bool] = True


@final
@dataclass(frozen=True, kw_only=True)
class Central(Algorithm):
    """Baseline: one device holds everybody's records. It breaks the privacy of data on purpose, in simulation only.

    No paper. With the same epochs per round as the devices, this is what training without any privacy reaches.
    """

    name: ClassVar[str] = "central"
    paper: ClassVar[str] = "baseline"
    pools_data: ClassVar[bool] = True
