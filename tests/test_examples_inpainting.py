"""The examples of inpainting and editing as a person runs them: stopped, resumed, with own pictures, and bad input."""

import pathlib
import runpy
import shlex
import signal
import sys

import numpy as np
import pytest
from PIL import Image

from tinydiff import Rng, checkpoint
from tinydiff.data import mnist
from tinydiff.models import PixelDiffusion, PixelDiffusionConfig
from tinydiff.nn import UNetConfig
from tinydiff.train import Training, TrainSettings

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
TRAIN, PAINT, EDIT = (EXAMPLES / name for name in ("train_inpainting.py", "inpaint.py", "edit.py"))
TOY = ["--steps", 4, "--batch-size", 4, "--sample-every", 2, "--save-every", 0]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYDIFF_DEVICE", "cpu")


def call(monkeypatch, capsys, script, *arguments):
    """Run an example in this process: its exit code and what it printed to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    return stop.value.code, *capsys.readouterr()


def done(monkeypatch, capsys, script, *arguments):
    """What an example printed, after it ended well."""
    code, out, err = call(monkeypatch, capsys, script, *arguments)
    assert code == 0, err
    return out


def assert_picture(path, columns, rows, scale):
    """Fail unless the file is a grid of so many 28 x 28 images, with at least ten shades."""
    with Image.open(path) as picture:
        assert picture.size == (scale * (30 * columns - 2), scale * (30 * rows - 2))
        pixels = np.asarray(picture)
    assert len(np.unique(pixels)) >= 10 and pixels.std() > 5, path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of a toy model with classes, hardly trained."""
    folder = tmp_path_factory.mktemp("base")
    unet = UNetConfig(base=8, multipliers=(1,), blocks=1, attention=(), groups=4, patch=2, classes=10)
    model = PixelDiffusion(PixelDiffusionConfig(unet, T=20, class_names=tuple("0123456789")), Rng(0))
    for i, p in enumerate(model.parameters().values()):
        p[...] = p.data + 0.05 * Rng(1).at(i).normal(p.shape)
    Training(model, TrainSettings(1), folder / checkpoint.NAME, {}).save()
    return folder


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A run that fine-tuned it, in four steps."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    argv = sys.argv
    sys.argv = [str(TRAIN), str(base), *map(str, TOY), "--out", str(folder), "--device", "cpu"]
    try:
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(TRAIN), run_name="__main__")
    finally:
        sys.argv = argv
    assert stop.value.code == 0
    return folder


def weights(folder):
    return {name: array.tobytes() for name, array in checkpoint.load(folder, "pixel-inpainting")[0].items()}


def test_fine_tuning_leaves_pictures_and_a_checkpoint(base, tuned):
    grids = [f"samples_{step:06d}.png" for step in (0, 2, 4)]
    assert sorted(p.name for p in tuned.iterdir()) == sorted([*grids, "samples.png", "loss.png", checkpoint.NAME])
    for name in grids:
        assert_picture(tuned / name, 10, 6, 2)
    assert_picture(tuned / "samples.png", 10, 12, 2)
    arrays, meta = checkpoint.load(tuned, "pixel-inpainting")
    assert len(arrays["losses"]) == 4 and meta["about"]["base"] == str(base)


def test_stopped_and_resumed_it_ends_in_the_same_bits(base, tuned, monkeypatch, capsys):
    """Ctrl-C in step 2, the command that it prints, and then the command that that prints."""
    advance = Training.advance

    def advance_and_stop(self, loss):
        advance(self, loss)
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", advance_and_stop)
        code, _, err = call(patch, capsys, TRAIN, base, *TOY)
    assert code == 130 and "stopped after step 2 of 4" in err
    assert len(checkpoint.load("runs/inpainting", "pixel-inpainting")[0]["losses"]) == 2

    line = shlex.split(err.strip().splitlines()[-1])
    assert line[2:] == ["--resume", "runs/inpainting"]
    out = done(monkeypatch, capsys, line[1], *line[2:])
    assert "going on after step 2" in out and weights("runs/inpainting") == weights(tuned)

    line = shlex.split(out.strip().splitlines()[-1])
    assert line[2] == "runs/inpainting"
    done(monkeypatch, capsys, line[1], *line[2:])
    assert_picture("runs/inpainting/inpainted.png", 10, 1, 4)


def test_painting_a_picture_of_ones_own(base, tuned, monkeypatch, capsys):
    """By RePaint and by the model that was fine-tuned: the known pixels are those of the picture, exactly."""
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    mask = np.where(np.arange(28) < 10, 255, 0).astype(np.uint8) * np.ones((28, 1), np.uint8)
    Image.fromarray(pixels).save("mine.png")
    Image.fromarray(mask).save("mask.png")
    for run in (base, tuned):
        options = ("--mask", "mask.png", "--n", 3, "--steps", 3, "--resamplings", 2, "--jump", 1, "--out", "o.png")
        done(monkeypatch, capsys, PAINT, run, "mine.png", *options)
        with Image.open("o.png") as picture:
            sheet = np.asarray(picture)[::4, ::4]
        whole, known, *paintings = (sheet[:, 30 * i : 30 * i + 28] for i in range(5))
        np.testing.assert_array_equal(whole, pixels)
        assert (known[mask == 0] == 128).all()
        for painting in paintings:
            np.testing.assert_array_equal(painting[mask == 255], pixels[mask == 255])
            assert not np.array_equal(painting, pixels)
        assert not np.array_equal(paintings[0], paintings[1])


def test_painting_with_a_label(tuned, monkeypatch, capsys):
    pictures = []
    for label in (1, 7):
        done(monkeypatch, capsys, PAINT, tuned, 3, "--label", label, "--steps", 2, "--mask", "all", "--guidance", 3)
        pictures.append((tuned / "inpainted.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_editing(base, monkeypatch, capsys):
    def edit(*options):
        out = done(monkeypatch, capsys, EDIT, base, 207, "--n", 3, "--steps", 4, "--out", "e.png", *options)
        with Image.open("e.png") as picture:
            return out, np.asarray(picture)[::4, ::4]

    _, sheet = edit("--strengths", "0,0.5,1")
    assert_picture("e.png", 5, 3, 4)
    tiles = [[sheet[30 * i : 30 * i + 28, 30 * j : 30 * j + 28] for j in range(5)] for i in range(3)]
    for tile in (*tiles[0], tiles[1][0], tiles[2][0]):  # strength 0, and the image itself
        np.testing.assert_array_equal(tile, tiles[0][0])
    assert not np.array_equal(tiles[1][2], tiles[1][3]) and not np.array_equal(tiles[1][2], tiles[2][2])
    _, told = edit("--strengths", "0,0.5,1", "--label", 3)
    assert not np.array_equal(told, sheet)
    out, _ = edit("--invert", "2,5")
    assert_picture("e.png", 3, 2, 4)
    assert "2 steps: 0." in out and "5 steps: 0." in out
    _, row = edit("--to", 407)
    assert_picture("e.png", 5, 1, 4)
    digits = mnist.load("embedded", "test").images
    np.testing.assert_array_equal(row[:, :28], digits[207])
    np.testing.assert_array_equal(row[:, -28:], digits[407])


def test_refused(base, tuned, tmp_path, monkeypatch, capsys):
    """Each bad input gives one line on stderr that says what is wrong, a non-zero exit code, and changes no file."""
    Image.new("L", (20, 28)).save("small.png")
    Image.new("L", (28, 28), 100).save("grey.png")
    pathlib.Path("text.png").write_text("no picture")
    checkpoint.export(tuned, "exported.npz")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    new = (*TOY, "--out", "new")
    cases = [
        (TRAIN, (), "name the trained model"),
        (TRAIN, ("nowhere", *new), "there is no checkpoint"),
        (TRAIN, (tuned, *new), "expected 'pixel-diffusion', got 'pixel-inpainting'"),
        (TRAIN, (base, *new, "--data", "nowhere"), "'nowhere' is not a folder"),
        (TRAIN, (base, *new, "--steps", 0), "at least 1, got 0"),
        (TRAIN, (base, *new, "--lr", -1), "got"),
        (TRAIN, (base, *new, "--batch-size", 0), "got 0"),
        (TRAIN, (base, *new, "--seed", -1), "got -1"),
        (TRAIN, (base, *TOY, "--out", tuned), "holds a run already"),
        (TRAIN, ("--resume", tuned, "--lr", 1), "leave out --lr"),
        (TRAIN, (base, "--resume", tuned), "leave out RUN"),
        (TRAIN, ("--resume", base), "expected 'pixel-inpainting', got 'pixel-diffusion'"),
        (TRAIN, ("--resume", "exported.npz"), "was exported"),
        (PAINT, ("nowhere", 3), "there is no checkpoint"),
        (PAINT, (base, 500), "0..499, got 500"),
        (PAINT, (base, "nowhere.png"), "nowhere.png"),
        (PAINT, (base, "text.png"), "not a picture"),
        (PAINT, (base, "small.png"), "28 x 28 x 1, but small.png has (28, 20, 1)"),
        (PAINT, (base, 3, "--mask", "small.png"), "size 28 x 28, but small.png has (28, 20)"),
        (PAINT, (base, 3, "--mask", "grey.png"), "has grey in it"),
        (
            PAINT,
            (base, 3, "--mask", "nowhere.png"),
            "one of left, right, top, bottom, centre, all, or a picture; there is no file nowhere",
        ),
        (PAINT, (base, 3, "--n", 0), "at least 1, got 0"),
        (PAINT, (base, 3, "--steps", 21), "1..20"),
        (PAINT, (tuned, 3, "--steps", 21), "1..20"),
        (PAINT, (base, 3, "--steps", 2, "--jump", 0), "at least 1, got 0"),
        (PAINT, (base, 3, "--steps", 2, "--resamplings", 0), "at least 1, got"),
        (PAINT, (base, 3, "--label", 10), "0..9, got 10"),
        (PAINT, (tuned, 3, "--guidance", 2), "needs a label"),
        (PAINT, (base, 3, "--device", "cuda"), "device 'cuda' cannot be used"),
        (EDIT, (tuned, 3), "expected 'pixel-diffusion'"),
        (EDIT, (base, 3, "--steps", 21), "1..20"),
        (EDIT, (base, 3, "--strengths", "0.5,2"), "strength must lie in [0, 1], got 2"),
        (EDIT, (base, 3, "--invert", "21"), "1..20, got 21"),
        (EDIT, (base, 3, "--to", "small.png"), "28 x 28 x 1"),
        (EDIT, (base, 3, "--n", 1), "at least 2, got 1"),
        (EDIT, (base, 3, "--label", -1), "0..9, got -1"),
    ]
    for script, arguments, words in cases:
        out = () if script is TRAIN or "--out" in arguments else ("--out", "x/o.png")
        code, printed, err = call(monkeypatch, capsys, script, *arguments, *out)
        case = f"{script.name} {arguments}: {code} {printed} {err}"
        assert code == 1 and words in err and "Traceback" not in err, case
        assert err.startswith("error: ") and err.count("\n") == 1, case
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize("script", [TRAIN, PAINT, EDIT], ids=lambda path: path.stem)
def test_help_teaches(monkeypatch, capsys, script):
    out = done(monkeypatch, capsys, script, "--help")
    assert f"python examples/{script.name}" in out and "default" in out


@pytest.mark.parametrize("arguments", [("--strengths", "half"), ("--invert", "2.5"), ("--invert", "2", "--to", "3")])
def test_usage_errors(monkeypatch, capsys, base, arguments):
    code, _, err = call(monkeypatch, capsys, EDIT, base, 3, *arguments)
    assert code == 2 and "usage:" in err
