"""What the programs that draw prompts share: the prompts, batches, which states are kept, and what is saved."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from tinydiff import Rng, cli, drawing


@pytest.fixture
def options(tmp_path, monkeypatch):
    """options(...): a command line read, in a fresh folder that has a file of prompts."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("p.txt").write_text("a star\n\n  ⭐ \n", encoding="utf-8")
    pathlib.Path("empty.txt").write_text("\n \n")
    parser = cli.parser("A program.")
    drawing.add_flags(parser, guidance=2.5)
    return lambda *flags: parser.parse_args([str(flag) for flag in flags])


def test_the_defaults(options):
    given = options("a star")
    assert (given.guidance, given.sampler, given.negative, given.seed) == (2.5, "ddim", "", 0)
    assert str(given.out) == "drawn.png" and given.save_array is given.steps is given.n is None


@pytest.mark.parametrize(
    ("flags", "prompts"),
    [
        (["a star"], ["a star"] * 8),
        (["", "--n", 2], ["", ""]),
        (["--prompts", "p.txt"], ["a star", "⭐"]),
        (["--prompts", "p.txt", "--n", 2], ["a star", "a star", "⭐", "⭐"]),
    ],
)
def test_one_prompt_a_picture(options, flags, prompts):
    assert drawing.prompts_of(options(*flags)) == drawing.prompts_of(options(*flags), "other") == prompts


def test_where_no_prompt_is_needed(options):
    assert drawing.prompts_of(options("--n", 2), "") == ["", ""]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give a PROMPT"),
        (["a", "--prompts", "p.txt"], "not both"),
        (["a", "--n", 0], "at least 1, got 0"),
        (["--prompts", "empty.txt"], "empty.txt has no prompts"),
    ],
)
def test_bad_prompts(options, flags, message):
    with pytest.raises(ValueError, match=message):
        drawing.prompts_of(options(*flags))


def test_where_nothing_can_be_written(options):
    drawing.check_outputs(options("a", "--out", "new/x.png", "--save-array", "new/x.npz"))
    for flag in ("--out", "--save-array"):
        with pytest.raises(OSError, match=r"p\.txt"):
            drawing.check_outputs(options("a", flag, "p.txt/x"))


def test_batches_are_drawn_each_from_its_own_stream():
    asked = []

    def draw(prompts, rng, what):
        asked.append((prompts, what))
        noise = rng.normal((len(prompts), 2, 2, 3))
        return [0 * noise, noise]

    drawn = drawing.draw_all(list("abcde"), 7, draw, batch=2)
    assert asked == [(["a", "b"], "batch 1 of 3"), (["c", "d"], "batch 2 of 3"), (["e"], "batch 3 of 3")]
    expected = [Rng(7).at(i).normal((n, 2, 2, 3)) for i, n in enumerate((2, 2, 1))]
    np.testing.assert_array_equal(drawn.pictures, np.concatenate(expected))
    np.testing.assert_array_equal(drawn.way, [0 * expected[0], expected[0]])


@pytest.mark.parametrize(
    ("states", "total", "kept"),
    [
        (51, 51, [0, 7, 14, 21, 29, 36, 43, 50]),
        (8, 8, [*range(8)]),
        (3, 3, [0, 1, 2]),
        (1, 1, [0]),
        (3, 1, [2]),
        (4, 10, [0, 1, 3, 3]),
    ],
)
def test_some_states_and_always_the_last(states, total, kept):
    assert drawing.evenly_spaced(iter(range(states)), total, "states") == kept


def test_no_states():
    with pytest.raises(ValueError, match="at least one state"):
        drawing.evenly_spaced([], 3, "states")


def test_what_is_saved(options, capsys):
    pictures = Rng(0, device="cpu").uniform((3, 4, 4, 3)) * 2 - 1
    drawing.save(options("a", "--out", "x.png", "--save-array", "x.npz"), drawing.Drawn(pictures, [-pictures] * 2))
    with np.load("x.npz") as file:
        np.testing.assert_allclose(file["samples"], (pictures + 1) / 2)
    for name, columns, rows in (("x.png", 3, 1), ("x_strip.png", 2, 3)):
        with Image.open(name) as picture:
            assert picture.size == (3 * (6 * columns - 2), 3 * (6 * rows - 2))
    assert "3 pictures in x.png" in capsys.readouterr().out
