"""The MLP against its formula, and what it refuses."""

import dataclasses

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.nn.common import draw, layer_gradcheck, randomised
from tinydiff import Rng, Tensor, backend
from tinydiff.nn import MLP, MLPConfig

SMALL = MLPConfig(channels=2, width=6, blocks=2, classes=3)


def silu(x):
    return x / (1 + np.exp(-x))


def expected(x, t, label, w, blocks):
    """The MLP, written once more with dictionaries of weights."""

    def linear(name, h):
        return h @ w[f"{name}.weight"] + w[f"{name}.bias"]

    half = w["time.inner.weight"].shape[0] // 2
    angles = np.asarray(t)[:, None] * 10_000.0 ** (-np.arange(half) / half)
    emb = linear("time.outer", silu(linear("time.inner", np.concatenate([np.sin(angles), np.cos(angles)], axis=1))))
    if label is not None:
        emb = emb + w["label.weight"][np.asarray(label) + 1]
    emb = silu(emb)
    angles = np.concatenate([x, 2 * x, 4 * x, 8 * x], axis=1)
    h = linear("into", np.concatenate([x, np.sin(angles), np.cos(angles)], axis=1))
    for i in range(blocks):
        name = f"blocks.{i}"
        inside = linear(f"{name}.inner", silu(h)) + linear(f"{name}.emb", emb)
        h = h + linear(f"{name}.outer", silu(inside))
    return linear("out", silu(h))


@pytest.mark.parametrize("classes", [None, 3])
def test_mlp(classes, device):
    x, t = draw(5, 2), np.array([1, 3, 200, 1000, 7])
    label = None if classes is None else np.array([0, 2, -1, 1, 0])
    model = randomised(MLP(dataclasses.replace(SMALL, classes=classes), Rng(0)))

    def call(x):
        return model(x, backend.to_device(t), None if label is None else backend.to_device(label))

    y = call(Tensor(backend.to_device(x)))
    assert_close(y, expected(x, t, label, model.state_dict(), 2), rtol=1e-12)
    assert layer_gradcheck(model, x, call=call) <= 1e-6


def test_no_label_is_minus_one():
    model, x, t = randomised(MLP(SMALL, Rng(0))), Tensor(draw(2, 2)), np.array([4, 9])
    assert_close(model(x, t), model(x, t, np.array([-1, -1])).data)
    assert (model(x, t).data != model(x, t, np.array([0, 0])).data).all()


def test_it_starts_at_zero_and_each_seed_is_another():
    a, b = MLP(SMALL, Rng(0)), MLP(SMALL, Rng(1))
    assert (a(Tensor(draw(3, 2, dtype=np.float32)), np.array([1, 2, 3])).data == 0).all()
    assert (a.into.weight.data != b.into.weight.data).all()


@pytest.mark.parametrize("bad", [{"width": 7}, {"width": 0}, {"blocks": 0}, {"channels": 0}, {"classes": -1}])
def test_bad_sizes(bad):
    with pytest.raises(ValueError, match="sizes of at least 1 and an even width"):
        dataclasses.replace(SMALL, **bad)


def test_bad_input():
    model, x, t = MLP(SMALL, Rng(0)), Tensor(draw(3, 2, dtype=np.float32)), np.array([1, 2, 3])
    for arguments, words in [
        ((Tensor(draw(3, 3)), t), r"points \(B, 2\), got \(3, 3\)"),
        ((x, 5), r"times must be an array \(3,\)"),
        ((x, t[:2]), r"times must be an array \(3,\)"),
        ((x, t, np.array([0])), r"labels must be an array \(3,\)"),
        ((x, t, np.array([0, 3, 0])), r"in -1\.\.2"),
    ]:
        with pytest.raises(ValueError, match=words):
            model(*arguments)
    with pytest.raises(ValueError, match="MLP without classes"):
        MLP(MLPConfig(width=6), Rng(0))(x, t, np.array([0, 0, 0]))
