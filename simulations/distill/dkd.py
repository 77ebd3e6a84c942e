"""Why DKD diverges in the grid: ``python -m simulations.distill.dkd``.

The pair, data and terms of :mod:`simulations.distill.grid`, DKD alone, with a longer warm-up, a smaller learning rate or a
smaller weight. Beside the accuracy: how many of the student's 16 features are 0 for each of its images at the end, which
no gradient brings back (ReLU).

Published: alpha 1, beta 8, T 4, warm-up of 20 epochs, which are 15,600 steps of CIFAR-100; the grid's 2 epochs are 64.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from fedkd.distill import Distiller, Fit, Records, Term, Warmup, accuracy
from fedkd.losses import DKD, CrossEntropy
from simulations.distill.common import Report, images, model, options, subset


def main(argv: Sequence[str] | None = None) -> None:
    """Run it and write its figures."""
    words = options(__doc__, "dkd", 3, argv)
    big, small = "cnn(channels=[16, 32], features=64)", "cnn(channels=[4, 8], features=16)"
    if words.small:
        big, small = "cnn(channels=[6, 12])", "cnn(channels=[3, 4], features=16)"
    size, epochs, taught = (100, 1, 2) if words.small else (1000, 15, 5)
    settings = {
        "teacher": f"{big}, 10,000 images, {taught} epochs",
        "student": f"{small}, {size} images, {epochs} epochs",
        "optimizer": "sgd, momentum 0.9, weight decay 5e-4, cosine, batch 32",
    }
    columns = {"accuracy": "right %", "dead": "dead features of 16"}
    report = Report("dkd", settings, words.seeds, columns, plain=("dead",))
    data = images(words.small, None if words.small else 10000)
    test = Records.of(data.test_x, data.test_y)
    teacher = model(big, data.shape, 10, "grid", "teacher")
    teach = Fit(epochs=taught, batch_size=64, lr=0.02, schedule="cosine")
    Distiller(teacher, None, [Term(CrossEntropy(), 1.0)], fit=teach).fit(data.x, data.y)
    rows: dict[str, tuple[DKD, int, float]] = {
        "as in the grid: lr 0.02, warm-up of 2 epochs": (DKD(), 2, 0.02),
        "warm-up of 8 epochs": (DKD(), 8, 0.02),
        "lr 0.005": (DKD(), 2, 0.005),
        "beta 1": (DKD(beta=1.0), 2, 0.02),
    }
    for seed in words.seeds:
        x, y = subset(data.x, data.y, size, "grid", seed)
        records = Records.of(x, y)
        with tempfile.TemporaryDirectory() as folder:
            for row, (loss, warmup, rate) in rows.items():
                student = model(small, data.shape, 10, "grid", seed)
                how = Fit(epochs=epochs, batch_size=32, lr=rate, schedule="cosine")
                terms = [Term(CrossEntropy(), 1.0), Term(loss, schedule=Warmup(warmup))]
                Distiller(student, teacher, terms, fit=how, seed=seed, cache=Path(folder)).fit(records)
                with torch.no_grad():
                    most = student.eval().get_submodule("body")(x).amax(0)
                report.add(row, accuracy=accuracy(student, test), dead=float((most == 0).sum()))
    report.write(words.json)


if __name__ == "__main__":
    main()
