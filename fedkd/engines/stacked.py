"""The stacked engine: devices of one architecture train as one batch of models.

The forward pass runs under ``torch.func.vmap`` over the stacked weights [K, ...], so that a method's loss is written for
one device; one ordinary backward pass serves all, because the devices' losses add up and share no weight. Devices are
sorted by their number of steps, so that those with work left are always a prefix of the stack.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from fedkd.algorithms.base import Batch, Card, DeviceState, Heard, Phase, View
from fedkd.engines.base import Engine, SerialEngine, Task, flat, nested, padded, set_mode, split_trainable
from fedkd.layers import situation
from fedkd.nets import Net
from fedkd.payloads import Payload, outline, rebuild
from fedkd.records import Records
from fedkd.site import Site
from fedkd.training import Optimizer, rates

ANSWER_BUDGET_ELEMENTS = 30_000_000
"""Numbers that the padded private records of one stack may take when an answer reads them."""


class Fallback(UserWarning):
    """A model or method that cannot be stacked, and is looped instead."""


class StackedEngine(Engine):
    """Many devices at once, grouped by architecture and by what they heard."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._serial = SerialEngine(site)
        self._refused: set[Hashable] = set()

    # ---- training ---------------------------------------------------------------------------------------------------
    def train(self, phase: Phase, tasks: Sequence[Task]) -> None:
        for block in self._blocks(phase.name, tasks):
            self._guard(phase.name, block, lambda b: self._train(phase, b), lambda b: self._serial.train(phase, b))

    def _train(self, phase: Phase, tasks: list[Task]) -> None:
        settings = self.settings(phase)
        work = []
        for task in tasks:
            data = self.records(phase, task)
            if data is not None and len(data):
                work.append((task, data, self.deal(phase, task, len(data))))
        work = [w for w in work if w[2].steps]
        if not work:
            return
        work.sort(key=lambda w: -w[2].steps)
        tasks, datas, plans = [w[0] for w in work], [w[1] for w in work], [w[2] for w in work]
        count, steps = len(tasks), plans[0].steps
        width = max(plan.index.shape[1] for plan in plans)
        length = np.array([plan.steps for plan in plans])
        sizes = np.zeros((count, steps), np.int64)
        positions = np.zeros((count, steps, width), np.int64)
        rate = np.zeros((count, steps))
        for k, plan in enumerate(plans):
            sizes[k, : plan.steps] = plan.sizes
            positions[k, : plan.steps, : plan.index.shape[1]] = plan.index
            rate[k, : plan.steps] = rates(settings, plan.steps, tasks[k].heard.round)

        architectures = self.site.architectures_of(tasks[0].card)
        stacked = _stack([flat(task.state.models, list(task.state.models)) for task in tasks])
        params, rest = split_trainable(stacked, architectures, phase.trains)
        optimizer = Optimizer(settings.optimizer)
        stored = [task.state.optimizers.get(phase.name) for task in tasks]
        fresh = optimizer.initial({k: v[0] for k, v in params.items()})
        state = _stack([dict(s) if s is not None else fresh for s in stored])
        streams = [self.dropout_stream(phase, task) for task in tasks]
        gather = _Gather(datas, positions, shared=phase.data != "private")
        augment = self.augmenter(phase, tasks)
        heard, shared_heard = _hear(tasks)
        total = torch.zeros(count, dtype=self.site.dtype)

        set_mode(architectures, True)
        for t in range(steps):
            active = int(np.searchsorted(-length, -t, side="left"))
            size = sizes[:active, t]
            wide, ragged = int(size.max()), bool((size != size.max()).any())
            batch, batched = gather(t, active, wide)
            if augment is not None:
                batched["x"] = augment(t, batched["x"], size.tolist())
            if ragged:
                mask = torch.from_numpy(np.arange(wide) < size[:, None])
                batched["mask"] = mask
                batched["weight"] = mask.to(self.site.dtype) / torch.from_numpy(size).to(self.site.dtype)[:, None]
            else:
                batch["weight"] = torch.full((wide,), 1 / wide, dtype=self.site.dtype)
            sizes_now = size.tolist()
            live = {k: v[:active].detach().requires_grad_(True) for k, v in params.items()}
            still = {k: v[:active] for k, v in rest.items()}

            def loss(
                live: dict[str, Tensor], still: dict[str, Tensor], own: dict[str, Any], told: dict[str, Any],
                batch: dict[str, Tensor] = batch, sizes: list[int] = sizes_now,
            ) -> Tensor:  # fmt: skip
                given = {**batch, **own}
                mask = given.pop("mask", None)
                made = Batch(x=given["x"], y=given.get("y"), index=given["index"], weight=given["weight"])
                net = Net(architectures, nested({**live, **still}))
                anchor = next(iter(live.values())).detach()
                with situation(mask=mask, generators=streams, sizes=sizes, anchor=anchor):
                    return phase.loss(net, made, shared_heard(told))

            told = {k: v[:active] for k, v in heard.items()}
            values = vmap(loss)(live, still, batched, told) if told else vmap(_without(loss))(live, still, batched)
            grads = torch.autograd.grad(values.sum(), list(live.values()), materialize_grads=True)
            with torch.no_grad():
                same = (rate[:active, t] == rate[0, t]).all()
                step_rate = float(rate[0, t]) if same else torch.from_numpy(rate[:active, t]).to(self.site.dtype)
                optimizer.step(
                    {k: v[:active] for k, v in params.items()},
                    grads,
                    {k: v[:active] for k, v in state.items()},
                    step_rate,
                )
                total[:active] += values.detach()

        final = {**params, **rest}
        for k, task in enumerate(tasks):
            optimizers = dict(task.state.optimizers)
            if settings.optimizer.persist:
                optimizers[phase.name] = {name: v[k].clone() for name, v in state.items()}
            models = nested({name: v[k].clone() for name, v in final.items()})
            task.state = replace(task.state, models=models, optimizers=optimizers)
            task.losses[phase.name] = float(total[k] / length[k])

    # ---- answers ----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def answer(self, tasks: Sequence[Task]) -> list[Payload]:
        found: dict[int, Payload] = {}
        for block in self._blocks("answer", tasks):
            made = self._guard("answer", block, self._answer, self._serial.answer)
            for task, payload in zip(block, made, strict=True):
                found[id(task)] = payload
        return [found[id(task)] for task in tasks]

    def _answer(self, tasks: list[Task]) -> list[Payload]:
        if self.method.reads_private:
            largest = max(len(task.private) for task in tasks)
            per_device = max(1, largest * int(np.prod(self.site.shape)))
            room = max(1, ANSWER_BUDGET_ELEMENTS // per_device)
            if len(tasks) > room:
                return [p for i in range(0, len(tasks), room) for p in self._answer(tasks[i : i + room])]
        architectures = self.site.architectures_of(tasks[0].card)
        stacked = _stack([flat(task.state.models, list(task.state.models)) for task in tasks])
        own: dict[str, Any] = {}
        if self.method.reads_private:
            sizes = np.array([len(task.private) for task in tasks])
            width = int(sizes.max())
            datas = [task.private for task in tasks]
            gather = _Gather(datas, padded([np.arange(n) for n in sizes], width)[:, None, :], shared=False)
            _, own = gather(0, len(tasks), width)
            mask = torch.from_numpy(np.arange(width) < sizes[:, None]).to(self.site.dtype)
            own["weight"] = mask / mask.sum(1, keepdim=True).clamp(min=1)
        public = None if tasks[0].ask is None else tasks[0].ask.all()[0]
        heard, shared_heard = _hear(tasks)
        kinds: list[Payload] = []
        chunk = max(32, 4096 // len(tasks))
        set_mode(architectures, False)

        def make(tensors: dict[str, Tensor], own: dict[str, Any], told: dict[str, Any]) -> dict[str, Tensor]:
            private = Batch(x=own["x"], y=own.get("y"), index=own["index"], weight=own["weight"]) if own else None
            net = Net(architectures, nested(tensors), chunk=chunk)
            view = View(private=private, public=public, classes=self.site.classes)
            payload = self.method.answer(net, view, shared_heard(told))
            kinds.append(payload)
            return payload.tensors()

        arguments = [stacked, *([own] if own else []), *([heard] if heard else [])]

        def call(*given: Any) -> dict[str, Tensor]:
            rest = list(given[1:])
            return make(given[0], rest.pop(0) if own else {}, rest.pop(0) if heard else {})

        out = vmap(call)(*arguments)
        return [rebuild(outline(kinds[0]), {name: v[k] for name, v in out.items()}) for k in range(len(tasks))]

    @torch.no_grad()
    def scores(self, cards: Sequence[Card], states: Sequence[DeviceState], x: Tensor) -> Iterator[tuple[int, Tensor]]:
        groups: dict[Hashable, list[int]] = {}
        for k, (card, state) in enumerate(zip(cards, states, strict=True)):
            groups.setdefault((card.architecture, _signature(state.memory)), []).append(k)
        for members in groups.values():
            size = self.block_size(cards[members[0]].architecture)
            for start in range(0, len(members), size):
                block = members[start : start + size]
                if not self._takes((cards[block[0]].architecture, "scores")):
                    yield from self._serial_scores(cards, states, x, block)
                    continue
                try:
                    made = self._scores([cards[k] for k in block], [states[k] for k in block], x)
                except (RuntimeError, ValueError, NotImplementedError) as cause:
                    self._refuse((cards[block[0]].architecture, "scores"), cause)
                    yield from self._serial_scores(cards, states, x, block)
                    continue
                yield from zip(block, made, strict=True)

    def _serial_scores(
        self, cards: Sequence[Card], states: Sequence[DeviceState], x: Tensor, block: list[int]
    ) -> Iterator[tuple[int, Tensor]]:
        for k, found in self._serial.scores([cards[k] for k in block], [states[k] for k in block], x):
            yield block[k], found

    def _scores(self, cards: list[Card], states: list[DeviceState], x: Tensor) -> Tensor:
        architectures = self.site.architectures_of(cards[0])
        set_mode(architectures, False)
        stacked = _stack([flat(s.models, list(s.models)) for s in states])
        memory = _stack([dict(s.memory) for s in states])
        chunk = max(32, 4096 // len(cards))

        def call(tensors: dict[str, Tensor], *memory: dict[str, Tensor]) -> Tensor:
            net = Net(architectures, nested(tensors), chunk=chunk)
            return self.method.predict(net, x, memory[0] if memory else {})

        found: Tensor = vmap(call)(stacked, *([memory] if memory else []))
        return found

    # ---- grouping ---------------------------------------------------------------------------------------------------
    def block_size(self, architecture: str) -> int:
        """Return how many devices form one stack."""
        if self.experiment.runner.block is not None:
            return self.experiment.runner.block
        template = self.site.architecture(architecture).template
        return 16 if any(isinstance(m, torch.nn.Conv2d) for m in template.modules()) else 64

    def _blocks(self, stage: str, tasks: Sequence[Task]) -> Iterator[list[Task]]:
        groups: dict[Hashable, list[Task]] = {}
        for task in tasks:
            kept = _signature(task.state.optimizers.get(stage, {}))
            told = _signature(task.heard.knowledge.tensors())
            teach = None if task.teach is None else id(task.teach)
            ask = None if task.ask is None else id(task.ask)
            place = (task.card.architecture, told, _signature(task.heard.memory), kept, teach, ask, task.heard.round)
            groups.setdefault(place, []).append(task)
        for members in groups.values():
            size = self.block_size(members[0].card.architecture)
            for start in range(0, len(members), size):
                yield members[start : start + size]

    def _guard(
        self, stage: str, block: list[Task], stacked: Callable[[list[Task]], Any], serial: Callable[[list[Task]], Any]
    ) -> Any:
        place = (block[0].card.architecture, stage)
        if not self.method.stackable or not self._takes(place):
            return serial(block)
        try:
            return stacked(block)
        except (RuntimeError, ValueError, NotImplementedError) as cause:
            self._refuse(place, cause)
            return serial(block)

    def _takes(self, place: tuple[str, str]) -> bool:
        """Tell whether devices of an architecture are stacked in a stage; say so once if they are not."""
        reason = self.site.architecture(place[0]).unstackable
        if reason is not None and place not in self._refused:
            self._refuse(place, reason)
        return place not in self._refused

    def _refuse(self, place: tuple[str, str], cause: Exception | str) -> None:
        self._refused.add(place)
        reason = " ".join(str(cause).split())[:200]
        warnings.warn(f"{place[0]} cannot be stacked in `{place[1]}`, looped instead: {reason}", Fallback, stacklevel=2)


class _Gather:
    """Gives the batch of a step: what all devices share, and what is stacked [K, B, ...]."""

    def __init__(self, datas: Sequence[Records], positions: np.ndarray, *, shared: bool) -> None:
        self._datas = datas
        first = datas[0]
        self._shared = shared and all(d is first for d in datas)
        self._positions = torch.from_numpy(positions[:1] if self._shared else positions)
        self._pool = first.pool if all(d.pool is first.pool for d in datas) else None
        self._where: Tensor | None = None
        if self._shared:
            self._where = first.index[self._positions]
        elif self._pool is not None:
            self._where = torch.stack([d.index[p] for d, p in zip(datas, self._positions, strict=True)])

    def __call__(self, t: int, active: int, width: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self._shared:
            assert self._where is not None and self._pool is not None
            where, index = self._where[0, t, :width], self._positions[0, t, :width]
            given = {"x": self._pool.take(where), "index": index}
            if self._pool.y is not None:
                given["y"] = self._pool.y[where]
            return given, {}
        index = self._positions[:active, t, :width]
        if self._where is not None and self._pool is not None:
            where = self._where[:active, t, :width]
            given = {"x": self._pool.take(where), "index": index}
            if self._pool.y is not None:
                given["y"] = self._pool.y[where]
            return {}, given
        given = {"x": torch.stack([d.inputs(i) for d, i in zip(self._datas, index, strict=False)]), "index": index}
        labels = [d.labels(i) for d, i in zip(self._datas, index, strict=False)]
        if all(label is not None for label in labels):
            given["y"] = torch.stack([label for label in labels if label is not None])
        return {}, given


def _hear(tasks: Sequence[Task]) -> tuple[dict[str, Tensor], Callable[[dict[str, Any]], Heard]]:
    """Return what differs from device to device of the things heard [K, ...], and how to put the whole together."""
    first = tasks[0].heard
    stacked: dict[str, Tensor] = {}
    common = all(task.heard.knowledge is first.knowledge for task in tasks)
    if not common:
        stacked |= {f"k/{n}": t for n, t in _stack([dict(task.heard.knowledge.tensors()) for task in tasks]).items()}
    stacked |= {f"m/{n}": t for n, t in _stack([dict(task.heard.memory) for task in tasks]).items()}

    def put(told: dict[str, Any]) -> Heard:
        knowledge = first.knowledge
        if not common:
            knowledge = rebuild(outline(knowledge), {k[2:]: v for k, v in told.items() if k.startswith("k/")})
        memory = {k[2:]: v for k, v in told.items() if k.startswith("m/")}
        return Heard(knowledge=knowledge, memory=memory, round=first.round)

    return stacked, put


def _without(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda live, still, own: function(live, still, own, {})


def _stack(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def _signature(tensors: Any) -> Hashable:
    # Sorted, because a restored state lists its tensors in another order.
    return tuple(sorted((name, tuple(t.shape)) for name, t in tensors.items()))
