"""What the training programs share: which run the flags ask for, and its training from any step to the last."""

import pathlib
import shlex
import shutil
import signal
from dataclasses import dataclass

import numpy as np
import pytest

from tinydiff import Rng, Tensor, checkpoint, cli, image, program
from tinydiff.checkpoint import CheckpointError
from tinydiff.models import CLIP, CLIPConfig, told_texts
from tinydiff.nn import Linear, Module, TransformerConfig
from tinydiff.train import TrainSettings


@dataclass(frozen=True)
class Recipe:
    data: str = "embedded"
    steps: int = 6
    batch_size: int = 4
    lr: float = 0.01
    width: int = 3
    seed: int = 0

    def settings(self):
        return TrainSettings(self.steps, self.lr, warmup=2)


@dataclass(frozen=True)
class Config:
    width: int


class Toy(Module):
    """A linear map to fit to zero."""

    kind = "toy"

    def __init__(self, width):
        self.config = Config(width)
        self.linear = Linear(width, 1, Rng(1))


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """The run that these flags ask for, in a fresh folder."""
    monkeypatch.chdir(tmp_path)
    parser = cli.parser("A program.")
    parser.add_argument("--data")
    parser.add_argument("--recipe")
    program.add_training_flags(parser, Recipe(), "images")
    program.add_run_flags(parser, "runs/toy", "steps between samples")

    def asked(*flags, usual=Recipe()):
        return program.start_or_resume(parser.parse_args(map(str, flags)), usual, "runs/toy", "toy")

    asked.help = parser.format_help
    return asked


def fit(run, stop_at=None, **options):
    """Train a run, with Ctrl-C at a preview if there is one; gives the training and the steps that were previewed."""
    model, seen = Toy(run.recipe.width), []

    def loss_at(step, rng, share):
        y = model.linear(Tensor(rng.normal((4, model.config.width))))
        return (y * y).mean()

    def preview(step):
        seen.append(step)
        if step == stop_at:
            signal.raise_signal(signal.SIGINT)

    how = {"what": "some images", "unit": "images"} | options
    return program.fit(run, model, loss_at, Rng(run.recipe.seed), "toy.py", preview=preview, **how), seen


def test_a_new_run_takes_the_given_flags_and_the_rest_of_the_recipe(ask):
    run = ask("--lr", 0.5, "--steps", 9, "--device", "cpu", "--save-every", 1, usual=Recipe(width=7))
    assert run.recipe == Recipe(lr=0.5, steps=9, width=7)
    assert run.folder == pathlib.Path("runs/toy") and run.folder.is_dir() and run.saved is None
    assert ask("--out", "other").folder == pathlib.Path("other")
    assert ask().recipe == Recipe()


def test_a_folder_of_data_is_found_from_anywhere(ask, tmp_path):
    (tmp_path / "mine").mkdir()
    assert ask("--data", "mine").recipe.data == str(tmp_path / "mine")
    assert ask("--data", "full").recipe.data == "full"


def test_help_has_the_defaults_of_the_recipe(ask):
    text = " ".join(ask.help().split())
    for words in (
        "gradient steps (default: 6)",
        "images a step (default: 4)",
        "default: 0.01",
        "or a new runs/toy-2",
    ):
        assert words in text
    assert "steps between samples" in text


def test_minutes_exclude_steps(ask, capsys):
    with pytest.raises(SystemExit):
        ask("--steps", 1, "--minutes", 1)
    assert "not allowed with" in capsys.readouterr().err


def test_training_says_what_it_does_and_leaves_all_in_the_folder(ask, capsys):
    training, seen = fit(ask("--steps", 20))
    assert capsys.readouterr().out == "some images, 4 parameters, device cpu, starting; the run is in runs/toy\n"
    assert seen == list(range(0, 21, 2)) and training.step == 20
    assert {path.name for path in pathlib.Path("runs/toy").iterdir()} == {checkpoint.NAME, "loss.png"}
    assert checkpoint.load("runs/toy", "toy")[1]["about"] == vars(Recipe(steps=20))


@pytest.mark.parametrize(
    ("flags", "previews", "seen"),
    [((), 3, [0, 2, 4, 6]), ((), 10, list(range(7))), (("--sample-every", 4), 3, [0, 4, 6]),
     (("--sample-every", 0), 3, [0, 6])],
)  # fmt: skip
def test_previews(ask, flags, previews, seen):
    assert fit(ask(*flags), previews=previews)[1] == seen


@pytest.mark.parametrize("flags", [("--resume",), ("--resume", "runs/toy"), ("--resume", "runs/toy/checkpoint.npz")])
def test_resumed_it_ends_in_the_same_bits(ask, capsys, flags):
    whole, _ = fit(ask("--out", "whole", "--lr", 0.02))
    with pytest.raises(KeyboardInterrupt) as stop:
        fit(ask("--lr", 0.02, "--sample-every", 1), stop_at=2)
    assert shlex.split(str(stop.value).splitlines()[-1])[1:] == ["toy.py", "--resume", "runs/toy"]
    capsys.readouterr()
    run = ask(*flags, "--device", "cpu", "--sample-every", 1, "--save-every", 0)
    assert run.recipe == Recipe(lr=0.02)
    resumed, seen = fit(run)
    assert "going on after step 3" in capsys.readouterr().out and seen == [4, 5, 6]
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    np.testing.assert_array_equal(resumed.optimiser.vector, whole.optimiser.vector)


def test_minutes_become_steps(ask):
    training, _ = fit(ask("--minutes", 1e-4, usual=Recipe(steps=4321)))
    about = checkpoint.load("runs/toy", "toy")[1]["about"]
    assert 4321 != training.step == training.settings.steps == about["steps"] >= 1
    with pytest.raises(ValueError, match="more than 0, got -1"):
        fit(ask("--minutes", -1))
    with pytest.raises(ValueError, match="at least 0, got 1 and -2"):
        fit(ask("--save-every", -2))


def test_the_progress_bar_counts_in_the_programs_unit(ask, capsys):
    fit(ask(), unit="sounds")
    assert "sounds/s" in capsys.readouterr().err


def test_refused(ask):
    fit(ask("--steps", 1))
    arrays, meta = checkpoint.load("runs/toy", "toy")
    checkpoint.save("other.npz", arrays, meta | {"kind": "other"})
    checkpoint.export("runs/toy", "exported.npz")
    pathlib.Path("file").write_text("in the way")
    shutil.copy("runs/toy/checkpoint.npz", "copy.npz")
    for flags, error, words in (
        (("--out", "runs/toy"), ValueError, "holds a run already"),
        (("--out", "file/run"), OSError, "file is not a folder"),
        (("--resume", "--lr", 1, "--batch-size", 2), ValueError, "leave out --batch-size, --lr, or start a new run"),
        (("--resume", "--recipe", "a"), ValueError, "leave out --recipe"),
        (("--resume", "--minutes", 0), ValueError, "leave out --minutes"),
        (("--resume", "--out", "new"), ValueError, "leave out --out"),
        (("--resume", "nowhere"), CheckpointError, "there is no checkpoint nowhere"),
        (("--resume", "other.npz"), CheckpointError, "expected 'toy', got 'other'"),
        (("--resume", "exported.npz"), CheckpointError, "was exported"),
        (("--resume", "copy.npz"), OSError, "copy.npz is not a folder"),
    ):
        with pytest.raises(error, match=words):
            ask(*flags)


# ------------------------------------------------------------------------------- what is looked up before


def test_captions_and_pictures_are_encoded_piece_by_piece():
    text, seen = TransformerConfig(8, 1, 2, causal=True), TransformerConfig(8, 1, 2)
    clip = CLIP(CLIPConfig(length=12, text=text, image=seen, embedding=8), Rng(1))
    captions = ["a star", "", "a ring", "a box", "two"]
    states, mask = program.encoded_texts(clip, captions, batch=2)
    told = told_texts(clip, captions)
    assert states.dtype == np.float16
    np.testing.assert_allclose(states, told.states, atol=2e-3)
    np.testing.assert_array_equal(mask, told.mask)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    z_i = program.encoded_images(clip, pixels, batch=2)
    assert z_i.dtype == np.float32
    np.testing.assert_allclose(z_i, clip.image_embedding(image.to_signed(pixels)), atol=1e-5)
