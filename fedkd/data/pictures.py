"""Pillow images as bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def pixels(image: Any, channels: int, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Return uint8 [channels, height, width] of a Pillow image, brought to ``size`` (height, width).

    Values of 16 bits are scaled to 8; Pillow itself would cut them at 255, which leaves a white picture.

    Raises:
        ValueError: values of more than 16 bits, whose range nobody tells.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        from PIL import Image

        deep = np.asarray(image)
        if image.mode == "F" or deep.min() < 0 or deep.max() > 65535:
            raise ValueError(f"pixels of the mode {image.mode}, expected 8 or 16 bits")
        image = Image.fromarray(np.round(deep / 257).astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]))
    found = np.asarray(image, np.uint8)
    return found[None] if channels == 1 else np.moveaxis(found, 2, 0)
