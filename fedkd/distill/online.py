"""Students that teach each other, without a teacher: branches of one net (ONE), and peers (deep mutual learning).

Both work on the user's own model: name its last stage, and what follows the stage is multiplied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.distill.loop import Batch, Epoch, Fit, Loop, Records
from fedkd.distill.taps import unknown_path
from fedkd.distill.terms import SigmoidRamp
from fedkd.errors import ConfigError
from fedkd.losses import KD, UNKNOWN, CrossEntropy
from fedkd.seeding import key


# ---- one net with several ends --------------------------------------------------------------------------------------
class _Fan(nn.Module):
    """Copies of a module, one per branch. The batch holds the branches' records one branch after the other.

    ``opens``: the branches begin here, so that all copies get the same input; it is kept for the gate.
    """

    def __init__(self, copies: Sequence[nn.Module], opens: bool) -> None:
        super().__init__()
        self.copies, self.opens = nn.ModuleList(copies), opens
        self.shared: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.opens:
            self.shared = x
            return torch.cat([branch(x) for branch in self.copies])
        parts = x.chunk(len(self.copies))
        return torch.cat([branch(part) for branch, part in zip(self.copies, parts, strict=True)])


class Branches(nn.Module):
    """A model whose last stage, and every layer with weights that runs after it, exists once per branch.

    The trunk before the stage runs once. What lies between layers (pooling, reshaping, activations) stays as the model's
    own ``forward`` has it: after the stage it sees one long batch, branch after branch.

    Args:
        model: any module [B, ...] -> [B, C]; it is copied, not changed. The first branch starts from its weights, the
            others from fresh ones.
        stage: module path of the last stage, such as ``layer4`` or ``body.5``.
        branches: at least 2.
        example: a batch [B, ...] for a dry run that finds out what runs after the stage.
        seed: decides the fresh weights.
    Raises:
        ConfigError: there is no such stage, a layer runs both before and after it, or a path around the stage meets what
            comes after it.
    """

    def __init__(self, model: nn.Module, stage: str, branches: int, example: Tensor, seed: int) -> None:
        super().__init__()
        if branches < 2:
            raise ConfigError(f"{branches} branches cannot teach each other: at least 2 are needed")
        self.branches = branches
        self.net = copy.deepcopy(model)
        before, after = _order(self.net, stage, example)
        both = sorted(set(before) & set(after))
        if both:
            raise ConfigError(f"layer {both[0]!r} runs before the stage {stage!r} and after it: name an earlier stage")
        self._paths = [stage, *after]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, "branches"))
            for path in self._paths:
                own = self.net.get_submodule(path)
                _put(self.net, path, _Fan([own, *(fresh(own) for _ in range(branches - 1))], path == stage))
        try:
            with torch.no_grad():
                self.net.eval()
                found = self(example)
        except (RuntimeError, ValueError) as cause:
            raise ConfigError(
                f"the model cannot be branched at {stage!r}: a path around the stage meets what comes after it ({cause})"
            ) from cause
        if found.shape[:2] != (branches, len(example)):
            raise ConfigError(
                f"the model branched at {stage!r} gives {list(found.shape)}: it must keep the batch first"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [branches, B, C]."""
        out: Tensor = self.net(x).unflatten(0, (self.branches, -1))
        return out

    @property
    def shared(self) -> Tensor:
        """What the trunk gave in the last pass, [B, ...]."""
        opening = self.net.get_submodule(self._paths[0])
        assert isinstance(opening, _Fan)
        found: Tensor | None = opening.shared
        assert found is not None
        return found

    def branch(self, number: int) -> nn.Module:
        """Return the model with one branch, in the form that it had."""
        shared = {self._paths[0]: self.net.get_submodule(self._paths[0])}
        for module in shared.values():
            assert isinstance(module, _Fan)
            module.shared = None  # belongs to a graph of gradients, which cannot be copied
        one = copy.deepcopy(self.net)
        for path in self._paths:
            fan = one.get_submodule(path)
            assert isinstance(fan, _Fan)
            _put(one, path, fan.copies[number])
        return one


def fresh(module: nn.Module) -> nn.Module:
    """Return a copy with newly drawn weights, from torch's stream.

    Weights of layers that cannot draw them anew are moved by noise of a tenth of their deviation.
    """
    other = copy.deepcopy(module)
    for part in other.modules():
        reset = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()
        else:
            with torch.no_grad():
                for weight in part.parameters(recurse=False):
                    deviation = weight.std() if weight.numel() > 1 else weight.abs().mean()
                    weight.add_(0.1 * deviation * torch.randn_like(weight))
    return other


def _order(net: nn.Module, stage: str, example: Tensor) -> tuple[list[str], list[str]]:
    """Return paths of layers with weights or buffers that run before the stage, and after it."""
    known = dict(net.named_modules())
    if stage not in known or stage == "":
        raise ConfigError(unknown_path(stage, [name for name in known if name]))
    inside = {id(m) for m in known[stage].modules()}
    calls: list[str] = []

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            calls.append(path)

        return hook

    holders = {
        path: module
        for path, module in known.items()
        if path and id(module) not in inside
        and (any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)))
    }  # fmt: skip
    handles = [m.register_forward_hook(note(path)) for path, m in {**holders, stage: known[stage]}.items()]
    try:
        with torch.no_grad():
            net.eval()
            net(example)
    finally:
        for handle in handles:
            handle.remove()
    if calls.count(stage) != 1:
        raise ConfigError(f"the stage {stage!r} runs {calls.count(stage)} times in a pass: it must run once")
    place = calls.index(stage)
    return list(dict.fromkeys(calls[:place])), list(dict.fromkeys(calls[place + 1 :]))


def _put(net: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent) if parent else net, name, module)


class Gate(nn.Module):
    """Weights of the branches by record, softmax(ReLU(BN(FC(features)))) [B, branches] (ONE, section 3.2)."""

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(width, branches), nn.BatchNorm1d(branches), nn.ReLU())

    def forward(self, shared: Tensor) -> Tensor:
        out: Tensor = self.score(pooled(shared)).softmax(-1)
        return out


def pooled(features: Tensor) -> Tensor:
    """Return features [B, D]: maps are averaged over positions."""
    return features.mean(tuple(range(2, features.dim()))) if features.dim() > 2 else features


# ---- training -------------------------------------------------------------------------------------------------------
@dataclass
class Taught:
    """What online distillation leaves: the ``deployed`` model, in the form of the one given, all ``members``, the log.

    ``ensemble``: inputs [B, ...] -> class probabilities [B, C] of all members together (by the gate, in ONE).
    """

    deployed: nn.Module
    members: list[nn.Module]
    ensemble: Callable[[Tensor], Tensor]
    log: list[Epoch]


def one(
    model: nn.Module,
    stage: str,
    data: Records,
    *,
    branches: int = 3,
    temperature: float = 3.0,
    ramp: int = 80,
    fit: Fit | None = None,
    seed: int = 1,
    checkpoint: Path | None = None,
    watch: Callable[[Epoch], None] | None = None,
) -> Taught:
    """Train branches of one net by their gated ensemble; the first branch is deployed.

    X. Lan, X. Zhu, S. Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018,
    https://arxiv.org/abs/1806.04606, eq. (3)-(8): sum_i CE(z_i) + CE(z_e) + r(t) T^2 sum_i KL(z_e || z_i), where the
    gradient of the last part reaches the branches alone. ``ramp``: epochs of r(t) = exp(-5 (1 - t / ramp)^2), 80 of 300
    published. ``checkpoint``, ``watch``: see :meth:`fedkd.distill.loop.Loop.run`.
    """
    y = _labels(data)
    net = Branches(model, stage, branches, data.x(np.arange(2)), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "gate"))
        gate = Gate(pooled(net.shared).shape[1], branches)
    rise = SigmoidRamp(ramp)

    def step(batch: Batch) -> dict[str, tuple[Tensor, float]]:
        logits, labels = net(data.x(batch.index)), y[torch.from_numpy(batch.index)]
        own, mixed, teach = gated_losses(logits, gate(net.shared), labels, temperature)
        return {"branches": (own, 1.0), "ensemble": (mixed, 1.0), "distillation": (teach, rise(batch.epoch))}

    loop = Loop({"net": net, "gate": gate}, data.size, step, fit=fit or Fit(), seed=seed)
    log = loop.run(checkpoint=checkpoint, watch=watch)
    gate.eval()
    net.eval()

    def ensemble(x: Tensor) -> Tensor:
        with torch.no_grad():
            logits = net(x)
            mixed: Tensor = (gate(net.shared).T.unsqueeze(-1) * logits).sum(0)
        return mixed.softmax(-1)

    members = [net.branch(i) for i in range(branches)]
    return Taught(members[0], members, ensemble, log)


def gated_losses(logits: Tensor, gates: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ONE's three sums: sum_i CE(z_i), CE(z_e) and T^2 sum_i KL(z_e || z_i) with z_e = sum_i g_i z_i.

    Args:
        logits: z [branches, B, C]. gates: g [B, branches], which sum to 1. labels: [B].
        temperature: T of the third.
    """
    kd, ce = KD(temperature=temperature), CrossEntropy()
    together = (gates.T.unsqueeze(-1) * logits).sum(0)
    own = torch.stack([ce(z, z, labels) for z in logits]).sum()
    teach = torch.stack([kd(z, together.detach()) for z in logits]).sum()
    return own, ce(together, together, labels), teach


def mutual(
    model: nn.Module,
    data: Records,
    *,
    stage: str | None = None,
    peers: int = 2,
    temperature: float = 1.0,
    others: Sequence[nn.Module] = (),
    fit: Fit | None = None,
    seed: int = 1,
    checkpoint: Path | None = None,
    watch: Callable[[Epoch], None] | None = None,
) -> Taught:
    """Train peers by labels and by each other's answers; the first is deployed.

    Y. Zhang, T. Xiang, T. Hospedales, H. Lu, "Deep Mutual Learning", CVPR 2018, https://arxiv.org/abs/1706.00384, eq. (4)
    and (6): CE + mean over the other peers of KL(p_other || p_own), T = 1. Deviation: all peers step together on answers
    of the same moment, where algorithm 1 lets them step in turn.

    Args:
        model: the first peer; the others start from fresh weights.
        stage: where peers part, sharing what lies before (see :class:`Branches`); None for peers that share nothing.
        others: peers of other architectures, in place of copies; not together with ``stage``.
        checkpoint, watch: see :meth:`fedkd.distill.loop.Loop.run`.
    """
    y = _labels(data)
    if others and stage is not None:
        raise ConfigError("peers of other architectures share no trunk: give `others` or `stage`, not both")
    net: nn.Module
    if stage is not None:
        net = Branches(model, stage, peers, data.x(np.arange(2)), seed)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, "peers"))
            copies = [copy.deepcopy(model), *(others or (fresh(model) for _ in range(peers - 1)))]
        net = nn.ModuleList(copies)
        if len(copies) < 2:
            raise ConfigError("deep mutual learning needs at least 2 peers")
    kd, ce = KD(temperature=temperature), CrossEntropy()

    def answers(x: Tensor) -> list[Tensor]:
        return list(net(x)) if isinstance(net, Branches) else [peer(x) for peer in net]

    def step(batch: Batch) -> dict[str, tuple[Tensor, float]]:
        logits, labels = answers(data.x(batch.index)), y[torch.from_numpy(batch.index)]
        own = torch.stack([ce(z, z, labels) for z in logits]).sum()
        pairs = [kd(a, b.detach()) for i, a in enumerate(logits) for j, b in enumerate(logits) if i != j]
        return {"labels": (own, 1.0), "peers": (torch.stack(pairs).sum() / (len(logits) - 1), 1.0)}

    loop = Loop({"net": net}, data.size, step, fit=fit or Fit(), seed=seed)
    log = loop.run(checkpoint=checkpoint, watch=watch)
    net.eval()

    def ensemble(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.stack([F.softmax(z, -1) for z in answers(x)]).mean(0)

    members = [net.branch(i) for i in range(peers)] if isinstance(net, Branches) else list(net)
    return Taught(members[0], members, ensemble, log)


def _labels(data: Records) -> Tensor:
    if data.y is None or data.size < 2:
        raise ConfigError("students without a teacher need labelled records, at least 2")
    if bool((data.y == UNKNOWN).any()):
        raise ConfigError("students without a teacher need a label of every record: leave out those that have none")
    return data.y
