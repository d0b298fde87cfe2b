"""text_to_image.py and train_latent_diffusion.py as a person runs them: prompts, pictures, masks, and bad input."""

import itertools
import pathlib
import runpy
import signal
import sys

import numpy as np
import pytest
from PIL import Image

from tinydiff import Rng, checkpoint
from tinydiff.models import CLIP, VAE, CLIPConfig, LatentDiffusion, LatentDiffusionConfig, VAEConfig
from tinydiff.nn import TransformerConfig, UNetConfig
from tinydiff.train import Training, TrainSettings

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
DRAW, TRAIN = (EXAMPLES / name for name in ("text_to_image.py", "train_latent_diffusion.py"))
QUICKLY = ["--steps", 3, "--device", "cpu"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(monkeypatch, capsys, script, *arguments):
    """Run an example in this process: its exit code and what it printed to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    return stop.value.code, *capsys.readouterr()


def assert_picture(path, columns, rows):
    """Fail unless the file is a grid of so many 32 x 32 pictures, three times as large, that is not blank."""
    with Image.open(path) as picture:
        assert picture.mode == "RGB" and picture.size == (3 * (34 * columns - 2), 3 * (34 * rows - 2))
        pixels = np.asarray(picture)
    assert len(np.unique(pixels)) >= 10 and pixels.std() > 5, path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with three small models that nobody trained."""
    text = TransformerConfig(8, 1, 2, causal=True)
    unet = UNetConfig(channels=2, base=8, multipliers=(1,), blocks=1, attention=(0,), heads=2, groups=4, context=8)
    models = {
        "vae": VAE(VAEConfig(base=8, latent=2), Rng(0)),
        "clip": CLIP(CLIPConfig(length=128, text=text, image=TransformerConfig(8, 1, 2), embedding=8), Rng(1)),
        "latent_diffusion": LatentDiffusion(LatentDiffusionConfig(unet, size=(8, 8), T=20), Rng(2)),
    }
    folder = tmp_path_factory.mktemp("run")
    for name, model in models.items():
        for i, p in enumerate(model.parameters().values()):
            p[...] = p.data + 0.1 * Rng(3).at(i).normal(p.shape)
        (folder / name).mkdir()
        Training(model, TrainSettings(1), folder / name / checkpoint.NAME, {}).save()
    return folder


@pytest.fixture
def draw(run, monkeypatch, capsys):
    """draw(...): what text_to_image.py prints with these arguments and the small models, ended well."""

    def done(*arguments):
        code, out, err = call(monkeypatch, capsys, DRAW, *arguments, "--run", run, *QUICKLY)
        assert code == 0, err
        return out

    return done


def samples(path):
    with np.load(path) as file:
        return file["samples"]


def test_a_prompt(draw, tmp_path):
    out = draw("a red star", "--n", 3, "--out", "d/x.png", "--save-array", "x.npz")
    assert "3 pictures in d/x.png" in out and "d/x_strip.png" in out
    assert_picture(tmp_path / "d/x.png", 3, 1)
    assert_picture(tmp_path / "d/x_strip.png", 4, 3)
    drawn = samples("x.npz")
    assert drawn.shape == (3, 32, 32, 3) and drawn.min() >= 0 and drawn.max() <= 1
    draw("a red star", "--n", 3, "--save-array", "same.npz")
    draw("a red star", "--n", 3, "--save-array", "seed.npz", "--seed", 1)
    draw("a red star", "--n", 3, "--save-array", "negative.npz", "--negative", "blue")
    draw("a red star", "--n", 3, "--save-array", "free.npz", "--guidance", 1)
    np.testing.assert_array_equal(samples("same.npz"), drawn)
    for other in ("seed.npz", "negative.npz", "free.npz"):
        assert (samples(other) != drawn).any(), other


def test_another_unet(draw, run, tmp_path):
    unet = LatentDiffusion.load(run / "latent_diffusion")
    for p in unet.parameters().values():
        p[...] = 0 * p.data
    (tmp_path / "other").mkdir()
    Training(unet, TrainSettings(1), tmp_path / "other" / checkpoint.NAME, {}).save()
    draw("a red star", "--save-array", "run.npz")
    draw("a red star", "--save-array", "unet.npz", "--unet", "other")
    assert (samples("run.npz") != samples("unet.npz")).any()


def test_many_prompts(draw, tmp_path):
    (tmp_path / "p.txt").write_text("a star\n\n  ⭐ \na blue ring\n", encoding="utf-8")
    draw("--prompts", "p.txt", "--n", 2, "--save-array", "x.npz")
    assert samples("x.npz").shape == (6, 32, 32, 3)
    assert_picture(tmp_path / "drawn.png", 6, 1)


def test_to_another_prompt(draw):
    draw("a red star", "--to", "a blue ring", "--n", 4, "--save-array", "x.npz")
    way = samples("x.npz")
    assert len(way) == 4 and all((a != b).any() for a, b in itertools.pairwise(way))


def test_from_a_picture(draw, tmp_path):
    """More strength, more change; under a mask, the known pixels are the picture's own."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("in.png")
    for strength in (0, 0.3, 1):
        draw("a ring", "--from", "in.png", "--strength", strength, "--n", 2, "--save-array", f"{strength}.npz")
    near, far = (np.abs(samples(f"{s}.npz") - samples("0.npz")).mean() for s in (0.3, 1))
    assert 0 < near < far
    Image.fromarray(pixels).resize((96, 96), Image.Resampling.NEAREST).save("large.png")
    draw("a ring", "--from", "large.png", "--strength", 0, "--n", 2, "--save-array", "large.npz")
    np.testing.assert_array_equal(samples("large.npz"), samples("0.npz"))
    draw("a ring", "--from", "in.png", "--mask", "left", "--n", 2, "--save-array", "m.npz")
    painted = samples("m.npz")
    np.testing.assert_allclose(painted[:, :, 16:], np.stack([pixels[:, 16:] / 255] * 2), atol=1e-6)
    assert (painted[0, :, :16] != painted[1, :, :16]).any()


# ------------------------------------------------------------------------------------------ training the U-Net

TOY = ["--pictures", 40, "--width", 16, "--steps", 4, "--batch-size", 4, "--sample-every", 4, "--save-every", 0]


@pytest.fixture
def train(run, monkeypatch, capsys):
    """train(...): what train_latent_diffusion.py prints with these arguments beside the small models, ended well."""

    def done(*arguments):
        code, out, err = call(monkeypatch, capsys, TRAIN, *arguments, "--device", "cpu")
        assert code == 0, err
        return out

    return done


def test_training_stopped_and_resumed(run, train, tmp_path, monkeypatch):
    """It ends in the bits of a run that was never stopped, and text_to_image.py draws from it."""
    parts = ["--vae", run / "vae", "--clip", run / "clip"]
    out = train(*parts, *TOY, "--out", "whole")
    assert "40 pictures" in out and "text_to_image.py" in out.splitlines()[-1]
    assert "tinydiff export whole latent_diffusion.npz" in out
    for name in ("samples_000000.png", "samples_000004.png", "samples.png", "loss.png"):
        assert (tmp_path / "whole" / name).stat().st_size > 500
    assert len((tmp_path / "whole" / "prompts.txt").read_text().splitlines()) == 24

    plain = Training.advance

    def stopped_after_two(self, loss):
        plain(self, loss)
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Training, "advance", stopped_after_two)
    monkeypatch.setattr(sys, "argv", [str(TRAIN), *map(str, [*parts, *TOY, "--out", "stopped", "--device", "cpu"])])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TRAIN), run_name="__main__")
    assert stop.value.code == 130
    monkeypatch.setattr(Training, "advance", plain)
    train("--resume", "stopped")
    whole, stopped = (checkpoint.load(folder, LatentDiffusion.kind)[0] for folder in ("whole", "stopped"))
    assert len(whole["losses"]) == 4
    for name, array in whole.items():
        np.testing.assert_array_equal(stopped[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vae", "clip"], "expected 'vae', got 'clip'"),
        (["--pictures", 0], "--pictures must be at least 1, got 0"),
        (["--width", 0], "--width must be at least 1, got 0"),
        (["--pictures", 3, "--batch-size", 4], "batch size must be 1..3"),
        (["--data", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_training_with_bad_input_is_one_line(run, monkeypatch, capsys, arguments, message):
    arguments = [run / "clip" if a == "clip" else a for a in arguments]
    flags = ["--vae", run / "vae", "--clip", run / "clip", *TOY, "--device", "cpu", *arguments]
    code, _, err = call(monkeypatch, capsys, TRAIN, *flags)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and message in lines[0], err


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a PROMPT, or a file of them"),
        (["a", "--prompts", "p.txt"], "and not both"),
        (["a", "--n", 0], "--n must be at least 1, got 0"),
        (["a", "--steps", 21], "steps must be in 1..20"),
        (["a", "--guidance", "nan"], "guidance must be a finite number"),
        (["a", "--mask", "left"], "name it with --from"),
        (["a", "--strength", 0.5], "name it with --from"),
        (["a", "--from", "in.png", "--strength", 2], "strength must lie in [0, 1], got 2"),
        (["a", "--from", "in.png", "--strength", 0.5, "--mask", "left"], "give one of them"),
        (["a", "--from", "none.png"], "none.png"),
        (["a", "--from", "in.png", "--mask", "small.png"], "mask must have the image's size 32 x 32"),
        (["a", "--to", "b", "--from", "in.png"], "--to walks from one PROMPT to another"),
        (["a", "--to", "b", "--n", 1], "at least 2 pictures"),
        (["--prompts", "empty.txt"], "empty.txt has no prompts"),
        (["--prompts", "none.txt"], "none.txt"),
        (["a", "--run", "nowhere"], "there is no checkpoint nowhere"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "p.txt").write_text("a\n")
    for name, size in (("in.png", 32), ("small.png", 8)):
        Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(name)
    flags = [*(["--run", run] if "--run" not in arguments else []), *QUICKLY]
    code, _, err = call(monkeypatch, capsys, DRAW, *flags, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and message in lines[0], err
    assert not (tmp_path / "drawn.png").exists()


def test_help_teaches(monkeypatch, capsys):
    for script, words in ((DRAW, "--negative"), (TRAIN, "--clip")):
        code, out, _ = call(monkeypatch, capsys, script, "--help")
        assert code == 0 and "python examples/" in out and words in out
