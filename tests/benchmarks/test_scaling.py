"""The fit of the exponent, the points and the figure."""

import pytest
from PIL import Image

from tests.benchmarks import scaling


@pytest.mark.parametrize("a", [0.5, 1.0, 1.7])
def test_the_fit_is_exact_on_a_power_law(a):
    x = [3, 10, 40]
    assert scaling.exponent(x, [0.01 * value**a for value in x]) == pytest.approx(a, abs=1e-12)


def test_sizes_count_in_pixels():
    assert scaling.amounts("size") == [n**2 for n in scaling.POINTS["size"]]
    assert scaling.amounts("batch") == list(scaling.POINTS["batch"])


def test_every_point_varies_one_thing():
    assert set(scaling.POINTS) == set(scaling.SMALL) == set(scaling.LABELS)


def test_it_measures_prints_and_draws(monkeypatch, tmp_path, capsys):
    """With a machine on which the time is in proportion to the batch, to the width and to the pixels."""
    monkeypatch.setattr(scaling, "FIGURE", tmp_path / "scaling.png")
    monkeypatch.setattr(
        scaling, "seconds_of", lambda point, repeats: 1e-6 * point["batch"] * point["base"] * point["size"] ** 2
    )
    scaling.main()
    assert capsys.readouterr().out.count("exponent 1.00") == 3
    with Image.open(tmp_path / "scaling.png") as picture:
        assert picture.width > 600 and len(picture.convert("L").getcolors()) > 50


def test_a_point_is_measured(monkeypatch):
    assert scaling.seconds_of({"batch": 2, "size": 8, "base": 8}, repeats=1) > 0
