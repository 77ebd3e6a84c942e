"""The command line as a user meets it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from fedkd.algorithms.catalogue import METHODS
from fedkd.cli.main import main


def fedkd(*words: str) -> int:
    """Run the command in this process and return its exit code."""
    before = sys.argv
    sys.argv = ["fedkd", *words]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUICK = ["rounds=2", "partition.clients=4", "proxy.size=60", "training.epochs=1", "digest.epochs=1", "server.epochs=1"]


def test_simulate_tells_what_a_person_wants(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert fedkd("simulate", *QUICK) == 0
    said = capsys.readouterr().out
    assert re.search(r"round 2/2 +student \d+\.\d %, devices \d+\.\d %, 4 answers", said)
    for name in ("student", "local-only, mean", "ensemble of devices", "per device", "epsilon", "time", "run"):
        assert re.search(rf"^{re.escape(name)} +\S", said, re.MULTILINE), name
    assert "infinity" in said and "runs/digits-dsfl" in said
    assert (tmp_path / "runs/digits-dsfl/student.safetensors").is_file()
    assert fedkd("simulate", *QUICK) == 0
    assert (tmp_path / "runs/digits-dsfl-2").is_dir()


def test_a_comma_list_is_a_sweep_and_ends_with_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert fedkd("simulate", *QUICK, "seed=1,2", "--runner", "serial") == 0
    assert "1,2" in capsys.readouterr().out
    summary = json.loads((tmp_path / "runs/digits-dsfl/summary.json").read_text())
    assert summary["points"][0]["seeds"] == [1, 2]


def test_report_and_compare_take_what_simulate_wrote(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert fedkd("simulate", *QUICK, "--out", "a") == 0
    assert fedkd("simulate", *QUICK, "algorithm=fedavg", "--out", "b") == 0
    assert fedkd("report", "a") == 0
    page = (tmp_path / "a/report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    capsys.readouterr()
    assert fedkd("compare", "a", "b", "--plot", "x.svg", "--json", "x.json") == 0
    assert "fedavg" in capsys.readouterr().out
    assert (tmp_path / "x.svg").is_file() and json.loads((tmp_path / "x.json").read_text())


def test_methods_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert fedkd("methods") == 0
    said = capsys.readouterr().out
    for name in METHODS:
        assert re.search(rf"^{name} ", said, re.MULTILINE), name


def test_config_show_prints_what_loads_to_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert fedkd("config", "show", "algorithm.temperature=0.3", "rounds=7") == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["algorithm"]["temperature"] == 0.3
    (tmp_path / "again.yaml").write_text(shown)
    assert fedkd("config", "show", "again.yaml") == 0
    assert capsys.readouterr().out == shown


def test_config_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert fedkd("config", "schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"rounds", "algorithm", "data"} <= set(schema["properties"])


IMAGES = "train-images-idx3-ubyte"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.yaml"], "cannot read the experiment nowhere.yaml"),
        (["ronds=3"], "Did you mean 'rounds'"),
        (["training.optimizer.lrr=3"], "Did you mean 'training.optimizer.lr'"),
        (["algorithm=dsfl"], "Did you mean 'ds_fl'"),
        (["algorithm.temprature=3"], "Did you mean 'temperature'"),
        (["algorithm.temperature=0"], "temperature"),
        (["rounds=many"], "rounds"),
        (["partition.clients=0"], "at least 1"),
        (["models.student=lenet5"], "Did you mean 'lenet'"),
        (["data.source=mnist", "data.path=corrupt"], IMAGES),
        (["data.source=mnist", "data.path=nowhere"], IMAGES),
        (["proxy.kind=dataset", "proxy.data.source=wine"], "shape"),
        (["algorithm=fedavg", "models.devices=[mlp,logreg]"], "one architecture"),
        (["algorithm=fedmd"], "proxy.labelled=true"),
        (["algorithm=fedavg", "codec.up=simplex:1"], "Weights"),
        (["codec.up=simplx:1"], "did you mean 'simplex'"),
        (["proxy=null"], "proxy"),
        (["--resume", "nowhere"], "holds no run"),
        (["data.source=csv"], "data.path"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "corrupt").mkdir()
    for name in (IMAGES, "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / "corrupt" / name).write_bytes(b"\x00\x00\x08\x03 not an idx file")
    assert fedkd("simulate", *words) == 2
    told = capsys.readouterr()
    assert said in told.err and told.err.startswith("error: ")
    assert "Traceback" not in told.err + told.out
    assert not (tmp_path / "runs").exists(), "bad input leaves nothing behind"


def test_a_class_that_nobody_holds_is_said_and_works_on(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["partition.kind=classes", "partition.clients=3", "partition.classes_per_client=2"]
    assert fedkd("simulate", "rounds=1", "proxy.size=60", *words) == 0
    assert "no device holds a record of class" in capsys.readouterr().err


def test_the_version_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    from fedkd import __version__

    assert fedkd("--version") == 0
    assert capsys.readouterr().out.strip() == f"fedkd {__version__}"


def test_a_run_in_which_every_round_failed_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert fedkd("simulate", *QUICK, "evaluation.local_only=false", "population.minimum=5", "--out", "a") == 2
    assert "every round failed" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "a/summary.json").is_file()


def test_true_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert fedkd("simulate", "rounds=true") == 2
    assert "rounds is true, expected a number" in capsys.readouterr().err
