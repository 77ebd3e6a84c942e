"""Sound as log-mel features, and the Free Spoken Digit Dataset: six speakers, who are natural clients."""

from __future__ import annotations

import itertools
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedkd.data.config import DataConfig
from fedkd.data.files import required
from fedkd.data.records import Part, Records, encode_clients
from fedkd.errors import DataError

RATE = 8000
BANDS = 32
FRAMES = 32
HOP = 160
"""Samples from one frame to the next: 20 ms at 8 kHz, so that 32 frames are 0.64 s."""
WINDOW = 256
# Of the logarithm below, over everyday speech recorded near full scale; fixed, so that no client's statistics are needed.
CENTRE, SCALE = -4.0, 4.0


def mel_filters(bands: int, window: int, rate: int) -> NDArray[np.float32]:
    """Return triangular filters [bands, window // 2 + 1] spaced evenly in mel, 2595 log10(1 + f / 700), from 0 to rate / 2.

    S. Davis, P. Mermelstein, "Comparison of Parametric Representations for Monosyllabic Word Recognition", IEEE TASSP 1980,
    with the mel formula of O'Shaughnessy 1987. Peaks are 1.
    """
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bands + 2) / 2595) - 1)
    bins = np.arange(window // 2 + 1) * rate / window
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
    filters: NDArray[np.float32] = np.clip(np.minimum(rising, falling), 0, None).astype(np.float32)
    return filters


def log_mel(sound: NDArray[np.int16], rate: int = RATE) -> NDArray[np.float32]:
    """Return log-mel features [1, BANDS, FRAMES] of a clip [n] of 16-bit samples.

    The clip is cut, or filled with silence, to FRAMES * HOP samples; frames are Hann windows of WINDOW samples; the natural
    logarithm of mel power + 1e-6 is shifted and scaled by fixed constants.

    Raises:
        DataError: the rate is another than 8 kHz.
    """
    if rate != RATE:
        raise DataError(f"a clip has {rate} samples a second, expected {RATE}: resample it")
    samples = np.zeros(FRAMES * HOP, np.float32)
    part = sound[: len(samples)]
    samples[: len(part)] = part.astype(np.float32) / 32768
    padded = np.pad(samples, (0, WINDOW - HOP))
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:FRAMES] * hann
    power = np.abs(np.fft.rfft(frames)) ** 2
    mel = mel_filters(BANDS, WINDOW, RATE) @ power.T
    features: NDArray[np.float32] = ((np.log(mel + 1e-6) - CENTRE) / SCALE)[None].astype(np.float32)
    return features


def read_fsdd(config: DataConfig) -> Records:
    """Spoken digits 0 to 9 as log-mel features float32 [N, 1, 32, 32], with speakers as natural clients.

    Z. Jackson et al., Free Spoken Digit Dataset, https://github.com/Jakobovski/free-spoken-digit-dataset (CC BY-SA 4.0).
    The folder (or its ``recordings``) holds DIGIT_SPEAKER_TAKE.wav files, or one ``fsdd_8khz.npz`` with ``pcm`` (all clips
    joined), ``offsets``, ``labels``, ``speaker`` and ``speaker_names``.
    """
    folder = required(config.path, "fsdd")
    packed = folder / "fsdd_8khz.npz"
    clips, labels, speakers = _packed(packed) if packed.is_file() else _waves(folder)
    if not clips:
        raise DataError(f"source `fsdd` needs .wav files or fsdd_8khz.npz in {folder}: set data.path or FEDKD_DATA")
    x = np.stack([log_mel(clip) for clip in clips])
    natural, names = encode_clients(np.array(speakers), str(folder))
    return Records("fsdd", Part(x, np.array(labels, np.int64), natural), 10, None, tuple("0123456789"), names)


def _packed(path: Path) -> tuple[list[NDArray[np.int16]], list[int], list[str]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            pcm, offsets = file["pcm"].astype(np.int16), file["offsets"]
            labels, names = file["labels"], file["speaker_names"][file["speaker"]]
    except (OSError, ValueError, KeyError, IndexError) as cause:
        raise DataError(f"{path} cannot be read as spoken digits: {cause}") from cause
    clips = [pcm[a:b] for a, b in itertools.pairwise(offsets)]
    if len(clips) != len(labels):
        raise DataError(f"{path} holds {len(clips)} clips, but {len(labels)} labels")
    return clips, [int(v) for v in labels], [str(n) for n in names]


def _waves(folder: Path) -> tuple[list[NDArray[np.int16]], list[int], list[str]]:
    clips, labels, speakers = [], [], []
    for path in sorted(folder.rglob("*.wav")):
        digit, _, rest = path.stem.partition("_")
        speaker, _, take = rest.rpartition("_")
        if not (digit.isdigit() and len(digit) == 1 and speaker and take.isdigit()):
            raise DataError(f"{path} is not named DIGIT_SPEAKER_TAKE.wav")
        try:
            with wave.open(str(path), "rb") as file:
                if file.getframerate() != RATE or file.getnchannels() != 1 or file.getsampwidth() != 2:
                    raise DataError(f"{path} must be mono, 16 bit, {RATE} samples a second")
                clips.append(np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.int16))
        except (OSError, wave.Error, EOFError) as cause:
            raise DataError(f"{path} cannot be read as a .wav file: {cause}") from cause
        labels.append(int(digit))
        speakers.append(speaker)
    return clips, labels, speakers
