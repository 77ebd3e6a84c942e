"""The public inputs that every device answers, their identity, and what sending them once costs.

Two halves of a device and the server agree on the set by its identity, a hash that travels with the labels.
"""

import hashlib
import json
import struct
import warnings
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkd.data.config import ProxyConfig
from fedkd.data.dataset import Dataset, Index, Split
from fedkd.data.files import locate, read_inputs
from fedkd.data.scaling import Standardiser, to_inputs
from fedkd.data.seeds import stream
from fedkd.data.sources import load
from fedkd.errors import DataError, DataWarning

_MAGIC = b"FKDX"
_HEADER_BYTES_MAX = 4096
_DTYPES: dict[str, np.dtype[Any]] = {
    "|u1": np.dtype(np.uint8),
    "<f4": np.dtype("<f4"),
    "<i8": np.dtype("<i8"),
}


def _canonical(x: NDArray[np.generic]) -> NDArray[np.generic]:
    """C order and little-endian, so that hash and bytes do not depend on the machine."""
    return np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("<"))


def identity_of(x: NDArray[np.generic]) -> str:
    """SHA-256 (hex) over type, shape and bytes of the inputs: equal exactly for equal inputs in equal
    order."""
    x = _canonical(x)
    head = json.dumps([x.dtype.str, list(x.shape)]).encode()
    hasher = hashlib.sha256(struct.pack("<I", len(head)) + head)
    hasher.update(x.data if x.size else b"")
    return hasher.hexdigest()


def encode_inputs(x: NDArray[np.generic], y: NDArray[np.int64] | None = None) -> bytes:
    """Inputs (and labels) as they travel once to a device: magic, length of a JSON header, header, zlib
    body."""
    arrays = [_canonical(x)] + ([] if y is None else [_canonical(y)])
    header = json.dumps([[array.dtype.str, list(array.shape)] for array in arrays]).encode()
    body = zlib.compress(b"".join(array.tobytes() for array in arrays), 6)
    return _MAGIC + struct.pack("<I", len(header)) + header + body


def decode_inputs(blob: bytes, cap_bytes: int = 1 << 32) -> tuple[NDArray[np.generic], NDArray[np.int64] | None]:
    """Inverse of `encode_inputs` for bytes from a network: nothing is reserved beyond what the header claims,
    nor beyond `cap_bytes` once unpacked. Raises DataError for anything that `encode_inputs` would not
    write."""
    try:
        if blob[:4] != _MAGIC:
            raise ValueError("it starts with other bytes")
        (length,) = struct.unpack("<I", blob[4:8])
        if length > _HEADER_BYTES_MAX:
            raise ValueError(f"its header claims {length} bytes")
        header = json.loads(blob[8 : 8 + length])
        if not isinstance(header, list) or len(header) not in (1, 2):
            raise ValueError("its header does not list one or two arrays")
        shapes, dtypes, total = [], [], 0
        for dtype_name, shape in header:
            if dtype_name not in _DTYPES or not all(type(size) is int and size >= 0 for size in shape):
                raise ValueError(f"its header holds {dtype_name} {shape}")
            count = 1
            for size in shape:
                count *= size
            dtypes.append(_DTYPES[dtype_name])
            shapes.append(tuple(shape))
            total += count * dtypes[-1].itemsize
        if total > cap_bytes:
            raise ValueError(f"it claims {total} bytes, over the cap of {cap_bytes}")
        unpacker = zlib.decompressobj()
        body = unpacker.decompress(blob[8 + length :], total + 1)
        if len(body) != total or not unpacker.eof or unpacker.unused_data:
            raise ValueError(f"its body is not exactly {total} bytes")
        first = total if len(shapes) == 1 else int(np.prod(shapes[0], dtype=np.int64)) * dtypes[0].itemsize
        x = np.frombuffer(body[:first], dtypes[0]).reshape(shapes[0]).copy()
        if dtypes[0].kind == "i" or x.ndim < 2:
            raise ValueError("its first array holds no inputs")
        y = None
        if len(shapes) == 2:
            y = np.frombuffer(body[first:], dtypes[1]).reshape(shapes[1]).copy()
            if y.dtype != np.int64 or y.shape != x.shape[:1]:
                raise ValueError(f"its labels {y.dtype} {y.shape} do not fit its inputs {x.shape}")
    except (ValueError, TypeError, struct.error, zlib.error, RecursionError) as error:
        raise DataError(f"the bytes are no proxy set of fedkd ({error}): fetch it from the server again") from error
    return x, y


@dataclass(frozen=True)
class ProxySet:
    """N public inputs, without labels unless the experiment says that the public data are labelled.

    x: uint8 or float32 [N, *shape], raw as in `Dataset`; y: int64 [N] or None.
    identity: `identity_of(x)`. bytes: length of `encode_inputs(x, y)`, the one-off cost of sending the set to
    one device; a set that every party already has (public data, a shared seed) may be counted as 0 by the
    experiment.
    """

    x: NDArray[np.generic]
    y: NDArray[np.int64] | None
    name: str
    scaling: Standardiser | None = None
    private: bool = False  # its scaling is still to be fitted on itself, by `standardise`
    identity: str = field(init=False)
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "identity", identity_of(self.x))
        object.__setattr__(self, "bytes", len(encode_inputs(self.x, self.y)))

    def __len__(self) -> int:
        return len(self.x)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input, without N."""
        return tuple(self.x.shape[1:])

    def inputs(self, index: Index | None = None) -> NDArray[np.float32]:
        """Model inputs float32 [n, *shape]; DataError if they are to be scaled and `standardise` was not
        called."""
        if self.private:
            raise DataError(
                "data.normalise is `per_client` but the proxy set has not been scaled yet: call "
                "fedkd.data.standardise (or prepare) after the partition"
            )
        return to_inputs(self.x, index, self.scaling)


def build_proxy(config: ProxyConfig, split: Split, seed: int) -> tuple[Split, ProxySet]:
    """The proxy set, and the split without the records that became public.

    - `holdout`: `size` random records leave the train set; their labels are dropped unless `labelled`.
    - `dataset`: `size` random train records of another source (`data`), scaled by the private source's
      constants.
    - `noise`: uniform bytes for images; standard normal in scaled units for real inputs with public
      constants, else uniform in low..high. Nothing of the private records is used but their shape.
    - `mixup`: `size` convex combinations w a + (1 - w) b of two distinct public records, w ~ Beta(alpha,
      alpha) (Zhang et al., mixup, ICLR 2018, https://arxiv.org/abs/1710.09412). The base is `data` or,
      without it, `base_size` records that leave the train set, because a mixture of private records would
      show them.
    - `npz`: `size` random inputs of a file, such as a pool that was made from a teacher alone. They are taken as
      models take them, without any scaling.

    Call it before `partition`. Raises DataError for a set larger than the data, of another input shape, or
    (when labelled) of another number of classes. Warns (DataWarning)
    if another source repeats our own records.
    """
    rng = stream(seed, "proxy")
    y: NDArray[np.int64] | None = None
    train = split.train
    if config.kind == "noise":
        x = _noise(config, train, rng)
    elif config.kind == "mixup":
        if config.data is not None:
            base = _other(config, train, seed)
        else:
            train, base = _hold_out(train, config.base_size or max(2, config.size), "proxy.base_size", rng)
        x = _mixup(config, base.x, rng)
    elif config.kind == "npz":
        return replace(split, train=train), ProxySet(_from_file(config, train, rng), None, "npz")
    elif config.kind == "dataset":
        other = _other(config, train, seed)
        if config.size > len(other):
            raise DataError(
                f"proxy.size is {config.size}, but the public source {other.name} has {len(other)} records: lower it"
            )
        chosen = other.select(np.sort(rng.choice(len(other), size=config.size, replace=False)))
        x, y = chosen.x, chosen.y
    else:
        train, chosen = _hold_out(train, config.size, "proxy.size", rng)
        x, y = chosen.x, chosen.y
    if config.kind in ("dataset", "mixup") and config.data is not None:
        _warn_of_overlap(base.x if config.kind == "mixup" else x, split)
    private = split.train.private
    proxy = ProxySet(x, y if config.labelled else None, config.kind, split.train.scaling, private)
    lacks = x.dtype != np.uint8 and proxy.scaling is None and not private and bool(np.isnan(x).any())
    if lacks:
        raise DataError("the proxy set has missing values, which unscaled inputs cannot hold: set data.normalise")
    return replace(split, train=train), proxy


def _warn_of_overlap(public: NDArray[np.generic], split: Split) -> None:
    """Warn if the "public" source repeats private or test records, as the same source named twice would."""
    ours = {row.tobytes() for row in public}
    for name, records in (("private training", split.train.x), ("test", split.test.x)):
        if records.dtype != public.dtype:
            continue
        shared = sum(row.tobytes() in ours for row in records)
        if shared:
            warnings.warn(
                f"{shared} {name} records are also in the public source, so they are neither private nor "
                "unseen: name another source, or use proxy.kind `holdout`",
                DataWarning,
                stacklevel=3,
            )


def _hold_out(train: Dataset, size: int, setting: str, rng: np.random.Generator) -> tuple[Dataset, Dataset]:
    if size >= len(train):
        raise DataError(
            f"{setting} is {size}, but {train.name} has {len(train)} training records, of which at least one "
            "must stay "
            "private: lower it"
        )
    order = rng.permutation(len(train))
    return train.select(np.sort(order[size:])), train.select(np.sort(order[:size]))


def _other(config: ProxyConfig, train: Dataset, seed: int) -> Dataset:
    if config.data is None:
        raise DataError("proxy.data is missing: name the public source")
    other = load(config.data, seed).train
    if other.shape != train.shape:
        raise DataError(
            f"the proxy set {other.name} has inputs of shape {other.shape}, but {train.name} has "
            f"{train.shape}: the "
            "same models must take both, so choose or resize one to fit"
        )
    if config.labelled and other.classes != train.classes:
        raise DataError(
            f"the labelled proxy set {other.name} has {other.classes} classes, but {train.name} has "
            f"{train.classes}: "
            "drop proxy.labelled or choose another set"
        )
    return other


def _from_file(config: ProxyConfig, train: Dataset, rng: np.random.Generator) -> NDArray[np.generic]:
    if config.path is None:
        raise DataError("proxy.path is missing: name the file of inputs")
    x = read_inputs(locate(config.path, "npz"))
    if x.shape[1:] != train.shape:
        raise DataError(f"{config.path} holds inputs of shape {x.shape[1:]}, but {train.name} has {train.shape}")
    if config.size > len(x):
        raise DataError(f"proxy.size is {config.size}, but {config.path} holds {len(x)} inputs: lower it")
    return x[np.sort(rng.choice(len(x), size=config.size, replace=False))]


def _noise(config: ProxyConfig, train: Dataset, rng: np.random.Generator) -> NDArray[np.generic]:
    shape = (config.size, *train.shape)
    if train.x.dtype == np.uint8:
        return rng.integers(0, 256, size=shape, dtype=np.uint8)
    if train.scaling is not None:
        noise = rng.standard_normal(shape).astype(np.float32)
        return np.asarray(train.scaling.center + train.scaling.scale * noise, np.float32)
    if train.private:
        return rng.standard_normal(shape).astype(np.float32)  # scaled by its own statistics later
    return rng.uniform(config.low, config.high, size=shape).astype(np.float32)


def _mixup(config: ProxyConfig, base: NDArray[np.generic], rng: np.random.Generator) -> NDArray[np.generic]:
    if len(base) < 2:
        raise DataError(f"mixup needs at least 2 public records, but {len(base)} came: give more")
    first = rng.integers(len(base), size=config.size)
    second = (first + rng.integers(1, len(base), size=config.size)) % len(base)
    weight = rng.beta(config.mixup_alpha, config.mixup_alpha, size=config.size)
    weight = weight.reshape(-1, *(1 for _ in base.shape[1:])).astype(np.float32)
    a, b = base[first].astype(np.float32), base[second].astype(np.float32)
    mixed = weight * a + (1 - weight) * b
    if base.dtype == np.uint8:
        pixels: NDArray[np.uint8] = np.clip(np.rint(mixed), 0, 255).astype(np.uint8)
        return pixels
    table: NDArray[np.float32] = mixed.astype(np.float32)
    return table
