"""``data.yaml`` of a device: where its own records lie. The server never sees it and cannot change it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedkd.data import DataConfig, PartitionConfig, ProxyConfig
from fedkd.data.dataset import Dataset
from fedkd.data.partitions import partition
from fedkd.data.proxy import build_proxy
from fedkd.data.seeds import stream
from fedkd.data.sources import load
from fedkd.errors import ConfigError


class PartConfig(BaseModel):
    """A trial of a network: this device takes its part of a public source, dealt as a simulation would deal it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int = Field(ge=0, description="Which part is this device's; the number of the device in the simulation.")
    seed: int = Field(ge=0, description="The simulation's seed.")
    partition: PartitionConfig = PartitionConfig()
    proxy: ProxyConfig | None = Field(None, description="The simulation's proxy set, whose records nobody gets.")


class LocalData(BaseModel):
    """What ``data.yaml`` says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: DataConfig = Field(description="As the `data:` section of an experiment.")
    part: PartConfig | None = Field(None, description="Null: all training records of `data` are this device's own.")
    test: bool = Field(
        False,
        description="Whether records that `data` sets aside for tests stay aside; else the device trains on them.",
    )

    @model_validator(mode="after")
    def _own(self) -> Self:
        if self.data.augment.active:
            raise ConfigError("data.augment is the experiment's to say, not data.yaml's")
        return self

    def records(self) -> Dataset:
        """Read this device's records.

        Raises:
            ConfigError, DataError: as the sources do, each in one sentence.
        """
        # A source without a test set of its own would lose a share of its records to one that nobody looks at here.
        split = load(self.data, self.part.seed if self.part is not None else 0)
        own = split.train
        if self.part is not None:
            if self.part.proxy is not None:
                split, _ = build_proxy(self.part.proxy, split, self.part.seed)
                own = split.train
            parts = partition(self.part.partition, own.y, own.classes, own.natural, stream(self.part.seed, "partition"))
            if self.part.index >= len(parts):
                raise ConfigError(f"part.index is {self.part.index}, but the partition has {len(parts)} parts")
            # A copy, so that the rest of the source leaves the memory.
            own = own.select(np.sort(parts[self.part.index]))
        elif not self.test and self.data.source in ("csv", "parquet", "npz", "images") and self.data.test_path is None:
            own = _joined(split.train, split.test)
        if own.private and own.x.dtype != np.uint8:
            own = replace(own.scaled_by(own.fit_private()), scaled_at_home=True)
        return own

    def check(self) -> str:
        """Read the records and say in one sentence what they are.

        Raises:
            ConfigError, DataError: they cannot be read.
        """
        own = self.records()
        size = "x".join(map(str, own.shape))
        held = len(np.unique(own.y))
        return f"{len(own):,} records of shape {size}, {held} of {own.classes} classes"


def _joined(first: Dataset, second: Dataset) -> Dataset:
    return replace(
        first,
        x=np.concatenate([first.x, second.x]),
        y=np.concatenate([first.y, second.y]),
        natural=None,
        client_names=(),
    )


def read_local_data(path: Path) -> LocalData:
    """Read a ``data.yaml``.

    Raises:
        ConfigError: the file is missing or does not fit.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as cause:
        raise ConfigError(f"cannot read {path}: {' '.join(str(cause).split())}") from cause
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} says nothing of this device's data: give it a section `data:`")
    try:
        return LocalData.model_validate(raw)
    except ValidationError as cause:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'data'}: {e['msg']}" for e in cause.errors())
        raise ConfigError(f"{path} is not valid: {faults}") from cause
