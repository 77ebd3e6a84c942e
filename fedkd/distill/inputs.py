"""Unlabelled inputs: a folder of images, or an array in an .npz file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedkd.data.files import read_inputs
from fedkd.data.pictures import pixels
from fedkd.distill.cache import data_identity
from fedkd.distill.loop import Records
from fedkd.errors import ConfigError, DataError

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
MAX_IMAGES = 10_000_000


def unlabelled(path: Path, shape: tuple[int, ...] | None) -> Records:
    """Read inputs without labels.

    Args:
        path: a folder that is searched for images at any depth, or an .npz file with an array ``x`` [N, *shape].
        shape: what the teacher takes; images are brought to its channels and size.
    Raises:
        ConfigError: the path is neither, or images come without a shape to bring them to.
        DataError: there is nothing in it, or it cannot be read.
    """
    if path.is_dir():
        x: NDArray[np.generic] = _images(path, shape)
    elif path.suffix.lower() == ".npz" and path.is_file():
        x = read_inputs(path)
    else:
        raise ConfigError(f"{path} is neither a source of data, nor a folder of images, nor an .npz file")
    if shape is not None and x.shape[1:] != tuple(shape):
        raise DataError(f"{path} holds inputs of shape {list(x.shape[1:])}, the teacher takes {list(shape)}")
    if len(x) < 2:
        raise DataError(f"{path} holds {len(x)} inputs: too few to learn from")

    def take(index: NDArray[np.int64]) -> torch.Tensor:
        part = x[index].astype(np.float32)
        return torch.from_numpy(part / np.float32(255) if x.dtype == np.uint8 else part)

    return Records(size=len(x), x=take, identity=data_identity([x]))


def _images(folder: Path, shape: tuple[int, ...] | None) -> NDArray[np.generic]:
    if shape is None or len(shape) != 3 or shape[0] not in (1, 3):
        raise ConfigError(f"images need a teacher that takes [1 or 3, height, width]; this one says {shape}")
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as cause:
        raise ConfigError("a folder of images needs Pillow: pip install 'fedkd[images]'") from cause
    # Hidden files are not meant: some systems leave an image's label as ._NAME beside it.
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGES and not f.name.startswith("."))[
        :MAX_IMAGES
    ]
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGES)})")
    out = np.zeros((len(files), *shape), np.uint8)
    for i, file in enumerate(files):
        try:
            with Image.open(file) as image:
                out[i] = pixels(image, shape[0], (shape[1], shape[2]))
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as cause:
            raise DataError(f"{file} is no image that can be read: {cause}") from cause
    return out
