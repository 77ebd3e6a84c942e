"""Published tables are read, run, reused and written from what was measured alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedkd import papers
from fedkd.errors import ConfigError

SHIPPED = sorted((Path(__file__).parents[2] / "simulations").glob("*/tables/*.yaml"))

TABLE: dict[str, Any] = {
    "title": "Two rows",
    "paper": "Somebody, 2020",
    "note": "Ours misses because it is tiny.",
    "seeds": [1, 2],
    "base": {
        "name": "two",
        "rounds": 1,
        "data": {"source": "digits", "train_size": 120, "test_size": 40},
        "partition": {"clients": 3},
        "proxy": {"size": 20},
        "models": {"student": "logreg", "devices": "logreg"},
        "training": {"steps": 2},
        "evaluation": {"local_only": False},
    },
    "rows": [
        {"label": "with", "published": "90"},
        {"label": "without", "set": {"algorithm": {"name": "fedavg"}}, "measure": "clients_mean"},
    ],
}


FOUND = {
    "seeds": [1, 2],
    "rows": [
        {
            "label": label,
            "measure": key,
            "published": "90",
            "student": {"mean": 0.5, "std": 0.25, "per_seed": [0.25, 0.75]},
            "clients_mean": {"mean": 0.125, "std": None, "per_seed": [0.125]},
            "bytes_up_per_device": 1500.0,
            "bytes_down_per_device": 250.0,
        }
        for label, key in (("with", "student"), ("without", "clients_mean"))
    ],
}


def table(folder: Path, **more: Any) -> Path:
    path = folder / "tables" / "two.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({**TABLE, **more}))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_table_holds_valid_experiments_with_names_of_their_own(path: Path) -> None:
    source = papers.Source.read(path)
    dumps = [(source.experiment(row, 1).dump(), row.measure) for row in source.table.rows]
    assert len(set(dumps)) == len(dumps) and len(source.table.seeds) >= 3


def test_rows_that_differ_in_what_they_measure_alone_share_their_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = table(tmp_path), []
    raw = papers.Source.read(path).table.model_dump(mode="json")
    raw["rows"] = [{"label": n, "measure": n, "set": {}} for n in ("student", "ensemble")]
    raw["rows"].append({"label": "more", "set": {"rounds": 2}})
    path.write_text(json.dumps(raw))

    def measure(points: Any, *more: Any) -> list[dict[str, Any]]:
        asked.extend(where["row"] for where, _ in points)
        return [{"n": n} for n in range(2)]

    monkeypatch.setattr(papers, "measure", measure)
    found = papers.run(path, tmp_path)["rows"]
    assert set(asked) == {0, 2} and [(r["label"], r["n"]) for r in found] == [
        ("student", 0),
        ("ensemble", 0),
        ("more", 1),
    ]


def test_a_table_is_written_between_its_marks_and_nothing_else_is_touched(tmp_path: Path) -> None:
    path, page = table(tmp_path), tmp_path / "README.md"
    page.write_text("# Tables\n\n<!-- table two -->\nold\n<!-- end two -->\n\nBy hand.\n")
    papers.store(path, FOUND)
    text = page.read_text()
    assert text.startswith("# Tables\n\n<!-- table two -->\n## Two rows\n") and text.endswith(
        "<!-- end two -->\n\nBy hand.\n"
    )
    assert "| with | 90 | 50.0±25.0 | student | 1.5 | 0.2 |" in text and "| without | 90 | 12.5 | devices |" in text
    assert "\nold\n" not in text and TABLE["note"] in text and "fedkd papers run two" in text
    papers.store(path, FOUND)
    assert page.read_text() == text and json.loads(path.with_suffix(".json").read_text()) == FOUND
    page.unlink()
    papers.store(path, FOUND)
    assert page.read_text().count("<!-- table two -->") == 1


def test_a_grid_has_a_line_and_a_column_for_each_part_of_a_label(tmp_path: Path) -> None:
    labels = ["none, mean", "none, median", "lma, mean"]
    rows = [{**FOUND["rows"][0], "label": label} for label in labels]
    path = table(tmp_path, grid=True, rows=[{"label": label} for label in labels])
    text = papers.block(papers.Source.read(path), {**FOUND, "rows": rows})
    assert "| | mean | median |\n|---|---|---|\n| none | 50.0±25.0 | 50.0±25.0 |\n| lma | 50.0±25.0 | - |\n" in text


@pytest.mark.slow
def test_a_table_is_run_once_and_reports_what_the_runs_reached(tmp_path: Path) -> None:
    path = table(tmp_path)
    found = papers.run(path, tmp_path / "runs")
    (sweep,) = (tmp_path / "runs" / "two").iterdir()
    reached = [
        [json.loads((p / "summary.json").read_text())["accuracy"] for p in sorted(sweep.glob(f"row={i}*"))]
        for i in range(2)
    ]
    for row, runs, key in zip(found["rows"], reached, ("student", "clients_mean"), strict=True):
        assert row[key]["per_seed"] == [r[key] for r in runs] and len(runs) == 2
        assert row[key]["mean"] == pytest.approx(sum(r[key] for r in runs) / 2)
    before = {p: p.stat().st_mtime_ns for p in sweep.glob("row=*/summary.json")}
    assert papers.run(path, tmp_path / "runs")["rows"] == found["rows"]
    assert before == {p: p.stat().st_mtime_ns for p in sweep.glob("row=*/summary.json")} and len(before) == 4
    # Other settings take no old run for their own.
    longer = table(tmp_path, base={**TABLE["base"], "training": {"steps": 60}})
    assert papers.run(longer, tmp_path / "runs")["rows"][0]["student"] != found["rows"][0]["student"]


def test_unknown_tables_are_refused_with_those_that_there_are(tmp_path: Path) -> None:
    path = table(tmp_path)
    with pytest.raises(ConfigError, match=r"three.*two"):
        papers.find("three", path.parent)
    assert papers.find("all", path.parent) == papers.find("two", path.parent) == [path]


def test_a_row_says_that_rounds_failed(tmp_path: Path) -> None:
    """Nobody ever answers, so that the figure is that of the model before any training."""
    path = table(tmp_path, base={**TABLE["base"], "population": {"dropout": 1.0}})
    found = papers.run(path, tmp_path / "runs", jobs=1)
    said = "1 of 1 rounds failed, the first in round 0: 0 answers, at least 1 are needed; the server stays as it was"
    assert found["rows"][0]["failed"] == [f"seed 1: {said}", f"seed 2: {said}"]
    text = papers.block(papers.Source.read(path), found).replace("\n", " ")
    assert f"**with**: seed 1: {said}; seed 2: {said}." in text
