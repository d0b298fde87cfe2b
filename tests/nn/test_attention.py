"""Self- and cross-attention (E27) against a loop over the queries."""

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.nn import reference
from tests.nn.common import draw, layer_gradcheck, randomised, run
from tinydiff import Tensor
from tinydiff.backend import to_device, to_numpy
from tinydiff.nn import CrossAttention, SelfAttention, SpatialTransformer
from tinydiff.nn.attention import watched
from tinydiff.rng import Rng

SHAPES = [(1, 4, 4, 8), (3, 2, 5, 8), (2, 1, 1, 8)]
MASK = np.array([[True, False, True, False], [True, True, True, True], [False, False, False, True]])


def cross(heads=2):
    return randomised(CrossAttention(8, 5, Rng(), heads=heads))


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_self_attention(shape, heads, device):
    x, layer = draw(*shape), randomised(SelfAttention(8, Rng(), heads=heads, groups=4))
    y, weights = run(layer, x)
    assert_close(y, reference.self_attention(x, weights, heads, groups=4), rtol=1e-12)
    assert layer_gradcheck(layer, x) <= 1e-6


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("shape", [(1, 16, 8), (3, 10, 8), (2, 1, 8)])
def test_cross_attention(shape, heads, device):
    x, context, layer = draw(*shape), draw(shape[0], 3, 5, seed=1), cross(heads)
    y, weights = run(layer, x, context)
    assert_close(y, reference.cross_attention(x, context, weights, heads), rtol=1e-12)
    assert layer_gradcheck(layer, x, context) <= 1e-6


def test_masked_cross_attention(device):
    x, context, layer = draw(3, 8, 8), draw(3, 4, 5, seed=1), cross()
    y = layer(Tensor(to_device(x)), Tensor(to_device(context)), to_device(MASK))
    assert_close(y, reference.cross_attention(x, context, layer.state_dict(), 2, MASK), rtol=1e-12)
    assert layer_gradcheck(layer, x, context, call=lambda x, c: layer(x, c, to_device(MASK))) <= 1e-6


@pytest.mark.parametrize("padding", [0.0, 1.0, -1e6, 1e6])
def test_padding_has_no_influence(padding):
    """Neither on the output nor on any gradient, whatever stands in the masked tokens; nor do they receive one."""
    x, layer, results = draw(3, 8, 8), cross(), []
    for value in (0.5, padding):
        context = Tensor(np.where(MASK[..., None], draw(3, 4, 5, seed=1), value), requires_grad=True)
        layer.zero_grad()
        y = layer(Tensor(x), context, MASK)
        y.backward(draw(*y.shape, seed=2))
        assert not context.grad[~MASK].any() and context.grad[MASK].all()
        results.append([y.data, *(p.grad for p in layer.parameters().values())])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_order_of_the_tokens_does_not_count():
    x, context, layer, order = draw(3, 8, 8), draw(3, 4, 5, seed=1), cross(), np.array([2, 0, 3, 1])
    y = layer(Tensor(x), Tensor(context), MASK)
    assert_close(layer(Tensor(x), Tensor(context[:, order]), MASK[:, order]), y.data, rtol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
def test_the_weights_of_a_query_sum_to_one(masked, device):
    """And with the values they make what the layer gives."""
    x, context, layer = draw(3, 8, 8), draw(3, 4, 5, seed=1), cross()
    inputs = Tensor(to_device(x)), Tensor(to_device(context)), to_device(MASK) if masked else None
    weights, w = to_numpy(layer.weights(*inputs)), layer.state_dict()
    assert weights.shape == (3, 2, 8, 4) and (weights > 0).all(axis=(1, 2))[MASK].all()
    assert_close(weights.sum(axis=-1), np.ones((3, 2, 8)), rtol=1e-13)
    assert not masked or not weights.transpose(0, 3, 1, 2)[~MASK].any()
    v = (context @ w["v.weight"]).reshape(3, 4, 2, 4)
    heard = np.einsum("bhnm,bmhd->bnhd", weights, v).reshape(3, 8, 8)
    assert_close(layer(*inputs), heard @ w["out.weight"] + w["out.bias"], rtol=1e-12)


def test_what_is_watched(device):
    """The weights of every layer inside, in the order of the calls, and none once it is over."""
    block = randomised(SpatialTransformer(8, 5, Rng(), heads=2, groups=4))
    x, context = Tensor(to_device(draw(3, 2, 4, 8))), Tensor(to_device(draw(3, 4, 5, seed=1)))
    plain = block(x, context)
    with watched(block) as seen:
        y = block(x, context)
        block(x, context, to_device(MASK))
    block(x, context)
    assert_close(y, to_numpy(plain.data), atol=0)
    assert [w.shape for w in seen] == [(3, 2, 8, 4)] * 2
    assert_close(to_numpy(seen[0]).sum(axis=-1), np.ones((3, 2, 8)), rtol=1e-13)
    assert to_numpy(seen[0]).min() > 0 and not to_numpy(seen[1]).transpose(0, 3, 1, 2)[~MASK].any()


def test_pixels_move_with_their_outputs():
    """Attention knows no places: shuffled pixels give the same outputs, shuffled."""
    x, layer = draw(2, 4, 4, 8), randomised(SelfAttention(8, Rng(), heads=2, groups=4))
    order = np.random.default_rng(0).permutation(16)
    shuffled = x.reshape(2, 16, 8)[:, order].reshape(x.shape)
    y = layer(Tensor(x)).data.reshape(2, 16, 8)[:, order].reshape(x.shape)
    assert_close(layer(Tensor(shuffled)), y, rtol=1e-13)


def test_it_starts_as_the_identity():
    x = draw(2, 4, 4, 8, dtype=np.float32)
    assert_close(SelfAttention(8, Rng(), heads=2, groups=4)(x), x)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="heads must divide the number of channels, got 3 and 8"):
        SelfAttention(8, Rng(), heads=3, groups=4)
    with pytest.raises(ValueError, match="heads must divide the number of channels, got 3 and 8"):
        CrossAttention(8, 5, Rng(), heads=3)


def test_a_context_of_another_width_is_refused():
    with pytest.raises(ValueError, match="5 rows, got 6"):
        cross()(Tensor(draw(2, 4, 8)), Tensor(draw(2, 3, 6)))
