"""DENSE as a user would write it: a method of its own file, outside the package, for `algorithm: draft_dense:DENSE`.

J. Zhang, C. Chen, B. Li, L. Lyu, S. Wu, S. Ding, C. Shen, C. Wu, "DENSE: Data-Free One-Shot Federated Learning", NeurIPS
2022, https://arxiv.org/abs/2112.12371.

Devices train once and send their weights (``rounds: 1``). The server makes inputs with a generator that minimises
CE(D(x), y) + lambda_1 · (batch-normalisation statistics) - lambda_2 · mean(1[argmax S != argmax D] · KL(D ‖ S)), with D
the mean of the devices' logits and S the student's; the best batch of every epoch joins a growing pool, on which the
student learns by KL at temperature T.

Deviations: tiny sizes; a sigmoid bounds the inputs, so it suits inputs within [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkd.algorithms.base import Algorithm, Answers, Heard, ServerState, ServerTools, View, with_model
from fedkd.errors import ConfigError
from fedkd.payloads import Bundle, Nothing, Payload, Weights

if TYPE_CHECKING:
    from fedkd.models import Architecture
    from fedkd.nets import Net


class Generator(nn.Module):
    """Noise [B, Z] -> inputs [B, channels, height, width] within [0, 1]."""

    def __init__(self, noise: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.size = shape[1] // 2, shape[2] // 2
        self.dense = nn.Linear(noise, 16 * self.size[0] * self.size[1])
        self.grow = nn.Sequential(
            nn.BatchNorm2d(16), nn.Upsample(scale_factor=2), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16),
            nn.LeakyReLU(0.2), nn.Conv2d(16, shape[0], 3, padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.grow(self.dense(z).view(-1, 16, *self.size))
        return out


class Statistics:
    """Sums how far the batches that enter a model's batch normalisation are from what it saw in training."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self.value: Tensor = torch.zeros([])
        norms = [m for model in models for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        self._handles = [norm.register_forward_pre_hook(self._look) for norm in norms]

    def _look(self, norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        var, mean = torch.var_mean(given[0], (0, 2, 3), correction=0)
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        self.value = self.value + (mean - norm.running_mean).norm() + (var - norm.running_var).norm()

    def take(self) -> Tensor:
        value, self.value = self.value, torch.zeros([])
        return value

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


@final
@dataclass(frozen=True, kw_only=True)
class DENSE(Algorithm):
    """One-shot distillation without data. See the module text."""

    name: ClassVar[str] = "dense"
    paper: ClassVar[str] = "Zhang et al., NeurIPS 2022"
    upload: ClassVar[type[Payload]] = Weights
    student: ClassVar[bool] = True

    epochs: int = 200
    generator_steps: int = 30
    student_steps: int = 50  # batches of the pool per epoch
    noise: int = 256  # width of z
    batch_size: int = 256
    statistics: float = 1.0  # lambda_1
    adversarial: float = 1.0  # lambda_2
    temperature: float = 20.0  # T of the student's loss
    student_lr: float = 0.005

    def check(self, architectures: Mapping[str, Architecture]) -> None:
        for name, architecture in architectures.items():
            if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in architecture.template.modules()):
                raise ConfigError(
                    f"dense matches batch-normalisation statistics, and model {name!r} has no such layer: use a model "
                    "with batch normalisation, such as cnn or resnet"
                )

    def answer(self, net: Net, view: View, heard: Heard) -> Payload:
        return Weights.from_tensors(net.weights)

    def aggregate(self, answers: Answers, server: ServerState, tools: ServerTools) -> Payload:
        return Bundle(parts={f"{a.card.id} {a.card.architecture}": a.payload for a in answers})

    def update(self, server: ServerState, knowledge: Payload, tools: ServerTools) -> ServerState:
        assert isinstance(knowledge, Bundle)
        teachers = [tools.module(n.split(" ", 1)[1], part.tensors()).eval() for n, part in knowledge.parts.items()]
        for parameter in (p for teacher in teachers for p in teacher.parameters()):
            parameter.requires_grad_(False)
        architecture, weights = server.models["student"]
        student = tools.module(architecture, weights)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(tools.seed("dense"))
            self._distil(student, teachers, tools)
        taught = {name: t.detach().clone() for name, t in student.state_dict().items()}
        return replace(with_model(server, "student", architecture, taught), knowledge=Nothing())

    def _distil(self, student: nn.Module, teachers: Sequence[nn.Module], tools: ServerTools) -> None:
        optimizer = torch.optim.SGD(student.parameters(), lr=self.student_lr, momentum=0.9)
        pool: list[tuple[Tensor, Tensor]] = []
        for _ in range(self.epochs):
            pool.append(self._synthesise(student, teachers, tools))
            student.train()
            for _ in range(self.student_steps):
                x, target = pool[int(torch.randint(len(pool), ()))]
                loss = _divergence(target / self.temperature, student(x) / self.temperature).mean()
                optimizer.zero_grad()
                (loss * self.temperature**2).backward()
                optimizer.step()

    def _synthesise(
        self, student: nn.Module, teachers: Sequence[nn.Module], tools: ServerTools
    ) -> tuple[Tensor, Tensor]:
        """Return the best batch of a fresh generator, and the teachers' mean logits of it."""
        dtype = next(student.parameters()).dtype
        generator = Generator(self.noise, tools.shape).to(dtype)
        z = torch.randn(self.batch_size, self.noise, dtype=dtype).requires_grad_(True)
        y = torch.randint(tools.classes, (self.batch_size,))
        optimizer = torch.optim.Adam([*generator.parameters(), z], lr=1e-3, betas=(0.5, 0.999))
        student.eval()
        watch, best, least = Statistics(teachers), None, float("inf")
        for _ in range(self.generator_steps):
            x = generator(z)
            told = torch.stack([teacher(x) for teacher in teachers]).mean(0)
            said = student(x)
            apart = (told.argmax(1) != said.argmax(1)).to(dtype)
            boundary = (apart * _divergence(told, said)).mean()
            right = F.cross_entropy(told, y)
            loss = right + self.statistics * watch.take() / len(teachers) - self.adversarial * boundary
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss.item() < least:
                least, best = loss.item(), (x.detach(), told.detach())
        watch.close()
        assert best is not None
        return best


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(softmax(teacher) ‖ softmax(student)) as [B]."""
    found: Any = F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none", log_target=True)
    total: Tensor = found.sum(1)
    return total
