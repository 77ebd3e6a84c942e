"""A run of central distillation: a folder on disk, resume, the student alone for comparison, and the summary."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedkd.data import DataConfig
from fedkd.data import load as load_data
from fedkd.data.dataset import Dataset
from fedkd.distill.assistants import between
from fedkd.distill.cache import data_identity
from fedkd.distill.config import (
    DistillExperiment,
    ExemplarsConfig,
    FitConfig,
    OnlineConfig,
    ScenesConfig,
    TeacherConfig,
)
from fedkd.distill.crossmodal import Pairs, Side, pairs, partners
from fedkd.distill.distiller import Distiller, accuracy
from fedkd.distill.inputs import unlabelled
from fedkd.distill.loop import FEED, Epoch, Fit, Records, still
from fedkd.distill.stages import Stages, Watch
from fedkd.distill.taps import Taps
from fedkd.distill.tasks import Classify, Detect, Segment, drawn
from fedkd.distill.teachers import EnsembleTeacher, ModuleTeacher, Teacher, load_teacher, read_note
from fedkd.distill.terms import Term
from fedkd.errors import ConfigError
from fedkd.experiment import build, read_yaml
from fedkd.hardware import device
from fedkd.losses import KD
from fedkd.seeding import key, numpy_rng
from fedkd.simulate import git_revision, versions
from fedkd.storage import pack_tensors, write_atomic, write_json

if TYPE_CHECKING:
    from fedkd.distill.datafree import Synthesizer

CONFIG, SUMMARY, STUDENT, POOL = "config.yaml", "summary.json", "student.safetensors", "pool.npz"


@dataclass(frozen=True)
class Distilled:
    """A run's folder and its summary."""

    folder: Path
    summary: Mapping[str, Any]


def start(experiment: DistillExperiment, folder: Path, watch: Watch | None = None) -> Distilled:
    """Run ``experiment`` into a new folder.

    Raises:
        ConfigError: the folder holds a run already, or experiment, teacher and data do not fit.
    """
    if (folder / CONFIG).exists():
        raise ConfigError(f"{folder} holds a run already: go on with --resume, or choose another --out")
    work = _work(experiment, folder, watch)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / CONFIG, experiment.dump().encode())
    try:
        return work()
    except ConfigError:
        # Refused before anything was learnt: nothing is there to go on with, and the folder may be used again.
        if not any((folder / "checkpoints").glob("*")):
            (folder / CONFIG).unlink()
        raise


def resume(folder: Path, watch: Watch | None = None) -> Distilled:
    """Go on with an interrupted run, or return it if it is finished.

    Raises:
        ConfigError: the folder holds no run.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} holds no run: expected a {CONFIG} in it")
    if (folder / SUMMARY).is_file():
        return Distilled(folder, json.loads((folder / SUMMARY).read_text()))
    return _work(build(DistillExperiment, read_yaml(folder / CONFIG)), folder, watch)()


def resume_same(experiment: DistillExperiment, folder: Path, watch: Watch | None = None) -> Distilled:
    """Go on with the run of ``experiment`` in ``folder``; start it if there is none yet.

    Raises:
        ConfigError: the folder holds a run of another experiment.
    """
    if not (folder / CONFIG).exists():
        return start(experiment, folder, watch)
    if build(DistillExperiment, read_yaml(folder / CONFIG)) != experiment:
        raise ConfigError(
            f"{folder} holds a run of another experiment: its own words are in {folder / CONFIG}; go on with --resume "
            f"{folder}"
        )
    return resume(folder, watch)


def _work(experiment: DistillExperiment, folder: Path, watch: Watch | None) -> Callable[[], Distilled]:
    if experiment.graph is not None:
        return _on_graph(experiment, folder, watch)
    return _Work(experiment, folder, watch).run


def _on_graph(experiment: DistillExperiment, folder: Path, watch: Watch | None) -> Callable[[], Distilled]:
    """Make ready what teaches on a graph: whatever does not fit is refused before anything is written."""
    from fedkd.graphs.taught import METRICS, GraphWork, teaching

    config = experiment.graph
    assert config is not None and experiment.teacher[0].model is not None
    work = GraphWork(**dict(config))
    teach = teaching(work, experiment.student, experiment.teacher[0].model, experiment.seed, experiment.alone)

    def run() -> Distilled:
        began = time.perf_counter(), time.process_time()
        found = teach(Stages(folder, watch))
        summary = {
            "schema": 1,
            "kind": "distill",
            "name": experiment.name,
            "seed": experiment.seed,
            "metric": METRICS[work.task],
            "accuracy": dict(found.scores),
            "agreement": None,
            "accuracy_by_class": {},
            "parameters": dict(found.sizes),
            "log": [vars(e) for e in found.log],
        }
        note = {"graph": work.task, **found.made_of}
        write_atomic(folder / STUDENT, pack_tensors(found.student.state_dict(), {"fedkd": json.dumps(note)}))
        return _written(folder, summary, began)

    return run


def _written(folder: Path, summary: dict[str, Any], began: tuple[float, float]) -> Distilled:
    """Write the summary; ``began``: seconds by the clock and of the processor."""
    summary |= {"seconds": time.perf_counter() - began[0], "cpu_seconds": time.process_time() - began[1]}
    summary |= {"versions": versions(), "git_revision": git_revision()}
    write_json(folder / SUMMARY, summary)
    return Distilled(folder, summary)


class _Work:
    def __init__(self, experiment: DistillExperiment, folder: Path, watch: Watch | None) -> None:
        self.experiment, self.folder, self.stages = experiment, folder, Stages(folder, watch)
        self.full: Records | None = None
        self.train: Records | None = None
        self.pairs: Pairs | None = None
        self.class_names: tuple[str, ...] = ()
        self.bounds: tuple[float, float] | None = None
        # A teacher that is there already tells the form of inputs that nobody described.
        told = experiment.inputs is not None or experiment.data is None
        self.ready = [self._found(config) for config in experiment.teacher] if told else []
        self.task: Classify | Segment | Detect
        if experiment.scenes is not None:
            self._scenes(experiment.scenes)
        elif not told:
            self._labelled()
        else:
            form = next((t.shape for t in self.ready if t is not None and t.shape is not None), None)
            if experiment.inputs is not None:
                self.train = unlabelled(experiment.inputs, form)
                form = tuple(self.train.x(np.zeros(1, np.int64)).shape[1:])
            if form is None:
                raise ConfigError("the teacher does not say what shape its inputs have: give labelled `data` beside it")
            self.task = Classify(form, next(t.classes for t in self.ready if t is not None))
            self.bounds = _bounds_told(experiment.teacher, form)
        self.teaching = self.task
        if experiment.partner is not None:
            self._paired(experiment.partner)
        if experiment.known is not None:
            self._forget(experiment.known)
        if experiment.method is not None:
            self.train = None
        # Built before anything is trained, so that a wrong name costs nothing.
        self.student = self._model(self.task, experiment.student, "student")
        if experiment.exemplars is not None:
            Taps(self.student, [experiment.exemplars.layer])
        self._try_assistants()
        self._try()

    def _try(self) -> None:
        """Refuse terms that do not fit student, teachers and data, before a teacher is trained for them."""
        experiment = self.experiment
        special = experiment.method or experiment.online or experiment.exemplars or experiment.assistants
        if special or self.train is None or any(t.path or t.url or t.model is None for t in experiment.teacher):
            return
        fresh = [self._model(self.teaching, t.model, "tried") for t in experiment.teacher if t.model is not None]
        found: list[Teacher] = [ModuleTeacher(m, self.teaching.classes, self.teaching.shape) for m in fresh]
        if self.pairs is not None:
            found = [self._side(t, self.pairs) for t in found]
        seen = self.train if self.pairs is None else self.pairs.records
        self._distiller(self._as_one(found), None).ready(seen)

    def _try_assistants(self) -> None:
        """Refuse assistants that cannot be made, before a teacher is trained for them."""
        wanted, first = self.experiment.assistants, self.experiment.teacher[0].model
        if wanted != "auto":
            for name in wanted:
                self._model(self.task, name, "tried")
        elif first is not None:
            between(first, self.experiment.student, self.task.shape, self.task.classes)

    def _as_one(self, teachers: Sequence[Teacher]) -> Teacher:
        """Return the teachers as one."""
        weights = [config.weight for config in self.experiment.teacher]
        members = list(zip(teachers, weights, strict=True))
        return teachers[0] if len(teachers) == 1 else EnsembleTeacher(members, self.experiment.mix)

    def _distiller(self, teacher: Teacher, cache: Path | None) -> Distiller:
        """Return what teaches the student by the experiment's terms."""
        experiment, terms = self.experiment, [t.term for t in self.experiment.chosen]
        if self.pairs is not None:
            # A wrong layer is told by the experiment's own words, which do not know of the wrapping.
            Taps(self.student, [p for t in terms for p in t.student_paths])
            if isinstance(teacher, ModuleTeacher) and isinstance(teacher.module, Side):
                Taps(teacher.module.inner, [p for t in terms for p in t.teacher_paths])
            terms = [t.below("inner") for t in terms]
        return Distiller(
            self._seeing(self.student), teacher, terms, fit=experiment.training.fit, seed=experiment.seed, cache=cache
        )

    def _labelled(self) -> None:
        experiment = self.experiment
        assert experiment.data is not None
        split = load_data(experiment.data, experiment.seed)
        self.task = Classify(split.train.shape, split.train.classes, records(split.test))
        self.class_names = split.train.class_names
        if any(c >= self.task.classes for c in experiment.omit):
            raise ConfigError(
                f"omit names class {max(experiment.omit)}, the data have classes 0 to {self.task.classes - 1}"
            )
        self.bounds = split.train.bounds
        self.full = records(split.train)
        if experiment.exemplars is not None:
            _enough(experiment.exemplars, np.bincount(split.train.y, minlength=self.task.classes))
            old = np.isin(split.train.y, experiment.exemplars.old)
            self.full, self.train = (records(split.train.select(np.flatnonzero(part))) for part in (old, ~old))
            return
        seen = np.flatnonzero(~np.isin(split.train.y, experiment.omit))
        self.train = records(split.train.select(seen)) if experiment.omit else self.full
        if not experiment.labels:
            self.train = Records(size=self.train.size, x=self.train.x, identity=self.train.identity)

    def _scenes(self, config: ScenesConfig) -> None:
        experiment = self.experiment
        assert experiment.data is not None
        split = load_data(experiment.data, experiment.seed)
        counts = config.teacher, config.student, config.test
        full, train, test = drawn(split, config.canvas, counts, experiment.seed, config.most)
        kind, shape = (Segment if config.task == "segment" else Detect), (1, config.canvas, config.canvas)
        self.task = kind(shape, split.train.classes + (config.task == "segment"), test)
        self.full, self.train = kind.records(full), kind.records(train)

    def _paired(self, config: DataConfig) -> None:
        """Give every record of the student a partner of the teacher's kind and of its class."""
        split = load_data(config, self.experiment.seed)
        if split.train.classes != self.task.classes:
            raise ConfigError(
                f"data have {self.task.classes} classes, partner has {split.train.classes}: classes are what pairs them"
            )
        assert self.train is not None and self.train.y is not None
        self.teaching = Classify(split.train.shape, split.train.classes, records(split.test))
        self.full = records(split.train)
        assert self.full.y is not None
        there = partners(self.train.y, self.full.y, numpy_rng(self.experiment.seed, "partners"))
        own = self.train.x(np.arange(self.train.size))
        self.pairs = pairs(own, self.full.x(there), self.train.y)

    def _forget(self, each: int) -> None:
        """Take from the student's records every label but those of ``each`` records of a class."""
        assert self.train is not None
        # One draw for both: the same records keep their labels.
        seed = self.experiment.seed
        self.train = self.train.knowing(each, numpy_rng(seed, "known"))
        if self.pairs is not None:
            self.pairs = replace(self.pairs, records=self.pairs.records.knowing(each, numpy_rng(seed, "known")))

    def run(self) -> Distilled:
        began = time.perf_counter(), time.process_time()
        experiment = self.experiment
        if experiment.online is not None:
            return self._mutual(experiment.online)
        teachers = [self._teacher(i, config) for i, config in enumerate(experiment.teacher)]
        teacher = self._as_one(teachers)
        measured = self.teaching.score(teacher), self._by_class(teacher, self.teaching)
        if self.pairs is not None:
            teacher = self._as_one([self._side(t, self.pairs) for t in teachers])
        if experiment.exemplars is not None:
            seen, log, beside = self._extend(teacher, experiment.exemplars)
        else:
            seen, log, beside = self._distil(teacher) if experiment.method is None else self._make(teacher)
        summary = {
            "schema": 1,
            "kind": "distill",
            "name": experiment.name,
            "seed": experiment.seed,
            "metric": self.task.metric,
            "accuracy": {"student": self.task.score(self.student), "teacher": measured[0], "alone": None},
            "agreement": None if experiment.scenes else agreement(self._seeing(self.student), teacher, seen),
            "accuracy_by_class": {"student": self._by_class(self.student, self.task), "teacher": measured[1]},
            "parameters": {"student": _size(self.student), "teacher": _teacher_size(teachers)},
            "log": [vars(e) for e in log],
            **beside,
        }
        # Counted last, when nothing more is asked.
        summary["paid"], summary["told"] = teacher.paid, teacher.told
        self._alone(summary)
        return self._finished(summary, began)

    def _alone(self, summary: dict[str, Any]) -> None:
        """Train the same student on labels alone, for as many steps, for comparison."""
        experiment = self.experiment
        if experiment.alone and self.train is not None and self.train.y is not None:
            alone = self._model(self.task, experiment.student, "student")
            lonely = Distiller(
                alone, None, [Term(self.task.labels, 1.0)], fit=experiment.training.fit, seed=experiment.seed
            )
            self._fit(lonely, self.train.labelled() if experiment.known else self.train, "alone", experiment.training)
            summary["accuracy"]["alone"] = self.task.score(alone)
            summary["accuracy_by_class"]["alone"] = self._by_class(alone, self.task)

    def _finished(self, summary: dict[str, Any], began: tuple[float, float]) -> Distilled:
        """Keep the student and the summary; ``began``: seconds by the clock and of the processor."""
        self._keep(self.student, self.experiment.student, self.folder / STUDENT, self.task)
        return _written(self.folder, summary, began)

    def _mutual(self, online: OnlineConfig) -> Distilled:
        """Teach without a teacher."""
        from fedkd.distill.online import mutual, one

        began = time.perf_counter(), time.process_time()
        experiment, how = self.experiment, self.experiment.training
        assert self.train is not None
        kept = self.stages.kept("student", how.epochs)
        if online.kind == "one":
            assert online.stage is not None
            taught = one(
                self.student, online.stage, self.train, branches=online.members, ramp=online.ramp,
                temperature=online.temperature or 3.0, fit=how.fit, seed=experiment.seed, **kept,
            )  # fmt: skip
        else:
            taught = mutual(
                self.student, self.train, stage=online.stage, peers=online.members,
                temperature=online.temperature or 1.0, fit=how.fit, seed=experiment.seed, **kept,
            )  # fmt: skip
        self.student = taught.deployed
        summary: dict[str, Any] = {
            "schema": 1,
            "kind": "distill",
            "name": experiment.name,
            "seed": experiment.seed,
            "metric": self.task.metric,
            "accuracy": {"student": self.task.score(self.student), "teacher": None, "alone": None},
            "members": [self.task.score(member) for member in taught.members],
            "agreement": None,
            "accuracy_by_class": {"student": self._by_class(self.student, self.task)},
            "parameters": {"student": _size(self.student), "teacher": None},
            "log": [vars(e) for e in taught.log],
        }
        self._alone(summary)
        return self._finished(summary, began)

    def _distil(self, teacher: Teacher) -> tuple[Records, list[Epoch], dict[str, Any]]:
        """Teach on records, through assistants if there are any; return records, log, and the summary's part."""
        experiment = self.experiment
        assert self.train is not None
        cache = self.folder / "answers" if experiment.cache else None
        helpers = []
        for i, name in enumerate(self._assistants(teacher)):
            teacher = self._assistant(i, name, teacher, cache)
            helpers.append(
                {"model": name, "parameters": _teacher_size([teacher]), "accuracy": self.task.score(teacher)}
            )
        seen = self.train if self.pairs is None else self.pairs.records
        distiller = self._distiller(teacher, cache)
        self._fit(distiller, seen, "student", experiment.training)
        return seen, distiller.log, {"assistants": helpers}

    def _extend(self, teacher: Teacher, config: ExemplarsConfig) -> tuple[Records, list[Epoch], dict[str, Any]]:
        """Teach new classes to a student that starts as the teacher of the old ones."""
        from fedkd.distill.exemplars import extend, features_of, nearest_mean, remember

        experiment, task = self.experiment, self.task
        assert self.train is not None and self.full is not None and isinstance(task, Classify)
        if not isinstance(teacher, ModuleTeacher):
            raise ConfigError("`exemplars` needs a teacher that is a torch model: the student starts as a copy of it")
        try:
            self.student.load_state_dict(teacher.module.state_dict())
        except RuntimeError as cause:
            raise ConfigError(
                f"the student starts as the teacher, and {experiment.student} is another model"
            ) from cause
        memory = None
        if config.kind != "none":
            memory = remember(
                teacher.module, config.layer, self.full, config.per_class, kind=config.kind, group=config.group,
                steps=config.steps, bounds=self.bounds, seed=experiment.seed,
            )  # fmt: skip
        log = extend(
            self.student, teacher.module, self.train, memory, config.old, layer=config.layer, relation=config.relation,
            fit=experiment.training.fit, seed=experiment.seed,
            **self.stages.kept("student", experiment.training.epochs),
        )  # fmt: skip
        nearest = None
        if memory is not None and task.test is not None and task.test.y is not None:
            rule = nearest_mean(self.student, config.layer, memory, self.train, config.per_class, task.classes)
            found = rule(features_of(self.student, config.layer, task.test)).argmax(1)
            nearest = float((found == task.test.y).double().mean())
        return self.train, log, {"memory": config.kind, "nearest_mean": nearest}

    def _seeing(self, student: nn.Module) -> nn.Module:
        """Return the student as it sees the records of the training."""
        return student if self.pairs is None else self.pairs.student(student)

    def _side(self, teacher: Teacher, joined: Pairs) -> Teacher:
        if not isinstance(teacher, ModuleTeacher):
            raise ConfigError(
                f"partner needs teachers that are torch models, which a {type(teacher).__name__} is not: it could not be "
                "shown its side of a pair"
            )
        return ModuleTeacher(joined.teacher(teacher.module), teacher.classes)

    def _assistants(self, teacher: Teacher) -> list[str]:
        """Return the names of the nets between teacher and student, from large to small."""
        wanted = self.experiment.assistants
        if wanted != "auto":
            return list(wanted)
        size = _teacher_size([teacher])
        if size is None:
            raise ConfigError(
                "assistants=auto needs one teacher whose size is known, a torch model: name the assistants"
            )
        named = self.experiment.teacher[0].model
        return between(size if named is None else named, self.experiment.student, self.task.shape, self.task.classes)

    def _assistant(self, place: int, name: str, teacher: Teacher, cache: Path | None) -> Teacher:
        """Train one net of a chain by what its teacher answers; layers are compared at the student alone."""
        assert self.train is not None
        experiment, stage = self.experiment, f"assistant {place + 1}"
        model = self._model(self.task, name, stage)
        terms = [t.term for t in experiment.chosen if t.term.loss.reads != "features"]
        if all(t.loss.reads == "labels" for t in terms):
            terms.append(Term(KD(), 0.9 if terms else 1.0))
        distiller = Distiller(
            model,
            teacher,
            terms,
            fit=experiment.training.fit,
            seed=key(experiment.seed, stage) % 2**31,
            cache=cache,
        )
        self._fit(distiller, self.train, stage, experiment.training)
        self._keep(model, name, self.folder / f"assistant-{place + 1}.safetensors", self.task)
        return ModuleTeacher(model, self.task.classes, self.task.shape)

    def _make(self, teacher: Teacher) -> tuple[Records, list[Epoch], dict[str, Any]]:
        """Teach on inputs that are made from the teacher, keep those, and return them, the log, and the summary's part."""
        from fedkd.distill.datafree import DataFree, Form, guide
        from fedkd.distill.datafree.catalogue import build as build_method

        experiment = self.experiment
        assert experiment.method is not None
        bounds = (
            self.bounds if experiment.bounds == "auto" else None if experiment.bounds == "none" else experiment.bounds
        )
        form = Form.within(self.task.shape, self.task.classes, bounds)
        asked = guide(teacher)
        work = DataFree(
            self.student,
            asked,
            build_method(experiment.method),
            form,
            fit=experiment.training.fit,
            seed=experiment.seed,
            keep=experiment.pool,
            device=device(experiment.device, "device").type,
        )
        self._affordable(teacher, work.method, work.how)
        work.run(**self.stages.kept("student", experiment.training.epochs))
        queries = asked.queries
        self.student.to("cpu")
        asked.to("cpu")
        x = work.pool.x.cpu()
        told = torch.cat([teacher.logits(part) for part in x.split(FEED)])
        work.pool.save(self.folder / POOL, told)
        share = torch.bincount(told.argmax(1), minlength=self.task.classes) / len(told)
        beside = {
            "method": experiment.method,
            "queries": queries,
            "pool": {"file": POOL, "size": len(x), "share_by_class": share.tolist()},
            "bounds": bounds,
        }
        return Records.of(x), work.log, beside

    @staticmethod
    def _affordable(teacher: Teacher, method: Synthesizer, fit: Fit) -> None:
        """Refuse a run that asks for more than a service will answer, before a query is spent on it."""
        each, left = method.queries_per_epoch(fit), teacher.queries_left
        if not each or left is None:
            return
        # What an interrupted run has paid already is remembered, and free.
        left += teacher.paid or 0
        if each * fit.epochs > left:
            raise ConfigError(
                f"{method.name} asks {each:,} inputs in each of {fit.epochs:,} epochs, and the teacher answers {left:,} at "
                f"most: set training.epochs to {left // each}, or make the method's batches smaller"
            )

    def _teacher(self, place: int, config: TeacherConfig) -> Teacher:
        found = self.ready[place] if self.ready else self._found(config)
        if found is not None:
            task = self.teaching
            if found.classes != task.classes or (found.shape is not None and found.shape != task.shape):
                raise ConfigError(
                    f"the teacher takes inputs {list(found.shape or ())} and knows {found.classes} classes, the data have "
                    f"{list(task.shape)} and {task.classes}"
                )
            return found
        assert config.model is not None and self.full is not None
        stage = f"teacher {place + 1}"
        model = self._model(self.teaching, config.model, stage)
        trained = Distiller(
            model,
            None,
            [Term(self.teaching.labels, 1.0)],
            fit=config.training.fit,
            seed=key(self.experiment.seed, stage) % 2**31,
        )
        self._fit(trained, self.full, stage, config.training)
        self._keep(model, config.model, self.folder / f"teacher-{place + 1}.safetensors", self.teaching)
        return ModuleTeacher(model, self.teaching.classes, self.teaching.shape)

    def _found(self, config: TeacherConfig) -> Teacher | None:
        """Return a teacher that is there already; None for one that is to be trained."""
        if config.url is not None:
            from fedkd.teacher.client import RemoteTeacher

            return RemoteTeacher(config.url, self.folder / "answers" / "remote.sqlite")
        if config.path is None:
            return None
        # Of inputs without labels the teacher tells the form; labelled data have one that it must fit.
        task = getattr(self, "teaching", None)
        if task is None:
            return load_teacher(config.path, model=config.model, gives=config.gives)
        return load_teacher(config.path, task.shape, task.classes, config.model, config.gives, task.make)

    def _fit(self, distiller: Distiller, data: Records, stage: str, how: FitConfig) -> None:
        distiller.fit(data, **self.stages.kept(stage, how.epochs))

    def _model(self, task: Classify | Segment | Detect, name: str, stage: str) -> nn.Module:
        return task.make(name, key(self.experiment.seed, "initial", stage, name))

    def _by_class(self, model: nn.Module | Teacher, task: Classify | Segment | Detect) -> list[float | None]:
        found: list[float | None] = []
        test = task.test
        if not isinstance(test, Records) or test.y is None or (isinstance(model, Teacher) and model.priced):
            return found
        labels = test.y.numpy()
        for c in range(task.classes):
            rows = np.flatnonzero(labels == c)
            if not len(rows):
                found.append(None)
                continue
            part = Records(
                size=len(rows),
                x=lambda index, rows=rows: test.x(rows[index]),  # type: ignore[misc]
                y=torch.full((len(rows),), c),
            )
            found.append(accuracy(model, part))
        return found

    def _keep(self, model: nn.Module, name: str, path: Path, task: Classify | Segment | Detect) -> None:
        note = {"architecture": name, "shape": task.shape, "classes": task.classes, "class_names": self.class_names}
        note |= {"bounds": self.bounds}
        write_atomic(path, pack_tensors(dict(model.state_dict()), {"fedkd": json.dumps(note)}))


def records(data: Dataset) -> Records:
    """Return a data set as records for a distiller."""
    identity = data_identity([np.asarray(data.x)]) + repr(data.scaling)
    return Records(
        size=len(data),
        x=lambda index: torch.from_numpy(data.inputs(index)),
        y=torch.from_numpy(data.y),
        identity=identity,
    )


def _enough(config: ExemplarsConfig, counts: NDArray[np.int64]) -> None:
    """Refuse exemplars that data with ``counts`` [C] records of each class cannot give.

    Raises:
        ConfigError: classes are unknown, none is left to be learnt, or one has too few records.
    """
    classes = range(len(counts))
    if any(c not in classes for c in config.old):
        raise ConfigError(f"exemplars.old: the data have classes 0 to {len(counts) - 1}")
    if set(classes) <= set(config.old):
        raise ConfigError(
            "exemplars.old names every class of the data: leave out those that are to be learnt beside them"
        )
    for c in classes if config.kind != "none" else ():
        # Records of new classes are herded for the nearest mean, whatever stands for the old ones.
        made = config.kind == "synthetic" and c in config.old
        name, needed = ("group", config.group) if made else ("per_class", config.per_class)
        if counts[c] < needed:
            raise ConfigError(f"class {c} has {counts[c]} records, fewer than exemplars.{name}={needed}: lower it")


def _bounds_told(teachers: Sequence[TeacherConfig], shape: tuple[int, ...]) -> tuple[float, float] | None:
    """Return what the first file that speaks of bounds says, or 0 and 1 for images."""
    for config in teachers:
        note = read_note(config.path) if config.path is not None and config.path.suffix == ".safetensors" else {}
        if "bounds" in note:
            return None if note["bounds"] is None else (float(note["bounds"][0]), float(note["bounds"][1]))
    return (0.0, 1.0) if len(shape) == 3 else None


@torch.no_grad()
def agreement(student: nn.Module, teacher: Teacher, data: Records, most: int = 2000) -> float:
    """Return the share of (at most ``most``) inputs on which student and teacher choose one class."""
    index = np.linspace(0, data.size - 1, min(most, data.size)).astype(np.int64)
    same = 0
    with still(student):
        for start in range(0, len(index), FEED):
            x = data.x(index[start : start + FEED])
            same += int((student(x).argmax(1) == teacher.logits(x).argmax(1)).sum())
    return same / len(index)


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _teacher_size(teachers: list[Teacher]) -> int | None:
    sizes = [_size(t.module) for t in teachers if isinstance(t, ModuleTeacher)]
    return sum(sizes) if len(sizes) == len(teachers) else None
