"""What a party has at hand: the experiment, the models, the public proxy set, and the records that live with it.

In a simulation one site holds all devices; on a real device it holds that device's records alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedkd.algorithms.base import Algorithm, Card, DeviceState, Shapes
from fedkd.codecs import codec
from fedkd.data import Dataset, Federation, ProxySet, prepare
from fedkd.errors import ConfigError
from fedkd.experiment import Experiment
from fedkd.labeller import OWN
from fedkd.models import Architecture
from fedkd.payloads import Bundle, Contract, Nothing, Payload, ProxyIndices, Weights
from fedkd.privacy.build import build
from fedkd.privacy.mechanisms import Mechanism
from fedkd.records import Pool, Records, records
from fedkd.seeding import key

CONTRACTS_KEPT = 256

SHARED_ROLE = "shared"
"""A device's model of this role has the student's architecture; all other roles have the device's own."""


@dataclass(frozen=True)
class Silo:
    """The records of every simulated device: one pool, and each device's positions in it."""

    pool: Pool
    parts: tuple[Tensor, ...]


class Site:
    """See the module text. Raises ConfigError where models, data and method do not fit each other."""

    def __init__(self, experiment: Experiment, federation: Federation) -> None:
        self.experiment = experiment
        self.method: Algorithm = experiment.method
        self.dtype = torch.float64 if experiment.dtype == "float64" else torch.float32
        self.federation = federation
        train: Dataset = federation.split.train
        self.shape, self.classes = train.shape, train.classes
        parts = federation.parts
        if self.method.pools_data:
            parts = (np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.int64),)
        self.tells_why = experiment.privacy.kind == "none"
        """Whether a device's error may leave it in words, which may quote values of records; else its kind alone does."""
        self.silo = Silo(Pool(train, self.dtype), tuple(torch.from_numpy(np.asarray(p, np.int64)) for p in parts))
        self.test = Pool(federation.split.test, self.dtype)
        self.proxy: ProxySet | None = federation.proxy if self.method.proxy != "none" else None
        self.proxy_pool = Pool(self.proxy, self.dtype) if self.proxy is not None else None
        up, down = experiment.codecs
        self.codec_up, self.codec_down = codec(up), codec(down)
        self._architectures: dict[str, Architecture] = {}
        self._contracts_up: dict[tuple[str, bool, int], Contract] = {}
        self._templates: dict[str, Mapping[str, Tensor]] = {}
        self._starts: dict[tuple[str, tuple[str | int, ...]], Mapping[str, Tensor]] = {}
        self.cards = tuple(self._card(k) for k in range(len(parts)))
        self.attackers = experiment.attack.attackers(len(self.cards), experiment.seed)
        self._check()
        asked = 0 if self.proxy is None else experiment.proxy_per_round or len(self.proxy)
        self.mechanism: Mechanism = build(experiment, clients=len(self.cards), queries=asked, classes=self.classes)

    @classmethod
    def load(cls, experiment: Experiment) -> Site:
        """Read the data of ``experiment`` and deal them to its devices."""
        needs_proxy = experiment.method.proxy != "none"
        federation = prepare(
            experiment.data, experiment.partition, experiment.proxy if needs_proxy else None, experiment.seed
        )
        return cls(experiment, federation)

    # ---- models -----------------------------------------------------------------------------------------------------
    def architecture(self, name: str) -> Architecture:
        """Return the architecture ``name``, bound to this site's data."""
        if name not in self._architectures:
            self._architectures[name] = Architecture(name, self.shape, self.classes, self.dtype)
        return self._architectures[name]

    def architectures_of(self, card: Card) -> dict[str, Architecture]:
        """Return a device's architectures by role."""
        student = self.experiment.models.student
        return {
            role: self.architecture(student if role == SHARED_ROLE else card.architecture) for role in self.method.roles
        }

    def initial(self, architecture: str, *labels: str | int) -> dict[str, Tensor]:
        """Return fresh weights drawn from the stream (seed, "initial", labels, architecture)."""
        seed = key(self.experiment.seed, "initial", *labels, architecture)
        return self.architecture(architecture).initial(seed)

    def new_device(self, card: Card) -> DeviceState:
        """Return the state of a device that was never asked before."""
        if not card.gradients:
            return DeviceState(models={})
        who: tuple[str | int, ...] = ("start",) if self.experiment.models.same_start else ("device", card.id)
        return DeviceState(models={r: self._start(a.name, *who, r) for r, a in self.architectures_of(card).items()})

    def _start(self, architecture: str, *who: str | int) -> Mapping[str, Tensor]:
        # Weights are never changed in place, so that all devices with one start share its tensors.
        if who[0] != "start":
            return self.initial(architecture, *who)
        place = (architecture, who[1:])
        if place not in self._starts:
            self._starts[place] = self.initial(architecture, *who)
        return self._starts[place]

    # ---- records ----------------------------------------------------------------------------------------------------
    def private(self, client: int) -> Records:
        """Return the records of one device."""
        return Records(self.silo.pool, self.silo.parts[client])

    @cached_property
    def proxy_all(self) -> Records | None:
        """The whole proxy set."""
        return None if self.proxy_pool is None else records(self.proxy_pool, np.arange(len(self.proxy_pool)))

    @property
    def proxy_identity(self) -> str:
        """Hash of the proxy set, empty where there is none."""
        return "" if self.proxy is None else self.proxy.identity[:32]

    # ---- contracts --------------------------------------------------------------------------------------------------
    def shapes(self, card: Card, samples: int) -> Shapes:
        """Return the sizes that bind the contracts with one device."""
        proxies = 0 if self.proxy is None else len(self.proxy)
        if not card.gradients:
            return Shapes(samples=samples, classes=self.classes, features=None, weights=None, proxies=proxies)
        return Shapes(
            samples=samples,
            classes=self.classes,
            features=self.architecture(card.architecture).features,
            weights=self._template(card.architecture),
            shared=self._template(self.experiment.models.student) if SHARED_ROLE in self.method.roles else None,
            proxies=proxies,
        )

    def _template(self, architecture: str) -> Mapping[str, Tensor]:
        if architecture not in self._templates:
            self._templates[architecture] = self.initial(architecture, "shape")
        return self._templates[architecture]

    def contract_up(self, card: Card, samples: int) -> Contract:
        """What the server accepts from a device."""
        place = (card.architecture, card.gradients, samples)
        if place not in self._contracts_up:
            # Codecs know a contract again by its identity, and need not plan anew for every message.
            if len(self._contracts_up) >= CONTRACTS_KEPT:
                self._contracts_up.clear()
            self._contracts_up[place] = self.method.contract_up(self.shapes(card, samples))
        return self._contracts_up[place]

    def contracts_down(self, card: Card, samples: int) -> tuple[Contract, Contract]:
        """What a device accepts from the server: with knowledge, and without (before anybody has answered)."""
        knowledge = self.method.contract_down(self.shapes(card, samples))
        return self.wrap(knowledge), self.wrap(Contract.of(Nothing, {}))

    def wrap(self, knowledge: Contract) -> Contract:
        """Return the contract of a message down: knowledge, and the proxy indices taught and asked."""
        parts = {"knowledge": knowledge}
        if self.proxy is not None:
            indices = Contract.of(ProxyIndices, {"C": len(self.proxy) + 1})
            parts |= {"teach": indices, "ask": indices}
        return Contract.bundle(parts)

    def widen(self, payload: Payload) -> Payload:
        """Return a decoded payload with its floats in the run's dtype: a codec may carry fewer or more bits."""
        return payload.map(lambda t: t.to(self.dtype) if t.is_floating_point() else t)

    # ---- checks -----------------------------------------------------------------------------------------------------
    def _card(self, client: int) -> Card:
        names = self.experiment.models.devices
        architecture = self.architecture(names[client % len(names)])
        return Card(id=client, architecture=architecture.name, gradients=architecture.gradients)

    def _check(self) -> None:
        method, models = self.method, self.experiment.models
        if self.experiment.data.augment.images and len(self.shape) != 3:
            raise ConfigError(
                f"data.augment moves pixels, but the records have inputs of shape {list(self.shape)}: only noise suits them"
            )
        if self.proxy is not None and self.proxy.shape != self.shape:
            raise ConfigError(
                f"the proxy set has inputs of shape {list(self.proxy.shape)}, the private records {list(self.shape)}: "
                "use a proxy set of the same shape"
            )
        if not self.architecture(models.student).gradients and (method.student or SHARED_ROLE in method.roles):
            raise ConfigError(
                f"models.student {models.student!r} is no torch model, so that the server cannot train it"
            )
        if self.experiment.privacy.kind == "dp_sgd":
            if self.federation.split.train.scaled_at_home:
                raise ConfigError(
                    "privacy.kind dp_sgd bounds what one record adds to a gradient, but the records are scaled by their "
                    "device's own statistics (data.normalise per_client), through which one record moves all: set "
                    "data.normalise=public with data.mean and data.std, or data.normalise=none"
                )
            self._check_dp_sgd()
        for card in self.cards:
            if card.architecture == OWN and len(self.silo.parts[card.id]):
                raise ConfigError(
                    f"device {card.id} has the model {OWN!r}, which is for devices of a real network that only label by a "
                    "model in their data.yaml: name another model here"
                )
            if not card.gradients and not method.predictors:
                raise ConfigError(
                    f"device {card.id} runs {card.architecture!r}, which only answers predict_proba; {method.name} "
                    "needs torch models. Methods for such clients exchange labels: see `fedkd methods`"
                )
            if card.gradients and method.features and self.architecture(card.architecture).features is None:
                raise ConfigError(
                    f"{method.name} reads features, so that model {card.architecture!r} needs attributes `body` and "
                    "`head`"
                )
        self._check_staleness()
        if method.narrows and self.experiment.population.stalest:
            raise ConfigError(
                f"{method.name} asks for other proxy samples in every round, so that late answers are of no use: discard "
                "them (population.staleness.limit=0)"
            )
        method.check({c.architecture: self.architecture(c.architecture) for c in self.cards if c.gradients})
        widths = {self.architecture(c.architecture).features for c in self.cards if c.gradients}
        if method.features and len(widths) > 1:
            raise ConfigError(
                f"{method.name} compares features between devices, so that they need one width; got "
                f"{sorted(map(str, widths))}"
            )
        for where, way, kind in (("up", self.codec_up, method.upload), ("down", self.codec_down, method.download)):
            if kind not in (Nothing, Bundle) and not way.supports(kind):
                raise ConfigError(
                    f"codec.{where} {way.spec!r} has nothing to say about {kind.__name__}, which {method.name} sends "
                    f"{where}: use float32 or float16"
                )
        if self.experiment.models.devices and method.upload is Weights and not all(c.gradients for c in self.cards):
            raise ConfigError(f"{method.name} sends weights, so that every device needs a torch model")

    def _check_dp_sgd(self) -> None:
        from fedkd.privacy.dpsgd import unsupported

        for name in sorted({card.architecture for card in self.cards}):
            architecture = self.architecture(name)
            if not architecture.gradients:
                raise ConfigError(
                    f"{name!r} only answers predict_proba: DP-SGD trains by gradients, so that every device needs a "
                    "torch model"
                )
        models = {a.name: a for card in self.cards for a in self.architectures_of(card).values()}
        for name, architecture in sorted(models.items()):
            reason = unsupported(architecture.build(0))
            if reason is not None:
                raise ConfigError(f"model {name!r} cannot be trained by DP-SGD: {reason}")

    def _check_staleness(self) -> None:
        """Refuse late answers where they belong to other proxy samples than those of the round that would use them."""
        per_round, population = self.experiment.proxy_per_round, self.experiment.population
        if self.proxy is None or population.stalest == 0 or per_round in (None, len(self.proxy)):
            return
        # Two sizes that no model and no data set has both of: a contract that changes with them holds samples.
        few, many = (self.contract_up(self.cards[0], samples).shapes for samples in (3, 7))
        if few != many:
            raise ConfigError(
                f"{self.method.name} answers the proxy samples of its round, and a late answer would belong to others: "
                "take out proxy_per_round, so that every round asks for the whole set, or discard late answers "
                "(population.staleness.limit=0)"
            )
