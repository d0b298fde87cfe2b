"""Conv2d, Downsample and Upsample against loops over the output's pixels."""

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.nn import reference
from tests.nn.common import draw, layer_gradcheck, randomised, run
from tinydiff.nn import Conv1d, Conv2d, Downsample, Upsample
from tinydiff.rng import Rng

SHAPES = [(1, 4, 4, 3), (2, 5, 3, 3), (5, 3, 7, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, None), (1, 1, None), (2, 1, None), (3, 2, 0), (2, 1, 1), (2, 2, 0)]
)
def test_conv(shape, kernel, stride, padding, device):
    x, layer = draw(*shape), randomised(Conv2d(3, 4, Rng(), kernel=kernel, stride=stride, padding=padding))
    y, weights = run(layer, x)
    assert_close(y, reference.conv(x, weights, stride, padding), rtol=1e-13)
    assert layer_gradcheck(layer, x) <= 1e-6


@pytest.mark.parametrize("kernel", [1, 3])
def test_each_image_can_have_its_own_bias(kernel, device):
    x, bias, layer = draw(5, 3, 4, 3), draw(5, 2, seed=1), randomised(Conv2d(3, 2, Rng(), kernel=kernel))
    y, weights = run(layer, x, bias)
    assert_close(y, reference.conv(x, weights) + bias[:, None, None, :], rtol=1e-13)
    assert layer_gradcheck(layer, x, bias) <= 1e-6


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (3, 4), (5, 2)])
def test_sequences(kernel, dilation, device):
    x, bias, layer = draw(2, 9, 3), draw(2, 4, seed=1), Conv1d(3, 4, Rng(), kernel=kernel, dilation=dilation)
    randomised(layer)
    y, weights = run(layer, x, bias)
    spread = np.zeros(((kernel - 1) * dilation + 1, 1, 3, 4))  # as an image of width 1, its kernel with gaps
    spread[::dilation, 0] = weights["weight"]
    reach = (kernel - 1) * dilation // 2
    padded = np.pad(x, ((0, 0), (reach, reach), (0, 0)))[:, :, None]
    wide = [np.einsum("buvi,uvio->bo", padded[:, i : i + len(spread)], spread) for i in range(9)]
    assert_close(y, np.stack(wide, axis=1) + weights["bias"] + bias[:, None], rtol=1e-13)
    assert layer_gradcheck(layer, x, bias) <= 1e-6


def test_an_even_number_of_taps_is_refused():
    with pytest.raises(ValueError, match="odd number of taps, got 2"):
        Conv1d(1, 1, Rng(), kernel=2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "formula"), [(Downsample, reference.downsample), (Upsample, reference.upsample)])
def test_changes_of_resolution(kind, formula, shape, device):
    x, layer = draw(*shape), randomised(kind(3, Rng()))
    y, weights = run(layer, x)
    assert_close(y, formula(x, weights), rtol=1e-13)
    assert layer_gradcheck(layer, x) <= 1e-6


def test_shapes_that_halving_and_doubling_give():
    x = draw(2, 5, 8, 3, dtype=np.float32)
    assert Downsample(3, Rng())(x).shape == (2, 3, 4, 3)
    assert Upsample(3, Rng())(x).shape == (2, 10, 16, 3)


def test_it_starts_with_outputs_of_unit_variance():
    x = draw(4, 16, 16, 40, dtype=np.float32)
    y = Conv2d(40, 60, Rng(2))(x).data[:, 1:-1, 1:-1]
    assert abs(y.std() - 1) < 0.03
    assert not Conv2d(40, 2, Rng(), zero=True)(x).data.any()


@pytest.mark.parametrize(
    ("shape", "message"), [((2, 4, 4, 5), "3 channels, the images have 5"), ((4, 4, 3), "B, H, W, C")]
)
def test_images_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        Conv2d(3, 4, Rng())(draw(*shape, dtype=np.float32))
