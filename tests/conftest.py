"""Settings for all tests."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

# One thread: the models are tiny, and two threads on a shared machine can take five times as long as one.
torch.set_num_threads(1)

# `harness`, `user_models`, and methods that live outside the package.
sys.path[:0] = [str(Path(__file__).parent / "contracts"), str(Path(__file__).parent)]

# After the path is set: `faults.table` prints what became of each fault, by `pytest -m fault --faults`.
pytest_plugins = ["faults.table"]
