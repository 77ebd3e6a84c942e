"""Where torch computes, and how memory is kept."""

from __future__ import annotations

import ctypes

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


def keep_memory() -> bool:
    """Keep what is freed for the next batch, instead of handing it back to the system, and say whether it could be set.

    The activations of a batch take tens of megabytes, which glibc otherwise asks of the system anew for every batch, page
    by page. For processes that do the same thing all their life. Only glibc knows how; elsewhere nothing happens.
    """
    trim_threshold, mmap_threshold, most = -1, -3, 1 << 30
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows takes no None
        return False
    return bool(mallopt(trim_threshold, most) and mallopt(mmap_threshold, most))
