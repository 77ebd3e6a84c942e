"""Sound: the mel scale, features of known tones, and spoken digits from files."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from fedkd.data import DataConfig, load
from fedkd.data.audio import BANDS, RATE, WINDOW, log_mel, mel_filters
from fedkd.errors import DataError


def tone(hertz: float, seconds: float = 0.5) -> np.ndarray:
    t = np.arange(int(RATE * seconds)) / RATE
    return (20000 * np.sin(2 * np.pi * hertz * t)).astype(np.int16)


def test_filters_are_triangles_on_the_mel_scale() -> None:
    filters = mel_filters(BANDS, WINDOW, RATE)
    assert filters.shape == (BANDS, WINDOW // 2 + 1) and filters.min() == 0 and filters.max() <= 1
    peaks = filters[8:].argmax(1) * RATE / WINDOW  # the lowest filters are narrower than a bin
    mel = 2595 * np.log10(1 + peaks / 700)
    assert np.all(np.diff(peaks) > 0) and np.abs(np.diff(mel) - np.diff(mel).mean()).max() < 45


def test_a_tone_sounds_in_its_band() -> None:
    for hertz in (500.0, 1500.0, 3000.0):
        features = log_mel(tone(hertz))
        assert features.shape == (1, 32, 32) and features.dtype == np.float32
        band = int(features[0, :, 10].argmax())
        wanted = 2595 * np.log10(1 + hertz / 700) / (2595 * np.log10(1 + RATE / 2 / 700)) * (BANDS + 1) - 1
        assert abs(band - wanted) <= 1
        assert features[0, :, 30].max() < features[0, band, 10] - 2, "after the clip there is silence"
    with pytest.raises(DataError, match="resample"):
        log_mel(tone(500), 16000)


def test_spoken_digits_are_read_from_both_forms(tmp_path: Path) -> None:
    clips = {(d, s, t): tone(300 + 100 * d + 7 * t) for d in range(10) for s in ("ann", "bo") for t in range(2)}
    (tmp_path / "a").mkdir()
    for (digit, speaker, take), clip in clips.items():
        with wave.open(str(tmp_path / "a" / f"{digit}_{speaker}_{take}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes(clip.tobytes())
    (tmp_path / "b").mkdir()
    order = sorted(clips)
    lengths = [len(clips[k]) for k in order]
    np.savez(
        tmp_path / "b" / "fsdd_8khz.npz", pcm=np.concatenate([clips[k] for k in order]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]), labels=np.array([k[0] for k in order], np.uint8),
        speaker=np.array([("ann", "bo").index(k[1]) for k in order], np.uint8), speaker_names=np.array(["ann", "bo"]),
    )  # fmt: skip
    splits = [load(DataConfig(source="fsdd", path=tmp_path / form), 1) for form in ("a", "b")]
    for split in splits:
        assert split.train.client_names == ("ann", "bo") and split.train.shape == (1, 32, 32)
        assert len(split.train) + len(split.test) == 40 and split.train.natural is not None
    assert np.array_equal(np.sort(splits[0].train.x, 0), np.sort(splits[1].train.x, 0))
    (tmp_path / "a" / "x.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError, match="DIGIT_SPEAKER_TAKE"):
        load(DataConfig(source="fsdd", path=tmp_path / "a"), 1)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="fsdd_8khz"):
        load(DataConfig(source="fsdd", path=tmp_path / "none"), 1)
