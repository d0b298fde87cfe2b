"""The example that trains the autoencoder as a person runs it: its pictures, its logs, stopped and resumed."""

import csv
import pathlib
import runpy
import signal
import sys

import numpy as np
import pytest
from PIL import Image

from tinydiff import checkpoint
from tinydiff.data.shapes import Shapes
from tinydiff.image import to_signed
from tinydiff.models import VAE, SceneReader, SceneReaderConfig
from tinydiff.rng import Rng
from tinydiff.train import Training, TrainSettings

TRAIN = pathlib.Path(__file__).parents[1] / "examples" / "train_vae.py"
TOY = ["--steps", 4, "--batch-size", 2, "--start", 2, "--sample-every", 2, "--save-every", 0, "--device", "cpu"]
RUN = pathlib.Path("runs/vae")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(monkeypatch, capsys, *arguments):
    """Run the example in this process: its exit code and what it printed to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", [str(TRAIN), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TRAIN), run_name="__main__")
    return stop.value.code, *capsys.readouterr()


def rows(path=RUN):
    with open(path / "losses.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_pictures_terms_and_a_model(monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, *TOY)
    assert code == 0, err
    pictures = [f"reconstructions_{step:06d}.png" for step in (0, 2, 4)]
    assert sorted(p.name for p in RUN.iterdir()) == sorted(
        [*pictures, "losses.csv", "losses.png", "loss.png", checkpoint.NAME]
    )
    with Image.open(RUN / pictures[-1]) as picture:
        assert picture.size == (2 * (34 * 10 - 2), 2 * (34 * 2 - 2))
        assert np.asarray(picture).std() > 5
    assert [row["step"] for row in rows()] == ["0", "2", "4"]
    assert rows()[1]["generator"] == "" != rows()[2]["generator"]  # the discriminator plays from step 3 on
    assert all(float(row["pixels"]) > 0 and float(row["perceptual"]) > 0 for row in rows())
    assert "PSNR of 500" in out and "variance is 1.000" in out or "variance is 0." in out
    assert "reads alike" in out and "background" in out
    vae = VAE.load(RUN)
    z = vae.encode(to_signed(Shapes().draw(Rng(9), 200)[0]))
    assert vae.config.scale != 1 and abs(z.var() - 1) < 0.1 and z.shape == (200, 8, 8, 4)


def test_a_resumed_run_ends_in_the_same_bits(tmp_path, monkeypatch, capsys):
    call(monkeypatch, capsys, *TOY, "--out", "whole")
    monkeypatch.setattr("tinydiff.image.save_png", interrupting(monkeypatch))
    code, *_ = call(monkeypatch, capsys, *TOY, "--out", "stopped")
    assert code == 130
    code, out, _ = call(monkeypatch, capsys, "--resume", "stopped", "--save-every", 0, "--sample-every", 2)
    assert code == 0 and "going on after step 3" in out
    (a, about), (b, again) = (checkpoint.load(folder, "vae") for folder in ("whole", "stopped"))
    assert about == again and all(a[name].tobytes() == b[name].tobytes() for name in a)
    assert (tmp_path / "whole/losses.csv").read_bytes() == (tmp_path / "stopped/losses.csv").read_bytes()


def interrupting(monkeypatch):
    """image.save_png, with Ctrl-C as the pictures of step 2 are written."""
    from tinydiff import image

    write = image.save_png

    def save_png(path, *arguments, **how):
        write(path, *arguments, **how)
        if path.name == "reconstructions_000002.png":
            monkeypatch.setattr("tinydiff.image.save_png", write)
            signal.raise_signal(signal.SIGINT)

    return save_png
