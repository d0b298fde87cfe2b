"""Waves as spectra: the short-time Fourier transform, mel spectrograms, the pitch of a note, pictures.

All of it is NumPy's, on the host: none of it is trained through. A wave is (..., L), `rate` samples a second.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinydiff.files import PathLike, atomic_file

FLOOR = 1e-5
"""The magnitude below which a spectrum counts as silence: −100 dB."""


def stft(waves: np.ndarray, window: int = 256, hop: int = 64) -> np.ndarray:
    """The short-time Fourier transform: the spectrum of a window of sound that moves on by `hop` samples.

        X[m, k] = Σ_n w[n] x[m hop + n] e^(−2πi k n/window),   w[n] = (1 − cos(2π n/window))/2

    waves: floats (..., L), mirrored at both ends so that frame m is centred on samples m hop .. (m + 1) hop.
    Returns complex (..., L/hop, window/2 + 1); entry k is k · rate/window Hz.
    Raises ValueError unless window is even, 1 <= hop <= window, hop divides L, and L >= window.
    """
    L = waves.shape[-1]
    if window % 2 or not 1 <= hop <= window or L % hop or L < window:
        raise ValueError(
            f"an STFT needs an even window, a hop of 1..window that divides the wave's length, and a wave as long as "
            f"the window; got window {window}, hop {hop}, length {L}"
        )
    before = (window - hop) // 2
    padded = np.pad(waves, [(0, 0)] * (waves.ndim - 1) + [(before, window - hop - before)], mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, window, axis=-1)[..., ::hop, :]
    hann = (1 - np.cos(2 * np.pi * np.arange(window) / window)) / 2
    return np.fft.rfft(frames * hann)


@dataclass(frozen=True)
class Mel:
    """How to make a mel spectrogram: a coarse picture of a sound, as fine as the ear hears at each pitch.

    Frequencies are weighed by `bands` triangles that lie evenly on the mel scale between `lowest` Hz and rate/2:

        mel(f) = 2595 log10(1 + f/700)

    rate: samples a second. window, hop: as in `stft`.
    Raises ValueError for sizes below 1, a hop or window that `stft` cannot take, or lowest outside 0..rate/2.
    """

    rate: int = 8000
    window: int = 256
    hop: int = 64
    bands: int = 32
    lowest: float = 60.0

    def __post_init__(self) -> None:
        if min(self.rate, self.bands, self.hop) < 1 or self.window % 2 or self.hop > self.window:
            raise ValueError(f"a mel spectrogram needs an even window, a hop of 1..window, and bands, got {self}")
        if not 0 <= self.lowest < self.rate / 2:
            raise ValueError(f"the lowest frequency must be in 0..{self.rate / 2}, got {self.lowest}")

    def filters(self) -> np.ndarray:
        """The triangles: (window/2 + 1, bands), each rising from the peak of the one below to 1, and falling again."""
        return _triangles(self)

    def __call__(self, waves: np.ndarray) -> np.ndarray:
        """log-mel spectrograms of waves (..., L): float32 (..., L/hop, bands), 0 for silence, about 1 for the loudest.

            (20 log10(max(filters · |X|/Σw, 1e-5)) + 100)/100, Σw the sum of the window: −100 dB to 0 dB

        Raises ValueError for a length that `stft` cannot take.
        """
        magnitude = np.abs(stft(waves, self.window, self.hop)) * (2 / self.window)
        return (np.log10(np.maximum(magnitude @ self.filters(), FLOOR)) / 5 + 1).astype(np.float32)


@functools.cache
def _triangles(mel: Mel) -> np.ndarray:
    to_mel, to_hertz = (lambda f: 2595 * np.log10(1 + f / 700)), (lambda m: 700 * (10 ** (m / 2595) - 1))
    corners = to_hertz(np.linspace(to_mel(mel.lowest), to_mel(mel.rate / 2), mel.bands + 2))
    f = np.arange(mel.window // 2 + 1)[:, None] * mel.rate / mel.window
    low, peak, high = corners[:-2], corners[1:-1], corners[2:]
    return np.maximum(0, np.minimum((f - low) / (peak - low), (high - f) / (high - peak)))


def pitch(waves: np.ndarray, rate: int, lowest: float = 80.0, highest: float = 1000.0) -> np.ndarray:
    """The fundamental frequency of each wave in Hz: 1/τ, τ the shortest time after which the wave looks like itself.

        r(τ) = 2 Σ x_n x_{n+τ} / Σ (x_n² + x_{n+τ}²),   in [−1, 1]

    The first peak of r at least 0.9 as high as the highest counts, so that no multiple of the period is taken for it.
    r is interpolated by its Fourier transform to quarters of a sample, and by a parabola at the peak.
    waves: floats (N, L); the frequencies looked for lie in lowest..highest. Returns float64 (N,), nan where there is no
    peak, as in silence.
    Raises ValueError unless 0 < lowest < highest <= rate/4 and a wave holds two periods of the lowest.
    (McLeod & Wyvill 2005, section 4)
    """
    L = waves.shape[1]
    shortest, longest = int(rate / highest), int(np.ceil(rate / lowest)) if lowest > 0 else L
    if not 0 < lowest < highest <= rate / 4 or 2 * longest > L:
        raise ValueError(
            f"a pitch is looked for with 0 < lowest < highest <= rate/4 in waves of two periods of the lowest or more; "
            f"got {lowest}..{highest} Hz, {rate} samples a second and waves of {L}"
        )
    x = waves.astype(np.float64)
    power = np.abs(np.fft.rfft(x, 2 * L)) ** 2
    correlation = (
        4 * np.fft.irfft(power, 8 * L)[:, : 4 * L]
    )  # at quarters of a sample: a sharp peak may lie between two
    energy = np.cumsum(np.pad(x**2, ((0, 0), (1, 0))), axis=1)  # of the first n samples
    lags = np.arange(4 * L) // 4
    both = energy[:, L - lags] + energy[:, -1:] - energy[:, lags]
    r = 2 * correlation / np.maximum(both, 1e-12)
    return 4 * rate / np.array([_first_peak(row, 4 * shortest, 4 * longest) for row in r])


def _first_peak(r: np.ndarray, shortest: int, longest: int) -> float:
    """The lag of the first high peak of r among shortest..longest, between samples; nan if there is none."""
    lags = np.arange(max(2, shortest - 1), longest + 1)
    peaks = lags[(r[lags] > r[lags - 1]) & (r[lags] >= r[lags + 1]) & (r[lags] > 0)]
    if not len(peaks):
        return np.nan
    first = peaks[r[peaks] >= 0.9 * r[peaks].max()][0]
    before, at, after = r[first - 1 : first + 2]
    return first + 0.5 * (before - after) / (before - 2 * at + after)


def nearest(hertz: np.ndarray, frequencies: Sequence[float]) -> np.ndarray:
    """Which of some frequencies each pitch is nearest to: int64 (N,), -1 where none is within half a semitone.

    hertz: (N,), nan for no pitch. frequencies: in Hz, such as those of a scale.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        semitones = np.abs(12 * np.log2(np.asarray(hertz)[:, None] / np.asarray(frequencies)))
    semitones = np.where(np.isfinite(semitones), semitones, np.inf)
    return np.where(semitones.min(axis=1) <= 0.5, semitones.argmin(axis=1), -1)


def pictures(path: PathLike, waves: Sequence[np.ndarray], titles: Sequence[str], rate: int, columns: int = 6) -> None:
    """Draw waves and, below each, its spectrogram, 80 dB from black to white, as one PNG.

    waves: floats (L,) in [-1, 1], of 256 samples or more, any number of them. titles: one for each. columns: in a row.
    Raises ValueError for no waves, another number of titles, or columns < 1; OSError where it cannot be written.
    """
    if not len(waves) or len(waves) != len(titles) or columns < 1:
        raise ValueError(
            f"expected waves, as many titles, and columns >= 1: got {len(waves)}, {len(titles)}, {columns}"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(waves))
    rows = -(-len(waves) // columns)
    figure = Figure(figsize=(2 * columns + 0.6, 2.5 * rows), dpi=110)
    FigureCanvasAgg(figure)
    outer = figure.add_gridspec(
        rows, columns, left=0.5 / (2 * columns + 0.6), right=0.99, bottom=0.18 / rows, top=1 - 0.1 / rows, wspace=0.06
    )
    for i, (samples, title) in enumerate(zip(waves, titles, strict=True)):
        axes: Any = outer[i].subgridspec(2, 1, height_ratios=(1, 2), hspace=0.02).subplots()
        above, below = axes
        draw_wave(above, samples, rate)
        draw_spectrogram(below, samples, rate)
        above.set_title(title, fontsize=9, pad=3)
        if i % columns:
            below.set(yticks=[], ylabel="")
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


def draw_wave(axes: Any, samples: np.ndarray, rate: int) -> None:
    """Draw a wave (L,) in [-1, 1] into matplotlib axes, without numbers."""
    axes.plot(np.arange(len(samples)) / rate, samples, linewidth=0.4, color="tab:blue")
    axes.set(xlim=(0, len(samples) / rate), ylim=(-1, 1), xticks=[], yticks=[])


def draw_spectrogram(axes: Any, samples: np.ndarray, rate: int) -> None:
    """Draw the spectrogram of a wave (L,) into matplotlib axes, over ms and kHz, from 0 dB (a full wave) to -80."""
    whole = samples[: len(samples) // 32 * 32]
    decibels = 20 * np.log10(np.maximum(np.abs(stft(whole, 256, 32)) / 64, FLOOR))
    extent = (0, 1000 * len(whole) / rate, 0, rate / 2000)
    axes.imshow(decibels.T, origin="lower", aspect="auto", extent=extent, vmin=-80, vmax=0, cmap="magma")
    axes.tick_params(labelsize=7)
    axes.set_xticks([0, round(500 * len(whole) / rate)], ["0", f"{round(500 * len(whole) / rate)} ms"])
    axes.set_ylabel("kHz", fontsize=7, labelpad=1)
