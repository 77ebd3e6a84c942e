"""The distillation experiments run in their small form, and their page says what was measured."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [n for n in sys.modules if n.split(".")[0] == "simulations"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "omitted_digit",
        "graphs nodes --all",
        "graphs nodes --inductive",
        "graphs links",
        "graphs clusters",
        "grid",
        "online",
        "teacher_size",
        "exemplars",
        "crossmodal",
        "dense segment",
        "dense detect",
    ],
)
def test_an_experiment_runs(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, *words = command.split()
    main = importlib.import_module(f"simulations.distill.{module}").main
    for seed in ("1", "2"):  # run seed by seed, the second joins the first
        main([*words, "--small", "--seeds", seed, "--json", str(tmp_path / "r.json")])
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["seeds"] == [1, 2] and found["command"] == f"python -m simulations.distill.{command}"
    first = next(iter(found["columns"]))
    for row in found["rows"].values():
        assert len(row[first]["per_seed"]) == 2
    assert next(iter(found["rows"])) in capsys.readouterr().out


def test_the_page_says_what_was_measured() -> None:
    from simulations.distill.readme import BLOCK, filled

    text = (ROOT / "simulations/distill/README.md").read_text()
    assert filled(text) == text, "run python -m simulations.distill.readme"
    shown = {match[2] for match in BLOCK.finditer(text)}
    assert shown == {p.stem for p in (ROOT / "simulations/distill/results").glob("*.json")}


def test_intervals_are_students() -> None:
    from simulations.distill.common import gain, table

    found = gain([0.5, 0.7, 0.6], [0.4, 0.4, 0.4])
    assert found["mean"] == pytest.approx(0.2)
    # Three differences of deviation 0.1: half-width 4.3027 * 0.1 / sqrt(3).
    assert found["high"] - found["mean"] == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    row = {"accuracy": {"mean": 0.5, "std": 0.01}, "gain": {"mean": 0.1, "low": -0.1, "high": 0.3}}
    page = table({"rows": {"a": row}, "columns": {"accuracy": "%"}, "plain": [], "base": "b"})
    assert "| a | 50.00±1.00 | +10.00 [-10.00, +30.00] not shown |" in page
