"""The report of a run of `fedkd distill`: what student and teacher reach, the loss, and a look at the synthetic inputs."""

from __future__ import annotations

import base64
import json
import math
import struct
import zlib
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkd.errors import FedkdError
from fedkd.report import svg
from fedkd.report.html import DASH, Section, counted, duration, figure, page, paragraph, percent, table, tiles

SUMMARY, CONFIG, POOL = "summary.json", "config.yaml", "pool.npz"
_COLUMNS = 16
_SIDE = 56  # pixels of the longer side of an input on the page


def is_distill(path: Path) -> bool:
    """Is this the folder of a finished run of `fedkd distill`?"""
    try:
        found = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("kind") == "distill"


def render(path: Path) -> str:
    """The report of the run in folder `path` as text.

    Raises:
        FedkdError: its files cannot be read.
    """
    summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    config = (path / CONFIG).read_text(encoding="utf-8") if (path / CONFIG).is_file() else ""
    method = summary.get("method")
    beside = "with others that learn" if summary.get("members") else "by its teacher's answers"
    what = f"without data, by {method['name']}" if method else beside
    sections = [_headline(summary), _limits(summary), _loss(summary), _classes(summary), _inputs(path, summary)]
    if config.strip():
        sections.append(Section(title="Configuration", body=f'<pre tabindex="0">{escape(config.rstrip())}</pre>'))
    sections.append(_versions(summary))
    lines = [f"A student taught {what}, seed {summary.get('seed', DASH)}"]
    return page(str(summary.get("name", path.name)), lines, [s for s in sections if s is not None], images=True)


def _headline(summary: dict[str, Any]) -> Section:
    accuracy, size = summary["accuracy"], summary.get("parameters", {})
    entries = []
    for key, name in (("student", "Student"), ("teacher", "Teacher"), ("alone", "Student alone")):
        if accuracy.get(key) is not None:
            parameters = size.get("student" if key == "alone" else key)
            said = counted(parameters, "parameter") if parameters else ""
            metric = summary.get("metric", "accuracy")
            note = said if metric == "accuracy" else f"{metric}, {said}" if said else metric
            entries.append((name, percent(accuracy[key]), note))
    if summary["agreement"] is not None:
        entries.append(("Agreement", percent(summary["agreement"]), "of the inputs learnt on"))
    if summary.get("queries") is not None:
        entries.append(("Queries", f"{summary['queries']:,}", "inputs that the teacher answered"))
    if summary.get("paid") is not None:
        entries.append(("Paid", f"{summary['paid']:,}", "different inputs, charged by the service"))
    entries.append(("Time", duration(summary.get("seconds")), counted(len(summary["log"]), "epoch")))
    return Section(title="In short", body=tiles(entries), wide=True)


def _limits(summary: dict[str, Any]) -> Section | None:
    texts = []
    if summary.get("method"):
        texts.append(
            "No record was read, but the teacher learnt from records: what is made from it can look like them, and tells of "
            "them what the teacher does. No epsilon covers the student or the inputs beyond one that covers the teacher."
        )
    if summary.get("told"):
        texts.append(f"What the service says of its answers: {summary['told']}.")
    return Section(title="Limits", body="".join(map(paragraph, texts)), wide=True) if texts else None


def _loss(summary: dict[str, Any]) -> Section | None:
    log = summary["log"]
    if not log:
        return None
    points = [(float(entry["epoch"] + 1), float(entry["total"])) for entry in log if math.isfinite(entry["total"])]
    top = max((y for _, y in points), default=0.0)
    chart = svg.line_chart(
        "Loss per epoch",
        f"The student's mean loss in {len(log)} epochs.",
        [svg.Line(name="student", points=points)],
        x_label="epoch",
        y_label="loss",
        y_format=svg.plain,
        limits=(0.0, None),
        floor=max(top * 0.05, 1e-6),
    )
    against = " The inputs oppose the student, so that its loss need not fall." if summary.get("method") else ""
    return Section(title="Loss per epoch", body=figure(chart, f"Mean over each epoch.{against}"), wide=True)


def _classes(summary: dict[str, Any]) -> Section | None:
    found = {k: v for k, v in summary.get("accuracy_by_class", {}).items() if v}
    if not found:
        return None
    names = list(found)
    rows = [(c, *(percent(found[n][c]) for n in names)) for c in range(len(found[names[0]]))]
    return Section(title="Accuracy by class", body=table(("class", *names), rows))


def _inputs(path: Path, summary: dict[str, Any]) -> Section | None:
    file = path / POOL
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as pool:
            x, logits = np.nan_to_num(np.asarray(pool["x"], np.float64)), np.asarray(pool["logits"])
    except (OSError, ValueError, KeyError, zlib.error) as cause:
        raise FedkdError(
            f"the pool {file} cannot be read ({cause}): remove it to write the report without it"
        ) from cause
    named = logits.argmax(1)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        text = f"{counted(len(x), 'synthetic input')} of shape {list(x.shape[1:])}, which are no pictures."
        return Section(title="Synthetic inputs", body=paragraph(text))
    low, high = summary.get("bounds") or (float(np.quantile(x, 0.01)), float(np.quantile(x, 0.99)))
    pixels = (np.clip((x - low) / max(high - low, 1e-9), 0, 1) * 255).round().astype(np.uint8)
    rows = []
    for c in range(logits.shape[1]):
        members = np.flatnonzero(named == c)
        share = percent(len(members) / len(x))
        chosen = members[np.linspace(0, len(members) - 1, min(_COLUMNS, len(members))).astype(int)]
        picture = _picture(strip(pixels[chosen]), f"synthetic inputs named {c}") if len(members) else DASH
        rows.append(f"<tr><td>{c}</td><td>{share}</td><td>{picture}</td></tr>")
    caption = (
        f"Up to {_COLUMNS} of the {len(x):,} inputs that were kept, by the class that the teacher names, from the oldest to "
        "the newest."
    )
    head = '<thead><tr><th scope="col">class</th><th scope="col">share</th><th scope="col">inputs</th></tr></thead>'
    body = f'<div class="scroll"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>{paragraph(caption, "quiet")}'
    return Section(title="Synthetic inputs", body=body, wide=True)


def _versions(summary: dict[str, Any]) -> Section:
    rows = sorted((str(k), str(v)) for k, v in summary.get("versions", {}).items())
    rows.append(("git revision", str(summary.get("git_revision") or "unknown")))
    return Section(title="Made with", body=table(("what", "version"), rows, words=2))


def strip(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images [N, channels, height, width] side by side, a white pixel between: [height, N (width + 1) - 1, channels]."""
    count, channels, height, width = pixels.shape
    out = np.full((height, count * (width + 1) - 1, channels), 255, np.uint8)
    for i, image in enumerate(pixels):
        out[:, i * (width + 1) : i * (width + 1) + width] = image.transpose(1, 2, 0)
    return out


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels [height, width, 1 or 3] as a PNG file."""
    height, width, channels = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], 1)
    body = zlib.compress(lines.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _picture(pixels: NDArray[np.uint8], words: str) -> str:
    data = base64.b64encode(png(pixels)).decode()
    height = max(_SIDE, pixels.shape[0])
    width = round(pixels.shape[1] * height / pixels.shape[0])
    return (
        f'<img alt="{escape(words)}" width="{width}" height="{height}" style="image-rendering:pixelated" '
        f'src="data:image/png;base64,{data}">'
    )
