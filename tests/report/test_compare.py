"""The table, the picture and the numbers of `fedkd compare`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedkd.errors import FedkdError
from fedkd.report.compare import compare

WriteRun = Callable[..., Path]


def printed(paths: list[Path], width: int = 140, **options: Any) -> tuple[str, dict[str, Any]]:
    console = Console(file=io.StringIO(), width=width)
    content = compare(paths, console, **options)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue(), content


def test_seeds_are_one_row(write_sweep: WriteRun) -> None:
    text, content = printed([write_sweep([{"overrides": {"seed": seed}} for seed in (1, 2, 3)])])
    (row,) = content["rows"]
    assert row["seeds"] == [1, 2, 3]
    student = row["accuracy"]["student"]
    assert f"{100 * student['mean']:.1f}±{100 * student['std']:.1f}" in text
    assert "∞" in text
    assert "!" not in text


def test_numbers_of_one_run(write_run: WriteRun) -> None:
    text, content = printed([write_run(clients=4, rounds=10, epsilon=3.5)])
    # 10 rounds of 500 x 10 float32, and the proxy set of 500 x 64 float32 once.
    assert content["rows"][0]["bytes_up_per_device"] == 200_000
    assert content["rows"][0]["bytes_down_per_device"] == 328_000
    for expected in ("ds_fl", "0.2", "0.328", "3.5 per record"):
        assert expected in text


def test_warnings(write_run: WriteRun) -> None:
    text, content = printed(
        [
            write_run("a"),
            write_run("b", rounds=3, seed=2, config={"data": {"name": "wine"}}),
            write_run("c", summary=False, method="cfd"),
        ]
    )
    assert "different data (data.name digits / wine)" in text
    assert "differ in rounds (8; 3)" in text
    assert "differ in seeds" in text
    assert "c unfinished" in text
    assert len(content["warnings"]) == 4


def test_alike_names_show_their_folders(write_run: WriteRun) -> None:
    _, content = printed([write_run("first"), write_run("second", config={"lr": 0.5})])
    assert [row["run"] for row in content["rows"]] == ["digits [first]", "digits [second]"]


def test_a_narrow_terminal_loses_no_column(write_sweep: WriteRun) -> None:
    text, _ = printed([write_sweep([{"overrides": {"seed": seed}} for seed in (1, 2, 3)])], width=80)
    for head in ("student", "clients", "local-", "ensemble", "MB up", "MB down", "ε", "seconds"):
        assert head in text
    assert max(map(len, text.splitlines())) <= 80


def test_names_are_no_markup_and_steer_no_terminal(write_run: WriteRun) -> None:
    text, _ = printed([write_run(name="[red]x[/] \x1b[2J")])
    assert "[red]x[/]" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_picture_and_numbers_beside_it(write_run: WriteRun, tmp_path: Path, suffix: str) -> None:
    paths = [
        write_run("a", method="ds_fl"),
        write_run("b", method="fedproto", student=False, proxy=False),
        write_run("c", method="local", student=False, sent=False),
        write_run("d", method="weird$name", evaluated=False, summary=False),
    ]
    plot = tmp_path / "out" / f"p.{suffix}"
    _, content = printed(paths, plot=plot)
    first = plot.read_bytes()
    assert json.loads((tmp_path / "out" / f"p.{suffix}.json").read_text()) == content
    printed(paths, plot=plot)
    assert plot.read_bytes() == first
    if suffix == "svg":
        text = first.decode()
        for expected in (
            "ds_fl",
            "fedproto",
            "local (nothing sent)",
            "student of the server",
            "mean of the devices",
        ):
            assert expected in text


def test_json_alone(write_run: WriteRun, tmp_path: Path) -> None:
    _, content = printed([write_run()], json_out=tmp_path / "n.json")
    assert json.loads((tmp_path / "n.json").read_text()) == content


def test_nothing_known_still_draws(write_run: WriteRun, tmp_path: Path) -> None:
    printed([write_run(evaluated=False, summary=False)], plot=tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_a_strange_ending_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(FedkdError, match=r"\.png, \.svg"):
        compare([tmp_path / "nowhere"], Console(file=io.StringIO()), tmp_path / "p.docx")
