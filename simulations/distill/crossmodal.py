"""Images teach sounds of digits, and back: ``python -m simulations.distill.crossmodal``.

Teacher: a LeNet on 10,000 MNIST images. Student: a small CNN on log-mel features of spoken digits (FSDD), with 5 labelled
clips per digit by four speakers; a clip's partner is a random image of the same digit. Measured on all clips of two speakers
whom neither has heard; which two, the seed decides. Back: a CNN on all clips of the four speakers teaches a student on 5
labelled images per digit, measured on MNIST's test images. Compared with labels alone: KD, symmetric InfoNCE, and CCL
(Y. Chen et al., CVPR 2021). The two kinds were never recorded together, so that what the teacher adds is what it knows of
classes. No published figure is for this pair.

Small: bundled digits stand for both kinds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.data import DataConfig, load
from fedkd.distill import Distiller, Fit, Records, Term, accuracy
from fedkd.distill.crossmodal import pairs, partners
from fedkd.losses import KD, CompositionalContrast, CrossEntropy, InfoNCE
from fedkd.seeding import numpy_rng
from simulations.distill.common import Report, images, model, options

AUDIO = "cnn(channels=[8, 16], features=32)"
SMALL = "cnn(channels=[3, 4], features=8)"


def terms(temperature: float) -> dict[str, list[Term]]:
    """Return the terms of every row; the student's own labels come with each."""
    ce = Term(CrossEntropy(), 1.0)
    contrast = CompositionalContrast(temperature=temperature)
    both = ("inner.body", "inner.head")
    return {
        "KD": [ce, Term(KD(temperature=4), 0.9)],
        "InfoNCE": [ce, Term(InfoNCE(), 1.0, student="inner.body")],
        "CCL": [ce, Term(contrast, 1.0, student=both)],
        "CCL + KD": [ce, Term(contrast, 1.0, student=both), Term(KD(temperature=4), 0.9)],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment and write its figures."""
    words = options(__doc__, "crossmodal", 5, argv)
    few, epochs, taught = (2, 1, 1) if words.small else (5, 60, 4)
    image_net, audio_net = (SMALL, SMALL) if words.small else ("lenet", AUDIO)
    how = Fit(epochs=epochs, batch_size=25, lr=0.02, schedule="cosine")
    teach = Fit(epochs=taught, batch_size=64, lr=0.02, schedule="cosine")
    settings = {
        "labelled": f"{few} per digit, {epochs} epochs",
        "image net": image_net,
        "audio net": audio_net,
        "optimizer": "sgd 0.02, momentum 0.9, weight decay 5e-4, cosine, batch 25",
    }
    report = Report("crossmodal", settings, words.seeds, {"accuracy": "right %"}, base="labels alone")
    seen = images(words.small, None if words.small else 10000, test_size=None if words.small else 2000)
    sight = model(image_net, seen.shape, 10, "crossmodal")
    Distiller(sight, None, [Term(CrossEntropy(), 1.0)], fit=teach).fit(seen.x, seen.y)
    sounds, digits, speakers = heard(words.small)
    for seed in words.seeds:
        away = numpy_rng("held-out speakers", seed).permutation(int(speakers.max()) + 1)[:2]
        held = torch.from_numpy(np.isin(speakers, away))
        x, y, test_x, test_y = sounds[~held], digits[~held], sounds[held], digits[held]
        report.add("(image teacher)", accuracy=accuracy(sight, Records.of(seen.test_x, seen.test_y)))
        hearing = model(audio_net, tuple(sounds.shape[1:]), 10, "crossmodal", seed)
        Distiller(hearing, None, [Term(CrossEntropy(), 1.0)], fit=teach, seed=seed).fit(x, y)
        report.add("(audio teacher, held-out speakers)", accuracy=accuracy(hearing, Records.of(test_x, test_y)))

        own = _few(y, few, seed, "clips")
        _students(
            report, "audio", audio_net, (x[own], y[own]), (seen.x, seen.y), sight, (test_x, test_y), 0.1, how, seed
        )
        own = _few(seen.y, few, seed, "images")
        given, asked = (seen.x[own], seen.y[own]), (seen.test_x, seen.test_y)
        _students(report, "image", image_net, given, (x, y), hearing, asked, 0.5, how, seed)
    report.write(words.json)


def _students(
    report: Report,
    kind: str,
    name: str,
    given: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    teacher: nn.Module,
    asked: tuple[Tensor, Tensor],
    temperature: float,
    how: Fit,
    seed: int,
) -> None:
    x, y = given
    there = torch.from_numpy(partners(y, other[1], numpy_rng("partners", kind, seed)))
    joined = pairs(x, other[0][there], y)
    alone: list[Term] = [Term(CrossEntropy(), 1.0)]
    for row, learnt in {"labels alone": alone, **terms(temperature)}.items():
        student = model(name, tuple(x.shape[1:]), 10, "crossmodal student", kind, seed)
        told = None if row == "labels alone" else joined.teacher(teacher)
        Distiller(joined.student(student), told, learnt, fit=how, seed=seed).fit(joined.records)
        report.add(f"{kind} student, {row}", accuracy=accuracy(student, Records.of(*asked)))


def heard(small: bool) -> tuple[Tensor, Tensor, np.ndarray]:
    """Return log-mel features [N, 1, 32, 32], digits [N] and speakers [N]."""
    if small:
        data = images(True)
        return data.x.flip(2), data.y, np.arange(len(data.x)) % 6
    split = load(DataConfig(source="fsdd", test_fraction=0.01), 1)
    parts = (split.train, split.test)
    x = torch.cat([torch.from_numpy(p.inputs()) for p in parts])
    y = torch.cat([torch.from_numpy(p.y) for p in parts])
    return x, y, np.concatenate([p.natural for p in parts if p.natural is not None])


def _few(labels: Tensor, each: int, seed: int, name: str) -> Tensor:
    rng = numpy_rng("few", name, seed)
    return torch.from_numpy(
        np.concatenate([rng.permutation(np.flatnonzero(labels.numpy() == c))[:each] for c in range(10)])
    )


if __name__ == "__main__":
    main()
