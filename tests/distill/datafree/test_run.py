"""`fedkd distill ... method=...` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from fedkd.cli.main import app
from fedkd.distill.config import load
from fedkd.distill.run import resume, start
from fedkd.distill.teachers import ModuleTeacher, load_teacher
from fedkd.errors import ConfigError

SMALL = [
    "student=mlp(hidden=[32])",
    "method={name: dfad, batch_size: 64, width: 8, noise: 32}",
    "training.batch_size=64",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    words = ["teacher={model: 'mlp(hidden=[64])', training: {epochs: 8}}", "training.epochs=1", "alone=false"]
    start(load(None, words)[0][1], folder / "run")
    return folder / "run" / "teacher-1.safetensors"


@pytest.mark.slow
def test_a_student_learns_without_data(teacher: Path, tmp_path: Path) -> None:
    words = [f"teacher={teacher}", *SMALL, "training.epochs=8", "training.lr=0.05", "data=digits"]
    found = start(load(None, words)[0][1], tmp_path / "dfad").summary["accuracy"]
    assert found["teacher"] > 0.9 and found["student"] > 0.7


def test_data_measure_and_change_nothing_and_the_pool_is_of_use(teacher: Path, tmp_path: Path) -> None:
    words = [f"teacher={teacher}", *SMALL, "method.makes_per_epoch=5", "training.epochs=3"]
    done = CliRunner().invoke(app, ["distill", *words, "data=none", "--out", str(tmp_path / "blind")])
    assert done.exit_code == 0, done.output
    blind = json.loads((tmp_path / "blind/summary.json").read_text())
    assert blind["accuracy"] == {"student": None, "teacher": None, "alone": None} and blind["bounds"] == [0.0, 1.0]
    # 15 turns of one step of the generator and five of the student on 64 inputs.
    assert blind["queries"] == 15 * 6 * 64
    pool = np.load(tmp_path / "blind/pool.npz")
    assert pool["x"].shape == (3 * 64, 1, 8, 8) and pool["logits"].shape == (3 * 64, 10)
    assert pool["x"].min() >= 0 and pool["x"].max() <= 1
    # The same with labelled data beside it, which measure and change nothing.
    measured = start(load(None, [*words, "data=digits"])[0][1], tmp_path / "measured").summary
    assert measured["agreement"] == blind["agreement"] and measured["accuracy"]["teacher"] > 0.9
    assert measured["log"] == blind["log"]
    # The pool teaches another student as unlabelled inputs.
    words = [f"teacher={teacher}", f"data={tmp_path / 'blind/pool.npz'}", "student=logreg", "training.epochs=2"]
    again = start(load(None, words)[0][1], tmp_path / "again").summary
    assert again["accuracy"]["student"] is None and 0 < again["agreement"] <= 1


@pytest.mark.slow
def test_the_pool_calibrates_an_int8_model(teacher: Path, tmp_path: Path) -> None:
    """As docs/data-free.md does it."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    words = [f"teacher={teacher}", *SMALL, "method.makes_per_epoch=5", "training.epochs=3", "data=none"]
    start(load(None, words)[0][1], tmp_path / "run")
    exact = load_teacher(teacher)
    assert isinstance(exact, ModuleTeacher)
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        exact.module, (torch.zeros(2, 1, 8, 8),), str(tmp_path / "t.onnx"), dynamo=True, dynamic_shapes=({0: batch},),
        input_names=["x"], external_data=False, verbose=False,
    )  # fmt: skip

    class Pool(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self, x: np.ndarray) -> None:  # type: ignore[type-arg]
            self.parts = iter(np.array_split(x, 4))

        def get_next(self) -> dict[str, object] | None:
            part = next(self.parts, None)
            return None if part is None else {"x": part}

    pool = Pool(np.load(tmp_path / "run/pool.npz")["x"])
    quantization.quantize_static(
        tmp_path / "t.onnx", tmp_path / "int8.onnx", pool, quant_format=quantization.QuantFormat.QDQ, per_channel=True
    )
    x = torch.from_numpy(load_digits().images.astype(np.float32) / 16)[:, None]
    same = (load_teacher(tmp_path / "int8.onnx").logits(x).argmax(1) == exact.logits(x).argmax(1)).float().mean()
    assert float(same) > 0.97


def test_an_interrupted_run_goes_on_bit_for_bit(teacher: Path, tmp_path: Path) -> None:
    words = [f"teacher={teacher}", *SMALL, "method.makes_per_epoch=4", "training.epochs=3", "data=none"]
    ((_, experiment),) = load(None, words)
    start(experiment, tmp_path / "whole")

    def stop(stage: str, epoch: object, epochs: int) -> None:
        if epoch.epoch == 1:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(experiment, tmp_path / "cut", stop)
    resume(tmp_path / "cut")
    for name in ("student.safetensors", "pool.npz"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_that_was_refused_leaves_its_folder_free(teacher: Path, tmp_path: Path) -> None:
    words = [f"teacher={teacher}", "student=logreg", "data=none", "training.epochs=1", "training.batch_size=16"]
    for method, says in (("cmi", "no batch normalisation"), ("{name: dafl, features: nowhere}", "no layer 'nowhere'")):
        with pytest.raises(ConfigError, match=says):
            start(load(None, [*words, f"method={method}"])[0][1], tmp_path / "run")
    right = [*words, "method={name: zskt, batch_size: 16, width: 4, makes_per_epoch: 2}"]
    start(load(None, right)[0][1], tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run already"):
        start(load(None, right)[0][1], tmp_path / "run")


def test_a_method_is_named_in_one_word_and_its_parameters_beside_it(teacher: Path, tmp_path: Path) -> None:
    words = [f"teacher={teacher}", "data=none", "method=zskt", "method.width=4", "method.layers=[body]"]
    ((_, experiment),) = load(None, [*words, "student=mlp(hidden=[64])"])
    assert experiment.method is not None and experiment.method["name"] == "zskt" and experiment.method["width"] == 4
    with pytest.raises(ConfigError, match=r"zskt\.layers names body, which does not serve: .* tap a convolution"):
        start(experiment, tmp_path / "run")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="finds no GPU"):
        start(load(None, [f"teacher={teacher}", *SMALL, "data=none", "device=cuda"])[0][1], tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data=none", "teacher=gone.safetensors"], "leaves nothing to learn on"),
        (["data=none", "method=dfad"], "no teacher can be trained"),
        (["method=dfad", "terms=[{loss: kd}]"], "leave out inputs, terms and omit"),
        (["method=dafd"], "Did you mean 'dfad'"),
        (["method={name: dfad, lr: 3}"], "has no parameter 'lr'"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(None, words)
