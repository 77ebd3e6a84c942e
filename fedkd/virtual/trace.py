"""Devices from a CSV file: one line per device, or one per device and window of availability."""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedkd.errors import ConfigError

PROFILE = ("flops_per_second", "down_bytes_per_second", "up_bytes_per_second", "latency_seconds")
WINDOW = ("on_from_seconds", "on_until_seconds")
OPTIONAL = ("latency_seconds", *WINDOW)
COLUMNS = ("device", *PROFILE, *WINDOW)


@dataclass(frozen=True)
class Traced:
    """One device of a trace: what it can do, and when it is there [start, end); no windows: always."""

    profile: Mapping[str, float]
    windows: tuple[tuple[float, float], ...]


def read_trace(path: Path, repeat_seconds: float | None = None) -> list[Traced]:
    """Read the devices of a trace in the order in which they first appear.

    Raises:
        ConfigError: naming the line and column, what was expected and what came.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except OSError as cause:
        raise ConfigError(f"cannot read the trace {path}: {cause.strerror or cause}") from cause
    except (csv.Error, UnicodeDecodeError) as cause:
        raise ConfigError(f"the trace {path} is no CSV file: {cause}") from cause
    if len(lines) < 2:
        raise ConfigError(f"the trace {path} holds no device: expected a header ({','.join(COLUMNS)}) and lines")
    header = _header(path, lines[0][1])
    profiles: dict[str, dict[str, float]] = {}
    windows: dict[str, list[tuple[float, float] | None]] = {}
    for number, row in lines[1:]:
        where = f"{path} line {number}"
        if len(row) != len(header):
            raise ConfigError(f"{where}: expected {len(header)} cells as in the header, got {len(row)}")
        cells = {name: cell.strip() for name, cell in zip(header, row, strict=True)}
        device = cells["device"]
        if not device:
            raise ConfigError(f"{where}: device is empty: every line says whose it is")
        _profile(where, device, cells, profiles)
        window = _window(where, cells, repeat_seconds)
        if device in windows and None in (window, *windows[device]):
            raise ConfigError(f"{where}: device {device!r} has several lines, so that each of them needs a window")
        windows.setdefault(device, []).append(window)
    return [Traced(profiles[device], _sorted(path, device, windows[device])) for device in profiles]


def _header(path: Path, row: list[str]) -> list[str]:
    header = [cell.strip() for cell in row]
    for name in header:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(COLUMNS)}."
            raise ConfigError(f"{path}: unknown column {name!r}.{hint}")
        if header.count(name) > 1:
            raise ConfigError(f"{path}: column {name!r} is there twice")
    missing = [name for name in COLUMNS if name not in header and name not in OPTIONAL]
    if missing:
        raise ConfigError(f"{path}: the header lacks {', '.join(missing)}")
    if (WINDOW[0] in header) != (WINDOW[1] in header):
        raise ConfigError(f"{path}: {WINDOW[0]} and {WINDOW[1]} belong together, but one of them came")
    return header


def _profile(where: str, device: str, cells: Mapping[str, str], profiles: dict[str, dict[str, float]]) -> None:
    known = profiles.get(device)
    found = {}
    for name in PROFILE:
        text = cells.get(name, "")
        if not text and known is not None:
            found[name] = known[name]
        elif not text and name in OPTIONAL:
            found[name] = 0.0
        else:
            found[name] = _number(where, name, text, above=name not in OPTIONAL)
    if known is not None and found != known:
        changed = next(name for name in PROFILE if found[name] != known[name])
        raise ConfigError(
            f"{where}: {changed} of device {device!r} is {found[changed]:g}, but {known[changed]:g} in an earlier line: "
            "leave it empty in further lines, or make them agree"
        )
    profiles[device] = found


def _window(where: str, cells: Mapping[str, str], repeat_seconds: float | None) -> tuple[float, float] | None:
    texts = [cells.get(name, "") for name in WINDOW]
    if not any(texts):
        return None
    start, end = (_number(where, name, text, above=False) for name, text in zip(WINDOW, texts, strict=True))
    if not start < end:
        raise ConfigError(f"{where}: on_until_seconds ({end:g}) must be above on_from_seconds ({start:g})")
    if repeat_seconds is not None and end > repeat_seconds:
        raise ConfigError(
            f"{where}: on_until_seconds ({end:g}) lies beyond virtual.repeat_seconds ({repeat_seconds:g})"
        )
    return start, end


def _number(where: str, name: str, text: str, *, above: bool) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or (above and value == 0):
        raise ConfigError(f"{where}: {name}: expected a number {'above' if above else 'of at least'} 0, got {text!r}")
    return value


def _sorted(path: Path, device: str, windows: list[tuple[float, float] | None]) -> tuple[tuple[float, float], ...]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(window for window in windows if window is not None):
        if merged and start < merged[-1][1]:
            raise ConfigError(
                f"{path}: windows of device {device!r} overlap: {merged[-1][0]:g}-{merged[-1][1]:g} and "
                f"{start:g}-{end:g} seconds"
            )
        if merged and start == merged[-1][1]:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)
