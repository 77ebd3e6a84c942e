"""Readers of files: IDX, CIFAR-10 binary, npz, tables, image folders, the heart-disease hospitals, the HF
hub.

None of them unpickles anything, and none trusts a length that a file claims before it has read that much.
"""

import contextlib
import gzip
import os
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkd.data.config import DataConfig
from fedkd.data.files import fetch, locate, required
from fedkd.data.pictures import pixels
from fedkd.data.records import Part, Records, encode_clients, encode_labels, need_extra
from fedkd.data.scaling import Standardiser
from fedkd.errors import ConfigError, DataError

MAX_IDX_BYTES = 1 << 31
"""Larger arrays are refused: no IDX data set comes near, and a broken header may claim 10^18 bytes."""

_IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# MD5 of the published .gz files, as the data sets' own pages and mirrors give them.
_IDX_PUBLISHED = {
    "mnist": (
        (
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ),
        {
            "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion_mnist": (
        (
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
        {
            "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
}
_IDX_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion_mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
}  # fmt: skip

_CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"
_CIFAR_URLS = (f"https://www.cs.toronto.edu/~kriz/{_CIFAR_ARCHIVE}",)
_CIFAR_CHECKSUM = "md5:c32a1d4ab5d03f1284b67883e8d87530"
_CIFAR_FOLDER = "cifar-10-batches-bin"
_CIFAR_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_CIFAR_TEST = ("test_batch.bin",)
_CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32
_CIFAR_MAX_BYTES = 10_000 * _CIFAR_RECORD_BYTES
_CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


# --- IDX ---


def read_idx(path: Path, dims: int) -> NDArray[np.uint8]:
    """The uint8 array of an IDX file, gzip-compressed or not, which must have `dims` axes.

    Format: two zero bytes, type 0x08 (unsigned byte), number of axes, each axis as big-endian uint32, then
    the bytes in C order (Y. LeCun, C. Cortes, C. Burges, the MNIST page). Raises DataError for anything else.
    """
    try:
        with path.open("rb") as probe:
            zipped = probe.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as stream:
            magic = stream.read(4)
            if magic != bytes((0, 0, 8, dims)):
                raise DataError(
                    f"{path}: an IDX file of bytes with {dims} axes starts with 0000080{dims}, but "
                    f"{magic.hex() or 'nothing'} came: the file is corrupt or another one, fetch it again"
                )
            sizes = stream.read(4 * dims)
            if len(sizes) != 4 * dims:
                raise DataError(f"{path}: the IDX header ends after {4 + len(sizes)} bytes: fetch the file again")
            shape = struct.unpack(f">{dims}I", sizes)
            wanted = 1
            for size in shape:  # Python integers: a product of four uint32 must not wrap around
                wanted *= size
            if wanted > MAX_IDX_BYTES:
                raise DataError(f"{path}: the IDX header claims {wanted} bytes ({shape}): the file is corrupt")
            body = stream.read(wanted + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read as an IDX file ({error}): fetch it again") from error
    if len(body) != wanted:
        came = f"only {len(body)}" if len(body) < wanted else "more"
        raise DataError(f"{path}: the IDX header {shape} promises {wanted} bytes, but {came} came: fetch it again")
    return np.frombuffer(body, np.uint8).reshape(shape).copy()


def read_idx_pair(images: Path, labels: Path, classes: int) -> Part:
    """Images [N, 1, height, width] and labels [N] of two IDX files; DataError if their counts or range
    differ."""
    x, y = read_idx(images, 3), read_idx(labels, 1)
    if len(x) != len(y):
        raise DataError(f"{images} holds {len(x)} images but {labels} holds {len(y)} labels: they are not of one set")
    if len(y) and int(y.max()) >= classes:
        raise DataError(f"{labels}: labels must be 0..{classes - 1}, but {int(y.max())} came: the file is corrupt")
    return Part(x[:, None], y.astype(np.int64))


def read_mnist(config: DataConfig) -> Records:
    """MNIST or Fashion-MNIST from a folder of the four IDX files."""
    source = config.source
    folder = locate(config.path, source)
    mirrors, checksums = _IDX_PUBLISHED[source]
    parts: dict[str, Part] = {}
    for part, names in _IDX_FILES.items():
        found: list[Path] = []
        for name in names:
            # The second spelling, with a dot, is how some archives unpack.
            spellings = (
                name,
                f"{name}.gz",
                name.replace("-idx", ".idx"),
                name.replace("-idx", ".idx") + ".gz",
            )
            path = next((folder / spelling for spelling in spellings if (folder / spelling).is_file()), None)
            if path is None and config.download:
                path = folder / f"{name}.gz"
                fetch((mirror + f"{name}.gz" for mirror in mirrors), path, f"md5:{checksums[name]}")
            if path is None:
                raise DataError(
                    f"source `{source}` needs {name} (or {name}.gz) in {folder}, which is not there: set "
                    "data.path or "
                    "FEDKD_DATA to where the files lie, or data.download to true"
                )
            found.append(path)
        parts[part] = read_idx_pair(found[0], found[1], 10)
    return Records(source, parts["train"], 10, parts["test"], _IDX_NAMES[source])


# --- CIFAR-10 ---


def _cifar_part(blobs: Sequence[tuple[str, bytes]]) -> Part:
    for name, blob in blobs:
        if not blob or len(blob) % _CIFAR_RECORD_BYTES:
            raise DataError(
                f"{name}: a CIFAR-10 binary file is whole records of {_CIFAR_RECORD_BYTES} bytes, but "
                f"{len(blob)} bytes "
                "came: the file is truncated, fetch it again"
            )
    records = np.frombuffer(b"".join(blob for _, blob in blobs), np.uint8).reshape(-1, _CIFAR_RECORD_BYTES)
    y = records[:, 0].astype(np.int64)
    if int(y.max()) > 9:
        raise DataError(f"{blobs[0][0]}: CIFAR-10 labels are 0..9, but {int(y.max())} came: the file is corrupt")
    return Part(records[:, 1:].reshape(-1, 3, 32, 32).copy(), y)


def read_cifar10(config: DataConfig) -> Records:
    """CIFAR-10's binary version, as the folder cifar-10-batches-bin or its tar.gz; never the pickled one."""
    place = locate(config.path, "cifar10")
    folder = next((path for path in (place / _CIFAR_FOLDER, place) if (path / _CIFAR_TEST[0]).is_file()), None)
    if folder is not None:
        absent = [name for name in _CIFAR_TRAIN if not (folder / name).is_file()]
        if absent:
            raise DataError(f"CIFAR-10 in {folder} lacks {', '.join(absent)}: unpack {_CIFAR_ARCHIVE} again")
        train, test = (
            _cifar_part([(str(folder / name), (folder / name).read_bytes()) for name in names])
            for names in (_CIFAR_TRAIN, _CIFAR_TEST)
        )
        return Records("cifar10", train, 10, test, _CIFAR_NAMES)
    archive = place if place.is_file() else place / _CIFAR_ARCHIVE
    if not archive.is_file():
        if config.download:
            fetch(_CIFAR_URLS, archive, _CIFAR_CHECKSUM)
        elif (place / "cifar-10-batches-py").exists() or (place / "data_batch_1").exists():
            raise DataError(
                f"{place} holds CIFAR-10's Python version, which is never read because unpickling may run "
                "code: "
                f"put the binary version ({_CIFAR_ARCHIVE}) there, or set data.download to true"
            )
        else:
            raise DataError(
                f"source `cifar10` needs {_CIFAR_FOLDER} or {_CIFAR_ARCHIVE} in {place}, which are not "
                "there: set "
                "data.path or FEDKD_DATA, or data.download to true"
            )
    return _read_cifar_archive(archive)


def _read_cifar_archive(archive: Path) -> Records:
    # Members are read into memory by their known names and nothing is unpacked, so a path of ../../x cannot
    # be written.
    blobs: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                name = Path(member.name).name
                if name in (*_CIFAR_TRAIN, *_CIFAR_TEST) and member.isfile():
                    if member.size > _CIFAR_MAX_BYTES:
                        raise DataError(
                            f"{archive}: {name} claims {member.size} bytes, over {_CIFAR_MAX_BYTES}: corrupt"
                        )
                    stream = tar.extractfile(member)
                    blobs[name] = stream.read() if stream is not None else b""
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{archive} cannot be read as {_CIFAR_ARCHIVE} ({error}): fetch it again") from error
    absent = [name for name in (*_CIFAR_TRAIN, *_CIFAR_TEST) if name not in blobs]
    if absent:
        raise DataError(f"{archive} lacks {', '.join(absent)}: it must be CIFAR-10's binary version")
    train, test = (_cifar_part([(name, blobs[name]) for name in names]) for names in (_CIFAR_TRAIN, _CIFAR_TEST))
    return Records("cifar10", train, 10, test, _CIFAR_NAMES)


# --- npz ---


def _npz_inputs(x: NDArray[np.generic], path: Path, channels_last: bool) -> NDArray[np.generic]:
    if x.ndim < 2:
        raise DataError(f"{path}: x must be [N, ...] with at least one feature, but its shape is {x.shape}")
    if x.dtype.kind not in "biuf":
        raise DataError(f"{path}: x must hold numbers, but its type is {x.dtype}: convert it to uint8 or float32")
    if x.dtype == np.uint8 and x.ndim == 3:
        x = x[:, None]
    elif channels_last:
        if x.ndim != 4:
            raise ConfigError(f"{path}: data.channels_last needs x as [N, height, width, channels], but {x.shape} came")
        x = np.moveaxis(x, 3, 1)
    # A uint8 table is a table of small whole numbers, not of pixels.
    if x.dtype != np.uint8 or x.ndim != 4:
        x = x.astype(np.float32)
    return np.ascontiguousarray(x)


def read_npz(config: DataConfig) -> Records:
    """A NumPy archive with `x` and `y`, and optionally `x_test`, `y_test`, `client`, `client_test`."""
    path = required(config.path, "npz")
    try:
        with np.load(path, allow_pickle=False) as archive:
            known = ("x", "y", "x_test", "y_test", "client", "client_test")
            arrays = {name: archive[name] for name in known if name in archive.files}
            names = list(archive.files)
    except (
        ValueError,
        OSError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        AttributeError,
        TypeError,
    ) as error:
        raise DataError(
            f"{path} cannot be read as .npz ({error}): it must be written by numpy.savez and hold no objects"
        ) from error
    for name in ("x", "y"):
        if name not in arrays:
            raise DataError(f"{path} must hold the arrays `x` and `y`, but it holds {names}: rename them")
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise DataError(f"{path} must hold `x_test` and `y_test` together or neither, but it holds {names}")
    with_test = "x_test" in arrays
    for name in ("", "_test") if with_test else ("",):
        x, y = arrays[f"x{name}"], arrays[f"y{name}"]
        if y.ndim != 1 or x.ndim < 1 or len(x) != len(y):
            raise DataError(f"{path}: y{name} must be [N] for x{name} [N, ...], but {y.shape} and {x.shape} came")
        client = arrays.get(f"client{name}")
        if client is not None and client.shape != y.shape:
            raise DataError(f"{path}: client{name} must be [{len(y)}] as y{name}, but {client.shape} came")
    cut = len(arrays["y"])
    raw = np.concatenate([arrays["y"], arrays["y_test"]]) if with_test else arrays["y"]
    y, classes, class_names = encode_labels(raw, str(path), config.classes, config.class_names)
    natural: NDArray[np.int64] | None = None
    test_natural: NDArray[np.int64] | None = None
    client_names: tuple[str, ...] = ()
    if "client" in arrays:
        both = with_test and "client_test" in arrays
        names_raw = np.concatenate([arrays["client"], arrays["client_test"]]) if both else arrays["client"]
        codes, client_names = encode_clients(names_raw, str(path))
        natural, test_natural = codes[:cut], codes[cut:] if both else None
    train = Part(_npz_inputs(arrays["x"], path, config.channels_last), y[:cut], natural)
    test = None
    if with_test:
        test = Part(_npz_inputs(arrays["x_test"], path, config.channels_last), y[cut:], test_natural)
    return Records(path.stem, train, classes, test, class_names, client_names)


# --- tables ---


def _read_frame(path: Path, config: DataConfig) -> Any:
    try:
        import pandas
    except ImportError as error:
        raise need_extra("pandas", "tables", f"source `{config.source}`") from error
    try:
        if config.source == "csv":
            return pandas.read_csv(path, na_values=list(config.missing), skipinitialspace=True)
        return pandas.read_parquet(path)
    except ImportError as error:
        raise need_extra("pyarrow", "tables", f"source `{config.source}`") from error
    except (ValueError, OSError, pandas.errors.ParserError) as error:
        raise DataError(f"{path} cannot be read as {config.source} ({error}): check the file") from error


def frame_to_records(frames: list[Any], config: DataConfig, name: str) -> Records:
    """Records of one pandas frame (train) or two (train, test); every feature column must be numeric or in
    one_hot."""
    first = frames[0]
    columns = [str(column) for column in first.columns]
    for role, column in (("label", config.label), ("client", config.client)):
        if column is not None and column not in columns:
            raise ConfigError(
                f"{name}: the data.{role} column `{column}` is not in the table, whose columns are "
                f"{', '.join(columns)}: name one of them"
            )
    for column in (*config.features, *config.drop, *config.one_hot):
        if column not in columns:
            raise ConfigError(f"{name}: column `{column}` is not in the table, whose columns are {', '.join(columns)}")
    special = {config.label, config.client, *config.drop}
    features = list(config.features) or [column for column in columns if column not in special]
    if config.label in features or config.client in features:
        raise ConfigError(f"{name}: data.features must not hold the label or the client column: remove it")
    for other in frames[1:]:
        absent = [column for column in (*features, config.label) if column not in other.columns]
        if absent:
            raise DataError(f"{name}: the test table lacks the columns {', '.join(absent)} of the train table")
    if not features or any(len(frame) == 0 for frame in frames):
        raise DataError(f"{name}: a table needs at least one record and one feature column besides the label")

    cuts = np.cumsum([len(frame) for frame in frames])[:-1]
    raw = np.concatenate([frame[config.label].to_numpy(dtype=object) for frame in frames])
    y, classes, class_names = encode_labels(_plain(raw), name, config.classes, config.class_names)
    ys = np.split(y, cuts)
    naturals: list[NDArray[np.int64] | None] = [None] * len(frames)
    client_names: tuple[str, ...] = ()
    if config.client is not None:
        holders = [frame for frame in frames if config.client in frame.columns]
        values = np.concatenate([frame[config.client].to_numpy(dtype=object) for frame in holders])
        codes, client_names = encode_clients(_plain(values), name)
        split = np.split(codes, np.cumsum([len(frame) for frame in holders])[:-1])
        for position, frame in enumerate(frames):
            if config.client in frame.columns:
                naturals[position] = split.pop(0)
    xs = [_frame_features(frame, features, config.one_hot, name) for frame in frames]
    parts = [Part(x, part_y, natural) for x, part_y, natural in zip(xs, ys, naturals, strict=True)]
    return Records(name, parts[0], classes, parts[1] if len(parts) > 1 else None, class_names, client_names)


def _plain(values: NDArray[np.object_]) -> NDArray[np.generic]:
    """Numbers as a numeric array, anything else as it is."""
    if all(isinstance(value, int | float | np.integer | np.floating) for value in values):
        return np.array(values.tolist())
    return values


def _frame_features(
    frame: Any, features: list[str], one_hot: dict[str, tuple[str, ...]], name: str
) -> NDArray[np.float32]:
    columns: list[NDArray[np.float32]] = []
    for feature in features:
        values = frame[feature]
        if feature in one_hot:
            texts = values.astype("string")
            known = texts.isna() | texts.isin(list(one_hot[feature]))
            if not bool(known.all()):
                raise DataError(
                    f"{name}: column `{feature}` holds `{texts[~known].iloc[0]}`, which is not in its "
                    "data.one_hot list "
                    f"{list(one_hot[feature])}: add it"
                )
            # A missing value becomes all zeros: no category is claimed.
            columns += [(texts == value).fillna(False).to_numpy(dtype=np.float32) for value in one_hot[feature]]
            continue
        try:
            columns.append(values.to_numpy(dtype=np.float32, na_value=np.nan))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{name}: column `{feature}` is not numeric ({error}): list its values in data.one_hot or "
                "its name in "
                "data.drop"
            ) from error
    return np.ascontiguousarray(np.stack(columns, axis=1))


def read_table(config: DataConfig) -> Records:
    """A CSV or Parquet file, with a label column and perhaps a column that names the natural client."""
    path = required(config.path, config.source)
    frames = [_read_frame(path, config)]
    if config.test_path is not None:
        frames.append(_read_frame(required(config.test_path, config.source), config))
    return frame_to_records(frames, config, path.stem)


# --- heart disease ---

HEART_FEATURES = (
    "age", "sex", "cp", "trestbps", "chol", "fbs", "restecg",
    "thalach", "exang", "oldpeak", "slope", "ca", "thal",
)  # fmt: skip
HEART_HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
# Round centres and spreads chosen from the meaning of each attribute (years, mm Hg, mg/dl, beats per minute,
# mm) and the codes listed in heart-disease.names, not computed from the records.
HEART_CENTER = (55, 0.5, 2.5, 130, 220, 0.5, 1, 140, 0.5, 1, 2, 1.5, 5)
HEART_SCALE = (10, 0.5, 1, 20, 50, 0.5, 1, 25, 0.5, 1, 0.7, 1, 2)


def read_heart_disease(config: DataConfig) -> Records:
    """Four hospitals as four natural clients, 13 attributes, class 1 where the diagnosis is above 0.

    Source: A. Janosi, W. Steinbrunn, M. Pfisterer, R. Detrano, Heart Disease, UCI Machine Learning
    Repository, 1988 (CC BY 4.0), the `processed.*.data` files. `?` is missing. A resting blood pressure or a
    cholesterol of 0 is not possible in a living patient and stands for a value that was not taken (all of
    Switzerland's cholesterol), so it is read as missing too.
    """
    folder = required(config.path, "heart_disease")
    xs, ys, naturals = [], [], []
    for client, hospital in enumerate(HEART_HOSPITALS):
        path = folder / f"processed.{hospital}.data"
        if not path.is_file():
            raise DataError(f"source `heart_disease` needs {path}, which is not there: set data.path or FEDKD_DATA")
        rows = []
        for number, line in enumerate(path.read_text(encoding="latin-1").splitlines(), start=1):
            if not line.strip():
                continue
            cells = [cell.strip() for cell in line.split(",")]
            try:
                row = [np.nan if cell == "?" else float(cell) for cell in cells]
            except ValueError as error:
                raise DataError(f"{path}, line {number}: every value must be a number or `?` ({error})") from error
            if len(row) != len(HEART_FEATURES) + 1 or np.isnan(row[-1]):
                raise DataError(f"{path}, line {number}: 13 attributes and a diagnosis are needed, but `{line}` came")
            rows.append(row)
        if not rows:
            raise DataError(f"{path} holds no records: fetch it again")
        table = np.array(rows)
        x = table[:, :-1].astype(np.float32)
        for name in ("trestbps", "chol"):
            column = x[:, HEART_FEATURES.index(name)]
            column[column == 0] = np.nan
        xs.append(x)
        ys.append((table[:, -1] > 0).astype(np.int64))
        naturals.append(np.full(len(x), client, np.int64))
    constants = Standardiser.constants(HEART_CENTER, HEART_SCALE, (len(HEART_FEATURES),))
    train = Part(np.concatenate(xs), np.concatenate(ys), np.concatenate(naturals))
    return Records("heart_disease", train, 2, None, ("healthy", "disease"), HEART_HOSPITALS, constants)


# --- images ---

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def _stack(images: list[NDArray[np.uint8]], names: Sequence[str]) -> NDArray[np.uint8]:
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"{name} is {image.shape[1]}x{image.shape[2]} but {names[0]} is {images[0].shape[1]}x"
                f"{images[0].shape[2]} pixels: set data.resize to make all alike"
            )
    return np.stack(images)


def read_images(config: DataConfig) -> Records:
    """A folder of class folders of images; or of the folders `train` and `test`, each with class folders."""
    try:
        from PIL import Image
    except ImportError as error:
        raise need_extra("pillow", "images", "source `images`") from error
    folder = required(config.path, "images")
    if not folder.is_dir():
        raise DataError(f"source `images` needs a folder of class folders, but {folder} is a file: set data.path")
    apart = (folder / "train").is_dir() and (folder / "test").is_dir()
    roots = [folder / "train", folder / "test"] if apart else [folder]
    names = config.class_names or tuple(
        sorted({path.name for root in roots for path in root.iterdir() if path.is_dir() and path.name[0] != "."})
    )
    parts = []
    for root in roots:
        unknown = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name not in names)
        if config.class_names and unknown:
            raise DataError(f"{root}: the class folder `{unknown[0]}` is not among data.class_names: add or remove it")
        files = [
            (number, path)
            for number, name in enumerate(names)
            for path in sorted((root / name).glob("*"))
            if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith(".")
        ]
        if not files:
            raise DataError(f"{root} holds no images as <class>/<name>{'|'.join(IMAGE_ENDINGS)}: set data.path")
        images = []
        for _, path in files:
            try:
                with Image.open(path) as image:
                    images.append(pixels(image, config.channels, config.resize))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise DataError(f"{path} cannot be read as an image ({error}): repair or remove it") from error
        x = _stack(images, [str(path) for _, path in files])
        parts.append(Part(x, np.array([number for number, _ in files], np.int64)))
    if apart and parts[0].x.shape[1:] != parts[1].x.shape[1:]:
        raise DataError(f"{folder}: train and test images differ in size: set data.resize to make all alike")
    test = parts[1] if apart else None
    return Records(folder.name, parts[0], max(len(names), config.classes or 2), test, names)


# --- Hugging Face hub ---

OpenSplit = Callable[[str], Any]


def _open_hub(config: DataConfig) -> OpenSplit:
    """`name -> split` of a data set on the hub, by flwr-datasets; from the local cache unless download is
    set."""
    # Set before the import, because the package asks for consent to telemetry nowhere else.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    try:
        from datasets import DownloadConfig  # type: ignore[import-not-found,unused-ignore]
        from flwr_datasets import FederatedDataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise need_extra("flwr-datasets", "hf", "source `hf`") from error
    hub = FederatedDataset(
        dataset=config.hub or "",
        subset=config.hub_subset,
        partitioners={},  # fedkd deals the records itself, so that every source knows the same partitions
        shuffle=False,
        revision=config.hub_revision,
        download_config=DownloadConfig(local_files_only=not config.download),
    )

    def open_split(name: str) -> Any:
        with contextlib.nullcontext() if config.download else _hub_offline():
            return hub.load_split(name)

    return open_split


@contextlib.contextmanager
def _hub_offline() -> Iterator[None]:
    """Keep the hub's client from the network: `local_files_only` alone still asks for the README."""
    modules = [sys.modules.get(name) for name in ("datasets.config", "huggingface_hub.constants")]
    before = [(module, module.__dict__.get("HF_HUB_OFFLINE")) for module in modules if module is not None]
    for module, _ in before:
        module.__dict__["HF_HUB_OFFLINE"] = True
    try:
        yield
    finally:
        for module, value in before:
            module.__dict__["HF_HUB_OFFLINE"] = value


def read_hub(config: DataConfig, opener: Callable[[DataConfig], OpenSplit] = _open_hub) -> Records:
    """A data set of the Hugging Face hub: an image column (`hub_input`) or, with null there, a table."""
    open_split = opener(config)
    train_name, test_name = config.hub_splits
    splits: list[Any] = []
    for name in (train_name, *([test_name] if test_name else [])):
        try:
            splits.append(open_split(name))
        except Exception as error:  # the hub's client raises many types, and all mean that the split is not to be had
            hint = "check data.hub and data.hub_splits" if config.download else "set data.download to true"
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"split `{name}` of `{config.hub}` is not to be had ({first}): {hint}") from error
    name = f"hf:{config.hub}"
    if config.hub_input is None:
        frames = [split.to_pandas() for split in splits]
        named = len(_declared_names(splits[0], config))
        if named and config.classes is None and not config.class_names:
            config = config.model_copy(update={"classes": named})
        return _named(frame_to_records(frames, config, name), splits[0], config)
    columns = list(splits[0].column_names)
    for role, column in (("hub_input", config.hub_input), ("label", config.label), ("client", config.client)):
        if column is not None and column not in columns:
            raise ConfigError(f"{name}: the data.{role} column `{column}` is not among {', '.join(columns)}: name one")
    xs, raw = [], []
    for split in splits:
        images = []
        for number, image in enumerate(split[config.hub_input]):
            if not hasattr(image, "convert"):
                raise DataError(f"{name}: record {number} of `{config.hub_input}` is no image: set data.hub_input")
            images.append(pixels(image, config.channels, config.resize))
        if not images:
            raise DataError(f"{name}: a split has no records: check data.hub_splits")
        xs.append(_stack(images, [f"{name} record {number}" for number in range(len(images))]))
        raw.append(np.array(list(split[config.label]), dtype=object))
    if len({x.shape[1:] for x in xs}) > 1:
        raise DataError(f"{name}: train and test images differ in size: set data.resize to make all alike")
    cut = len(raw[0])
    # Class numbers of the hub may have names of their own, which then fix the number of classes.
    declared = len(_declared_names(splits[0], config)) or None
    y, classes, class_names = encode_labels(
        _plain(np.concatenate(raw)), name, config.classes or declared, () if declared else config.class_names
    )
    naturals: list[NDArray[np.int64] | None] = [None, None]
    client_names: tuple[str, ...] = ()
    if config.client is not None:
        values = [np.array(list(s[config.client]), dtype=object) for s in splits if config.client in s.column_names]
        codes, client_names = encode_clients(_plain(np.concatenate(values)), name)
        naturals = [codes[:cut], codes[cut:] if len(values) == 2 else None]
    test = Part(xs[1], y[cut:], naturals[1]) if len(xs) == 2 else None
    records = Records(name, Part(xs[0], y[:cut], naturals[0]), classes, test, class_names, client_names)
    return _named(records, splits[0], config)


def _declared_names(split: Any, config: DataConfig) -> tuple[str, ...]:
    feature = getattr(split, "features", {}).get(config.label)
    return tuple(getattr(feature, "names", None) or ())


def _named(records: Records, split: Any, config: DataConfig) -> Records:
    names = _declared_names(split, config)
    if records.class_names or len(names) != records.classes:
        return records
    return Records(
        records.name,
        records.train,
        records.classes,
        records.test,
        names,
        records.client_names,
        records.constants,
    )
