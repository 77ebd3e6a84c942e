"""Small SVG charts for the report: lines with bands, sorted dots, stacked bars, a partition, a scatter.

Written out by hand rather than by a plotting library, for three reasons: the text stays text (searchable,
scalable, read aloud), the colours follow the page (dark screens, print), and the same numbers give the same
bytes.
Every chart has a title and a description for screen readers, and no chart tells things apart by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

# Okabe and Ito's palette, safe for the common kinds of colour blindness; the page defines --c0 ... --c7.
COLOURS = 8
DASHES = ("", "7 4", "2 4", "10 4 2 4")
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "down", "ring", "plus")

# Pixels at which a chart is drawn: over the whole page, or over half of it, so that letters come out alike.
WIDE, HALF = 920.0, 540.0
_RIGHT, _TOP, _BOTTOM = 18.0, 14.0, 44.0
_MOST_POINTS = 500  # per line: more cannot be seen at the width of a page


def colour(index: int) -> str:
    """The palette entry for the index-th thing that is drawn."""
    return f"var(--c{index % COLOURS})"


def number(value: float) -> str:
    """A coordinate: two decimals are a fiftieth of a pixel, and keep files small and equal everywhere."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in {"-0", ""} else text


def percent(value: float) -> str:
    """A fraction on an axis."""
    return f"{100 * value:.4g} %"


def plain(value: float) -> str:
    """A number on an axis."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def data_size(count: float | None) -> str:
    """Bytes for people, in powers of ten, as networks count them."""
    if count is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}" if count < 100 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} B"


def thin(count: int, most: int) -> list[int]:
    """At most `most` indices below `count`, evenly spread, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def ticks(low: float, high: float, most: int = 7, whole: bool = False) -> list[float]:
    """Round numbers from low to high."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most)
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # `place * step` leaves 0.30000000000000004 and the like, which rounding to the step's digits removes.
    digits = max(0, 1 - math.floor(math.log10(step)))
    return [round(place * step, digits) for place in range(first, last + 1)]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve. Points without a value are skipped: clients are not evaluated in every round."""

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: int = 0
    dash: int = 0
    width: float = 2.2
    opacity: float = 1.0
    legend: bool = True
    step: bool = False
    level: bool = False  # a reference value rather than measurements: no marks at its ends


@dataclass(frozen=True, kw_only=True)
class Band:
    """The area between a lower and an upper curve."""

    name: str
    points: Sequence[tuple[float, float, float]]
    colour: int = 0


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One point of a scatter, with an error bar where `spread` is given."""

    x: float
    y: float
    label: str = ""
    colour: int = 0
    marker: int = 0
    spread: float | None = None
    hint: str = ""
    size: float = 4.2


class _Frame:
    """The axes: maps data to pixels and collects what is drawn."""

    def __init__(
        self,
        *,
        x: tuple[float, float],
        y: tuple[float, float],
        width: float,
        height: float,
        x_label: str,
        y_label: str,
        x_format: Callable[[float], str] = plain,
        y_format: Callable[[float], str] = plain,
        x_whole: bool = False,
        x_log: bool = False,
        x_axis: bool = True,
        y_whole: bool = False,
    ) -> None:
        self.width, self.height = width, height
        self.x0, self.x1 = x if x[1] > x[0] else (x[0] - 0.5, x[0] + 0.5)
        self.y0, self.y1 = y if y[1] > y[0] else (y[0] - 0.5, y[0] + 0.5)
        self.x_log = x_log
        marks = [(tick, y_format(tick)) for tick in ticks(self.y0, self.y1, whole=y_whole)]
        self.left = 34 + 6.6 * max((len(name) for _, name in marks), default=2)
        self.right, self.top = width - _RIGHT, _TOP
        self.bottom = height - (_BOTTOM if x_axis else 28)
        self.parts: list[str] = []
        for tick, name in marks:
            at = self.y(tick)
            self.parts.append(f'<path class="grid" d="M{number(self.left)} {number(at)}H{number(self.right)}"/>')
            self.text(self.left - 7, at + 4, name, "end")
        for tick in _log_ticks(self.x0, self.x1) if x_log else ticks(self.x0, self.x1, 8, x_whole) if x_axis else ():
            at = self.x(tick)
            self.parts.append(f'<path class="axis" d="M{number(at)} {number(self.bottom)}v4"/>')
            self.text(at, self.bottom + 17, x_format(tick), "middle")
        self.parts.append(f'<path class="axis" d="M{number(self.left)} {number(self.bottom)}H{number(self.right)}"/>')
        self.text((self.left + self.right) / 2, height - 8, x_label, "middle", "label")
        middle = (self.top + self.bottom) / 2
        self.parts.append(
            f'<text class="label" text-anchor="middle" transform="translate(13 {number(middle)})'
            f' rotate(-90)">'
            f"{escape(y_label)}</text>"
        )

    def x(self, value: float) -> float:
        low, high = self.x0, self.x1
        if self.x_log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y0) / (self.y1 - self.y0) * (self.bottom - self.top)

    def text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "tick") -> None:
        self.parts.append(
            f'<text class="{kind}" text-anchor="{anchor}" x="{number(x)}" y="{number(y)}">{escape(text)}</text>'
        )

    def svg(self, title: str, description: str) -> str:
        return document(self.parts, self.width, self.height, title, description)


def document(parts: Sequence[str], width: float, height: float, title: str, description: str) -> str:
    """Wrap drawn parts. `viewBox` without a fixed width lets the picture shrink on a telephone."""
    return (
        f'<svg role="img" viewBox="0 0 {number(width)} {number(height)}" preserveAspectRatio="xMidYMid meet"'
        f' aria-label="{escape(title)}. {escape(description)}">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(parts)}</svg>"
    )


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    found = [factor * 10.0**decade for decade in decades for factor in factors]
    return [value for value in found if low * 0.999 <= value <= high * 1.001]


def _fit(values: Sequence[float], limits: tuple[float | None, float | None], floor: float) -> tuple[float, float]:
    """An axis that holds all values with a margin, no narrower than `floor` and never beyond `limits`."""
    low, high = min(values), max(values)
    margin = max(0.06 * (high - low), floor / 2 - (high - low) / 2, 0.0)
    low, high = low - margin, high + margin
    if limits[0] is not None:
        low = max(low, limits[0])
    if limits[1] is not None:
        high = min(high, limits[1])
    return low, high


def mark(x: float, y: float, marker: int, fill: str, size: float = 4.0, hint: str = "", opacity: float = 1.0) -> str:
    """A dot in one of eight shapes."""
    name = MARKERS[marker % len(MARKERS)]
    title = f"<title>{escape(hint)}</title>" if hint else ""
    look = f'fill="{fill}"' + ("" if opacity == 1 else f' fill-opacity="{number(opacity)}"')
    if name in {"circle", "ring"}:
        if name == "ring":
            look = f'fill="none" stroke="{fill}" stroke-width="1.6"'
        return f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(size)}" {look}>{title}</circle>'
    s = size * 1.12
    shapes = {
        "square": [
            (-s * 0.85, -s * 0.85),
            (s * 0.85, -s * 0.85),
            (s * 0.85, s * 0.85),
            (-s * 0.85, s * 0.85),
        ],
        "triangle": [(0, -s * 1.15), (s * 1.1, s * 0.85), (-s * 1.1, s * 0.85)],
        "down": [(0, s * 1.15), (s * 1.1, -s * 0.85), (-s * 1.1, -s * 0.85)],
        "diamond": [(0, -s * 1.25), (s * 1.05, 0), (0, s * 1.25), (-s * 1.05, 0)],
    }
    if name in shapes:
        corners = " ".join(f"{number(x + dx)},{number(y + dy)}" for dx, dy in shapes[name])
        return f'<polygon points="{corners}" {look}>{title}</polygon>'
    d = (
        f"M{number(x - s)} {number(y)}h{number(2 * s)}M{number(x)} {number(y - s)}v{number(2 * s)}"
        if name == "plus"
        else f"M{number(x - s)} {number(y - s)}l{number(2 * s)} {number(2 * s)}"
        f"M{number(x - s)} {number(y + s)}l{number(2 * s)} {number(-2 * s)}"
    )
    return f'<path d="{d}" fill="none" stroke="{fill}" stroke-width="2.2">{title}</path>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Names under a chart, each with a little picture of how it is drawn."""
    if not entries:
        return ""
    items = "".join(
        f'<li><svg aria-hidden="true" viewBox="0 0 30 14" width="30" height="14">{picture}</svg>{escape(name)}</li>'
        for name, picture in entries
    )
    return f'<ul class="legend">{items}</ul>'


def _stroke(line: Line) -> str:
    dash = DASHES[line.dash % len(DASHES)]
    return (
        f'fill="none" stroke="{colour(line.colour)}" stroke-width="{number(line.width)}"'
        f' stroke-linejoin="round"'
        + (f' stroke-dasharray="{dash}"' if dash else "")
        + ("" if line.opacity == 1 else f' stroke-opacity="{number(line.opacity)}"')
    )


def line_chart(
    title: str,
    description: str,
    lines: Sequence[Line],
    *,
    bands: Sequence[Band] = (),
    x_label: str = "round",
    y_label: str = "accuracy",
    x_format: Callable[[float], str] = plain,
    y_format: Callable[[float], str] = percent,
    limits: tuple[float | None, float | None] = (0.0, 1.0),
    floor: float = 0.05,
    x_whole: bool = True,
    width: float = WIDE,
    height: float = 330,
) -> str:
    """Curves over a common axis, with a legend; an empty text where nothing is known."""
    lines = [
        Line(**{**vars(line), "points": [(x, y) for x, y in line.points if y is not None]})
        for line in lines
        if any(y is not None for _, y in line.points)
    ]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points if y is not None]
    ys += [y for band in bands for _, low, high in band.points for y in (low, high)]
    frame = _Frame(
        x=(min(xs), max(xs)),
        y=_fit(ys, limits, floor),
        width=width,
        height=height,
        x_label=x_label,
        y_label=y_label,
        x_format=x_format,
        y_format=y_format,
        x_whole=x_whole,
    )
    for band in bands:
        kept = [band.points[index] for index in thin(len(band.points), _MOST_POINTS)]
        if len(kept) < 2:
            continue
        upper = [f"{number(frame.x(x))},{number(frame.y(high))}" for x, _, high in kept]
        lower = [f"{number(frame.x(x))},{number(frame.y(low))}" for x, low, _ in reversed(kept)]
        frame.parts.append(
            f'<polygon points="{" ".join(upper + lower)}" fill="{colour(band.colour)}" fill-opacity="0.16">'
            f"<title>{escape(band.name)}</title></polygon>"
        )
    for line in lines:
        kept_points = [line.points[index] for index in thin(len(line.points), _MOST_POINTS)]
        places = [(frame.x(x), frame.y(y)) for x, y in kept_points if y is not None]
        if len(places) == 1:
            frame.parts.append(mark(*places[0], line.colour, colour(line.colour), hint=line.name, opacity=line.opacity))
            continue
        path = f"M{number(places[0][0])} {number(places[0][1])}" + "".join(
            f"H{number(x)}V{number(y)}" if line.step else f"L{number(x)} {number(y)}" for x, y in places[1:]
        )
        frame.parts.append(f'<path d="{path}" {_stroke(line)}><title>{escape(line.name)}</title></path>')
        if len(places) <= 12 and line.legend and not line.level:
            frame.parts.extend(
                mark(x, y, line.colour, colour(line.colour), 3.2, opacity=line.opacity) for x, y in places
            )
    entries = [(line.name, f'<path d="M1 7H29" {_stroke(line)}/>') for line in lines if line.legend]
    entries += [
        (
            band.name,
            f'<rect x="1" y="2" width="28" height="10" fill="{colour(band.colour)}" fill-opacity="0.2"/>',
        )
        for band in bands
        if band.points
    ]
    return frame.svg(title, description) + legend(entries)


def dot_chart(
    title: str,
    description: str,
    rows: Sequence[tuple[float, float | None, str, str]],
    groups: Sequence[str],
    *,
    x_label: str,
    y_label: str = "accuracy",
    reference: str = "trained alone",
    width: float = WIDE,
    height: float = 300,
) -> str:
    """Values in the order given, marked by group, each with a stem from its reference value.

    Args:
        rows: (value, reference value or None, group, hint).
        groups: All groups, in the order of the legend.
    """
    if not rows:
        return ""
    values = [value for row in rows for value in row[:2] if value is not None]
    frame = _Frame(
        x=(0.0, float(len(rows) + 1)),
        y=_fit(values, (0.0, 1.0), 0.05),
        width=width,
        height=height,
        x_label=x_label,
        y_label=y_label,
        y_format=percent,
        x_axis=False,
    )
    size = max(1.7, min(5.0, 260 / len(rows)))
    # With many devices, stems would run into one grey area: faint dots then show the reference as a cloud.
    stems = len(rows) <= 150
    for place, (value, before, _, _) in enumerate(rows, 1):
        if before is not None and not stems:
            frame.parts.append(mark(frame.x(place), frame.y(before), 0, "var(--muted)", 1.6, opacity=0.5))
        elif before is not None:
            x = number(frame.x(place))
            frame.parts.append(f'<path class="stem" d="M{x} {number(frame.y(before))}V{number(frame.y(value))}"/>')
            frame.parts.append(
                f'<path class="before" d="M{number(frame.x(place) - size)}'
                f' {number(frame.y(before))}h{number(2 * size)}"/>'
            )
    index = {group: position for position, group in enumerate(groups)}
    for place, (value, _, group, hint) in enumerate(rows, 1):
        at = index[group]
        # Hints cost more bytes than dots; with many dots nobody could point at one of them.
        shown = hint if len(rows) <= 250 else ""
        frame.parts.append(mark(frame.x(place), frame.y(value), at, colour(at), size, shown))
    entries = [(group or "model", mark(15, 7, at, colour(at), 4.5)) for group, at in index.items()]
    if any(row[1] is not None for row in rows):
        tick = '<path class="stem" d="M15 1V11"/><path class="before" d="M9 11h12"/>'
        entries.append((reference, tick if stems else mark(15, 7, 0, "var(--muted)", 2.2, opacity=0.6)))
    return frame.svg(title, description) + legend(entries)


def bar_chart(
    title: str,
    description: str,
    stacks: Sequence[tuple[str, Sequence[int]]],
    firsts: Sequence[float],
    *,
    x_label: str = "round",
    y_label: str = "devices",
    width: float = WIDE,
    height: float = 190,
) -> str:
    """Stacked bars, one per position in `firsts`."""
    stacks = [(name, values) for name, values in stacks if any(values)]
    if not stacks or not firsts:
        return ""
    totals = [sum(values[place] for _, values in stacks) for place in range(len(firsts))]
    step = firsts[1] - firsts[0] if len(firsts) > 1 else 1.0
    frame = _Frame(
        x=(firsts[0] - step / 2, firsts[-1] + step / 2),
        y=(0.0, float(max(totals))),
        width=width,
        height=height,
        x_label=x_label,
        y_label=y_label,
        x_whole=True,
        y_whole=True,
    )
    wide = min(28.0, 0.8 * (frame.right - frame.left) / len(firsts))
    for place, first in enumerate(firsts):
        below = 0
        for at, (name, values) in enumerate(stacks):
            if values[place]:
                top = frame.y(below + values[place])
                frame.parts.append(
                    f'<rect x="{number(frame.x(first) - wide / 2)}" y="{number(top)}" width="{number(wide)}"'
                    f' height="{number(frame.y(below) - top)}" {_hatched(at)}>'
                    f"<title>{escape(name)}: {values[place]}</title></rect>"
                )
                below += values[place]
    entries = [
        (name, f'<rect x="8" y="1" width="14" height="12" {_hatched(at)}/>') for at, (name, _) in enumerate(stacks)
    ]
    return frame.svg(title, description) + legend(entries)


def _hatched(at: int) -> str:
    """Colours that also differ in lightness, with an outline, for prints in black and white."""
    shades = (("--c4", 0.95), ("--c1", 0.75), ("--c5", 0.45), ("--c7", 0.85))
    name, opacity = shades[at % len(shades)]
    return f'fill="var({name})" fill-opacity="{opacity}" stroke="var({name})" stroke-width="0.8"'


def scatter(
    title: str,
    description: str,
    dots: Sequence[Dot],
    *,
    levels: Sequence[tuple[float, str]] = (),
    x_label: str,
    y_label: str = "accuracy",
    width: float = WIDE,
    height: float = 340,
) -> str:
    """Points over a logarithmic axis; `levels` are things without an x of their own, drawn as lines."""
    if not dots:
        return ""
    low, high = min(dot.x for dot in dots) / 1.6, max(dot.x for dot in dots) * 2.6
    ys = [dot.y + sign * (dot.spread or 0) for dot in dots for sign in (-1, 1)] + [y for y, _ in levels]
    frame = _Frame(
        x=(low, high),
        y=_fit(ys, (0.0, 1.0), 0.05),
        width=width,
        height=height,
        x_label=x_label,
        y_label=y_label,
        y_format=percent,
        x_log=True,
    )
    taken: list[tuple[float, float]] = []
    for place_x, (y, name) in enumerate(levels):
        at = frame.y(y)
        frame.parts.append(
            f'<path class="level" d="M{number(frame.left)} {number(at)}H{number(frame.right)}" stroke-dasharray="5 4"/>'
        )
        frame.text(frame.left + 6 + 190 * (place_x % 4), at - 5, name, "start", "note")
    for dot in dots:
        x, y = frame.x(dot.x), frame.y(dot.y)
        if dot.spread:
            frame.parts.append(
                f'<path d="M{number(x)}'
                f' {number(frame.y(dot.y - dot.spread))}V{number(frame.y(dot.y + dot.spread))}"'
                f' stroke="{colour(dot.colour)}" stroke-width="1.6"/>'
            )
        frame.parts.append(mark(x, y, dot.marker, colour(dot.colour), dot.size, dot.hint))
        # Labels that would lie over an earlier one move down until there is room.
        place = y + 4
        while any(abs(place - other) < 13 and abs(x - before) < 150 for before, other in taken):
            place += 13
        taken.append((x, place))
        frame.text(x + 9, place, dot.label, "start", "note")
    return frame.svg(title, description)


def partition_chart(
    title: str,
    description: str,
    counts: Sequence[Sequence[int]],
    client_names: Sequence[str],
    class_names: Sequence[str],
    *,
    width: float = WIDE,
) -> str:
    """Devices from left to right, classes from top to bottom: bubbles for a few, a heat map for many.

    The bars above are each device's number of examples. Many devices or classes are thinned
    evenly; the caller says so.
    """
    clients, classes = len(counts), len(class_names)
    if not clients or not classes:
        return ""
    columns, rows = thin(clients, PARTITION_COLUMNS), thin(classes, PARTITION_ROWS)
    bubbles = len(columns) <= 40 and len(rows) <= 25
    longest = max(len(class_names[row]) for row in rows)
    left = min(150.0, max(34.0, 6.3 * longest + 12))
    widest = 6.4 * max(len(client_names[client]) for client in columns)
    # Few devices with long names, such as hospitals, get wider columns, so that the names fit.
    cell_x = min(max(60.0, min(widest, 120.0)), (width - left - _RIGHT) / len(columns))
    cell_y = max(7.0, min(24.0, 380 / len(rows)))
    bars, top = 46.0, 62.0
    bottom = top + cell_y * len(rows)
    height = bottom + 44
    most = max(1, max(counts[client][row] for client in columns for row in rows))
    totals = [sum(counts[client]) for client in columns]
    parts: list[str] = []

    def text(x: float, y: float, content: str, anchor: str, kind: str = "tick") -> None:
        parts.append(
            f'<text class="{kind}" text-anchor="{anchor}" x="{number(x)}" y="{number(y)}">{escape(content)}</text>'
        )

    biggest = max(1, *totals)
    text(left - 7, 16 + 4, f"{biggest:,}", "end")
    text(left - 7, top - 6, "0", "end")
    path = ""
    for place, total in enumerate(totals):
        tall = bars * total / biggest
        path += (
            f"M{number(left + cell_x * (place + 0.14))} {number(top - 6)}v{number(-tall)}"
            f"h{number(cell_x * 0.72)}v{number(tall)}z"
        )
    parts.append(f'<path d="{path}" fill="var(--muted)" fill-opacity="0.55"/>')
    every = 1 if cell_y >= 11 else math.ceil(11 / cell_y)
    for place, row in enumerate(rows):
        middle = top + cell_y * (place + 0.5)
        if bubbles:
            right = left + cell_x * len(columns)
            parts.append(f'<path class="grid" d="M{number(left)} {number(middle)}H{number(right)}"/>')
        if place % every == 0:
            name = class_names[row]
            text(left - 7, middle + 4, name if len(name) <= 22 else name[:21] + "…", "end")
    if bubbles:
        radius = min(cell_x, cell_y * 1.25) * 0.48
        for x_place, client in enumerate(columns):
            for y_place, row in enumerate(rows):
                if count := counts[client][row]:
                    # The area, not the radius, is what the eye compares.
                    size = max(0.9, radius * math.sqrt(count / most))
                    hint = f"{client_names[client]}, {class_names[row]}: {count:,}"
                    parts.append(
                        f'<circle cx="{number(left + cell_x * (x_place + 0.5))}" r="{number(size)}"'
                        f' cy="{number(top + cell_y * (y_place + 0.5))}" fill="var(--c0)" fill-opacity="0.8">'
                        f"<title>{escape(hint)}</title></circle>"
                    )
    else:
        # One path per shade instead of one rectangle per cell: a tenth of the bytes.
        shades: dict[int, list[str]] = {}
        gap = 0.0 if cell_x < 6 else 0.6
        for x_place, client in enumerate(columns):
            for y_place, row in enumerate(rows):
                if count := counts[client][row]:
                    shade = max(1, math.ceil(10 * math.sqrt(count / most)))
                    shades.setdefault(shade, []).append(
                        f"M{number(left + cell_x * x_place)} {number(top + cell_y * y_place)}"
                        f"h{number(cell_x - gap)}v{number(cell_y - gap)}h{number(gap - cell_x)}z"
                    )
        parts.append(
            f'<rect class="panel" x="{number(left)}" y="{number(top)}"'
            f' width="{number(cell_x * len(columns))}"'
            f' height="{number(cell_y * len(rows))}"/>'
        )
        for shade in sorted(shades):
            parts.append(f'<path d="{"".join(shades[shade])}" fill="var(--c0)" fill-opacity="{shade / 10:g}"/>')
    fits = cell_x >= widest
    if fits:
        for place, client in enumerate(columns):
            text(left + cell_x * (place + 0.5), bottom + 16, client_names[client], "middle")
    else:
        step = math.ceil(34 / cell_x)
        for place in range(0, len(columns), step):
            text(left + cell_x * (place + 0.5), bottom + 16, str(columns[place]), "middle")
    text(
        left + cell_x * len(columns) / 2,
        bottom + 36,
        "device" if fits else "device (number)",
        "middle",
        "label",
    )
    shapes = '<path d="M4 13V6h6v7zM12 13V2h6v11zM20 13V9h6v4z" fill="var(--muted)" fill-opacity="0.55"/>'
    key = [("examples of a device", shapes)]
    if bubbles:
        key.append((f"area: examples of a class (largest {most:,})", mark(15, 7, 0, colour(0), 6)))
    else:
        steps = "".join(
            f'<rect x="{1 + 7 * at}" y="2" width="7" height="10" fill="var(--c0)" fill-opacity="{level}"/>'
            for at, level in enumerate((0.1, 0.4, 0.7, 1))
        )
        key.append((f"examples of a class: 1 to {most:,} (square-root scale)", steps))
    return document(parts, width, height, title, description) + legend(key)


PARTITION_COLUMNS = 160
PARTITION_ROWS = 40
