"""Linear: y = x W + b along the last axis."""

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.nn import reference
from tests.nn.common import draw, layer_gradcheck, randomised, run
from tinydiff.nn import Linear
from tinydiff.rng import Rng

SHAPES = [(3,), (1, 3), (5, 3), (2, 1, 4, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_the_matrix_product(shape, device):
    x = draw(*shape)
    y, weights = run(randomised(Linear(3, 5, Rng())), x)
    assert_close(y, reference.linear(x, weights), rtol=1e-13)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape, device):
    assert layer_gradcheck(randomised(Linear(3, 5, Rng())), draw(*shape)) <= 1e-6


def test_without_a_bias(device):
    x, layer = draw(4, 3), randomised(Linear(3, 5, Rng(), bias=False))
    y, weights = run(layer, x)
    assert list(weights) == ["weight"]
    assert_close(y, x @ weights["weight"], rtol=1e-13)
    assert layer_gradcheck(layer, x) <= 1e-6


def test_it_starts_with_outputs_of_unit_variance_and_no_bias():
    layer = Linear(400, 300, Rng(5))
    y = layer(draw(200, 400, dtype=np.float32))
    assert y.dtype == np.float32
    assert abs(y.data.std() - 1) < 0.02 and abs(layer.weight.data.std() * 20 - 1) < 0.02
    assert not layer.bias.data.any()
    assert abs(Linear(400, 300, Rng(5), scale=0.5)(draw(200, 400, dtype=np.float32)).data.std() - 0.5) < 0.01
    assert not Linear(4, 3, Rng(), zero=True)(draw(2, 4, dtype=np.float32)).data.any()


def test_an_input_of_the_wrong_width_is_refused():
    with pytest.raises(ValueError, match=r"linear\(\(2, 4\), \(3, 5\).*3 rows, got 4"):
        Linear(3, 5, Rng())(draw(2, 4, dtype=np.float32))
