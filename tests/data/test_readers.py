"""Sources: what is read, and that a broken file gets one clear sentence."""

import gzip
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedkd.data import DataConfig, load
from fedkd.data import files as data_files
from fedkd.data.readers import frame_to_records, read_hub
from fedkd.errors import ConfigError, DataError


def idx_bytes(array):
    head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 10)):
        images = rng.integers(0, 256, (count, 5, 4))
        labels = np.arange(count) % 10
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    return tmp_path


def mnist(folder, **more):
    return load(DataConfig(source="mnist", path=folder, **more), seed=0)


class TestBundled:
    @pytest.mark.parametrize(
        ("source", "shape", "classes", "total"),
        [("digits", (1, 8, 8), 10, 1797), ("breast_cancer", (30,), 2, 569), ("wine", (13,), 3, 178)],
    )
    def test_all_records_are_there_once(self, source, shape, classes, total):
        split = load(DataConfig(source=source), seed=3)
        assert (split.train.shape, split.train.classes) == (shape, classes)
        assert len(split.train) + len(split.test) == total
        assert len(split.test) == round(0.2 * total)
        rows = np.concatenate([split.train.x, split.test.x]).reshape(total, -1)
        from sklearn import datasets

        raw = getattr(datasets, f"load_{source}")().data.astype(np.float32)
        wanted = raw / 16 if source == "digits" else raw
        order = [np.lexsort(table.T) for table in (rows, wanted)]
        np.testing.assert_array_equal(rows[order[0]], wanted[order[1]])
        assert split.train.x.dtype == np.float32
        assert len(split.train.class_names) == classes

    def test_split_is_stratified_and_follows_the_seed(self):
        one, same, other = (load(DataConfig(source="wine"), seed=seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(one.test.x, same.test.x)
        assert not np.array_equal(one.test.x, other.test.x)
        shares = np.bincount(one.test.y) / np.bincount(np.concatenate([one.train.y, one.test.y]))
        assert np.all(np.abs(shares - 0.2) < 0.03)

    @pytest.mark.parametrize("source", ["breast_cancer", "wine"])
    def test_public_constants_bring_every_feature_to_a_sane_range(self, source):
        x = load(DataConfig(source=source), seed=0).train.inputs()
        assert np.abs(x).max() < 6
        assert np.all((x.std(axis=0) > 0.2) & (x.std(axis=0) < 1.5))
        assert np.all(np.abs(x.mean(axis=0)) < 2)

    def test_sizes(self):
        split = load(DataConfig(train_size=100, test_size=50), seed=0)
        assert (len(split.train), len(split.test)) == (100, 50)
        assert np.bincount(split.train.y, minlength=10).min() >= 9
        with pytest.raises(ConfigError, match=r"train_size is 5000.*only"):
            load(DataConfig(train_size=5000), seed=0)


class TestIdx:
    def test_reads_plain_and_zipped(self, idx_folder):
        split = mnist(idx_folder)
        assert split.train.x.shape == (30, 1, 5, 4)
        assert split.train.x.dtype == np.uint8
        np.testing.assert_array_equal(split.test.y, np.arange(10))
        wanted = np.random.default_rng(0).integers(0, 256, (30, 5, 4))
        np.testing.assert_array_equal(split.train.x[:, 0], wanted)
        np.testing.assert_allclose(split.train.inputs(np.array([3]))[0, 0], wanted[3] / 255, rtol=1e-6)

    def test_public_pixel_constants(self, idx_folder):
        x = mnist(idx_folder, mean=(0.5,), std=(0.25,)).train.inputs()
        raw = mnist(idx_folder).train.inputs()
        np.testing.assert_allclose(x, (raw - 0.5) / 0.25, rtol=1e-5)
        with pytest.raises(ConfigError, match=r"must have 1 values for inputs"):
            mnist(idx_folder, mean=(0.5, 0.5), std=(1, 1))

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda blob: b"\x00\x00\x0d\x03" + blob[4:], "starts with 00000803, but 00000d03"),
            (lambda blob: b"", "nothing came"),
            (lambda blob: blob[:9], "header ends after 9 bytes"),
            (lambda blob: blob[:-1], r"promises 600 bytes, but only 599"),
            (lambda blob: blob + b"x", "but more came"),
            (lambda blob: blob[:4] + b"\xff" * 12 + blob[16:], "claims .* corrupt"),
            (lambda blob: gzip.compress(blob)[:-20], "cannot be read as an IDX file"),
            (lambda blob: gzip.compress(blob)[:60] + b"\x00" * 30, "cannot be read as an IDX file"),
        ],
    )
    def test_corrupt_images(self, idx_folder, damage, words):
        path = idx_folder / "train-images-idx3-ubyte"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(DataError, match=words):
            mnist(idx_folder)

    def test_counts_and_labels_must_fit(self, idx_folder):
        labels = idx_folder / "train-labels-idx1-ubyte.gz"
        labels.write_bytes(idx_bytes(np.zeros(29)))
        with pytest.raises(DataError, match=r"30 images but .* 29 labels"):
            mnist(idx_folder)
        labels.write_bytes(idx_bytes(np.full(30, 11)))
        with pytest.raises(DataError, match=r"but 11 came"):
            mnist(idx_folder)

    def test_missing_file_says_what_to_do_and_uses_no_network(self, tmp_path, monkeypatch):
        monkeypatch.setattr(data_files.urllib.request, "urlopen", lambda *a, **k: pytest.fail("network"))
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte.*data.path.*data.download"):
            mnist(tmp_path / "nowhere")

    def test_the_environment_names_the_folder(self, idx_folder, monkeypatch, tmp_path_factory):
        root = tmp_path_factory.mktemp("root")
        (root / "mnist").symlink_to(idx_folder)
        monkeypatch.setenv("FEDKD_DATA", str(root))
        assert len(load(DataConfig(source="mnist"), seed=0).train) == 30

    def test_the_real_mnist(self, shared_data):
        split = load(DataConfig(source="mnist", path=shared_data / "mnist", train_size=30000), seed=0)
        assert split.train.x.shape == (30000, 1, 28, 28)
        assert len(split.test) == 10000
        # The published test labels begin 7 2 1 0 4, and 980 of the 10,000 are zeros.
        np.testing.assert_array_equal(split.test.y[:5], [7, 2, 1, 0, 4])
        assert int((split.test.y == 0).sum()) == 980


class TestDownload:
    def serve(self, monkeypatch, blob):
        asked = []

        def urlopen(url, timeout):
            asked.append(url)
            return io.BytesIO(blob)

        monkeypatch.setattr(data_files.urllib.request, "urlopen", urlopen)
        return asked

    def test_a_wrong_checksum_leaves_nothing_behind(self, tmp_path, monkeypatch):
        asked = self.serve(monkeypatch, b"not the file")
        with pytest.raises(DataError, match=r"md5 .* was published"):
            mnist(tmp_path, download=True)
        assert len(asked) == 2  # every mirror was tried
        assert list(tmp_path.iterdir()) == []

    def test_the_right_file_is_kept(self, tmp_path, monkeypatch):
        import hashlib

        self.serve(monkeypatch, b"bytes")
        target = tmp_path / "a" / "b"
        data_files.fetch(["http://x"], target, "sha256:" + hashlib.sha256(b"bytes").hexdigest())
        assert target.read_bytes() == b"bytes"
        assert [path.name for path in target.parent.iterdir()] == ["b"]


class TestCifar:
    @pytest.fixture
    def blobs(self):
        rng = np.random.default_rng(0)
        names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
        blobs = {}
        for name in names:
            records = rng.integers(0, 256, (4, 3073), dtype=np.uint8)
            records[:, 0] = [0, 3, 9, 5]
            blobs[name] = records.tobytes()
        return blobs

    def write(self, folder, blobs):
        (folder / "cifar-10-batches-bin").mkdir()
        for name, blob in blobs.items():
            (folder / "cifar-10-batches-bin" / name).write_bytes(blob)

    def pack(self, folder, blobs):
        with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
            for name, blob in blobs.items():
                info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                info.size = len(blob)
                tar.addfile(info, io.BytesIO(blob))

    @pytest.mark.parametrize("way", ["write", "pack"])
    def test_folder_and_archive(self, tmp_path, blobs, way):
        getattr(self, way)(tmp_path, blobs)
        split = load(DataConfig(source="cifar10", path=tmp_path), seed=0)
        assert split.train.x.shape == (20, 3, 32, 32)
        np.testing.assert_array_equal(split.test.y, [0, 3, 9, 5])
        raw = np.frombuffer(blobs["data_batch_2.bin"], np.uint8).reshape(4, 3073)
        np.testing.assert_array_equal(split.train.x[5].ravel(), raw[1, 1:])

    def test_damage(self, tmp_path, blobs):
        self.write(tmp_path, blobs | {"data_batch_3.bin": blobs["data_batch_3.bin"][:-7]})
        with pytest.raises(DataError, match=r"data_batch_3.bin.*truncated"):
            load(DataConfig(source="cifar10", path=tmp_path), seed=0)

    def test_damaged_archive(self, tmp_path, blobs):
        self.pack(tmp_path, blobs)
        path = tmp_path / "cifar-10-binary.tar.gz"
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(DataError, match=r"cannot be read as cifar|lacks"):
            load(DataConfig(source="cifar10", path=tmp_path), seed=0)

    def test_pickles_are_never_opened(self, tmp_path):
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        (folder / "data_batch_1").write_bytes(pickle.dumps({}))
        with pytest.raises(DataError, match=r"unpickling may run code.*binary version"):
            load(DataConfig(source="cifar10", path=tmp_path), seed=0)


class TestNpz:
    def test_with_test_and_clients(self, tmp_path):
        path = tmp_path / "a.npz"
        x = np.arange(40, dtype=np.float64).reshape(10, 4)
        np.savez(
            path,
            x=x,
            y=np.arange(10) % 3,
            client=np.array(["b", "a"] * 5),
            x_test=x[:2],
            y_test=np.array([2, 0]),
        )
        split = load(DataConfig(source="npz", path=path), seed=0)
        assert split.train.x.dtype == np.float32
        assert split.train.client_names == ("a", "b")
        np.testing.assert_array_equal(split.train.natural[:2], [1, 0])
        np.testing.assert_array_equal(split.test.y, [2, 0])

    def test_images_get_a_channel_axis(self, tmp_path):
        path = tmp_path / "a.npz"
        x = np.random.default_rng(0).integers(0, 256, (10, 6, 5, 3), dtype=np.uint8)
        np.savez(path, x=x, y=np.arange(10) % 2)
        last = load(DataConfig(source="npz", path=path, channels_last=True), seed=0)
        assert last.train.shape == (3, 6, 5)
        np.savez(path, x=x[..., 0], y=np.arange(10) % 2)
        assert load(DataConfig(source="npz", path=path), seed=0).train.shape == (1, 6, 5)

    def test_pickled_objects_are_refused(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (pytest.fail, ("a pickle was opened",))

        path = tmp_path / "a.npz"
        np.savez(path, x=np.array([Bomb()] * 4, dtype=object), y=np.zeros(4))
        with pytest.raises(DataError, match=r"hold no objects"):
            load(DataConfig(source="npz", path=path), seed=0)

    @pytest.mark.parametrize(
        ("arrays", "words"),
        [
            ({"x": np.zeros((4, 2))}, "must hold the arrays `x` and `y`"),
            ({"x": np.zeros((4, 2)), "y": np.zeros(3)}, r"y must be \[N\]"),
            ({"x": np.zeros((4, 2)), "y": np.zeros(4), "x_test": np.zeros((1, 2))}, "together"),
            ({"x": np.full((4, 2), np.inf), "y": np.arange(4) % 2}, "infinite"),
            ({"x": np.full((4, 2), np.nan), "y": np.arange(4) % 2}, "missing values"),
            ({"x": np.zeros((4, 2), complex), "y": np.arange(4) % 2}, "must hold numbers"),
            (
                {
                    "x": np.zeros((4, 2)),
                    "y": np.arange(4),
                    "x_test": np.zeros((2, 3)),
                    "y_test": np.arange(2),
                },
                "must be alike",
            ),
        ],
    )
    def test_bad_arrays(self, tmp_path, arrays, words):
        path = tmp_path / "a.npz"
        np.savez(path, **arrays)
        with pytest.raises((DataError, ConfigError), match=words):
            load(DataConfig(source="npz", path=path), seed=0)

    def test_not_an_archive(self, tmp_path):
        path = tmp_path / "a.npz"
        for blob in (b"", b"PK\x03\x04 nonsense", b"\x93NUMPY"):
            path.write_bytes(blob)
            with pytest.raises(DataError, match=r"cannot be read"):
                load(DataConfig(source="npz", path=path), seed=0)
        with pytest.raises(DataError, match=r"does not exist"):
            load(DataConfig(source="npz", path=tmp_path / "b.npz"), seed=0)
        np.save(tmp_path / "one.npy", np.zeros(3))
        with pytest.raises(DataError, match=r"cannot be read"):
            load(DataConfig(source="npz", path=tmp_path / "one.npy"), seed=0)


TABLE = "age,colour,site,sick\n" + "".join(
    f"{20 + i if i % 7 else '?'},{('red', 'blue')[i % 2]},{('north', 'south')[i % 3 == 0]},{('no', 'yes')[i % 2]}\n"
    for i in range(40)
)
TABLE_CONFIG = {
    "source": "csv", "label": "sick", "client": "site", "one_hot": {"colour": ("red", "blue", "green")},
    "normalise": "per_client",
}  # fmt: skip


class TestTables:
    def test_csv(self, tmp_path):
        path = tmp_path / "t.csv"
        path.write_text(TABLE)
        split = load(DataConfig(path=path, **TABLE_CONFIG), seed=0)
        assert split.train.shape == (4,)
        assert split.train.class_names == ("no", "yes")
        assert split.train.client_names == ("north", "south")
        x, y = (np.concatenate([getattr(part, name) for part in (split.train, split.test)]) for name in "xy")
        assert int(np.isnan(x[:, 0]).sum()) == 6
        np.testing.assert_array_equal(x[:, 2], y)  # blue is sick
        assert not x[:, 3].any()

    def test_parquet_is_the_same(self, tmp_path):
        import pandas

        (tmp_path / "t.csv").write_text(TABLE)
        pandas.read_csv(tmp_path / "t.csv", na_values=["?"]).to_parquet(tmp_path / "t.parquet")
        one = load(DataConfig(path=tmp_path / "t.csv", **TABLE_CONFIG), seed=0)
        two = load(DataConfig(path=tmp_path / "t.parquet", **(TABLE_CONFIG | {"source": "parquet"})), seed=0)
        np.testing.assert_array_equal(one.train.x, two.train.x)
        np.testing.assert_array_equal(one.test.natural, two.test.natural)

    def test_own_test_table_shares_the_label_numbers(self, tmp_path):
        (tmp_path / "a.csv").write_text("f,label\n1,x\n2,z\n")
        (tmp_path / "b.csv").write_text("f,label\n1,y\n2,z\n")
        split = load(DataConfig(source="csv", path=tmp_path / "a.csv", test_path=tmp_path / "b.csv"), seed=0)
        assert split.train.class_names == ("x", "y", "z")
        np.testing.assert_array_equal(split.train.y, [0, 2])
        np.testing.assert_array_equal(split.test.y, [1, 2])

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"label": "ill"}, "label column `ill` is not in the table.*age, colour, site, sick"),
            ({"client": "hospital"}, "client column `hospital`"),
            ({"one_hot": {}}, "column `colour` is not numeric"),
            ({"one_hot": {"colour": ("red",)}}, "holds `blue`"),
            ({"features": ("age", "weight")}, "column `weight` is not"),
            ({"features": ("age", "sick")}, "must not hold the label"),
            ({"class_names": ("no", "maybe")}, "label `yes` is not among"),
            ({"classes": 3}, "2 distinct labels"),
            ({"normalise": "none"}, "missing values"),
            ({"normalise": "public"}, "no public constants"),
        ],
    )
    def test_bad_settings(self, tmp_path, change, words):
        path = tmp_path / "t.csv"
        path.write_text(TABLE)
        with pytest.raises((ConfigError, DataError), match=words):
            load(DataConfig(path=path, **(TABLE_CONFIG | change)), seed=0)

    def test_a_missing_label_or_client_is_refused(self, tmp_path):
        path = tmp_path / "t.csv"
        path.write_text("f,site,label\n1,a,0\n2,b,\n3,b,1\n")
        with pytest.raises(DataError, match=r"1 records have no label"):
            load(DataConfig(source="csv", path=path, client="site"), seed=0)
        path.write_text("f,site,label\n1,a,0\n2,,1\n3,b,1\n")
        with pytest.raises(DataError, match=r"name no client"):
            load(DataConfig(source="csv", path=path, client="site"), seed=0)

    def test_garbage(self, tmp_path):
        path = tmp_path / "t.parquet"
        path.write_bytes(b"PAR1garbage")
        with pytest.raises(DataError, match=r"cannot be read as parquet"):
            load(DataConfig(source="parquet", path=path), seed=0)
        path.write_bytes(b"")
        with pytest.raises(DataError, match=r"cannot be read as csv"):
            load(DataConfig(source="csv", path=path), seed=0)

    def test_numbers_that_are_not_class_numbers(self):
        import pandas

        frame = pandas.DataFrame({"f": [1.0, 2.0, 3.0], "label": [3.0, 5.0, 3.0]})
        records = frame_to_records([frame], DataConfig(), "t")
        np.testing.assert_array_equal(records.train.y, [0, 1, 0])
        assert records.class_names == ("3", "5")
        wide = frame_to_records([frame], DataConfig(classes=6), "t")
        np.testing.assert_array_equal(wide.train.y, [3, 5, 3])
        assert wide.classes == 6


class TestHeart:
    def test_four_hospitals(self, shared_data):
        split = load(DataConfig(source="heart_disease", path=shared_data / "heart_disease"), seed=0)
        both = np.concatenate([split.train.natural, split.test.natural])
        np.testing.assert_array_equal(np.bincount(both), [303, 294, 123, 200])
        sick = np.bincount(both, weights=np.concatenate([split.train.y, split.test.y]))
        np.testing.assert_array_equal(sick, [139, 106, 115, 149])  # the class distribution of heart-disease.names
        assert split.train.shape == (13,)
        # Every hospital has its fifth in the test set, and of each class.
        for hospital in range(4):
            inside = (split.test.natural == hospital).sum() / (both == hospital).sum()
            assert abs(inside - 0.2) < 0.02
        x = split.train.inputs()
        assert np.isfinite(x).all() and np.abs(x).max() < 8

    def test_zero_cholesterol_is_missing(self, shared_data):
        split = load(DataConfig(source="heart_disease", path=shared_data / "heart_disease"), seed=0)
        swiss = split.train.x[split.train.natural == 2]
        assert np.isnan(swiss[:, 4]).all()

    def test_damage(self, tmp_path):
        with pytest.raises(DataError, match=r"does not exist"):
            load(DataConfig(source="heart_disease", path=tmp_path / "x"), seed=0)
        for hospital in ("cleveland", "hungarian", "switzerland", "va"):
            (tmp_path / f"processed.{hospital}.data").write_text("1,2,3\n")
        with pytest.raises(DataError, match=r"line 1: 13 attributes"):
            load(DataConfig(source="heart_disease", path=tmp_path), seed=0)


class TestImages:
    @pytest.fixture
    def folder(self, tmp_path):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / name).mkdir()
            for index in range(5):
                colour = (255, 0, 0) if number == 0 else (0, 0, 255)
                Image.new("RGB", (6, 4), colour).save(tmp_path / name / f"{index}.png")
        return tmp_path

    def test_colour_and_class(self, folder):
        split = load(DataConfig(source="images", path=folder), seed=0)
        assert split.train.class_names == ("cat", "dog")
        assert split.train.shape == (3, 4, 6)
        for part in (split.train, split.test):
            np.testing.assert_array_equal(part.x[:, 2, 0, 0], np.where(part.y == 1, 255, 0))
        grey = load(DataConfig(source="images", path=folder, channels=1, resize=(2, 3)), seed=0)
        assert grey.train.shape == (1, 2, 3)

    def test_train_and_test_folders(self, folder, tmp_path_factory):
        root = tmp_path_factory.mktemp("both")
        (root / "train").symlink_to(folder)
        (root / "test" / "dog").mkdir(parents=True)
        Image.new("RGB", (6, 4)).save(root / "test" / "dog" / "a.jpg")
        split = load(DataConfig(source="images", path=root), seed=0)
        assert (len(split.train), len(split.test)) == (10, 1)
        assert int(split.test.y[0]) == 1

    def test_damage(self, folder):
        Image.new("RGB", (7, 4)).save(folder / "dog" / "z.png")
        with pytest.raises(DataError, match=r"z.png is 4x7 but .* data.resize"):
            load(DataConfig(source="images", path=folder), seed=0)
        assert load(DataConfig(source="images", path=folder, resize=(4, 4)), seed=0).train.shape == (3, 4, 4)
        blob = (folder / "dog" / "0.png").read_bytes()
        (folder / "dog" / "0.png").write_bytes(blob[: len(blob) // 2])
        with pytest.raises(DataError, match=r"0.png cannot be read as an image"):
            load(DataConfig(source="images", path=folder, resize=(4, 4)), seed=0)


class FakeSplit(dict):
    """The few members of a hub split that the reader uses."""

    def __init__(self, columns, names=None):
        super().__init__(columns)
        self.column_names = list(columns)
        self.features = {"label": type("ClassLabel", (), {"names": names})()} if names else {}

    def to_pandas(self):
        import pandas

        return pandas.DataFrame(dict(self))


class TestHub:
    def test_images(self):
        def opener(config):
            def open_split(name):
                count = {"train": 6, "test": 2}[name]
                images = [Image.new("L", (4, 4), 10 * index) for index in range(count)]
                labels = [index % 2 for index in range(count)]
                writers = [("w1", "w2")[index % 2] for index in range(count)]
                return FakeSplit({"image": images, "label": labels, "writer": writers}, ["a", "b", "c"])

            return open_split

        config = DataConfig(source="hf", hub="some/set", channels=1, client="writer")
        records = read_hub(config, opener)
        assert records.classes == 3  # by the declared names, though nobody holds `c`
        assert records.class_names == ("a", "b", "c")
        assert records.client_names == ("w1", "w2")
        np.testing.assert_array_equal(records.train.x[:, 0, 0, 0], np.arange(6) * 10)
        np.testing.assert_array_equal(records.test.natural, [0, 1])

    def test_table(self):
        def opener(config):
            return lambda name: FakeSplit({"f": [1.0, 2.0, 3.0], "label": [0, 1, 1]}, ["no", "yes", "who"])

        records = read_hub(DataConfig(source="hf", hub="s", hub_input=None, hub_splits=("train", None)), opener)
        np.testing.assert_array_equal(records.train.x[:, 0], [1, 2, 3])
        assert records.class_names == ("no", "yes", "who")  # nobody holds `who`
        assert records.test is None

    def test_without_download_the_hub_client_is_offline(self, monkeypatch):
        import sys
        import types

        seen = []
        constants = types.ModuleType("huggingface_hub.constants")
        constants.HF_HUB_OFFLINE = False

        class FederatedDataset:
            def __init__(self, **settings):
                assert settings["dataset"] == "s"
                assert settings["shuffle"] is False

            def load_split(self, name):
                seen.append(constants.HF_HUB_OFFLINE)
                return FakeSplit({"f": [1.0, 2.0], "label": [0, 1]})

        fakes = {"flwr_datasets": types.ModuleType("flwr_datasets"), "datasets": types.ModuleType("datasets")}
        fakes["flwr_datasets"].FederatedDataset = FederatedDataset
        fakes["datasets"].DownloadConfig = dict
        for name, module in (fakes | {"huggingface_hub.constants": constants}).items():
            monkeypatch.setitem(sys.modules, name, module)
        config = DataConfig(source="hf", hub="s", hub_input=None, hub_splits=("train", None))
        load(config, seed=0)
        load(config.model_copy(update={"download": True}), seed=0)
        assert seen == [True, False]
        assert constants.HF_HUB_OFFLINE is False

    def test_failure_names_the_remedy(self):
        def opener(config):
            def open_split(name):
                raise RuntimeError("offline\nlong trace")

            return open_split

        with pytest.raises(DataError, match=r"split `train` of `s` is not to be had \(offline\).*data.download"):
            read_hub(DataConfig(source="hf", hub="s"), opener)

    def test_without_the_extra(self, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "flwr_datasets", None)
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(DataError, match=r"flwr-datasets.*pip install 'fedkd\[hf\]'"):
            load(DataConfig(source="hf", hub="s"), seed=0)


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"source": "csv"}, "needs data.path"),
            ({"source": "hf"}, "needs data.hub"),
            ({"mean": (1.0,)}, "needed together"),
            ({"mean": (1.0,), "std": (0.0,)}, "must be positive"),
            ({"std": (1.0, 1.0), "mean": (1.0,)}, "1 values and data.std has 2"),
            ({"sorce": "mnist"}, "sorce"),
            ({"source": "minst"}, "digits"),
            ({"test_fraction": 1.0}, "less than 1"),
            ({"classes": 3, "class_names": ("a", "b")}, "make them agree"),
        ],
    )
    def test_refusals(self, settings, words):
        with pytest.raises(ValueError, match=words):
            DataConfig(**settings)

    def test_frozen_and_json_round_trip(self):
        config = DataConfig(source="csv", path=Path("a.csv"), one_hot={"a": ("b",)})
        with pytest.raises(ValueError, match=r"frozen"):
            config.source = "digits"
        assert DataConfig.model_validate_json(config.model_dump_json()) == config
