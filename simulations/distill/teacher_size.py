"""Student accuracy against teacher size: ``python -m simulations.distill.teacher_size``.

A perceptron of 12 hidden units is taught on 1,000 MNIST images by perceptrons of 32 to 1,024 hidden units that were trained
on 10,000, by KD (T = 4), DIST, LSKD, and KD through the assistants that ``--assistants auto`` makes up. Mirzadeh et al.
(AAAI 2020), figure 2, find the student's accuracy falling again when the teacher grows too large.

A picture is drawn beside the figures, student accuracy against teacher size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    draw(report.write(words.json), words.json.with_suffix(".svg"))


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw student accuracy against teacher size, mean and sample deviation over seeds, as SVG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = found["rows"]
    # A fixed salt and no date: the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fedkd", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        styles = {"KD": ("o", "#0072b2"), "DIST": ("s", "#d55e00"), "LSKD": ("^", "#009e73"), "chain": ("D", "#cc79a7")}
        for place, (way, (marker, colour)) in enumerate(styles.items()):
            here = [row for row in rows if row.endswith(f", {way}")]
            # A hair apart, so that bars do not cover each other.
            widths = [float(row.split(",")[0]) * 1.03 ** (place - 1.5) for row in here]
            values = [rows[row]["accuracy"] for row in here]
            axes.errorbar(
                widths,
                [100 * v["mean"] for v in values],
                yerr=[100 * (v["std"] or 0.0) for v in values],
                marker=marker,
                color=colour,
                capsize=3,
                label="KD through assistants" if way == "chain" else way,
            )
        alone = rows[found["base"]]["accuracy"]
        axes.axhline(100 * alone["mean"], color="#4a5159", linestyle="--", label=found["base"])
        axes.set_xscale("log", base=2)
        ticks = [int(row.split(",")[0]) for row in rows if row.endswith(", KD")]
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.set_xlabel("hidden units of the teacher (the student has 12)")
        axes.set_ylabel("student right in %")
        axes.grid(True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
