"""dalle2.py as a person runs it: prompts, with and without the prior, pictures varied, blended, changed; bad input."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from tests.models.test_dalle2 import made, save
from tests.test_examples_text_to_image import call, samples

DRAW = pathlib.Path(__file__).parents[1] / "examples" / "dalle2.py"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a.png", "b.png")):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(name)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The flags that name four small models that nobody trained."""
    model, folder = made("autoregressive"), tmp_path_factory.mktemp("run")
    flags = []
    save(model, folder)
    for name in ("clip", "prior", "decoder", "upsampler"):
        flags += ["--upsamplers" if name == "upsampler" else f"--{name}", folder / name]
    return [*flags, "--steps", 3, "--device", "cpu"]


@pytest.fixture
def draw(parts, monkeypatch, capsys):
    """draw(...): the array that dalle2.py draws with these arguments, ended well."""

    def done(*arguments):
        code, _, err = call(monkeypatch, capsys, DRAW, *arguments, *parts, "--save-array", "x.npz")
        assert code == 0, err
        return samples("x.npz")

    return done


def test_a_prompt(draw, tmp_path):
    drawn = draw("a red star", "--n", 2, "--out", "d/x.png")
    assert drawn.shape == (2, 16, 16, 3) and drawn.min() >= 0 and drawn.max() <= 1 and (drawn[0] != drawn[1]).any()
    for name in ("d/x.png", "d/x_strip.png"):
        with Image.open(name) as picture:
            assert np.asarray(picture).std() > 5
    np.testing.assert_array_equal(draw("a red star", "--n", 2), drawn)
    for other in (
        ["--candidates", 6],
        ["--no-prior"],
        ["--no-prior", "caption"],
        ["--guidance", 5],
        ["--negative", "blue"],
        ["--seed", 1],
    ):
        assert (draw("a red star", "--n", 2, *other) != drawn).any(), other
    assert draw("a red star", "--n", 2, "--no-upsamplers").shape == (2, 8, 8, 3)


def test_pictures_like_one(draw):
    free, near, back = (draw("--vary", "a.png", "--n", 2, *eta) for eta in ([], ["--eta", 1], ["--eta", 0]))
    assert all((pair[0] != pair[1]).any() for pair in (free, near))
    np.testing.assert_allclose(back[0], back[1], atol=1e-5)


@pytest.mark.parametrize("way", [["--to", "b.png"], ["--diff", "a red star", "a blue star"]])
def test_walks(draw, way):
    walk = draw("--vary", "a.png", *way, "--n", 3)
    assert len(walk) == 3 and (walk[0] != walk[1]).any() and (walk[1] != walk[2]).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a PROMPT, or a file of them"),
        (["a", "--vary", "a.png"], "in place of a PROMPT"),
        (["a", "--to", "b.png"], "name it with --vary"),
        (["a", "--eta", 0], "name it with --vary"),
        (["--vary", "a.png", "--eta", 0.5, "--to", "b.png"], "give one of them"),
        (["--vary", "a.png", "--to", "b.png", "--n", 1], "2 images or more from one to another"),
        (["--vary", "a.png", "--to", "b.png", "--n", 101], "at most 100 pictures, got --n 101"),
        (["--vary", "a.png", "--diff", "a", "a"], "equal texts make no difference"),
        (["--vary", "a.png", "--eta", 2], "eta must lie in [0, 1], got 2"),
        (["--vary", "none.png"], "none.png"),
        (["a", "--candidates", 0], "candidates must be at least 1, got 0"),
        (["a", "--steps", 71], "steps must be in 1..70"),
        (["a", "--decoder", "nowhere"], "there is no checkpoint nowhere"),
    ],
)
def test_bad_input_is_one_line(parts, tmp_path, monkeypatch, capsys, arguments, message):
    code, _, err = call(monkeypatch, capsys, DRAW, *parts, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(lines) == 1 and message in lines[0], err
    assert not (tmp_path / "drawn.png").exists()


def test_help_teaches(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, DRAW, "--help")
    assert code == 0 and "python examples/dalle2.py" in out and "--candidates" in out
