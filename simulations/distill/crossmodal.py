"""Images teach sounds of digits, and back: ``python -m simulations.distill.crossmodal``.

Spoken digits (FSDD, six speakers, log-mel features) and MNIST images. Two speakers, whom the seed draws, are held out;
what is measured is how many of all their clips a student knows whom nobody has heard. The student, a small CNN, has all
clips of the other four (some 2,000), and reads the labels of five of each digit. Every clip comes with an image, as sound
and picture of one film do: a random one of the same digit. The teacher, a LeNet trained on 10,000 labelled images, sees the
image alone.

What the pairs give away: that an image and a clip occur together says that they are of one digit. This is the only thing
that the student learns of a clip without a label, and the labels of all clips are read once, to make the pairs. A teacher
that knows its images thus hands out most of the labels that the student was not shown; rows "labelled pairs" have the
partners of the labelled clips alone, where the pair tells nothing that the label does not.

Back: a CNN on all clips of the four speakers teaches a student of 2,000 images, five of each digit with a label, each
beside a clip of its digit; measured on MNIST's test images.

Compared with the same student on its labels alone, for as many steps: KD, symmetric InfoNCE, and CCL (Y. Chen et al., CVPR
2021). Row "every label": the student on the labels of all its records, without a teacher. SoundNet (Y. Aytar, C. Vondrick,
A. Torralba, NeurIPS 2016) and cross-modal distillation (S. Gupta, J. Hoffman, J. Malik, CVPR 2016) learn from pairs in this
way. No published figure is for these data.

Small: bundled digits stand for both kinds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.data import DataConfig, load
from fedkd.distill import Distiller, Fit, Records, Term, accuracy
from fedkd.distill.crossmodal import pairs, partners
from fedkd.losses import KD, CompositionalContrast, CrossEntropy, InfoNCE
from fedkd.seeding import numpy_rng
from simulations.distill.common import Report, images, model, options, subset

AUDIO = "cnn(channels=[8, 16], features=32)"
SMALL = "cnn(channels=[3, 4], features=8)"


def terms(temperature: float) -> dict[str, list[Term]]:
    """Return the terms of every row; the labels that the student reads come with each."""
    ce = Term(CrossEntropy(), 1.0)
    contrast = CompositionalContrast(temperature=temperature)
    both = ("inner.body", "inner.head")
    return {
        "KD": [ce, Term(KD(temperature=4), 0.9)],
        "InfoNCE": [ce, Term(InfoNCE(), 1.0, student="inner.body")],
        "CCL": [ce, Term(contrast, 1.0, student=both)],
        "CCL + KD": [ce, Term(contrast, 1.0, student=both), Term(KD(temperature=4), 0.9)],
    }


@dataclass(frozen=True, kw_only=True)
class Side:
    """One direction: the ``student``'s inputs and labels, the ``teacher``'s, and what the student is asked at the end."""

    kind: str
    net: str
    student: tuple[Tensor, Tensor]
    teacher: tuple[Tensor, Tensor]
    asked: Records
    temperature: float  # of CCL: 0.1 for an image teacher, 0.5 for one of sounds, as published


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment and write its figures."""
    words = options(__doc__, "crossmodal", 5, argv)
    few, epochs, taught = (2, 1, 1) if words.small else (5, 10, 4)
    image_net, audio_net = (SMALL, SMALL) if words.small else ("lenet", AUDIO)
    how = Fit(epochs=epochs, batch_size=50, lr=0.02, schedule="cosine")
    teach = Fit(epochs=taught, batch_size=64, lr=0.02, schedule="cosine")
    settings = {
        "labelled": f"{few} per digit",
        "pairs": "all clips of four speakers, 2,000 images",
        "epochs": epochs,
        "image net": image_net,
        "audio net": audio_net,
        "optimizer": "sgd 0.02, momentum 0.9, weight decay 5e-4, cosine, batch 50",
    }
    report = Report("crossmodal", settings, words.seeds, {"accuracy": "right %"}, base="labels alone")
    seen = images(words.small, None if words.small else 10000, test_size=None if words.small else 2000)
    sight = model(image_net, seen.shape, 10, "crossmodal")
    Distiller(sight, None, [Term(CrossEntropy(), 1.0)], fit=teach).fit(seen.x, seen.y)
    asked = Records.of(seen.test_x, seen.test_y)
    sounds, digits, speakers = heard(words.small)
    for seed in words.seeds:
        away = numpy_rng("held-out speakers", seed).permutation(int(speakers.max()) + 1)[:2]
        held = torch.from_numpy(np.isin(speakers, away))
        clips, strange = (sounds[~held], digits[~held]), Records.of(sounds[held], digits[held])
        report.add("(image teacher)", accuracy=accuracy(sight, asked))
        hearing = model(audio_net, tuple(sounds.shape[1:]), 10, "crossmodal", seed)
        Distiller(hearing, None, [Term(CrossEntropy(), 1.0)], fit=teach, seed=seed).fit(*clips)
        report.add("(audio teacher, held-out speakers)", accuracy=accuracy(hearing, strange))

        shown = subset(seen.x, seen.y, 200 if words.small else 2000, "shown", seed)
        whole = seen.x, seen.y
        listen = Side(kind="audio", net=audio_net, student=clips, teacher=whole, asked=strange, temperature=0.1)
        look = Side(kind="image", net=image_net, student=shown, teacher=clips, asked=asked, temperature=0.5)
        for side, teacher in ((listen, sight), (look, hearing)):
            students(report, side, teacher, few, how, seed)
    report.write(words.json)


def students(report: Report, side: Side, teacher: nn.Module, few: int, how: Fit, seed: int) -> None:
    """Train the students of one direction; all of a seed share weights, records, partners and labels."""
    x, y = side.student
    there = torch.from_numpy(partners(y, side.teacher[1], numpy_rng("partners", side.kind, seed)))
    joined = pairs(x, side.teacher[0][there], y)
    known = joined.records.knowing(few, numpy_rng("few", side.kind, seed))
    labels = [Term(CrossEntropy(), 1.0)]
    taught = terms(side.temperature)
    rows = {"labels alone": (known.labelled(), labels), "every label": (joined.records, labels)}
    rows |= {f"{name}, all pairs": (known, learnt) for name, learnt in taught.items()}
    rows |= {f"{name}, labelled pairs": (known.labelled(), learnt) for name, learnt in taught.items()}
    for row, (records, learnt) in rows.items():
        student = model(side.net, tuple(x.shape[1:]), 10, "crossmodal student", side.kind, seed)
        told = None if learnt is labels else joined.teacher(teacher)
        with tempfile.TemporaryDirectory() as folder:
            Distiller(joined.student(student), told, learnt, fit=how, seed=seed, cache=Path(folder)).fit(records)
        report.add(f"{side.kind} student, {row}", accuracy=accuracy(student, side.asked))


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


if __name__ == "__main__":
    main()
