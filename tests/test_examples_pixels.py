"""The trainers of pixel diffusion told a text, as a person runs them: pictures, figures, and bad input."""

import pathlib
import re
import runpy
import signal
import sys

import numpy as np
import pytest
from PIL import Image

from tests.models.common import stirred
from tinydiff import Rng, checkpoint, program
from tinydiff.data import captioned, shapes
from tinydiff.data.shape_captions import parse
from tinydiff.diffusion import Sampling
from tinydiff.models import (
    CLIP,
    CLIPConfig,
    Decoder,
    MaskedTextEncoder,
    TextDiffusion,
    TextDiffusionConfig,
    TextEncoderConfig,
    TextInpainting,
    Upsampler,
)
from tinydiff.nn import TransformerConfig, UNetConfig
from tinydiff.train import Training, TrainSettings

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
SCRIPTS = DECODER, UPSAMPLER, TO_PIXELS, GLIDE = [
    EXAMPLES / f"train_{name}.py" for name in ("decoder", "upsampler", "text_to_pixels", "glide")
]
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
    return saved(CLIP(CLIPConfig(length=128, text=text, image=seen, embedding=8), Rng(1)), tmp_path_factory)


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    """The folder of a small text encoder that nobody trained."""
    config = TextEncoderConfig(length=128, text=TransformerConfig(12, 1, 2))
    return saved(MaskedTextEncoder(config, Rng(1)), tmp_path_factory)


def saved(model, folders):
    folder = folders.mktemp(model.kind)
    Training(stirred(model), TrainSettings(1), folder / checkpoint.NAME, {}).save()
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
    flags = ["--clip", clip, "--width", 8, *TOY]
    out = train(DECODER, *flags, "--out", "whole")
    assert "24 pictures" in out and "train_upsampler.py" in out and "tinydiff export whole decoder.npz" in out
    assert all(f"| {known} |" in out for known in ("z_i and caption", "z_i alone", "the caption alone"))
    for name in ("samples_000000.png", "samples_000004.png", "samples.png"):
        assert_sheet(f"whole/{name}", 8, 4)
    stop_after_two(DECODER, *flags, "--out", "stopped")
    train(DECODER, "--resume", "stopped")
    assert_same_runs("whole", "stopped", Decoder.kind)
    config = Decoder.load("whole").config
    assert (config.unet.vector, config.unet.context, config.unet.base, config.size) == (8, 8, 8, (32, 32))
    assert config.text_encoder == checkpoint.fingerprint(CLIP.load(clip))


def test_the_samples_of_the_decoder_are_of_all_kinds_of_pictures(train, clip):
    """A source gives one kind after the other; the upper row shows pictures from all over it."""
    train(DECODER, "--clip", clip, "--width", 8, *TOY, "--steps", 1, "--tested", 24)
    unseen, _ = captioned.source_to_draw("shapes").draw(Rng(0).at(4), 24, "test")
    with Image.open("runs/decoder/samples.png") as picture:
        pixels = np.asarray(picture)[:64:2, ::2]
    for i in range(8):
        np.testing.assert_array_equal(pixels[:, 34 * i : 34 * i + 32], unseen[3 * i])


def test_a_decoder_of_smaller_pictures(train, clip, monkeypatch):
    """It is told what CLIP sees of the pictures as they are, and learns to draw them smaller."""
    learned, plain = [], program.told_loss
    monkeypatch.setattr(program, "told_loss", lambda model, x, *more: learned.append(x.shape) or plain(model, x, *more))
    out = train(DECODER, "--clip", clip, "--width", 8, "--size", 16, *TOY, "--steps", 1)
    assert "as its caption says" not in out and f"train_upsampler.py --size 32 --text-encoder {clip}\n" in out
    assert learned == [(24, 16, 16, 3)]
    config = Decoder.load("runs/decoder").config
    assert (config.size, config.unet.attention) == ((16, 16), (0, 1))
    with Image.open("runs/decoder/samples.png") as picture:
        assert picture.size == (4 * (18 * 8 - 2), 4 * (18 * 4 - 2))


def test_the_upsampler(train, stop_after_two):
    flags = ["--width", 8, *TOY]
    out = train(UPSAMPLER, *flags, "--out", "whole")
    rows = [line.split("|")[1:4] for line in out.splitlines() if " dB " in line]
    assert [row[0].strip() for row in rows[:2]] == ["the nearest pixel", "bicubic interpolation"] and len(rows) == 4
    nearest, cubic = (float(row[1].split()[0]) for row in rows[:2])
    assert 15 < nearest < cubic < 40 and "tinydiff export whole upsampler.npz" in out
    assert "dalle2.py 'a red star' --upsamplers whole" in out
    assert_sheet("whole/samples.png", 8, 3, side=64)
    stop_after_two(UPSAMPLER, *flags, "--out", "stopped")
    train(UPSAMPLER, "--resume", "stopped")
    assert_same_runs("whole", "stopped", Upsampler.kind)


def test_text_to_pixels(train, stop_after_two, text_encoder):
    """Told by an encoder of texts alone, whose width it takes."""
    flags = ["--text-encoder", text_encoder, "--width", 8, *TOY]
    out = train(TO_PIXELS, *flags, "--out", "whole")
    assert "of 8 prompts are drawn" in out and "tinydiff export whole text_to_pixels.npz" in out
    assert re.search(rf"train_glide.py .*--base whole --text-encoder {text_encoder}\n", out)
    for name in ("samples_000000.png", "samples_000004.png", "samples.png"):
        assert_sheet(f"whole/{name}", 8, 3)
    assert len(pathlib.Path("whole/prompts.txt").read_text().splitlines()) == 24
    stop_after_two(TO_PIXELS, *flags)
    train(TO_PIXELS, "--resume")
    assert_same_runs("whole", "runs/text_to_pixels", TextDiffusion.kind)
    config = TextDiffusion.load("whole").config
    assert (config.unet.context, config.unet.base, config.text_layers) == (12, 8, 2)
    assert (config.unet.patch, config.unet.attention, config.target, config.unet.pooled) == (2, (1,), "v", True)
    assert config.text_encoder == checkpoint.fingerprint(MaskedTextEncoder.load(text_encoder))


def test_smaller_pixels(train, text_encoder):
    """The base of a cascade learns from the same pictures, made smaller."""
    flags = ["--text-encoder", text_encoder, "--width", 8, *TOY, "--steps", 1]
    out = train(TO_PIXELS, *flags, "--size", 16)
    assert "prompts are drawn" not in out and f"train_upsampler.py --size 32 --text-encoder {text_encoder}\n" in out
    config = TextDiffusion.load("runs/text_to_pixels").config
    assert (config.size, config.unet.attention) == ((16, 16), (0, 1))
    with Image.open("runs/text_to_pixels/samples.png") as picture:
        assert picture.size == (4 * (18 * 8 - 2), 4 * (18 * 3 - 2))


@pytest.mark.parametrize("size", [64, 12])
def test_a_size_that_does_not_divide(size, text_encoder, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, TO_PIXELS, "--text-encoder", text_encoder, "--size", size, *TOY)
    assert code == 1 and f"--size must divide that of the pictures, 32 x 32, got {size}" in err


def test_an_upsampler_that_is_told_the_captions(train, stop_after_two, text_encoder):
    flags = ["--text-encoder", text_encoder, "--size", 32, "--width", 8, *TOY]
    out = train(UPSAMPLER, *flags, "--out", "whole")
    assert len([line for line in out.splitlines() if " dB " in line]) == 4
    assert "imagen.py 'a red star' --upsamplers whole upsampler" in out
    assert_sheet("whole/samples.png", 8, 3)
    stop_after_two(UPSAMPLER, *flags, "--out", "stopped")
    train(UPSAMPLER, "--resume", "stopped")
    assert_same_runs("whole", "stopped", Upsampler.kind)
    config = Upsampler.load("whole").config
    assert (config.low_size, config.unet.context, config.unet.pooled, config.text_layers) == ((16, 16), 12, True, 2)
    assert config.text_encoder == checkpoint.fingerprint(MaskedTextEncoder.load(text_encoder))


def test_an_upsampler_that_begins_with_another(train, text_encoder, tmp_path):
    flags = ["--text-encoder", text_encoder, "--size", 32, "--width", 8, *TOY, "--steps", 1]
    train(UPSAMPLER, *flags, "--out", "base")
    train(UPSAMPLER, *flags, "--lr", 1e-9, "--base", "base", "--seed", 1, "--out", "next")
    one, other = (Upsampler.load(run).state_dict() for run in ("base", "next"))
    for name, array in one.items():
        np.testing.assert_allclose(other[name], array, rtol=1e-3, atol=1e-6, err_msg=name)


def test_glide(train, stop_after_two, base, clip):
    """Fine-tuned from a base model, with its sizes, and resumed without it."""
    flags = ["--base", base, "--text-encoder", clip, *TOY]
    out = train(GLIDE, *flags, "--out", "whole")
    assert "of 8 pictures show what was asked for in place of one thing" in out
    assert "tinydiff export whole glide.npz" in out
    command = rf"glide.py '.+' --from whole/picture.png --mask left --run whole --text-encoder {clip}\n"
    assert re.search(command, out) and Image.open("whole/picture.png").size == (32, 32)
    assert_sheet("whole/samples.png", 8, 6)
    assert_sheet("whole/edits.png", 8, 3)
    stop_after_two(GLIDE, *flags)
    train(GLIDE, "--resume")
    assert_same_runs("whole", "runs/glide", TextInpainting.kind)
    unet, text_layers = (getattr(TextInpainting.load("whole").config, name) for name in ("unet", "text_layers"))
    assert (unet.base, unet.context, unet.extra, text_layers) == (8, 8, 4, 1)


@pytest.fixture
def base(clip, tmp_path_factory):
    """The folder of a model to fine-tune that nobody trained, but knows who told it."""
    unet = UNetConfig(3, 8, (1,), 1, (0,), heads=2, patch=4, context=8)
    known = checkpoint.fingerprint(CLIP.load(clip))
    return saved(TextDiffusion(TextDiffusionConfig(unet, text_layers=1, text_encoder=known), Rng(2)), tmp_path_factory)


def test_glide_listens_to_who_told_its_base(monkeypatch, capsys, base, text_encoder):
    flags = [GLIDE, "--base", base, "--text-encoder", text_encoder, *TOY]
    code, _, err = call(monkeypatch, capsys, *flags)
    assert code == 1 and "was told by another text encoder: name it with --text-encoder" in err


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
        (DECODER, ["--pictures", 3], "batch size must be 1..3"),
        (DECODER, ["--width", 9], "base (9) must be even"),
        (DECODER, ["--data", "nowhere"], "nowhere is not a folder"),
        (UPSAMPLER, ["--data", "nowhere"], "nowhere is not a folder"),
        (UPSAMPLER, ["--width", 10], "groups (8) must divide base (10)"),
        (TO_PIXELS, ["--text-encoder", "scene_reader"], "expected 'clip' or 'text-encoder', got 'scene-reader'"),
        (TO_PIXELS, ["--data", "nowhere"], "nowhere is not a folder"),
        (GLIDE, [], "--base is needed"),
        (GLIDE, ["--base", "clip"], "expected 'text-diffusion', got 'clip'"),
        (GLIDE, ["--resume", "scene_reader"], "expected 'text-inpainting', got 'scene-reader'"),
        *((script, ["--resume", "nowhere"], "there is no checkpoint nowhere") for script in SCRIPTS),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, script, arguments, message):
    flags = [*TOY, *arguments] if "--resume" not in arguments else arguments
    code, _, err = call(monkeypatch, capsys, script, *flags, "--device", "cpu")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and message in lines[0], err


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
@pytest.mark.parametrize("flag", ["--pictures", "--tested"])
def test_numbers_below_1_are_refused_before_anything_is_computed(monkeypatch, capsys, script, flag):
    base = ["--base", "nowhere"] if script == GLIDE else []
    code, _, err = call(monkeypatch, capsys, script, *base, flag, 0)
    assert code == 1 and err == f"error: {flag} must be at least 1, got 0\n" and not pathlib.Path("runs").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_help_teaches(monkeypatch, capsys, script):
    code, out, _ = call(monkeypatch, capsys, script, "--help")
    assert code == 0 and f"python examples/{script.name}" in out and "(default: 200)" in " ".join(out.split())
