"""The laws of each partition: disjoint, complete where it must be, of the promised sizes and skew."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.data import PartitionConfig, describe, partition
from fedkd.errors import ConfigError, DataError, DataWarning

COMPLETE = ("iid", "dirichlet", "shards", "quantity")


def deal(y, classes=10, seed=0, natural=None, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return partition(PartitionConfig(**settings), y, classes, natural, np.random.default_rng(seed))


def labels(count=2000, classes=10):
    return np.arange(count) % classes


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from((*COMPLETE, "classes", "natural")),
    clients=st.integers(1, 12),
    count=st.integers(0, 80),
    classes=st.integers(2, 6),
    alpha=st.sampled_from((1e-4, 0.1, 1.0, 100.0)),
    balance=st.booleans(),
    shots=st.sampled_from((None, 1, 5)),
    seed=st.integers(0, 2**31),
)
def test_disjoint_and_complete_whatever_comes(kind, clients, count, classes, alpha, balance, shots, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=count)
    natural = np.concatenate([np.arange(clients), rng.integers(clients, size=count)])[:count] % clients
    present = len(np.unique(natural)) if kind == "natural" else clients
    if present == 0:
        return
    config = {"kind": kind, "clients": present, "alpha": alpha, "balance": balance, "shots": shots}
    parts = deal(y, classes, seed, natural, **config)
    assert len(parts) == present
    assert all(part.dtype == np.int64 for part in parts)
    dealt = np.concatenate(parts)
    assert len(np.unique(dealt)) == len(dealt)
    if kind in (*COMPLETE, "natural"):
        np.testing.assert_array_equal(np.sort(dealt), np.arange(count))
    again = deal(y, classes, seed, natural, **config)
    assert all(np.array_equal(one, two) for one, two in zip(parts, again, strict=True))
    counts = describe(parts, y, classes)
    assert counts.shape == (present, classes)
    np.testing.assert_array_equal(counts.sum(axis=1), [len(part) for part in parts])


@pytest.mark.parametrize("kind", [*COMPLETE, "classes"])
def test_another_seed_deals_otherwise(kind):
    one, two = (deal(labels(), kind=kind, seed=seed, clients=5) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_iid_sizes_and_labels():
    y = labels(2003)
    parts = deal(y, kind="iid", clients=20)
    assert {len(part) for part in parts} == {100, 101}
    # Each of 200 counts has mean 10 and a standard deviation below 3.1: six of them are a generous bound.
    assert np.abs(describe(parts, y, 10) - 10).max() < 18


class TestDirichlet:
    def test_shares_have_the_moments_of_the_dirichlet_law(self):
        # Share of one device of one class: mean 1/K, variance (1/K)(1 - 1/K)/(K alpha + 1).
        y, clients = labels(10000), 10
        for alpha in (0.1, 1.0):
            shares = np.concatenate(
                [
                    describe(deal(y, seed=seed, kind="dirichlet", alpha=alpha, clients=clients), y, 10).ravel() / 1000
                    for seed in range(20)
                ]
            )
            variance = 0.1 * 0.9 / (clients * alpha + 1)
            assert shares.mean() == pytest.approx(0.1, abs=1e-9)
            assert variance * 0.85 < shares.var() < variance * 1.15

    def test_large_alpha_is_even_and_small_alpha_is_not(self):
        y = labels(2000)
        even = describe(deal(y, kind="dirichlet", alpha=1e6, clients=4), y, 10)
        assert np.abs(even - 50).max() <= 1
        skewed = describe(deal(y, kind="dirichlet", alpha=1e-5, clients=4), y, 10)
        assert np.all(np.sort(skewed, axis=0)[-1] == 200)

    def test_min_size_is_reached_or_refused(self):
        y = labels(1000)
        config = {"kind": "dirichlet", "alpha": 0.2, "clients": 10}
        free, bound = (
            [min(map(len, deal(y, seed=seed, min_size=size, **config))) for seed in range(8)] for size in (0, 30)
        )
        assert min(free) < 30 <= min(bound)
        with pytest.raises(ConfigError, match="not reached in 3 draws"):
            deal(y, min_size=99, max_tries=3, **config)

    def test_balance_evens_the_sizes(self):
        def spread(balance):
            y = labels(2000)
            sizes = [
                np.std([len(part) for part in deal(y, seed=seed, alpha=0.1, clients=10, balance=balance)])
                for seed in range(10)
            ]
            return np.mean(sizes)

        assert spread(True) < 0.8 * spread(False)


def test_shards():
    y = labels(2000)
    parts = deal(y, kind="shards", clients=20, shards_per_client=2)
    assert {len(part) for part in parts} == {100}
    counts = describe(parts, y, 10)
    assert (counts > 0).sum(axis=1).max() == 2
    assert len(np.unique(counts, axis=0)) > 5


class TestClasses:
    def test_every_class_is_shared_out(self):
        y = labels(2000)
        parts = deal(y, kind="classes", clients=10, classes_per_client=2)
        counts = describe(parts, y, 10)
        assert np.all((counts > 0).sum(axis=1) == 2)
        assert np.all((counts > 0).sum(axis=0) == 2)
        assert sum(map(len, parts)) == 2000

    def test_fedproto_ways_and_shots(self):
        y = labels(40000)
        parts = deal(y, kind="classes", clients=400, classes_per_client=3, ways_std=2, shots=10, seed=5)
        counts = describe(parts, y, 10)
        ways = (counts > 0).sum(axis=1)
        assert set(np.unique(counts)) == {0, 10}
        assert set(ways) == {1, 2, 3, 4, 5}
        # 400 draws, uniform on five values: 80 of each, standard deviation 8.
        assert np.all(np.abs(np.bincount(ways)[1:] - 80) < 40)

    def test_shots_spread(self):
        y = labels(40000)
        counts = describe(deal(y, kind="classes", clients=100, shots=10, shots_std=3), y, 10)
        held = [set(row[row > 0]) for row in counts]
        assert all(len(values) == 1 for values in held)
        assert set.union(*held) == set(range(7, 14))

    def test_a_class_that_runs_out_is_told(self):
        config = PartitionConfig(kind="classes", clients=10, classes_per_client=9, shots=60)
        with pytest.warns(DataWarning, match="ran out of records"):
            parts = partition(config, labels(1000), 10, None, np.random.default_rng(0))
        assert max(map(len, parts)) == 540
        assert sum(map(len, parts)) == 1000

    def test_more_ways_than_classes(self):
        with pytest.raises(ConfigError, match="is 11, but the data have 10"):
            deal(labels(), kind="classes", classes_per_client=11)


def test_quantity_skews_sizes_not_labels():
    y = labels(20000)
    parts = deal(y, kind="quantity", alpha=0.5, clients=10)
    sizes = np.array([len(part) for part in parts])
    assert sizes.max() > 4 * np.median(sizes) or sizes.std() > 1000
    shares = describe(parts, y, 10)[sizes.argmax()] / sizes.max()
    assert np.abs(shares - 0.1).max() < 0.03
    assert min(map(len, deal(y, kind="quantity", clients=10, min_size=100))) >= 100


class TestNatural:
    natural = np.array([2, 0, 2, 5, 5, 5])
    y = np.array([0, 1, 0, 1, 0, 1])

    def test_all_clients(self):
        parts = deal(self.y, 2, natural=self.natural, kind="natural")
        assert [part.tolist() for part in parts] == [[1], [0, 2], [3, 4, 5]]

    def test_some_clients(self):
        parts = deal(self.y, 2, natural=self.natural, kind="natural", clients=2)
        assert len(parts) == 2
        assert all(len(set(self.natural[part])) == 1 for part in parts)

    def test_refusals(self):
        with pytest.raises(ConfigError, match="is 4, but the source has 3"):
            deal(self.y, 2, natural=self.natural, kind="natural", clients=4)
        with pytest.raises(DataError, match="this source has none"):
            deal(self.y, 2, kind="natural")


def test_more_devices_than_records_leaves_some_empty():
    for kind in COMPLETE:
        parts = deal(np.array([0, 1, 1]), 2, kind=kind, clients=8)
        assert len(parts) == 8
        assert sum(map(len, parts)) == 3


def test_zero_clients_and_other_nonsense():
    with pytest.raises(ValueError, match="at least 1, but 0 came"):
        PartitionConfig(clients=0)
    with pytest.raises(ConfigError, match="at least 1, but 0 came"):
        partition(PartitionConfig.model_construct(clients=0), labels(), 10, None, np.random.default_rng(0))
    with pytest.raises(ConfigError, match=r"min_size is 300.*gets 100"):
        deal(labels(2000), kind="iid", clients=20, min_size=300)
    with pytest.raises(DataError, match=r"labels \[N\] in 0..4"):
        deal(labels(20), 5, kind="iid")
    with pytest.raises(ValueError, match="shots_std"):
        PartitionConfig(shots_std=2)


def test_a_class_that_nobody_holds_is_told_and_works():
    y = np.array([0, 0, 2, 2])
    with pytest.warns(DataWarning, match="of class 1, 3: the student"):
        parts = partition(PartitionConfig(kind="iid", clients=2), y, 4, None, np.random.default_rng(0))
    np.testing.assert_array_equal(describe(parts, y, 4).sum(axis=0), [2, 0, 2, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        partition(PartitionConfig(kind="iid", clients=2), y // 2, 2, None, np.random.default_rng(0))
