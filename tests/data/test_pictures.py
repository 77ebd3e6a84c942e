"""Pictures of 16 bits, and the files that lie beside pictures in a folder of a user."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedkd.data import DataConfig
from fedkd.data.pictures import pixels
from fedkd.data.readers import read_images
from fedkd.distill.inputs import unlabelled
from fedkd.errors import DataError


def test_sixteen_bits_are_scaled_and_not_cut() -> None:
    deep = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    assert pixels(Image.fromarray(deep), 1).tolist() == [[[0, 1, 128, 255]]]
    assert pixels(Image.fromarray(deep.astype(np.int32)), 3).tolist() == [[[0, 1, 128, 255]]] * 3
    with pytest.raises(ValueError, match="mode F, expected 8 or 16 bits"):
        pixels(Image.fromarray(np.zeros((2, 2), np.float32)), 1)


def test_a_mixed_folder_gives_its_pictures(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):
            grey = np.full((5, 7), 100 * i, np.uint8)
            Image.fromarray(grey).save(tmp_path / name / f"{i}.png")
        # What file managers leave: no picture, though its name ends like one.
        (tmp_path / name / "._0.png").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert read_images(DataConfig(source="images", path=tmp_path, channels=1)).train.x.shape == (4, 1, 5, 7)
    taken = unlabelled(tmp_path, (1, 3, 3))
    assert taken.size == 4 and taken.x(np.arange(4)).unique().tolist() == [0.0, np.float32(100 / 255)]
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "deep.tiff")
    (tmp_path / "deep.tiff").rename(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png is no image that can be read: .*8 or 16 bits"):
        unlabelled(tmp_path, (1, 3, 3))
