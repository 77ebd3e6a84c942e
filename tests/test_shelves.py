"""Devices beyond memory: what a snapshot refers to survives whatever comes later, and no file grows without end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedkd.aggregators import mean_of, mean_weights
from fedkd.algorithms.base import Answer, Card, DeviceState
from fedkd.collected import Collected
from fedkd.payloads import Bundle, Payload, SoftLabels, Weights
from fedkd.shelves import ShelfStore
from fedkd.storage import StorageError
from fedkd.store import Kept, flatten

LARGE = float("inf")


def kept(seed: int, width: int = 100, answered: int = -1) -> Kept:
    rng = torch.Generator().manual_seed(seed)
    weights = {
        "w": torch.randn(width, 7, generator=rng),
        "half": torch.randn(3, generator=rng).half(),
        "steps": torch.tensor(seed),
        "none": torch.zeros(0, 4),
    }
    labels = SoftLabels(labels=torch.rand(5, 3, generator=rng, dtype=torch.float64))
    optimizer = {"m/w": torch.rand(2, generator=rng)}
    return Kept(
        DeviceState(models={"model": weights}, optimizers={"train": optimizer}, memory={"age": torch.ones(2)}),
        received=Bundle(parts={"knowledge": labels}) if seed % 2 else None,
        sent=labels if answered >= 0 else None,
        sent_round=answered,
    )


def same(a: Kept, b: Kept) -> bool:
    (left, kind), (right, other) = flatten(a), flatten(b)
    return (
        kind == other
        and left.keys() == right.keys()
        and all(left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left)
    )


@pytest.mark.parametrize("budget", [0, 10_000, LARGE])
def test_what_is_kept_comes_back_bit_for_bit(tmp_path: Path, budget: float) -> None:
    store = ShelfStore(tmp_path / "s", budget)
    states = {k: kept(k, width=50 + k % 3, answered=k % 4 - 1) for k in range(12)}
    for k, state in states.items():
        store.save(k, 0, state)
    assert all(same(store.load(k, 1), state) for k, state in states.items())
    assert same(store.load(99, 1), Kept())
    files = store.snapshot()
    again = ShelfStore(tmp_path / "s", budget)
    again.restore(files, 0)
    assert all(same(again.load(k, 1), state) for k, state in states.items())
    loaded = again.load(3, 1).state
    assert loaded is not None and all(t.data_ptr() % 64 == 0 for t in loaded.models["model"].values() if t.numel())


@pytest.mark.parametrize("budget", [0, 10_000, LARGE])
def test_later_rounds_leave_the_last_snapshots_alone(tmp_path: Path, budget: float) -> None:
    store = ShelfStore(tmp_path / "s", budget, snapshots=2)
    history: list[tuple[Mapping[str, bytes], dict[int, Kept]]] = []
    now: dict[int, Kept] = {}
    for round in range(8):
        # In every round other devices work, one of them twice and one in another layout.
        for k in range(round % 3, 10, 3):
            now[k] = kept(100 * round + k, width=60 if k == 3 and round % 2 else 50)
            store.save(k, round, kept(7))
            store.save(k, round, now[k])
        history.append((store.snapshot(), dict(now)))
    for k in range(10):
        store.save(k, 8, kept(999))  # a round that never ends: the process is killed in it
    for files, then in history[-2:]:
        back = ShelfStore(tmp_path / "s", budget)
        back.restore(files, 0)
        assert all(same(back.load(k, 9), state) for k, state in then.items())


def test_after_a_fall_back_the_older_snapshots_still_stand(tmp_path: Path) -> None:
    store = ShelfStore(tmp_path / "s", 0, snapshots=2)
    snapshots = []
    for round in range(3):
        for k in range(4):
            store.save(k, round, kept(10 * round + k))
        snapshots.append(store.snapshot())
    back = ShelfStore(tmp_path / "s", 0, snapshots=2)
    back.restore(snapshots[2], 2)
    back.retain(snapshots[1])
    for k in range(4):
        back.save(k, 3, kept(77))
    last = ShelfStore(tmp_path / "s", 0, snapshots=2)
    last.restore(snapshots[1], 1)
    assert all(same(last.load(k, 2), kept(10 + k)) for k in range(4))


@pytest.mark.parametrize("budget", [0, LARGE])
def test_files_stop_growing_and_a_device_never_asked_takes_no_room(tmp_path: Path, budget: float) -> None:
    store = ShelfStore(tmp_path / "s", budget, snapshots=2)
    sizes = []
    for round in range(12):
        for k in range(0, 10_000, 1000):
            store.save(k, round, kept(2 * round, width=200))
        store.snapshot()
        sizes.append(store.file_bytes)
    assert len(set(sizes[3:])) == 1 and sizes[-1] == 3 * sizes[0]
    row = sizes[0] // 10
    assert row < 2 * sum(t.nbytes for t in flatten(kept(2, width=200))[0].values())
    on_disk = sum(path.stat().st_size for path in (tmp_path / "s").iterdir())
    assert on_disk <= sizes[-1]


def test_without_snapshots_a_device_has_one_slot(tmp_path: Path) -> None:
    store = ShelfStore(tmp_path / "s", 0)
    for round in range(5):
        store.save(1, round, kept(2 * round))
    assert store.file_bytes == next((tmp_path / "s").iterdir()).stat().st_size
    assert same(store.load(1, 5), kept(8))


@pytest.mark.parametrize("harm", ["flip", "cut", "table"])
def test_damage_is_found_before_it_is_used(tmp_path: Path, harm: str) -> None:
    store = ShelfStore(tmp_path / "s", 0)
    store.save(1, 0, kept(2))
    store.save(2, 0, kept(4))
    files = dict(store.snapshot())
    path = next((tmp_path / "s").iterdir())
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[len(data) // 2 + 40] ^= 4
        path.write_bytes(data)
    elif harm == "cut":
        path.write_bytes(data[:-1000])
    else:
        files["devices.safetensors"] = files["devices.safetensors"][:-9]
    with pytest.raises(StorageError, match=r"damaged|cut short|safetensors"):
        ShelfStore(tmp_path / "s", 0).restore(files, 0)


FULL = """
import resource, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_shelves import kept, same, ShelfStore, StorageError
store = ShelfStore(Path({folder!r}), 0)
store.save(1, 0, kept(2, width=1000))
files = store.snapshot()
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    store.save(1, 1, kept(4, width=1000))
except StorageError as cause:
    print(cause)
back = ShelfStore(Path({folder!r}), 0)
back.restore(files, 0)
assert same(back.load(1, 1), kept(2, width=1000))
"""


def test_a_full_disk_is_named_and_the_snapshot_stands(tmp_path: Path) -> None:
    script = FULL.format(paths=[str(Path(__file__).parent)], folder=str(tmp_path / "s"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "cannot write" in done.stdout and "too large" in done.stdout.lower()


# ---- answers --------------------------------------------------------------------------------------------------------
def answers(count: int) -> list[Answer]:
    rng = torch.Generator().manual_seed(1)

    def one(k: int) -> Payload:
        if k % 3 == 0:
            return Weights.from_tensors({"w": torch.randn(4, generator=rng), "n": torch.tensor(k)})
        return SoftLabels(labels=torch.rand(6 + k % 2, 3, generator=rng))

    return [
        Answer(card=Card(id=k, architecture="mlp"), payload=one(k), examples=k + 1.0, weight=0.5) for k in range(count)
    ]


def tensors(answer: Answer) -> Mapping[str, Tensor]:
    return answer.payload.tensors()


@pytest.mark.parametrize("held", [0, 300, 10**9])
def test_answers_lie_in_a_file_and_come_back_in_order_as_often_as_wanted(held: int) -> None:
    given = answers(20)
    collected = Collected(reversed(given), held_bytes=held)
    assert len(collected) == 20 and 7 in collected and 20 not in collected
    for _ in range(2):
        walked = list(collected)
        assert [a.card.id for a in walked] == list(range(20))
        for mine, other in zip(walked, given, strict=True):
            assert (mine.card, mine.examples, mine.weight) == (other.card, other.examples, other.weight)
            assert type(mine.payload) is type(other.payload)
            assert all(torch.equal(tensors(mine)[n], t) for n, t in tensors(other).items())


def test_means_do_not_depend_on_where_answers_lie() -> None:
    soft = [a for a in answers(40) if a.card.id % 6 == 1]
    models = [a for a in answers(40) if a.card.id % 3 == 0]
    for weighted in (False, True):
        found = [mean_of(Collected(soft, h), lambda a: tensors(a)["labels"], weighted=weighted) for h in (0, 10**9)]
        assert torch.equal(*found)
        first, second = (mean_weights(Collected(models, h), weighted=weighted) for h in (0, 10**9))
        share = torch.tensor([a.examples if weighted else 1.0 for a in models], dtype=torch.float64)
        stack = torch.stack([tensors(a)["w"].double() for a in models])
        assert torch.allclose(first["w"].double(), (share[:, None] * stack).sum(0) / share.sum(), atol=1e-6)
        assert torch.equal(first["w"], second["w"]) and int(first["n"]) == 0
