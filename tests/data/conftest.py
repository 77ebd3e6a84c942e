"""Where the larger data sets lie, for the tests that need them."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def shared_data():
    named = os.environ.get("FEDKD_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2].parent / "shared" / "data"
    if not (folder / "mnist").is_dir() or not (folder / "heart_disease").is_dir():
        pytest.skip("the data folder (FEDKD_DATA) is not here")
    return folder
