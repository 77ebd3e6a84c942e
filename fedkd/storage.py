"""Files that survive a power cut: written aside, synced, renamed, with a checksum beside them. Never a pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.errors import FedkdError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"


class StorageError(FedkdError):
    """A file cannot be written, or what was read back is not what was written."""


def write_atomic(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write ``data`` so that ``path`` holds either the old or the new content, whatever happens meanwhile.

    ``mode``: permissions of the file from its first moment on, less the umask; 0o600 for a secret.

    Raises:
        StorageError: the disk is full or read-only; the old content stands.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.unlink(missing_ok=True)
        with open(aside, "wb", opener=lambda name, flags: os.open(name, flags | os.O_EXCL, mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except OSError as cause:
        _drop(aside)
        raise StorageError(f"cannot write {path}: {cause.strerror or cause}; the former content is kept") from cause
    except BaseException:
        _drop(aside)
        raise


def _drop(aside: Path) -> None:
    with contextlib.suppress(OSError):
        aside.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless they are there.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise StorageError(f"cannot make the folder {path}: {cause.strerror or cause}") from cause


def append_line(path: Path, line: str) -> None:
    """Add a line to a file of lines. A reader takes a last line that is cut short for none.

    Raises:
        StorageError: the disk is full or read-only.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as cause:
        raise StorageError(f"cannot write {path}: {cause.strerror or cause}") from cause


def clear_aside(*folders: Path) -> None:
    """Remove what a process that was killed had written aside and not yet put in its place."""
    for folder in folders:
        for left in folder.glob(".*.part"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                _drop(left)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically. NaN and infinity are refused, because JSON has none."""
    write_atomic(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def pack_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return ``tensors`` in the safetensors format."""
    import safetensors.torch

    plain = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    packed: bytes = safetensors.torch.save(plain, dict(metadata) if metadata else None)
    return packed


def unpack_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """Return the tensors of safetensors bytes.

    Raises:
        StorageError: the bytes are no safetensors file.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        # Cloned, because the tensors lie unaligned in the file's bytes, and a matrix product over unaligned memory
        # may round differently: a resumed run would drift from an uninterrupted one.
        found = {name: t.clone() for name, t in sorted(safetensors.torch.load(data).items())}
    except (SafetensorError, KeyError, ValueError) as cause:
        raise StorageError(f"{where} is no safetensors file: {cause}") from cause
    return found


def write_bundle(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write ``folder`` with ``files`` and a manifest of their SHA-256, as one step: it is there whole or not at all.

    Raises:
        StorageError: the disk is full or read-only.
    """
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    manifest = (json.dumps({"sha256": sums}, indent=1) + "\n").encode()
    write_folder(folder, {**files, MANIFEST: manifest})


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write ``folder`` with ``files`` (names may lead into folders below it) as one step; a former one is replaced.

    Raises:
        StorageError: the disk is full or read-only.
    """
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, data in files.items():
            path = aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
        sync_folder(folder.parent)
    except (OSError, StorageError) as cause:
        shutil.rmtree(aside, ignore_errors=True)
        raise StorageError(f"cannot write {folder}: {cause}") from cause
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def read_bundle(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder written by :func:`write_bundle`, each checked against its SHA-256.

    Raises:
        StorageError: a file is missing, was changed, or has a name that leads elsewhere.
    """
    try:
        sums = json.loads((folder / MANIFEST).read_text())["sha256"]
        if not isinstance(sums, dict):
            raise ValueError("no list of checksums")
        files = {}
        for name, wanted in sums.items():
            if Path(name).name != name or name in ("", ".", ".."):
                raise StorageError(f"{folder}: {name!r} is no plain file name")
            data = (folder / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != wanted:
                raise StorageError(f"{folder / name}: the checksum does not match, the file was damaged")
            files[name] = data
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise StorageError(f"{folder} is no whole checkpoint: {cause}") from cause
    return files
