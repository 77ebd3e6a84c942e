"""A party that only labels: its model was trained elsewhere, and it answers the proxy samples. Needs no torch.

It reads of a request which samples are asked, and answers with class probabilities or their logarithms, as the methods do
that take clients with ``predict_proba``. What the server teaches is left unread, since nothing here learns.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedkd import wire
from fedkd.data import ProxySet
from fedkd.deploy.mail import Ask
from fedkd.deploy.outline import check_words
from fedkd.deploy.policy import NodePolicy
from fedkd.envelope import Envelope, PayloadError, ids_hash
from fedkd.errors import ConfigError, kind_of
from fedkd.labeller import OWN, OnnxPredictor, class_probabilities

log = logging.getLogger("fedkd.deploy.client.device")

BATCH = 256
FLOATS = {"float16": "<f2", "float32": "<f4", "float64": "<f8"}
"""Codecs that this client speaks, and their numbers."""
SIZES = {"f2": 2, "f4": 4, "f8": 8, "u1": 1, "u2": 2, "u4": 4}
ANSWERS: Mapping[str, str] = {"SoftLabels": "labels", "Logits": "logits"}
"""Payloads that this client makes, and the name of their one tensor."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True)


class _Method(_Section):
    name: str


class _Models(_Section):
    devices: tuple[str, ...] = Field(min_length=1)


class _Codec(_Section):
    up: str
    down: str


class _Privacy(_Section):
    kind: str
    seeded: bool = False
    secure_sum: bool = False


class _Population(_Section):
    minimum: int


class _Proxy(_Section):
    size: int
    labelled: bool


class Told(_Section):
    """What this client reads of an experiment; the rest is about training."""

    rounds: int = Field(ge=1)
    classes: int = Field(ge=2, le=1_000_000)
    clients: int
    answer: str
    algorithm: _Method
    models: _Models
    codec: _Codec
    privacy: _Privacy
    population: _Population
    proxy: _Proxy | None = None

    @property
    def method(self) -> _Method:
        """The method, under the name that an experiment has it by."""
        return self.algorithm


def read_told(words: Mapping[str, Any], policy: NodePolicy) -> Told:
    """Read what the server says of its experiment.

    Raises:
        PolicyError: it asks for a method that this node does not take, or says what is not a server's to say.
        ConfigError: it has another form, or asks what a client that only labels cannot do.
    """
    check_words(words)
    policy.check_method(words.get("algorithm"))
    try:
        told = Told.model_validate(words)
    except ValidationError as cause:
        places = ", ".join(sorted({".".join(map(str, e["loc"])) for e in cause.errors()}))
        raise ConfigError(f"the server's words have another form ({places}): run one release of fedkd") from cause
    if told.answer not in ANSWERS or told.proxy is None:
        raise ConfigError(
            f"this client only labels proxy samples, and {told.method.name} awaits {told.answer}: use a method of labels"
        )
    for way, spec in (("up", told.codec.up), ("down", told.codec.down)):
        if spec not in FLOATS:
            raise ConfigError(f"this client without torch speaks {', '.join(FLOATS)}: codec.{way} is {spec!r}")
    if told.privacy.secure_sum or told.privacy.kind not in ("none", "labels", "votes"):
        raise ConfigError("this client only labels: it takes part in neither DP-SGD nor secure sums")
    return told


@dataclass(frozen=True)
class LabelDesk:
    """A run at hand, on a client that only labels."""

    client: int
    told: Told
    proxy: ProxySet
    predictor: Any

    @classmethod
    def open(cls, client: int, told: Told, proxy: ProxySet, predictor: Any) -> LabelDesk:
        """Check that run, proxy set and model belong together.

        Raises:
            ConfigError: they do not.
        """
        assert told.proxy is not None
        named = told.models.devices[client % len(told.models.devices)]
        if named != OWN:
            raise ConfigError(
                f"the experiment gives client {client} the model {named!r}, and this client only labels by its own: put "
                f"{OWN!r} at its place in models.devices"
            )
        if not 0 <= client < told.clients:
            raise ConfigError(f"this is client {client} of a federation of {told.clients}")
        if len(proxy) != told.proxy.size or (proxy.y is not None) != told.proxy.labelled:
            raise ConfigError("the proxy set that came is not the one that the experiment speaks of")
        if isinstance(predictor, OnnxPredictor):
            shape, classes = predictor.shape, predictor.classes
            if shape is not None and math.prod(shape) != math.prod(proxy.shape):
                raise ConfigError(
                    f"the model takes inputs of shape {list(shape)}, the proxy set has {list(proxy.shape)}"
                )
            if classes is not None and classes > told.classes:
                raise ConfigError(f"the model tells {classes} classes apart, the experiment has {told.classes}")
        return cls(client, told, proxy, predictor)

    @property
    def rounds(self) -> int:
        """Rounds of the run."""
        return self.told.rounds

    def respond(self, ask: Ask) -> tuple[bytes | None, str | None]:
        """Label what is asked; returns the message, or why there is none.

        Raises:
            PayloadError: the request breaks its contract.
        """
        head = wire.read_head(ask.request)
        identity = self.proxy.identity[:32]
        if head.envelope.proxy != identity:
            raise PayloadError(
                "proxy", f"the server speaks of proxy set {head.envelope.proxy!r}, this device has {identity!r}"
            )
        asked = _asked(head, self.told.codec.down, len(self.proxy))
        if head.envelope.ids != ids_hash(asked):
            raise PayloadError("ids", "the proxy indices asked for do not match their hash")
        try:
            found = self._label(asked)
        except Exception as cause:
            log.warning("labelling failed in round %d", head.envelope.round, exc_info=cause)
            return None, kind_of(cause)
        kind, spec = self.told.answer, self.told.codec.up
        values = (found if kind == "SoftLabels" else np.log(found)).astype(FLOATS[spec])
        entry = wire.Entry(ANSWERS[kind], f"f{values.itemsize}", values.shape)
        envelope = Envelope(
            run=head.envelope.run, round=head.envelope.round, sender=self.client, proxy=identity, ids=head.envelope.ids
        )
        return wire.write(envelope, wire.write_table(wire.Table(kind, spec, (entry,))), values.tobytes()), None

    def _label(self, asked: NDArray[np.int64]) -> NDArray[np.float64]:
        rows = []
        for at in range(0, len(asked), BATCH):
            x = self.proxy.inputs(asked[at : at + BATCH])
            # As scikit-learn's models take them; an ONNX file may want an image.
            x = x if isinstance(self.predictor, OnnxPredictor) else x.reshape(len(x), -1)
            rows.append(class_probabilities(self.predictor, x, self.told.classes))
        return np.concatenate(rows) if rows else np.zeros((0, self.told.classes))


def _asked(head: wire.Head, spec: str, size: int) -> NDArray[np.int64]:
    """Return the positions in the proxy set that a request asks for; the other tensors are stepped over.

    Raises:
        PayloadError: the request is none, or asks for samples that there are not.
    """
    kind, codec = wire.read_agreement(head.table)
    if (kind, codec, head.delta) != ("Bundle", spec, False):
        raise PayloadError("kind", f"expected a Bundle by {spec}, got {kind[:60]} by {codec[:60]}")
    try:
        table = wire.read_table(head.table, 3)
    except PayloadError as cause:
        if cause.reason != "fields":
            raise
        table = wire.read_table(head.table, 2)  # before anybody has answered, no knowledge comes
    at, found = 0, None
    for entry in table.entries:
        if entry.wire not in SIZES:
            raise PayloadError("dtype", f"{entry.name[:60]!r} has the type {entry.wire[:20]!r}")
        length = math.prod(entry.shape) * SIZES[entry.wire]
        if entry.name == "ask/indices":
            if len(entry.shape) != 1 or not entry.wire.startswith("u") or entry.shape[0] > size:
                raise PayloadError("shape", f"expected at most {size} indices, got {entry.wire} {list(entry.shape)}")
            found = np.frombuffer(head.body[at : at + length], f"<{entry.wire}").astype(np.int64)
        at += length
    if at != len(head.body):
        raise PayloadError("length", f"the body has {len(head.body)} bytes, its header speaks of {at}")
    if found is None:
        raise PayloadError("fields", "the request asks for no samples")
    if len(found) == 0:
        return np.arange(size, dtype=np.int64)
    if found.max() >= size:
        raise PayloadError("label", f"sample {found.max()} of a proxy set of {size}")
    return found
