"""Sound as data: the synthesiser's notes, WAV files of every width, and what is wrong with bad ones."""

import struct
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import assert_close
from tinydiff import Rng
from tinydiff.data import audio
from tinydiff.data.idx import DataError

PROPERTY = settings(deadline=None, derandomize=True)

# ------------------------------------------------------------------------------- pitches


def test_frequencies_of_the_equal_tempered_scale():
    assert audio.frequency("A4") == 440 and audio.frequency("A3") == 220
    assert audio.frequency("C4") == pytest.approx(261.6256, abs=1e-4)  # as the tables have it
    assert audio.frequency("F#2") == pytest.approx(92.4986, abs=1e-4)
    assert audio.frequency("C-1") == pytest.approx(8.1758, abs=1e-4)


def test_names_of_a_scale():
    assert audio.note_names("A3", 5) == ("A3", "A#3", "B3", "C4", "C#4")
    assert len(audio.SCALE) == 12 and audio.SCALE[0] == "C4" and audio.SCALE[-1] == "B4"
    ratios = np.diff(np.log2([audio.frequency(name) for name in audio.SCALE]))
    assert np.allclose(ratios, 1 / 12)


@pytest.mark.parametrize("name", ["H4", "A", "a4", "E#4", "B#3", "A44", "", "Cb4"])
def test_what_is_no_note(name):
    assert not audio.is_note(name)
    with pytest.raises(ValueError, match=f"A4 or C#3.*got {name!r}"):
        audio.frequency(name)


# ------------------------------------------------------------------------------- the synthesiser


def test_notes_sound_at_their_frequency():
    """The spectrum of each note, by a sum over samples, is strong at its frequency or a harmonic and weak between."""
    clips = audio.notes(3, 2000, Rng(1), names=("C3", "A3", "B4"))
    assert clips.waves.shape == (9, 2000) and clips.waves.dtype == np.float32 and clips.rate == 8000
    assert clips.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and clips.class_names == ("C3", "A3", "B4")
    tau = np.arange(2000) / 8000
    window = np.hanning(2000)
    for samples, label in zip(clips.waves, clips.labels, strict=True):
        f = audio.frequency(clips.class_names[label])

        def strength(frequency, samples=samples):
            return abs((samples * window * np.exp(-2j * np.pi * frequency * tau)).sum())

        between = [strength(f * ratio) for ratio in (0.5, 1.5, 2.5)]
        assert max(strength(f), strength(2 * f), strength(3 * f)) > 8 * max(between)


def test_notes_are_as_loud_as_they_say_and_fade():
    clips = audio.notes(40, 4000, Rng(0), names=("A3",))
    assert np.allclose(np.abs(clips.waves).max(axis=1), 0.9, atol=1e-6)
    power = (clips.waves**2).mean(axis=0)
    assert power[:20].mean() < 0.3 * power[200:400].mean() and power[-400:].mean() < 0.5 * power[200:400].mean()
    assert len(np.unique(clips.waves[:, 100])) == 40  # none is played twice in one way


def test_equal_streams_play_equal_notes(device):
    first, again, other = (audio.notes(2, 300, Rng(seed)).waves for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert type(first) is np.ndarray
    twice = audio.notes(1, 300, Rng(3), names=("A4", "A4")).waves
    assert not np.array_equal(twice[0], twice[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"per_class": 0}, "at least 1, got 0 and 300"),
        ({"length": 0}, "at least 1, got 1 and 0"),
        ({"names": ("A4", "B7")}, r"B7 \(3951 Hz\) is too high for 6000"),
        ({"names": ("X",)}, "got 'X'"),
    ],
)
def test_notes_that_cannot_be_played(arguments, words):
    with pytest.raises(ValueError, match=words):
        audio.notes(**{"per_class": 1, "length": 300, "rng": Rng(0), "rate": 6000} | arguments)


# ------------------------------------------------------------------------------- WAV files


def riff(content, *, channels=1, rate=8000, bits=16, kind=1, claimed=None):
    """A WAV file, written from the format's description and not by a library."""
    block = channels * bits // 8
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, kind, channels, rate, rate * block, block, bits)
    data = struct.pack("<4sI", b"data", len(content) if claimed is None else claimed) + content
    return b"RIFF" + struct.pack("<I", 4 + len(head) + len(data)) + b"WAVE" + head + data


def encoded(values, bits):
    """Whole numbers as samples of so many bits."""
    if bits == 8:
        return bytes(v + 128 for v in values)
    return b"".join(int(v).to_bytes(bits // 8, "little", signed=True) for v in values)


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
def test_every_width(bits, tmp_path):
    full = 2 ** (bits - 1)
    values = [0, 1, -1, full - 1, -full, full // 2, -full // 4]
    (tmp_path / "a.wav").write_bytes(riff(encoded(values, bits), bits=bits, rate=11025))
    samples, rate = audio.read_wav(tmp_path / "a.wav")
    assert rate == 11025
    assert_close(samples, (np.array(values) / full).astype(np.float32), atol=1e-7)


def test_channels_are_averaged(tmp_path):
    left_right = [100, 300, -200, 200, 32767, 32767]
    (tmp_path / "a.wav").write_bytes(riff(encoded(left_right, 16), channels=2))
    assert_close(audio.read_wav(tmp_path / "a.wav")[0], np.array([200, 0, 32767], np.float32) / 32768, atol=1e-7)


@PROPERTY
@given(
    samples=st.lists(st.floats(-1.25, 1.25, width=32), min_size=1, max_size=50),
    rate=st.sampled_from([8000, 22050, 48000]),
)
def test_written_and_read_again(samples, rate, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round.wav"
    audio.write_wav(path, np.array(samples, np.float32), rate)
    again, its_rate = audio.read_wav(path)
    assert its_rate == rate
    assert_close(again, np.clip(np.array(samples, np.float32), -1, 1), atol=1.001 / 32768)
    with wave.open(str(path)) as file:
        assert file.getparams()[:4] == (1, 2, rate, len(samples))


@pytest.mark.parametrize(
    ("samples", "rate"),
    [(np.zeros((2, 3)), 8000), (np.zeros(3, int), 8000), (np.array([np.nan]), 8000), (np.zeros(3), 0)],
)
def test_what_cannot_be_written(samples, rate, tmp_path):
    with pytest.raises(ValueError, match=r"one wave \(L,\) of finite floats"):
        audio.write_wav(tmp_path / "a.wav", samples, rate)
    assert not list(tmp_path.iterdir())


BAD = {
    "missing": (None, "cannot read .*missing.wav: No such file"),
    "text": (b"not a sound", "not an uncompressed WAV"),
    "nothing": (b"", "not an uncompressed WAV.*ends too soon"),
    "cut": (riff(encoded([1, 2, 3, 4], 16))[:-3], "damaged or empty: expected 4 samples.*got 5 bytes"),
    "header": (riff(b"")[:20], "damaged"),
    "silence": (riff(b""), "expected 0 samples"),
    "floats": (riff(b"\0" * 8, bits=32, kind=3), "not an uncompressed WAV.*3"),
    "wide": (riff(b"\0" * 8, bits=64), "64 bits"),
    "rate": (riff(encoded([1], 16), rate=0), "at 0 a second"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(name, tmp_path):
    content, words = BAD[name]
    path = tmp_path / f"{name}.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        audio.read_wav(path)
    assert str(path) in str(error.value)


# ------------------------------------------------------------------------------- another rate


@pytest.mark.parametrize(("old", "new"), [(8000, 16000), (44100, 8000), (8000, 8000), (11025, 8000), (8000, 11025)])
def test_a_tone_is_the_same_tone_at_another_rate(old, new):
    """A second of tones that repeat in it, sampled at either rate."""
    then, now = (np.arange(rate) / rate for rate in (old, new))

    def tone(tau):
        return np.sin(2 * np.pi * 440 * tau + 0.3) + 0.5 * np.cos(2 * np.pi * 1234 * tau)

    assert_close(audio.resample(tone(then), old, new), tone(now), atol=1e-9)


def test_what_is_too_high_for_the_new_rate_is_taken_away():
    tau = np.arange(16000) / 16000
    low, high = np.sin(2 * np.pi * 500 * tau), np.sin(2 * np.pi * 5000 * tau)
    assert_close(audio.resample(low + high, 16000, 8000), low[::2], atol=1e-9)


@PROPERTY
@given(n=st.integers(2, 40), more=st.integers(0, 40))
def test_to_a_higher_rate_and_back(n, more):
    """Nothing is lost: a wave of n samples a second, at n + more and back."""
    x = np.random.default_rng(n).normal(size=n)
    there = audio.resample(x, n, n + more)
    assert there.shape == (n + more,)
    assert_close(audio.resample(there, n + more, n), x, atol=1e-9)


def test_the_highest_frequency_of_the_lower_rate():
    """+1, -1, ... at 4 samples a second is cos(4 pi tau), of 2 Hz."""
    assert_close(audio.resample(np.array([1.0, -1, 1, -1]), 4, 8), np.cos(np.pi / 2 * np.arange(8)), atol=1e-12)


def test_rates_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1 sample a second, got 0 and 8000"):
        audio.resample(np.zeros(4), 0, 8000)


# ------------------------------------------------------------------------------- a folder


def test_a_folder_is_cut_into_clips(tmp_path):
    for name, n, rate in (("b/two.wav", 25, 8000), ("a/one.WAV", 20, 16000), ("b/short.wav", 9, 8000)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        audio.write_wav(tmp_path / name, np.linspace(-0.5, 0.5, n), rate)
    (tmp_path / "b" / "notes.txt").write_text("not a sound")
    clips = audio.folder(tmp_path, 10)
    assert clips.waves.shape == (3, 10) and clips.waves.dtype == np.float32  # 20 samples at 16 kHz are 10
    assert clips.labels.tolist() == [0, 1, 1] and clips.class_names == ("a", "b") and clips.rate == 8000
    assert_close(clips.waves[1:].ravel(), np.linspace(-0.5, 0.5, 25)[:20].astype(np.float32), atol=1 / 32768)


def test_a_class_has_a_name_also_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "bells").mkdir()
    monkeypatch.chdir(tmp_path / "bells")
    audio.write_wav("a.wav", np.zeros(20), 8000)
    assert audio.folder(".", 10).class_names == ("bells",)


def test_folders_that_give_nothing(tmp_path):
    with pytest.raises(DataError, match="'nowhere' is not a folder"):
        audio.folder("nowhere", 10)
    with pytest.raises(DataError, match="no WAV file in"):
        audio.folder(tmp_path, 10)
    audio.write_wav(tmp_path / "short.wav", np.zeros(9), 8000)
    with pytest.raises(
        DataError, match=r"as long as a clip, 10 samples \(0.00 s at 8000 a second\); the longest has 9"
    ):
        audio.folder(tmp_path, 10)
    (tmp_path / "bad.wav").write_bytes(b"bad")
    with pytest.raises(DataError, match=r"bad.wav is damaged"):
        audio.folder(tmp_path, 5)
    with pytest.raises(ValueError, match="at least one sample, got a length of 0"):
        audio.folder(tmp_path, 0)
