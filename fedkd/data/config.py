"""The `data:`, `partition:` and `proxy:` sections of an experiment: frozen, validated before any record is
read."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedkd.errors import ConfigError

Source = Literal[
    "digits", "breast_cancer", "wine", "mnist", "fashion_mnist", "cifar10", "npz", "csv", "parquet", "images",
    "heart_disease", "fsdd", "hf",
]  # fmt: skip


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AugmentConfig(_Section):
    """How a device's own training records are varied, anew in every step; see `fedkd.data.augment`."""

    crop: int = Field(0, ge=0, description="Images: shift by up to this many pixels each way; edges are repeated.")
    flip: bool = Field(False, description="Images: mirror left and right with chance 1/2.")
    erase: int = Field(0, ge=0, description="Images: blank a square of this many pixels at a random place (cutout).")
    noise: float = Field(0.0, ge=0, description="Add Gaussian noise of this deviation, in units of the scaled inputs.")

    @property
    def images(self) -> bool:
        """Whether something is asked for that only images [channels, height, width] can have."""
        return bool(self.crop or self.flip or self.erase)

    @property
    def active(self) -> bool:
        """Whether anything is asked for."""
        return self.images or self.noise > 0


class DataConfig(_Section):
    """Which records an experiment uses, and how they become inputs of a model.

    Where files lie: `path`; else the folder `<FEDKD_DATA>/<source>` if there is one; else the cache folder
    `~/.cache/fedkd/<source>` (under XDG_CACHE_HOME if that is set). A relative `path` that does not exist is
    also looked for under FEDKD_DATA.
    """

    source: Source = Field("digits", description="Where the records come from.")
    path: Path | None = Field(None, description="File or folder of the source; see FEDKD_DATA for the default.")
    test_path: Path | None = Field(None, description="csv and parquet: a file of test records of its own.")
    download: bool = Field(False, description="Fetch missing files; without it the network is never used.")

    train_size: int | None = Field(None, ge=1, description="Keep this many training records (stratified).")
    test_size: int | None = Field(None, ge=1, description="Keep this many test records (stratified).")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="Test part, where the source has no test set.")

    classes: int | None = Field(None, ge=2, description="Number of classes, if the records may lack some.")
    class_names: tuple[str, ...] = Field((), description="Label values in the order of the class numbers.")
    label: str = Field("label", description="csv, parquet, hf: the column of labels.")
    client: str | None = Field(None, description="csv, parquet, hf: the column naming the natural client.")
    features: tuple[str, ...] = Field((), description="csv, parquet, hf: feature columns; default: all others.")
    drop: tuple[str, ...] = Field((), description="csv, parquet, hf: columns to ignore.")
    one_hot: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="csv, parquet, hf: text column -> its public list of values. Values are never collected "
        "from the records, because that would tell one client what another holds.",
    )
    missing: tuple[str, ...] = Field(("?", "NA", "NaN", "nan", ""), description="csv: texts for a missing value.")
    channels_last: bool = Field(False, description="npz: images are [N, height, width, channels].")
    resize: tuple[int, int] | None = Field(None, description="images, hf: scale to (height, width) in pixels.")
    channels: Literal[1, 3] = Field(3, description="images, hf: 1 for grey, 3 for colour.")
    hub: str | None = Field(None, description="hf: name of the data set on the hub, such as `ylecun/mnist`.")
    hub_subset: str | None = Field(None, description="hf: its subset (configuration).")
    hub_revision: str | None = Field(None, description="hf: git revision of the data set; pin it to reproduce a run.")
    hub_input: str | None = Field("image", description="hf: the column of images; null for a table.")
    hub_splits: tuple[str, str | None] = Field(("train", "test"), description="hf: names of train and test split.")

    normalise: Literal["auto", "none", "public", "per_client"] = Field(
        "auto",
        description="How inputs are scaled: `none`; `public`: fixed constants, of the source or `mean` and "
        "`std` here; `per_client`: each device by its own records (not under differential privacy); "
        "`auto`: public where constants are known, else none.",
    )
    mean: tuple[float, ...] | None = Field(None, description="Public centre per channel or feature (pixels: 0..1).")
    std: tuple[float, ...] | None = Field(None, description="Public scale per channel or feature (pixels: 0..1).")

    augment: AugmentConfig = Field(AugmentConfig(), description="Variation of the training records on devices.")

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ConfigError("data.mean and data.std are needed together, but only one came: give both or neither")
        if self.std is not None and self.mean is not None:
            if len(self.mean) != len(self.std):
                raise ConfigError(
                    f"data.mean has {len(self.mean)} values and data.std has {len(self.std)}: give as many of each"
                )
            if any(not value > 0 for value in self.std):
                raise ConfigError("data.std must be positive everywhere: use 1 for a feature that needs no scaling")
        if self.resize is not None and min(self.resize) < 1:
            raise ConfigError(f"data.resize must be two positive numbers of pixels, but {self.resize} came")
        if self.class_names and len(set(self.class_names)) != len(self.class_names):
            raise ConfigError("data.class_names holds a name twice: every class needs a name of its own")
        if self.classes is not None and self.class_names and self.classes != len(self.class_names):
            raise ConfigError(
                f"data.classes is {self.classes} but data.class_names has {len(self.class_names)} names: "
                "give one of them, or make them agree"
            )
        if self.source == "hf" and not self.hub:
            raise ConfigError("source `hf` needs data.hub, the data set's name on the hub, such as `ylecun/mnist`")
        if self.source in ("npz", "csv", "parquet", "images") and self.path is None:
            raise ConfigError(f"source `{self.source}` needs data.path, the file or folder to read")
        return self


class PartitionConfig(_Section):
    """How the training records are dealt to devices; see `fedkd.data.partition` for the exact laws."""

    kind: Literal["iid", "dirichlet", "shards", "classes", "quantity", "natural"] = "dirichlet"
    clients: int | None = Field(
        None, description="Number of devices K; default 20, and for `natural` all natural clients."
    )
    alpha: float = Field(0.5, gt=0, description="dirichlet, quantity: concentration; small is more skewed.")
    balance: bool = Field(False, description="dirichlet: a device that has its fair share gets no more (FedGen).")
    min_size: int = Field(0, ge=0, description="Records that every device must get; 0 allows empty devices.")
    max_tries: int = Field(100, ge=1, description="dirichlet, quantity: redraws to reach min_size.")
    shards_per_client: int = Field(2, ge=1, description="shards: label-sorted pieces per device.")
    classes_per_client: int = Field(2, ge=1, description="classes: n, the ways.")
    ways_std: int = Field(0, ge=0, description="classes: a device holds n - ways_std .. n + ways_std classes.")
    shots: int | None = Field(None, ge=1, description="classes: k, records per class; null shares out all.")
    shots_std: int = Field(0, ge=0, description="classes: a device has k - shots_std .. k + shots_std per class.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.clients is not None and self.clients < 1:
            raise ConfigError(
                f"partition.clients must be at least 1, but {self.clients} came: a federation needs devices"
            )
        if self.shots is None and self.shots_std:
            raise ConfigError("partition.shots_std needs partition.shots: give the mean number of records per class")
        if self.shots is not None and self.shots_std >= self.shots:
            raise ConfigError(f"partition.shots_std must be below partition.shots ({self.shots}): lower it")
        return self


class ProxyConfig(_Section):
    """The public inputs that every device answers."""

    kind: Literal["holdout", "dataset", "noise", "mixup", "npz"] = "holdout"
    path: Path | None = Field(
        None,
        description="npz: a file with inputs `x` [N, *shape] as models take them, such as the pool.npz of "
        "`fedkd distill method=...`; `size` of them are taken.",
    )
    size: int = Field(500, ge=1, description="Number of public inputs.")
    data: DataConfig | None = Field(None, description="dataset: the other source; mixup: the public base.")
    labelled: bool = Field(False, description="Keep the public labels, as FedMD needs; else they are dropped.")
    base_size: int | None = Field(
        None,
        ge=2,
        description="mixup without `data`: records held out of the train set as base; default `size`.",
    )
    mixup_alpha: float = Field(1.0, gt=0, description="mixup: the weight is drawn from Beta(alpha, alpha).")
    low: float = Field(0.0, description="noise on unscaled real inputs: lower end of the uniform range.")
    high: float = Field(1.0, description="noise on unscaled real inputs: upper end of the uniform range.")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.kind == "dataset" and self.data is None:
            raise ConfigError("proxy.kind `dataset` needs proxy.data, the section that names the public source")
        if (self.kind == "npz") != (self.path is not None):
            raise ConfigError("proxy.path goes with proxy.kind `npz`, the file of inputs to read, and with no other")
        if self.data is not None and self.data.augment.active:
            raise ConfigError("proxy.data.augment: proxy samples are the same for everybody and are never augmented")
        if self.labelled and self.kind in ("noise", "mixup", "npz"):
            raise ConfigError(f"proxy.kind `{self.kind}` has no true labels: drop proxy.labelled or use `dataset`")
        if not self.low < self.high:
            raise ConfigError(f"proxy.low must be below proxy.high, but {self.low} and {self.high} came")
        return self
