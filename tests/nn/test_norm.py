"""GroupNorm and LayerNorm against a loop over the groups."""

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.nn import reference
from tests.nn.common import draw, layer_gradcheck, randomised, run
from tinydiff.nn import GroupNorm, LayerNorm


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [(1, 4, 4, 6), (3, 5, 2, 6), (2, 7, 6)])
def test_group_norm(shape, groups, silu, device):
    x, layer = 3 * draw(*shape) + 2, randomised(GroupNorm(6, groups, silu=silu))
    y, weights = run(layer, x)
    z = reference.group_norm(x, weights, groups)
    assert_close(y, reference.silu(z) if silu else z, rtol=1e-12)
    assert layer_gradcheck(layer, x) <= 1e-6


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 4, 6)])
def test_layer_norm(shape, device):
    x, layer = 3 * draw(*shape) + 2, randomised(LayerNorm(6))
    y, weights = run(layer, x)
    assert_close(y, reference.layer_norm(x, weights), rtol=1e-12)
    assert layer_gradcheck(layer, x) <= 1e-6


@pytest.mark.parametrize(("layer", "axes"), [(GroupNorm(6, 3), (1, 2, 4)), (LayerNorm(6), (3, 4))])
def test_it_starts_as_plain_normalisation(layer, axes):
    y = layer(5 * draw(3, 8, 8, 6, dtype=np.float32) - 1)
    assert y.dtype == np.float32
    grouped = y.data.reshape(3, 8, 8, 3, 2) if isinstance(layer, GroupNorm) else y.data.reshape(3, 8, 8, 1, 6)
    np.testing.assert_allclose(grouped.mean(axes), 0, atol=1e-6)
    np.testing.assert_allclose(grouped.var(axes), 1, atol=1e-4)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="groups must divide the number of channels, got 4 and 6"):
        GroupNorm(6, 4)


@pytest.mark.parametrize("layer", [GroupNorm(6, 3), LayerNorm(6)])
def test_other_channels_are_refused(layer):
    with pytest.raises(ValueError, match=r"gamma and beta"):
        layer(draw(2, 4, 4, 9, dtype=np.float32))
