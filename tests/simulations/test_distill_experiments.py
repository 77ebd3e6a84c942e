"""The distillation experiments run in their small form, and their page says what was measured."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fedkd.distill.config import load
from fedkd.distill.run import start

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
        "dkd",
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


QUICK = "training.epochs=1"
SMALL = {
    "mnist-kd": ["data.source=digits", "data.train_size=200", "teacher={model: cnn, training: {epochs: 1}}", "student=cnn"],
    "exemplars": ["data.source=digits", "data.train_size=200", "teacher={model: cnn, training: {epochs: 1}}", "student=cnn",
                  "exemplars.steps=2", "exemplars.per_class=1"],
    "sounds": ["data.source=digits", "data.train_size=200", "partner=digits", "known=2", "student=cnn",
               "teacher={model: cnn, training: {epochs: 1}}"],
    "scenes": ["data=digits", "scenes={canvas: 24, most: 1, teacher: 4, student: 4, test: 3}",
               "teacher={model: segmenter(width=3), training: {epochs: 1}}", "student=segmenter(width=2)"],
    "cora": ["graph.learn.epochs=2", "graph.teach.epochs=2", "graph.per_class=4", "graph.validation=4"],
    "cora-links": ["graph.learn.epochs=6", "graph.teach.epochs=6", "graph.learn.anchors=20"],
    "cora-clusters": ["graph.learn.epochs=2", "graph.teach.epochs=2"],
}  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "simulations/distill").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_experiment_runs(path: Path, tmp_path: Path) -> None:
    from simulations.distill.graphs import communities

    words = [*SMALL[path.stem], QUICK]
    if path.stem.startswith("cora"):
        graph = communities(120)
        parts = {name: getattr(graph.x, name) for name in ("data", "indices", "indptr", "shape")}
        np.savez(tmp_path / "g.npz", **parts, edges=graph.edges, labels=graph.y)
        words = [*SMALL[path.stem], f"graph.path={tmp_path / 'g.npz'}"]
    ((_, experiment),) = load(path, words)
    summary = start(experiment, tmp_path / "run").summary
    assert summary["name"] == path.stem and summary["log"]
    assert all(summary["accuracy"][who] is not None for who in ("student", "teacher", "alone"))


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
