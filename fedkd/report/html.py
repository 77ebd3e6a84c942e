"""The report: one HTML file that holds all it needs, of one run or of a sweep.

A report is a list of *sections*. A section is a function that takes the run (or the sweep) and returns a
`Section`, or None where it has nothing to say; a new part of the library adds its function to `RUN_SECTIONS`
or `SWEEP_SECTIONS`.

The file must be safe to open and to send: no script, no request to any network (a content policy forbids
both), and everything that comes from a file of the run is escaped. The same folder gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fedkd.errors import FedkdError
from fedkd.report import svg
from fedkd.report.runfolder import (
    ROUNDS_FILE,
    SWEEP_FILE,
    Group,
    Round,
    Run,
    Spread,
    Sweep,
    group_seeds,
    is_run,
    is_sweep,
    mean,
    read_json,
    write_text,
)

DASH = "–"
_MOST_ROWS = 60  # of a table of rounds
_MOST_CLIENTS = 200  # in the table of devices
_MOST_DOTS = 1500
_MOST_EVENTS = 100

STUDENT, CLIENTS, ENSEMBLE, LOCAL = 0, 1, 2, 7  # palette entries, the same in every chart
ACCURACY_NAMES = {
    "student": "student",
    "clients_mean": "devices, mean",
    "clients_own_classes_mean": "devices, own classes",
    "local_only": "trained alone",
    "ensemble": "ensemble",
}


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report: a heading, and HTML that is already escaped."""

    title: str
    body: str
    wide: bool = False  # over the full width of the page


# --- pieces
# -------------------------------------------------------------------------------------------------------


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction for people."""
    return DASH if value is None else f"{100 * value:.{digits}f} %"


def epsilon_text(value: float | None, unit: str | None = None) -> str:
    """Epsilon as it is claimed, with its unit where there is one: null is infinity."""
    number = "∞" if value is None else f"{value:.3g}"
    return f"{number} per {unit}" if unit else number


def _claim_terms(run: Run) -> str:
    """What stands beside a run's epsilon: neighbouring relation and delta."""
    if run.epsilon is None:
        return "no guarantee"
    terms = [] if run.delta is None else [f"at delta = {run.delta:g}"]
    terms += [] if run.relation is None else [f"neighbours: {run.relation.replace('_', ' ')}"]
    return ", ".join(terms)


def duration(seconds: float | None) -> str:
    """Seconds for people."""
    if seconds is None:
        return DASH
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit that shows a time well, and its seconds."""
    return next(
        ((name, size) for name, size in (("hours", 3600.0), ("minutes", 60.0)) if seconds >= size), ("seconds", 1.0)
    )


def spread_text(spread: Spread | None, digits: int = 1) -> str:
    """A mean over seeds with its standard deviation, in per cent."""
    if spread is None:
        return DASH
    if spread.std is None:
        return percent(spread.mean, digits)
    return f"{100 * spread.mean:.{digits}f} ± {100 * spread.std:.{digits}f} %"


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "", words: int = 1) -> str:
    """A table of plain text; all columns but the first `words` are numbers and are set flush right."""
    columns = "".join(f'<th scope="col"{_right(at, words)}>{escape(name)}</th>' for at, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{_right(at, words)}>{escape(str(cell))}</td>" for at, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    content = f"{title}<thead><tr>{columns}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{content}</table></div>'


def _right(place: int, words: int) -> str:
    return "" if place < words else ' class="n"'


def details(summary: str, body: str) -> str:
    """Something to unfold."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def figure(picture: str, caption: str = "") -> str:
    """A chart with its caption; nothing where there is no chart."""
    if not picture:
        return ""
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="scroll chart">{picture}</div>{words}</figure>'


def tiles(entries: Sequence[tuple[str, str, str]]) -> str:
    """Headline numbers: (name, value, what it means)."""
    items = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class="small">{escape(note)}</dd></div>'
        for name, value, note in entries
    )
    return f'<dl class="tiles">{items}</dl>'


def quantile(values: Sequence[float], share: float) -> float:
    """The linearly interpolated quantile of sorted values."""
    place = share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def counted(count: int, one: str, many: str = "") -> str:
    """A number with its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def points_text(after: float | None, before: float | None) -> str:
    """The difference of two accuracies in percentage points."""
    if after is None or before is None:
        return ""
    return f"{100 * (after - before):+.1f} points"


# --- sections of a run
# --------------------------------------------------------------------------------------------


def headline(run: Run) -> Section:
    """What a person wants to know first."""
    accuracy = run.accuracy
    entries: list[tuple[str, str, str]] = []
    if accuracy.student is not None:
        gain = points_text(accuracy.student, accuracy.local_only)
        entries.append(("Student", percent(accuracy.student), f"{gain} against trained alone" if gain else "accuracy"))
    if accuracy.clients_mean is not None:
        gain = points_text(accuracy.clients_mean, accuracy.local_only)
        note = f"{gain} against trained alone" if gain else "mean accuracy"
        entries.append(("Devices, mean", percent(accuracy.clients_mean), note))
    if accuracy.clients_own_classes_mean is not None:
        entries.append(
            (
                "Devices, own classes",
                percent(accuracy.clients_own_classes_mean),
                "on the classes that each one holds",
            )
        )
    if accuracy.local_only is not None:
        entries.append(("Trained alone", percent(accuracy.local_only), "mean, without any exchange"))
    if accuracy.ensemble is not None:
        entries.append(("Ensemble", percent(accuracy.ensemble), "all devices asked together"))
    entries.append(("Up, per device", svg.data_size(run.bytes_up_per_device), f"{svg.data_size(run.bytes_up)} in all"))
    down = f"{svg.data_size(run.bytes_down + run.bytes_proxy)} in all"
    entries.append(
        (
            "Down, per device",
            svg.data_size(run.bytes_down_per_device),
            f"{down}, with the proxy set" if run.bytes_proxy else down,
        )
    )
    entries.append(("Epsilon", epsilon_text(run.epsilon, run.unit), _claim_terms(run)))
    entries.append(("Time", duration(run.seconds), counted(len(run.rounds), "round")))
    if run.virtual_seconds is not None:
        entries.append(("Virtual time", duration(run.virtual_seconds), "of the simulated devices"))
    return Section(title="In short", body=tiles(entries), wide=True)


def _x(index: int) -> float:
    """Rounds are counted from 0 in files and from 1 for people."""
    return float(index + 1)


def _accuracy_lines(run: Run) -> list[svg.Line]:
    lines = [
        svg.Line(
            name="student",
            points=[(_x(r.round), r.student_accuracy) for r in run.rounds],
            colour=STUDENT,
            width=3,
        ),
        svg.Line(
            name="devices, mean",
            points=[(_x(r.round), r.clients_mean) for r in run.rounds],
            colour=CLIENTS,
            dash=1,
        ),
        svg.Line(
            name="ensemble",
            points=[(_x(r.round), r.ensemble_accuracy) for r in run.rounds],
            colour=ENSEMBLE,
            dash=3,
        ),
    ]
    if run.accuracy.local_only is not None and run.rounds:
        ends = (run.rounds[0], run.rounds[-1])
        level = [(_x(r.round), run.accuracy.local_only) for r in ends]
        lines.append(svg.Line(name="trained alone", points=level, colour=LOCAL, dash=2, width=1.8, level=True))
    return lines


def _spread_band(run: Run) -> svg.Band | None:
    points = []
    for row in run.rounds:
        known = sorted(value for value in row.clients_accuracy or () if value is not None)
        if len(known) > 1:
            points.append((_x(row.round), quantile(known, 0.1), quantile(known, 0.9)))
    return svg.Band(name="middle 80 % of the devices", points=points, colour=CLIENTS) if len(points) > 1 else None


def accuracy_section(run: Run) -> Section | None:
    """Accuracy per round."""
    lines = _accuracy_lines(run)
    band = _spread_band(run)
    ends = [f"{line.name} {percent(last)}" for line in lines if (last := _last_value(line)) is not None]
    chart = svg.line_chart(
        "Accuracy per round",
        f"After {len(run.rounds)} rounds: {', '.join(ends)}.",
        lines,
        bands=[band] if band else [],
    )
    if not chart:
        return Section(title="Accuracy", body=paragraph("No round of this run has been evaluated.", "quiet"))
    rows = [
        (
            row.round + 1,
            percent(row.student_accuracy),
            percent(row.clients_mean),
            percent(row.ensemble_accuracy),
            svg.data_size(row.bytes_up),
            svg.data_size(row.bytes_down),
            epsilon_text(row.epsilon),
            duration(row.seconds),
        )
        for row in (run.rounds[index] for index in svg.thin(len(run.rounds), _MOST_ROWS))
    ]
    some = f" ({len(rows)} of {len(run.rounds)} rounds)" if len(rows) < len(run.rounds) else ""
    numbers = table(("round", "student", "devices, mean", "ensemble", "up", "down", "epsilon", "time"), rows, words=0)
    return Section(title="Accuracy per round", body=figure(chart) + details(f"The numbers{some}", numbers), wide=True)


def _last_value(line: svg.Line) -> float | None:
    return next((y for _, y in reversed(line.points) if y is not None), None)


def cost_section(run: Run) -> Section | None:
    """Accuracy against what was sent so far."""
    devices = run.devices
    if not devices or not (run.bytes_up or run.bytes_down):
        return None
    sent = float(run.bytes_proxy)
    student, clients = [], []
    for row in run.rounds:
        sent += row.bytes_up + row.bytes_down
        student.append((sent / devices, row.student_accuracy))
        clients.append((sent / devices, row.clients_mean))
    chart = svg.line_chart(
        "Accuracy against bytes",
        f"Accuracy against bytes per device, up and down together; {svg.data_size(sent / devices)} at the end.",
        [
            svg.Line(name="student", points=student, colour=STUDENT, width=3),
            svg.Line(name="devices, mean", points=clients, colour=CLIENTS, dash=1),
        ],
        x_label="sent so far per device, up and down, with the proxy set",
        x_format=svg.data_size,
        x_whole=False,
        width=svg.HALF,
        height=300,
    )
    return Section(title="Accuracy against bytes", body=figure(chart)) if chart else None


def virtual_section(run: Run) -> Section | None:
    """Accuracy against the time that the devices would have taken."""
    if run.virtual_seconds is None:
        return None
    unit, size = time_unit(run.virtual_seconds)

    def points(get: Callable[[Round], float | None]) -> list[tuple[float, float | None]]:
        return [((row.virtual_seconds or 0.0) / size, get(row)) for row in run.rounds]

    chart = svg.line_chart(
        f"Accuracy against virtual {unit}",
        f"Accuracy against the time of the simulated devices; {duration(run.virtual_seconds)} at the end.",
        [
            svg.Line(name="student", points=points(lambda r: r.student_accuracy), colour=STUDENT, width=3),
            svg.Line(name="devices, mean", points=points(lambda r: r.clients_mean), colour=CLIENTS, dash=1),
        ],
        x_label=f"virtual {unit}",
        x_format=svg.plain,
        x_whole=False,
        width=svg.HALF,
        height=300,
    )
    stale = [row.staleness for row in run.rounds if row.staleness is not None]
    caption = f"{duration(run.virtual_seconds / max(len(run.rounds), 1))} per round"
    if any(stale):
        caption += f"; answers used came {mean(stale):.2f} rounds late on average, at most {max(stale):.2f} in a round"
    return Section(title=f"Accuracy against virtual {unit}", body=figure(chart, f"{caption}.")) if chart else None


def bytes_section(run: Run) -> Section | None:
    """What travelled."""
    if not run.rounds:
        return None
    if not (run.bytes_up or run.bytes_down or run.bytes_proxy):
        secret = bool(run.rounds) and run.rounds[-1].raw.get("asked", 0) is None
        text = _SECRET if secret else "Nothing left a device and nothing was sent to one."
        return Section(title="Bytes", body=paragraph(text))
    up, down = [(0.0, 0.0)], [(0.0, float(run.bytes_proxy))]
    for row in run.rounds:
        up.append((_x(row.round), up[-1][1] + row.bytes_up))
        down.append((_x(row.round), down[-1][1] + row.bytes_down))
    lines = [
        svg.Line(name=f"down: {svg.data_size(down[-1][1])}", points=down, colour=1, dash=1),
        svg.Line(name=f"up: {svg.data_size(up[-1][1])}", points=up, colour=0, width=2.8),
    ]
    if run.bytes_proxy:
        level = [(0.0, float(run.bytes_proxy)), (_x(run.rounds[-1].round), float(run.bytes_proxy))]
        name = f"of which the proxy set, once: {svg.data_size(run.bytes_proxy)}"
        lines.append(svg.Line(name=name, points=level, colour=3, dash=2, width=1.6, level=True))
    chart = svg.line_chart(
        "Bytes sent so far",
        f"All devices together: {svg.data_size(run.bytes_up)} up, {svg.data_size(run.bytes_down)} down, and"
        f" {svg.data_size(run.bytes_proxy)} once for the proxy set.",
        lines,
        y_label="sent so far, all devices",
        y_format=svg.data_size,
        limits=(0.0, None),
        floor=1.0,
        width=svg.HALF,
        height=300,
    )
    proxy = run.partition.proxy if run.partition else None
    note = ""
    if proxy:
        note = (
            f"Proxy set: {proxy.name}, {proxy.size:,} inputs, {svg.data_size(proxy.bytes)} a copy, identity"
            f" {proxy.identity[:16] or 'unknown'}."
        )
    return Section(title="Bytes sent so far", body=figure(chart, note))


def devices_section(run: Run) -> Section | None:
    """How the devices fare, one by one."""
    known = [client for client in run.clients if client.accuracy is not None]
    if not known:
        return None
    known.sort(key=lambda client: (client.accuracy or 0.0, client.client))
    shown = [known[index] for index in svg.thin(len(known), _MOST_DOTS)]
    architectures = sorted({client.architecture for client in run.clients})
    rows = [
        (
            client.accuracy,
            client.local_only,
            client.architecture,
            f"{client.name}: {percent(client.accuracy)}"
            + (f", alone {percent(client.local_only)}" if client.local_only is not None else ""),
        )
        for client in shown
        if client.accuracy is not None
    ]
    values = [client.accuracy for client in known if client.accuracy is not None]
    text = (
        f"{counted(len(values), 'device')}: lowest {percent(values[0])}, median"
        f" {percent(quantile(values, 0.5))},"
        f" highest {percent(values[-1])}."
    )
    worse = sum(1 for c in known if c.local_only is not None and (c.accuracy or 0.0) < c.local_only)
    if any(client.local_only is not None for client in known):
        text += f" {worse or 'Not one'} of them would have done better alone."
    if len(shown) < len(known):
        text += f" {len(shown):,} of them are drawn, evenly chosen."
    chart = svg.dot_chart(
        "Accuracy of each device at the end",
        text,
        rows,
        architectures,
        x_label="devices, from lowest to highest",
    )
    by_kind = ""
    if len(architectures) > 1:
        by_kind = table(
            ("architecture", "devices", "accuracy, mean", "trained alone"),
            [
                (
                    kind or "model",
                    sum(1 for client in run.clients if client.architecture == kind),
                    percent(mean(client.accuracy for client in known if client.architecture == kind)),
                    percent(mean(client.local_only for client in known if client.architecture == kind)),
                )
                for kind in architectures
            ],
        )
    chosen = [run.clients[index] for index in svg.thin(len(run.clients), _MOST_CLIENTS)]
    listed = table(
        ("device", "architecture", "examples", "accuracy", "own classes", "trained alone"),
        [
            (
                client.name,
                client.architecture or DASH,
                f"{client.examples:,}",
                percent(client.accuracy),
                percent(client.accuracy_own_classes),
                percent(client.local_only),
            )
            for client in chosen
        ],
        words=2,
    )
    some = f" ({len(chosen)} of {len(run.clients):,})" if len(chosen) < len(run.clients) else ""
    return Section(
        title="Each device at the end",
        body=figure(chart, text) + by_kind + details(f"All devices{some}", listed),
        wide=True,
    )


def classes_section(run: Run) -> Section | None:
    """What the student knows of each class: the mean hides a class that it never learned."""
    shares, partition = run.summary.get("student_per_class"), run.partition
    if not isinstance(shares, list) or partition is None or len(shares) != len(partition.class_names):
        return None
    rows = []
    for at, (name, share) in enumerate(zip(partition.class_names, shares, strict=True)):
        held = [counts[at] for counts in partition.counts]
        known = float(share) if isinstance(share, int | float) else None
        rows.append((name, percent(known), f"{sum(held):,}", sum(1 for count in held if count)))
    shown = [rows[index] for index in svg.thin(len(rows), _MOST_ROWS)]
    some = f" {len(shown)} of {len(rows)} classes." if len(shown) < len(rows) else ""
    note = f"Recognised: share of the class's test records.{some}"
    head = ("class", "recognised", "examples", "devices that hold it")
    return Section(title="The student, class by class", body=table(head, shown) + paragraph(note, "quiet"))


def partition_section(run: Run) -> Section | None:
    """Who holds what."""
    partition = run.partition
    if partition is None or not partition.counts or not partition.class_names:
        return None
    clients, classes = len(partition.counts), len(partition.class_names)
    total = sum(map(sum, partition.counts))
    empty = sum(1 for row in partition.counts if not any(row))
    unheld = [
        name
        for at, name in enumerate(partition.class_names)
        if not any(row[at : at + 1] != (0,) for row in partition.counts)
    ]
    held = sorted(sum(1 for count in row if count) for row in partition.counts)
    kinds = counted(classes, "class", "classes")
    text = f"{counted(total, 'example')} of {kinds} on {counted(clients, 'device')}."
    if clients > 1:
        median = quantile([float(count) for count in held], 0.5)
        text += f" Half of the devices hold at most {median:g} classes."
    if empty:
        text += f" {counted(empty, 'device has', 'devices have')} no data."
    if unheld:
        text += f" Nobody holds: {', '.join(unheld[:8])}{' …' if len(unheld) > 8 else ''}."
    if clients > svg.PARTITION_COLUMNS:
        text += f" {svg.PARTITION_COLUMNS} devices are drawn, evenly chosen."
    if classes > svg.PARTITION_ROWS:
        text += f" {svg.PARTITION_ROWS} classes are drawn, evenly chosen."
    chart = svg.partition_chart(
        "Partition: examples per device and class",
        text,
        partition.counts,
        partition.client_names,
        partition.class_names,
        width=svg.WIDE if clients > 7 else svg.HALF,
    )
    return Section(title="Who holds what", body=figure(chart, text), wide=clients > 7)


_SECRET = "Who took part is secret, and with it how many did and how much they sent."


def events_section(run: Run) -> Section | None:
    """What went wrong, or that nothing did."""
    if not run.rounds:
        return None
    if run.rounds[-1].raw.get("asked", 0) is None:
        return Section(title="Events", body=paragraph(_SECRET))
    names = ("dropped", "late", "abstained", "quarantined")
    counts = {
        name: [len(row.quarantined) if name == "quarantined" else getattr(row, name) for row in run.rounds]
        for name in names
    }
    asked, answered = sum(row.asked for row in run.rounds), sum(row.answered for row in run.rounds)
    failed = [row for row in run.rounds if row.failed]
    text = f"{counted(asked, 'request')}, {counted(answered, 'answer')}"
    troubles = [f"{sum(counts[name]):,} {name}" for name in names if any(counts[name])]
    text += "; " + ", ".join(troubles) + "." if troubles else "."
    if not troubles and not failed:
        text += " Every device that was asked answered in time."
    body = paragraph(text)
    # Rounds are summed into at most 80 bars, since thinner ones could not be told apart.
    size = math.ceil(len(run.rounds) / 80)
    starts = range(0, len(run.rounds), size)
    stacks = [(name, [sum(counts[name][at : at + size]) for at in starts]) for name in names]
    chart = svg.bar_chart(
        "Devices that did not answer, per round",
        text,
        stacks,
        [_x(run.rounds[at].round) for at in starts],
        y_label="devices" if size == 1 else f"devices in {size} rounds",
        width=svg.HALF,
    )
    body += figure(chart)
    if failed:
        rows = [(row.round + 1, row.failed or "") for row in failed[:_MOST_EVENTS]]
        body += table(("round", "why the round failed"), rows, counted(len(failed), "failed round"), words=2)
    put_aside = [(row.round + 1, item) for row in run.rounds for item in row.quarantined]
    if put_aside:
        listed = table(
            ("round", "device", "reason", "message"),
            [(at, item.client, item.reason, item.message) for at, item in put_aside[:_MOST_EVENTS]],
            words=4,
        )
        more = f" (the first {_MOST_EVENTS})" if len(put_aside) > _MOST_EVENTS else ""
        body += details(f"{counted(len(put_aside), 'answer')} put aside{more}", listed)
    return Section(title="Events", body=body)


def epsilon_section(run: Run) -> Section | None:
    """Privacy spent, per round."""
    if all(row.epsilon is None for row in run.rounds):
        return None
    chart = svg.line_chart(
        "Epsilon spent so far",
        f"Epsilon after {len(run.rounds)} rounds: {epsilon_text(run.epsilon, run.unit)}.",
        [svg.Line(name="epsilon", points=[(_x(r.round), r.epsilon) for r in run.rounds], colour=4, step=True)],
        y_label="epsilon",
        y_format=svg.plain,
        limits=(0.0, None),
        floor=0.1,
        width=svg.HALF,
        height=300,
    )
    terms = _claim_terms(run)
    claimed = f"Claimed in total: {epsilon_text(run.epsilon, run.unit)}{', ' if terms else ''}{terms}."
    return Section(title="Epsilon", body=figure(chart, claimed))


def audit_section(run: Run) -> Section | None:
    """What `fedkd audit` found, beside the claim."""
    path = run.path / "audit.json"
    if not path.is_file():
        return None
    found = read_json(path)
    rows = []
    for view in found.get("views", ()):
        claimed = view.get("claimed")
        rows.append(
            (
                view["name"],
                view["who"],
                f"{view['auc']:.3f}",
                f"{view['tpr_at_1_percent_fpr']:.3f}",
                f"{view['epsilon']:.2f}",
                DASH if claimed is None else f"{claimed:.2f}",
            )
        )
    head = ("view", "attacker", "AUC", "TPR at 1 % FPR", "epsilon at least", "epsilon claimed")
    body = paragraph(f"{found.get('canaries')} canaries; {found.get('rerun')}.") + table(head, rows, words=2)
    if found.get("held") is not None:
        body += paragraph(found["held"])
    mechanism, labels = found.get("mechanism"), found.get("label_inference")
    if "run" in found:
        told = (found["run"]["epsilon"], found["run"]["ledger"], found["claim"]["epsilon"])
        known = [DASH if value is None else f"{value:.2f}" for value in told]
        body += paragraph(f"Epsilon of the run {known[0]}, of its ledger {known[1]}, of its repetition {known[2]}.")
    if mechanism:
        body += paragraph(
            f"Mechanism, {mechanism['what']}, {mechanism['runs']:,} times: epsilon at least {mechanism['bound']:.2f}, "
            f"claimed {mechanism['claimed']:.2f}."
        )
    if labels:
        body += paragraph(
            f"Label distributions guessed from soft labels: total variation {labels['attack']:.3f} to the truth, "
            f"{labels['prior']:.3f} by guessing the mean."
        )
    body += paragraph(f"At {100 * found.get('confidence', 0.95):g} % confidence: {found.get('verdict')}.")
    return Section(title="Audit", body=body, wide=True)


def loss_section(run: Run) -> Section | None:
    """Mean loss of each phase."""
    phases = sorted({phase for row in run.rounds for phase in row.loss})
    chart = svg.line_chart(
        "Mean loss per phase",
        f"Phases: {', '.join(phases)}.",
        [
            svg.Line(
                name=phase,
                points=[(_x(r.round), r.loss.get(phase)) for r in run.rounds],
                colour=at,
                dash=at % 4,
            )
            for at, phase in enumerate(phases)
        ],
        y_label="mean loss",
        y_format=svg.plain,
        limits=(None, None),
        floor=1e-6,
        width=svg.HALF,
        height=300,
    )
    return Section(title="Loss", body=figure(chart)) if chart else None


def limits_section(run: Run) -> Section:
    """What the numbers do not say."""
    return Section(title="Limits", body=_limits([run]), wide=True)


def _limits(runs: Sequence[Run]) -> str:
    points: list[str] = []
    open_runs = [run for run in runs if run.epsilon is None]
    if open_runs:
        whose = "" if len(open_runs) == len(runs) else f" ({len(open_runs)} of {len(runs)} runs)"
        if any(run.bytes_up for run in open_runs):
            points.append(
                f"Epsilon is infinity{whose}: nothing protects what leaves the devices. Soft labels and"
                f" weights can tell"
                " an attacker about the records they were learned from."
            )
        else:
            points.append(f"Epsilon is infinity{whose}: no mechanism was used. Nothing was sent in these rounds.")
    covered = [run for run in runs if run.epsilon is not None]
    for unit in dict.fromkeys(run.unit for run in covered):
        same = [run for run in covered if run.unit == unit]
        worst = max(run.epsilon or 0.0 for run in same)
        delta = max((run.delta for run in same if run.delta is not None), default=None)
        at = f" at delta = {delta:g}" if delta is not None else ""
        points.append(
            f"Epsilon {epsilon_text(worst, unit)}{at} is a claim about the mechanism. It holds for this run"
            f" alone: other runs"
            " on the same records add to it."
        )
    for run in runs:
        if not run.finished:
            planned = f" of {run.rounds_planned}" if run.rounds_planned else ""
            what = "has not finished" if run.status == "unfinished" else f"ended as “{run.status}”"
            name = f"{run.path.name}: this run" if len(runs) > 1 else "This run"
            points.append(f"{name} {what}: {len(run.rounds)}{planned} rounds are recorded.")
    seeds = {run.seed for run in runs}
    if len(seeds) == 1:
        points.append("One seed: differences of a few points may be chance.")
    notes = dict.fromkeys(note for run in runs for note in run.notes)
    points.extend(notes)
    return '<ul class="limits">' + "".join(f"<li>{escape(point)}</li>" for point in points) + "</ul>"


def configuration_section(run: Run) -> Section | None:
    """The resolved experiment, word for word."""
    if not run.config_text.strip():
        return None
    body = f'<pre tabindex="0">{escape(run.config_text.rstrip())}</pre>'
    return Section(title="Configuration", body=body)


def versions_section(run: Run) -> Section:
    """What it was made with."""
    rows: list[tuple[str, str]] = sorted(run.versions.items())
    rows.append(("git revision", run.git_revision or "unknown"))
    rows.append(("runner", run.runner))
    rows.append(("seed", DASH if run.seed is None else str(run.seed)))
    return Section(title="Made with", body=table(("what", "version"), rows, words=2))


RUN_SECTIONS: tuple[Callable[[Run], Section | None], ...] = (
    headline,
    limits_section,
    accuracy_section,
    cost_section,
    virtual_section,
    bytes_section,
    devices_section,
    classes_section,
    partition_section,
    events_section,
    epsilon_section,
    audit_section,
    loss_section,
    configuration_section,
    versions_section,
)


# --- sections of a sweep
# ------------------------------------------------------------------------------------------


def sweep_table(sweep: Sweep) -> Section:
    """All points, with their seeds put together."""
    groups = group_seeds(sweep.runs)
    present = [name for name in ACCURACY_NAMES if any(group.accuracy(name) for group in groups)]
    rows = [
        (
            group.label,
            ", ".join(DASH if seed is None else str(seed) for seed in group.seeds),
            *(spread_text(group.accuracy(name)) for name in present),
            svg.data_size(group.average("bytes_up_per_device")),
            svg.data_size(group.average("bytes_down_per_device")),
            epsilon_text(group.epsilon, group.unit),
            duration(group.average("seconds")),
        )
        for group in groups
    ]
    head = (
        "point",
        "seeds",
        *(ACCURACY_NAMES[name] for name in present),
        "up/device",
        "down/device",
        "epsilon",
        "time",
    )
    note = "Mean ± standard deviation over seeds (n - 1); bytes and time are means; down includes the proxy set."
    left_out = [f"{run.path.name} ({run.status})" for group in groups for run in group.left_out]
    if left_out:
        note += f" Left out of the means: {', '.join(left_out)}."
    if sweep.missing:
        note += f" Not started: {', '.join(sweep.missing)}."
    return Section(title="In short", body=table(head, rows, words=2) + paragraph(note, "quiet"), wide=True)


def _overlay(sweep: Sweep, title: str, get: Callable[[Any], float | None]) -> Section | None:
    """Thin lines for seeds, a thick one for their mean over the rounds that all of them have."""
    lines: list[svg.Line] = []
    for at, group in enumerate(group_seeds(sweep.runs)):
        curves = [{row.round: value for row in run.rounds if (value := get(row)) is not None} for run in group.counted]
        curves = [curve for curve in curves if curve]
        if not curves:
            continue
        if len(curves) > 1:
            lines.extend(
                svg.Line(
                    name=f"{group.label}, one seed",
                    points=[(_x(index), value) for index, value in curve.items()],
                    colour=at,
                    width=1,
                    opacity=0.4,
                    legend=False,
                )
                for curve in curves
            )
        common = sorted(set(curves[0]).intersection(*curves[1:]))
        lines.append(
            svg.Line(
                name=group.label,
                points=[(_x(index), mean(curve[index] for curve in curves)) for index in common],
                colour=at,
                dash=at % 4,
                width=2.8,
            )
        )
    chart = svg.line_chart(
        title,
        "Thin lines are single seeds, thick ones their mean. The table above has the end values.",
        lines,
    )
    if not chart:
        return None
    return Section(title=title, body=figure(chart, "Thin: one seed each. Thick: their mean."), wide=True)


def sweep_student(sweep: Sweep) -> Section | None:
    """The students, seeds over one another."""
    return _overlay(sweep, "Student, per round", lambda row: row.student_accuracy)


def sweep_clients(sweep: Sweep) -> Section | None:
    """The devices' mean, seeds over one another."""
    return _overlay(sweep, "Devices (mean), per round", lambda row: row.clients_mean)


def best_accuracy(group: Group) -> tuple[str, Spread] | None:
    """The accuracy that a method is judged by: its student where it has one, else the mean of its devices."""
    for name in ("student", "clients_mean"):
        if spread := group.accuracy(name):
            return name, spread
    return None


def bytes_per_device(group: Group) -> float | None:
    """Everything a device sends and receives, with the proxy set."""
    up, down = group.average("bytes_up_per_device"), group.average("bytes_down_per_device")
    return None if up is None or down is None else up + down


def sweep_cost(sweep: Sweep) -> Section | None:
    """Accuracy against bytes, one dot per point."""
    dots: list[svg.Dot] = []
    levels: list[tuple[float, str]] = []
    for at, group in enumerate(group_seeds(sweep.runs)):
        best, sent = best_accuracy(group), bytes_per_device(group)
        if best is None or sent is None:
            continue
        name, spread = best
        if not sent:
            levels.append((spread.mean, f"{group.label}: nothing sent"))
            continue
        hint = f"{group.label}, {ACCURACY_NAMES[name]}: {spread_text(spread)}, {svg.data_size(sent)} per device"
        dots.append(
            svg.Dot(
                x=sent / 1e6,
                y=spread.mean,
                label=group.label,
                colour=at,
                marker=0 if name == "student" else 2,
                spread=spread.std,
                hint=hint,
            )
        )
    if len(dots) + len(levels) < 2:
        return None
    chart = svg.scatter(
        "Accuracy against bytes",
        "; ".join(dot.hint for dot in dots) + ".",
        dots,
        levels=levels,
        x_label="megabytes per device, up and down, with the proxy set (log scale)",
    )
    caption = "Circle: the student. Triangle: mean of the devices (no student). Bars: ± one deviation."
    return Section(title="Accuracy against bytes", body=figure(chart, caption), wide=True) if chart else None


def sweep_virtual(sweep: Sweep) -> Section | None:
    """Accuracy against virtual time, one line per run."""
    ends = [run.virtual_seconds for run in sweep.runs if run.virtual_seconds is not None]
    if not ends:
        return None
    unit, size = time_unit(max(ends))
    lines = []
    for at, group in enumerate(group_seeds(sweep.runs)):
        best = best_accuracy(group)
        name = best[0] if best else "student"
        for place, run in enumerate(group.counted):
            points = [
                (row.virtual_seconds / size, row.student_accuracy if name == "student" else row.clients_mean)
                for row in run.rounds
                if row.virtual_seconds is not None
            ]
            lines.append(
                svg.Line(name=group.label, points=points, colour=at, dash=at % 4, width=1.8, legend=place == 0)
            )
    title = f"Accuracy against virtual {unit}"
    text = "One line per run: its student, or the mean of its devices where it has none."
    chart = svg.line_chart(title, text, lines, x_label=f"virtual {unit}", x_format=svg.plain, x_whole=False)
    return Section(title=title, body=figure(chart, text), wide=True) if chart else None


def sweep_runs(sweep: Sweep) -> Section:
    """Every run by itself, with what went wrong in it."""
    rows = [
        (
            run.path.relative_to(sweep.path).as_posix(),
            run.method,
            run.status,
            f"{len(run.rounds)}",
            percent(run.accuracy.student),
            percent(run.accuracy.clients_mean),
            sum(row.dropped for row in run.rounds),
            sum(row.late for row in run.rounds),
            sum(len(row.quarantined) for row in run.rounds),
            sum(1 for row in run.rounds if row.failed),
            duration(run.seconds),
        )
        for run in sweep.runs
    ]
    head = (
        "folder",
        "method",
        "status",
        "rounds",
        "student",
        "devices, mean",
        "dropped",
        "late",
        "quarantined",
    )
    return Section(title="Every run", body=table((*head, "failed rounds", "time"), rows, words=3), wide=True)


def sweep_limits(sweep: Sweep) -> Section | None:
    """What the numbers do not say."""
    return Section(title="Limits", body=_limits(sweep.runs), wide=True) if sweep.runs else None


def _of_first(section: Callable[[Run], Section | None]) -> Callable[[Sweep], Section | None]:
    """Show a run's section for the first run of the sweep, and say so."""

    def shown(sweep: Sweep) -> Section | None:
        found = section(sweep.runs[0]) if sweep.runs else None
        if found is None:
            return None
        return Section(title=f"{found.title} ({sweep.runs[0].path.name})", body=found.body, wide=found.wide)

    return shown


SWEEP_SECTIONS: tuple[Callable[[Sweep], Section | None], ...] = (
    sweep_table,
    sweep_limits,
    sweep_student,
    sweep_clients,
    sweep_cost,
    sweep_virtual,
    sweep_runs,
    _of_first(partition_section),
    _of_first(configuration_section),
    _of_first(versions_section),
)


# --- the page
# -----------------------------------------------------------------------------------------------------

_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ground:#f5f6f7;--ink:#1c2126;--muted:#5b6570;--line:#d9dde1;
--warn:#fff6e0;--warnline:#e0a100;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b07d00;--c4:#a8508a;--c5:#3d9bd1;
--c6:#8a8200;--c7:#4a5159}
@media screen and (prefers-color-scheme:dark){:root{
--paper:#1b1f24;--ground:#12151a;--ink:#e6e9ec;--muted:#a3adb8;
--line:#343b44;--warn:#33290f;--warnline:#c99400;--c0:#56b4e9;--c1:#f08a45;--c2:#35c79c;--c3:#e6b422;--c4:#dd93c0;
--c5:#8fd0f5;--c6:#d9d24a;--c7:#b8c0c9}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1160px;margin:0 auto;padding:24px 20px 48px}
header p{margin:2px 0;color:var(--muted)}
h1{font-size:1.7rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:0 0 10px}
.grid-page{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px;margin-top:18px;grid-auto-flow:dense}
section{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:16px 18px;min-width:0}
section.wide{grid-column:1/-1}
@media (max-width:900px){.grid-page{grid-template-columns:minmax(0,1fr)}main{padding:16px 10px}}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(148px,1fr));gap:14px 18px;margin:0}
.tile{border-left:3px solid var(--c0);padding-left:10px}
.tile dt{font-size:.82rem;color:var(--muted)}
.tile dd{margin:0;font-size:1.45rem;font-weight:600;line-height:1.25;font-variant-numeric:tabular-nums}
.tile dd.small{font-size:.8rem;font-weight:400;color:var(--muted)}
figure{margin:0}
.chart>svg{display:block;width:100%;height:auto;min-width:370px}
section.wide .chart>svg{min-width:640px}
figcaption,.quiet{font-size:.88rem;color:var(--muted);margin:8px 0 0;overflow-wrap:anywhere}
svg text{fill:var(--muted);font:12px system-ui,-apple-system,"Segoe UI",sans-serif}
svg text.label{fill:var(--ink)}
svg text.note{fill:var(--ink)}
svg .grid{stroke:var(--line);stroke-width:1;fill:none}
svg .axis{stroke:var(--muted);stroke-width:1;fill:none}
svg .stem{stroke:var(--muted);stroke-width:1;stroke-opacity:.5;fill:none}
svg .before{stroke:var(--muted);stroke-width:1.6;fill:none}
svg .level{stroke:var(--muted);stroke-width:1.2;fill:none}
svg .panel{fill:none;stroke:var(--line)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;margin:6px 0 0;padding:0;font-size:.88rem}
.legend svg{vertical-align:-2px;margin-right:7px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;width:100%;font-variant-numeric:tabular-nums;margin-top:8px}
caption{text-align:left;color:var(--muted);padding-bottom:4px}
th,td{text-align:left;padding:4px 10px 4px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--muted);font-weight:600}
th.n,td.n{text-align:right;white-space:nowrap}
details{margin-top:10px}
summary{cursor:pointer;font-size:.9rem;color:var(--c0)}
section.limits-box{background:var(--warn);border-color:var(--warnline)}
ul.limits{margin:0;padding-left:20px}
pre{margin:0;overflow:auto;max-height:420px;
font:13px/1.45 ui-monospace,Consolas,monospace;white-space:pre-wrap;
overflow-wrap:anywhere}
footer{margin-top:20px;font-size:.82rem;color:var(--muted)}
@media print{body{background:#fff;font-size:10pt}
.grid-page{grid-template-columns:repeat(2,minmax(0,1fr));gap:8px}section{padding:10px}
main{max-width:none;padding:0}
section{break-inside:avoid;border-radius:0}
.chart>svg,section.wide .chart>svg{min-width:0}
section.long{break-inside:auto}pre{max-height:none}
summary{color:inherit}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def page(title: str, lines: Sequence[str], sections: Sequence[Section], *, images: bool = False) -> str:
    """A whole page; `images` lets it show pictures that it holds itself."""
    shown = " img-src data:;" if images else ""
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
        # Should a name ever slip through unescaped, the browser still runs nothing and asks nobody.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
        f"{shown} style-src 'unsafe-inline'\">\n",
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n",
        f"<header><h1>{escape(title)}</h1>{''.join(paragraph(line) for line in lines)}</header>\n",
        '<div class="grid-page">\n',
    ]
    for index, section in enumerate(sections):
        kinds = ["wide"] if section.wide else []
        if section.title == "Limits":
            kinds.append("limits-box")
        if "<pre" in section.body or "<details" in section.body:
            kinds.append("long")
        parts.append(
            f'<section class="{" ".join(kinds)}" aria-labelledby="s{index}"><h2'
            f' id="s{index}">{escape(section.title)}</h2>'
            f"{section.body}</section>\n"
        )
    parts.append("</div>\n<footer>Made by fedkd. This file needs no network and runs no script.</footer>\n")
    parts.append("</main>\n</body>\n</html>\n")
    return "".join(parts)


def render_run(run: Run) -> str:
    """The report of one run as text."""
    planned = f" of {run.rounds_planned}" if run.rounds_planned and run.rounds_planned != len(run.rounds) else ""
    devices = f"{counted(run.devices, 'device')}, " if run.devices else ""
    seed = "" if run.seed is None else f", seed {run.seed}"
    lines = [
        f"{run.method} on the {run.runner} runner, {devices}{len(run.rounds)}{planned} rounds{seed} · {run.status}"
    ]
    if run.overrides:
        lines.append(", ".join(f"{key} = {value}" for key, value in run.overrides.items()))
    found = [made for section in RUN_SECTIONS if (made := section(run)) is not None]
    return page(run.name, lines, found)


def render_sweep(sweep: Sweep) -> str:
    """The report of a sweep as text."""
    groups = group_seeds(sweep.runs)
    lines = [f"{counted(len(sweep.runs), 'run')}, {counted(len(groups), 'point')}"]
    found = [made for section in SWEEP_SECTIONS if (made := section(sweep)) is not None]
    return page(sweep.name, lines, found)


def write_report(path: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run, a sweep, or a run of `fedkd distill`.

    Args:
        path: A run folder, a sweep folder, or the folder of a finished run of `fedkd distill`.
        out: The file to write, or a folder for it; by default `report.html` inside `path`.

    Returns:
        The file that was written.
    """
    from fedkd.report.distill import is_distill, render

    path = Path(path)
    if is_distill(path):
        text = render(path)
    elif is_run(path):
        text = render_run(Run.read(path))
    elif is_sweep(path):
        sweep = Sweep.read(path)
        if not sweep.runs:
            raise FedkdError(
                f"Expected at least one run in the sweep {path}, but none has started; wait for its first round."
            )
        text = render_sweep(sweep)
    else:
        raise FedkdError(
            f"Expected a run folder (with {ROUNDS_FILE}), a sweep folder (with {SWEEP_FILE}) or a finished distillation"
            f" at {path}, but there is none of them; give a folder that `fedkd simulate` or `fedkd distill` wrote."
        )
    target = Path(out) if out is not None else path / "report.html"
    if target.is_dir():
        target = target / "report.html"
    return write_text(target, text)
