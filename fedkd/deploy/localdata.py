"""``data.yaml`` of a device: where its own records lie. The server never sees it and cannot change it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

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
from fedkd.labeller import OnnxPredictor
from fedkd.named import imported


class PartConfig(BaseModel):
    """A trial of a network: this device takes its part of a public source, dealt as a simulation would deal it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: int = Field(ge=0, description="Which part is this device's; the number of the device in the simulation.")
    seed: int = Field(ge=0, description="The simulation's seed.")
    partition: PartitionConfig = PartitionConfig()
    proxy: ProxyConfig | None = Field(None, description="The simulation's proxy set, whose records nobody gets.")


class ModelConfig(BaseModel):
    """A model that was trained elsewhere: the device only labels by it, learns nothing and needs no torch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path | None = Field(None, description="An ONNX file; a relative path starts at the folder of data.yaml.")
    gives: Literal["probabilities", "logits"] = Field("probabilities", description="What the ONNX file puts out.")
    output: str | None = Field(None, description="Name of the ONNX output; null: the first of floats [N, C].")
    factory: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="package.module:name of an object with predict_proba, or of a function that returns one.",
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.path is None) == (self.factory is None):
            raise ConfigError("model needs either `path` (an ONNX file) or `factory` (package.module:name)")
        return self

    def load(self, folder: Path) -> Any:
        """Return the object with ``predict_proba``.

        Args:
            folder: where a relative path starts.
        Raises:
            ConfigError: it cannot be loaded.
        """
        if self.path is not None:
            return OnnxPredictor(folder / self.path, self.gives, self.output)
        assert self.factory is not None
        found = imported(self.factory, "model.factory")
        try:
            made = found if hasattr(found, "predict_proba") and not inspect.isclass(found) else found()
        except Exception as cause:
            reason = " ".join(str(cause).split())
            raise ConfigError(f"model.factory {self.factory!r} cannot be used: {reason}") from cause
        if not hasattr(made, "predict_proba"):
            raise ConfigError(f"model.factory {self.factory!r} gave a {type(made).__name__} without predict_proba")
        return made


class LocalData(BaseModel):
    """What ``data.yaml`` says: where records are to train on, or the model of a device that only labels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: DataConfig | None = Field(None, description="As the `data:` section of an experiment.")
    model: ModelConfig | None = Field(None, description="Instead of `data`: this device only labels, by this model.")
    part: PartConfig | None = Field(None, description="Null: all training records of `data` are this device's own.")
    test: bool = Field(
        False,
        description="Whether records that `data` sets aside for tests stay aside; else the device trains on them.",
    )

    @model_validator(mode="after")
    def _own(self) -> Self:
        if (self.data is None) == (self.model is None):
            raise ConfigError("give either `data` (records to train on) or `model` (this device only labels)")
        if self.data is not None and self.data.augment.active:
            raise ConfigError("data.augment is the experiment's to say, not data.yaml's")
        return self

    def records(self) -> Dataset:
        """Read this device's records.

        Raises:
            ConfigError, DataError: as the sources do, each in one sentence.
        """
        assert self.data is not None
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

    def check(self, folder: Path) -> str:
        """Read the records, or load the model, and say in one sentence what they are.

        Args:
            folder: where a relative path of a model starts.
        Raises:
            ConfigError, DataError: they cannot be read.
        """
        if self.model is not None:
            return f"a model that only labels: {type(self.model.load(folder)).__name__}"
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
