"""Students without a teacher: ``python -m simulations.distill.online``.

ONE (Lan et al. 2018: three branches, T = 3) and deep mutual learning (Zhang et al. 2018: two peers, T = 1) against the same
net alone, on 1,000 MNIST images. The net is a LeNet of half width, branched at its second convolution. What is measured is
the one net that is deployed; the mean of all members and their ensemble stand beside it. No published
figure is for nets this small.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedkd.distill import Distiller, Fit, Records, Term, accuracy
from fedkd.distill.online import Taught, mutual, one
from fedkd.losses import CrossEntropy
from simulations.distill.common import Images, Report, images, model, options, subset


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment and write its figures."""
    words = options(__doc__, "online", 5, argv)
    name, stage = ("cnn(channels=[3, 4])", "body.3") if words.small else ("lenet_half", "body.3")
    size, epochs = (100, 2) if words.small else (1000, 40)
    how = Fit(epochs=epochs, batch_size=64, lr=0.02, schedule="cosine")
    settings = {
        "net": f"{name}, branched at {stage}",
        "data": f"{size} images, {epochs} epochs",
        "ramp of ONE": f"{epochs * 80 // 300 or 1} epochs, 80 of 300 as published",
        "optimizer": "sgd 0.02, momentum 0.9, weight decay 5e-4, cosine, batch 64",
    }
    columns = {"deployed": "deployed net right %", "members": "mean of members %", "ensemble": "ensemble %"}
    report = Report("online", settings, words.seeds, columns, base="alone")
    data = images(words.small, None if words.small else 10000)
    test = Records.of(data.test_x, data.test_y)
    for seed in words.seeds:
        x, y = subset(data.x, data.y, size, "online", seed)
        records = Records.of(x, y)
        alone = model(name, data.shape, 10, "online", seed)
        Distiller(alone, None, [Term(CrossEntropy(), 1.0)], fit=how, seed=seed).fit(records)
        report.add("alone", deployed=accuracy(alone, test))
        start = model(name, data.shape, 10, "online", seed)
        rows: dict[str, Taught] = {
            "ONE, 3 branches": one(start, stage, records, ramp=epochs * 80 // 300 or 1, fit=how, seed=seed),
            "DML, 2 peers": mutual(start, records, fit=how, seed=seed),
            "DML, 3 branches of one trunk": mutual(start, records, stage=stage, peers=3, fit=how, seed=seed),
        }
        for row, taught in rows.items():
            report.add(row, **_scores(taught, data, test))
    report.write(words.json)


def _scores(taught: Taught, data: Images, test: Records) -> dict[str, float]:
    parts = [taught.ensemble(part).argmax(1) for part in data.test_x.split(1000)]
    hits = sum(int((p == t).sum()) for p, t in zip(parts, data.test_y.split(1000), strict=True))
    return {
        "deployed": accuracy(taught.deployed, test),
        "members": float(np.mean([accuracy(m, test) for m in taught.members])),
        "ensemble": hits / len(data.test_y),
    }


if __name__ == "__main__":
    main()
