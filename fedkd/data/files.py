"""Where the files of a source lie, and how they get there when the user asks for a download."""

import hashlib
import os
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedkd.errors import DataError

TIMEOUT_SECONDS = 60


def data_root() -> Path | None:
    """The folder that FEDKD_DATA names, if it is set."""
    value = os.environ.get("FEDKD_DATA")
    return Path(value).expanduser() if value else None


def cache_folder(source: str) -> Path:
    """Where downloads of `source` go by default."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "fedkd" / source


def locate(path: Path | None, source: str) -> Path:
    """File or folder of a source; it need not exist (see `fedkd.data.DataConfig` for the order)."""
    root = data_root()
    if path is not None:
        path = path.expanduser()
        if not path.exists() and not path.is_absolute() and root is not None and (root / path).exists():
            return root / path
        return path
    if root is not None and (root / source).exists():
        return root / source
    return cache_folder(source)


def required(path: Path | None, source: str, key: str = "data.path") -> Path:
    """Like `locate`, but raises DataError where nothing is there; `key` is the setting that says where to look."""
    found = locate(path, source)
    if not found.exists():
        fixed = path is not None and path.is_absolute()
        raise DataError(
            f"source `{source}` needs {found}, which does not exist: correct {key}"
            + ("" if fixed else f", or set FEDKD_DATA to the folder that holds {path or f'`{source}`'}")
        )
    return found


def read_inputs(path: Path) -> NDArray[np.generic]:
    """Inputs `x` uint8 or float32 [N, *shape] of an .npz file, without labels.

    Raises DataError if there is no such array, or if it holds anything but uint8 or finite real numbers.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            x: NDArray[np.generic] = file["x"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as cause:
        raise DataError(f"{path} has no array `x` that can be read: {cause}") from cause
    if x.ndim < 2:
        raise DataError(f"{path}: x must be [N, *shape], but {x.shape} came")
    if x.dtype != np.uint8:
        if not np.issubdtype(x.dtype, np.floating):
            raise DataError(f"{path}: x must be uint8 or real numbers, but {x.dtype} came")
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise DataError(f"{path}: x holds NaN or infinity")
    return x


def digest(path: Path, algorithm: str) -> str:
    """Hex digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def fetch(urls: Iterable[str], target: Path, checksum: str) -> None:
    """Download to `target` from the first of `urls` that delivers `checksum` ("md5:..." or "sha256:...").

    The file appears under its name only when it is whole and its checksum fits. Raises DataError otherwise.
    """
    algorithm, wanted = checksum.split(":", 1)
    target.parent.mkdir(parents=True, exist_ok=True)
    failure = "no address is known"
    for url in urls:
        handle, name = tempfile.mkstemp(prefix=target.name, suffix=".part", dir=target.parent)
        part = Path(name)
        try:
            with (
                os.fdopen(handle, "wb") as out,
                urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer,
            ):
                while block := answer.read(1 << 20):
                    out.write(block)
            came = digest(part, algorithm)
            if came == wanted:
                part.replace(target)
                return
            failure = f"{url} gave a file with {algorithm} {came}, but {wanted} was published"
        except OSError as error:
            failure = f"{url} could not be read ({error})"
        finally:
            part.unlink(missing_ok=True)
    raise DataError(f"downloading {target.name} failed: {failure}; fetch it by hand into {target.parent}")
