"""Sound as data: notes that the package plays itself, WAV files, and folders of them.

notes(...)            single notes of a little synthesiser, each labelled with its pitch
folder(path, ...)     the WAV files of a folder, cut into clips of one length
read_wav, write_wav   one file

A wave is a float array in [-1, 1], its samples `rate` a second. spectrum.py looks at waves as spectra.
"""

from __future__ import annotations

import pathlib
import re
import wave
from dataclasses import dataclass

import numpy as np

from tinydiff.data.idx import DataError
from tinydiff.files import PathLike, atomic_file
from tinydiff.rng import Rng

NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
TIMBRES = {
    "flute": (1.0, 0.35, 0.12, 0.05, 0.0, 0.0, 0.0, 0.0),
    "clarinet": (1.0, 0.04, 0.6, 0.05, 0.35, 0.05, 0.2, 0.02),
    "strings": (1.0, 0.6, 0.45, 0.35, 0.28, 0.22, 0.18, 0.15),
    "organ": (1.0, 0.8, 0.1, 0.5, 0.05, 0.05, 0.05, 0.3),
}
"""How loud the harmonics of each instrument are: the fundamental, then twice its frequency, three times, ..."""


@dataclass(frozen=True, eq=False)
class Clips:
    """Waves of one length and what is heard in each.

    waves: float32 (N, L) in [-1, 1]. labels: int64 (N,), each an index of class_names. rate: samples a second.
    """

    waves: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    rate: int

    def __len__(self) -> int:
        return len(self.labels)


# ------------------------------------------------------------------------------------------- pitches


def note_names(first: str, count: int) -> tuple[str, ...]:
    """So many notes of the equal-tempered scale from the first one up: "C3", "C#3", "D3", ..."""
    start = _number(first)
    return tuple(f"{NAMES[n % 12]}{n // 12 - 1}" for n in range(start, start + count))


def frequency(note: str) -> float:
    """The pitch of a note in Hz: 440 · 2^((n − 69)/12), n its MIDI number; "A4" is 440. ValueError for another name."""
    return 440.0 * 2 ** ((_number(note) - 69) / 12)


def is_note(name: str) -> bool:
    """Whether a name is that of a note, such as "A4" or "C#3"."""
    return re.fullmatch(r"[ACDFG]#?-?\d|[BE]-?\d", name) is not None


def _number(note: str) -> int:
    """The MIDI number of a note: 60 for "C4"."""
    if not is_note(note):
        raise ValueError(f"a note is a name such as A4 or C#3 (one of {' '.join(NAMES)}, and an octave), got {note!r}")
    name = note.rstrip("-0123456789")
    return NAMES.index(name) + 12 * (int(note.removeprefix(name)) + 1)


SCALE = note_names("C4", 12)
"""The octave from C4, 262 Hz, to B4, 494 Hz."""


# ------------------------------------------------------------------------------------- the synthesiser


def notes(per_class: int, length: int, rng: Rng, *, rate: int = 8000, names: tuple[str, ...] = SCALE) -> Clips:
    """Play every note `per_class` times, each time on another instrument, in another way.

        wave(τ) = envelope(τ) Σ_h a_h sin(h φ(τ) + θ_h) + noise,   φ' = 2π f 2^(vibrato(τ)/1200)

    f: the note's frequency, out of tune by a few cents (σ = 5). a_h: a mix of two of TIMBRES; harmonics near rate/2 and
    above are left out. The envelope rises within 5–30 ms and falls to 1/e in 0.1–0.6 s; the vibrato is of up to 20
    cents at 4–7 Hz; the noise lies 50 dB below. The loudest sample of each wave is 0.9. Equal rng, equal waves.
    length: L, in samples. Returns the waves note by note, per_class of each.
    Raises ValueError for per_class or length below 1, and for a note of rate/2 Hz or more.
    """
    if per_class < 1 or length < 1:
        raise ValueError(f"notes need per_class and length of at least 1, got {per_class} and {length}")
    if high := [name for name in names if frequency(name) >= rate / 2]:
        raise ValueError(f"{high[0]} ({frequency(high[0]):.0f} Hz) is too high for {rate} samples a second")
    host = Rng(rng.seed, "cpu", path=rng.path)
    waves = [_play(frequency(name), per_class, length, rate, host.at(i)) for i, name in enumerate(names)]
    return Clips(np.concatenate(waves), np.repeat(np.arange(len(names)), per_class), tuple(names), rate)


def _play(f: float, n: int, length: int, rate: int, rng: Rng) -> np.ndarray:
    """n ways to play a note of f Hz: float32 (n, length)."""

    def between(low: float, high: float, stream: int) -> np.ndarray:
        return low + (high - low) * rng.at(stream).uniform((n, 1), np.float64)

    tau = np.arange(length) / rate  # seconds
    attack, decay = between(0.005, 0.03, 0), between(0.1, 0.6, 1)
    vibrato = between(0, 20, 2) * np.sin(2 * np.pi * (between(4, 7, 3) * tau + between(0, 1, 4)))  # cents
    detuned = f * 2 ** (5 * rng.at(5).normal((n, 1), np.float64) / 1200)
    phi = 2 * np.pi / rate * np.cumsum(detuned * 2 ** (vibrato / 1200), axis=1)

    table = np.array(list(TIMBRES.values()))
    blend, pair = between(0, 1, 6), table[rng.at(7).integers(0, len(table), (n, 2))]  # (n, 2, harmonics)
    loudness = blend * pair[:, 0] + (1 - blend) * pair[:, 1]
    theta = 2 * np.pi * rng.at(8).uniform(loudness.shape, np.float64)
    sound = np.zeros((n, length))
    for h in range(1, table.shape[1] + 1):
        if 1.05 * h * f < rate / 2:
            sound += loudness[:, h - 1, None] * np.sin(h * phi + theta[:, h - 1, None])

    sound *= (1 - np.exp(-tau / attack)) * np.exp(-tau / decay)
    sound = _loud(sound) + 10 ** (-50 / 20) * rng.at(9).normal((n, length), np.float64)
    return (0.9 * _loud(sound)).astype(np.float32)


def _loud(waves: np.ndarray) -> np.ndarray:
    """Waves (n, L) scaled so that the loudest sample of each is 1."""
    return waves / np.maximum(np.abs(waves).max(axis=1, keepdims=True), 1e-9)


# --------------------------------------------------------------------------------------------- WAV files


def read_wav(path: PathLike, rate: int | None = None) -> tuple[np.ndarray, int]:
    """The wave in a WAV file, its channels averaged into one, and its rate in samples a second.

    path: a file of 8, 16, 24 or 32 bits a sample, uncompressed (PCM). rate: the rate to have it in, by `resample`,
    or None to leave it. Returns float32 (L,) in [-1, 1].
    Raises DataError, naming the file, where it is missing, damaged, cut short, empty or of another kind.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, own_rate, frames = file.getparams()[:4]
            content = file.readframes(frames)
    except (wave.Error, EOFError) as error:
        why = str(error) or "it ends too soon"
        raise DataError(f"{path} is damaged, or not an uncompressed WAV file: {why}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if width not in (1, 2, 3, 4):
        raise DataError(f"{path} has {8 * width} bits a sample; expected 8, 16, 24 or 32")
    if len(content) != frames * channels * width or not frames or own_rate < 1:
        raise DataError(
            f"{path} is damaged or empty: expected {frames} samples of {channels} x {width} bytes at {own_rate} a "
            f"second, got {len(content)} bytes"
        )
    mono = _samples(content, width).reshape(frames, channels).mean(axis=1)
    if rate is None:
        return mono.astype(np.float32), own_rate
    return resample(mono, own_rate, rate).clip(-1, 1).astype(np.float32), rate


def _samples(content: bytes, width: int) -> np.ndarray:
    """Samples of so many bytes as float64 in [-1, 1]: unsigned at 8 bits, else signed, lowest byte first."""
    if width == 1:
        return np.frombuffer(content, np.uint8) / 128.0 - 1
    raw = np.frombuffer(content, np.uint8).reshape(-1, width)
    wide = np.zeros((len(raw), 4), np.uint8)
    wide[:, 4 - width :] = raw  # the highest bytes of 32 bits, so that the sign stands where it should
    return wide.view("<i4")[:, 0] / 2.0**31


def write_wav(path: PathLike, samples: np.ndarray, rate: int) -> None:
    """Write one wave as 16-bit PCM: s = round(32768 x), limited to what 16 bits hold.

    samples: floats (L,). Raises ValueError for another shape, values that are not finite, or a rate below 1; OSError
    where the file cannot be written.
    """
    samples = np.asarray(samples)
    if samples.ndim != 1 or samples.dtype.kind != "f" or not np.isfinite(samples).all() or rate < 1:
        raise ValueError(
            f"a WAV file expects one wave (L,) of finite floats and a rate >= 1, got {samples.dtype} of shape "
            f"{samples.shape} and a rate of {rate}"
        )
    with atomic_file(path) as target, wave.open(target, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", "not compressed"))
        file.writeframes(np.rint(samples.astype(np.float64) * 32768).clip(-32768, 32767).astype("<i2").tobytes())


def resample(samples: np.ndarray, old: int, new: int) -> np.ndarray:
    """A wave (L,) of `old` samples a second as one of `new`: (round(L new/old),).

    Its spectrum is cut off at the lower of the two rates' halves, or lengthened with zeros: exact for a wave that
    repeats and has nothing above. Raises ValueError for rates below 1.
    """
    if old < 1 or new < 1:
        raise ValueError(f"a rate is at least 1 sample a second, got {old} and {new}")
    if old == new:
        return samples
    n, m = len(samples), max(1, round(len(samples) * new / old))
    spectrum = np.fft.rfft(samples)[: min(n, m) // 2 + 1]
    if min(n, m) % 2 == 0 and n != m:  # half the shorter one's rate: one entry there, in the longer two, of +f and -f
        spectrum[-1] = spectrum[-1].real * (0.5 if m > n else 2)
    return np.fft.irfft(spectrum * (m / n), m)


def folder(path: PathLike, length: int, rate: int = 8000) -> Clips:
    """The WAV files in a folder and its sub-folders as clips of one length, in the order of their names.

    Each file gives as many clips as fit in it, one after the other; what is left over is dropped, and so are files
    shorter than one clip. The label is the folder that a file lies in. length: L, in samples of `rate` a second, to
    which files of other rates are converted.
    Raises ValueError for a length below 1; DataError for a missing folder, no WAV files, only short ones, or a damaged
    one.
    """
    if length < 1:
        raise ValueError(f"a clip has at least one sample, got a length of {length}")
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"{str(path)!r} is not a folder")
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() == ".wav" and file.is_file())
    if not files:
        raise DataError(f"there is no WAV file in {root}")
    waves = [read_wav(file, rate)[0] for file in files]
    clips = [w[: len(w) // length * length].reshape(-1, length) for w in waves]
    if not sum(map(len, clips)):
        longest = max(len(w) for w in waves)
        raise DataError(
            f"no WAV file in {root} is as long as a clip, {length} samples ({length / rate:.2f} s at {rate} a second); "
            f"the longest has {longest}"
        )
    parents = [file.absolute().parent.name for file, some in zip(files, clips, strict=True) for _ in some]
    names = tuple(sorted(set(parents)))
    return Clips(np.concatenate(clips), np.array([names.index(p) for p in parents]), names, rate)
