"""What the documentation shows works as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fedkd import simulate
from fedkd.cli.main import app
from fedkd.distill.config import load as load_distilled
from fedkd.distill.teachers import classifier
from fedkd.experiment import validate

ROOT = Path(__file__).parents[1]


def test_the_method_of_the_guide_runs_on_both_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/write-a-method.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "__init__.py").touch()
    (tmp_path / "mypackage" / "mymethod.py").write_text(code[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    accuracy = []
    for kind in ("serial", "stacked"):
        experiment = validate(
            {
                "algorithm": {"name": "mypackage.mymethod:MyMethod", "power": 3},
                "dtype": "float64",
                "rounds": 4,
                "runner": {"kind": kind},
                "evaluation": {"local_only": False},
            }
        )
        accuracy.append(simulate.start(experiment, tmp_path / kind).summary["accuracy"]["student"])
    assert accuracy[0] == accuracy[1] > 0.2


def test_the_commands_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    commands = {
        w[1] for line in re.findall(r"^fedkd .*$", text, re.MULTILINE) if len(w := shlex.split(line, comments=True)) > 1
    }
    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    known |= {
        str(group.name or group.typer_instance.info.name) for group in app.registered_groups if group.typer_instance
    }
    assert commands and commands <= known


def test_the_distilling_commands_of_the_guide_are_experiments() -> None:
    """Each is read, and its models are built for the data that it names."""
    known = {"digits": (1, 8, 8), "mnist": (1, 28, 28)}
    lines = re.findall(r"^fedkd distill (?!\.\.\.).*$", (ROOT / "docs/distill.md").read_text(), re.MULTILINE)
    built = 0
    for line in lines:
        words = [w for w in shlex.split(line, comments=True)[2:] if w != "--resume"]
        if words[0].startswith("runs/"):
            continue
        path = ROOT / words.pop(0) if words[0].endswith(".yaml") else None
        ((_, experiment),) = load_distilled(path, words)
        special = experiment.scenes or experiment.graph or experiment.partner
        if experiment.data is not None and not special:
            make = classifier(known[experiment.data.source], 10)
            for name in (experiment.student, *(t.model for t in experiment.teacher if t.model is not None)):
                make(name, 0)
                built += 1
    assert len(lines) >= 9 and built >= 5


def test_every_link_of_the_readme_leads_somewhere() -> None:
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
