"""The examples of DiffWave as a person runs them: trained on notes and on a folder, resumed, sampled, misused."""

import runpy
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.test_examples import ENVIRONMENT, ROOT, assert_picture, call
from tinydiff import Rng, checkpoint
from tinydiff.data import audio

TRAIN, SAMPLE = ROOT / "examples" / "train_diffwave.py", ROOT / "examples" / "sample_audio.py"
TOY = [
    *("--steps", 3, "--batch-size", 4, "--length", 512, "--channels", 4, "--layers", 2, "--cycle", 2, "--timesteps", 6),
    *("--sample-every", 0, "--per-class", 1),
]  # fmt: skip


def trained(folder, *arguments):
    """Train a toy in a process of its own, and give what it printed."""
    line = [sys.executable, TRAIN, *TOY, *arguments]
    done = subprocess.run([*map(str, line)], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A folder with the run of a model that is told the note, and what was printed."""
    folder = tmp_path_factory.mktemp("labelled")
    return folder, trained(folder)


@pytest.fixture(scope="module")
def vocoder(tmp_path_factory):
    """A folder with WAV files in data/ and the run of a vocoder in v/, and what was printed."""
    folder = tmp_path_factory.mktemp("v")
    clips = audio.notes(1, 1500, Rng(0), names=audio.note_names("A3", 4))
    for name, samples in zip(clips.class_names, clips.waves, strict=True):
        audio.write_wav(folder / "data" / name / "note.wav", samples, 8000)
    return folder, trained(folder, "--data", "data", "--condition", "mel", "--out", "v")


@pytest.fixture
def copied(labelled, vocoder, tmp_path, monkeypatch):
    """A folder to work in, with copies of both runs."""
    monkeypatch.chdir(tmp_path)
    for folder, _ in (labelled, vocoder):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_run_and_its_resumption(labelled, copied, monkeypatch, capsys):
    run = copied / "runs" / "diffwave"
    assert "12 clips of 0.06 s, 12 classes" in labelled[1]
    for name in ("samples_000000.png", "samples_000003.png", "samples.png", "loss.png"):
        assert_picture(run / name)
    assert len(list((run / "samples").glob("*.wav"))) == 12
    samples, rate = audio.read_wav(run / "samples" / "00.wav")
    assert samples.shape == (512,) and rate == 8000 and samples.std() > 0
    saved = (run / checkpoint.NAME).read_bytes()
    code, again, _ = call(monkeypatch, capsys, TRAIN, "--resume")
    assert code == 0 and "after step 3" in again and (run / checkpoint.NAME).read_bytes() == saved


def test_notes_are_drawn_as_the_printed_command_says(labelled, copied, monkeypatch, capsys):
    line, run = shlex.split(labelled[1].strip().splitlines()[-1]), copied / "runs" / "diffwave"
    assert line[1].endswith("sample_audio.py") and line[2:] == ["runs/diffwave", "--note", "B4"]
    code, out, err = call(monkeypatch, capsys, SAMPLE, *line[2:], "--n", 3)
    assert code == 0 and "of 3 have the pitch" in out, err
    assert sorted(p.name for p in (run / "sounds").iterdir()) == ["00-B4.wav", "01-B4.wav", "02-B4.wav", "sounds.png"]
    assert_picture(run / "sounds" / "sounds.png")

    def drawn(*arguments):
        code, _, err = call(monkeypatch, capsys, SAMPLE, run, "--n", 1, "--out", copied / "o", *arguments)
        assert code == 0, err
        return audio.read_wav(copied / "o" / "00-C4.wav")[0].tolist()

    usual = drawn()
    assert drawn("--note", "C4") == usual
    for other in (("--seed", 1), ("--sampler", "ddpm"), ("--steps", 2), ("--guidance", 3)):
        assert drawn(*other) != usual, other


def test_the_pitch_of_any_note_is_heard():
    """Also of those below 80 Hz and above 1000; and of sounds too short for that there is a word."""
    heard = runpy.run_path(str(SAMPLE))["heard"]
    clips = audio.notes(2, 2048, Rng(0), names=("A1", "A4", "D6"))
    titles = [clips.class_names[i] for i in clips.labels]
    assert heard(clips.waves, titles, list(clips.class_names), 8000).startswith("6 of 6")
    assert "cannot be measured" in heard(clips.waves[:, :64], titles, list(clips.class_names), 8000)


def test_a_vocoder_of_a_folder(vocoder, copied, monkeypatch, capsys):
    assert "8 clips of 0.06 s, 4 classes" in vocoder[1]
    assert shlex.split(vocoder[1].strip().splitlines()[-1])[2:] == ["v", "--mel-of", "v/samples/00.wav"]
    code, out, err = call(monkeypatch, capsys, SAMPLE, "v", "--mel-of", "data/A3/note.wav", "--n", 2)
    assert code == 0 and "dB from the original's" in out, err
    names = sorted(p.name for p in (copied / "v" / "sounds").glob("*.wav"))
    assert names == ["00-original.wav", "01-vocoded-0.wav", "02-vocoded-1.wav"]
    lengths = {len(audio.read_wav(copied / "v" / "sounds" / name)[0]) for name in names}
    assert lengths == {1472}  # as long as the file, in whole hops of 64 samples


def test_a_model_that_is_told_nothing(copied, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, TRAIN, *TOY, "--data", "data", "--condition", "none", "--out", "n")
    assert code == 0 and shlex.split(out.strip().splitlines()[-1])[2:] == ["n"], err
    code, out, err = call(monkeypatch, capsys, SAMPLE, "n", "--n", 1)
    assert code == 0 and "1 sounds in" in out and (copied / "n" / "sounds" / "00-sample-0.wav").exists(), err


def test_refused(copied, monkeypatch, capsys):
    """Each bad input gives one line on stderr that says what is wrong, a non-zero exit code, and changes no file."""
    (copied / "empty").mkdir()
    (copied / "bad").mkdir()
    (copied / "bad" / "a.wav").write_bytes(b"RIFF")
    audio.write_wav(copied / "tiny" / "a.wav", np.zeros(100), 8000)
    (copied / "file").write_text("in the way")
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    new, run, a3 = (*TOY, "--out", "new"), "runs/diffwave", "data/A3/note.wav"
    cases = [
        (TRAIN, (*new, "--data", "nowhere"), "'nowhere' is not a folder"),
        (TRAIN, (*new, "--data", "empty"), "no WAV file"),
        (TRAIN, (*new, "--data", "bad"), "a.wav is damaged"),
        (TRAIN, (*new, "--data", "tiny"), "the longest has 100"),
        (TRAIN, (*new, "--length", 511), "the patch 8 must divide the length 511"),
        (TRAIN, (*new, "--length", 0), "at least 1"),
        (TRAIN, (*new, "--rate", 900), "too high for 900"),
        (TRAIN, (*new, "--condition", "mel", "--length", 520), "divides the length 520"),
        (TRAIN, (*new, "--layers", 0), "layers=0"),
        (TRAIN, (*new, "--steps", 0), "at least 1, got 0"),
        (TRAIN, (*new, "--batch-size", 0), "got 0"),
        (TRAIN, (*new, "--timesteps", 0), "T >= 1"),
        (TRAIN, ("--out", "file/run"), "file is not a folder"),
        (TRAIN, ("--out", run), "holds a run already"),
        (TRAIN, ("--resume", run, "--lr", 1), "leave out --lr"),
        (TRAIN, ("--resume", "nowhere"), "there is no checkpoint"),
        (SAMPLE, ("nowhere",), "there is no checkpoint"),
        (SAMPLE, (run, "--note", "A9"), "this model knows C4, C#4,"),
        (SAMPLE, (run, "--n", 0), "got 0"),
        (SAMPLE, (run, "--steps", 7), "1..6"),
        (SAMPLE, (run, "--seed", -1), "got -1"),
        (SAMPLE, (run, "--out", "file/o"), "file is not a folder"),
        (SAMPLE, (run, "--mel-of", "tiny/a.wav"), "this model is told no mel spectrogram"),
        (SAMPLE, ("v",), "a vocoder needs it"),
        (SAMPLE, ("v", "--mel-of", "bad/a.wav"), "a.wav is damaged"),
        (SAMPLE, ("v", "--mel-of", "tiny/a.wav"), "tiny/a.wav is too short for a spectrogram: expected 256 samples"),
        (SAMPLE, ("v", "--mel-of", a3, "--guidance", 2), "without labels"),
        (SAMPLE, ("v", "--mel-of", a3, "--note", "A3"), "knows no classes; got --note A3"),
    ]
    for script, arguments, words in cases:
        code, out, err = call(monkeypatch, capsys, script, *arguments)
        case = f"{script.name} {arguments}: {code} {out} {err}"
        assert code == 1 and words in err and "Traceback" not in err, case
        assert err.startswith("error: ") and err.count("\n") == 1, case
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("script", [TRAIN, SAMPLE])
def test_help_teaches(monkeypatch, capsys, script):
    code, out, _ = call(monkeypatch, capsys, script, "--help")
    assert code == 0 and f"python examples/{script.name}" in out and "default" in out


def test_the_defaults_are_a_model(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_diffwave.py"])
    recipe = runpy.run_path(str(TRAIN))["Recipe"](per_class=1)
    assert recipe.model(recipe.clips()).receptive_field > 2000
