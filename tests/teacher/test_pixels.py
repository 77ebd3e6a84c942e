"""Pixels travel as bytes, and are the same inputs as before."""

from __future__ import annotations

import numpy as np
import pytest

from fedkd.teacher.pixels import LEVELS, packed, unpacked


def test_every_level_comes_back_bit_for_bit() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    inputs = pixels.astype(np.float32) / np.float32(255)
    sent = packed(inputs)
    assert sent == pixels.tobytes()
    assert unpacked(sent).tobytes() == inputs.tobytes()


@pytest.mark.parametrize("value", [np.nextafter(LEVELS[7], np.float32(1)), -1 / 255, -0.0, 0.5, np.nan, np.inf, 3e38])
def test_anything_else_is_no_pixel(value: float) -> None:
    inputs = np.stack([LEVELS, LEVELS])
    inputs[1, 3] = value
    assert packed(inputs) is None
