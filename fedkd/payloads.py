"""What may travel between a device and the server.

A payload is a frozen set of named tensors. Each field names its dimensions and its range, so that one generic
piece of code can check it, size it, encode it and stack it; no method brings its own transport. Letters: N
proxy samples asked for, S private samples, C classes, D feature width. A dimension that the receiver cannot
know beforehand (S) is free up to the receiver's byte cap.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from fedkd.envelope import WEIGHT_CAP as WEIGHT_CAP
from fedkd.envelope import Envelope as Envelope
from fedkd.envelope import PayloadError as PayloadError
from fedkd.envelope import ids_hash as ids_hash

Range = Literal["simplex", "real", "weight", "label", "flag", "integer"]
"""simplex: >= 0 and sums to 1 over the last axis; real: finite; weight: finite, >= 0; label: integer in [0,
C); flag: 0 or 1; integer: any int64, carried exactly (counters among a model's buffers)."""

REAL_CAP = 1e6
"""Largest magnitude accepted in a ``real`` field: float16 and softmax survive it, and no honest logit or
weight nears it."""


@dataclass(frozen=True)
class Field:
    """Named dimensions and range of one tensor of a payload."""

    dims: tuple[str, ...]
    range: Range = "real"


@dataclass(frozen=True, kw_only=True)
class Payload(ABC):
    """A frozen bundle of tensors that may leave its maker. Subclasses list their ``fields``; all are
    required."""

    fields: ClassVar[Mapping[str, Field]] = {}

    def tensors(self) -> dict[str, Tensor]:
        """Return the flat mapping of field name to tensor, in a fixed order."""
        return {name: getattr(self, name) for name in self.fields}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Payload:
        """Make a payload from the mapping that :meth:`tensors` gives."""
        return cls(**tensors)

    def map(self, function: Any) -> Payload:
        """Apply ``function`` to every tensor and return the payload of the results."""
        return self.from_tensors({name: function(value) for name, value in self.tensors().items()})


@final
@dataclass(frozen=True, kw_only=True)
class Nothing(Payload):
    """An empty message: the method sends nothing in this direction."""


@final
@dataclass(frozen=True, kw_only=True)
class SoftLabels(Payload):
    """Class probabilities for N proxy samples; rows sum to 1."""

    fields: ClassVar[Mapping[str, Field]] = MappingProxyType({"labels": Field(("N", "C"), "simplex")})
    labels: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Logits(Payload):
    """Raw class scores for N proxy samples."""

    fields: ClassVar[Mapping[str, Field]] = MappingProxyType({"logits": Field(("N", "C"))})
    logits: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Votes(Payload):
    """One class index per proxy sample (top-1)."""

    fields: ClassVar[Mapping[str, Field]] = MappingProxyType({"votes": Field(("N",), "label")})
    votes: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class ProxyIndices(Payload):
    """Positions of M samples in the proxy set of P; its contract binds C to P + 1. Empty: the whole set. P alone:
    no sample."""

    fields: ClassVar[Mapping[str, Field]] = MappingProxyType({"indices": Field(("M",), "label")})
    indices: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Chosen(Payload):
    """Which of N proxy samples are meant, as 0 and 1."""

    fields: ClassVar[Mapping[str, Field]] = MappingProxyType({"chosen": Field(("N",), "flag")})
    chosen: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Integers(Payload):
    """M integers that enter a secure sum. They travel behind masks alone, never through a codec."""

    fields: ClassVar[Mapping[str, Field]] = MappingProxyType({"values": Field(("M",), "integer")})
    values: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class LabelLogits(Payload):
    """Mean class scores of the records of each label; ``held`` tells which labels the maker holds (FD)."""

    fields: ClassVar[Mapping[str, Field]] = MappingProxyType(
        {"logits": Field(("C", "C")), "held": Field(("C",), "flag")}
    )
    logits: Tensor
    held: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Prototypes(Payload):
    """Mean feature of each class and its weight: the count of records behind it, 0 where the class is not
    held."""

    fields: ClassVar[Mapping[str, Field]] = MappingProxyType(
        {"means": Field(("C", "D")), "counts": Field(("C",), "weight")}
    )
    means: Tensor
    counts: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class LabelCounts(Payload):
    """How many records of each class the maker holds. Read from the records themselves: never private."""

    fields: ClassVar[Mapping[str, Field]] = MappingProxyType({"counts": Field(("C",), "weight")})
    counts: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Features(Payload):
    """Per-record features, scores and labels of S private records (FedGKT). Bears raw labels: never
    private."""

    fields: ClassVar[Mapping[str, Field]] = MappingProxyType(
        {"features": Field(("S", "D")), "logits": Field(("S", "C")), "labels": Field(("S",), "label")}
    )
    features: Tensor
    logits: Tensor
    labels: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Weights(Payload):
    """Parameters and buffers of one model, by name."""

    values: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.values)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Weights:
        return cls(values=MappingProxyType(dict(tensors)))


@final
@dataclass(frozen=True, kw_only=True)
class Bundle(Payload):
    """Several payloads that travel together, by role, such as weights and a generator (FedGen)."""

    parts: Mapping[str, Payload] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        return {f"{role}/{name}": t for role, part in self.parts.items() for name, t in part.tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Payload:
        raise TypeError("a Bundle is rebuilt from its contract, which knows the kinds of its parts")

    def map(self, function: Any) -> Bundle:
        return Bundle(parts={role: part.map(function) for role, part in self.parts.items()})


KINDS: Mapping[str, type[Payload]] = MappingProxyType(
    {
        kind.__name__: kind
        for kind in (
            Nothing,
            SoftLabels,
            Logits,
            Votes,
            ProxyIndices,
            Chosen,
            LabelLogits,
            Prototypes,
            LabelCounts,
            Features,
            Weights,
            Bundle,
        )
    }
)


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What a receiver accepts: kind, exact shapes and ranges of every tensor.

    ``shapes`` maps a tensor's name to its shape, where ``None`` stands for a free dimension (see the module
    text).
    """

    kind: type[Payload]
    shapes: Mapping[str, tuple[int | None, ...]]
    ranges: Mapping[str, Range]
    classes: int
    parts: Mapping[str, Contract] = field(default_factory=dict)
    max_elements: int = 200_000_000

    @staticmethod
    def of(kind: type[Payload], dims: Mapping[str, int], weights: Mapping[str, Tensor] | None = None) -> Contract:
        """Bind the named dimensions of ``kind``; ``weights`` gives the shapes of a :class:`Weights` payload.

        Args:
            dims: sizes of the known letters, such as ``{"N": 1000, "C": 10}``; unknown letters stay free.
            weights: example tensors of the model expected (only their shapes and dtypes are used).
        Raises:
            TypeError: for ``Weights`` without ``weights`` and for ``Bundle`` (use :meth:`bundle`).
        """
        if kind is Bundle:
            raise TypeError("use Contract.bundle for a Bundle")
        if kind is Weights:
            if weights is None:
                raise TypeError("a contract for Weights needs the shapes of the model's tensors")
            shapes: dict[str, tuple[int | None, ...]] = {name: tuple(t.shape) for name, t in weights.items()}
            ranges: dict[str, Range] = {name: range_of(t) for name, t in weights.items()}
        else:
            shapes = {name: tuple(dims.get(d) for d in f.dims) for name, f in kind.fields.items()}
            ranges = {name: f.range for name, f in kind.fields.items()}
        return Contract(kind=kind, shapes=shapes, ranges=ranges, classes=dims.get("C", 0))

    @staticmethod
    def bundle(parts: Mapping[str, Contract]) -> Contract:
        """Contract of a :class:`Bundle` whose parts keep the contracts given."""
        shapes = {f"{role}/{name}": shape for role, part in parts.items() for name, shape in part.shapes.items()}
        ranges = {f"{role}/{name}": r for role, part in parts.items() for name, r in part.ranges.items()}
        classes = max((part.classes for part in parts.values()), default=0)
        return Contract(kind=Bundle, shapes=shapes, ranges=ranges, classes=classes, parts=dict(parts))

    @staticmethod
    def like(payload: Payload, classes: int = 0) -> Contract:
        """Return the contract that accepts exactly the names, shapes and ranges of ``payload``.

        Args:
            classes: bound of its labels; 0 takes C from the payload, or the largest label + 1 where C does
                not occur.
        """
        if isinstance(payload, Bundle):
            return Contract.bundle({role: Contract.like(part, classes) for role, part in payload.parts.items()})
        tensors = payload.tensors()
        if isinstance(payload, Weights):
            return Contract.of(Weights, {"C": classes}, weights=tensors)
        dims = {d: s for n, f in payload.fields.items() for d, s in zip(f.dims, tensors[n].shape, strict=True)}
        if classes or "C" not in dims:
            labels = [int(tensors[n].max()) + 1 for n, f in payload.fields.items() if _has_labels(f, tensors[n])]
            dims["C"] = classes or max(labels, default=0)
        return Contract.of(type(payload), dims)

    def build(self, tensors: Mapping[str, Tensor]) -> Payload:
        """Make the payload of this contract from checked tensors."""
        if self.kind is not Bundle:
            return self.kind.from_tensors(tensors)
        return Bundle(
            parts={
                role: part.build({name: tensors[f"{role}/{name}"] for name in part.shapes})
                for role, part in self.parts.items()
            }
        )

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check names and shapes claimed by a header, before any memory is reserved for them.

        Raises:
            PayloadError: naming the field, what was expected and what came.
        """
        if shapes.keys() != self.shapes.keys():
            missing, extra = (
                _list(self.shapes.keys() - shapes.keys()),
                _list(shapes.keys() - self.shapes.keys()),
            )
            raise PayloadError("fields", f"tensors missing: {missing}; tensors that nobody asked for: {extra}")
        total = 0
        for name, shape in shapes.items():
            want = self.shapes[name]
            if want != shape and (
                len(want) != len(shape) or any(w is not None and w != s for w, s in zip(want, shape, strict=True))
            ):
                raise PayloadError("shape", f"{name}: expected shape {_show(want)}, got {_show(shape)}")
            if min(shape, default=0) < 0:
                raise PayloadError("shape", f"{name}: expected sizes of at least 0, got {_show(shape)}")
            total += math.prod(shape)
            if total > self.max_elements:
                raise PayloadError("size", f"{name}: {total} elements so far, at most {self.max_elements} accepted")

    def check_values(self, payload: Payload) -> Payload:
        """Check every value against its range and return the payload with simplex rows renormalised.

        Raises:
            PayloadError: ``reason`` is one of ``kind``, ``fields``, ``finite``, ``range``, ``simplex``,
                ``label``.
        """
        return self._check_values(payload, "")

    def _check_values(self, payload: Payload, role: str) -> Payload:
        if type(payload) is not self.kind:
            raise PayloadError("kind", f"expected {self.kind.__name__}, got {type(payload).__name__}")
        if isinstance(payload, Bundle):
            # Part by part, because each part has its own number of classes.
            if payload.parts.keys() != self.parts.keys():
                raise PayloadError("fields", f"expected the parts {_list(self.parts)}, got {_list(payload.parts)}")
            parts = {r: self.parts[r]._check_values(part, f"{role}{r}/") for r, part in payload.parts.items()}
            return Bundle(parts=parts)
        tensors = payload.tensors()
        if tensors.keys() != self.ranges.keys():
            raise PayloadError("fields", f"expected the tensors {_list(self.ranges)}, got {_list(tensors)}")
        return self.build({n: _check(role + n, t, self.ranges[n], self.classes) for n, t in tensors.items()})


def range_of(value: Tensor) -> Range:
    """Return the range of a model's tensor by its dtype: parameters are ``real``, counters ``integer``."""
    if value.is_floating_point():
        return "real"
    return "flag" if value.dtype == torch.bool else "integer"


def _has_labels(spec: Field, value: Tensor) -> bool:
    return spec.range == "label" and value.numel() > 0


def _list(names: Iterable[str]) -> str:
    # Names may come from a stranger: quoted, few and short, so that a log line stays one line.
    ordered = sorted(names)
    return (", ".join(repr(n[:60]) for n in ordered[:5]) + (", ..." if len(ordered) > 5 else "")) or "none"


def _show(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("?" if s is None else str(s) for s in shape) + "]"


def _check(name: str, value: Tensor, kind: Range, classes: int) -> Tensor:
    if value.is_floating_point():
        # One pass over the data serves finiteness and magnitude: the extremes are NaN or infinite if any
        # value is.
        low, high = (0.0, 0.0) if value.numel() == 0 else (t.item() for t in torch.aminmax(value))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise PayloadError("finite", f"{name}: NaN or infinity, expected finite numbers")
        cap = WEIGHT_CAP if kind == "weight" else REAL_CAP
        if max(-low, high) > cap:
            raise PayloadError("range", f"{name}: magnitude {max(-low, high):.3g}, at most {cap:.0e} is accepted")
    else:
        low, high = (0, 0) if value.numel() == 0 else (int(t) for t in torch.aminmax(value))
    if kind in ("weight", "simplex", "flag", "label") and low < 0:
        raise PayloadError("range", f"{name}: {low:.4g} is negative, expected values of at least 0")
    if kind == "weight" and high > WEIGHT_CAP:
        raise PayloadError("range", f"{name}: {high:.3g} is over the cap of {WEIGHT_CAP:.0e} for a count")
    if kind == "label" and (value.is_floating_point() or (value.numel() and high >= classes)):
        raise PayloadError("label", f"{name}: expected integers below {classes}, got {value.dtype} up to {high}")
    if kind == "flag" and bool(((value != 0) & (value != 1)).any()):
        raise PayloadError("range", f"{name}: expected only 0 and 1")
    if kind == "simplex" and value.numel():
        value = value if value.is_floating_point() else value.float()
        total = value.sum(dim=-1, keepdim=True)
        least, most = (t.item() for t in torch.aminmax(total))
        worst = max(1 - least, most - 1)
        if worst > 1e-3 * max(1.0, math.sqrt(value.shape[-1] / 10)):
            raise PayloadError("simplex", f"{name}: rows sum to 1 within {worst:.3g}, expected within 0.001")
        # Rows that are normalised to the round-off of a float32 softmax stay bit for bit: decoding is then
        # idempotent, so both ends of a delta hold the same reference, and exact codecs are exact.
        exact = 16 * torch.finfo(torch.float32).eps * math.sqrt(value.shape[-1])
        return value if worst <= exact else value / total
    return value


def payload_equal(a: Payload, b: Payload) -> bool:
    """Tell whether two payloads are of one kind with equal tensors."""
    left, right = a.tensors(), b.tensors()
    return type(a) is type(b) and left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def outline(payload: Payload) -> dict[str, Any]:
    """Return the kinds of a payload as plain data, from which :func:`rebuild` makes it again from its tensors."""
    if isinstance(payload, Bundle):
        return {"kind": "Bundle", "parts": {role: outline(part) for role, part in payload.parts.items()}}
    return {"kind": type(payload).__name__}


def rebuild(kinds: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Payload:
    """Make the payload that :func:`outline` described from its flat tensors.

    Raises:
        PayloadError: an unknown kind.
    """
    if kinds.get("kind") not in KINDS:
        raise PayloadError("kind", f"no payload is called {kinds.get('kind')!r}")
    if kinds["kind"] != "Bundle":
        return KINDS[kinds["kind"]].from_tensors(tensors)
    parts = {}
    for role, part in kinds["parts"].items():
        mine = {n[len(role) + 1 :]: t for n, t in tensors.items() if n.startswith(f"{role}/")}
        parts[role] = rebuild(part, mine)
    return Bundle(parts=parts)
