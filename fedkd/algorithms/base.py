"""The seam: what a method supplies, and what the library gives it.

A method is one file with one frozen dataclass. It supplies losses, an answer and an aggregation; the library owns the
round loop, the training loop, privacy, bytes and transport. Losses and ``answer`` are pure functions of tensors, so the
same file is looped by the serial engine, stacked by the batched engine and sent out by Flower.

Letters in shapes: K clients, N proxy samples, S private samples, B batch, C classes, D feature width.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.payloads import Contract, Nothing, Payload, Weights

if TYPE_CHECKING:
    from fedkd.models import Architecture
    from fedkd.nets import Net

Tensors = Mapping[str, Tensor]
Loss = Callable[["Net", "Batch", "Heard"], Tensor]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Records of one training step, or of one forward pass.

    Attributes:
        x: inputs [B, ...].
        y: labels [B] (int64), or None where there are none.
        index: position [B] of each record in the device's own records, or in the list of proxy samples that the
            knowledge of this round belongs to: ``heard.knowledge.labels[batch.index]`` are the batch's teacher labels.
        weight: [B], sums to 1; 0 marks padding. Take means with :meth:`mean`, never with ``Tensor.mean``: a stacked
            batch is padded to the largest device's size.
    """

    x: Tensor
    y: Tensor | None
    index: Tensor
    weight: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over real records of per-record ``values`` [B]."""
        return (values * self.weight).sum()

    @property
    def labels(self) -> Tensor:
        """Labels [B]; raises TypeError where the records have none."""
        if self.y is None:
            raise TypeError("these records have no labels")
        return self.y


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What a device knows when it works.

    ``knowledge``: the server's message; ``teach`` [N]: the positions in the proxy set that it belongs to; ``memory``: the
    device's own; ``round``: the round's number.
    """

    knowledge: Payload
    memory: Tensors
    round: int
    teach: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))


@dataclass(frozen=True, kw_only=True)
class View:
    """What a device may look at to make its answer: all its records (padded) and the proxy samples asked for [N, ...].

    ``private`` is None for a proxy-only answer, so that nobody pays for data that the answer does not read.
    """

    private: Batch | None
    public: Tensor | None
    classes: int


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of training on a device.

    ``data``: ``private``, the device's own records; ``public``, the proxy samples that the knowledge belongs to;
    ``proxy``, the whole proxy set (with labels, if the experiment says that it has them).
    ``settings`` names the section of the experiment that gives epochs, batch size and optimiser.
    """

    name: str
    data: Literal["private", "public", "proxy"]
    loss: Loss
    settings: Literal["training", "digest", "pretrain"]
    trains: tuple[str, ...] = ("model",)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the server knows of a device. ``gradients`` is False for a client that only answers ``predict_proba``."""

    id: int
    architecture: str
    gradients: bool = True


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """Everything a device keeps between rounds: models by role, optimiser state, and the method's own memory."""

    models: Mapping[str, Tensors]
    optimizers: Mapping[str, Tensors] = field(default_factory=dict)
    memory: Tensors = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """Everything the server keeps between rounds.

    ``models`` maps a role to (architecture, tensors); the role ``student`` is what a run delivers. ``knowledge`` is the
    last aggregate, ``asked`` the proxy indices it belongs to, ``memory`` the method's own tensors.
    """

    round: int
    models: Mapping[str, tuple[str, Tensors]]
    knowledge: Payload
    asked: np.ndarray
    memory: Tensors = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One device's decoded and checked answer.

    ``examples``: its count of training records (1 if that is private). ``weight``: how much it counts beside that: 1
    for an answer to this round's request, less for one to an older request.
    """

    card: Card
    payload: Payload
    examples: float
    weight: float = 1.0


class Answers(Protocol):
    """The round's answers in the order of client ids. They are decoded as they are walked; walk them again if need be."""

    def __iter__(self) -> Iterator[Answer]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes that bind a contract: N proxy samples asked or taught, C classes, D feature width, and model tensors.

    ``weights`` are those of the device's own architecture, ``shared`` those of the role ``shared``, where there is one.
    ``proxies`` is the size of the whole proxy set.
    """

    samples: int
    classes: int
    features: int | None
    weights: Tensors | None
    shared: Tensors | None = None
    proxies: int = 0

    @property
    def dims(self) -> dict[str, int]:
        """The known letters."""
        known = {"N": self.samples, "C": self.classes}
        return known if self.features is None else {**known, "D": self.features}


class ServerTools(Protocol):
    """What the library does for a method on the server: build, train and evaluate models on proxy samples.

    ``drawn``: the proxy samples drawn for this round; ``asked``: those of them that devices answered (see
    :meth:`Algorithm.ask`). ``heard``: the devices that this round's message surely reached, those without an answer
    among them. ``devices`` and ``proxies``: how many devices and proxy samples there are. ``shape`` and ``bounds``: of one
    input, and of its values as far as they are public; None where they are not. ``scratch``: a folder for what long work on
    ``given`` leaves behind, which outlives an interruption of this round; None where nothing is kept.
    """

    asked: np.ndarray
    drawn: np.ndarray
    heard: Sequence[int]
    classes: int
    devices: int
    proxies: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    bounds: tuple[float, float] | None

    def seed(self, *labels: str | int) -> int: ...
    def scratch(self, label: str, *given: Tensors) -> Path | None: ...
    def initial(self, architecture: str, *labels: str | int) -> Tensors: ...
    def public(self, indices: np.ndarray) -> Tensor: ...
    def labels(self, indices: np.ndarray) -> Tensor: ...
    def trainable(self, architecture: str) -> tuple[str, ...]: ...
    def net(self, architecture: str, weights: Tensors, *, training: bool = False) -> Net: ...
    def module(self, architecture: str, weights: Tensors) -> nn.Module: ...
    def logits(self, models: Sequence[tuple[str, Tensors]], indices: np.ndarray) -> Iterator[Tensor]: ...
    def train(
        self,
        architecture: str,
        weights: Tensors,
        loss: Callable[[Net, Batch], Tensor],
        indices: np.ndarray,
        *,
        label: str = "student",
    ) -> Tensors: ...


class DeviceTools(Protocol):
    """What the library does for a method on a device, outside the losses. ``proxies``: the size of the proxy set."""

    @property
    def proxies(self) -> int: ...
    @property
    def classes(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def seed(self, *labels: str | int) -> int: ...
    def initial(self, *labels: str | int) -> Tensors: ...


@dataclass(frozen=True, kw_only=True)
class Algorithm(ABC):
    """A federated method. Subclasses are frozen, keyword-only dataclasses whose fields are the method's own parameters.

    Class variables declare what travels and what the method needs, and are checked when an experiment is read:

    * ``upload`` / ``download``: the payload that leaves a device / the server.
    * ``proxy``: ``none``, ``unlabelled`` or ``labelled``: what proxy set the method needs.
    * ``heterogeneous``: devices may run different architectures. ``predictors``: a device may be any object with
      ``predict_proba`` instead of a torch model.
    * ``roles``: the models that a device holds. ``keeps``: those that survive on the device from round to round; a
      method whose devices start each round from the server's weights keeps none, and costs no device memory.
    * ``student``: the server ends with a model of its own. ``pools_data``: a simulation-only baseline that breaks the
      privacy of data on purpose (``central``).
    * ``reads_private``: the answer looks at the private records again.
    * ``weighted``: answers are weighted by the count of training records, so that this count leaves the device.
    * ``weighs``: ``aggregate`` counts every answer by :attr:`Answer.weight`, so that late answers can count for less.
    * ``features``: models must split into ``body`` and ``head``. ``stackable``: False for a method whose answer has
      shapes that depend on values or on the count of records, so that answers are made device by device (training is
      stacked all the same). ``codecs``: the method's own codecs (up, down).
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    upload: ClassVar[type[Payload]] = Nothing
    download: ClassVar[type[Payload]] = Nothing
    proxy: ClassVar[Literal["none", "unlabelled", "labelled"]] = "none"
    heterogeneous: ClassVar[bool] = True
    predictors: ClassVar[bool] = False
    features: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ("model",)
    keeps: ClassVar[tuple[str, ...]] = ("model",)
    student: ClassVar[bool] = False
    pools_data: ClassVar[bool] = False
    reads_private: ClassVar[bool] = False
    weighted: ClassVar[bool] = False
    weighs: ClassVar[bool] = False
    stackable: ClassVar[bool] = True
    codecs: ClassVar[tuple[str, str]] = ("auto", "auto")

    def check(self, architectures: Mapping[str, Architecture]) -> None:
        """Refuse device models that lack what the method needs, before anything is trained.

        Raises:
            ConfigError: naming the model and what it lacks.
        """
        return None

    def needs_each(self) -> str | None:
        """Return why the server must see each answer by itself; None if the plain mean of the answers is all it needs."""
        return f"{self.name} does more with answers than take their mean"

    @property
    def narrows(self) -> bool:
        """Tell whether the method asks for other proxy samples than those drawn (see :meth:`ask`)."""
        return type(self).ask is not Algorithm.ask

    # ---- server -> device -------------------------------------------------------------------------------------------
    def begin(self, server: ServerState, tools: ServerTools) -> ServerState:
        """Prepare the server before round 0."""
        return server

    def ask(self, server: ServerState, drawn: np.ndarray) -> np.ndarray:
        """Return which of the proxy samples ``drawn`` for this round devices are to answer: by default all, in order.

        A method that asks for fewer than were drawn cannot use answers to older requests.
        """
        return drawn

    def audience(self, card: Card, server: ServerState) -> Hashable:
        """Devices of equal audience hear the same message, encoded once."""
        return None

    def broadcast(self, server: ServerState, card: Card) -> Payload:
        """Return what the server tells the audience that ``card`` belongs to."""
        return server.knowledge

    def contract_down(self, shapes: Shapes) -> Contract:
        """Return what a device accepts; ``Nothing`` is accepted besides."""
        return Contract.of(self.download, shapes.dims, shapes.weights)

    def contract_up(self, shapes: Shapes) -> Contract:
        """Return what the server accepts; ``Nothing`` (abstention) is accepted besides."""
        return Contract.of(self.upload, shapes.dims, shapes.weights)

    # ---- device -----------------------------------------------------------------------------------------------------
    def start(self, state: DeviceState, heard: Heard, tools: DeviceTools) -> DeviceState:
        """Prepare a device's state before it works, such as by loading the server's weights."""
        return state

    def plan(self, heard: Heard) -> tuple[Phase, ...]:
        """Return the training phases of a device: by default digest what was heard, then train on own records."""
        phases = [Phase(name="train", data="private", loss=self.private_loss, settings="training")]
        if type(self).public_loss is not Algorithm.public_loss and not isinstance(heard.knowledge, Nothing):
            phases.insert(0, Phase(name="digest", data="public", loss=self.public_loss, settings="digest"))
        return tuple(phases)

    def private_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        """Return the scalar loss on a batch of the device's own records: by default the mean cross-entropy."""
        from fedkd.losses import cross_entropy

        return batch.mean(cross_entropy(net(batch), batch.labels))

    def predict(self, net: Net, x: Tensor, memory: Tensors) -> Tensor:
        """Return the class scores [B, C] by which a device decides on inputs ``x``: by default its model's logits."""
        return net(x)

    def public_loss(self, net: Net, batch: Batch, heard: Heard) -> Tensor:
        """Return the scalar loss on a batch of proxy samples, given the teacher's knowledge of them."""
        raise NotImplementedError

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        """Return what the device sends up. Pure, with shapes that do not depend on values."""
        return Nothing()

    def finish(self, state: DeviceState, answer: Payload, heard: Heard) -> DeviceState:
        """Update the device's memory after its answer was made."""
        return state

    # ---- server -----------------------------------------------------------------------------------------------------
    def catch_up(self, answer: Answer, heard: Payload, server: ServerState, tools: ServerTools) -> Answer:
        """Fit an answer to an older request, whose device ``heard`` that, into the present: by default as it is.

        ``answer.weight`` is what its staleness makes it worth. A method may change it together with the payload.
        """
        return answer

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        """Turn the answers of a round (at least one) into knowledge."""
        return Nothing()

    def server_loss(self, net: Net, batch: Batch, knowledge: Payload) -> Tensor:
        """Return the scalar loss that teaches the student on a batch of the proxy samples asked for."""
        raise NotImplementedError

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        """Teach the student: by default train it with :meth:`server_loss`, if the method has one."""
        if type(self).server_loss is Algorithm.server_loss:
            return server
        architecture, weights = server.models["student"]
        taught = tools.train(
            architecture, weights, lambda net, batch: self.server_loss(net, batch, knowledge), tools.asked
        )
        return with_model(server, "student", architecture, taught)


def with_model(server: ServerState, role: str, architecture: str, weights: Tensors) -> ServerState:
    """Return ``server`` with one model replaced."""
    return replace(server, models={**server.models, role: (architecture, weights)})


def adopt(state: DeviceState, heard: Heard, role: str = "model") -> DeviceState:
    """Return ``state`` with the server's weights as the model of ``role`` (FedAvg's first step)."""
    if not isinstance(heard.knowledge, Weights):
        return state
    return replace(state, models={**state.models, role: heard.knowledge.values})
