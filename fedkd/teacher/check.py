"""How far a caller could copy a teacher: students taught by its answers alone, against the number of queries.

Each cell of the table is a student of its own, taught under one defence, by one way of making inputs, with one number of
queries, over several seeds; all take equally many steps. ``ideal`` and ``dfme`` are data-free methods for a black box,
``noise`` asks about pure noise, ``other`` about inputs of another data set, where one is given. The answers pass through
what the service itself would do to them (:class:`fedkd.teacher.answers.Answers`).

These are the attacks that we know and have made small enough to run at once. A patient caller does better: the table
refutes a claim of safety and never proves one.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

from fedkd.data import DataConfig
from fedkd.data import load as load_data
from fedkd.distill.datafree import AnswersGuide, DataFree, Form
from fedkd.distill.datafree.catalogue import build
from fedkd.distill.distiller import Distiller, accuracy
from fedkd.distill.inputs import unlabelled
from fedkd.distill.loop import Fit, Records
from fedkd.distill.run import records
from fedkd.distill.teachers import Teacher, log_probabilities
from fedkd.distill.terms import Term
from fedkd.errors import ConfigError
from fedkd.experiment import build as build_section
from fedkd.losses import KD
from fedkd.models import Architecture
from fedkd.seeding import key, numpy_rng
from fedkd.teacher.accounts import OverBudget, content_hashes
from fedkd.teacher.answers import Answers
from fedkd.teacher.policy import AnswersConfig, CallerConfig, load_policy

DEFENCES: Mapping[str, AnswersConfig] = {
    "none": AnswersConfig(),
    "2 decimals": AnswersConfig(decimals=2),
    "1 decimal": AnswersConfig(decimals=1),
    "largest 2": AnswersConfig(top_k=2),
    "noise 0.1": AnswersConfig(noise=0.1),
    "top-1": AnswersConfig(kind="top1"),
}
"""Defences that are tried beside the policy's own."""

BATCH = 64
"""Inputs of a student's step."""
FIT = Fit(batch_size=BATCH, optimizer="adam", lr=1e-2, weight_decay=0.0, schedule="cosine")
"""How copies are trained. Adam, because SGD at one rate for all defences lets some students die at once."""
ROUNDS = 40
"""Batches of inputs that `ideal` makes, whatever the number of queries."""
ANYBODY = CallerConfig(name="caller", certificate="caller")
"""A caller without a budget."""


class GuardedTeacher(Teacher):
    """A teacher as a caller hears it under a policy: less exact answers, remembered by content, up to a budget.

    Args:
        caller: whose budgets hold.
        folder: of the ledgers, where the policy has ``answers.privacy``.
    """

    def __init__(
        self, teacher: Teacher, shape: tuple[int, ...], how: AnswersConfig, caller: CallerConfig, folder: Path
    ) -> None:
        self.shape, self.classes, self.identity = shape, teacher.classes, teacher.identity + how.model_dump_json()
        self._answers, self._caller = Answers(teacher, how, folder), caller
        self._known: dict[bytes, np.ndarray[Any, np.dtype[np.float32]]] = {}

    @property
    def asked(self) -> int:
        """Different inputs answered so far: what a service would charge."""
        return len(self._known)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logarithms of the probabilities that the caller sees, [B, C].

        Raises:
            OverBudget: the inputs not asked before are more than the caller's budget leaves; nothing is charged.
        """
        rows = np.ascontiguousarray(x.detach().float().cpu().numpy())
        names = content_hashes(rows)
        fresh = {name: i for i, name in reversed(list(enumerate(names))) if name not in self._known}
        if fresh:
            limit = self._caller.queries
            if limit is not None and self.asked + len(fresh) > limit:
                raise OverBudget(
                    f"{len(fresh)} new inputs asked, {limit - self.asked} of {limit} are left to {self._caller.name}"
                )
            self._answers.charge(self._caller, len(fresh))
            self._known |= dict(zip(fresh, self._answers.make(rows[list(fresh.values())]), strict=True))
        return log_probabilities(np.stack([self._known[name] for name in names]), x.dtype)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is tried.

    Args:
        teacher: the owner's, exact.
        form: of its inputs.
        test: labelled records that measure the students.
        student: the architecture that the caller trains.
        defences: name -> answers.
        attacks: names of :data:`ATTACKS`, ``noise`` and ``other``, or ``package.module:Class`` of a method for a black box.
        queries: numbers of queries, each a column.
        seeds: of the students.
        steps: of every student, on batches of 64; ``dfme`` takes as many as its queries pay for.
        other: inputs [N, *shape] of another data set, for ``other``.
        caller: whose budgets hold.
    """

    teacher: Teacher
    form: Form
    test: Records
    student: str
    defences: Mapping[str, AnswersConfig]
    attacks: Sequence[str] = ("ideal", "noise")
    queries: Sequence[int] = (250, 1000, 4000)
    seeds: Sequence[int] = (1, 2, 3)
    steps: int = 800
    other: Tensor | None = None
    caller: CallerConfig = ANYBODY

    def __post_init__(self) -> None:
        if "other" in self.attacks and self.other is None:
            raise ConfigError("`other` asks about inputs of another data set: name their file or folder")
        if not self.queries or min(self.queries) < 2 * ROUNDS:
            raise ConfigError(f"numbers of queries are {list(self.queries)}, expected at least {2 * ROUNDS} each")
        if self.steps < ROUNDS:
            raise ConfigError(f"students take {self.steps} steps, expected at least {ROUNDS}")
        if self.other is not None and len(self.other) < max(self.queries) and "other" in self.attacks:
            raise ConfigError(f"{max(self.queries)} queries need as many other inputs; there are {len(self.other)}")


def check(plan: Plan, watch: Callable[[dict[str, Any]], None] = lambda row: None) -> list[dict[str, Any]]:
    """Return a row per defence and attack, told to ``watch`` as soon as it is there.

    A row has ``defence``, ``attack``, ``answers`` (accuracy of the answers themselves: what the defence costs an honest
    caller), and ``students``: for each number of queries the accuracies by seed, or None where the policy refuses so many,
    and the queries that were charged.
    """
    rows = []
    for name, how in plan.defences.items():
        with _guarded(plan, how) as honest:
            served = accuracy(honest, plan.test) if how.privacy is None else None
        for attack in plan.attacks:
            students = []
            for queries in plan.queries:
                runs = [_copy(plan, how, attack, queries, seed) for seed in plan.seeds]
                known = [r for r in runs if r is not None]
                students.append(
                    {
                        "queries": queries,
                        "charged": max((r[1] for r in known), default=0),
                        "accuracy": [r[0] for r in known] if len(known) == len(runs) else None,
                    }
                )
            row = {"defence": name, "attack": attack, "answers": served, "students": students}
            rows.append(row)
            watch(row)
    return rows


@contextmanager
def _guarded(plan: Plan, how: AnswersConfig, limited: bool = False) -> Iterator[GuardedTeacher]:
    caller = plan.caller if limited else plan.caller.model_copy(update={"queries": None})
    with tempfile.TemporaryDirectory() as ledgers:
        yield GuardedTeacher(plan.teacher, plan.form.shape, how, caller, Path(ledgers))


def _copy(plan: Plan, how: AnswersConfig, attack: str, queries: int, seed: int) -> tuple[float, int] | None:
    """Teach one student; return its accuracy and the queries charged, or None where the budget is less."""
    architecture = Architecture(plan.student, plan.form.shape, plan.form.classes, torch.float32)
    student = architecture.module(architecture.initial(key(seed, "initial", "student", plan.student)))
    with _guarded(plan, how, limited=True) as teacher:
        try:
            if attack in ("noise", "other"):
                _on_inputs(plan, teacher, how, student, _inputs(plan, attack, queries, seed), seed)
            else:
                _without_inputs(plan, teacher, how, student, attack, queries, seed)
        except OverBudget:
            return None
        return accuracy(student, plan.test), teacher.asked


def _inputs(plan: Plan, attack: str, queries: int, seed: int) -> Tensor:
    if attack == "noise":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(seed, "check", "noise"))
            return plan.form.noise(queries)
    assert plan.other is not None
    chosen = numpy_rng(seed, "check", "other").permutation(len(plan.other))[:queries]
    return plan.other[torch.from_numpy(chosen)]


def _on_inputs(
    plan: Plan, teacher: GuardedTeacher, how: AnswersConfig, student: nn.Module, x: Tensor, seed: int
) -> None:
    fit = dataclasses.replace(FIT, epochs=math.ceil(plan.steps * BATCH / len(x)))
    term = Term(KD(temperature=_temperature(how)), 1.0)
    Distiller(student, teacher, [term], fit=fit, seed=seed).fit(x)


def _without_inputs(
    plan: Plan, teacher: GuardedTeacher, how: AnswersConfig, student: nn.Module, attack: str, queries: int, seed: int
) -> None:
    section, fit = _scaled(attack, plan, how, queries)
    method = build(section)
    price = method.queries_per_epoch(fit)
    if method.looks_inside or price is None:
        raise ConfigError(f"{attack} is no method for a black box that tells its price in queries: take ideal or dfme")
    if price > queries:
        raise ConfigError(f"{attack} asks {price:,} inputs in its first epoch, and {queries:,} are to be spent")
    fit = dataclasses.replace(fit, epochs=queries // price)
    DataFree(student, AnswersGuide(teacher), method, plan.form, fit=fit, seed=seed, keep=queries).run()


def _scaled(attack: str, plan: Plan, how: AnswersConfig, queries: int) -> tuple[dict[str, Any], Fit]:
    """Return a method's section and fit, scaled down for two CPU cores where the method is one of ours."""
    fit = FIT
    if attack == "ideal":
        steps = plan.steps // ROUNDS
        return {
            "name": attack, "batch_size": queries // ROUNDS, "steps": 10, "width": 8, "generator_lr": 3e-3,
            "shift": max(1, plan.form.shape[-1] // 7),
            "student_steps": steps, "most_steps": steps, "temperature": _temperature(how),
        }, fit  # fmt: skip
    if attack == "dfme":
        turn = BATCH * (1 + 1 + 5)
        section = {"name": attack, "batch_size": BATCH, "width": 8, "generator_lr": 1e-3, "anneal": True}
        return {**section, "makes_per_epoch": max(1, queries // (20 * turn))}, fit
    return {"name": attack}, build(attack).fit


def _temperature(how: AnswersConfig) -> float:
    """Return the temperature that a caller takes: soft labels tell more at 4, and one-hot ones nothing."""
    hard = how.kind == "top1" or (how.privacy is not None and how.privacy.kind == "votes")
    return 1.0 if hard else 4.0


def plan(
    teacher: Teacher,
    shape: tuple[int, ...],
    data: str,
    *,
    student: str,
    policy: Path | None,
    defences: str,
    attacks: Sequence[str],
    queries: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    other: Path | None,
) -> Plan:
    """Return the plan that a person describes in words: see `fedkd teacher check --help`.

    Raises:
        ConfigError: unknown names, or data that do not fit the teacher.
    """
    wanted = list(DEFENCES) if defences == "all" else defences.split(",")
    unknown = [name for name in wanted if name not in DEFENCES]
    if unknown:
        raise ConfigError(f"no defence is named {', '.join(unknown)}; known are {', '.join(DEFENCES)}")
    tried, caller = {name: DEFENCES[name] for name in wanted}, ANYBODY
    if policy is not None:
        rules = load_policy(policy)
        caller = rules.callers[0]
        tried = {f"{policy.name} for {caller.name}": rules.answers, **tried}
    chosen = {"source": "npz", "path": data} if data.endswith(".npz") else {"source": data}
    split = load_data(build_section(DataConfig, chosen), 0)
    if split.test.shape != shape or split.test.classes != teacher.classes:
        raise ConfigError(
            f"the teacher takes {list(shape)} and knows {teacher.classes} classes, {data} has {list(split.test.shape)} and "
            f"{split.test.classes}"
        )
    low, high = split.train.bounds or (None, None)
    inputs = None
    if other is not None:
        found = unlabelled(other, shape)
        inputs = found.x(np.arange(found.size))
    return Plan(
        teacher=teacher, form=Form(shape=shape, classes=teacher.classes, low=low, high=high), test=records(split.test),
        student=student, defences=tried, attacks=attacks, queries=queries, seeds=seeds, steps=steps, other=inputs,
        caller=caller,
    )  # fmt: skip


def table(made: Plan, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of :func:`check` for a terminal."""
    found = Table(box=None, caption="% of the test set: the answers themselves, and students copied by so many queries")
    for title in ("defence", "answers", "attack", *(f"{q:,}" for q in made.queries)):
        found.add_column(title)
    for row in rows:
        found.add_row(*cells(row))
    return found


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row of :func:`check` as text: defence, accuracy of its answers, attack, accuracy of the students."""
    served = "-" if row["answers"] is None else f"{100 * row['answers']:.1f}"
    students = [spread(s["accuracy"]) if s["accuracy"] is not None else "refused" for s in row["students"]]
    return [row["defence"], served, row["attack"], *students]


def spread(values: Sequence[float]) -> str:
    """Return mean ± deviation in percent."""
    deviation = f"±{100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{deviation}"
