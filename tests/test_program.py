"""What the training programs share: which run the flags ask for, and its training from any step to the last."""

import pathlib
import runpy
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.models.common import texts
from tinydiff import Rng, Tensor, backend, checkpoint, cli, image, program
from tinydiff.checkpoint import CheckpointError
from tinydiff.models import CLIP, CLIPConfig, Condition, told_captions, told_texts
from tinydiff.nn import Linear, Module, TransformerConfig
from tinydiff.train import TrainSettings
from tinydiff.workers import Share


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


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--batch-size", 0), "--batch-size must be at least 1, got 0"),
        (("--steps", 0), "steps must be at least 1, got 0"),
        (("--lr", -1), "cannot be negative"),
    ],
)
def test_what_nothing_can_be_trained_by_is_refused_at_once(ask, flags, words):
    with pytest.raises(ValueError, match=words):
        ask(*flags)
    assert not pathlib.Path("runs").exists()


# ---------------------------------------------------------------------------------------- what recipes share


@dataclass(frozen=True)
class Sizes:
    """A recipe with a field of each type."""

    data_of: str = "shapes"
    pictures: int = 20_000
    share: float = 0.5

    def __post_init__(self):
        program.at_least_1(self, "pictures")


def test_a_flag_has_the_type_and_the_default_of_the_recipe():
    parser = cli.parser("A program.")
    for name in ("--data-of", "--pictures", "--share"):
        program.add_flag(parser, Sizes(), name, "what it is", metavar="RUN" if name == "--data-of" else None)
    assert vars(parser.parse_args([])) == {"data_of": None, "pictures": None, "share": None}
    given = vars(parser.parse_args(["--data-of", "1", "--pictures", "2", "--share", "3"]))
    assert given == {"data_of": "1", "pictures": 2, "share": 3.0} and isinstance(given["share"], float)
    text = " ".join(parser.format_help().split())
    for words in ("RUN what it is (default: shapes)", "N what it is (default: 20,000)", "X what it is (default: 0.5)"):
        assert words in text


def test_numbers_below_1_are_refused_by_the_name_of_their_flag():
    with pytest.raises(ValueError, match="--pictures must be at least 1, got 0"):
        Sizes(pictures=0)
    assert Sizes(pictures=1).pictures == 1


def test_the_command_to_export_a_run(ask, monkeypatch):
    fit(ask("--out", "my run", "--steps", 1))
    words = shlex.split(program.export_command(pathlib.Path("my run"), "small.npz"))
    assert words[:3] == ["python", "-m", "tinydiff"]
    monkeypatch.setattr(sys, "argv", words[2:])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("tinydiff", run_name="__main__")
    assert not stop.value.code and checkpoint.kind_of("small.npz") == "toy"


# --------------------------------------------------------------------------------------- what draws a text


@pytest.fixture(scope="module")
def clip():
    text, seen = TransformerConfig(8, 1, 2, causal=True), TransformerConfig(8, 1, 2)
    return CLIP(CLIPConfig(length=12, text=text, image=seen, embedding=8), Rng(1))


CAPTIONS = ["a star", "", "a ring", "a box", "two"]


@pytest.mark.parametrize("read", [told_texts, told_captions])
def test_captions_are_encoded_piece_by_piece(clip, read):
    found, told = program.encoded_texts(clip, CAPTIONS, read, batch=2), read(clip, CAPTIONS)
    assert found.states.dtype == np.float16
    np.testing.assert_allclose(found.states, told.states, atol=2e-3)
    np.testing.assert_array_equal(found.mask, told.mask)
    assert (found.vector is None) == (read is told_texts) and found.shown is None
    if found.vector is not None:
        assert found.vector.dtype == np.float32
        np.testing.assert_allclose(found.vector, told.vector, atol=1e-6)


def test_pictures_are_encoded_piece_by_piece(clip):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    z_i = program.encoded_images(clip, pixels, batch=2)
    assert z_i.dtype == np.float32
    np.testing.assert_allclose(z_i, clip.image_embedding(image.to_signed(pixels)), atol=1e-5)


def test_what_is_stored_is_made_ready_on_the_device(device):
    told = texts(3)
    kept = program.stored(told)
    assert isinstance(kept.states, np.ndarray) and kept.states.dtype == np.float16 and kept.vector is None
    again = program.ready(kept)
    assert backend.device_of(again.states) == backend.device() and again.states.dtype == np.float32
    assert_close(again.states, backend.to_numpy(told.states), atol=2e-3)
    np.testing.assert_array_equal(backend.to_numpy(again.mask), backend.to_numpy(told.mask))
    assert program.ready(program.stored(Condition())) == Condition()


class Numbers:
    """In place of a model: it draws what it is given, and its loss is none."""

    loss_of = None

    def draw(self, x_0, rng, told, empty):
        return x_0[:, 0, 0, 0], told.states[:, 0, 0], told.vector[:, 0]


def test_a_loss_keeps_together_what_belongs_together():
    """Over an epoch each thing is seen once, with what is told of it, in another order than the data's."""
    n = 1040
    x = np.arange(n, dtype=np.float32)
    told = Condition(x[:, None, None].astype(np.float16), np.ones((n, 1), bool), x[:, None])
    loss = program.told_loss(Numbers(), x[:, None, None, None], told, Condition(), 40, Rng(0))
    drawn = [loss.draw(step, Rng(1), Share()) for step in range(1, n // 40 + 1)]
    things, states, vectors = (np.concatenate(arrays) for arrays in zip(*drawn, strict=True))
    np.testing.assert_array_equal(things, states)
    np.testing.assert_array_equal(things, vectors)
    assert sorted(things) == list(range(n)) and list(things) != list(range(n))
    halves = [loss.draw(3, Rng(1), Share(i, 2))[0] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(halves), things[80:120])


def test_a_loss_takes_pixels_and_what_is_told_nothing(device):
    class Seen(Numbers):
        def draw(self, x_0, rng, told, empty):
            return x_0, told, empty

    pixels = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    loss = program.told_loss(Seen(), pixels, Condition(), Condition(), 6, Rng(0))
    x_0, told, _ = loss.draw(1, Rng(1), Share())
    order = Rng(0).at(0).permutation(6)
    assert_close(x_0, image.to_signed(pixels[order]))
    assert backend.device_of(x_0) == backend.device() and told == Condition()
    with pytest.raises(ValueError, match=r"batch size must be 1\.\.6"):
        program.told_loss(Seen(), pixels, Condition(), Condition(), 7, Rng(0))
    with pytest.raises(ValueError, match="arrays of one length"):
        program.told_loss(Seen(), pixels, program.stored(texts(5)), Condition(), 4, Rng(0))


def test_things_are_drawn_some_at_a_time(device):
    seen = []

    def draw(some, rng):
        seen.append((some, rng))
        x = backend.to_device(np.arange(7.0)[some])
        yield x * 0
        yield x

    drawn = program.drawn(draw, 7, Rng(2), batch=3)
    assert isinstance(drawn, np.ndarray)
    np.testing.assert_array_equal(drawn, np.arange(7.0))
    assert [some for some, _ in seen] == [slice(0, 3), slice(3, 6), slice(6, 9)]
    for i, (_, rng) in zip((0, 3, 6), seen, strict=True):
        assert_close(rng.normal((2,)), backend.to_numpy(Rng(2).at(i).normal((2,))))


@pytest.mark.parametrize("n", [3, 1001])
def test_pictures_are_made_smaller_by_the_mean(n):
    images = np.random.default_rng(0).integers(0, 256, (n, 4, 8, 3), dtype=np.uint8)
    small = program.made_smaller(images, 2)
    assert small.shape == (n, 2, 4, 3) and small.dtype == np.uint8
    means = images.reshape(n, 2, 2, 4, 2, 3).mean(axis=(2, 4))
    assert np.abs(small - means).max() <= 0.51
    assert program.made_smaller(images, 4) is images
    for size in (3, 8):
        with pytest.raises(ValueError, match=f"--size must divide that of the pictures, 4 x 8, got {size}"):
            program.made_smaller(images, size)
