"""Student accuracy against teacher size: ``python -m simulations.distill.teacher_size``.

A perceptron of 12 hidden units is taught on 1,000 MNIST images by perceptrons of 32 to 1,024 hidden units that were trained
on 10,000, by KD (T = 4), DIST, LSKD, and KD through the assistants that ``--assistants auto`` makes up. Mirzadeh et al.
(AAAI 2020), figure 2, find the student's accuracy falling again when the teacher grows too large.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedkd.distill import Distiller, Fit, Records, Term, accuracy
from fedkd.distill.assistants import between
from fedkd.losses import DIST, KD, CrossEntropy, LogitStandardisedKD
from simulations.distill.common import Report, images, model, options, subset

TERMS = {
    "KD": [Term(CrossEntropy(), 0.1), Term(KD(temperature=4), 0.9)],
    "DIST": [Term(CrossEntropy(), 1.0), Term(DIST())],
    "LSKD": [Term(CrossEntropy(), 0.1), Term(LogitStandardisedKD())],
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment and write its figures."""
    words = options(__doc__, "teacher_size", 5, argv)
    widths = (16, 64) if words.small else (32, 128, 512, 1024)
    size, epochs, taught = (100, 1, 1) if words.small else (1000, 20, 4)
    student_name = "mlp(hidden=[12])"
    how = Fit(epochs=epochs, batch_size=64, lr=0.05, schedule="cosine")
    settings = {
        "student": f"{student_name}, {size} images, {epochs} epochs",
        "teachers": f"one hidden layer of {', '.join(map(str, widths))}, 10,000 images, {taught} epochs",
        "optimizer": "sgd 0.05, momentum 0.9, weight decay 5e-4, cosine, batch 64",
    }
    columns = {"accuracy": "student right %", "teacher": "teacher right %", "assistants": "assistants"}
    report = Report("teacher_size", settings, words.seeds, columns, base="labels alone", plain=("assistants",))
    data = images(words.small, None if words.small else 10000)
    test = Records.of(data.test_x, data.test_y)
    teachers: dict[int, nn.Module] = {}
    for width in widths:
        teachers[width] = model(f"mlp(hidden=[{width}])", data.shape, 10, "teacher size")
        teach = Fit(epochs=taught, batch_size=64, lr=0.05, schedule="cosine")
        Distiller(teachers[width], None, [Term(CrossEntropy(), 1.0)], fit=teach).fit(data.x, data.y)
    for seed in words.seeds:
        x, y = subset(data.x, data.y, size, "teacher size", seed)
        records = Records.of(x, y)

        def learn(name: str, teacher: nn.Module | None, terms: list[Term], *stream: str) -> nn.Module:
            net = model(name, data.shape, 10, "teacher size", seed, *stream)  # noqa: B023
            Distiller(net, teacher, terms, fit=how, seed=seed).fit(records)  # noqa: B023
            return net

        alone = learn(student_name, None, [Term(CrossEntropy(), 1.0)])
        report.add("labels alone", accuracy=accuracy(alone, test))
        for width, teacher in teachers.items():
            best = accuracy(teacher, test)
            for name, terms in TERMS.items():
                report.add(
                    f"{width}, {name}", accuracy=accuracy(learn(student_name, teacher, terms), test), teacher=best
                )
            names = between(f"mlp(hidden=[{width}])", student_name, data.shape, 10)
            above = teacher
            for i, name in enumerate(names):
                above = learn(name, above, TERMS["KD"], f"assistant {i}")
            last = learn(student_name, above, TERMS["KD"])
            report.add(f"{width}, chain", accuracy=accuracy(last, test), teacher=best, assistants=len(names))
    report.write(words.json)


if __name__ == "__main__":
    main()
