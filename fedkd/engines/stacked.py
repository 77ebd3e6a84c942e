"""The stacked engine: devices of one architecture train as one batch of models.

The forward pass runs under ``torch.func.vmap`` over the stacked weights [K, ...], so that a method's loss is written for
one device; one ordinary backward pass serves all, because the devices' losses add up and share no weight. Devices are
sorted by their number of steps, so that those with work left are always a prefix of the stack.

On a CPU, compiled kernels take over where they can (:mod:`fedkd.kernels`), in two degrees. Nets that are chains of common
layers pass forward and backward through them, whatever the loss. Where the loss is one that they know as well, they run
the whole stretch of training, device by device, without a word of Python in between.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap

from fedkd.algorithms.base import Batch, Card, DeviceState, Heard, Phase, View
from fedkd.engines.base import Engine, SerialEngine, Task, nested, padded, set_mode, split_trainable
from fedkd.experiment import TrainingConfig
from fedkd.hardware import device
from fedkd.kernels.build import Library, library
from fedkd.kernels.jobs import CHUNK, agreeing, train
from fedkd.kernels.program import Program
from fedkd.kernels.recognise import recognise
from fedkd.layers import situation
from fedkd.models import Architecture
from fedkd.nets import Net
from fedkd.payloads import Payload, outline, rebuild
from fedkd.records import Records
from fedkd.site import Site
from fedkd.training import Optimizer, rates

ANSWER_BUDGET_ELEMENTS = 30_000_000
"""Numbers that the padded private records of one stack may take when an answer reads them."""

LOOP_FROM_FLOPS = 5e8
"""Operations of one device's training step (three forward passes of a batch) from which torch runs convolutions faster
one device after the other than under ``vmap`` on a CPU. Measured with residual nets, batches of 32: ``vmap`` takes 0.8
of the loop's time at 1.2e8, 1.1 at 4.5e8, 1.4 to 1.6 at 1.8e9. Dense layers gain at any size."""

BLOCK_BUDGET_BYTES = 64 * 2**20
"""What a stack's weights and one pass's activations may take in the compiled kernels."""


class Fallback(UserWarning):
    """A model or method that cannot be stacked, and is looped instead."""


class StackedEngine(Engine):
    """Many devices at once, grouped by architecture and by what they heard."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self._serial = SerialEngine(site)
        self._refused: set[Hashable] = set()
        self._said: set[str] = set()
        self._read: dict[str, dict[str, Program]] = {}
        self._device = device(self.experiment.runner.device, "runner.device")

    # ---- training ---------------------------------------------------------------------------------------------------
    def train(self, phase: Phase, tasks: Sequence[Task]) -> None:
        for block in self._blocks(phase.name, tasks):
            if self._too_large(phase, block[0].card):
                self._serial.train(phase, block)
                continue
            self._guard(phase.name, block, lambda b: self._train(phase, b), lambda b: self._serial.train(phase, b))

    def _too_large(self, phase: Phase, card: Card) -> bool:
        """Tell whether stacking would slow a model down; the experiment alone decides, never this machine."""
        roles = self.site.architectures_of(card)
        if self._device.type != "cpu" or any(("forward" in self._program(a.name)) for a in roles.values()):
            return False
        if not any(isinstance(m, torch.nn.Conv2d) for a in roles.values() for m in a.template.modules()):
            return False
        forward = sum(a.forward_flops for a in roles.values())
        return 3 * forward * self.settings(phase).batch_size >= LOOP_FROM_FLOPS

    def _train(self, phase: Phase, tasks: list[Task]) -> None:
        settings = self.settings(phase)
        work = []
        for task in tasks:
            data = self.records(phase, task)
            if data is not None and len(data):
                plan = self.deal(phase, task, len(data))
                if plan.steps:
                    work.append((task, data, plan))
        if not work:
            return
        work.sort(key=lambda w: -w[2].steps)
        tasks, datas, plans = [w[0] for w in work], [w[1] for w in work], [w[2] for w in work]
        count, steps = len(tasks), plans[0].steps
        length = np.array([plan.steps for plan in plans])
        if len({plan.index.shape for plan in plans}) == 1:
            sizes, positions = np.stack([p.sizes for p in plans]), np.stack([p.index for p in plans])
        else:
            sizes = np.zeros((count, steps), np.int64)
            positions = np.zeros((count, steps, max(plan.index.shape[1] for plan in plans)), np.int64)
            for k, plan in enumerate(plans):
                sizes[k, : plan.steps] = plan.sizes
                positions[k, : plan.steps, : plan.index.shape[1]] = plan.index
        rate = np.zeros((count, steps))
        for some in np.unique(length):
            # A block has heard of one round.
            rate[length == some, :some] = rates(settings, int(some), tasks[0].heard.round)

        architectures = self.site.architectures_of(tasks[0].card)
        stacked = self._moved(_stack_models([task.state.models for task in tasks]))
        params, rest = split_trainable(stacked, architectures, phase.trains)
        optimizer = Optimizer(settings.optimizer)
        stored = [task.state.optimizers.get(phase.name) for task in tasks]
        fresh = optimizer.initial({k: torch.empty(v.shape[1:], dtype=v.dtype) for k, v in params.items()})
        state = self._moved(_stack([dict(s) if s is not None else fresh for s in stored]))
        stretch = _Stretch(phase, tasks, datas, settings, positions, sizes, length, rate, params, rest, state)
        total = self._compiled(stretch)
        if total is None:
            total = self._stepwise(stretch, architectures)

        final = _apart_models(_home({**params, **rest}), count)
        kept = _apart(_home(state), count) if settings.optimizer.persist else None
        for k, (task, mean) in enumerate(zip(tasks, (total.cpu().numpy() / length).tolist(), strict=True)):
            optimizers = task.state.optimizers if kept is None else {**task.state.optimizers, phase.name: kept[k]}
            task.state = replace(task.state, models=final[k], optimizers=optimizers)
            task.losses[phase.name] = mean

    def _compiled(self, work: _Stretch) -> Tensor | None:
        """Run a stretch in the compiled kernels; returns the sums of losses [K], or None where they cannot."""
        phase, tasks, params = work.phase, work.tasks, work.params
        program = self._programs(tasks[0].card).get(("model", "forward"))
        pool = work.datas[0].pool
        if (
            program is None
            or self._library is None
            or phase.trains != ("model",)
            or self.augmenter(phase, tasks) is not None
        ):
            return None
        if {n.removeprefix("model/") for n in params} != set(program.params) or any(
            d.pool is not pool for d in work.datas
        ):
            return None
        heard = tasks[0].heard
        known = recognise(
            phase.loss, heard, self.site.shape, self.site.classes, self.site.dtype, labels=pool.y is not None
        )
        if known is None or program.outputs != self.site.classes:
            return None
        positions = work.positions
        if phase.data != "private" and all(d is work.datas[0] for d in work.datas):
            positions = positions[:1]
            index = work.datas[0].index.numpy()[positions]
        else:
            starts = np.cumsum([0, *(len(d) for d in work.datas[:-1])])
            index = torch.cat([d.index for d in work.datas]).numpy()[positions + starts[:, None, None]]
        labels = None if pool.y is None else pool.y.numpy()[index]
        inputs = pool.floats
        if inputs is None:
            # Too many pixels to hold as floats: take those of this block alone.
            used, index = np.unique(index, return_inverse=True)
            inputs, index = pool.take(torch.from_numpy(used)), index.reshape(positions.shape)
        table: Tensor | None = None
        if known.table is not None:
            told = [task.heard.knowledge for task in tasks]
            same = all(k is told[0] for k in told)
            tables = [k.tensors()[known.table] for k in (told[:1] if same else told)]
            table = (tables[0] if same else torch.stack(tables)).contiguous()
            if int(positions.max()) >= table.shape[-2]:
                return None
        losses = train(
            self._library, program, known, work.settings.optimizer,
            {n: params[f"model/{n}"] for n in program.params},
            {n: work.rest[f"model/{n}"] for n in (*program.buffers, *program.counters)},
            work.state, pool=inputs, index=np.ascontiguousarray(index), labels=labels, positions=positions, table=table,
            sizes=work.sizes, length=work.length, rate=work.rate, masks=self._dropout_masks(work, program),
        )  # fmt: skip
        return torch.from_numpy(losses)

    def _dropout_masks(self, work: _Stretch, program: Program) -> list[Tensor]:
        """Draw what dropout multiplies by, in the order in which a loop over the steps would draw it."""
        drops = program.dropouts
        count, steps, width = work.positions.shape
        masks = [torch.zeros(count, steps, width, *d.features, dtype=self.site.dtype) for d in drops]
        for k in range(count if drops else 0):
            stream = self.dropout_stream(work.phase, work.tasks[k])
            for t in range(int(work.length[k])):
                size = int(work.sizes[k, t])
                for mask, layer in zip(masks, drops, strict=True):
                    p = layer.extra[0]
                    draw = torch.rand((size, *layer.features), generator=stream, dtype=torch.float32)
                    if p < 1:
                        mask[k, t, :size] = (draw >= p).to(mask) / (1 - p)
        return masks

    def _stepwise(self, work: _Stretch, architectures: dict[str, Architecture]) -> Tensor:
        """Run a stretch step by step, with the method's loss as the function that it is; returns the sums of losses."""
        phase, tasks, datas, settings = work.phase, work.tasks, work.datas, work.settings
        params, rest, state = work.params, work.rest, work.state
        positions, sizes, length, rate = work.positions, work.sizes, work.length, work.rate
        count, steps = sizes.shape
        optimizer, programs = Optimizer(settings.optimizer), self._programs(tasks[0].card)
        streams = [self.dropout_stream(phase, task) for task in tasks]
        gather = _Gather(datas, positions, shared=phase.data != "private")
        augment = self.augmenter(phase, tasks)
        heard, shared_heard = _hear(tasks, self._device)
        total = torch.zeros(count, dtype=self.site.dtype, device=self._device)

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
            batch, batched = self._moved(batch), self._moved(batched)
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
                net = Net(architectures, nested({**live, **still}), programs=programs)
                anchor = next(iter(live.values())).detach()
                with situation(mask=mask, generators=streams, sizes=sizes, anchor=anchor):
                    return phase.loss(net, made, shared_heard(told))

            told = {k: v[:active] for k, v in heard.items()}
            values = vmap(loss)(live, still, batched, told) if told else vmap(_without(loss))(live, still, batched)
            grads = torch.autograd.grad(values.sum(), list(live.values()), materialize_grads=True)
            with torch.no_grad():
                same = (rate[:active, t] == rate[0, t]).all()
                step_rate = float(rate[0, t]) if same else torch.from_numpy(rate[:active, t]).to(total)
                optimizer.step(
                    {k: v[:active] for k, v in params.items()},
                    grads,
                    {k: v[:active] for k, v in state.items()},
                    step_rate,
                )
                total[:active] += values.detach()
        return total

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
        stacked = self._moved(_stack_models([task.state.models for task in tasks]))
        own: dict[str, Any] = {}
        if self.method.reads_private:
            sizes = np.array([len(task.private) for task in tasks])
            width = int(sizes.max())
            datas = [task.private for task in tasks]
            gather = _Gather(datas, padded([np.arange(n) for n in sizes], width)[:, None, :], shared=False)
            _, own = gather(0, len(tasks), width)
            mask = torch.from_numpy(np.arange(width) < sizes[:, None]).to(self.site.dtype)
            own["weight"] = mask / mask.sum(1, keepdim=True).clamp(min=1)
        programs = self._programs(tasks[0].card)
        public = None if tasks[0].ask is None else tasks[0].ask.all()[0].to(self._device)
        own = self._moved(own)
        heard, shared_heard = _hear(tasks, self._device)
        kinds: list[Payload] = []
        chunk = max(32, 4096 // len(tasks))
        set_mode(architectures, False)

        def make(tensors: dict[str, Tensor], own: dict[str, Any], told: dict[str, Any]) -> dict[str, Tensor]:
            private = Batch(x=own["x"], y=own.get("y"), index=own["index"], weight=own["weight"]) if own else None
            net = Net(architectures, nested(tensors), chunk=chunk, programs=programs)
            view = View(private=private, public=public, classes=self.site.classes)
            payload = self.method.answer(net, view, shared_heard(told))
            kinds.append(payload)
            return payload.tensors()

        arguments = [stacked, *([own] if own else []), *([heard] if heard else [])]

        def call(*given: Any) -> dict[str, Tensor]:
            rest = list(given[1:])
            return make(given[0], rest.pop(0) if own else {}, rest.pop(0) if heard else {})

        out = vmap(call)(*arguments)
        kind, names = outline(kinds[0]), list(out)
        parts = zip(*(v.cpu().unbind() for v in out.values()), strict=True) if out else (() for _ in tasks)
        return [rebuild(kind, dict(zip(names, values, strict=True))) for values in parts]

    @torch.no_grad()
    def scores(self, cards: Sequence[Card], states: Sequence[DeviceState], x: Tensor) -> Iterator[tuple[int, Tensor]]:
        groups: dict[Hashable, list[int]] = {}
        for k, (card, state) in enumerate(zip(cards, states, strict=True)):
            # A device that has never been asked may lack the models that others received.
            groups.setdefault((card.architecture, tuple(state.models), _signature(state.memory)), []).append(k)
        for members in groups.values():
            size = self.block_size(cards[members[0]].architecture)
            for start in range(0, len(members), size):
                block = members[start : start + size]
                if not self._takes((cards[block[0]].architecture, "scores")):
                    yield from self._serial_scores(cards, states, x, block)
                    continue
                try:
                    made = self._scores([cards[k] for k in block], [states[k] for k in block], x)
                except Exception as cause:
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
        stacked = self._moved(_stack_models([s.models for s in states]))
        memory = self._moved(_stack([dict(s.memory) for s in states]))
        x = x.to(self._device)
        chunk = max(32, 4096 // len(cards))
        programs = self._programs(cards[0])

        def call(tensors: dict[str, Tensor], *memory: dict[str, Tensor]) -> Tensor:
            net = Net(architectures, nested(tensors), chunk=chunk, programs=programs)
            return self.method.predict(net, x, memory[0] if memory else {})

        found: Tensor = vmap(call)(stacked, *([memory] if memory else []))
        return found.cpu()

    def _moved(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors on the device that computes; states, records and answers live in main memory."""
        return {name: t.to(self._device) for name, t in tensors.items()}

    # ---- compiled kernels -------------------------------------------------------------------------------------------
    @cached_property
    def _library(self) -> Library | None:
        wanted = self.experiment.runner.kernels and self._device.type == "cpu"
        return library(self.site.dtype) if wanted else None

    def _program(self, architecture: str) -> dict[str, Program]:
        """Return the programs of an architecture that the kernels run as torch does, by method of the model."""
        if architecture not in self._read:
            self._read[architecture] = agreeing(self._library, self.site.architecture(architecture))
        return self._read[architecture]

    def _programs(self, card: Card) -> dict[tuple[str, str], Program]:
        """Return the programs of a device's models, by role and method."""
        roles = self.site.architectures_of(card)
        return {(role, m): p for role, a in roles.items() for m, p in self._program(a.name).items()}

    # ---- grouping ---------------------------------------------------------------------------------------------------
    def block_size(self, architecture: str) -> int:
        """Return how many devices form one stack."""
        if self.experiment.runner.block is not None:
            return self.experiment.runner.block
        template = self.site.architecture(architecture).template
        program = self._program(architecture).get("forward")
        if program is not None and self._library is not None:
            weights = sum(t.numel() for t in template.state_dict().values())
            numbers = weights + self._library.kept(program.layers, len(program.steps), CHUNK)
            return int(min(1024, max(16, BLOCK_BUDGET_BYTES // (numbers * self.site.dtype.itemsize))))
        return 16 if any(isinstance(m, torch.nn.Conv2d) for m in template.modules()) else 64

    def _blocks(self, stage: str, tasks: Sequence[Task]) -> Iterator[list[Task]]:
        groups: dict[Hashable, list[Task]] = {}
        known: dict[int, Hashable] = {}
        for task in tasks:
            kept = _signature(task.state.optimizers.get(stage, {}))
            # Devices that were sent the same bytes share what was decoded from them.
            if (told := known.get(id(task.heard.knowledge))) is None:
                told = known[id(task.heard.knowledge)] = _signature(task.heard.knowledge.tensors())
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
        if (stage == "answer" and not self.method.stackable) or not self._takes(place):
            return serial(block)
        try:
            return stacked(block)
        except Exception as cause:
            # A model of the user's may raise whatever it likes under vmap. If it is no matter of stacking, it raises again.
            self._refuse(place, cause)
            return serial(block)

    def _takes(self, place: tuple[str, str]) -> bool:
        """Tell whether devices of an architecture are stacked in a stage."""
        reason = self.site.architecture(place[0]).unstackable
        if reason is not None:
            self._say(place[0], "at all", reason)
        return reason is None and place not in self._refused

    def _refuse(self, place: tuple[str, str], cause: Exception) -> None:
        self._refused.add(place)
        self._say(place[0], f"in `{place[1]}`", str(cause) or repr(cause))

    def _say(self, architecture: str, where: str, reason: str) -> None:
        """Say once of every architecture that it is looped, and why; other stages may fail for reasons of their own."""
        if architecture in self._said:
            return
        self._said.add(architecture)
        reason = " ".join(reason.split())[:200]
        warnings.warn(f"{architecture} cannot be stacked {where}, looped instead: {reason}", Fallback, stacklevel=2)


@dataclass(frozen=True)
class _Stretch:
    """One phase of K devices: what they train on, in which order, and their stacked tensors, changed in place.

    positions [K, T, B], sizes [K, T], rate [K, T]; length [K]: their numbers of steps, never rising.
    """

    phase: Phase
    tasks: list[Task]
    datas: list[Records]
    settings: TrainingConfig
    positions: NDArray[np.int64]
    sizes: NDArray[np.int64]
    length: NDArray[np.int64]
    rate: NDArray[np.float64]
    params: dict[str, Tensor]
    rest: dict[str, Tensor]
    state: dict[str, Tensor]


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


def _hear(tasks: Sequence[Task], device: torch.device) -> tuple[dict[str, Tensor], Callable[[dict[str, Any]], Heard]]:
    """Return what differs from device to device of the things heard [K, ...], and how to put the whole together."""
    first = tasks[0].heard
    shared = first.knowledge.map(lambda t: t.to(device))
    stacked: dict[str, Tensor] = {}
    teach = first.teach.to(device)
    common = all(task.heard.knowledge is first.knowledge for task in tasks)
    if not common:
        stacked |= {f"k/{n}": t for n, t in _stack([dict(task.heard.knowledge.tensors()) for task in tasks]).items()}
    stacked |= {f"m/{n}": t for n, t in _stack([dict(task.heard.memory) for task in tasks]).items()}

    def put(told: dict[str, Any]) -> Heard:
        knowledge = shared
        if not common:
            knowledge = rebuild(outline(knowledge), {k[2:]: v for k, v in told.items() if k.startswith("k/")})
        memory = {k[2:]: v for k, v in told.items() if k.startswith("m/")}
        # Devices of one block were taught the same samples.
        return Heard(knowledge=knowledge, memory=memory, round=first.round, teach=teach)

    return {n: t.to(device) for n, t in stacked.items()}, put


def _home(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in main memory, where states are kept."""
    return {name: t.cpu() for name, t in tensors.items()}


def _without(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda live, still, own: function(live, still, own, {})


def _stack(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def _stack_models(models: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Stack the devices' models, as ``role/name``."""
    return {
        f"{role}/{name}": torch.stack([m[role][name] for m in models])
        for role, tensors in models[0].items()
        for name in tensors
    }


def _apart_models(stack: dict[str, Tensor], count: int) -> list[dict[str, dict[str, Tensor]]]:
    """Undo :func:`_stack_models`."""
    models: list[dict[str, dict[str, Tensor]]] = [{} for _ in range(count)]
    for role, tensors in nested(stack).items():
        for model, mine in zip(models, _apart(tensors, count), strict=True):
            model[role] = mine
    return models


def _apart(stack: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Undo :func:`_stack`; every device gets tensors of its own, since a view would keep the whole stack alive."""
    parts: dict[str, Any] = {name: torch.unbind_copy(t) for name, t in stack.items()}  # type: ignore[func-returns-value]
    if not parts:
        return [{} for _ in range(count)]
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def _signature(tensors: Any) -> Hashable:
    if not tensors:
        return ()
    # Sorted, because a restored state lists its tensors in another order.
    return tuple(sorted((name, tuple(t.shape)) for name, t in tensors.items()))
