"""evaluate_manipulations.py: what it measures, on pictures whose answers are known, and the program from end to end."""

import pathlib
import runpy

import numpy as np
import pytest
from PIL import Image

from tests.test_examples_text_to_image import call
from tinydiff import Rng, image
from tinydiff.data.captioned import Shapes
from tinydiff.diffusion import Sampling

EVALUATE = pathlib.Path(__file__).parents[1] / "examples" / "evaluate_manipulations.py"
HOW = Sampling(steps=2)


@pytest.fixture(scope="module")
def names():
    return runpy.run_path(str(EVALUATE))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Varying:
    """Stands in for DALL-E 2: a picture comes back as it is, or upside down; a walk goes straight, at places told."""

    def __init__(self, upside_down=0, places=(0.0, 1.0, 0.5)):
        self.upside_down, self.places = upside_down, places

    def variations(self, x, rng, how):
        turned = np.arange(len(x))[:, None, None, None] % 4 < self.upside_down
        return [x, np.where(turned, x[:, ::-1], x)]

    def bisect(self, ends, rng, how):
        return ((w, None) for w in self.places)

    def interpolate(self, ends, w, rng, how):
        return [np.concatenate([ends[:1] + np.float32(w) * (ends[1:] - ends[:1]) for w in w])]


def test_what_variations_keep(names):
    """Of a scene upside down, colours and sizes stay, and places and some shapes do not."""
    x = image.to_signed(Shapes(number=1).draw(Rng(0), 20, "test")[0])
    same = names["variations"](Varying(), x, 2, Rng(1), HOW)
    assert all(same[name] == 1 for name in names["KEPT"])
    turned = names["variations"](Varying(upside_down=2), x, 4, Rng(1), HOW)
    assert turned["colour"] == 1 and 0.5 <= turned["shape"] < 1 and 0.5 <= turned["place"] < 0.9


def test_the_largest_step(names):
    """A walk in the order of its places; a step of half the way counts a half."""
    ends = np.stack([np.zeros((4, 4, 3)), np.ones((4, 4, 3))]).astype(np.float32)
    frames = names["walk"](Varying(places=(0.0, 1.0, 0.5, 0.75)), ends, 4, Rng(0), HOW)
    np.testing.assert_allclose(frames[:, 0, 0, 0], [0, 0.5, 0.75, 1])
    assert names["largest_step"](frames) == pytest.approx(0.5)
    few = names["walk"](Varying(places=(0.0, 1.0, 0.5, 0.75)), ends, 3, Rng(0), HOW)
    np.testing.assert_allclose(few[:, 0, 0, 0], [0, 0.5, 1])


def test_the_program(monkeypatch, capsys):
    few = ["--n", 2, "--copies", 2, "--pairs", 2, "--frames", 3, "--steps", 2, "--device", "cpu", "--out", "walks"]
    code, out, err = call(monkeypatch, capsys, EVALUATE, *few)
    assert code == 0, err
    assert out.count("\n| one thing | ") == out.count("\n| two things | ") == 2
    for kind in ("one", "two"):
        with Image.open(f"walks/{kind}_thing{'s' if kind == 'two' else ''}.png") as picture:
            assert picture.size == (2 * (34 * 3 - 2), 2 * (34 * 2 - 2)) and np.asarray(picture).std() > 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n", 0], "--n must be at least 1, got 0"),
        (["--frames", 2], "--frames must be at least 3, got 2"),
        (["--decoder", "nowhere"], "there is no checkpoint nowhere"),
    ],
)
def test_bad_input(flags, message, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, EVALUATE, *flags)
    assert code == 1 and message in err
