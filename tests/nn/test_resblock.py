"""ResBlock (E20): its formula, its start as the skip, its dropout."""

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.nn import reference
from tests.nn.common import draw, layer_gradcheck, randomised, run
from tinydiff import Tensor
from tinydiff.nn import ResBlock
from tinydiff.rng import Rng


def block(inputs=4, outputs=6, dropout=0.0):
    return ResBlock(inputs, outputs, 5, Rng(), groups=2, dropout=dropout)


@pytest.mark.parametrize("outputs", [4, 6])
@pytest.mark.parametrize("shape", [(1, 4, 4, 4), (3, 5, 2, 4)])
def test_res_block(shape, outputs, device):
    x, emb, layer = draw(*shape), draw(shape[0], 5, seed=1), randomised(block(4, outputs))
    y, weights = run(layer, x, emb)
    assert ("skip.weight" in weights) == (outputs != 4)
    assert_close(y, reference.res_block(x, emb, weights, groups=2), rtol=1e-12)
    assert layer_gradcheck(layer, x, emb) <= 1e-6


@pytest.mark.parametrize("outputs", [4, 6])
def test_a_block_that_is_told_nothing(outputs, device):
    x, layer = draw(2, 5, 3, 4), randomised(ResBlock(4, outputs, None, Rng(), groups=2))
    y, weights = run(layer, x)
    assert_close(y, reference.res_block(x, None, weights, groups=2), rtol=1e-12)
    assert layer_gradcheck(layer, x) <= 1e-6


def test_an_embedding_too_many_or_too_few_is_refused():
    x, emb = Tensor(draw(1, 4, 4, 4)), Tensor(draw(1, 5))
    with pytest.raises(ValueError, match="takes an embedding, got None"):
        block()(x)
    with pytest.raises(ValueError, match="takes no embedding, got Tensor"):
        ResBlock(4, 4, None, Rng(), groups=2)(x, emb)


def test_it_starts_as_its_skip():
    x, emb = draw(2, 4, 4, 4, dtype=np.float32), draw(2, 5, dtype=np.float32)
    assert_close(block(4, 4)(x, emb), x)
    layer = block(4, 6)
    assert_close(layer(x, emb), np.einsum("bhwi,io->bhwo", x, layer.skip.weight.data[0, 0]), rtol=1e-6)


def test_dropout_acts_only_in_training():
    x, emb = Tensor(draw(2, 6, 6, 4)), Tensor(draw(2, 5, seed=1))
    layer, plain = randomised(block(dropout=0.5)), randomised(block())
    expected = plain(x, emb).data
    assert_close(layer.eval()(x, emb), expected)
    assert_close(layer.eval()(x, emb, Rng(1)), expected)
    assert_close(plain.train()(x, emb, Rng(1)), expected)
    dropped = layer.train()(x, emb, Rng(1)).data
    assert np.mean(dropped != expected) > 0.9
    np.testing.assert_array_equal(layer(x, emb, Rng(1)).data, dropped)
    assert (layer(x, emb, Rng(2)).data != dropped).any()


def test_dropout_keeps_the_mean():
    x, emb, layer = Tensor(draw(1, 4, 4, 4)), Tensor(draw(1, 5, seed=1)), randomised(block(dropout=0.25))
    draws = np.stack([layer(x, emb, Rng(seed)).data for seed in range(400)])
    error = draws.mean(axis=0) - layer.eval()(x, emb).data
    assert (np.abs(error) <= 5 * draws.std(axis=0) / 400**0.5).all()


def test_dropout_without_an_rng_is_refused_in_training():
    x, emb, layer = Tensor(draw(1, 4, 4, 4)), Tensor(draw(1, 5)), randomised(block(dropout=0.5))
    with pytest.raises(ValueError, match="needs an Rng while it trains"):
        layer(x, emb)


def test_groups_that_do_not_divide_are_refused():
    for channels in [(3, 4), (4, 3)]:
        with pytest.raises(ValueError, match="groups must divide the number of channels, got 2 and 3"):
            block(*channels)
