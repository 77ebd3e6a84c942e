"""The benchmark and paper commands run, in their small form, and every experiment of the tree is valid."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fedkd.distill.config import load as load_distillation
from fedkd.experiment import load, read_yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [n for n in sys.modules if n.split(".")[0] == "simulations"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    "path", sorted(p for p in ROOT.glob("simulations/**/*.yaml") if p.parent.name != "tables"), ids=lambda p: p.stem
)
def test_every_experiment_is_valid(path: Path) -> None:
    # What a distillation alone has at the top.
    if {"student", "graph"} & read_yaml(path).keys():
        ((varying, distillation),) = load_distillation(path)
        assert distillation.chosen
    else:
        ((varying, experiment),) = load(path)
        assert experiment.method.name
    assert varying == {}


@pytest.mark.slow
def test_the_methods_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from simulations.benchmarks.methods import POINTS, main

    words = ["--small", "--seeds", "1,2", "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "m.json")]
    main([*words, "--picture", str(tmp_path / "m.svg")])
    rows = json.loads((tmp_path / "m.json").read_text())["rows"]
    assert list(rows) == list(POINTS) and (tmp_path / "m.svg").is_file()
    for row in rows.values():
        assert row["clients_mean"]["per_seed"] and len(row["clients_mean"]["per_seed"]) == 2
    assert rows["cfd"]["bytes_up_per_device"] < rows["cfd-float32"]["bytes_up_per_device"]
    assert "cfd-float32" in capsys.readouterr().out


@pytest.mark.slow
def test_the_rounds_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from simulations.benchmarks.rounds import WAYS, main

    words = ["--small", "--seeds", "1", "2", "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "r.json")]
    main([*words, "--target", "0"])
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert list(rows) == list(WAYS)
    assert all(None not in row["hours_to_target"] and len(row["student_accuracy"]) == 2 for row in rows.values())
    assert "±" in capsys.readouterr().out
    main([*words, "--target", "1.1"])  # finished runs are read, not played
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert rows["synchronous"]["mb_per_device_to_target"] == [None, None]
    assert "| - (2 of 2 never) | - |" in capsys.readouterr().out


@pytest.mark.slow
def test_distillation_without_data_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from simulations.datafree.run import main

    words = ["digits", "--small", "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "d.json")]
    main([*words, "--methods", "other,dfad", "--seeds", "1,2"])
    rows = json.loads((tmp_path / "d.json").read_text())["rows"]
    assert list(rows) == ["digits plain other", "digits plain dfad"]
    assert len(set(rows["digits plain dfad"]["teacher"])) == 1 and len(rows["digits plain dfad"]["student"]) == 2
    assert rows["digits plain other"]["teacher"] == rows["digits plain dfad"]["teacher"]
    assert "agreement" in capsys.readouterr().out
    # Finished runs are reused, and rows are added to those that are there.
    main([*words, "--methods", "dfad,data", "--seeds", "2"])
    again = json.loads((tmp_path / "d.json").read_text())["rows"]
    assert list(again) == ["digits plain other", "digits plain dfad", "digits plain data"]
    assert again["digits plain dfad"]["student"] == rows["digits plain dfad"]["student"][1:]
    assert capsys.readouterr().err.count("+ fedkd distill") == 1
