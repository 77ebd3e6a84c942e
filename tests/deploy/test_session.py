"""The README's Deploy door, typed in as it stands there."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from session import ROOT, assert_same_student, ended, project, shell

pytestmark = pytest.mark.slow

README = re.compile(r"<!-- deploy -->\n```bash\n(.*?)```", re.S)


def has(source: str) -> bool:
    data = os.environ.get("FEDKD_DATA")
    return source == "digits" or (data is not None and (Path(data) / source).exists())


@pytest.mark.parametrize("source", ["digits", "mnist"])
def test_the_readmes_session_ends_with_the_simulators_student(source: str, tmp_path: Path) -> None:
    if not has(source):
        pytest.skip(f"{source} is not below FEDKD_DATA")
    (script,) = README.findall((ROOT / "README.md").read_text())
    script = script.replace("digits", source)
    shutil.copytree(ROOT / "simulations", tmp_path / "simulations", ignore=shutil.ignore_patterns("__pycache__"))
    project(ROOT / f"server/{source}-trial.yaml", tmp_path)
    with ended(tmp_path):
        said = shell(script, tmp_path)
    run = tmp_path / f"kits/server/state/runs/{source}-trial"
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert [(row["answered"], row["failed"], row["quarantined"]) for row in rows] == [(3, None, [])] * 5, said
    assert "round 5/5" in said
    # The devices' own logs: each answered the five rounds (an answer that came late is sent once more, from the outbox).
    for name in ("hospital-a", "hospital-b", "hospital-c"):
        log = (tmp_path / f"kits/{name}/state/logs/client.jsonl").read_text()
        assert set(re.findall(r"round (\d) of \S+ answered", log)) == set("01234"), log
    shell(f"fedkd simulate simulations/{source}-trial.yaml", tmp_path)
    assert_same_student(run, tmp_path / f"runs/{source}-trial")
