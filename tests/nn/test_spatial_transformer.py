"""SpatialTransformer (E27) against NumPy loops: what the pixels take from a text, and what they must not."""

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.nn import reference
from tests.nn.common import draw, layer_gradcheck, randomised, run
from tinydiff import Tensor
from tinydiff.backend import to_device
from tinydiff.nn import SpatialTransformer
from tinydiff.rng import Rng

MASK = np.array([[True, False, True, False], [True, True, True, True], [False, False, False, True]])


def made(heads=2):
    return randomised(SpatialTransformer(8, 5, Rng(), heads=heads, groups=4))


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("shape", [(1, 4, 4, 8), (3, 2, 5, 8), (2, 1, 1, 8)])
def test_it_is_the_formula(shape, heads, device):
    x, context, layer = draw(*shape), draw(shape[0], 3, 5, seed=1), made(heads)
    y, weights = run(layer, x, context)
    assert_close(y, reference.spatial_transformer(x, context, weights, heads, groups=4), rtol=1e-11)
    assert layer_gradcheck(layer, x, context) <= 1e-6


def test_with_a_mask(device):
    x, context, layer = draw(3, 2, 4, 8), draw(3, 4, 5, seed=1), made()
    y = layer(Tensor(to_device(x)), Tensor(to_device(context)), to_device(MASK))
    assert_close(y, reference.spatial_transformer(x, context, layer.state_dict(), 2, 4, MASK), rtol=1e-11)


def test_padding_has_no_influence_and_no_gradient():
    x, layer, results = draw(3, 2, 4, 8), made(), []
    for value in (0.5, 1e6):
        context = Tensor(np.where(MASK[..., None], draw(3, 4, 5, seed=1), value), requires_grad=True)
        y = layer(Tensor(x), context, MASK)
        y.backward(draw(*y.shape, seed=2))
        assert not context.grad[~MASK].any() and context.grad[MASK].all()
        results.append(y.data)
    np.testing.assert_array_equal(*results)


def test_it_starts_as_the_identity():
    x, context = draw(2, 4, 4, 8, dtype=np.float32), draw(2, 3, 5, dtype=np.float32)
    assert_close(SpatialTransformer(8, 5, Rng(), heads=2, groups=4)(Tensor(x), Tensor(context)), x)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="heads must divide the number of channels, got 3 and 8"):
        SpatialTransformer(8, 5, Rng(), heads=3, groups=4)
