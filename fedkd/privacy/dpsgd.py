"""DP-SGD for a device's own records: Opacus on the serial engine, the stacked form on the others.

Opacus gives each record's gradient and clips; the sampling, the noise, the divisor and the account are this library's,
because Opacus's own engine counts from the private number of records and draws its noise from a 32-bit seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.algorithms.base import Batch, Phase, Tensors
from fedkd.engines.base import Augmenter, Engine, SerialEngine, Task, flat, nested, set_mode, split_trainable
from fedkd.errors import ConfigError
from fedkd.layers import situation
from fedkd.nets import Net
from fedkd.privacy.noise import NoiseSource
from fedkd.training import Optimizer, rates

if TYPE_CHECKING:
    from fedkd.privacy.record_level import DpSgd

ADDITIVE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}


def unsupported(model: nn.Module) -> str | None:
    """Return why a model has no gradient per record, and what to use instead; None if DP-SGD takes it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return (
                f"{name or 'it'} is a {type(module).__name__}, which mixes the records of a batch, so that no record's "
                "share can be bounded. Use GroupNorm: cnn(norm=group) or resnet(norm=group)"
            )
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            return (
                f"{name or 'it'} is a {type(module).__name__} that keeps running statistics of the records, which no noise "
                "protects. Use GroupNorm, or track_running_stats=False"
            )
    from opacus.validators import ModuleValidator

    faults = ModuleValidator.validate(model.train(), strict=False)
    return " ".join(str(faults[0]).split()) if faults else None


def train_private(engine: Engine, phase: Phase, tasks: Sequence[Task]) -> None:
    """Run one phase on private records by DP-SGD for every task; replaces ``task.state``, and notes no loss.

    The tasks were admitted, so that the ledger is charged for the steps taken here.
    """
    mechanism = cast("DpSgd", engine.site.mechanism.trainer)
    if mechanism.steps[phase.settings] == 0:
        return
    if isinstance(engine, SerialEngine):
        for task in tasks:
            train_one(engine, mechanism, phase, task)
        return
    from fedkd.privacy.stacked_dpsgd import train_stacked

    train_stacked(engine, mechanism, phase, tasks)


def stream(mechanism: DpSgd, phase: Phase, task: Task) -> NoiseSource:
    """Return the source of one device's sampling and noise in one phase."""
    return mechanism.noise(phase.name, task.heard.round, task.card.id)


def sample(source: NoiseSource, q: float, steps: int, records: int) -> list[Tensor]:
    """Draw each step's records: every record enters with probability ``q``, independently (Poisson)."""
    taken = source.bernoulli(q, (steps, records))
    return [torch.from_numpy(np.flatnonzero(row)) for row in taken]


def train_one(engine: Engine, mechanism: DpSgd, phase: Phase, task: Task) -> None:
    """Train one device with Opacus's gradients per record, or with its ghost clipping."""
    site, settings = engine.site, engine.settings(phase)
    steps = mechanism.steps[phase.settings]
    architectures = site.architectures_of(task.card)
    tensors = {k: v.clone() for k, v in flat(task.state.models, list(task.state.models)).items()}
    params, rest = split_trainable(tensors, architectures, phase.trains)
    modules = {role: architectures[role].module(nested(tensors)[role]) for role in task.state.models}
    net = ModuleNet(modules)
    live: dict[str, nn.Parameter] = {}
    for role, module in modules.items():
        module.train()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(f"{role}/{name}" in params)
            if f"{role}/{name}" in params:
                live[f"{role}/{name}"] = parameter
    check_additive(engine, phase, task)
    source = stream(mechanism, phase, task)
    batches = sample(source, mechanism.q, steps, len(task.private))
    optimizer = Optimizer(settings.optimizer)
    stored = task.state.optimizers.get(phase.name)
    values = {k: p.data for k, p in live.items()}
    state = {k: v.clone() for k, v in stored.items()} if stored else optimizer.initial(values)
    rate = rates(settings, steps, task.heard.round)
    clipper = (
        _Ghost(modules, live, mechanism) if mechanism.config.gradients == "ghost" else _Hooks(modules, live, mechanism)
    )
    luck = int(source.bits(1)[0])
    vary = augmenter(engine, phase, [task], luck)
    size = sum(p.numel() for p in live.values())
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Opacus's hooks fire at a model's first layer too, whose inputs need no gradient; torch remarks on it.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        torch.manual_seed(luck)
        for t in range(steps):
            free = _free_gradient(phase, net, task, site.shape, site.dtype, live, clipper)
            batch = _batch(task, batches[t])
            if vary is not None and len(batches[t]):
                batch = replace(batch, x=vary(t, batch.x[None], [len(batches[t])])[0])
            summed = clipper.summed(lambda given: phase.loss(net, given, task.heard), batch, free)
            noise = source.normal((size,), mechanism.noise_multiplier * mechanism.clip, site.dtype)
            pieces = noise.split([p.numel() for p in live.values()])
            grads = tuple(
                (total + piece.view_as(total)) / mechanism.expected_batch + extra
                for total, piece, extra in zip(summed, pieces, free, strict=True)
            )
            optimizer.step(values, grads, state, float(rate[t]))
    clipper.close()
    final = {**{k: v.detach().clone() for k, v in values.items()}, **rest}
    keep = {**task.state.optimizers, phase.name: state} if settings.optimizer.persist else task.state.optimizers
    task.state = replace(task.state, models=nested(final), optimizers=keep)


class ModuleNet(Net):
    """A device's models as real modules, for hooks; otherwise what :class:`~fedkd.nets.Net` is."""

    def __init__(self, modules: Mapping[str, nn.Module], role: str = "model") -> None:
        super().__init__({}, {}, role)
        self._modules, self._own_role = modules, role

    def __getitem__(self, role: str) -> Net:
        return ModuleNet(self._modules, role)

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(self._modules[self._own_role].state_dict(keep_vars=True))

    @property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self._modules[self._own_role].named_parameters())

    def mode(self, *, training: bool) -> None:
        for module in self._modules.values():
            module.train(training)

    def _module(self) -> nn.Module:
        return self._modules[self._own_role]

    def _call(self, method: str, batch: Batch | Tensor, whole: bool = False) -> Tensor:
        x = batch.x if isinstance(batch, Batch) else batch
        module = self._modules[self._own_role]
        out: Tensor = module(x) if method == "forward" else getattr(module, method)(x)
        return out


# ---- gradients per record -------------------------------------------------------------------------------------------
class _Hooks:
    """Opacus's hooks: the gradient of every record, clipped by its ``DPOptimizer``."""

    def __init__(self, modules: Mapping[str, nn.Module], live: Mapping[str, nn.Parameter], mechanism: DpSgd) -> None:
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        self.live = list(live.values())
        self.wrapped = [self._wrap(GradSampleModule, module) for module in modules.values() if self._trains(module)]
        # Without noise here: it is added by this library, from the system's entropy.
        self.optimizer = DPOptimizer(
            torch.optim.SGD(self.live, lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=mechanism.clip,
            expected_batch_size=None,
            loss_reduction="sum",
        )

    @staticmethod
    def _trains(module: nn.Module) -> bool:
        return any(p.requires_grad for p in module.parameters())

    def _wrap(self, kind: Any, module: nn.Module) -> Any:
        return kind(module, batch_first=True, loss_reduction="sum")

    def summed(self, loss: Any, batch: Batch, free: Sequence[Tensor]) -> list[Tensor]:
        """Return the sum of clipped gradients of the batch's records, by parameter, without the ``free`` gradient."""
        self.optimizer.zero_grad(set_to_none=True)
        n = len(batch.x)
        if n:
            loss(batch).backward()
        for p in self.live:
            if n == 0 or getattr(p, "grad_sample", None) is None:
                # Opacus has nothing to say of an empty batch, nor of layers that the loss does not use.
                p.grad_sample = p.new_zeros((n, *p.shape))  # type: ignore[attr-defined]
        finite = torch.ones(n, dtype=torch.bool)
        for p in self.live:
            finite &= p.grad_sample.flatten(1).square().sum(1).isfinite() if n else finite  # type: ignore[attr-defined]
        for p in self.live:
            if not bool(finite.all()):
                p.grad_sample[~finite] = 0.0  # type: ignore[attr-defined]
        self.optimizer.pre_step()
        return [cast(Tensor, p.grad).clone() for p in self.live]

    def close(self) -> None:
        """Take the hooks off."""
        for module in self.wrapped:
            module.remove_hooks()


class _Ghost(_Hooks):
    """Opacus's ghost clipping: norms in a first backward pass, the sum of clipped gradients in a second one."""

    def __init__(self, modules: Mapping[str, nn.Module], live: Mapping[str, nn.Parameter], mechanism: DpSgd) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping

        self.live, self.clip = list(live.values()), mechanism.clip
        self.wrapped = [
            self._wrap(GradSampleModuleFastGradientClipping, module)
            for module in modules.values()
            if self._trains(module)
        ]
        self.optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(self.live, lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=mechanism.clip,
            expected_batch_size=None,
            loss_reduction="sum",
        )

    def _wrap(self, kind: Any, module: nn.Module) -> Any:
        return kind(module, batch_first=True, loss_reduction="sum", max_grad_norm=self.clip, use_ghost_clipping=True)

    def summed(self, loss: Any, batch: Batch, free: Sequence[Tensor]) -> list[Tensor]:
        while len(batch.x):
            # Both passes must see the same dropout, or the gradient summed is not the one whose norm was taken.
            luck = torch.get_rng_state()
            norm = self._norms(loss, batch)
            finite = norm.square().isfinite()
            if bool(finite.all()):
                break
            batch = _only(batch, finite)
        if not len(batch.x):
            return [torch.zeros_like(p.data) for p in self.live]
        torch.set_rng_state(luck)
        self.optimizer.zero_grad(set_to_none=True)
        factor = (self.clip / (norm + 1e-6)).clamp(max=1.0)
        for module in self.wrapped:
            module.disable_hooks()
        loss(replace(batch, weight=factor)).backward()
        for module in self.wrapped:
            module.enable_hooks()
        found = [p.grad if p.grad is not None else torch.zeros_like(p.data) for p in self.live]
        return [g - f for g, f in zip(found, free, strict=True)]

    def _norms(self, loss: Any, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        for p in self.live:
            p._norm_sample = None  # type: ignore[attr-defined]
        loss(batch).backward()
        found = [n for p in self.live if (n := getattr(p, "_norm_sample", None)) is not None]
        return torch.stack(found).square().sum(0).sqrt().detach()


def _only(batch: Batch, keep: Tensor) -> Batch:
    y = None if batch.y is None else batch.y[keep]
    return Batch(x=batch.x[keep], y=y, index=batch.index[keep], weight=batch.weight[keep])


def augmenter(engine: Engine, phase: Phase, tasks: Sequence[Task], luck: int) -> Augmenter | None:
    """Return what varies the batches, drawn from ``luck``: where the seed decided, a record's neighbours would too."""
    if not engine.experiment.data.augment.active:
        return None
    secret = engine.experiment.model_copy(update={"seed": luck})
    return Augmenter(secret, phase, [(task.card.id, task.heard.round) for task in tasks])


def _batch(task: Task, taken: Tensor) -> Batch:
    # Weights of 1 make the loss a sum, so that each record's gradient is its own and not divided by their number.
    x = task.private.inputs(taken)
    weight = torch.ones(len(taken), dtype=x.dtype)
    return Batch(x=x, y=task.private.labels(taken), index=taken, weight=weight)


def _nobody(shape: tuple[int, ...], dtype: torch.dtype) -> Batch:
    """A batch of one record of zeros that counts for nothing."""
    one = torch.zeros(1, dtype=torch.int64)
    return Batch(x=torch.zeros(1, *shape, dtype=dtype), y=one, index=one, weight=torch.zeros(1, dtype=dtype))


def _free_gradient(
    phase: Phase,
    net: Net,
    task: Task,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    live: Mapping[str, nn.Parameter],
    clipper: _Hooks,
) -> tuple[Tensor, ...]:
    """Return the gradient of what the loss adds without any record, such as a proximal term: it needs no noise."""
    for module in clipper.wrapped:
        module.disable_hooks()
    value = phase.loss(net, _nobody(shape, dtype), task.heard)
    found = torch.autograd.grad(value, list(live.values()), materialize_grads=True)
    for module in clipper.wrapped:
        module.enable_hooks()
    return found


def check_additive(engine: Engine, phase: Phase, task: Task) -> None:
    """Refuse a loss that is no sum over records: clipping each record's gradient would bound nothing.

    It is tried out once for each architecture and kind of knowledge, on made-up records and fresh weights.

    Raises:
        ConfigError: the loss of the records together is not the sum of their losses.
    """
    site = engine.site
    place = (task.card.architecture, phase.name, type(task.heard.knowledge).__name__)
    done: set[tuple[str, str, str]] = site.__dict__.setdefault("_additive", set())
    if place in done:
        return
    rng = torch.Generator().manual_seed(0)
    count = 3
    x = torch.rand(count, *site.shape, generator=rng, dtype=torch.float64).to(site.dtype)
    y = torch.arange(count) % site.classes
    architectures = site.architectures_of(task.card)
    models: dict[str, Tensors] = {r: site.initial(architectures[r].name, "probe") for r in task.state.models}
    params, rest = split_trainable(flat(models, list(models)), architectures, phase.trains)
    params = {k: v.clone().requires_grad_(True) for k, v in params.items()}
    net = Net(architectures, nested({**params, **rest}))
    set_mode(architectures, False)

    def gradient(weight: Sequence[float]) -> Tensor:
        given = torch.tensor(weight, dtype=site.dtype)
        batch = Batch(x=x, y=y, index=torch.zeros(count, dtype=torch.int64), weight=given)
        with situation(mask=None):
            value = phase.loss(net, batch, task.heard)
        found = torch.autograd.grad(value, list(params.values()), materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    nothing = gradient([0.0] * count)
    single = [gradient([float(i == k) for i in range(count)]) - nothing for k in range(count)]
    together = gradient([1.0] * count) - nothing
    gap, scale = (together - sum(single)).norm(), torch.stack(single).norm()
    if not bool(gap <= ADDITIVE_TOLERANCE[site.dtype] * scale + 1e-9):
        raise ConfigError(
            f"{site.method.name}: the loss of phase {phase.name!r} is no sum over records, so that no record's share in "
            "a gradient can be bounded. DP-SGD needs a loss of the form batch.mean(per-record values)"
        )
    # Other neighbours must change nothing: neither a record's gradient, nor that of a batch in which nobody counts.
    x = x.clone()
    x[1:] = 1 - x[1:]
    moved = (gradient([1.0, 0.0, 0.0]) - nothing - single[0]).norm() + (gradient([0.0] * count) - nothing).norm()
    if not bool(moved <= ADDITIVE_TOLERANCE[site.dtype] * scale + 1e-9):
        raise ConfigError(
            f"{site.method.name}: in phase {phase.name!r} the loss of one record depends on the other records of its "
            "batch, so that its share cannot be bounded by clipping. DP-SGD needs a loss of the form "
            "batch.mean(per-record values)"
        )
    _check_layers(engine, phase, task)
    done.add(place)


def _check_layers(engine: Engine, phase: Phase, task: Task) -> None:
    """Refuse a model whose weights are used beside the layers that own them: no norm per record counts that."""
    from fedkd.privacy.stacked_dpsgd import uses_of_layers, why_not

    architectures = engine.site.architectures_of(task.card)
    ghost = engine.experiment.privacy.gradients == "ghost"
    two_of_one = len({id(a) for a in architectures.values()}) < len(architectures)
    reason = next((r for role in phase.trains if (r := why_not(architectures[role].template)) is not None), None)
    if reason is not None or two_of_one:
        # Opacus's hooks see layers alone; its ghost clipping would add what it has not measured.
        if ghost:
            raise ConfigError(
                f"privacy.gradients ghost cannot be checked for {task.card.architecture}: "
                f"{reason or 'two models of one architecture'}. Use privacy.gradients=hooks"
            )
        return
    beside, twice = uses_of_layers(engine, phase, task)
    if beside:
        raise ConfigError(
            f"model {task.card.architecture!r} uses the weight of a layer beside the layer's own forward (F.linear, a tied "
            "or normalised weight): that part of a record's gradient is in no norm, so that clipping does not bound it. "
            "Call the layer itself, or wrap the use into a module of its own"
        )
    if ghost and twice is not None and isinstance(engine, SerialEngine):
        raise ConfigError(
            f"model {task.card.architecture!r} calls its layer {twice!r} more than once, and Opacus's ghost clipping takes "
            "the norm of one call alone. Use privacy.gradients=hooks, or the stacked runner, whose norms cover all calls"
        )
