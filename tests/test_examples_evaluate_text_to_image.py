"""evaluate_text_to_image.py: its table for a model that draws nothing right, and bad input."""

import pathlib
import runpy

import pytest

from tests.test_examples_text_to_image import assert_picture, call, run  # noqa: F401
from tinydiff import Rng
from tinydiff.data.shape_captions import parse
from tinydiff.data.shapes import HELD_OUT

EVALUATE = pathlib.Path(__file__).parents[1] / "examples" / "evaluate_text_to_image.py"


def test_the_table(run, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    flags = ["--run", run, "--n", 6, "--steps", 2, "--guidance", "1,2.5", "--out", "scores", "--device", "cpu"]
    code, out, err = call(monkeypatch, capsys, EVALUATE, *flags)
    assert code == 0, err
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 * 5 and "guidance 2.5" in out
    by_name = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    names = by_name[""]
    one, two = by_name["one thing"], by_name["two things"]
    assert one[names.index("relation")] == "" and one[names.index("place")].endswith("%")
    assert two[names.index("place")] == "" and two[names.index("relation")].endswith("%")
    assert float(one[0].rstrip("%")) < 50
    for name in ("one_thing", "two_things", "one_thing_new_pair", "two_things_new_pair", "guidance"):
        assert (tmp_path / "scores" / f"{name}.png").stat().st_size > 5000


def test_the_kinds_of_prompts():
    """One thing or two, and a pair that training never sees where the name says so."""
    for name, (source, split) in runpy.run_path(str(EVALUATE))["KINDS"].items():
        for prompt in source.draw(Rng(0), 20, split)[1]:
            things = parse(prompt).things
            assert len(things) == (1 if name.startswith("one") else 2)
            assert any((t.shape, t.colour) in HELD_OUT for t in things) == name.endswith("new pair")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--n", 0], "--n must be at least 1, got 0"), (["--run", "nowhere"], "there is no checkpoint nowhere")],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(monkeypatch, capsys, EVALUATE, *arguments)
    assert code == 1 and err.startswith("error: ") and message in err and err.count("\n") == 1
