"""How much work a request is: counted from the device's own plan, so that it does not depend on any machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from fedkd.client import Turn, begin
from fedkd.engines.base import Engine
from fedkd.messages import Request
from fedkd.site import Site
from fedkd.store import Store

if TYPE_CHECKING:
    from fedkd.privacy.record_level import DpSgd

BACKWARD = 2.0
"""A backward pass is two passes: one for the gradient of the inputs, one for that of the weights."""

SLICE = 1024
"""Devices looked at together; bounds the memory of their states."""


def work(site: Site, engine: Engine, store: Store, requests: Sequence[Request]) -> list[float]:
    """Return the floating-point operations of every request's training and answer. Changes nothing on a device.

    A training step costs three forward passes of its records, through all models of the device; an answer costs one of
    the records that it reads. A client without a torch model costs ``virtual.predictor_flops`` per record.
    """
    found: dict[int, float] = {}
    for start in range(0, len(requests), SLICE):
        turns, _ = begin(site, store, requests[start : start + SLICE])
        found |= {turn.request.client: _cost(site, engine, turn) for turn in turns}
    # A device that cannot read its request refuses at once.
    return [found.get(request.client, 0.0) for request in requests]


def _cost(site: Site, engine: Engine, turn: Turn) -> float:
    task = turn.task
    asked = 0 if task.ask is None else len(task.ask)
    if not turn.card.gradients:
        virtual = site.experiment.virtual
        taught = 0 if task.teach is None else len(task.teach)
        return (virtual.predictor_flops if virtual is not None else 0.0) * (len(task.private) + taught + asked)
    forward = sum(a.forward_flops for a in site.architectures_of(turn.card).values())
    records = 0.0
    for phase in site.method.plan(task.heard):
        data = engine.records(phase, task)
        if phase.data == "private" and site.mechanism.trains:
            # DP-SGD draws each step's records by chance, and in secret: their expected number.
            dp = cast("DpSgd", site.mechanism)
            records += (1 + BACKWARD) * dp.steps[phase.settings] * dp.q * len(task.private)
        elif data is not None and len(data):
            records += (1 + BACKWARD) * float(engine.deal(phase, task, len(data)).sizes.sum())
    if len(task.private):
        records += asked + (len(task.private) if site.method.reads_private else 0)
    return forward * records
