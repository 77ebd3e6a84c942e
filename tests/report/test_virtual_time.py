"""What a run in virtual time shows: accuracy against virtual hours, in report, summary and on the terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedkd.report.html import RUN_SECTIONS, time_unit, virtual_section, write_report
from fedkd.report.runfolder import Run, write_sweep_summary


def timed(write_run: object, folder: Path, hours: float) -> Path:
    """Give a run folder a clock that ends after ``hours``."""
    path: Path = write_run(folder)  # type: ignore[operator]
    rows = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    for at, row in enumerate(rows, 1):
        row |= {"virtual_seconds": 3600 * hours * at / len(rows), "staleness": 1.5, "in_flight": 3}
    (path / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps({**summary, "virtual_seconds": 3600 * hours}))
    return path


def test_accuracy_is_drawn_against_virtual_hours(tmp_path: Path, write_run: object) -> None:
    path = timed(write_run, tmp_path / "run", 5.0)
    run = Run.read(path)
    assert run.virtual_seconds == 18_000 and run.rounds[-1].virtual_seconds == 18_000 and run.rounds[0].in_flight == 3
    section = virtual_section(run)
    assert section is not None and "hours" in section.title and "1.50 rounds late" in section.body
    text = write_report(path).read_text()
    assert "Accuracy against virtual hours" in text and "Accuracy against bytes" in text
    assert re.search(r"5 h 0 min|300 min", text)


def test_a_run_without_a_clock_says_nothing_of_it(tmp_path: Path, write_run: object) -> None:
    path: Path = write_run(tmp_path / "run")  # type: ignore[operator]
    assert Run.read(path).virtual_seconds is None and virtual_section(Run.read(path)) is None
    assert "irtual" not in write_report(path).read_text()
    assert virtual_section in RUN_SECTIONS


def test_a_run_that_was_cut_off_takes_its_clock_from_the_rounds(tmp_path: Path, write_run: object) -> None:
    path = timed(write_run, tmp_path / "run", 2.0)
    (path / "summary.json").unlink()
    assert Run.read(path).virtual_seconds == 7200


def test_a_sweep_draws_its_runs_together(tmp_path: Path, write_run: object) -> None:
    for seed, hours in ((1, 2.0), (2, 4.0)):
        timed(write_run, tmp_path / f"seed={seed}", hours)
    points = [{"overrides": {"seed": s}, "folder": f"seed={s}"} for s in (1, 2)]
    (tmp_path / "sweep.json").write_text(json.dumps({"schema": 1, "name": "digits", "points": points}))
    assert "Accuracy against virtual hours" in write_report(tmp_path).read_text()
    summary = json.loads(write_sweep_summary(tmp_path).read_text())
    assert {point["virtual_seconds"] for point in summary["points"]} in ({10_800.0}, {7200.0, 14_400.0})


@pytest.mark.parametrize(("seconds", "unit"), [(3.0, "seconds"), (90.0, "minutes"), (3600.0, "hours")])
def test_the_unit_suits_the_time(seconds: float, unit: str) -> None:
    assert time_unit(seconds)[0] == unit
