"""An experiment of central distillation: YAML <-> a validated, frozen configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, field_validator, model_validator

from fedkd.data import DataConfig
from fedkd.data.config import Source
from fedkd.distill.loop import Fit
from fedkd.distill.terms import TermConfig
from fedkd.errors import ConfigError
from fedkd.experiment import Section, build, read_points


class FitConfig(Section):
    """How a model is trained: see `fedkd.distill.Fit`."""

    epochs: int = Field(20, ge=1)
    batch_size: int = Field(64, ge=2)
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(0.05, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(5e-4, ge=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = Field(0.1, gt=0, le=1)
    clip: float | None = Field(None, gt=0)

    @property
    def fit(self) -> Fit:
        """The trainer's settings."""
        return Fit(**self.model_dump())


class TeacherConfig(Section):
    """A teacher: a file, a service, or a model of the registry that is trained here first on the same data.

    `path`: .safetensors, .onnx, or a .pt/.pth state dict (read with weights_only=True).
    """

    path: Path | None = None
    url: str | None = Field(None, description="grpcs://host:port of `fedkd teacher serve`, with ?ca=FILE&token=FILE.")
    model: str | None = Field(None, description="Architecture; needed where no file names it.")
    gives: Literal["logits", "probabilities"] = Field("logits", description="What an ONNX file's output is.")
    weight: float = Field(1.0, ge=0, description="Weight among several teachers.")
    training: FitConfig = FitConfig()

    @model_validator(mode="after")
    def _something(self) -> TeacherConfig:
        if self.path is None and self.model is None and self.url is None:
            raise ConfigError(
                "a teacher needs `path`, a file, `url`, a service, or `model`, an architecture to be trained here first"
            )
        if self.url is not None and (self.path is not None or self.model is not None):
            raise ConfigError("a teacher is one thing: give `url` alone, or `path` and `model`")
        return self


class OnlineConfig(Section):
    """Students that teach each other, without a teacher: see `fedkd.distill.online`."""

    kind: Literal["one", "dml"] = Field("one", description="Gated branches of one net, or deep mutual learning.")
    stage: str | None = Field(
        None, description="The student's last stage, such as body.3; dml without it: peers that share nothing."
    )
    members: int = Field(3, ge=2, description="Branches or peers; the first is deployed.")
    temperature: float | None = Field(None, gt=0, description="null is the published one: 3 for one, 1 for dml.")
    ramp: int = Field(80, ge=1, description="one: epochs of the sigmoid ramp-up of the distilling part.")

    @model_validator(mode="after")
    def _staged(self) -> OnlineConfig:
        if self.kind == "one" and self.stage is None:
            raise ConfigError("online.kind=one needs the last stage of the student: online.stage=body.3, for instance")
        return self


class ExemplarsConfig(Section):
    """New classes are learnt beside old ones, whose records are gone: see `fedkd.distill.exemplars`."""

    old: tuple[int, ...] = Field(
        min_length=1,
        description="Classes that the teacher knows. The student starts as the teacher, and learns the others.",
    )
    kind: Literal["synthetic", "raw", "none"] = Field(
        "synthetic", description="What stands for old classes: made inputs, herded records (which leak), or nothing."
    )
    per_class: int = Field(10, ge=1, description="Exemplars of each old class.")
    group: int = Field(10, ge=2, description="synthetic: fewest records whose mean an exemplar stands for.")
    steps: int = Field(200, ge=1, description="synthetic: gradient steps by which they are made.")
    layer: str = Field("body", description="Layer whose output is taken for features.")
    relation: float = Field(0.0, ge=0, description="Weight of the exemplar relation graph's loss.")


class GraphConfig(Section):
    """A graph: a net that sees its edges teaches a perceptron that does not. See `fedkd.graphs.taught`."""

    path: Path = Field(description="An .npz file, or a folder of Planetoid's raw files.")
    name: str = Field("cora", description="Which graph of a Planetoid folder.")
    task: Literal["nodes", "links", "clusters"] = "nodes"
    whole: bool = Field(
        False, description="All parts and the split that came with the file; else the largest part, split by the seed."
    )
    per_class: int = Field(20, ge=1, description="nodes: of each class, whose labels are known.")
    validation: int = Field(30, ge=1, description="nodes: of each class, that choose the epoch.")
    positions: bool = Field(False, description="nodes: the student reads a node's place too (DeepWalk, NOSMOG).")
    terms: dict[str, Any] = Field({}, description="nodes: weights of fedkd.graphs.GraphTerms; default: GLNN's.")
    teach: dict[str, Any] = Field({}, description="Training of the teacher: fedkd.graphs.NodeFit, LinkFit, ClusterFit.")
    learn: dict[str, Any] = Field({}, description="Training of the student, and the terms of links and clusters.")


class ScenesConfig(Section):
    """Scenes of the images of `data`, scattered on a canvas, to segment or to detect in: see `fedkd.data.scenes`."""

    task: Literal["segment", "detect"] = Field("segment", description="Classes of pixels, or boxes with classes.")
    canvas: int = Field(48, ge=16, multiple_of=8, description="Side of a scene in pixels.")
    most: int = Field(3, ge=1, description="Images in a scene, at most.")
    teacher: int = Field(600, ge=2, description="Scenes that a teacher is trained on, if it is trained here.")
    student: int = Field(150, ge=2, description="Scenes that the student learns on.")
    test: int = Field(300, ge=1, description="Scenes that they are measured on, of test images.")


class DistillExperiment(Section):
    """A student learns from a teacher. `fedkd distill X.yaml key=value ...`."""

    name: str = Field("distill", min_length=1, pattern=r"^[\w.-]+$")
    seed: int = Field(1, ge=0)
    data: DataConfig | None = Field(
        DataConfig(),
        description="Labelled records; with `method` they only measure the student. `none`: there are none.",
    )
    method: dict[str, Any] | None = Field(
        None,
        description="How inputs are made from the teacher alone: a name (dfad, ...) or a section with parameters. The "
        "student then sees no data.",
    )
    bounds: tuple[float, float] | Literal["auto", "none"] = Field(
        "auto",
        description="method: least and greatest value of an input; none: values of about mean 0 and deviation 1; auto: what "
        "the teacher's file says, else 0 and 1 for images and none for tables.",
    )
    pool: int = Field(10_240, ge=2, description="method: synthetic inputs that are kept, and left in pool.npz.")
    device: Literal["cpu", "cuda", "auto"] = Field("cpu", description="method: what computes; auto: a GPU, if any.")
    inputs: Path | None = Field(
        None,
        description="Unlabelled inputs that the student learns on, instead of records of `data`: a folder of images, or "
        "an .npz file with an array `x`. `data=FOLDER` says the same.",
    )
    partner: DataConfig | None = Field(
        None,
        description="The teacher's kind of input, such as images beside sounds: each record of `data` gets a random one "
        "of its class for partner, which the teacher sees. That two occur together tells that they are of one class.",
    )
    graph: GraphConfig | None = Field(
        None,
        description="A graph in place of `data`: student=mlp(hidden=[128], dropout=0.6) without edges, "
        "teacher=sage(hidden=[128]) or gcn(hidden=[64], dropout=0.8).",
    )
    exemplars: ExemplarsConfig | None = Field(
        None, description="New classes beside old ones by a memory of exemplars; `student` is the teacher's model."
    )
    scenes: ScenesConfig | None = Field(None, description="Segment or detect in scenes of the images of `data`.")
    omit: tuple[int, ...] = Field((), description="Classes left out of what the student sees (Hinton's omitted digit).")
    labels: bool = Field(True, description="False: the student's records have no labels, the teacher's must do.")
    known: int | None = Field(
        None,
        ge=1,
        description="Labels that the student reads, of each class; its other records are unlabelled. null: all labels.",
    )
    teacher: tuple[TeacherConfig, ...] = Field((TeacherConfig(model="mlp(hidden=[400, 400])"),), min_length=1)
    mix: Literal["probabilities", "logits"] = Field("probabilities", description="How several teachers become one.")
    student: str = "mlp(hidden=[32])"
    assistants: Literal["auto"] | tuple[str, ...] = Field(
        (),
        description="Nets between teacher and student, from large to small, each taught by the one above it by the "
        "terms on labels and logits; auto makes them up by size.",
    )
    online: OnlineConfig | None = Field(
        None, description="The student learns without a teacher, by labels and by its own branches or peers."
    )
    terms: tuple[TermConfig, ...] = Field(
        (),
        description="Addends of the loss; default: .1 ce + .9 kd, kd alone where there are no labels, and for scenes "
        "pixel_ce + pixel_kd + cwd or detection + fpn + head.",
    )
    training: FitConfig = FitConfig()
    alone: bool = Field(True, description="Also train the same student without a teacher, for comparison.")
    cache: bool = Field(True, description="Keep the teacher's answers on disk, memory-mapped.")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        if raw.get("method") is not None:
            raw = _with_method(raw)
        if raw.get("graph") is not None:
            raw = {"student": "mlp(hidden=[128], dropout=0.6)", "teacher": "sage(hidden=[128])", "data": None, **raw}
        if isinstance(raw.get("partner"), str):
            raw = {**raw, "partner": {"source": raw["partner"]}}
        if not isinstance(raw.get("data"), str):
            return raw
        if raw["data"] == "none":
            return {**raw, "data": None}
        rest = {k: v for k, v in raw.items() if k != "data"}
        if raw["data"] in get_args(Source):
            return {**rest, "data": {"source": raw["data"]}}
        return {**rest, "inputs": raw["data"]}

    @field_validator("assistants", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) and value != "auto" else value

    @field_validator("teacher", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        values = [value] if isinstance(value, str | dict) or not isinstance(value, Sequence) else list(value)
        return [_told(v) if isinstance(v, str) else v for v in values]

    @model_validator(mode="after")
    def _fits(self) -> DistillExperiment:
        if self.method is not None and (self.inputs is not None or self.terms or self.omit):
            raise ConfigError("`method` makes the inputs and brings its own loss: leave out inputs, terms and omit")
        if self.online is not None and (self.method is not None or self.terms or self.assistants or not self.labelled):
            raise ConfigError(
                "`online` brings its own loss and needs labels: leave out method, terms, assistants, inputs"
            )
        self._one_kind()
        if self.graph is not None:
            return self
        if self.method is not None and self.assistants:
            raise ConfigError("`method` teaches the student alone: leave out assistants")
        if self.data is None and self.method is None and self.inputs is None:
            raise ConfigError("data=none leaves nothing to learn on: give method=dfad, or inputs=FOLDER")
        if self.data is None and any(t.path is None and t.url is None for t in self.teacher):
            raise ConfigError("without data no teacher can be trained: give teacher=FILE or teacher=grpcs://host:port")
        unread = [t.loss for t in self.terms if t.term.loss.supervised and not self.labelled]
        if unread:
            raise ConfigError(
                "the student's inputs have no labels, so that no term can read them: leave "
                f"{', '.join(f'`{n}`' for n in unread)} out of terms"
            )
        if self.known is not None and not self.labelled:
            raise ConfigError("`known` says how many labels the student reads, and it has none: leave `known` out")
        if self.inputs is not None and any(t.path is None and t.url is None for t in self.teacher):
            raise ConfigError(
                "unlabelled inputs cannot train a teacher: give teacher=FILE or teacher=grpcs://host:port"
            )
        return self

    def _one_kind(self) -> None:
        """Refuse what does not go with the sections that change what is learnt."""
        kinds = [n for n in ("graph", "partner", "scenes", "exemplars", "online") if getattr(self, n) is not None]
        if len(kinds) > 1:
            raise ConfigError(f"give one of {' and '.join(kinds)}: each is a task of its own")
        if kinds == ["online"] and self.known is not None:
            raise ConfigError("`online` reads the label of every record: leave out known")
        if not kinds or kinds == ["online"]:
            return
        (kind,), own = kinds, kinds[0] in ("graph", "exemplars")
        unfit = {
            "method": self.method, "inputs": self.inputs, "assistants": self.assistants, "omit": self.omit,
            "known": kind != "partner" and self.known is not None,
            "labels=false": not self.labels, "terms": own and self.terms, "several teachers": own and len(self.teacher) > 1,
            "data": kind == "graph" and self.data, "data=none": kind != "graph" and self.data is None,
        }  # fmt: skip
        given = [name for name, value in unfit.items() if value]
        if given:
            raise ConfigError(f"`{kind}` does not go with {', '.join(given)}: leave it out")
        model = self.teacher[0].model
        if kind == "graph" and model is None:
            raise ConfigError("`graph` trains its teacher here: name it, as in teacher=sage(hidden=[128])")
        if kind == "exemplars" and model is not None and model != self.student:
            raise ConfigError(f"the student starts as the teacher: name one model, not {self.student} and {model}")

    @property
    def labelled(self) -> bool:
        """Whether the student's records have labels."""
        return self.labels and self.inputs is None and self.method is None

    @property
    def chosen(self) -> tuple[TermConfig, ...]:
        """The terms, the default ones if none are given."""
        if self.terms:
            return self.terms
        if self.scenes is not None and self.scenes.task == "segment":
            return (TermConfig(loss="pixel_ce"), TermConfig(loss="pixel_kd"), TermConfig(loss="cwd", student="head"))
        if self.scenes is not None:
            return (TermConfig(loss="detection"), TermConfig(loss="fpn", student="body"), TermConfig(loss="head"))
        kd = TermConfig(loss="kd", weight=0.9 if self.labelled else 1.0)
        return (TermConfig(loss="ce", weight=0.1), kd) if self.labelled else (kd,)

    def dump(self) -> str:
        """Return the resolved experiment as YAML that loads to the same experiment."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _with_method(raw: dict[str, Any]) -> dict[str, Any]:
    """Resolve the section `method`, and lay what is said of `training` over the method's published one."""
    from fedkd.distill.datafree.catalogue import build as build_method
    from fedkd.distill.datafree.catalogue import resolve

    published = dataclasses.asdict(build_method(raw["method"]).fit)
    given = raw.get("training") or {}
    training = {**published, **given} if isinstance(given, dict) else given
    return {**raw, "method": resolve(raw["method"]), "training": training}


def _told(text: str) -> dict[str, str]:
    """Return what a teacher given as one word is."""
    if "://" in text:
        return {"url": text}
    is_file = Path(text).suffix.lower() in (".safetensors", ".onnx", ".pt", ".pth")
    return {"path": text} if is_file else {"model": text}


def load(path: Path | None, overrides: Sequence[str] = ()) -> list[tuple[dict[str, Any], DistillExperiment]]:
    """Read an experiment and its overrides; a comma list makes a sweep.

    Raises:
        ConfigError: one readable sentence per fault.
    """
    return [(varying, build(DistillExperiment, raw)) for varying, raw in read_points(path, overrides)]
