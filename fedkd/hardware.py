"""Where torch computes."""

from __future__ import annotations

import torch

from fedkd.errors import ConfigError


def device(wanted: str, key: str) -> torch.device:
    """Return the device that computes: ``auto`` takes a GPU where there is one. ``key`` is what asked, for the error.

    Raises:
        ConfigError: ``cuda`` where torch finds none.
    """
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise ConfigError(f"{key} is cuda, but torch finds no GPU here: use cpu or auto")
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")
