"""Spectra against a discrete Fourier transform written as a sum, the mel scale against its definition, and pitches."""

import math

import numpy as np
import pytest
from PIL import Image

from tests.helpers import assert_close
from tinydiff import Rng
from tinydiff.data import audio, spectrum
from tinydiff.data.spectrum import Mel


def naive_stft(x, window, hop):
    """Each frame, sample by sample and frequency by frequency; the ends mirrored, the end samples not repeated."""
    before = (window - hop) // 2
    L = len(x)

    def at(i):
        return x[-i] if i < 0 else x[2 * (L - 1) - i] if i >= L else x[i]

    frames = []
    for m in range(L // hop):
        samples = [
            at(m * hop - before + n) * math.sin(math.pi * n / window) ** 2
            for n in range(window)  # Hann's window
        ]
        frames.append(
            [sum(s * np.exp(-2j * math.pi * k * n / window) for n, s in enumerate(samples))
             for k in range(window // 2 + 1)]
        )  # fmt: skip
    return np.array(frames)


@pytest.mark.parametrize(("window", "hop", "length"), [(8, 2, 12), (8, 8, 16), (16, 4, 16), (8, 3, 9), (2, 1, 3)])
def test_stft_is_the_sum_it_says(window, hop, length):
    x = np.random.default_rng(0).normal(size=(2, length))
    X = spectrum.stft(x, window, hop)
    assert X.shape == (2, length // hop, window // 2 + 1)
    for row, wave in zip(X, x, strict=True):
        assert np.abs(row - naive_stft(wave, window, hop)).max() < 1e-12


def test_a_tone_stands_at_its_frequency():
    """1 kHz at 8 kHz is entry 32 of 256; a wave a sin has the magnitude a Σw/2 there."""
    x = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(2048) / 8000)
    magnitude = np.abs(spectrum.stft(x))[4:-4]
    assert (magnitude.argmax(axis=-1) == 32).all()
    assert np.allclose(magnitude[:, 32], 0.5 * 128 / 2)


@pytest.mark.parametrize(("window", "hop", "length"), [(7, 1, 14), (8, 0, 16), (8, 9, 18), (8, 3, 16), (32, 4, 16)])
def test_waves_that_do_not_fit(window, hop, length):
    with pytest.raises(ValueError, match=f"got window {window}, hop {hop}, length {length}"):
        spectrum.stft(np.zeros(length), window, hop)


# ------------------------------------------------------------------------------- mel spectrograms


@pytest.mark.parametrize("mel", [Mel(), Mel(rate=16000, window=512, bands=40, lowest=0.0), Mel(window=512, bands=20)])
def test_filters_are_triangles_on_the_mel_scale(mel):
    """Each filter at each frequency, by the lines of its triangle."""

    def to_mel(f):
        return 2595 * math.log10(1 + f / 700)

    low, high = to_mel(mel.lowest), to_mel(mel.rate / 2)
    corners = [700 * (10 ** ((low + (high - low) * i / (mel.bands + 1)) / 2595) - 1) for i in range(mel.bands + 2)]
    filters = mel.filters()
    assert filters.shape == (mel.window // 2 + 1, mel.bands)
    for k in range(0, mel.window // 2 + 1, 7):
        f = k * mel.rate / mel.window
        for band in range(mel.bands):
            left, peak, right = corners[band : band + 3]
            expected = 0.0
            if left < f <= peak:
                expected = (f - left) / (peak - left)
            elif peak < f < right:
                expected = (right - f) / (right - peak)
            assert abs(filters[k, band] - expected) < 1e-9


def test_a_tone_is_in_its_band_and_silence_is_nothing():
    mel = Mel()
    x = np.sin(2 * np.pi * 1000 * np.arange(2048) / 8000)
    spectrogram = mel(x)
    assert spectrogram.shape == (32, 32) and spectrogram.dtype == np.float32
    band = int(mel.filters()[32].argmax())
    assert (spectrogram[4:-4].argmax(axis=-1) == band).all()
    assert 0.9 < spectrogram[10, band] < 1.1  # a full wave is at about 0 dB
    assert np.allclose(mel(x)[5] - mel(x / 10)[5], np.where(mel(x / 10)[5] > 0, 0.2, mel(x)[5]), atol=1e-3)  # 20 dB
    assert not mel(np.zeros((3, 512))).any() and mel(np.zeros((3, 512))).shape == (3, 8, 32)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"window": 255}, "even window"),
        ({"hop": 300}, "even window"),
        ({"bands": 0}, "bands=0"),
        ({"rate": 0}, "rate=0"),
        ({"lowest": 4000.0}, r"0\.\.4000.0, got 4000"),
        ({"lowest": -1.0}, "got -1"),
    ],
)
def test_bad_mel_settings(wrong, words):
    with pytest.raises(ValueError, match=words):
        Mel(**wrong)


# ------------------------------------------------------------------------------- pitch


@pytest.mark.parametrize("f", [82.5, 131.0, 261.63, 440.0, 987.0])
def test_the_pitch_of_a_wave_with_and_without_its_fundamental(f):
    tau = np.arange(2048) / 8000
    whole = sum(np.sin(2 * np.pi * h * f * tau + h) / h for h in (1, 2, 3))
    without = sum(np.sin(2 * np.pi * h * f * tau + h) for h in (2, 3))
    cents = 1200 * np.log2(spectrum.pitch(np.stack([whole, without]), 8000) / f)
    assert np.abs(cents).max() < 10


def test_played_notes_are_recognised():
    """The estimator's share on the synthesiser's notes: the ruler that samples are measured with."""
    clips = audio.notes(25, 2048, Rng(7), names=audio.note_names("C3", 24))
    frequencies = [audio.frequency(name) for name in clips.class_names]
    heard = spectrum.nearest(spectrum.pitch(clips.waves, clips.rate), frequencies)
    assert (heard == clips.labels).mean() >= 0.99


@pytest.mark.parametrize("period", [20.5, 21.62, 22.0, 30.5])
def test_a_period_between_two_samples_is_not_taken_for_two_periods(period):
    """A sharp peak of r that falls between two samples must not look lower than the next, which falls on one."""
    tau = np.arange(2048)
    wave = sum(np.cos(2 * np.pi * h * tau / period) for h in range(1, 9))
    noise = np.random.default_rng(0).normal(size=(20, 2048))
    cents = 1200 * np.log2(spectrum.pitch(wave + 2 * noise, 8000) * period / 8000)
    assert np.abs(cents).max() < 30


def test_noise_and_silence_are_no_notes():
    noise = np.random.default_rng(0).normal(size=(200, 2048))
    frequencies = [audio.frequency(name) for name in audio.SCALE]
    heard = spectrum.nearest(spectrum.pitch(noise, 8000), frequencies)
    for label in range(12):
        assert (heard == label).mean() < 0.15
    assert np.isnan(spectrum.pitch(np.zeros((2, 2048)), 8000)).all()


@pytest.mark.parametrize("limits", [(0.0, 500.0), (500.0, 400.0), (80.0, 2001.0), (7.0, 500.0)])
def test_pitches_that_cannot_be_looked_for(limits):
    with pytest.raises(ValueError, match=f"got {limits[0]}..{limits[1]} Hz, 8000 samples a second and waves of 2048"):
        spectrum.pitch(np.zeros((1, 2048)), 8000, *limits)


def test_the_nearest_note():
    semitone = 2 ** (1 / 12)
    hertz = np.array([440, 440 * semitone**0.49, 440 * semitone**0.51, 440 * semitone**-0.55, np.nan, np.inf])
    assert spectrum.nearest(hertz, [440.0, 440 * semitone]).tolist() == [0, 0, 1, -1, -1, -1]


# ------------------------------------------------------------------------------- pictures


def test_pictures(tmp_path):
    clips = audio.notes(1, 2000, Rng(0), names=audio.note_names("A3", 5))  # a length that no hop divides
    spectrum.pictures(tmp_path / "a.png", list(clips.waves), clips.class_names, 8000, columns=3)
    spectrum.pictures(tmp_path / "b.png", [clips.waves[0]], ["one"], 8000)
    for name in ("a.png", "b.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("L"))
        assert min(pixels.shape) > 100 and pixels.std() > 20 and len(np.unique(pixels)) > 50


@pytest.mark.parametrize(
    ("waves", "titles", "columns"), [([], [], 6), ([np.zeros(512)], [], 6), ([np.zeros(512)], ["a"], 0)]
)
def test_pictures_of_nothing(waves, titles, columns, tmp_path):
    with pytest.raises(ValueError, match="as many titles, and columns >= 1"):
        spectrum.pictures(tmp_path / "a.png", waves, titles, 8000, columns)


def test_waves_are_left_alone():
    x = audio.notes(1, 512, Rng(0), names=("A4",)).waves
    before = x.copy()
    spectrum.pitch(x, 8000, 100.0)
    Mel()(x)
    assert_close(x, before)
