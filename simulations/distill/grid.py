"""Every response, feature and relation loss on one pair: ``python -m simulations.distill.grid``.

Teacher: a CNN of 16-32 channels with batch normalisation, trained once on 10,000 MNIST images. Student: one of 4-8 channels
on 1,000 of them; a seed draws the images, the weights and the order, and all losses of a seed share them. Each loss has the
weight it was published with (for CIFAR-100 and ResNets), beside cross-entropy; KD and LSKD have theirs of 0.1 on
cross-entropy. Feature losses look at the second stage (maps) or at the last hidden layer (vectors).

Deviations: warm-ups of 20 in 240 epochs are 2 in 15 here. CRD draws 256 others, not 16,384, from a bank of 1,000. InfoNCE
has no published weight for this use: 1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedkd.distill import Distiller, Fit, Records, Term, Warmup, accuracy
from fedkd.losses import (
    CRD,
    DIST,
    DKD,
    KD,
    AttentionTransfer,
    BetaJensenShannon,
    CorrelationCongruence,
    CrossEntropy,
    FitNet,
    InfoNCE,
    LogitRegression,
    LogitStandardisedKD,
    ProbabilisticTransfer,
    ReviewKD,
    RKDAngle,
    RKDDistance,
    SimilarityPreserving,
)
from simulations.distill.common import Report, images, model, options, subset


def grid(maps: str, vectors: str, shallow: str) -> dict[str, list[Term]]:
    """Return the terms of every row: names of the layers with maps, with vectors, and of shallower maps."""
    ce, weak = Term(CrossEntropy(), 1.0), Term(CrossEntropy(), 0.1)
    return {
        "KD": [weak, Term(KD(temperature=4), 0.9)],
        "logit regression": [ce, Term(LogitRegression(), 1.0)],
        "DKD": [ce, Term(DKD(), schedule=Warmup(2))],
        "DIST": [ce, Term(DIST())],
        "LSKD": [weak, Term(LogitStandardisedKD())],
        "beta-Jensen-Shannon": [ce, Term(BetaJensenShannon(), 1.0)],
        "FitNet": [ce, Term(FitNet(), student=maps)],
        "AT": [ce, Term(AttentionTransfer(), student=maps)],
        "ReviewKD": [ce, Term(ReviewKD(), student=(shallow, maps), schedule=Warmup(2))],
        "RKD distance + angle": [ce, Term(RKDDistance(), student=vectors), Term(RKDAngle(), student=vectors)],
        "SP": [ce, Term(SimilarityPreserving(), student=maps)],
        "PKT": [ce, Term(ProbabilisticTransfer(), student=vectors)],
        "CC": [ce, Term(CorrelationCongruence(), student=vectors)],
        "CRD": [ce, Term(CRD(negatives=256), student=vectors)],
        "InfoNCE": [ce, Term(InfoNCE(), 1.0, student=vectors)],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the grid and write its figures."""
    words = options(__doc__, "grid", 5, argv)
    big, small = "cnn(channels=[16, 32], features=64)", "cnn(channels=[4, 8], features=16)"
    if words.small:
        big, small = "cnn(channels=[6, 12])", "cnn(channels=[3, 4], features=12)"
    size, epochs = (100, 1) if words.small else (1000, 15)
    how = Fit(epochs=epochs, batch_size=32, lr=0.02, schedule="cosine")
    settings = {
        "teacher": f"{big}, 10,000 images, 5 epochs",
        "student": f"{small}, {size} images, {epochs} epochs",
        "optimizer": "sgd 0.02, momentum 0.9, weight decay 5e-4, cosine, batch 32",
    }
    report = Report("grid", settings, words.seeds, {"accuracy": "right %"}, base="labels alone")
    data = images(words.small, None if words.small else 10000)
    test = Records.of(data.test_x, data.test_y)
    teacher = model(big, data.shape, 10, "grid", "teacher")
    teach = Fit(epochs=2 if words.small else 5, batch_size=64, lr=0.02, schedule="cosine")
    Distiller(teacher, None, [Term(CrossEntropy(), 1.0)], fit=teach).fit(data.x, data.y)
    best = accuracy(teacher, test)
    for seed in words.seeds:
        x, y = subset(data.x, data.y, size, "grid", seed)
        records = Records.of(x, y)
        rows = {"labels alone": [Term(CrossEntropy(), 1.0)], **grid("body.5", "body", "body.2")}
        with tempfile.TemporaryDirectory() as folder:
            for name, terms in rows.items():
                student = model(small, data.shape, 10, "grid", seed)
                Distiller(student, teacher, terms, fit=how, seed=seed, cache=Path(folder)).fit(records)
                report.add(name, accuracy=accuracy(student, test))
        report.add("(teacher)", accuracy=best)
    report.write(words.json)


if __name__ == "__main__":
    main()
