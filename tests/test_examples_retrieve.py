"""Searching images as a person does: by a text or an image, in a folder, in scenes, in an index; misused."""

import pathlib
import runpy

import numpy as np
import pytest

from tests.test_examples import ROOT, assert_picture, call
from tinydiff import Rng, checkpoint
from tinydiff.image import save_png
from tinydiff.models.clip import CLIP, CLIPConfig
from tinydiff.nn import TransformerConfig
from tinydiff.train import Training, TrainSettings

RETRIEVE = ROOT / "examples" / "retrieve.py"


def save_model(folder, seed, size=8):
    towers = TransformerConfig(8, 1, 2, 1, causal=True), TransformerConfig(8, 1, 2, 1)
    model = CLIP(CLIPConfig((), 14, *towers, size=size, embedding=8), Rng(seed))
    Training(model, TrainSettings(1), folder / checkpoint.NAME, {}).save()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in: two models, and pictures of one colour and several sizes, one of them in a sub-folder."""
    monkeypatch.chdir(tmp_path)
    save_model(pathlib.Path("run"), 0)
    save_model(pathlib.Path("other"), 1)
    for name, colour, size in (
        ("red", (255, 0, 0), (8, 8)),
        ("blue", (0, 0, 255), (30, 20)),
        ("grey", (9, 9, 9), (4, 90)),
    ):
        save_png(f"pictures/{'deep/' if name == 'grey' else ''}{name}.png", np.full((*size, 3), colour, np.uint8))
    pathlib.Path("pictures/notes.txt").write_text("no picture")
    return tmp_path


def found(out):
    """The names that were printed, in order."""
    return [line.split("  ", 1)[1] for line in out.splitlines()[:-1]]


def test_by_a_text(place, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, RETRIEVE, "a red star", "--model", "run", "--folder", "pictures")
    assert code == 0 and "left out" not in err, err  # notes.txt does not even look like a picture
    assert sorted(found(out)) == ["pictures/blue.png", "pictures/deep/grey.png", "pictures/red.png"]
    cosines = [float(line.split()[0]) for line in out.splitlines()[:-1]]
    assert cosines == sorted(cosines, reverse=True) and "The 3 nearest of 3 images are in retrieved.png" in out
    assert_picture(place / "retrieved.png")


def test_by_an_image_of_any_size(place, monkeypatch, capsys):
    save_png("query.png", np.full((50, 60, 3), (250, 0, 5), np.uint8))
    options = ("--model", "run", "--folder", "pictures", "--k", 1, "--out", "deep/sheet.png")
    code, out, err = call(monkeypatch, capsys, RETRIEVE, "--image", "query.png", *options)
    assert code == 0 and found(out) == ["pictures/red.png"], err
    assert_picture(place / "deep" / "sheet.png")


def test_an_index_is_kept(place, monkeypatch, capsys):
    options = ("a star", "--model", "run")
    _, first, _ = call(monkeypatch, capsys, RETRIEVE, *options, "--folder", "pictures", "--index", "index")
    (place / "pictures" / "red.png").rename(place / "pictures" / "later.png")
    code, second, err = call(monkeypatch, capsys, RETRIEVE, *options, "--index", "index")
    assert code == 1 and "red.png" in err  # the index knows it, but it has gone
    (place / "pictures" / "later.png").rename(place / "pictures" / "red.png")
    code, second, err = call(monkeypatch, capsys, RETRIEVE, *options, "--index", "index")
    assert code == 0 and found(first) == found(second), err


def test_scenes_are_drawn_where_there_is_no_folder(place, monkeypatch, capsys):
    code, out, err = call(monkeypatch, capsys, RETRIEVE, "a red star", "--model", "run", "--k", 3)
    assert code == 0 and "of 2,000 images" in out and all(name.startswith("scene ") for name in found(out)), err
    assert_picture(place / "retrieved.png")
    numbers = [int(name.split()[1]) for name in found(out)]
    program = runpy.run_path(str(RETRIEVE))
    assert program["picture_of"](f"scene {numbers[0]}").shape == (128, 128, 3)


def test_what_cannot_be_read_is_left_out(place, monkeypatch, capsys):
    (place / "pictures" / "broken.png").write_bytes(b"\x89PNG")
    code, out, err = call(monkeypatch, capsys, RETRIEVE, "", "--model", "run", "--folder", "pictures")
    assert code == 0 and len(found(out)) == 3 and "left out: " in err and "broken.png" in err


def test_a_text_that_is_too_long_is_cut(place, monkeypatch, capsys):
    with pytest.warns(UserWarning, match="was cut to 12"):
        code, *_ = call(monkeypatch, capsys, RETRIEVE, "🟥 étoile très rouge", "--model", "run", "--folder", "pictures")
    assert code == 0


def test_refused(place, monkeypatch, capsys):
    """Each bad input gives one line on stderr that says what is wrong, a non-zero exit code, and changes no file."""
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    (place / "empty").mkdir()
    (place / "file").write_text("in the way")
    run = ("--model", "run", "--folder", "pictures")
    assert call(monkeypatch, capsys, RETRIEVE, "a star", *run, "--index", "index")[0] == 0
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    cases = [
        ((), "a text or an --image"),
        (("a star", "--image", "pictures/red.png"), "one of the two"),
        (("a star", "--model", "nowhere"), "there is no checkpoint"),
        (("a star", "--model", "run", "--folder", "empty"), "no image in empty"),
        (("a star", "--model", "run", "--folder", "nowhere"), "no image in nowhere"),
        (("a star", "--model", "other", "--index", "index"), "made by another model"),
        (("a star", "--model", "run", "--index", "nowhere"), "there is no index in nowhere"),
        (("a star", *run, "--index", "file"), "file is not a folder"),
        (("--image", "nowhere.png", *run), "cannot read nowhere.png"),
        (("--image", "pictures/notes.txt", *run), "is not a picture"),
        (("a star", *run, "--k", 0), "--k must be at least 1, got 0"),
        (("a star", *run, "--faiss"), "faiss is not installed"),
        (("a star", *run, "--out", "file/sheet.png"), "file is not a folder"),
    ]
    for arguments, words in cases:
        code, out, err = call(monkeypatch, capsys, RETRIEVE, *arguments)
        case = f"{arguments}: {code} {out} {err}"
        assert code == 1 and words in err and "Traceback" not in err, case
        message = err.split("\r")[-1]  # a progress bar may have been there
        assert message.startswith("error: ") and message.count("\n") == 1, case
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


def test_help_teaches(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, RETRIEVE, "--help")
    assert code == 0 and "python examples/retrieve.py" in out and "default" in out
