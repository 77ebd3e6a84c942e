"""Public sets: what they are made of, who may see what, identity and cost."""

import json
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest

from fedkd.data import (
    DataConfig,
    Dataset,
    PartitionConfig,
    ProxyConfig,
    Split,
    Standardiser,
    build_proxy,
    decode_inputs,
    encode_inputs,
    identity_of,
    load,
    prepare,
)
from fedkd.errors import ConfigError, DataError, DataWarning


@pytest.fixture(scope="module")
def digits():
    return load(DataConfig(), seed=0)


def rows(x):
    return {row.tobytes() for row in x}


def images(seed=0, count=30, shape=(1, 4, 4), classes=3):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
    return Dataset(x, np.arange(count) % classes, classes, "toy")


class TestHoldout:
    def test_leaves_the_train_set_without_labels(self, digits):
        split, proxy = build_proxy(ProxyConfig(size=300), digits, seed=4)
        assert (len(proxy), len(split.train)) == (300, len(digits.train) - 300)
        assert proxy.y is None
        both = np.concatenate([proxy.x, split.train.x])
        assert sorted(r.tobytes() for r in both) == sorted(r.tobytes() for r in digits.train.x)
        assert split.test is digits.test

    def test_labels_only_on_demand(self, digits):
        _, proxy = build_proxy(ProxyConfig(size=300, labelled=True), digits, seed=4)
        lookup = {row.tobytes(): int(y) for row, y in zip(digits.train.x, digits.train.y, strict=True)}
        assert all(lookup[row.tobytes()] == y for row, y in zip(proxy.x, proxy.y, strict=True))

    def test_seed(self, digits):
        one, same, other = (build_proxy(ProxyConfig(size=50), digits, seed)[1] for seed in (1, 1, 2))
        assert one.identity == same.identity != other.identity

    def test_natural_clients_follow(self, digits):
        train = replace(digits.train, natural=np.arange(len(digits.train)))
        split, _ = build_proxy(ProxyConfig(size=300), Split(train, digits.test), seed=4)
        np.testing.assert_array_equal(split.train.x, digits.train.x[split.train.natural])

    def test_too_large(self, digits):
        with pytest.raises(DataError, match=r"proxy.size is 1438, but digits has 1438"):
            build_proxy(ProxyConfig(size=len(digits.train)), digits, seed=0)


class TestOthers:
    @pytest.fixture
    def archive(self, tmp_path):
        path = tmp_path / "public.npz"
        x = np.random.default_rng(0).random((40, 1, 8, 8)).astype(np.float32)
        np.savez(path, x=x, y=np.arange(40) % 4)
        return DataConfig(source="npz", path=path, test_fraction=0.25)

    def test_dataset(self, digits, archive):
        split, proxy = build_proxy(ProxyConfig(kind="dataset", data=archive, size=20), digits, seed=0)
        assert split == digits
        assert rows(proxy.x) <= rows(load(archive, 0).train.x)
        assert proxy.y is None

    def test_dataset_refusals(self, digits, archive):
        with pytest.raises(DataError, match=r"is 31, but the public source public has 30"):
            build_proxy(ProxyConfig(kind="dataset", data=archive, size=31), digits, seed=0)
        with pytest.raises(DataError, match=r"has 4 classes, but digits has 10"):
            build_proxy(ProxyConfig(kind="dataset", data=archive, size=9, labelled=True), digits, seed=0)
        with pytest.raises(DataError, match=r"shape \(13,\), but digits has \(1, 8, 8\)"):
            build_proxy(ProxyConfig(kind="dataset", data=DataConfig(source="wine"), size=9), digits, seed=0)

    def test_the_own_source_as_public_source_is_told(self, digits, archive, recwarn):
        build_proxy(ProxyConfig(kind="dataset", data=archive, size=20), digits, seed=0)
        assert not recwarn.list
        with pytest.warns(DataWarning, match=r"20 private training records are also in the public"):
            build_proxy(ProxyConfig(kind="dataset", data=DataConfig(), size=20), digits, seed=0)

    def test_a_file_of_inputs_is_taken_as_it_is(self, digits, tmp_path):
        x = np.random.default_rng(0).normal(size=(40, 1, 8, 8)).astype(np.float32)
        np.savez(tmp_path / "pool.npz", x=x, logits=np.zeros((40, 10)))
        split, proxy = build_proxy(ProxyConfig(kind="npz", path=tmp_path / "pool.npz", size=30), digits, seed=1)
        assert split.train is digits.train and proxy.y is None and len(proxy) == 30
        assert rows(proxy.inputs()) < rows(x) and len(rows(proxy.x)) == 30
        scaled = Split(digits.train.scaled_by(Standardiser.constants((0.5,), (2.0,), (1, 8, 8))), digits.test)
        again = build_proxy(ProxyConfig(kind="npz", path=tmp_path / "pool.npz", size=30), scaled, seed=1)[1]
        assert rows(again.inputs()) == rows(proxy.x)

    def test_a_file_of_inputs_that_does_not_fit(self, digits, tmp_path):
        for name, x, says in (
            ("shape", np.zeros((9, 1, 4, 4), np.float32), "holds inputs of shape"),
            ("few", np.zeros((9, 1, 8, 8), np.float32), "lower it"),
            ("nan", np.full((9, 1, 8, 8), np.nan, np.float32), "NaN"),
            ("text", np.array([["a"], ["b"]]), "real numbers"),
            ("flat", np.zeros(9, np.float32), r"\[N, \*shape\]"),
        ):
            np.savez(tmp_path / f"{name}.npz", x=x)
            with pytest.raises(DataError, match=says):
                build_proxy(ProxyConfig(kind="npz", path=tmp_path / f"{name}.npz", size=30), digits, seed=1)
        for wrong in ({"kind": "npz"}, {"kind": "noise", "path": tmp_path / "few.npz"}):
            with pytest.raises(ValueError, match=r"proxy\.path goes with"):
                ProxyConfig(**wrong)

    def test_noise_does_not_look_at_the_records(self, digits):
        _, proxy = build_proxy(ProxyConfig(kind="noise", size=60), digits, seed=0)
        blank = replace(digits.train, x=np.zeros_like(digits.train.x))
        _, same = build_proxy(ProxyConfig(kind="noise", size=60), Split(blank, digits.test), seed=0)
        assert proxy.identity == same.identity
        assert proxy.x.shape == (60, 1, 8, 8)
        assert 0 <= proxy.x.min() < 0.01 < 0.99 < proxy.x.max() <= 1

    def test_noise_for_images_and_for_scaled_tables(self):
        toy = Split(images(), images(1))
        _, proxy = build_proxy(ProxyConfig(kind="noise", size=500), toy, seed=0)
        assert proxy.x.dtype == np.uint8
        assert (proxy.x.min(), proxy.x.max()) == (0, 255)
        wine = load(DataConfig(source="wine"), seed=0)
        _, proxy = build_proxy(ProxyConfig(kind="noise", size=2000), wine, seed=0)
        z = proxy.inputs()
        assert np.abs(z.mean(axis=0)).max() < 0.15
        assert np.abs(z.std(axis=0) - 1).max() < 0.1

    def test_mixup_takes_its_base_out_of_the_train_set(self):
        toy = Split(images(count=30), images(1))
        split, proxy = build_proxy(ProxyConfig(kind="mixup", size=100, base_size=2), toy, seed=0)
        assert len(split.train) == 28
        base = [row for row in toy.train.x if row.tobytes() not in rows(split.train.x)]
        a, b = (row.astype(float) for row in base)
        # Every mixture lies on the line between the two base images, up to rounding.
        weights = ((proxy.x - b) * (a - b)).sum(axis=(1, 2, 3)) / ((a - b) ** 2).sum()
        line = b + weights[:, None, None, None] * (a - b)
        assert np.abs(proxy.x - line).max() < 1
        assert 0.3 < weights.mean() < 0.7 and weights.std() > 0.2
        assert proxy.x.dtype == np.uint8

    def test_mixup_of_public_data_leaves_the_private_alone(self, digits, archive):
        split, proxy = build_proxy(ProxyConfig(kind="mixup", data=archive, size=20), digits, seed=0)
        assert len(split.train) == len(digits.train)
        assert len(proxy) == 20

    def test_config_refusals(self):
        for settings, words in (
            ({"kind": "dataset"}, "needs proxy.data"),
            ({"kind": "noise", "labelled": True}, "no true labels"),
            ({"low": 1.0, "high": 0.0}, "below proxy.high"),
            ({"size": 0}, "greater than or equal to 1"),
        ):
            with pytest.raises(ValueError, match=words):
                ProxyConfig(**settings)


class TestIdentityAndBytes:
    def test_identity_sees_everything(self):
        x = np.arange(24, dtype=np.uint8).reshape(4, 6)
        name = identity_of(x)
        assert len(name) == 64
        changed = x.copy()
        changed[3, 5] ^= 1
        for other in (x[::-1], x.reshape(4, 2, 3), x.astype(np.float32), changed):
            assert identity_of(other) != name
        # The same values in another memory layout are the same set.
        assert identity_of(np.asfortranarray(x)) == name
        floats = x.astype("<f4")
        assert identity_of(floats) == identity_of(floats.astype(">f4"))

    def test_identity_is_pinned(self):
        # Devices of another version must agree, so the definition may not drift.
        import hashlib

        x = np.array([[1, 2]], np.uint8)
        head = b'["|u1", [1, 2]]'
        assert identity_of(x) == hashlib.sha256(struct.pack("<I", len(head)) + head + b"\x01\x02").hexdigest()

    def test_round_trip_and_cost(self, digits):
        _, proxy = build_proxy(ProxyConfig(size=100, labelled=True), digits, seed=0)
        blob = encode_inputs(proxy.x, proxy.y)
        assert proxy.bytes == len(blob) < proxy.x.nbytes
        x, y = decode_inputs(blob)
        np.testing.assert_array_equal(x, proxy.x)
        np.testing.assert_array_equal(y, proxy.y)
        assert identity_of(x) == proxy.identity
        x, y = decode_inputs(encode_inputs(proxy.x))
        assert y is None

    def test_crafted_bytes(self):
        good = encode_inputs(np.zeros((3, 4), np.float32), np.zeros(3, np.int64))

        def crafted(header, body=b""):
            text = json.dumps(header).encode()
            return b"FKDX" + struct.pack("<I", len(text)) + text + zlib.compress(body)

        bad = [
            b"",
            good[:3],
            b"XXXX" + good[4:],
            good[:-3],
            good + b"x",
            good[:4] + struct.pack("<I", 1 << 31) + good[8:],
            crafted([["<f4", [10**12, 10**6]]]),
            crafted([["|O", [2, 2]]], b"x" * 4),
            crafted([["<f4", [-1, 2]]]),
            crafted([["<f4", [True, 2]]], b"x" * 8),
            crafted([["|u1", [2, 2]]], b"x" * 5),
            crafted([["|u1", [2, 2]]], b"\0" * 50_000_000),
            crafted([["|u1", [2, 2]], ["<i8", [3]]], b"\0" * 28),
            crafted({"a": 1}),
            crafted([5]),
            crafted([["<f4", 3]]),
        ]
        for blob in bad:
            with pytest.raises(DataError, match=r"no proxy set of fedkd"):
                decode_inputs(blob)
        assert decode_inputs(good)[0].shape == (3, 4)
        with pytest.raises(DataError, match=r"over the cap of 10"):
            decode_inputs(good, cap_bytes=10)


def hospitals(seed=0, shift=0.0):
    """Two natural clients on very different scales, with missing values; `shift` moves client 1 only."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, 3)).astype(np.float32)
    natural = np.repeat([0, 1], 30)
    x[natural == 1] = x[natural == 1] * 10 + 100 + np.float32(shift)
    x[::7, 1] = np.nan
    x[natural == 0, 2] = np.nan
    return Dataset(x, np.arange(60) % 2, 2, "toy", natural, private=True)


def divided(data, **settings):
    from fedkd.data import standardise

    order = np.random.default_rng(1).permutation(60)
    split = Split(data.select(np.sort(order[12:])), data.select(np.sort(order[:12])))
    proxy = None
    if settings:
        split, proxy = build_proxy(ProxyConfig(**settings), split, seed=0)
    parts = [np.flatnonzero(split.train.natural == client) for client in (0, 1)]
    return parts, split, standardise(split, parts, proxy)


class TestPerClient:
    def test_each_device_by_its_own_records(self):
        parts, raw, (split, _) = divided(hospitals())
        for client, part in enumerate(parts):
            own = raw.train.x[part].astype(np.float64)
            x = split.train.inputs(part)
            assert np.isfinite(x).all()
            if client == 0:
                np.testing.assert_array_equal(x[:, 2], 0)  # a feature the hospital never measures
            full = own[:, 0]
            np.testing.assert_allclose(x[:, 0], (full - full.mean()) / full.std(), rtol=1e-4, atol=1e-5)
            middle = np.nanmedian(own[:, 1])
            filled = np.where(np.isnan(own[:, 1]), middle, own[:, 1])
            np.testing.assert_allclose(x[:, 1], (filled - filled.mean()) / filled.std(), rtol=1e-4, atol=1e-5)

    def test_no_statistic_passes_from_one_client_to_another(self):
        parts, _, (one, _) = divided(hospitals())
        _, _, (two, _) = divided(hospitals(shift=5000))
        np.testing.assert_array_equal(one.train.inputs(parts[0]), two.train.inputs(parts[0]))
        mine = one.test.natural == 0
        np.testing.assert_array_equal(one.test.inputs()[mine], two.test.inputs()[mine])

    def test_a_test_record_is_scaled_at_home_and_not_by_the_test_set(self):
        parts, raw, (split, _) = divided(hospitals())
        home = Standardiser.fit(raw.train.x[parts[1]])
        mine = np.flatnonzero(raw.test.natural == 1)
        np.testing.assert_allclose(split.test.inputs(mine), home.apply(raw.test.x[mine]), rtol=1e-6)

    def test_the_proxy_set_by_itself(self):
        _, _, (_, proxy) = divided(hospitals(), kind="holdout", size=20)
        np.testing.assert_allclose(proxy.inputs().mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(proxy.inputs().std(axis=0), 1, atol=1e-4)
        np.testing.assert_allclose(proxy.inputs(slice(0, 3)), proxy.inputs()[:3])

    def test_a_shared_natural_client_falls_back_on_the_proxy_set(self):
        from fedkd.data import standardise

        data = hospitals()
        split, proxy = build_proxy(ProxyConfig(size=10), Split(data, data), seed=0)
        parts = list(np.array_split(np.arange(50), 3))
        done, public = standardise(split, parts, proxy)
        shared = done.test.natural == 0
        # Client 0's records lie on two devices, so neither may speak for it.
        np.testing.assert_allclose(done.test.inputs()[shared], public.scaling.apply(data.x[shared]), rtol=1e-6)
        with pytest.raises(ConfigError, match=r"belong to no device"):
            standardise(Split(split.train, data), parts, None)

    def test_unscaled_inputs_are_refused_until_then(self):
        with pytest.raises(DataError, match=r"call fedkd.data.standardise"):
            hospitals().inputs()
        _, raw, _ = divided(hospitals(), size=10)
        with pytest.raises(DataError, match=r"no device has scaled"):
            raw.train.inputs(np.array([0]))

    def test_small_and_empty_devices(self):
        empty = Standardiser.fit(np.zeros((0, 2), np.float32))
        np.testing.assert_array_equal(empty.apply(np.array([[1, np.nan]], np.float32)), [[1, 0]])
        one = Standardiser.fit(np.array([[5.0, np.nan]], np.float32))
        np.testing.assert_array_equal(one.apply(np.array([[5, np.nan], [6, 2]], np.float32)), [[0, 0], [1, 2]])
        constant = Standardiser.fit(np.full((9, 1), 0.1, np.float32))
        assert np.abs(constant.apply(np.full((1, 1), 0.1, np.float32))).max() < 1e-6
        back = Standardiser.constants((7.0, 3.0), (2.0, 4.0), (2,))
        fitted = Standardiser.fit(np.array([[1.0, np.nan], [3.0, np.nan]], np.float32), back)
        np.testing.assert_allclose(fitted.apply(np.array([[2, 11]], np.float32)), [[0, 2]])

    def test_images_are_refused(self, tmp_path):
        toy = images()
        np.savez(tmp_path / "a.npz", x=toy.x, y=toy.y)
        with pytest.raises(ConfigError, match=r"is for tables"):
            load(DataConfig(source="npz", path=tmp_path / "a.npz", normalise="per_client"), seed=0)


class TestPrepare:
    def test_the_same_seed_is_the_same_federation(self):
        one, same, other = (
            prepare(DataConfig(), PartitionConfig(clients=5), ProxyConfig(size=100), seed) for seed in (1, 1, 2)
        )
        assert one.proxy.identity == same.proxy.identity != other.proxy.identity
        assert all(np.array_equal(a, b) for a, b in zip(one.parts, same.parts, strict=True))
        assert any(not np.array_equal(a, b) for a, b in zip(one.parts, other.parts, strict=True))
        assert one.counts.sum() == len(one.split.train) == 1438 - 100
        private = rows(one.split.train.x[np.concatenate(one.parts)])
        assert not rows(one.proxy.x) & private

    def test_without_a_proxy_set(self):
        federation = prepare(DataConfig(source="wine"), PartitionConfig(kind="iid", clients=3), None, seed=0)
        assert federation.proxy is None
        assert federation.client_names == ()

    @pytest.mark.parametrize("way", ["public", "per_client"])
    def test_the_four_hospitals(self, shared_data, way):
        data = DataConfig(source="heart_disease", path=shared_data / "heart_disease", normalise=way)
        federation = prepare(data, PartitionConfig(kind="natural"), ProxyConfig(size=150), seed=0)
        assert federation.client_names == ("cleveland", "hungarian", "switzerland", "va")
        split = federation.split
        for values in (split.train.inputs(), split.test.inputs(), federation.proxy.inputs()):
            assert np.isfinite(values).all()
            assert np.abs(values).max() < 15
        from sklearn.linear_model import LogisticRegression

        accuracies = []
        for client, part in enumerate(federation.parts):
            model = LogisticRegression(max_iter=500).fit(split.train.inputs(part), split.train.y[part])
            here = np.flatnonzero(split.test.natural == client)
            accuracies.append(model.score(split.test.inputs(here), split.test.y[here]))
        assert np.mean(accuracies) > 0.7


class TestDataset:
    def test_uint8_stays_and_inputs_are_fresh(self):
        data = images()
        assert data.select(slice(0, 5)).x.dtype == np.uint8
        first = data.inputs(slice(0, 2))
        np.testing.assert_allclose(first, data.x[:2] / 255, rtol=1e-6)
        first[:] = -1
        assert data.inputs().min() >= 0
        table = Dataset(np.ones((2, 2), np.float32), np.zeros(2, np.int64), 2, "t")
        table.inputs()[:] = 5
        assert table.x.max() == 1

    def test_refusals(self):
        x, y = np.zeros((2, 2), np.float32), np.zeros(2, np.int64)
        for settings, words in (
            ({"x": x.astype(np.float64)}, "uint8 or float32"),
            ({"y": y.astype(np.int32)}, "int64"),
            ({"y": np.zeros(3, np.int64)}, "2 inputs but 3 labels"),
            ({"y": np.array([0, 2])}, r"lie in 0..1"),
            ({"natural": np.zeros(3, np.int64)}, "3 client numbers for 2"),
        ):
            with pytest.raises(DataError, match=words):
                Dataset(**({"x": x, "y": y, "classes": 2, "name": "t"} | settings))

    def test_empty(self):
        empty = images().select(np.array([], np.int64))
        assert len(empty) == 0
        assert empty.inputs().shape == (0, 1, 4, 4)
