"""Every method teaches a student of the bundled digits without data, far beyond chance; long, so only on demand."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedkd.distill.config import load
from fedkd.distill.run import start

STUDENT = "cnn(channels=[6, 12], features=24)"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    words = ["teacher={model: 'cnn(channels=[8, 16])', training: {epochs: 15}}", "training.epochs=1", "alone=false"]
    found = start(load(None, words)[0][1], folder / "run").summary["accuracy"]
    assert found["teacher"] > 0.95
    return folder / "run" / "teacher-1.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "training", "least"),
    [
        ("{name: dfad, batch_size: 64, width: 8, noise: 32}", "epochs: 8, batch_size: 64, lr: 0.05", 0.6),
        ("{name: zskt, batch_size: 64, width: 8, noise: 32, makes_per_epoch: 30}", "epochs: 8, batch_size: 64", 0.6),
        ("{name: dafl, batch_size: 64, width: 8, noise: 32, makes_per_epoch: 100, generator_lr: 0.005}",
         "epochs: 8, batch_size: 64, lr: 0.005", 0.5),
        ("{name: deepinversion, batch_size: 128, steps: 60, student_steps: 60, shift: 1, temperature: 4}",
         "epochs: 8, batch_size: 64, lr: 0.05", 0.6),
        ("{name: cmi, batch_size: 128, steps: 30, width: 8, noise: 64, lr: 0.01, student_steps: 60, bank: 1024, "
         "others: 256, shift: 1, temperature: 4}", "epochs: 8, batch_size: 64, lr: 0.05", 0.6),
        ("{name: fast, batch_size: 128, steps: 5, width: 8, noise: 64, lr: 0.003, student_steps: 60, shift: 1, "
         "temperature: 4}", "epochs: 33, batch_size: 64, lr: 0.05", 0.6),
    ],
    ids=["dfad", "zskt", "dafl", "deepinversion", "cmi", "fast"],
)  # fmt: skip
def test_a_method_teaches(method: str, training: str, least: float, teacher: Path, tmp_path: Path) -> None:
    words = [f"teacher={teacher}", "data=digits", f"student={STUDENT}", f"method={method}", f"training={{{training}}}"]
    found = start(load(None, words)[0][1], tmp_path / "run").summary
    print(found["method"]["name"], found["accuracy"], found["cpu_seconds"])
    assert found["accuracy"]["student"] > least
