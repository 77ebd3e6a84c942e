"""What the pages on deployment say of files, keys, commands and metrics is what there is."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import typer
import yaml
from pydantic import BaseModel

from fedkd.cli.main import app
from fedkd.deploy.config import DeploymentConfig
from fedkd.deploy.kit import ClientKit, Limits, Poll, Server
from fedkd.deploy.localdata import LocalData, ModelConfig, PartConfig
from fedkd.deploy.node import Counters
from fedkd.deploy.nodeops import metrics
from fedkd.deploy.ops import GateMetrics, RunMetrics, ServerMetrics
from fedkd.deploy.policy import NodePolicy
from fedkd.deploy.provision import Project
from fedkd.experiment import Experiment

ROOT = Path(__file__).parents[2]
DEPLOY, DEVICES, PI = (ROOT / "docs" / f"{name}.md" for name in ("deploy", "devices", "raspberry-pi"))
MODELS: dict[str, type[BaseModel]] = {
    "client.yaml": ClientKit, "data.yaml": LocalData, "policy.yaml": NodePolicy, "experiment": Experiment,
}  # fmt: skip


def blocks() -> Iterator[Any]:
    for page in (DEPLOY, DEVICES):
        for name, text in re.findall(r"<!-- ([\w.]+) -->\n```yaml\n(.*?)```", page.read_text(), re.S):
            yield pytest.param(name, text, id=f"{page.stem} {name}: {text.split(':')[0]}")


@pytest.mark.parametrize(("name", "text"), list(blocks()))
def test_examples_fit(name: str, text: str) -> None:
    assert MODELS[name].model_validate(yaml.safe_load(text))


def test_the_example_of_a_project_and_the_files_that_kits_begin_with_fit() -> None:
    (text,) = re.findall(r"```yaml\n(project: .*?)```", DEPLOY.read_text(), re.S)
    project = yaml.safe_load(text)
    for client in project["clients"]:
        if isinstance(client, dict):
            client.update(data={"a": 1}, policy={"b": 2})  # {...} stands for any
    assert Project.model_validate(project)
    templates = ROOT / "fedkd/deploy/templates"
    policy = yaml.safe_load((templates / "policy.yaml").read_text())
    assert NodePolicy.model_validate(policy) == NodePolicy()
    assert policy.keys() == NodePolicy.model_fields.keys()
    assert LocalData.model_validate(yaml.safe_load((templates / "data.yaml").read_text()))
    assert NodePolicy.model_validate(yaml.safe_load((ROOT / "clients/policy.yaml").read_text()))


def rows(page: Path, heading: str) -> Iterator[list[str]]:
    """Return the cells of all table rows below a heading, up to the next of its rank."""
    text = page.read_text()
    part = text[text.index(f"\n{heading}\n") + 1 :]
    rank = heading.split(" ")[0]
    part = re.split(rf"\n{rank} ", part[len(heading) :], maxsplit=1)[0]
    for line in part.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def fields(model: type[BaseModel], inside: str = "") -> dict[str, Any]:
    return {
        f"{inside}{name}": field.get_default(call_default_factory=True) for name, field in model.model_fields.items()
    }


@pytest.mark.parametrize(
    ("page", "heading", "wanted"),
    [
        (DEVICES, "## client.yaml", fields(ClientKit) | fields(Server, "server.") | fields(Poll, "poll.")),
        (DEVICES, "## data.yaml", fields(LocalData) | fields(PartConfig, "part.")),
        (DEVICES, "## A client that only labels, without torch", fields(ModelConfig, "model.")),
        (DEVICES, "## policy.yaml", fields(NodePolicy)),
        (DEPLOY, "## Running an experiment", fields(DeploymentConfig)),
        (DEPLOY, "## The server", fields(Limits)),
    ],
    ids=lambda value: value.removeprefix("## ") if isinstance(value, str) else "",
)
def test_every_key_stands_in_its_table_with_its_default(page: Path, heading: str, wanted: dict[str, Any]) -> None:
    told: dict[str, str] = {}
    for key, default, *_ in rows(page, heading):
        if key.startswith("`fedkd_") or key.startswith("`/"):
            continue
        keys = names(key)
        told |= dict(zip(keys, default.split(", ") if ", " in default else [default] * len(keys), strict=True))
    sections = {"server", "poll"} if "server.host" in wanted else set()
    assert told.keys() == wanted.keys() - sections
    for key, text in told.items():
        if text:
            value = yaml.safe_load(text)
            assert wanted[key] == (float(value) if isinstance(wanted[key], float) else _plain(wanted[key], value)), key


def _plain(wanted: Any, value: Any) -> Any:
    return tuple(value) if isinstance(wanted, tuple) else value


def documented(page: Path) -> set[str]:
    return {
        name
        for line in page.read_text().splitlines()
        if line.startswith("| `fedkd_")
        for name in names(line.split(" | ")[0])
    }


def test_every_metric_stands_in_its_table(tmp_path: Path) -> None:
    gate = GateMetrics()
    ops = SimpleNamespace(
        supervisor=dict, disk_free=lambda: 0, unready=list, gate=SimpleNamespace(last_seen={}), metrics=gate
    )
    found = set()
    for source in (gate.registry, RunMetrics(tmp_path), ServerMetrics(ops)):  # type: ignore[arg-type]
        for family in source.collect():
            found.add(family.name + ("_total" if family.type == "counter" else ""))
    assert documented(DEPLOY) == found


def test_every_metric_of_a_client_stands_in_its_table(tmp_path: Path) -> None:
    node = SimpleNamespace(
        counters=Counters(answered=3, work_seconds=1.5), link=SimpleNamespace(online=True),
        usage=SimpleNamespace(left=7), kit=SimpleNamespace(state=tmp_path),
    )  # fmt: skip
    text = metrics(node)  # type: ignore[arg-type]
    from prometheus_client.parser import text_string_to_metric_families

    values = {s.name: s.value for f in text_string_to_metric_families(text) for s in f.samples}
    assert documented(DEVICES) == values.keys()
    assert values["fedkd_client_work_seconds_total"] == 1.5 and values["fedkd_client_bytes_left_today"] == 7
    assert 'fedkd_client_requests_total{outcome="answered"} 3' in text


def commands() -> Iterator[Any]:
    for page in (DEPLOY, DEVICES, PI, ROOT / "README.md"):
        prose = page.read_text()
        lines = [
            line
            for block in re.findall(r"```bash\n(.*?)```", prose, re.S)
            for line in block.replace("\\\n", " ").splitlines()
        ]
        for line in dict.fromkeys([*lines, *re.findall(r"`(fedkd [^`]+)`", prose)]):
            words = shlex.split(line, comments=True)
            at = (
                0 if words[:1] == ["fedkd"] else next((n for n, w in enumerate(words) if w.endswith("bin/fedkd")), None)
            )
            if at is not None:
                yield pytest.param(words[at + 1 :], id=f"{page.stem}: {line.split('#')[0].strip()[:60]}")


@pytest.mark.parametrize("words", list(commands()))
def test_commands_and_their_options_exist(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while isinstance(command, click.Group) and words and not words[0].startswith("-") and words[0] != "...":
        if command.name == "provision" and words[0].endswith(".yaml"):
            words = ["make", *words]  # the command by default
        assert words[0] in command.commands, words
        command, words = command.commands[words[0]], words[1:]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    for word in words:
        if word.startswith("--"):
            assert word.strip("[]").split("=")[0] in known, (word, known)


def test_the_light_clients_requirements_are_the_packages_own_less_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    whole = {re.split(r"[\[><=]", line)[0]: line.replace("[simulation]", "") for line in project["dependencies"]}
    whole |= {re.split(r"[><=]", line)[0]: line for line in project["optional-dependencies"]["onnx"]}
    text = (ROOT / "clients/light-requirements.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines == [whole[re.split(r"[><=]", line)[0]] for line in lines]
    assert not {"torch", "opacus", "scikit-learn"} & {re.split(r"[><=]", line)[0] for line in lines}
