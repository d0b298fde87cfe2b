"""evaluate.py and trilemma.py at toy size: their tables and pictures, going on, and bad input."""

import dataclasses
import pathlib
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from tinydiff import Rng, checkpoint
from tinydiff.data import mnist
from tinydiff.models import Classifier, ClassifierConfig, PixelDiffusion, PixelDiffusionConfig
from tinydiff.nn import UNetConfig

EVALUATE, TRILEMMA = (pathlib.Path(__file__).parents[1] / "examples" / f"{n}.py" for n in ("evaluate", "trilemma"))


def save(path, model):
    """Write a model as a training run does, with random weights."""
    arrays = checkpoint.prefixed("ema", model.state_dict())
    checkpoint.save(path, arrays, {"kind": model.kind, "config": dataclasses.asdict(model.config)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small classifier and two small diffusion models, one that knows classes."""
    folder = tmp_path_factory.mktemp("models")
    unet = UNetConfig(base=4, multipliers=(1,), blocks=1, attention=(), groups=2, patch=4)
    save(folder / "judge.npz", Classifier(ClassifierConfig(width=8, features=6), Rng(0)))
    save(folder / "plain.npz", PixelDiffusion(PixelDiffusionConfig(unet, T=20), Rng(0)))
    labelled = dataclasses.replace(unet, classes=10)
    config = PixelDiffusionConfig(labelled, T=20, class_names=tuple("0123456789"))
    save(folder / "labelled.npz", PixelDiffusion(config, Rng(0)))
    return folder


@pytest.fixture
def call(folder, tmp_path, monkeypatch, capsys):
    """Run an example in this process, in an empty folder: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYDIFF_DEVICE", "cpu")

    def run(script, *arguments):
        line = [str(script), "--classifier", str(folder / "judge.npz"), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(script), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    return run


def table(out):
    """The printed table: its rows by their first cell."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in cells}


def assert_picture(path):
    with Image.open(path) as picture:
        assert np.asarray(picture.convert("L")).std() > 5


# ----------------------------------------------------------------------------------------------- evaluate.py


def test_evaluate_a_model(folder, call):
    arguments = ("--n", 30, "--steps", 2, "--batch-size", 20, "--out", "near.png")
    code, out, _ = call(EVALUATE, folder / "labelled.npz", *arguments)
    assert code == 0 and "30 samples and 30 test images" in out
    rows = table(out)
    assert rows[""] == ["samples", "real test images"]
    assert all(len(cells) == 2 and all(cells) for cells in rows.values())
    assert rows["nearer to one than a test image is (copies)"][1].startswith("50.0%")
    assert float(rows["Fréchet distance"][0]) > 2 * float(rows["Fréchet distance"][1])
    assert_picture("near.png")
    assert call(EVALUATE, folder / "labelled.npz", *arguments)[1] == out
    assert table(call(EVALUATE, folder / "plain.npz", *arguments)[1])["show the class asked for"][0] == ""


def test_of_a_sorted_file_all_kinds_are_measured(call, tmp_path):
    """Black images first, then white ones: --n of them are both, and no distance is that of black alone."""
    kinds = [np.zeros((60, 28, 28), np.float32), np.ones((60, 28, 28), np.float32)]
    rows = {}
    for name, samples in (("black", kinds[0]), ("sorted", np.concatenate(kinds))):
        np.savez(tmp_path / f"{name}.npz", samples=samples)
        rows[name] = table(call(EVALUATE, f"{name}.npz", "--n", 30)[1])
    assert rows["black"]["Fréchet distance"][0] != rows["sorted"]["Fréchet distance"][0]


def test_evaluate_an_array(call):
    """Of the samples 25 are training images, which is found out and shown; the labels are those of the file."""
    digits = mnist.load("embedded", "train")
    chosen = np.arange(0, 4500, 100)
    samples = (digits.images[chosen] / 255).astype(np.float32)
    samples[25:] = np.random.default_rng(0).uniform(size=samples[25:].shape)
    np.savez("s.npz", samples=samples, labels=digits.labels[chosen])
    code, out, _ = call(EVALUATE, "s.npz")
    rows = table(out)
    assert code == 0 and "45 samples and 45 test images" in out
    assert rows["nearer to one than a test image is (copies)"][0].startswith("55.6%")  # 25 of 45
    assert rows["show the class asked for"][0]
    with Image.open("nearest.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (2 * (4 * 30 - 2), 2 * (10 * 30 - 2)) and pixels.std() > 5
    for top in (0, 120):  # above each copy the image that it is of
        assert np.array_equal(pixels[top : top + 56], pixels[top + 60 : top + 116])


@pytest.mark.slow
def test_what_a_classifier_learns_from_samples(call):
    digits = mnist.load("embedded", "train")
    chosen = np.arange(0, 4500, 10)
    np.savez("s.npz", samples=digits.images[chosen] / 255, labels=digits.labels[chosen])
    rows = table(call(EVALUATE, "s.npz", "--train-on-samples")[1])
    taught = [float(cell.rstrip("%")) for cell in rows["test images read after training on them"]]
    assert taught[0] > 80 and taught[1] > taught[0]  # the test images learn themselves by heart


def test_evaluate_refuses(folder, call):
    np.savez("bright.npz", samples=np.full((30, 28, 28), 2.0))
    np.savez("flat.npz", samples=np.zeros((30, 784)))
    np.savez("short.npz", samples=np.zeros((30, 28, 28)), labels=np.zeros(29, int))
    np.savez("few.npz", samples=np.zeros((5, 28, 28)))
    np.savez("text.npz", samples=np.full((30, 28, 28), "a"))
    np.savez("thirds.npz", samples=np.zeros((30, 28, 28)), labels=np.arange(30) / 3)
    small = ClassifierConfig(size=(8, 8), width=8, features=6)
    save(pathlib.Path("small_judge.npz"), Classifier(small, Rng(0)))
    np.savez("small.npz", samples=np.zeros((30, 8, 8)))
    pathlib.Path("text").write_text("not an array")
    cases = [
        (("none",), "there is no checkpoint none"),
        (("text",), "is not a checkpoint"),
        (("bright.npz",), "in [0, 1]"),
        (("flat.npz",), "expected samples (N, H, W)"),
        (("few.npz",), "at least 20 images of each, got 5 samples"),
        (("text.npz",), "floats in [0, 1], got <U1"),
        (("thirds.npz",), "a label >= 0 for each of 30 samples, got float64"),
        ((folder / "plain.npz", "--classifier", "small_judge.npz"), "the classifier reads (8, 8)"),
        (("short.npz",), "a label >= 0 for each of 30 samples, got int64 (29,)"),
        (
            ("small.npz",),
            "the sizes differ: the classifier reads (28, 28), --data has (28, 28), the samples have (8, 8)",
        ),
        ((folder / "judge.npz",), "expected 'pixel-diffusion', got 'classifier'"),
        ((folder / "plain.npz", "--n", 19), "--n must be at least 20"),
        ((folder / "plain.npz", "--batch-size", 0), "--batch-size 1, got 500 and 0"),
        ((folder / "plain.npz", "--steps", 21), "1..20"),
        ((folder / "plain.npz", "--guidance", 2, "--n", 20), "trained without labels"),
        ((folder / "plain.npz", "--data", "nowhere"), "'nowhere' is not a folder"),
        ((folder / "plain.npz", "--n", 20, "--steps", 1, "--train-on-samples"), "drawn without classes"),
    ]
    for arguments, words in cases:
        code, _, err = call(EVALUATE, *arguments)
        assert code == 1 and words in err, (arguments, err)


# ----------------------------------------------------------------------------------------------- trilemma.py


def test_trilemma(folder, call):
    arguments = ("--gan-steps", 2, "--vae-steps", 2, "--n", 20, "--diffusion", folder / "plain.npz")
    code, out, _ = call(TRILEMMA, *arguments)
    assert code == 0
    rows = table(out)
    assert list(rows)[2:] == ["GAN", "VAE", "diffusion, 10 steps", "diffusion, 20 steps"]
    assert [rows[name][3] for name in list(rows)[2:]] == ["1", "1", "10", "20"]
    for name in ("gan/samples_000000.png", "gan/samples_000002.png", "vae/samples_000002.png"):
        assert_picture(pathlib.Path("runs") / name)
    for name in ("samples.png", "triangle.png"):
        assert_picture(pathlib.Path("runs/trilemma") / name)
    assert len(checkpoint.load("runs/gan", "gan")[0]["losses"]) == 2

    before = pathlib.Path("runs/gan/checkpoint.npz").read_bytes()
    code, again, _ = call(TRILEMMA, *arguments, "--gan", "runs/gan", "--vae", "runs/vae")
    assert code == 0 and pathlib.Path("runs/gan/checkpoint.npz").read_bytes() == before
    measured = [[cells[:2] + cells[3:] for cells in table(text).values()] for text in (out, again)]
    assert measured[0] == measured[1]  # all but the time


def test_trilemma_goes_on(folder, call):
    """A run that was stopped is trained to its end, and one that is at its end is left alone."""
    arguments = ("--gan-steps", 3, "--vae-steps", 2, "--n", 20, "--diffusion", folder / "plain.npz")
    call(TRILEMMA, *arguments)
    whole = checkpoint.load("runs/gan", "gan")
    stopped = {name: a[:1] if name == "losses" else a for name, a in whole[0].items()}  # as if after step 1
    checkpoint.save("half/checkpoint.npz", stopped, whole[1])
    code, out, _ = call(TRILEMMA, *arguments, "--gan", "half", "--vae", "runs/vae")
    assert code == 0 and "gan: " in out and "digit-vae: " not in out
    assert len(checkpoint.load("half", "gan")[0]["losses"]) == 3


def test_trilemma_goes_on_with_the_flags_it_was_given(monkeypatch):
    """The command that is printed when the training of GAN or VAE is stopped."""
    flags = ["--data", "full", "--gan-steps", "3", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["trilemma.py", *flags, "--gan", "a", "--vae", "b"])
    program = runpy.run_path(str(TRILEMMA))
    assert [str(item) for item in program["given"](program["parse"]())] == flags


def test_trilemma_refuses(folder, call):
    save(pathlib.Path("small_judge.npz"), Classifier(ClassifierConfig(size=(8, 8), width=8, features=6), Rng(0)))
    cases = [
        (("--n", 10), "--n must be at least 20, got 10"),
        (("--diffusion", "none"), "there is no checkpoint none"),
        (("--data", "nowhere"), "'nowhere' is not a folder"),
        (("--gan", folder / "judge.npz"), "expected 'gan', got 'classifier'"),
        (("--classifier", "small_judge.npz"), "images of (28, 28), but --classifier has (8, 8)"),
        (("--gan-steps", 0), "at least 1, got 0"),
    ]
    for arguments, words in cases:
        code, _, err = call(TRILEMMA, "--diffusion", folder / "plain.npz", *arguments)
        assert code == 1 and words in err, (arguments, err)
