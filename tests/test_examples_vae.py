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
from tinydiff.data.captioned import Shapes
from tinydiff.image import to_signed
from tinydiff.models import VAE, SceneReader, SceneReaderConfig
from tinydiff.rng import Rng
from tinydiff.train import Training, TrainSettings

TRAIN = pathlib.Path(__file__).parents[1] / "examples" / "train_vae.py"
TOY = ["--steps", 4, "--batch-size", 2, "--start", 2, "--sample-every", 2, "--save-every", 0, "--tested", 5]
RUN = pathlib.Path("runs/vae")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """In an empty folder, with a reader that has learned nothing for the shipped one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYDIFF_DEVICE", "cpu")
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "shipped")
    reader = SceneReader(SceneReaderConfig(width=8, hidden=16), Rng(0))
    Training(reader, TrainSettings(1), tmp_path / "shipped" / "scene_reader.npz", {}).save()


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
        assert picture.size == (2 * (34 * 5 - 2), 2 * (34 * 2 - 2))
        assert np.asarray(picture).std() > 5
    assert [row["step"] for row in rows()] == ["0", "2", "4"]
    assert rows()[1]["generator"] == "" != rows()[2]["generator"]  # the discriminator plays from step 3 on
    assert all(float(row["pixels"]) > 0 and float(row["perceptual"]) > 0 for row in rows())
    assert "PSNR of 5 held-out images" in out and "Latent scale" in out and "reads alike" in out
    vae = VAE.load(RUN)
    z = vae.encode(to_signed(Shapes().draw(Rng(9), 200)[0]))
    assert vae.config.scale != 1 and abs(z.var() - 1) < 0.3 and z.shape == (200, 8, 8, 4)


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


def test_other_data_other_latents(monkeypatch, capsys):
    other = ["--data", "digits", "--regularisation", "vq", "--config", "f8", "--adversarial", 0]
    code, out, err = call(monkeypatch, capsys, *TOY, *other, "--steps", 1)
    assert code == 0, err
    vae = VAE.load(RUN)
    assert vae.factor == 8 and vae.codebook is not None and "reads alike" not in out
    assert list(rows()[-1]) == ["step", "pixels", "regularisation"]


def test_a_folder_of_images(tmp_path, monkeypatch, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    for i in range(12):
        Image.fromarray(np.full((16, 24, 3), 20 * i, np.uint8)).save(mine / f"{i}.png")
    (mine / "captions.txt").write_text("\n".join(f"{i}.png\tnumber {i}" for i in range(12)))
    code, out, err = call(monkeypatch, capsys, *TOY, "--steps", 1, "--start", 1, "--data", mine)
    assert code == 0 and "16 x 24 pixels" in out, err
    arrays, _ = checkpoint.load(RUN, "vae")  # a discriminator that has not played yet is its own average
    still = {name for name in arrays if name[:6] == "model/" and (arrays[name] == arrays[f"ema/{name[6:]}"]).all()}
    assert "model/discriminator.out.weight" in still and "model/encoder.conv_in.weight" not in still


def test_a_run_that_starts_from_another(tmp_path, monkeypatch, capsys):
    call(monkeypatch, capsys, *TOY, "--steps", 2, "--config", "f8", "--out", "first")
    again = ["--base", "first", "--lr", 1e-9, "--out", "second"]
    monkeypatch.setattr("tinydiff.image.save_png", interrupting(monkeypatch))
    code, *_ = call(monkeypatch, capsys, *TOY, *again)
    assert code == 130
    kept = (tmp_path / "first" / checkpoint.NAME).rename(tmp_path / "kept.npz")
    code, _, err = call(monkeypatch, capsys, "--resume", "second")
    assert code == 0, err
    first, second = (
        {n: a for n, a in checkpoint.load(f, "vae")[0].items() if n[:4] == "ema/"} for f in (kept, "second")
    )
    assert all(np.allclose(first[name], second[name], atol=1e-6) for name in first if "discriminator" not in name)


def test_rows_that_are_done_again_are_replaced(tmp_path):
    logged = runpy.run_path(str(TRAIN))["logged"]
    for step, terms in ((0, {"a": 1.0}), (2, {"a": 0.5}), (4, {"a": 0.25, "b": 8.0}), (2, {"a": 0.75, "b": 4.0})):
        rows = logged(tmp_path / "losses.csv", step, terms)
    assert rows == [{"step": 0, "a": 1.0}, {"step": 2, "a": 0.75, "b": 4.0}]
    assert (tmp_path / "losses.csv").read_text() == "step,a,b\n0,1.0,\n2,0.75,4.0\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "nowhere"], "nowhere is not a folder"),
        (["--kl", -1], "cannot be negative"),
        (["--base", "vae", "--config", "f4"], "leave them out"),
        (["--base", "nowhere"], "there is no checkpoint nowhere"),
        (["--tested", 0], "at least 1, got 0"),
        (["--resume", "runs/none"], "there is no checkpoint"),
    ],
)
def test_bad_input_is_one_line(flags, words, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, *flags)
    assert code == 1 and words in err and len(err.strip().splitlines()) == 1


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
