"""The transformer against loops over the queries and against PyTorch; what a token sees, and what it does not."""

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.nn import reference
from tests.nn.common import draw, layer_gradcheck, randomised, run
from tinydiff import Tensor
from tinydiff.backend import to_device
from tinydiff.nn import Transformer, TransformerConfig
from tinydiff.rng import Rng

CONFIGS = {
    "one head": TransformerConfig(width=6, layers=1, heads=1, ratio=1),
    "two heads": TransformerConfig(width=8, layers=2, heads=2, ratio=2),
    "causal": TransformerConfig(width=8, layers=2, heads=4, ratio=3, causal=True),
    "quick": TransformerConfig(width=6, layers=2, heads=1, ratio=2, activation="quick-gelu"),
}
SHAPES = [(1, 1), (3, 5), (2, 4)]
MASK = np.array([[True, True, False, False], [True, True, True, True], [True, False, True, False]])
"""The first token is never padding: a causal text begins with one that all others see."""


def made(name, dtype=np.float64):
    return randomised(Transformer(CONFIGS[name], Rng()), dtype=dtype)


def moved(mask):
    return None if mask is None else to_device(mask)


# ------------------------------------------------------------------------------------- against formulas


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_transformer_is_the_formula(name, shape, device):
    model, x = made(name), draw(*shape, CONFIGS[name].width)
    y, weights = run(model, x)
    assert_close(y, reference.transformer(x, weights, model.config), rtol=1e-11)
    assert layer_gradcheck(model, x) <= 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_with_padding(name, device):
    """Where the tokens are padding, what comes out means nothing."""
    model, x = made(name), draw(3, 4, CONFIGS[name].width)
    expected = reference.transformer(x, model.state_dict(), model.config, MASK)
    y = model(Tensor(to_device(x)), to_device(MASK)) * to_device(MASK[..., None])
    assert_close(y, expected * MASK[..., None], rtol=1e-11)
    assert layer_gradcheck(model, x, call=lambda x: model(x, to_device(MASK))) <= 1e-6


def test_in_float32_too():
    model, x = made("two heads", np.float32), draw(3, 5, 8, dtype=np.float32)
    weights = {name: w.astype(np.float64) for name, w in model.state_dict().items()}
    expected = reference.transformer(x.astype(np.float64), weights, model.config).astype(np.float32)
    assert_close(model(Tensor(x)), expected, rtol=1e-5)


# --------------------------------------------------------------------------------------- against PyTorch


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-4), (np.float64, 1e-10)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_forward_and_every_gradient_equal_those_of_pytorch(causal, masked, dtype, bound):
    torch = pytest.importorskip("torch", reason="PyTorch, which tinydiff does not need, is not installed")
    from tests.torch_transformer import to_torch_layout, torch_name, twin

    model = randomised(Transformer(TransformerConfig(width=32, layers=3, causal=causal), Rng()), dtype=dtype)
    peer = twin(model, torch.float32 if dtype is np.float32 else torch.float64)
    tokens, g = draw(3, 4, 32, dtype=dtype), draw(3, 4, 32, seed=1, dtype=dtype)
    if masked:
        g *= MASK[..., None]
    x = Tensor(tokens, requires_grad=True)
    y = model(x, MASK if masked else None)
    y.backward(g)

    peer_x = torch.from_numpy(tokens).requires_grad_()
    peer_y = peer(peer_x, torch.from_numpy(MASK) if masked else None)
    peer_y.backward(torch.from_numpy(g))
    seen = MASK if masked else np.ones_like(MASK)
    assert_close(y.data[seen], peer_y.detach().numpy()[seen], rtol=bound)
    assert_close(x.grad, peer_x.grad.numpy(), rtol=bound)
    theirs = {name: p.grad for name, p in peer.named_parameters()}
    assert len(theirs) == len(model.parameters())
    for name, p in model.parameters().items():
        assert_close(to_torch_layout(p.grad).numpy(), theirs[torch_name(name)].numpy(), rtol=bound)


# ------------------------------------------------------------------------------------- who sees whom


@pytest.mark.parametrize("masked", [False, True])
def test_a_later_token_changes_no_earlier_output(masked, device):
    """In a causal transformer; the token itself and the later ones that see it do change."""
    model, x = made("causal"), draw(3, 4, 8)
    mask = np.ones((3, 4), bool) if masked else None
    other = x.copy()
    other[:, 2, 0] += 1  # of all channels alike, LayerNorm would not notice
    one, two = (model(Tensor(to_device(a)), moved(mask)).numpy() for a in (x, other))
    np.testing.assert_array_equal(one[:, :2], two[:, :2])
    assert (np.abs(one - two)[:, 2:].max(axis=-1) > 1e-6).all()


def test_otherwise_every_token_sees_every_other():
    model, x = made("two heads"), draw(3, 4, 8)
    other = x.copy()
    other[:, 2, 0] += 1  # of all channels alike, LayerNorm would not notice
    assert (np.abs(model(Tensor(x)).data - model(Tensor(other)).data).max(axis=-1) > 1e-6).all()


@pytest.mark.parametrize("padding", [0.0, -1e4, 1e6])
@pytest.mark.parametrize("name", ["two heads", "causal"])
def test_padding_has_no_influence(name, padding, device):
    """Neither on the other tokens nor on any gradient, whatever stands there; nor does it receive one."""
    model, results = made(name), []
    for value in (0.5, padding):
        x = Tensor(to_device(np.where(MASK[..., None], draw(3, 4, 8), value)), requires_grad=True)
        model.zero_grad()
        y = model(x, to_device(MASK)) * to_device(MASK[..., None])
        y.backward(to_device(draw(*y.shape, seed=2)))
        x_grad = Tensor(x.grad).numpy()
        assert not x_grad[~MASK].any() and x_grad[MASK].all()
        results.append([y.numpy(), *(Tensor(p.grad).numpy() for p in model.parameters().values())])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["two heads", "causal"])
def test_padding_is_as_if_the_tokens_were_not_there(name):
    """A text of two words is the same text when it stands in a row of four places."""
    model, x = made(name), draw(3, 4, 8)
    y = model(Tensor(x[:1, :2]))
    assert_close(model(Tensor(x), MASK).data[:1, :2], y.data, rtol=1e-12)


def test_without_places_the_order_does_not_count():
    model, x, order = made("two heads"), draw(2, 4, 8), np.array([2, 0, 3, 1])
    assert_close(model(Tensor(x[:, order])), model(Tensor(x)).data[:, order], rtol=1e-12)


def test_texts_do_not_see_each_other():
    model, x = made("causal"), draw(3, 4, 8)
    alone = np.concatenate([model(Tensor(x[i : i + 1])).data for i in range(3)])
    assert_close(model(Tensor(x)), alone, rtol=1e-12)


# ----------------------------------------------------------------------------------- start, and numbers


@pytest.mark.parametrize("layers", [1, 4, 12])
def test_it_does_not_start_as_the_identity_nor_does_its_stream_grow_with_depth(layers):
    """What all branches add to the tokens is of their own size, about, however many there are."""
    model = Transformer(TransformerConfig(width=128, layers=layers), Rng(3))
    x = draw(4, 16, 128, dtype=np.float32)
    h = Tensor(x)
    for block in model.blocks:
        h = block(h)
    assert 0.3 < (h.data - x).std() < 1
    assert all(p.data.any() for p in model.parameters().values() if p.ndim == 2)


def test_the_number_of_parameters():
    """A block has matrices w x 3w, w x w, w x 4w and 4w x w with their biases, and two norms."""
    w = 256
    block = 12 * w * w + (3 + 1 + 4 + 1) * w + 4 * w
    assert Transformer(TransformerConfig(), Rng()).count_parameters() == 6 * block + 2 * w == 4_738_560 + 512


def test_equal_seeds_give_equal_weights():
    one, same, other = (Transformer(CONFIGS["causal"], Rng(seed)).state_dict() for seed in (1, 1, 2))
    assert all((one[name] == same[name]).all() for name in one)
    assert (one["blocks.0.qkv.weight"] != other["blocks.0.qkv.weight"]).any()
    assert (one["blocks.0.qkv.weight"] != one["blocks.1.qkv.weight"]).any()


# ----------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, r"heads \(3\) must divide width \(256\)"),
        ({"heads": 0}, "sizes of at least 1, got .*heads=0"),
        ({"width": 0}, "sizes of at least 1, got .*width=0"),
        ({"layers": 0}, "sizes of at least 1, got .*layers=0"),
        ({"activation": "relu"}, "must be one of gelu, quick-gelu, got 'relu'"),
        ({"ratio": -1}, "sizes of at least 1, got .*ratio=-1"),
    ],
)
def test_bad_configurations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**settings)


@pytest.mark.parametrize("shape", [(3, 4, 7), (4, 8), (3, 2, 2, 8)], ids=str)
def test_tokens_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"takes tokens \(B, N, 8\), got \(" + str(shape)[1:-1]):
        made("causal")(Tensor(draw(*shape)))


@pytest.mark.parametrize("mask", [MASK[:, :3], MASK[0], MASK.astype(int)], ids=["short", "flat", "numbers"])
def test_a_mask_that_does_not_fit_is_refused(mask):
    with pytest.raises(ValueError, match=r"mask must be boolean and \(3, 4\), got (bool|int64) and"):
        made("causal")(Tensor(draw(3, 4, 8)), mask)
