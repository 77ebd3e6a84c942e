"""Several runs beside one another: a table for the terminal, a picture, and the same numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedkd.errors import FedkdError
from fedkd.report.html import DASH, best_accuracy, bytes_per_device, epsilon_text
from fedkd.report.runfolder import ACCURACIES, SCHEMA, Group, Spread, expand, group_seeds, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

PLOT_KINDS = (".png", ".svg", ".pdf")
# Okabe and Ito's palette without the yellow, which is too faint on white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a8508a", "#e69f00", "#56b4e9", "#4a5159")
_MARKERS = {"student": "o", "clients_mean": "^"}
_MARKER_NAMES = {"student": "student of the server", "clients_mean": "mean of the devices (no student)"}


def compare(
    paths: Iterable[str | Path],
    console: Console,
    plot: str | Path | None = None,
    json_out: str | Path | None = None,
) -> dict[str, Any]:
    """Print a table of runs and sweeps, seeds put together, and write a picture and the numbers on request.

    Args:
        paths: Run and sweep folders.
        console: Where the table goes.
        plot: Picture of accuracy against megabytes (`.png`, `.svg` or `.pdf`). Its numbers are written beside
            it, as `NAME.svg.json` for `NAME.svg`, unless `json_out` names another place.
        json_out: File for the numbers.

    Returns:
        The numbers, as they are in the JSON.
    """
    if plot is not None and Path(plot).suffix.lower() not in PLOT_KINDS:
        raise FedkdError(
            f"Expected a picture that ends in {', '.join(PLOT_KINDS)}, but got {str(plot)!r}; give it one"
            f" of these endings."
        )
    groups = group_seeds(expand(paths))
    names = run_names(groups)
    found = warnings(groups)
    content = {
        "schema": SCHEMA,
        "rows": [_row(name, group) for name, group in zip(names, groups, strict=True)],
        "warnings": found,
    }
    _print_tables(groups, names, console)
    for warning in found:
        console.print(Text(f"! {_plain(warning)}", style="yellow"))
    if plot is not None:
        plot = Path(plot)
        draw(points(groups, names), plot)
        json_out = plot.with_name(plot.name + ".json") if json_out is None else json_out
    if json_out is not None:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=str)
        write_text(Path(json_out), text + "\n")
    return content


def run_names(groups: Sequence[Group]) -> list[str]:
    """A name for each row: the experiment and what a sweep changed; the folder too where two are alike."""
    names = []
    for group in groups:
        changed = ", ".join(f"{key}={value}" for key, value in group.changed.items())
        names.append(f"{group.name} {changed}".strip())
    keys = [(name, group.method, group.runner) for name, group in zip(names, groups, strict=True)]
    return [
        f"{name} [{group.runs[0].path.resolve().name}]" if keys.count(key) > 1 else name
        for name, group, key in zip(names, groups, keys, strict=True)
    ]


_ACCURACY_HEADS = ("student", "clients\nmean", "local-\nonly", "ensemble")
_COST_HEADS = ("MB up\n/device", "MB down\n/device", "ε", "seconds")


def comparison_table(
    groups: Sequence[Group], names: Sequence[str], *, accuracy: bool = True, cost: bool = True
) -> Table:
    """The table that `fedkd compare` prints, or one half of it."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    runners = len({group.runner for group in groups}) > 1
    table.add_column("run", overflow="fold")
    table.add_column("method", overflow="fold")
    if runners:
        table.add_column("runner")
    table.add_column("seeds", overflow="fold")
    for head in (_ACCURACY_HEADS if accuracy else ()) + (_COST_HEADS if cost else ()):
        table.add_column(head, justify="right", no_wrap=True)
    for name, group in zip(names, groups, strict=True):
        cells = [name, group.method, *([group.runner] if runners else []), _seeds(group)]
        if accuracy:
            keys = ("student", "clients_mean", "local_only", "ensemble")
            cells += [_percent(group.accuracy(key)) for key in keys]
        if cost:
            cells += [_megabytes(group.average(f"bytes_{way}_per_device")) for way in ("up", "down")]
            cells += [epsilon_text(group.epsilon, group.unit), _seconds(group.average("seconds"))]
        # `Text`, since a plain string in brackets would be taken for markup.
        table.add_row(*(Text(_plain(cell)) for cell in cells))
    notes = ["accuracy in %, mean±deviation over seeds"] if accuracy else []
    notes += ["MB: 10⁶ bytes, down with the proxy set"] if cost else []
    table.caption = "; ".join(notes)
    return table


def _print_tables(groups: Sequence[Group], names: Sequence[str], console: Console) -> None:
    whole = comparison_table(groups, names)
    # On a narrow terminal rich would leave out the last columns without a word, epsilon among them.
    if console.measure(whole, options=console.options.update(max_width=10_000)).maximum <= console.width:
        console.print(whole)
    else:
        console.print(comparison_table(groups, names, cost=False))
        console.print(comparison_table(groups, names, accuracy=False))


def _plain(text: str) -> str:
    """Text from a file without anything that could steer a terminal."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _seeds(group: Group) -> str:
    return ",".join(DASH if seed is None else str(seed) for seed in group.seeds)


def _percent(spread: Spread | None) -> str:
    if spread is None:
        return DASH
    text = f"{100 * spread.mean:.1f}"
    return text if spread.std is None else f"{text}±{100 * spread.std:.1f}"


def _megabytes(count: float | None) -> str:
    if count is None:
        return DASH
    megabytes = count / 1e6
    return f"{megabytes:,.0f}" if megabytes >= 1000 else "0" if not count else f"{megabytes:.3g}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:,.0f}"


def _row(name: str, group: Group) -> dict[str, Any]:
    accuracies = {key: group.accuracy(key) for key in ACCURACIES}
    return {
        "run": name,
        "name": group.name,
        "method": group.method,
        "runner": group.runner,
        "overrides": dict(group.overrides),
        "seeds": list(group.seeds),
        "folders": [str(run.path) for run in group.counted],
        "left_out": [{"folder": str(run.path), "status": run.status} for run in group.left_out],
        "accuracy": {key: spread.as_dict() if spread else None for key, spread in accuracies.items()},
        "bytes_up": group.average("bytes_up"),
        "bytes_down": group.average("bytes_down"),
        "bytes_proxy": group.average("bytes_proxy"),
        "bytes_up_per_device": group.average("bytes_up_per_device"),
        "bytes_down_per_device": group.average("bytes_down_per_device"),
        "epsilon": group.epsilon,
        "epsilon_unit": group.unit,
        "seconds": group.average("seconds"),
    }


def warnings(groups: Sequence[Group]) -> list[str]:
    """What makes a row unfit to be read against another one."""
    found: list[str] = []

    def differs(what: str, values: Sequence[object], advice: str) -> None:
        different = list(dict.fromkeys(map(str, values)))
        if len(different) > 1:
            shown = "; ".join(different[:4]) + ("; …" if len(different) > 4 else "")
            found.append(f"{what} ({shown}): {advice}")

    found.extend(_data_warning(groups))
    differs(
        "The runs differ in rounds",
        [group.counted[0].rounds_planned or len(group.counted[0].rounds) for group in groups],
        "compare them at equal bytes or equal rounds.",
    )
    differs(
        "The runs differ in seeds",
        [_seeds(group) for group in groups],
        "part of a difference may be the partition or the start.",
    )
    unfinished = [f"{run.path.name} {run.status}" for group in groups for run in group.counted if not run.finished]
    if unfinished:
        found.append(f"Not finished, shown as far as they got: {', '.join(unfinished)}.")
    left_out = [f"{run.path.name} {run.status}" for group in groups for run in group.left_out]
    if left_out:
        found.append(f"Not finished and left out of the means: {', '.join(left_out)}.")
    return found


# Where files lie on a machine says nothing of what is in them.
_PLACES = frozenset({"data.path", "data.test_path", "data.download", "partition.path"})


def _data_settings(group: Group) -> dict[str, str]:
    """What a run learned from and how it was dealt out, as dotted settings."""
    run = group.counted[0]
    found: dict[str, str] = {}

    def walk(key: str, value: object) -> None:
        if isinstance(value, dict):
            for inner, item in value.items():
                walk(f"{key}.{inner}", item)
        elif key not in _PLACES:
            found[key] = str(value)

    for section in ("data", "partition"):
        walk(section, run.config.get(section))
    if run.partition is not None:
        found["devices"] = str(len(run.partition.counts))
        found["classes"] = str(len(run.partition.class_names))
    return found


def _data_warning(groups: Sequence[Group]) -> list[str]:
    settings = [_data_settings(group) for group in groups]
    keys = dict.fromkeys(key for each in settings for key in each)
    different = []
    for key in keys:
        values = list(dict.fromkeys(each.get(key, "none") for each in settings))
        if len(values) > 1:
            different.append(f"{key} {' / '.join(values[:4])}{' / …' if len(values) > 4 else ''}")
    if not different:
        return []
    shown = "; ".join(different[:3]) + (f"; and {len(different) - 3} more" if len(different) > 3 else "")
    return [f"The runs use different data ({shown}): their accuracies cannot be compared."]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A method in the picture: what it reached, in percent, for how many megabytes per device.

    Attributes:
        kind: `student` or `clients_mean`: whose accuracy it is.
        spread: deviation over seeds, in percentage points; None where there is one seed.
    """

    label: str
    kind: str
    megabytes: float
    accuracy: float
    spread: float | None = None


def points(groups: Sequence[Group], names: Sequence[str]) -> list[Point]:
    """Return what the picture shows of each group that has an accuracy."""
    found = []
    repeated = len({group.method for group in groups}) < len(groups)
    for group, name in zip(groups, names, strict=True):
        best, sent = best_accuracy(group), bytes_per_device(group)
        if best is None or sent is None:
            continue
        kind, spread = best
        label = group.label if not repeated or group.changed else f"{group.method}: {name}"
        deviation = None if spread.std is None else 100 * spread.std
        point = Point(label=label, kind=kind, megabytes=sent / 1e6, accuracy=100 * spread.mean, spread=deviation)
        found.append(point)
    return found


def draw(shown: Sequence[Point], path: Path) -> None:
    """Draw accuracy against megabytes per device into a file named by its ending.

    A method that sends nothing is a line across, for a log axis has no zero.

    Raises:
        FedkdError: the file cannot be written.
    """
    # Imported here, since matplotlib takes a second to load and the table does not need it.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A fixed salt and no date: the same runs give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fedkd", "svg.fonttype": "none", "font.size": 10}):
        # Many names need room.
        figure = Figure(figsize=(7.6, min(8.0, max(4.8, 0.34 * len(shown)))), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        used: dict[str, None] = {}
        labels: list[tuple[Point, str]] = []
        for place, point in enumerate(shown):
            colour = _COLOURS[place % len(_COLOURS)]
            if not point.megabytes:
                axes.axhline(point.accuracy, color=colour, linestyle="--", linewidth=1.2, zorder=1)
                axes.annotate(
                    _readable(f"{point.label} (nothing sent)"),
                    (0.01, point.accuracy),
                    xycoords=("axes fraction", "data"),
                    xytext=(0, 3),
                    textcoords="offset points",
                    color=colour,
                    fontsize=9,
                )
                continue
            used[point.kind] = None
            x, y = point.megabytes, point.accuracy
            axes.errorbar(x, y, yerr=point.spread, fmt=_MARKERS[point.kind], color=colour, capsize=3, markersize=7)
            labels.append((point, colour))
        if labels:
            axes.set_xscale("log")
            low, high = (pick(point.megabytes for point, _ in labels) for pick in (min, max))
            axes.set_xlim(low / 2.2, high * 3.2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if not shown:
            axes.text(0.5, 0.5, "no run has an accuracy yet", ha="center", transform=axes.transAxes)
        axes.margins(y=0.12)
        axes.set_ylim(top=min(axes.get_ylim()[1], 102.0))
        axes.set_xlabel("megabytes per device, up and down, with the proxy set (log scale)")
        axes.set_ylabel("accuracy in %")
        axes.grid(True, which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        for kind in used:
            axes.plot([], [], _MARKERS[kind], color="#4a5159", label=_MARKER_NAMES[kind])
        if used:
            axes.legend(loc="best", frameon=False, fontsize=9)
        _place_labels(axes, labels)
        suffix = path.suffix.lower().removeprefix(".")
        metadata: dict[str, Any] = (
            {"Date": None} if suffix == "svg" else {"CreationDate": None} if suffix == "pdf" else {}
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, format=suffix, dpi=160, metadata=metadata)
        except OSError as problem:
            raise FedkdError(
                f"Expected to write {path}, but {problem.strerror or problem}; choose a folder you may write to."
            ) from None


def _readable(label: str) -> str:
    """Keep a dollar sign in a name from starting a formula, and a long name from leaving the picture."""
    label = _plain(label)
    return (label if len(label) <= 46 else label[:45] + "…").replace("$", r"\$")


def _place_labels(axes: Axes, labels: Sequence[tuple[Point, str]]) -> None:
    """Write each label at the nearest place around its point where it covers no point, bar nor other label.

    A label that had to move away is tied to its point by a thin line.
    """
    from matplotlib.text import Text as Letters

    figure = axes.figure
    figure.draw_without_rendering()  # type: ignore[union-attr]  # lays out the axes, so that pixels are known
    # Marks along each bar of deviation stand for the bar.
    steps = [at / 8 for at in range(-8, 9)]
    marks = [
        [axes.transData.transform((p.megabytes, p.accuracy + at * (p.spread or 0.0))) for at in steps]
        for p, _ in labels
    ]
    frame = axes.get_window_extent()
    taken: list[Any] = []
    key = axes.get_legend()
    if key is not None:
        taken.append(key.get_window_extent())
    places = [(9, 0, "left"), (-9, 0, "right"), (0, 11, "center"), (0, -11, "center")]
    for far in range(12, 132, 12):
        places += [(9, far, "left"), (9, -far, "left"), (-9, far, "right"), (-9, -far, "right")]
        places += [(9 + far, 0, "left"), (-9 - far, 0, "right"), (9 + far, far, "left"), (9 + far, -far, "left")]
        places += [(-9 - far, far, "right"), (-9 - far, -far, "right")]
    # From the top down, so that neighbours are pushed to one side and ties do not cross.
    for place in sorted(range(len(labels)), key=lambda i: -labels[i][0].accuracy):
        point, colour = labels[place]
        note: Annotation | None = None
        for dx, dy, side in places:
            if note is not None:
                note.remove()
            tie = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            note = axes.annotate(
                _readable(point.label),
                (point.megabytes, point.accuracy),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=side,
                va="center",
                color=colour,
                fontsize=9,
                arrowprops=tie if max(abs(dx), abs(dy)) > 20 else None,
            )
            note.get_window_extent()  # finds the place of the words; what it returns takes in the tie
            box = Letters.get_window_extent(note)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            clear = not any(box.overlaps(other) for other in taken)
            padded = box.padded(4)
            free = not any(padded.contains(*at) for i, bar in enumerate(marks) if i != place for at in bar)
            free = free and not any(box.contains(*at) for at in marks[place])
            if inside and clear and free:
                break
        if note is not None:
            taken.append(Letters.get_window_extent(note).padded(1))
