"""Reading run and sweep folders: what is there, what is missing, what is broken."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedkd.errors import FedkdError
from fedkd.report.runfolder import (
    Run,
    Spread,
    Sweep,
    expand,
    group_seeds,
    summarise_sweep,
    write_sweep_summary,
)

WriteRun = Callable[..., Path]


def test_reads_what_was_written(write_run: WriteRun) -> None:
    run = Run.read(write_run(clients=4, rounds=5, epsilon=3.0, troubles=True))
    assert (run.name, run.method, run.runner, run.seed, run.status) == (
        "digits",
        "ds_fl",
        "serial",
        1,
        "finished",
    )
    assert len(run.rounds) == 5
    assert run.devices == 4
    assert run.clients[1].architecture == "lenet"
    assert run.epsilon == 3.0
    assert run.delta == 1e-5
    assert run.rounds[3].quarantined[0].reason == "not_finite"
    assert run.partition is not None
    assert run.partition.proxy is not None
    assert run.partition.proxy.size == 500
    # Bytes down per device include its copy of the proxy set.
    assert run.bytes_down_per_device == (run.bytes_down + run.bytes_proxy) / 4


def test_without_a_summary_the_rounds_tell_the_same(write_run: WriteRun) -> None:
    whole, part = Run.read(write_run("a")), Run.read(write_run("b", summary=False))
    assert part.status == "unfinished"
    assert (part.method, part.seed, part.name) == (whole.method, whole.seed, whole.name)
    assert part.accuracy.student == whole.accuracy.student
    assert part.accuracy.clients_mean == pytest.approx(whole.accuracy.clients_mean)
    assert part.accuracy.local_only is None
    assert (part.bytes_up, part.bytes_down, part.bytes_proxy) == (
        whole.bytes_up,
        whole.bytes_down,
        whole.bytes_proxy,
    )
    assert part.bytes_down_per_device == whole.bytes_down_per_device
    assert [client.name for client in part.clients] == [client.name for client in whole.clients]


@pytest.mark.parametrize("tail", [b'{"round": 8, "asked": 6, "stud', b"\x00\x00\x00\x00", b'{"round": 8, "x": "\xff'])
def test_a_last_line_cut_short_is_dropped(write_run: WriteRun, tail: bytes) -> None:
    folder = write_run(rounds=8, summary=False)
    with (folder / "rounds.jsonl").open("ab") as file:
        file.write(tail)
    assert len(Run.read(folder).rounds) == 8


def test_a_last_line_without_its_newline_counts(write_run: WriteRun) -> None:
    folder = write_run(rounds=3)
    (folder / "rounds.jsonl").write_text((folder / "rounds.jsonl").read_text().rstrip("\n"))
    assert len(Run.read(folder).rounds) == 3


def test_a_repeated_round_counts_once(write_run: WriteRun) -> None:
    folder = write_run(rounds=3, summary=False)
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    again = {**json.loads(lines[2]), "student_accuracy": 0.25}
    (folder / "rounds.jsonl").write_text("\n".join([*lines, json.dumps(again)]) + "\n")
    run = Run.read(folder)
    assert len(run.rounds) == 3
    assert run.accuracy.student == 0.25


def test_a_broken_line_in_the_middle_is_an_error(write_run: WriteRun) -> None:
    folder = write_run(rounds=3)
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    lines[1] = lines[1][:20]
    (folder / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(FedkdError, match="line 2 cannot be read"):
        Run.read(folder)


def test_nothing_but_an_empty_rounds_file(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").touch()
    run = Run.read(tmp_path)
    assert run.rounds == ()
    assert run.accuracy.student is None
    assert run.bytes_up_per_device is None


def test_not_a_number_counts_as_missing(write_run: WriteRun) -> None:
    folder = write_run()
    content = json.loads((folder / "summary.json").read_text())
    content["accuracy"]["student"] = math.nan
    content["epsilon"] = math.inf
    (folder / "summary.json").write_text(json.dumps(content))
    run = Run.read(folder)
    assert run.accuracy.student is None
    assert run.epsilon is None


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("summary.json", "", "delete this file"),
        ("summary.json", "[1]", "JSON object"),
        ("summary.json", '{"schema": 2}', "schema 1"),
        ("partition.json", "{", "Expected JSON"),
    ],
)
def test_broken_files_say_what_to_do(write_run: WriteRun, name: str, text: str, expected: str) -> None:
    folder = write_run()
    (folder / name).write_text(text)
    with pytest.raises(FedkdError, match=expected):
        Run.read(folder)


def test_wrong_paths(tmp_path: Path, write_run: WriteRun, write_sweep: WriteRun) -> None:
    with pytest.raises(FedkdError, match="there is nothing there"):
        Run.read(tmp_path / "nowhere")
    with pytest.raises(FedkdError, match=r"has no rounds\.jsonl"):
        expand([tmp_path])
    with pytest.raises(FedkdError, match="that is a sweep"):
        Run.read(write_sweep([{"overrides": {"seed": 1}}]))
    with pytest.raises(FedkdError, match="that is a single run"):
        Sweep.read(write_run())
    with pytest.raises(FedkdError, match="at least one run"):
        expand([])


@pytest.mark.parametrize("folder", ["../elsewhere", "/etc", "", "a/../../b"])
def test_a_sweep_names_nothing_outside_itself(tmp_path: Path, folder: str) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"points": [{"overrides": {}, "folder": folder}]}))
    with pytest.raises(FedkdError, match="below the sweep"):
        Sweep.read(tmp_path)


def _points(*seeds: int, **run: Any) -> list[dict[str, Any]]:
    return [{"overrides": {"seed": seed}, "run": run} for seed in seeds]


def test_expand_takes_each_run_once(write_run: WriteRun, write_sweep: WriteRun) -> None:
    alone, sweep = write_run(seed=9), write_sweep(_points(1, 2))
    runs = expand([sweep, alone, sweep / "seed=2", alone])
    assert [run.seed for run in runs] == [1, 2, 9]


def test_seeds_come_together(write_sweep: WriteRun) -> None:
    points = [
        {
            "overrides": {"algorithm.temperature": value, "seed": seed},
            "run": {"config": {"algorithm": {"name": "ds_fl", "temperature": value}}},
        }
        for value in (0.1, 0.5)
        for seed in (1, 2, 3)
    ]
    groups = group_seeds(Sweep.read(write_sweep(points)).runs)
    assert [group.label for group in groups] == ["ds_fl (temperature=0.1)", "ds_fl (temperature=0.5)"]
    assert all(group.seeds == (1, 2, 3) for group in groups)


def test_different_settings_or_a_repeated_seed_stay_apart(write_run: WriteRun) -> None:
    paths = [
        write_run("a", seed=1),
        write_run("b", seed=2),
        write_run("c", seed=2),
        write_run("d", seed=3, config={"lr": 1}),
        write_run("e", seed=4, config={"checkpoint": {"keep": 5}}),
    ]
    groups = group_seeds(expand(paths))
    assert [group.seeds for group in groups] == [(1, 2, 4), (2,), (3,)]


def test_spread_divides_by_n_minus_one() -> None:
    spread = Spread.of([0.1, None, 0.3])
    assert spread is not None
    assert (spread.mean, spread.n, spread.per_seed) == (pytest.approx(0.2), 2, (0.1, None, 0.3))
    assert spread.std == pytest.approx(math.sqrt(0.02))
    single = Spread.of([0.5])
    assert single is not None
    assert single.std is None
    assert Spread.of([None]) is None


def test_sweep_summary(write_sweep: WriteRun) -> None:
    points = [
        *_points(1, 2, epsilon=2.0),
        {"overrides": {"seed": 3}, "run": {"epsilon": 2.0, "summary": False}},
        {"overrides": {"seed": 4}, "started": False},
    ]
    folder = write_sweep(points)
    summary = summarise_sweep(folder)
    assert summary == json.loads(write_sweep_summary(folder).read_text())
    (point,) = summary["points"]
    assert point["seeds"] == [1, 2]
    assert point["folders"] == ["seed=1", "seed=2"]
    assert point["left_out"] == [{"folder": "seed=3", "status": "unfinished"}]
    assert summary["missing"] == ["seed=4"]
    runs = [Run.read(folder / name) for name in point["folders"]]
    assert point["accuracy"]["student"]["per_seed"] == [run.accuracy.student for run in runs]
    assert point["epsilon"] == 2.0
    assert point["bytes_up"] == runs[0].bytes_up
    # No temporary file is left behind.
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["summary.json", "sweep.json"]


def test_one_seed_without_a_bound_has_none_for_all(write_sweep: WriteRun) -> None:
    points = [*_points(1, epsilon=2.0), *_points(2)]
    assert summarise_sweep(write_sweep(points))["points"][0]["epsilon"] is None
