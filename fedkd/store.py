"""Where devices keep what they need from round to round."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedkd.algorithms.base import DeviceState
from fedkd.payloads import Payload, outline, rebuild
from fedkd.storage import StorageError, pack_tensors, sync_folder, unpack_tensors, write_atomic


@dataclass(frozen=True)
class Kept:
    """A device's state (None before it was first asked), and the last messages that delta coding refers to."""

    state: DeviceState | None = None
    received: Payload | None = None
    sent: Payload | None = None
    sent_round: int = -1


class Store(ABC):
    """Keeps what devices keep."""

    @abstractmethod
    def load(self, client: int, round: int) -> Kept:
        """Return what the device kept before ``round``."""

    @abstractmethod
    def save(self, client: int, round: int, kept: Kept) -> None:
        """Keep what the device has after ``round``."""

    def snapshot(self) -> Mapping[str, bytes]:
        """Return files for a checkpoint, from which :meth:`restore` brings the devices back; empty where they are safe."""
        return {}

    def restore(self, files: Mapping[str, bytes], round: int) -> None:
        """Go back to the snapshot made after ``round``."""

    def retain(self, files: Mapping[str, bytes]) -> None:
        """Keep what an older snapshot refers to, too: call it after :meth:`restore`, newest first."""

    def __init__(self) -> None:
        self._sessions: dict[int, bytes] = {}
        self._summed: dict[tuple[int, str], int] = {}

    def load_session(self, client: int) -> bytes | None:
        """Return what the device keeps of a secure sum that is under way. It lives as long as the process at least."""
        return self._sessions.get(client)

    def save_session(self, client: int, session: bytes | None) -> None:
        """Keep the session of a secure sum, or forget it."""
        if session is None:
            self._sessions.pop(client, None)
        else:
            self._sessions[client] = session

    def last_summed(self, client: int, run: str) -> int:
        """Return the last round of ``run`` for whose secure sum the device gave a vector; -1 for none.

        No snapshot takes it back: a server that falls back to an older checkpoint gets no second sum of a round.
        """
        return self._summed.get((client, run), -1)

    def save_summed(self, client: int, run: str, round: int) -> None:
        """Note that the device is about to give a vector for the secure sum of a round."""
        self._summed[client, run] = round


class MemoryStore(Store):
    """Keeps devices in memory for as long as the process lives; a device that was never asked takes no room."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[int, Kept] = {}

    def load(self, client: int, round: int) -> Kept:
        return self._kept.get(client, Kept())

    def save(self, client: int, round: int, kept: Kept) -> None:
        self._kept[client] = kept


class FolderStore(Store):
    """Keeps every device in a folder of its own, one file per round, the last ``keep`` of them.

    A round that is asked again, because the server fell back to a checkpoint, finds the state before it.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        super().__init__()
        self.folder, self.keep = folder, keep

    def load(self, client: int, round: int) -> Kept:
        known = [r for r in self._rounds(client) if r < round]
        if not known:
            return Kept()
        path = self._path(client, max(known))
        try:
            data = path.read_bytes()
        except OSError as cause:
            raise StorageError(f"cannot read {path}: {cause.strerror or cause}") from cause
        return unflatten(unpack_tensors(data, str(path)), json.loads(read_metadata(data)["kept"]))

    def save(self, client: int, round: int, kept: Kept) -> None:
        tensors, kind = flatten(kept)
        path = self._path(client, round)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, pack_tensors(tensors, {"kept": json.dumps(kind)}))
        for old in sorted(self._rounds(client))[: -self.keep]:
            self._path(client, old).unlink(missing_ok=True)

    def load_session(self, client: int) -> bytes | None:
        path = self._session(client)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as cause:
            raise StorageError(f"cannot read {path}: {cause.strerror or cause}") from cause

    def save_session(self, client: int, session: bytes | None) -> None:
        path = self._session(client)
        if session is None:
            if path.exists():
                path.unlink()
                # A session that a power cut brought back could be answered a second time.
                sync_folder(path.parent)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, session, mode=0o600)

    def last_summed(self, client: int, run: str) -> int:
        path = self._summed_path(client)
        try:
            return int(json.loads(path.read_bytes()).get(run, -1))
        except FileNotFoundError:
            return -1
        except (OSError, ValueError, TypeError, AttributeError) as cause:
            raise StorageError(f"cannot read {path}: {cause}") from cause

    def save_summed(self, client: int, run: str, round: int) -> None:
        path = self._summed_path(client)
        try:
            known = json.loads(path.read_bytes())
        except FileNotFoundError:
            known = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({**known, run: round}).encode())

    def _summed_path(self, client: int) -> Path:
        return self.folder / f"{client:06d}" / "summed.json"

    def _session(self, client: int) -> Path:
        return self.folder / f"{client:06d}" / "session.json"

    def forget_after(self, round: int, clients: Iterable[int]) -> None:
        """Drop what devices kept after ``round``: a resumed server asks those rounds again."""
        for client in clients:
            for later in self._rounds(client):
                if later > round:
                    self._path(client, later).unlink(missing_ok=True)

    def _path(self, client: int, round: int) -> Path:
        return self.folder / f"{client:06d}" / f"{round:06d}.safetensors"

    def _rounds(self, client: int) -> list[int]:
        folder = self.folder / f"{client:06d}"
        return [int(p.stem) for p in folder.glob("[0-9]*.safetensors")] if folder.is_dir() else []


def flatten(kept: Kept) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of ``kept`` by name, and the rest as plain data."""
    tensors: dict[str, Tensor] = {}
    kind: dict[str, Any] = {"sent_round": kept.sent_round, "state": kept.state is not None}
    if kept.state is not None:
        for section in ("models", "optimizers"):
            for role, values in getattr(kept.state, section).items():
                tensors |= {f"{section}|{role}|{name}": t for name, t in values.items()}
        tensors |= {f"memory|{name}": t for name, t in kept.state.memory.items()}
    for side in ("received", "sent"):
        payload: Payload | None = getattr(kept, side)
        if payload is not None:
            kind[side] = outline(payload)
            tensors |= {f"{side}|{name}": t for name, t in payload.tensors().items()}
    return tensors, kind


def unflatten(tensors: Mapping[str, Tensor], kind: Mapping[str, Any]) -> Kept:
    """Undo :func:`flatten`."""
    sections: dict[str, Any] = {"models": {}, "optimizers": {}, "memory": {}, "received": {}, "sent": {}}
    for name, tensor in tensors.items():
        section, rest = name.split("|", 1)
        if section in ("models", "optimizers"):
            role, rest = rest.split("|", 1)
            sections[section].setdefault(role, {})[rest] = tensor
        else:
            sections[section][rest] = tensor
    state = None
    if kind["state"]:
        state = DeviceState(models=sections["models"], optimizers=sections["optimizers"], memory=sections["memory"])
    sides = {s: rebuild(kind[s], sections[s]) if s in kind else None for s in ("received", "sent")}
    return Kept(state, sides["received"], sides["sent"], int(kind["sent_round"]))


def read_metadata(data: bytes) -> dict[str, str]:
    """Return the text metadata of safetensors bytes.

    Raises:
        StorageError: the header is damaged.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        found = json.loads(data[8 : 8 + size])["__metadata__"]
    except (ValueError, KeyError, TypeError) as cause:
        raise StorageError("a stored state lacks its header") from cause
    return {str(k): str(v) for k, v in found.items()}
