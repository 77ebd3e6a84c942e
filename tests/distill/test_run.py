"""`fedkd distill` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from fedkd.cli.main import app
from fedkd.distill import loop
from fedkd.distill.config import load
from fedkd.distill.loop import Epoch
from fedkd.distill.run import resume, start
from fedkd.distill.teachers import load_teacher
from fedkd.errors import ConfigError, DataError
from fedkd.losses import KD
from fedkd.report.distill import render


def test_the_command_teaches_and_keeps_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ["teacher={model: mlp, training: {epochs: 6}}", "training.epochs=6"]
    done = CliRunner().invoke(app, ["distill", *quick, "student=mlp(hidden=[16])", "--out", "run"])
    assert done.exit_code == 0, done.output
    assert "student alone" in done.output and "teacher" in done.output
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["accuracy"]["student"] > 0.85 and summary["accuracy"]["teacher"] > 0.9
    assert len(summary["log"]) == 6 and set(summary["log"][0]["terms"]) == {"CrossEntropy", "KD"}
    # The student of one run is the teacher of the next.
    again = CliRunner().invoke(
        app,
        [
            "distill",
            "teacher=run/student.safetensors",
            "student=logreg",
            "training.epochs=2",
            "alone=false",
            "--out",
            "b",
        ],
    )
    assert again.exit_code == 0, again.output
    second = json.loads(Path("b/summary.json").read_text())
    assert second["accuracy"]["teacher"] == pytest.approx(summary["accuracy"]["student"])
    for again in (["--resume", "run"], [*quick, "student=mlp(hidden=[16])", "--out", "run", "--resume"]):
        done = CliRunner().invoke(app, ["distill", *again])
        assert done.exit_code == 0 and "student alone" in done.output, done.output
    other = CliRunner().invoke(app, ["distill", "student=logreg", "--out", "run", "--resume"])
    assert "run of another experiment" in str(other.exception)
    nothing = CliRunner().invoke(app, ["distill", "name=lost", "--resume"])
    assert "holds no run called lost" in str(nothing.exception)
    taken = CliRunner().invoke(app, ["distill", "--out", "run"])
    assert isinstance(taken.exception, ConfigError) and "holds a run already" in str(taken.exception)


@pytest.mark.parametrize(
    "way",
    [
        "teacher={model: 'mlp(hidden=[32])', training: {epochs: 2}}",
        "online={kind: one, stage: body.1, members: 2, ramp: 3}",
        "online={kind: dml, members: 2}",
        "exemplars={old: [0, 1, 2, 3, 4], per_class: 2, steps: 5, relation: 2.0}",
    ],
)
def test_an_interrupted_run_goes_on_bit_for_bit(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "PAUSE", 0.0)
    raw = [way, "training.epochs=4", "student=mlp(hidden=[8], dropout=0.2)", "data.train_size=300"]
    if way.startswith("exemplars"):
        raw.append("teacher={model: 'mlp(hidden=[8], dropout=0.2)', training: {epochs: 2}}")
    ((_, experiment),) = load(None, raw)
    whole = start(experiment, tmp_path / "whole")

    def stop(stage: str, epoch: object, epochs: int) -> None:
        if stage == "student" and epoch.epoch == 1:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(experiment, tmp_path / "cut", stop)
    assert not (tmp_path / "cut" / "summary.json").exists()
    seen: list[str] = []
    cut = resume(tmp_path / "cut", lambda stage, epoch, epochs: seen.append(stage))
    assert seen.count("student") == 2 and "teacher 1" not in seen
    assert (tmp_path / "cut/student.safetensors").read_bytes() == (tmp_path / "whole/student.safetensors").read_bytes()
    assert {n: cut.summary.get(n) for n in ("accuracy", "members", "log")} == {
        n: whole.summary.get(n) for n in ("accuracy", "members", "log")
    }


def test_omitted_digits_are_learnt_from_the_teacher_alone(tmp_path: Path) -> None:
    """Hinton et al., section 3: the student never sees a 3, and knows it by the teacher's soft labels."""
    raw = ["omit=[3]", "labels=false", "terms=[{loss: kd, temperature: 4, weight: 1.0}]", "training.epochs=25"]
    raw += ["teacher={model: mlp, training: {epochs: 15}}", "student=mlp(hidden=[64])"]
    ((_, experiment),) = load(None, raw)
    found = start(experiment, tmp_path / "run").summary["accuracy_by_class"]
    assert found["teacher"][3] > 0.85 and found["student"][3] > 0.5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["studnt=mlp"], "Did you mean 'student'"),
        (["terms=[{loss: kkd}]"], "Did you mean 'kd'"),
        (["terms=[{loss: kd, temprature: 3}]"], "Did you mean 'temperature'"),
        (["terms=[{loss: 'json:dumps'}]"], "no frozen dataclass derived from fedkd.losses.Loss"),
        (["terms=[{loss: 'json:gone'}]"], "loss 'json:gone' cannot be imported"),
        (["terms=[{loss: kd, temperature: 0}]"], "above 0"),
        (["terms=[{loss: kd, temperature: hot}]"], "number"),
        (["labels=false", "terms=[{loss: ce}]"], "leave `ce` out"),
        (["teacher={weight: 1}"], "needs `path`"),
        (["teacher=gone.safetensors"], "cannot read the teacher"),
        (["student=lenett"], "Did you mean 'lenet'"),
        (["omit=[11]"], "omit names class 11"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        start(load(None, words)[0][1], tmp_path / "run")


def test_a_student_without_a_teacher(tmp_path: Path) -> None:
    words = ["student=mlp(hidden=[16])", "online={kind: one, stage: body.1, members: 2, ramp: 2}", "training.epochs=8"]
    done = CliRunner().invoke(app, ["distill", *words, "data.train_size=300", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["accuracy"]["student"] == summary["members"][0] > 0.3 and len(summary["members"]) == 2
    assert summary["accuracy"]["teacher"] is None and "members" in done.output and "agreement" not in done.output
    assert set(summary["log"][0]["terms"]) == {"branches", "ensemble", "distillation"}
    with pytest.raises(ConfigError, match="needs the last stage"):
        load(None, ["online={kind: one}"])
    with pytest.raises(ConfigError, match="brings its own loss"):
        load(None, ["online={kind: dml}", "assistants=auto"])
    with pytest.raises(ConfigError, match=r"no layer 'body\.9'"):
        start(load(None, ["online={kind: one, stage: body.9}", "data.train_size=50"])[0][1], tmp_path / "wrong")


TINY = "scenes={task: TASK, canvas: 32, most: 2, teacher: 10, student: 10, test: 4}"


@pytest.mark.parametrize(("task", "net"), [("segment", "segmenter"), ("detect", "detector")])
def test_maps_of_scenes_are_taught(task: str, net: str, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    words = [TINY.replace("TASK", task), f"teacher={{model: '{net}(width=3)', training: {{epochs: 1}}}}"]
    words += [f"student={net}(width=2)", "training.epochs=2", "training.batch_size=5"]
    summary = start(load(None, words)[0][1], tmp_path / "run").summary
    assert summary["metric"] == ("mean IoU" if task == "segment" else "mAP")
    assert all(0 <= summary["accuracy"][who] <= 1 for who in ("student", "teacher", "alone"))
    assert len(summary["log"][0]["terms"]) == 3 and summary["agreement"] is None
    # What it taught can teach: the file says what it is.
    words[1] = f"teacher={tmp_path}/run/student.safetensors"
    again = start(load(None, [*words, "alone=false"])[0][1], tmp_path / "again").summary
    assert again["accuracy"]["teacher"] == summary["accuracy"]["student"]
    with pytest.raises(ConfigError, match="for a scene, expected"):
        start(load(None, [*words[:2], "student=mlp"])[0][1], tmp_path / "wrong")
    with pytest.raises(ConfigError, match="does not go with assistants"):
        load(None, [*words, "assistants=auto"])


def test_a_teacher_of_another_kind_of_input(tmp_path: Path) -> None:
    """Digits stand for sounds, and their partners are of another shape."""
    y = load_digits().target[:300]
    x = np.kron(load_digits().images[:300] * 15, np.ones((2, 2))).astype(np.uint8)
    np.savez(tmp_path / "large.npz", x=x[:, None], y=y)
    words = [f"partner={{source: npz, path: {tmp_path}/large.npz}}", "data.train_size=200", "training.epochs=3"]
    words += ["teacher={model: 'mlp(hidden=[16])', training: {epochs: 5}}", "student=mlp(hidden=[8])"]
    words += ["terms=[{loss: ce}, {loss: kd}, {loss: infonce, student: body}]"]
    summary = start(load(None, words)[0][1], tmp_path / "run").summary
    assert set(summary["log"][0]["terms"]) == {"CrossEntropy", "KD", "InfoNCE(inner.body)"}
    assert summary["accuracy"]["student"] > 0.2 and summary["accuracy"]["teacher"] > 0.5
    assert load_teacher(tmp_path / "run/student.safetensors", (1, 8, 8), 10).classes == 10
    assert load_teacher(tmp_path / "run/teacher-1.safetensors", (1, 16, 16), 10).classes == 10


def test_few_labels_and_many_pairs(tmp_path: Path) -> None:
    """A student that reads one label of each class learns of the others what pairs tell, and alone reads as few."""
    data = load_digits()
    images = data.images[:, None].astype(np.float32) / 16
    np.savez(tmp_path / "large.npz", x=images, y=data.target)
    words = [f"partner={{source: npz, path: {tmp_path}/large.npz}}", "data.train_size=400", "training.epochs=12"]
    words += ["teacher={model: 'mlp(hidden=[32])', training: {epochs: 8}}", "student=mlp(hidden=[16])", "known=1"]
    summary = start(load(None, words)[0][1], tmp_path / "run").summary
    scores = summary["accuracy"]
    assert scores["student"] > scores["alone"] + 0.15, scores
    for wrong, told in (
        (["known=2", "labels=false"], "it has none"),
        (["online={kind: dml}", "known=2"], "reads the label of every record"),
        (["graph.path=g.npz", "known=2"], "does not go with known"),
    ):
        with pytest.raises(ConfigError, match=told):
            load(None, wrong)
    with pytest.raises(ConfigError, match="leave `ce`, `dkd` out"):
        load(None, ["labels=false", "terms=[{loss: ce}, {loss: dkd}, {loss: kd}]"])


def communities(path: Path) -> None:
    """A graph of four communities, which edges tell well and features poorly."""
    rng = np.random.default_rng(1)
    y = np.arange(160) % 4
    chance = np.where(y[:, None] == y[None], 0.08, 0.003)
    edges = np.stack(np.nonzero(np.triu(rng.random((160, 160)) < chance, 1)))
    x = sparse.csr_matrix((rng.random((160, 24)) < 0.1 + 0.3 * (np.arange(24) // 6 == y[:, None])).astype(np.float32))
    np.savez(path, data=x.data, indices=x.indices, indptr=x.indptr, shape=x.shape, edges=edges, labels=y)


@pytest.mark.parametrize(
    ("task", "dies_in", "words"),
    [
        (
            "nodes",
            "student",
            ["terms: {soft: 1.0, structure: 10.0}, learn: {epochs: 99, patience: 6}, teach: {epochs: 20}"],
        ),
        ("links", "teacher 1", ["learn: {epochs: 10}, teach: {epochs: 10}"]),
        (
            "clusters",
            "student",
            ["learn: {epochs: 20, target: 0.5}, teach: {epochs: 40}", "teacher=gcn(hidden=[16, 8])"],
        ),
    ],
)
def test_a_graph_is_taught(
    task: str, dies_in: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    communities(tmp_path / "g.npz")
    graph = f"graph={{path: {tmp_path}/g.npz, task: {task}, per_class: 6, validation: 8, {words[0]}}}"
    summary = start(load(None, [graph, *words[1:], "student=mlp(hidden=[16])"])[0][1], tmp_path / "run").summary
    scores = summary["accuracy"]
    assert 0.3 < scores["teacher"] <= 1 and 0 <= scores["student"] <= 1 and 0 <= scores["alone"] <= 1
    if task == "nodes":
        assert scores["student"] > scores["alone"], "edges told what features do not"
    assert (9 < len(summary["log"]) < 99) and all(np.isfinite(list(e["terms"].values())).all() for e in summary["log"])
    assert resume(tmp_path / "run").summary == summary
    assert "<svg" in render(tmp_path / "run")

    def dies(stage: str, epoch: Epoch, epochs: int) -> None:
        if (stage, epoch.epoch) == (dies_in, 6):
            raise KeyboardInterrupt

    # Killed half-way, it goes on to the same bits.
    stages: list[tuple[str, int]] = []
    experiment = load(None, [graph, *words[1:], "student=mlp(hidden=[16])"])[0][1]
    with monkeypatch.context() as often, pytest.raises(KeyboardInterrupt):
        often.setattr(loop, "PAUSE", 0.0)
        start(experiment, tmp_path / "cut", dies)
    again = resume(tmp_path / "cut", lambda stage, epoch, _: stages.append((stage, epoch.epoch)))
    assert stages[0] == (dies_in, 7)
    assert again.summary["accuracy"] == scores and again.summary["log"] == summary["log"]
    assert len({(tmp_path / run / "student.safetensors").read_bytes() for run in ("run", "cut")}) == 1
    with pytest.raises(ConfigError, match="Did you mean 'epochs'"):
        wrong = graph.replace("learn: {", "learn: {epoch: 1, ")
        start(load(None, [wrong, *words[1:]])[0][1], tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists(), "refused before anything is written"
    with pytest.raises(ConfigError, match="on a graph expected"):
        start(load(None, [graph, "student=lenet"])[0][1], tmp_path / "wrong2")
    with pytest.raises(ConfigError, match="does not go with data"):
        load(None, [graph, "data=digits"])


def test_new_classes_beside_old_ones(tmp_path: Path) -> None:
    words = [
        "student=mlp(hidden=[32])",
        "teacher={model: 'mlp(hidden=[32])', training: {epochs: 6}}",
        "training.epochs=6",
    ]
    way = "exemplars={old: [0, 1, 2, 3, 4], per_class: 4, steps: 60, kind: KIND}"
    done = CliRunner().invoke(
        app, ["distill", *words, way.replace("KIND", "synthetic"), "alone=false", "--out", str(tmp_path / "run")]
    )
    assert done.exit_code == 0 and "nearest mean" in done.output, done.output
    kept = json.loads((tmp_path / "run/summary.json").read_text())
    lost = start(load(None, [*words, way.replace("KIND", "none"), "alone=false"])[0][1], tmp_path / "none").summary
    assert kept["memory"] == "synthetic" and kept["nearest_mean"] > 0.5 and lost["nearest_mean"] is None
    old = [np.mean(run["accuracy_by_class"]["student"][:5]) for run in (kept, lost)]
    assert old[0] > old[1] + 0.1 and np.mean(kept["accuracy_by_class"]["student"][5:]) > 0.5
    with pytest.raises(ConfigError, match="name one model"):
        load(None, [way.replace("KIND", "raw"), "student=mlp", "teacher=logreg"])
    with pytest.raises(ConfigError, match="classes 0 to 9"):
        start(load(None, ["exemplars={old: [12]}", "student=mlp", "teacher=mlp"])[0][1], tmp_path / "wrong")


def test_a_loss_of_ones_own_is_a_term() -> None:
    ((_, experiment),) = load(None, ["terms=[{loss: 'fedkd.losses.response:KD', temperature: 2, weight: 3}]"])
    (term,) = (t.term for t in experiment.terms)
    assert term.loss == KD(temperature=2) and term.factor(0) == 3


def test_terms_are_tried_before_a_teacher_is_trained(tmp_path: Path) -> None:
    for words, told in (
        (["terms=[{loss: at, student: body.11}]", "student=cnn", "teacher=cnn"], "no layer 'body.11'"),
        (["terms=[{loss: dkd}]", "data=breast_cancer", "student=logreg", "teacher=mlp"], "three classes"),
        (
            ["terms=[{loss: sp, student: body}]", "student=mlp", "teacher=[{model: mlp}, {model: mlp}]"],
            "one torch model",
        ),
        (["partner=digits", "terms=[{loss: ccl, student: body}]", "student=mlp", "teacher=mlp"], "name both layers"),
        # By the words of the experiment, not by those of the wrapping that pairs need.
        (["partner=digits", "terms=[{loss: sp, student: bod}]", "student=mlp", "teacher=mlp"], "near it: body"),
        (
            ["partner=digits", "terms=[{loss: sp, student: body, teacher: bod}]", "student=mlp", "teacher=mlp"],
            "near it: body",
        ),
        (["assistants=mlpp"], "no model is named 'mlpp'"),
        (["exemplars={old: [0, 1], layer: bod}", "student=mlp", "teacher=mlp"], "no layer 'bod'"),
        (["exemplars={old: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}", "student=mlp", "teacher=mlp"], "names every class"),
        (["exemplars={old: [0], per_class: 900}", "student=mlp", "teacher=mlp"], "fewer than exemplars.per_class=900"),
        (["exemplars={old: [0], group: 900}", "student=mlp", "teacher=mlp"], "fewer than exemplars.group=900"),
        (["scenes={task: detect}", "data=digits", "student=cnn", "teacher=detector"], r"such as detector\(width=4\)"),
    ):
        with pytest.raises(ConfigError, match=told):
            start(load(None, words)[0][1], tmp_path / "run", lambda stage, epoch, epochs: pytest.fail("trained"))
        assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="compares logits, not layers"):
        load(None, ["terms=[{loss: kd, student: body}]"])
    nothing = CliRunner().invoke(app, ["distill", "--resume", str(tmp_path / "nothing")])
    assert isinstance(nothing.exception, ConfigError) and "holds no run" in str(nothing.exception)
    with pytest.raises(DataError, match=r"correct graph\.path"):
        start(load(None, ["graph.path=lost.npz"])[0][1], tmp_path / "run")
