"""The stages of a run on disk: where each leaves its checkpoint, and who is told of its epochs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from fedkd.distill.loop import Epoch
from fedkd.storage import StorageError, read_bundle

Watch = Callable[[str, Epoch, int], None]
"""Called after every epoch with the stage (``teacher 1``, ``assistant 1``, ``student``, ``alone``), the epoch, and
their number."""


class Kept(TypedDict):
    """What trainers are told of a stage, by the names of their parameters."""

    checkpoint: Path
    watch: Callable[[Epoch], None]


@dataclass(frozen=True)
class Stages:
    """The stages of the run in ``folder``."""

    folder: Path
    watch: Watch | None = None

    def place(self, stage: str) -> Path:
        """Return the folder of a stage's checkpoint, which is sound or not there yet.

        Raises:
            StorageError: it is damaged; says what to remove.
        """
        place = self.folder / "checkpoints" / stage.replace(" ", "-")
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            try:
                read_bundle(place)
            except StorageError as cause:
                raise StorageError(f"{cause}; remove {place} to train this stage from its beginning") from cause
        return place

    def kept(self, stage: str, epochs: int) -> Kept:
        """Return where a stage of ``epochs`` leaves its checkpoint, and what it calls after each.

        Raises:
            StorageError: see :meth:`place`.
        """

        def watch(epoch: Epoch) -> None:
            if self.watch is not None:
                self.watch(stage, epoch, epochs)

        return {"checkpoint": self.place(stage), "watch": watch}
