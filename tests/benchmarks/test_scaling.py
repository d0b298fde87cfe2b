"""The fit of the exponent, the points and the figure."""

import pytest
from PIL import Image

from tests.benchmarks import scaling
from tests.benchmarks.side import Side


@pytest.mark.parametrize("a", [0.5, 1.0, 1.7])
def test_the_fit_is_exact_on_a_power_law(a):
    x = [3, 10, 40]
    assert scaling.exponent(x, [0.01 * value**a for value in x]) == pytest.approx(a, abs=1e-12)


def test_sizes_count_in_pixels():
    assert scaling.amounts("size") == [n**2 for n in scaling.POINTS["size"]]
    assert scaling.amounts("batch") == list(scaling.POINTS["batch"])


def test_every_point_varies_one_thing():
    assert set(scaling.POINTS) == set(scaling.SMALL) == set(scaling.LABELS)


class Fake:
    """A side whose machine takes time in proportion to the batch, to the width and to the pixels."""

    def __init__(self, task):
        a = task.arguments
        self.seconds = 1e-6 * a["batch"] * a["config"].base * a["size"] ** 2

    def __enter__(self):
        return self

    def __exit__(self, *error): ...

    def go(self, count):
        return self.seconds, 0.0


def test_it_measures_prints_and_draws(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling, "FIGURE", tmp_path / "scaling.png")
    monkeypatch.setattr(scaling, "Side", Fake)
    monkeypatch.setattr("tests.benchmarks.timing.REST", 0)
    scaling.main()
    assert capsys.readouterr().out.count("exponent 1.00, of the last two points 1.00") == 3
    with Image.open(tmp_path / "scaling.png") as picture:
        assert picture.width > 600 and len(picture.convert("L").getcolors()) > 50


def test_a_point_is_a_training_step():
    with Side(scaling.task({"batch": 2, "size": 8, "base": 8})) as side:
        assert side.go()[1] > 0
