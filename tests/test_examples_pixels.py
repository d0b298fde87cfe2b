"""train_decoder.py, train_upsampler.py and train_glide.py as a person runs them: pictures, figures, and bad input."""

import pathlib
import runpy
import signal
import sys

import numpy as np
import pytest
from PIL import Image

from tests.models.common import stirred
from tinydiff import Rng, checkpoint
from tinydiff.data import shapes
from tinydiff.data.shape_captions import parse
from tinydiff.diffusion import Sampling
from tinydiff.models import CLIP, CLIPConfig, Decoder, TextDiffusion, TextInpainting, Upsampler
from tinydiff.nn import TransformerConfig
from tinydiff.train import Training, TrainSettings

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
DECODER, UPSAMPLER, GLIDE = (EXAMPLES / f"train_{name}.py" for name in ("decoder", "upsampler", "glide"))
TOY = ["--pictures", 24, "--steps", 4, "--batch-size", 4, "--tested", 8, "--sample-every", 4, "--save-every", 0]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """In an empty folder, where whatever is drawn takes two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Sampling, "steps_of", lambda how, T: 2)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a small CLIP that nobody trained."""
    text, seen = TransformerConfig(8, 1, 2, causal=True), TransformerConfig(8, 1, 2)
    model = stirred(CLIP(CLIPConfig(length=128, text=text, image=seen, embedding=8), Rng(1)))
    folder = tmp_path_factory.mktemp("clip")
    Training(model, TrainSettings(1), folder / checkpoint.NAME, {}).save()
    return folder


def call(monkeypatch, capsys, script, *arguments):
    """Run an example in this process: its exit code and what it printed to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    return stop.value.code, *capsys.readouterr()


@pytest.fixture
def train(monkeypatch, capsys):
    """train(script, ...): what it prints with these arguments, ended well."""

    def done(script, *arguments):
        code, out, err = call(monkeypatch, capsys, script, *arguments, "--device", "cpu")
        assert code == 0, err
        return out

    return done


@pytest.fixture
def stop_after_two(monkeypatch, capsys):
    """stop_after_two(script, ...): run it, with Ctrl-C in its second step."""
    plain = Training.advance

    def stopped(self, loss):
        plain(self, loss)
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)

    def done(script, *arguments):
        monkeypatch.setattr(Training, "advance", stopped)
        code, _, _ = call(monkeypatch, capsys, script, *arguments, "--device", "cpu")
        monkeypatch.setattr(Training, "advance", plain)
        assert code == 130

    return done


def assert_same_runs(one, other, kind):
    whole, stopped = (checkpoint.load(folder, kind)[0] for folder in (one, other))
    assert len(whole["losses"]) == 4
    for name, array in whole.items():
        np.testing.assert_array_equal(stopped[name], array, err_msg=name)


def assert_sheet(path, columns, rows, side=32):
    """Fail unless the file is a grid of so many pictures, twice as large, that is not blank."""
    with Image.open(path) as picture:
        assert picture.mode == "RGB" and picture.size == tuple(2 * ((side + 2) * n - 2) for n in (columns, rows))
        pixels = np.asarray(picture)
    assert len(np.unique(pixels)) >= 10 and pixels.std() > 5, path


def test_the_decoder(train, stop_after_two, clip):
    flags = ["--clip", clip, "--base", 8, *TOY]
    out = train(DECODER, *flags, "--out", "whole")
    assert "24 pictures" in out and "train_upsampler.py" in out
    assert all(f"| {known} |" in out for known in ("z_i and caption", "z_i alone", "the caption alone"))
    for name in ("samples_000000.png", "samples_000004.png", "samples.png"):
        assert_sheet(f"whole/{name}", 8, 4)
    stop_after_two(DECODER, *flags, "--out", "stopped")
    train(DECODER, "--resume", "stopped")
    assert_same_runs("whole", "stopped", Decoder.kind)
    config = Decoder.load("whole").config
    assert (config.unet.vector, config.unet.context, config.size) == (8, 8, (32, 32))


def test_the_upsampler(train, stop_after_two):
    flags = ["--base", 8, *TOY]
    out = train(UPSAMPLER, *flags, "--out", "whole")
    rows = [line.split("|")[1:4] for line in out.splitlines() if " dB " in line]
    assert [row[0].strip() for row in rows[:2]] == ["the nearest pixel", "bicubic interpolation"] and len(rows) == 4
    nearest, cubic = (float(row[1].split()[0]) for row in rows[:2])
    assert 15 < nearest < cubic < 40 and "python -m tinydiff export whole" in out
    assert_sheet("whole/samples.png", 8, 3, side=64)
    stop_after_two(UPSAMPLER, *flags, "--out", "stopped")
    train(UPSAMPLER, "--resume", "stopped")
    assert_same_runs("whole", "stopped", Upsampler.kind)


def test_glide(train, stop_after_two, clip):
    """First the base model, then fine-tuned from it, and resumed as that."""
    data = ["--clip", clip, *TOY]
    out = train(GLIDE, *data, "--width", 8)
    assert "prompts are drawn" in out and "--base runs/glide" in out
    assert_sheet("runs/glide/samples.png", 8, 3)
    assert len(pathlib.Path("runs/glide/prompts.txt").read_text().splitlines()) == 24

    out = train(GLIDE, *data, "--base", "runs/glide", "--out", "whole")
    assert "in place of one thing" in out and "python -m tinydiff export whole" in out
    assert_sheet("whole/samples.png", 8, 6)
    assert_sheet("whole/edits.png", 8, 3)
    stop_after_two(GLIDE, *data, "--base", "runs/glide")
    train(GLIDE, "--resume")
    assert_same_runs("whole", "runs/glide-2", TextInpainting.kind)
    assert TextDiffusion.load("runs/glide").config.text_layers == TextInpainting.load("whole").config.text_layers == 2


def test_what_glide_is_asked_to_edit():
    """The mask hides one thing wholly, the caption names another in its place, and the others are as before."""
    known, mask, prompts = runpy.run_path(str(GLIDE))["edits"](Rng(3), 30)
    assert known.shape == (30, 32, 32, 3) and mask.shape == (30, 32, 32, 1) and len(prompts) == 30
    scenes = shapes_drawn(known)
    twos = 0
    for picture, kept, prompt, scene in zip(known, mask[..., 0], prompts, scenes, strict=True):
        others = scene.items[1:]
        without = shapes.draw(shapes.Scene(others, scene.background)) / 127.5 - 1
        assert np.abs(picture - without)[kept].max() < 1e-5 and np.abs(picture - without)[~kept].max() > 0.1
        assert not parse(prompt).fits(scene)
        twos += len(others)
    assert 5 < twos < 25


def shapes_drawn(known):
    """The scenes of Shapes that were drawn: those whose pictures are these."""
    from tinydiff.data.captioned import Shapes

    scenes = Shapes().scenes(Rng(3), 68, "test")
    pictures = np.stack([shapes.draw(scene) / 127.5 - 1 for scene in scenes])
    return [scenes[np.abs(pictures - picture).max(axis=(1, 2, 3)).argmin()] for picture in known]


def test_bicubic_interpolation():
    bicubic, low = runpy.run_path(str(UPSAMPLER))["bicubic"], np.full((2, 4, 4, 3), 0.2, np.float32)
    np.testing.assert_allclose(bicubic(low, 2), np.full((2, 8, 8, 3), 0.2), atol=0.004)
    ramp = np.broadcast_to(np.linspace(-0.8, 0.8, 8, dtype=np.float32)[:, None, None], (1, 8, 8, 3))
    slope = np.diff(bicubic(ramp, 2)[0, 4:-4, 0, 0])
    np.testing.assert_allclose(slope, 0.8 / 7, atol=0.01)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (DECODER, ["--clip", "scene_reader"], "expected 'clip', got 'scene-reader'"),
        (DECODER, ["--pictures", 0], "at least 1, got 0"),
        (DECODER, ["--pictures", 3], "batch size must be 1..3"),
        (DECODER, ["--tested", 0], "at least 1, got 0"),
        (DECODER, ["--base", 9], "base (9) must be even"),
        (DECODER, ["--data", "nowhere"], "nowhere is not a folder"),
        (DECODER, ["--resume", "nowhere"], "there is no checkpoint nowhere"),
        (UPSAMPLER, ["--data", "nowhere"], "nowhere is not a folder"),
        (UPSAMPLER, ["--base", 10], "groups (8) must divide base (10)"),
        (UPSAMPLER, ["--tested", 0], "at least 1, got 0"),
        (UPSAMPLER, ["--resume", "nowhere"], "there is no checkpoint nowhere"),
        (GLIDE, ["--base", "clip"], "expected 'text-diffusion', got 'clip'"),
        (GLIDE, ["--base", "runs/glide", "--width", 8], "keeps its own --width"),
        (GLIDE, ["--tested", 0], "at least 1, got 0"),
        (GLIDE, ["--resume", "scene_reader"], "expected 'text-diffusion', got 'scene-reader'"),
        (GLIDE, ["--resume", "nowhere"], "there is no checkpoint nowhere"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, script, arguments, message):
    flags = [*TOY, *arguments] if "--resume" not in arguments else arguments
    code, _, err = call(monkeypatch, capsys, script, *flags, "--device", "cpu")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and message in lines[0], err


def test_help_teaches(monkeypatch, capsys):
    for script, words in ((DECODER, "--clip"), (UPSAMPLER, "--tested"), (GLIDE, "--base")):
        code, out, _ = call(monkeypatch, capsys, script, "--help")
        assert code == 0 and "python examples/" in out and words in out
