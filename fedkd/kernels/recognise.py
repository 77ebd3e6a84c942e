"""Tells which loss a method's Python function computes, by watching it at work on two records.

The function runs once on tensors that write down what is done to them. Where the note is, operation for operation, that
of a loss the kernels know, they may take its place; any other loss is called as the function that it is. Nothing is
guessed from names: a loss that looks at values, draws random numbers, changes tensors in place or reads weights is
never recognised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedkd.algorithms.base import Batch, Heard, Loss
from fedkd.losses import absolute_error, cross_entropy, soft_cross_entropy
from fedkd.nets import Net
from fedkd.payloads import outline, rebuild

LABELS, SOFT, ABSOLUTE = range(3)
_HARMLESS = {"__get__", "size", "dim", "ndimension", "numel", "is_floating_point", "__len__", "stride", "element_size"}


@dataclass(frozen=True)
class Known:
    """A loss that the kernels know. ``table`` names the tensor of the knowledge [N, C] that holds the teacher's rows."""

    kind: int
    table: str | None = None


class _Leak(Exception):
    """The function did something that a note of operations cannot tell."""


class _Noted(Tensor):
    """A tensor that knows how it was made."""

    note: Any

    @classmethod
    def of(cls, value: Tensor, note: Any) -> _Noted:
        made: _Noted = torch.Tensor._make_subclass(cls, value)
        made.note = note
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        inside = {**(kwargs or {})}
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*_bare(args), **_bare(inside))
        if name in _HARMLESS and not isinstance(out, Tensor):
            return out
        changes = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i") or name == "__setitem__"
        if changes or "out" in inside or not isinstance(out, Tensor):
            raise _Leak(name)
        return cls.of(out, (name, _written(args), _written(inside)))


def _bare(value: Any) -> Any:
    if isinstance(value, _Noted):
        return value.as_subclass(Tensor)
    if isinstance(value, tuple | list):
        return type(value)(_bare(v) for v in value)
    return {k: _bare(v) for k, v in value.items()} if isinstance(value, dict) else value


def _written(value: Any) -> Any:
    if isinstance(value, _Noted):
        return value.note
    if isinstance(value, Tensor):
        # A tensor from elsewhere equals nothing but itself.
        return ("tensor", id(value))
    if isinstance(value, tuple | list):
        return tuple(_written(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, _written(v)) for k, v in value.items()))
    return (type(value).__name__, repr(value))


class _NotedNet(Net):
    """Answers with logits that are noted as the net's own."""

    def __init__(self, logits: Tensor, x: Tensor, role: str = "model") -> None:
        super().__init__({}, {}, role)
        self._logits, self._x = logits, x

    def __getitem__(self, role: str) -> Net:
        return _NotedNet(self._logits, self._x, role)

    def mode(self, *, training: bool) -> None:
        raise _Leak("mode")

    @property
    def weights(self) -> dict[str, Tensor]:
        raise _Leak("weights")

    @property
    def parameters(self) -> dict[str, Tensor]:
        raise _Leak("parameters")

    def _module(self) -> nn.Module:
        raise _Leak("layers")

    def _call(self, method: str, batch: Batch | Tensor, whole: bool = False) -> Tensor:
        x = batch.x if isinstance(batch, Batch) else batch
        if method != "forward" or x is not self._x:
            raise _Leak(method)
        return _Noted.of(self._logits, ("net", self._role))


def recognise(
    loss: Loss, heard: Heard, shape: tuple[int, ...], classes: int, dtype: torch.dtype, *, labels: bool
) -> Known | None:
    """Return the loss that ``loss`` computes of ``net(batch)``, or None if it is none that the kernels know.

    Args:
        heard: what the devices hear; only kinds and shapes of it matter.
        shape: of one record. ``labels``: whether the records have any.
    """
    logits = torch.linspace(-1, 1, 2 * classes, dtype=dtype).view(2, classes)
    integers = torch.zeros(2, dtype=torch.int64)

    def run(function: Callable[[Net, Batch, Heard], Tensor]) -> Any:
        batch = Batch(
            x=_Noted.of(torch.zeros(2, *shape, dtype=dtype), "x"),
            y=_Noted.of(integers, "y") if labels else None,
            index=_Noted.of(integers, "index"),
            weight=_Noted.of(torch.full((2,), 0.5, dtype=dtype), "weight"),
        )
        told = rebuild(
            outline(heard.knowledge), {n: _Noted.of(t, ("told", n)) for n, t in heard.knowledge.tensors().items()}
        )
        memory = {n: _Noted.of(t, ("kept", n)) for n, t in heard.memory.items()}
        teach = _Noted.of(heard.teach, "teach")
        known = Heard(knowledge=told, memory=memory, round=heard.round, teach=teach)
        found = function(_NotedNet(logits, batch.x), batch, known)
        if not isinstance(found, _Noted):
            raise _Leak("a loss that does not hang on the net")
        return found.note

    with torch.no_grad():
        try:
            note = run(loss)
        except Exception:  # the function may do what it likes with these tensors; it is only not recognised
            return None
        if labels and note == run(lambda net, batch, told: batch.mean(cross_entropy(net(batch), batch.labels))):
            return Known(LABELS)
        for name, table in heard.knowledge.tensors().items():
            if table.dim() != 2 or not len(table) or table.shape[1] != classes or table.dtype != dtype:
                continue
            for kind, known in ((SOFT, soft_cross_entropy), (ABSOLUTE, absolute_error)):
                wanted = run(
                    lambda net, batch, told, known=known, name=name: batch.mean(  # type: ignore[misc]
                        known(net(batch), told.knowledge.tensors()[name][batch.index])
                    )
                )
                if note == wanted:
                    return Known(kind, name)
    return None
