"""The report of a distillation: what was reached, and a look at the synthetic inputs."""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedkd.errors import FedkdError
from fedkd.report.distill import png, strip
from fedkd.report.html import write_report


def pixels(data: bytes) -> NDArray[np.uint8]:
    """Read back a PNG of one chunk of pixels without filters, checking every checksum."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, chunks = 8, {}
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        assert struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind], place = body, place + 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    channels = {0: 1, 2: 3}[colour]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width * channels)
    assert depth == 8 and not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, channels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    summary: dict[str, Any] = {
        "kind": "distill", "name": "blind <b>", "seed": 1, "bounds": [0.0, 1.0], "queries": 1234, "seconds": 3.0,
        "accuracy": {"student": 0.9, "teacher": 0.95, "alone": None}, "agreement": 0.8,
        "accuracy_by_class": {"student": [0.9, None], "teacher": [1.0, 0.9]},
        "parameters": {"student": 10, "teacher": 20}, "method": {"name": "dfad"}, "versions": {"torch": "2"},
        "log": [{"epoch": 0, "rate": 0.1, "total": 2.0, "terms": {}}, {"epoch": 1, "rate": 0.1, "total": 1.0, "terms": {}}],
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "config.yaml").write_text("name: <script>\n")
    x = np.zeros((5, 1, 4, 3), np.float32)
    x[:, 0, 0, 0] = [0, 0.2, 0.4, 0.6, 1.0]
    logits = np.array([[1, 0], [1, 0], [0, 1], [1, 0], [1, 0]], np.float32)
    np.savez(tmp_path / "pool.npz", x=x, logits=logits)
    return tmp_path


def test_the_pool_is_shown_by_class(folder: Path) -> None:
    text = write_report(folder).read_text(encoding="utf-8")
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(text)
    assert tags.count("img") == 2 and "script" not in tags and "blind &lt;b&gt;" in text
    assert "default-src 'none'; img-src data:; style-src" in text and "http" not in text.replace(
        "http-equiv", ""
    ).replace("http://www.w3.org/2000/svg", "")
    first, second = (pixels(base64.b64decode(m)) for m in re.findall(r"base64,([^\"]+)\"", text))
    assert first.shape == (4, 4 * 4 - 1, 1) and second.shape == (4, 3, 1)
    assert first[0, ::4, 0].tolist() == [0, 51, 153, 255] and second[0, 0, 0] == 102
    assert (first[:, 3] == 255).all()  # between two inputs
    assert "80.0 %" in text and "1,234" in text and "No record was read" in text
    assert write_report(folder).read_text(encoding="utf-8") == text


def test_inputs_that_are_no_pictures_are_counted(folder: Path) -> None:
    np.savez(folder / "pool.npz", x=np.zeros((5, 13)), logits=np.zeros((5, 2)))
    text = write_report(folder).read_text(encoding="utf-8")
    assert "5 synthetic inputs of shape [13]" in text and "<img" not in text
    (folder / "pool.npz").write_bytes(b"no archive")
    with pytest.raises(FedkdError, match="cannot be read"):
        write_report(folder)
    (folder / "pool.npz").unlink()
    assert "Synthetic inputs" not in write_report(folder).read_text(encoding="utf-8")


def test_colours_are_kept() -> None:
    image = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    found = pixels(png(strip(image)))
    assert (found[:, :5] == image[0].transpose(1, 2, 0)).all() and (found[:, 6:] == image[1].transpose(1, 2, 0)).all()


def test_what_a_service_was_paid_and_says_is_told(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"paid": 4321, "told": "soft labels; epsilon infinity <x>"}
    (folder / "summary.json").write_text(json.dumps(summary))
    text = write_report(folder).read_text(encoding="utf-8")
    assert "4,321" in text and "What the service says of its answers: soft labels; epsilon infinity &lt;x&gt;." in text
