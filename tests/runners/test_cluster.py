"""A Ray cluster of two nodes (two sets of Ray's own daemons on this machine): blocks of devices on both of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedkd import simulate
from fedkd.experiment import Experiment, validate

from fedkd.runners import flower_grid  # isort: skip  # sets Ray's and Flower's switches before they are imported
from ray.cluster_utils import Cluster  # isort: skip

assert flower_grid


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cluster]:
    """Two nodes of one worker each; what the workers are built in is noted below ``tmp_path / "seen"``."""
    (tmp_path / "seen").mkdir()
    monkeypatch.setenv("FEDKD_TEST_NOTES", str(tmp_path / "seen"))
    node = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        made.add_node(**node)
        yield made
    finally:
        made.shutdown()


def wanted(runner: dict[str, object]) -> Experiment:
    return validate(
        {
            "rounds": 2,
            "dtype": "float64",
            "algorithm": "ds_fl",
            "data": {"source": "digits", "train_size": 240, "test_size": 80},
            "partition": {"clients": 12, "alpha": 0.5},
            "proxy": {"size": 40},
            "models": {"student": "mlp(hidden=[16])", "devices": "user_models:Notes"},
            "evaluation": {"local_only": False},
            "runner": {**runner, "block": 3},
        }
    )


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_devices_work_in_blocks_on_both_nodes_and_give_what_one_process_gives(cluster: Cluster, tmp_path: Path) -> None:
    here, there = tmp_path / "stacked" / "run", tmp_path / "flower" / "run"
    simulate.start(wanted({"kind": "stacked"}), here)
    for note in (tmp_path / "seen").iterdir():
        note.unlink()
    # Two of Ray's CPUs for each: one worker fits on each node.
    ray = {"kind": "flower", "workers": 2, "num_cpus": 2.0, "ray_address": cluster.address}
    simulate.start(wanted(ray), there)
    seen = [json.loads(path.read_text()) for path in (tmp_path / "seen").iterdir()]
    workers = [note for note in seen if "node" in note and note["threads"] == 2]
    assert len({note["node"] for note in workers}) == 2 and len({note["pid"] for note in workers}) == 2

    def said(folder: Path) -> list[dict[str, object]]:
        found = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k not in ("seconds", "loss")} for row in found]

    assert said(here) == said(there)
    left, right = (json.loads((f / "summary.json").read_text()) for f in (here, there))
    assert left["accuracy"] == right["accuracy"] and left["per_client"] == right["per_client"]
