"""Devices of virtual time: drawn or read, always the same, and there when they should be."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedkd.errors import ConfigError
from fedkd.experiment import validate
from fedkd.seeding import numpy_rng
from fedkd.virtual.config import Draw, VirtualConfig
from fedkd.virtual.trace import read_trace
from fedkd.virtual.world import Cycle, Presence, Spells, Windows, World

HEADER = (
    "device,flops_per_second,down_bytes_per_second,up_bytes_per_second,latency_seconds,on_from_seconds,on_until_seconds"
)


def windows(presence: Presence, until: float) -> list[tuple[float, float]]:
    """Walk through the windows up to a time."""
    found, now = [], 0.0
    while now < until:
        start, end = presence.window(now)
        found.append((start, end))
        now = end
    return found


# ---- draws ----------------------------------------------------------------------------------------------------------
def test_draws_have_the_distribution_that_they_name() -> None:
    rng = numpy_rng(1, "test")
    heavy = Draw(kind="lognormal", median=3.0, sigma=1.0).of(rng, 20_000)
    assert np.median(heavy) == pytest.approx(3.0, rel=0.05)
    assert np.std(np.log(heavy)) == pytest.approx(1.0, rel=0.05)
    flat = Draw(kind="uniform", low=2, high=4).of(rng, 20_000)
    assert flat.min() >= 2 and flat.max() <= 4 and flat.mean() == pytest.approx(3, rel=0.02)
    kinds = Draw(kind="choice", values=(1, 10), weights=(3, 1)).of(rng, 20_000)
    assert set(kinds) == {1, 10} and (kinds == 1).mean() == pytest.approx(0.75, abs=0.02)
    assert Draw.model_validate(5).of(rng, 3).tolist() == [5, 5, 5]


def test_the_seed_decides_the_devices() -> None:
    config = VirtualConfig(on_seconds=Draw(value=5), off_seconds=Draw(value=5), cycle="exponential")

    def look(seed: int) -> tuple[list[float], list[float]]:
        world = World(config, seed, 50)
        times = np.linspace(0, 100, 37)
        return world.flops.tolist(), [float(world.there(t).sum()) for t in times]

    assert look(1) == look(1)
    assert look(1)[0] != look(2)[0] and look(1)[1] != look(2)[1]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"flops_per_second": 0}, "must be above 0"),
        ({"flops_per_second": {"kind": "uniform", "low": 3, "high": 2}}, "above `high`"),
        ({"flops_per_second": {"kind": "lognormal"}}, "needs `median`"),
        ({"up_bytes_per_second": {"kind": "choice", "values": [1, 2], "weights": [1]}}, "give as many of each"),
        ({"up_bytes_per_second": {"kind": "choice", "values": [1, 0]}}, "must be above 0"),
        ({"latency_seconds": -1}, "at least 0"),
        ({"repeat_seconds": 10}, "belongs to virtual.trace"),
        ({"flop_per_second": 1}, "Did you mean 'virtual.flops_per_second'"),
    ],
)
def test_impossible_devices_are_refused_when_the_experiment_is_read(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate({"virtual": section})


# ---- presence -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("phase", [0.0, 2.0, 3.0, 9.5])
def test_a_cycle_is_there_for_its_share_of_the_time(phase: float) -> None:
    found = windows(Cycle(3.0, 7.0, phase), 1000.0)
    assert all(end - start == pytest.approx(3.0) for start, end in found)
    assert all(later[0] - earlier[1] == pytest.approx(7.0) for earlier, later in pairwise(found))
    if phase < 3:
        assert found[0] == (-phase, 3 - phase)


def test_spells_are_exponential_with_their_means() -> None:
    found = windows(Spells(2.0, 6.0, numpy_rng(3, "spells")), 40_000.0)
    on = np.array([end - start for start, end in found[1:]])
    off = np.array([later[0] - earlier[1] for earlier, later in pairwise(found)])
    assert on.mean() == pytest.approx(2.0, rel=0.05) and off.mean() == pytest.approx(6.0, rel=0.05)
    # An exponential deviates by its mean; a fixed cycle would not.
    assert on.std() == pytest.approx(2.0, rel=0.08)


def test_windows_of_a_trace_end_or_come_again() -> None:
    assert windows(Windows([(1, 2), (4, 6)], None), 5) == [(1, 2), (4, 6)]
    assert Windows([(1, 2)], None).window(2) == (np.inf, np.inf)
    assert windows(Windows([(1, 2), (4, 6)], 10), 21) == [(1, 2), (4, 6), (11, 12), (14, 16), (21, 22)]
    # From 8 over midnight to 3: one window, not two.
    assert windows(Windows([(0, 3), (8, 10)], 10), 25) == [(-2, 3), (8, 13), (18, 23), (28, 33)]


def test_the_world_knows_who_is_there_and_who_comes_next() -> None:
    config = VirtualConfig(on_seconds=Draw(value=4), off_seconds=Draw(value=6))
    world = World(config, 5, 40)
    seen = np.zeros(40)
    times = np.arange(0, 1000, 0.5)
    for now in times:
        there = world.there(now)
        seen += there
        away = ~there
        if away.any():
            comes = world.comes(now, away)
            assert now < comes <= now + 6
        for k in np.flatnonzero(there):
            assert now < world.leaves(int(k)) <= now + 4
    assert np.abs(seen / len(times) - 0.4).max() < 0.01


# ---- traces ---------------------------------------------------------------------------------------------------------
def write(tmp_path: Path, *lines: str, header: str = HEADER) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_a_trace_is_read_as_it_is_written(tmp_path: Path) -> None:
    path = write(tmp_path, "a,1e9,1e6,5e5,0.1,5,9", "b,2e9,2e6,1e6,,,", "a,,,,,0,2", "c,3,3,3,0,,")
    traced = read_trace(path)
    assert [dict(t.profile)["flops_per_second"] for t in traced] == [1e9, 2e9, 3]
    assert traced[0].windows == ((0, 2), (5, 9)) and traced[1].windows == ()
    assert dict(traced[1].profile)["latency_seconds"] == 0
    world = World(VirtualConfig(trace=path), 1, 5)
    assert world.flops.tolist() == [1e9, 2e9, 3, 1e9, 2e9]
    assert world.there(3.0).tolist() == [False, True, True, False, True]
    assert world.comes(3.0, ~world.there(3.0)) == 5


BAD = [
    (["a,1,1,1,0,,", "a,1,1,1,0,1,2"], "line 3: device 'a' has several lines"),
    (["a,1,1,1,0,1,2", "a,2,1,1,0,3,4"], "line 3: flops_per_second of device 'a' is 2, but 1"),
    (["a,0,1,1,0,,"], "line 2: flops_per_second: expected a number above 0, got '0'"),
    (["a,x,1,1,0,,"], "line 2: flops_per_second: expected a number above 0, got 'x'"),
    (["a,nan,1,1,0,,"], "got 'nan'"),
    (["a,1,,1,0,,"], "down_bytes_per_second: expected a number above 0, got ''"),
    (["a,1,1,1,-1,,"], "latency_seconds: expected a number of at least 0"),
    (["a,1,1,1,0,4,"], "on_until_seconds: expected a number of at least 0, got ''"),
    (["a,1,1,1,0,4,4"], "must be above on_from_seconds"),
    (["a,1,1,1,0,1,3", "a,,,,,2,4"], "windows of device 'a' overlap: 1-3 and 2-4"),
    (["a,1,1,1,0"], "expected 7 cells as in the header, got 5"),
    ([",1,1,1,0,,"], "line 2: device is empty"),
    ([], "holds no device"),
]


@pytest.mark.parametrize(("lines", "message"), BAD)
def test_a_faulty_trace_names_the_line_and_what_was_expected(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(write(tmp_path, *lines))


def test_a_faulty_header_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'up_bytes_per_second'"):
        read_trace(
            write(tmp_path, "a,1,1,1", header="device,flops_per_second,down_bytes_per_second,up_byte_per_second")
        )
    with pytest.raises(ConfigError, match="lacks up_bytes_per_second"):
        read_trace(write(tmp_path, "a,1,1", header="device,flops_per_second,down_bytes_per_second"))
    with pytest.raises(ConfigError, match="belong together"):
        read_trace(write(tmp_path, "a,1,1,1,0,1", header=HEADER.removesuffix(",on_until_seconds")))
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(ConfigError, match=r"lies beyond virtual.repeat_seconds"):
        read_trace(write(tmp_path, "a,1,1,1,0,1,30"), repeat_seconds=20)
