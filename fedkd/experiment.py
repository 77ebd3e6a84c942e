"""An experiment: YAML <-> a validated, frozen configuration. Everything is checked before any record is read."""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedkd.aggregators.choice import AggregatorConfig
from fedkd.algorithms import catalogue
from fedkd.algorithms.base import Algorithm
from fedkd.attacks import AttackConfig
from fedkd.codecs import codec as parse_codec
from fedkd.data import DataConfig, PartitionConfig, ProxyConfig
from fedkd.deploy.config import DeploymentConfig
from fedkd.errors import ConfigError
from fedkd.payloads import Nothing
from fedkd.privacy.config import PrivacyConfig
from fedkd.virtual.config import StalenessConfig, VirtualConfig

MAX_SWEEP = 1000
M = TypeVar("M", bound=BaseModel)


class Section(BaseModel):
    """Base of all sections: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, raw: Any) -> Any:
        """Refuse `rounds: true`, which would be read as 1."""
        for name, value in raw.items() if isinstance(raw, Mapping) else ():
            wanted = cls.model_fields[name].annotation if name in cls.model_fields else None
            if isinstance(value, bool) and {wanted, *get_args(wanted)} & {int, float}:
                raise ConfigError(f"{name} is {str(value).lower()}, expected a number")
        return raw


class OptimizerConfig(Section):
    """A first-order optimiser."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0, description="Learning rate.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum (sgd).")
    nesterov: bool = False
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    persist: bool = Field(False, description="Keep momentum and moments on the device between rounds.")


class TrainingConfig(Section):
    """One stretch of training: epochs over the records or a number of steps, batch size and optimiser."""

    epochs: int = Field(5, ge=0, description="Passes over the records; 0 switches the stretch off.")
    steps: int | None = Field(None, ge=0, description="Optimiser steps; replaces epochs where it is given.")
    batch_size: int = Field(32, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: Literal["constant", "cosine"] = Field("constant", description="Learning rate within the stretch.")
    round_decay: float = Field(1.0, gt=0, le=1, description="The learning rate is multiplied by this each round.")


class ServerConfig(TrainingConfig):
    """How the server teaches its student."""

    epochs: int = Field(10, ge=0)
    patience: int | None = Field(
        None, ge=1, description="Stop early after this many steps without a better loss on held-out proxy samples."
    )


class PretrainConfig(TrainingConfig):
    """What a device learns before round 0, where the method asks for it (FedMD): labelled proxy, then own records."""

    epochs: int = Field(5, ge=0)


class ModelsConfig(Section):
    """Architectures by name, name(option=value) or package.module:Factory."""

    student: str = Field("mlp", description="The server's model.")
    devices: tuple[str, ...] = Field(("mlp",), min_length=1, description="Device k runs entry k modulo their number.")
    same_start: bool = Field(True, description="Devices of one architecture start from the same random weights.")

    @field_validator("devices", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class PopulationConfig(Section):
    """Who takes part in a round, and who fails to."""

    participation: float = Field(1.0, gt=0, le=1, description="Share of devices asked in a round.")
    dropout: float = Field(
        0.0, ge=0, le=1, description="Chance that a device that was asked drops out before it works."
    )
    late: float = Field(0.0, ge=0, le=1, description="Chance that an answer comes after the round is closed.")
    minimum: int = Field(1, ge=1, description="Answers below which a round fails: its answers are discarded.")
    over_selection: float = Field(
        0.0, ge=0, description="Share of devices asked beyond those wanted; the first answers close the round."
    )
    deadline_seconds: float | None = Field(
        None, gt=0, description="Virtual seconds after which a round is closed with what has come."
    )
    buffer: int | None = Field(
        None,
        ge=1,
        description="Makes rounds asynchronous: this many answers close one, `participation` is the share of devices at "
        "work at any time, and whoever is done is replaced at once.",
    )
    staleness: StalenessConfig = StalenessConfig()
    examples_cap: float = Field(
        1e6, ge=1, description="Records that an answer is weighted by at most, whatever the device says of its number."
    )

    @property
    def stalest(self) -> float:
        """The largest staleness of an answer that is used; 0: late answers are discarded."""
        if self.staleness.limit is not None:
            return self.staleness.limit
        return 0 if self.buffer is None else math.inf

    def cohort(self, clients: int) -> int:
        """Return how many of ``clients`` devices a round wants: the nearest number, halves up, and at least one."""
        return max(1, math.floor(self.participation * clients + 0.5))


class CodecConfig(Section):
    """How payloads become bytes: see `fedkd.codecs`. `auto` is the method's own, else float32 (float64 runs: float64)."""

    up: str = "auto"
    down: str = "auto"

    @field_validator("up", "down")
    @classmethod
    def _known(cls, value: str) -> str:
        if value != "auto":
            parse_codec(value)
        return value


class EvaluationConfig(Section):
    """What is measured, and how often. None of it changes a result."""

    every: int = Field(1, ge=1, description="Rounds between evaluations of the student.")
    clients_every: int | None = Field(
        None, ge=1, description="Rounds between evaluations of devices; null: at the end."
    )
    clients_sample: int | None = Field(
        256, ge=1, description="Devices looked at (a fixed random sample) where there are more; null looks at all."
    )
    local_only: bool = Field(True, description="Also train every device alone, with the same steps on its own records.")
    batch_size: int = Field(1000, ge=1)


class CheckpointConfig(Section):
    """How often a run is saved, so that it can be resumed."""

    every: int = Field(1, ge=1, description="Rounds between checkpoints.")
    keep: int = Field(2, ge=1, description="Checkpoints kept.")


class RunnerConfig(Section):
    """Performance knobs; none of them changes a result beyond rounding."""

    kind: Literal["serial", "stacked", "flower"] = "stacked"
    block: int | None = Field(None, ge=1, description="Devices per stack; null chooses by the model's size.")
    threads: int | None = Field(None, ge=1, description="Threads; null: one for torch, its own choice for kernels.")
    memory_gib: float = Field(
        2.0, ge=0, description="Memory for the states of devices, in GiB; beyond it they lie in memory-mapped files."
    )
    workers: int = Field(2, ge=1, description="flower: processes on Ray that take blocks of devices.")
    num_cpus: float = Field(
        1.0, gt=0, description="flower: Ray's CPUs for each of them; one thread for each whole one."
    )
    num_gpus: float = Field(0.0, ge=0, description="flower: Ray's GPUs for each of them; 0.5 lets two share one.")
    ray_address: str | None = Field(
        None, description="flower: a Ray cluster to join, `auto` or host:port; null starts Ray on this machine."
    )
    device: Literal["cpu", "cuda", "auto"] = Field("cpu", description="stacked: what computes; auto: a GPU, if any.")
    kernels: bool = Field(True, description="stacked: use compiled kernels where they fit; false: torch alone.")


class Experiment(Section):
    """A whole experiment. `fedkd config schema` prints its JSON schema, `fedkd config show X.yaml` the resolved form."""

    name: str = Field("digits-dsfl", min_length=1, pattern=r"^[\w.-]+$")
    seed: int = Field(1, ge=0)
    rounds: int = Field(10, ge=1)
    dtype: Literal["float32", "float64"] = "float32"
    data: DataConfig = DataConfig()
    partition: PartitionConfig = PartitionConfig()
    proxy: ProxyConfig | None = ProxyConfig()
    proxy_per_round: int | None = Field(None, ge=1, description="Proxy samples asked in a round; null asks for all.")
    proxy_choice: Literal["random", "spread"] = Field(
        "random",
        description="Which of them: others in every round; or `spread`: always those nearest to the centres of as many "
        "clusters of the proxy set, which make few queries tell more. The set is public, so that this costs no privacy.",
    )
    models: ModelsConfig = ModelsConfig()
    algorithm: dict[str, Any] = Field(default_factory=lambda: catalogue.resolve(catalogue.DEFAULT))
    training: TrainingConfig = Field(TrainingConfig(), description="A device on its own records.")
    digest: TrainingConfig = Field(TrainingConfig(), description="A device on the teacher's answers.")
    pretrain: PretrainConfig = PretrainConfig()
    server: ServerConfig = ServerConfig()
    population: PopulationConfig = PopulationConfig()
    virtual: VirtualConfig | None = Field(
        None, description="What simulated devices are like; null: everybody answers at once."
    )
    codec: CodecConfig = CodecConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    aggregator: AggregatorConfig = AggregatorConfig()
    attack: AttackConfig = AttackConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    deployment: DeploymentConfig = DeploymentConfig()
    runner: RunnerConfig = RunnerConfig()

    @field_validator("algorithm", mode="before")
    @classmethod
    def _algorithm(cls, value: Any) -> dict[str, Any]:
        return catalogue.resolve(value)

    @model_validator(mode="after")
    def _fits(self) -> Experiment:
        method = self.method
        if method.proxy != "none" and self.proxy is None:
            raise ConfigError(f"{method.name} distils on a proxy set: give a `proxy:` section")
        if method.proxy == "labelled" and self.proxy is not None and not self.proxy.labelled:
            raise ConfigError(f"{method.name} pretrains on labelled public records: set proxy.labelled=true")
        if self.proxy and self.proxy_per_round and self.proxy_per_round > self.proxy.size:
            raise ConfigError(f"proxy_per_round is {self.proxy_per_round}, more than proxy.size {self.proxy.size}")
        self._fits_in_time()
        if not method.heterogeneous and len({*self.models.devices, self.models.student}) > 1:
            raise ConfigError(
                f"{method.name} averages weights, so that every device and the student need one architecture; got "
                f"{sorted({*self.models.devices, self.models.student})}. Methods that take several: see `fedkd methods`"
            )
        self.privacy.check(method, self.population)
        central = self.privacy.kind in ("labels", "votes")
        self.aggregator.check(method, secure_sum=self.privacy.secure_sum, central=central)
        self.attack.check(method)
        return self

    def _fits_in_time(self) -> None:
        population, method = self.population, self.method
        if self.virtual is None:
            for name in ("over_selection", "deadline_seconds", "buffer"):
                if getattr(population, name):
                    raise ConfigError(
                        f"population.{name} depends on who answers when: switch virtual time on, such as by virtual={{}}"
                    )
        if population.buffer is not None:
            if method.upload is Nothing:
                raise ConfigError(f"{method.name} sends nothing up, so that no answers can close an asynchronous round")
            if population.over_selection:
                raise ConfigError(
                    "population.over_selection is for synchronous rounds: take it out, or population.buffer"
                )
            if population.buffer < population.minimum:
                raise ConfigError(
                    f"population.buffer ({population.buffer}) is below population.minimum ({population.minimum}): "
                    "every round would fail"
                )
        if self.virtual is not None and self.privacy.secure_sum:
            raise ConfigError(
                "privacy.secure_sum exchanges keys and shares in a cohort that is there at one time, of which virtual time "
                "knows nothing yet: take out virtual"
            )
        if self.virtual is not None and self.privacy.sampling == "poisson" and self.privacy.kind in ("labels", "votes"):
            raise ConfigError(
                "privacy.sampling poisson draws clients in secret, each with the same chance; in virtual time who is there "
                "and idle decides: take out virtual, or set privacy.sampling=fixed"
            )
        uneven = population.staleness.weighting == "polynomial" and population.staleness.power > 0
        if population.stalest > 0 and uneven and not method.weighs and method.upload is not Nothing:
            raise ConfigError(
                f"{method.name} counts all answers alike, so that late ones cannot count for less: set "
                "population.staleness.weighting=constant, or population.staleness.limit=0 to discard them"
            )

    @property
    def method(self) -> Algorithm:
        """The algorithm, built from its section."""
        return catalogue.build(self.algorithm)

    @property
    def codecs(self) -> tuple[str, str]:
        """The codec strings (up, down) with `auto` resolved."""
        plain = "float64" if self.dtype == "float64" else "float32"
        own = self.method.codecs
        up, down = (
            chosen if chosen != "auto" else (default if default != "auto" and plain == "float32" else plain)
            for chosen, default in zip((self.codec.up, self.codec.down), own, strict=True)
        )
        return up, down

    def dump(self) -> str:
        """Return the resolved experiment as YAML that loads to the same experiment."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


# ---- reading --------------------------------------------------------------------------------------------------------
def load(path: Path | None, overrides: Sequence[str] = ()) -> list[tuple[dict[str, Any], Experiment]]:
    """Read an experiment and its overrides; a comma list makes a sweep. See :func:`read_points`."""
    return [(varying, validate(raw)) for varying, raw in read_points(path, overrides)]


def read_points(path: Path | None, overrides: Sequence[str] = ()) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Read a YAML file and lay overrides over it; a comma list makes a sweep.

    Args:
        path: YAML file, or None for the built-in default.
        overrides: ``dotted.key=value`` strings; ``seed=1,2,3`` gives three points, several lists their product.
    Returns:
        One (overrides that vary, raw mapping) per point; the seed varies fastest.
    Raises:
        ConfigError: one readable sentence per fault.
    """
    base = read_yaml(path) if path is not None else {}
    choices = [_parse_override(text) for text in overrides]
    _refuse_repeats(choices)
    choices.sort(key=lambda item: item[0] == "seed")
    size = math.prod(len(options) for _, options in choices)
    if size > MAX_SWEEP:
        raise ConfigError(f"the comma lists make {size} runs, more than {MAX_SWEEP}: split the sweep")
    points = []
    for values in itertools.product(*(v for _, v in choices)):
        raw = _copy(base)
        varying = {}
        for (key, options), value in zip(choices, values, strict=True):
            _assign(raw, key, value)
            if len(options) > 1:
                varying[key] = value
        points.append((varying, raw))
    return points


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds no mapping.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise ConfigError(f"cannot read the experiment {path}: {cause.strerror or cause}") from cause
    except (yaml.YAMLError, UnicodeDecodeError) as cause:
        raise ConfigError(f"{path} is not valid YAML: {_first_line(cause)}") from cause
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got a {type(raw).__name__}")
    return raw


def validate(raw: Mapping[str, Any]) -> Experiment:
    """Build the experiment from a plain mapping; see :func:`build`."""
    return build(Experiment, raw)


def build(model: type[M], raw: Mapping[str, Any]) -> M:
    """Build a configuration from a plain mapping.

    Raises:
        ConfigError: with every fault on a line, unknown keys with the nearest known one.
    """
    try:
        return model.model_validate(dict(raw))
    except ValidationError as cause:
        raise ConfigError("\n".join(_explain(model, error) for error in cause.errors())) from cause


def _explain(root: type[BaseModel], error: Any) -> str:
    place = [str(part) for part in error["loc"]]
    where = ".".join(place) or "experiment"
    if error["type"] == "extra_forbidden":
        known = _known_keys(root, place[:-1])
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
        hint = f" Did you mean {'.'.join([*place[:-1], near[0]])!r}?" if near else f" Known: {', '.join(known)}."
        return f"unknown key {where!r}.{hint}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}" if place else message
    return f"{where}: {message}, got {error['input']!r}"


def _known_keys(root: type[BaseModel], place: Sequence[str]) -> list[str]:
    model: Any = root
    for part in place:
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        options = [annotation, *get_args(annotation)]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


def _parse_override(text: str) -> tuple[str, list[Any]]:
    key, sign, value = text.partition("=")
    if not sign or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
        raise ConfigError(f"override {text!r}: expected key=value, such as rounds=30 or algorithm.temperature=0.5")
    return key, [_scalar(part) for part in _split(value)]


def _refuse_repeats(choices: Sequence[tuple[str, list[Any]]]) -> None:
    """Refuse what would be dropped in silence: a key given twice, or a value listed twice."""
    keys = [key for key, _ in choices]
    for key, options in choices:
        if keys.count(key) > 1:
            raise ConfigError(f"override {key} is given twice: give it once, as a comma list for a sweep")
        twice = next((v for i, v in enumerate(options) if repr(v) in map(repr, options[:i])), None)
        if twice is not None:
            raise ConfigError(f"override {key} lists {twice!r} twice: every point of a sweep is run once")


def _split(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for i, letter in enumerate(text):
        depth += letter in "[({"
        depth -= letter in "])}"
        if letter == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    yield text[start:]


def _scalar(text: str) -> Any:
    # YAML 1.1 reads "1e-5" as text; people mean a number.
    if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text):
        return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as cause:
        raise ConfigError(f"cannot read the value {text!r}: {_first_line(cause)}") from cause


NAMED = ("algorithm", "method")
"""Sections that may be written as one word, their name."""


def _assign(raw: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    node = raw
    for part in path:
        inner = node.get(part)
        if part in NAMED and isinstance(inner, str):
            inner = {"name": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {key}: {part!r} is a value, not a section")
        node[part] = inner
        node = inner
    if last in NAMED and isinstance(value, str) and isinstance(node.get(last), dict):
        value = {"name": value}
    node[last] = value


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _first_line(cause: Exception) -> str:
    return " ".join(str(cause).split())


def schema() -> dict[str, Any]:
    """Return the JSON schema of an experiment, each method with its own parameters."""
    result = Experiment.model_json_schema()
    methods, definitions = catalogue.schemas()
    result["properties"]["algorithm"] = {
        "description": "A method by name, with its parameters; or package.module:Class.",
        "anyOf": [
            {"type": "string", "enum": sorted(catalogue.METHODS)},
            {"type": "string", "pattern": ".+:.+"},
            *methods,
        ],
    }
    result.setdefault("$defs", {}).update(definitions)
    result["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return result
