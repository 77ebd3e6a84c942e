"""Compiles ``nets.cpp`` with the system's C++ compiler on first use and loads it by ctypes.

The library is kept in the user's cache folder under a hash of the source, the flags, the compiler and the processor, so
that it is built once per machine. Where there is no compiler, or it fails, :func:`library` returns None and says so once:
the same numbers then come from torch, more slowly. The variable FEDKD_KERNELS=off does without on purpose.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("nets.cpp")
SWITCH = "FEDKD_KERNELS"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared",
         "-fPIC", "-pthread")  # fmt: skip
REALS = {torch.float32: "float", torch.float64: "double"}
COMPILE_SECONDS = 300


class NoKernels(UserWarning):
    """There is no compiled kernel, so that torch does the work."""


@dataclass(frozen=True)
class Library:
    """The loaded kernels of one dtype. ``seconds``: what compiling took, 0 where a kept library served."""

    lib: ctypes.CDLL
    dtype: torch.dtype
    seconds: float

    def train(self, job: ctypes.Structure) -> None:
        """Run a stretch of training."""
        self.lib.fedkd_train(ctypes.byref(job))

    def forward(self, job: ctypes.Structure) -> None:
        """Run a forward pass."""
        self.lib.fedkd_forward(ctypes.byref(job))

    def backward(self, job: ctypes.Structure) -> None:
        """Run the backward pass of a forward pass that kept what it needs."""
        self.lib.fedkd_backward(ctypes.byref(job))

    def kept(self, layers: ctypes.Array[ctypes.c_int64], count: int, samples: int) -> int:
        """Return how many numbers a forward pass keeps for one device."""
        return int(self.lib.fedkd_kept(layers, ctypes.c_int64(count), ctypes.c_int64(samples)))


@cache
def library(dtype: torch.dtype) -> Library | None:
    """Return the kernels for ``dtype``, compiled if need be; None where there are none (said once, with the reason)."""
    if dtype not in REALS or os.environ.get(SWITCH, "").lower() in ("off", "0", "no"):
        return None
    began = time.perf_counter()
    try:
        path, fresh = compiled(REALS[dtype])
        lib = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as cause:
        reason = " ".join(str(cause).split())[:300]
        warnings.warn(f"no compiled kernels, torch does the work instead: {reason}", NoKernels, stacklevel=2)
        return None
    for name in ("fedkd_train", "fedkd_forward", "fedkd_backward"):
        getattr(lib, name).restype = None
    lib.fedkd_kept.restype = ctypes.c_int64
    return Library(lib, dtype, time.perf_counter() - began if fresh else 0.0)


def compiled(real: str) -> tuple[Path, bool]:
    """Return the shared library for the C++ type ``real``, and whether it was compiled just now.

    Raises:
        RuntimeError: there is no compiler, or it refuses; says which and why.
    """
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler (g++ or clang++) was found")
    flags = (*FLAGS, f"-DREAL={real}")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    parts = (SOURCE.read_text(encoding="utf-8"), *flags, compiler, version, platform.machine(), _processor())
    name = hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:24]
    folder = cache_folder()
    path = folder / f"{name}-{real}.so"
    if path.exists():
        return path, False
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Several processes may compile at once: each into a file of its own, and the last rename wins.
        place = tempfile.TemporaryDirectory(dir=folder)
    except OSError as cause:
        raise RuntimeError(
            f"{folder} cannot be written ({cause.strerror}): let XDG_CACHE_HOME name a folder that can"
        ) from cause
    with place as scratch:
        made = Path(scratch) / "nets.so"
        done = subprocess.run(
            [compiler, *flags, str(SOURCE), "-o", str(made)], capture_output=True, text=True, timeout=COMPILE_SECONDS
        )
        if done.returncode:
            raise RuntimeError(f"{compiler} failed: {(done.stderr.strip().splitlines() or ['without a word'])[0]}")
        os.replace(made, path)
    return path, True


def cache_folder() -> Path:
    """Return where compiled kernels are kept: ``$XDG_CACHE_HOME/fedkd``, by default ``~/.cache/fedkd``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fedkd"


def _processor() -> str:
    """What ``-march=native`` depends on: a cache folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.node()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(next((x for x in lines if x.startswith(start)), "") for start in wanted)
