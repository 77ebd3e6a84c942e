"""New classes beside old ones by a few exemplars: ``python -m simulations.distill.exemplars``.

A LeNet of half width learns the digits 0 to 4 from 2,000 MNIST images, then 5 to 9 from 2,000 others without seeing the old
images again. What keeps the old digits is distillation from the model before and a memory of 10 exemplars per class: none,
raw ones (herded, iCaRL), or synthetic ones, which hold no record and are the default. Measured on all ten digits by the head
and by the nearest mean of exemplars. No published figure is for this setting.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.distill import Distiller, Fit, Records, Term, accuracy
from fedkd.distill.exemplars import Memory, extend, features_of, nearest_mean, remember
from fedkd.losses import CrossEntropy
from simulations.distill.common import Report, images, model, options, subset

LAYER = "body"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment and write its figures."""
    words = options(__doc__, "exemplars", 5, argv)
    name = "cnn(channels=[3, 4])" if words.small else "lenet_half"
    size, epochs, per_class, steps = (80, 2, 2, 3) if words.small else (2000, 10, 10, 200)
    how = Fit(epochs=epochs, batch_size=64, lr=0.02, schedule="cosine", weight_decay=1e-4)
    settings = {
        "net": name,
        "data": f"{size} images of old digits, {size} of new ones, {epochs} epochs each",
        "memory": f"{per_class} exemplars per class",
        "optimizer": "sgd 0.02, momentum 0.9, cosine, batch 64",
    }
    columns = {"head": "all digits, head %", "old": "old digits, head %", "new": "new digits, head %",
               "nearest": "all digits, nearest mean %"}  # fmt: skip
    report = Report("exemplars", settings, words.seeds, columns, base="no memory")
    data = images(words.small)
    old_classes = list(range(5))
    for seed in words.seeds:
        first, second = data.y < 5, data.y >= 5
        x0, y0 = subset(data.x[first], data.y[first], size, "exemplars old", seed)
        x1, y1 = subset(data.x[second], data.y[second], size, "exemplars new", seed)
        before = model(name, data.shape, 10, "exemplars", seed)
        Distiller(before, None, [Term(CrossEntropy(), 1.0)], fit=how, seed=seed).fit(x0, y0)
        olds, news = Records.of(x0, y0), Records.of(x1, y1)
        group = 4 if words.small else 10
        raw = remember(before, LAYER, olds, per_class, kind="raw")
        made = remember(before, LAYER, olds, per_class, steps=steps, group=group, seed=seed)
        rows: dict[str, tuple[Memory | None, float]] = {
            "no memory": (None, 0.0),
            "synthetic exemplars": (made, 0.0),
            "synthetic exemplars + relation graph": (made, 10.0),
            "raw exemplars": (raw, 0.0),
            "raw exemplars + relation graph": (raw, 10.0),
        }
        for row, (memory, relation) in rows.items():
            net = copy.deepcopy(before)
            extend(net, before, news, memory, old_classes, layer=LAYER, relation=relation, fit=how, seed=seed)
            scores = _scores(net, data.test_x, data.test_y)
            if memory is not None:
                rule = nearest_mean(net, LAYER, memory, news, per_class, 10)
                told = rule(features_of(net, LAYER, Records.of(data.test_x, data.test_y))).argmax(1)
                scores["nearest"] = float(np.mean((told == data.test_y).numpy()))
            report.add(row, **scores)
        both = model(name, data.shape, 10, "exemplars", seed)
        Distiller(both, None, [Term(CrossEntropy(), 1.0)], fit=how, seed=seed).fit(
            torch.cat([x0, x1]), torch.cat([y0, y1])
        )
        report.add("(all images at once)", **_scores(both, data.test_x, data.test_y))
    report.write(words.json)


def _scores(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    parts = {"head": y >= 0, "old": y < 5, "new": y >= 5}
    return {name: accuracy(net, Records.of(x[rows], y[rows])) for name, rows in parts.items()}


if __name__ == "__main__":
    main()
