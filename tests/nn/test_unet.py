"""The U-Net (E20): its shapes, its start, its conditions, against NumPy loops and against PyTorch.

What each level gives for 32 x 32 images and the default configuration (widths 32, 64, 128):

    32 x 32    conv, 2 stages, down |                                                                | 3 stages, conv
    16 x 16                         | 2 stages, down |                              | 3 stages, up to |
     8 x 8                                           | 2 stages, middle, 3 stages, up to |
"""

import dataclasses

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.nn import reference
from tests.nn.common import draw, layer_gradcheck, randomised
from tinydiff import Tensor, autograd, ops
from tinydiff.backend import to_device
from tinydiff.nn import Downsample, UNet, UNetConfig, Upsample
from tinydiff.nn.unet import Stage, mean_token
from tinydiff.rng import Rng

SMALL = UNetConfig(channels=2, base=4, multipliers=(1, 2), blocks=1, attention=(1,), heads=2, groups=2)
"""The smallest with all parts; CONFIGS vary it."""
CONFIGS = {
    "plain": SMALL,
    "three levels": UNetConfig(base=4, multipliers=(1, 3, 2), blocks=1, attention=(), groups=4),
    "one level, attending": UNetConfig(base=4, multipliers=(2,), blocks=2, attention=(0,), groups=2),
    "label": UNetConfig(base=4, multipliers=(1, 2), blocks=1, attention=(), groups=2, classes=3),
    "context": UNetConfig(base=4, multipliers=(1, 2), blocks=1, attention=(0,), heads=2, groups=2, context=5),
    "fourier": UNetConfig(
        channels=2, base=4, multipliers=(1,), blocks=1, attention=(), groups=2, patch=2, extra=1, fourier=(0, 2)
    ),
    "extra": UNetConfig(channels=2, base=4, multipliers=(1, 2), blocks=1, attention=(), groups=2, patch=2, extra=3),
    "outputs": UNetConfig(channels=2, base=4, multipliers=(1, 2), blocks=1, attention=(), groups=2, patch=2, outputs=4),
    "vector": UNetConfig(base=4, multipliers=(1, 2), blocks=1, attention=(), groups=2, vector=5),
    "pooled": UNetConfig(base=4, multipliers=(1, 2), blocks=1, attention=(), groups=2, context=5, pooled=True),
    "patch": UNetConfig(channels=3, base=4, multipliers=(1, 2), blocks=1, attention=(), groups=2, patch=2),
    "all": UNetConfig(
        channels=2,
        base=4,
        multipliers=(1, 2),
        blocks=1,
        heads=2,
        groups=2,
        attention=(0, 1),
        classes=3,
        context=5,
        patch=2,
        extra=1,
        vector=6,
        pooled=True,
    ),
}
T_BATCH = np.array([1, 700, 3])
MASK = np.array([[True, False, True, False], [True, True, True, True], [False, False, False, True]])


def inputs(config, size=(4, 8)):
    """Images (3, *size, channels), and the conditions that the configuration takes, on the host."""
    conditions = {}
    if config.classes:
        conditions["label"] = np.array([2, -1, 0])
    if config.context:
        conditions |= {"context": draw(3, 4, config.context, seed=7), "mask": MASK}
    if config.extra:
        conditions["extra"] = draw(3, *size, config.extra, seed=8)
    if config.vector:
        conditions["vector"] = draw(3, config.vector, seed=9)
    return draw(3, *size, config.channels), conditions


def made(config, dtype=np.float64):
    return randomised(UNet(config, Rng()), dtype=dtype)


# ------------------------------------------------------------------------------------- against formulas


@pytest.mark.parametrize("name", CONFIGS)
def test_unet_is_the_formula(name, device):
    """The times and the labels stay on the host, where the samplers and the training loop count them."""
    model, (x, conditions) = made(CONFIGS[name]), inputs(CONFIGS[name])
    moved = {key: value if key == "label" else to_device(value) for key, value in conditions.items()}
    expected = reference.unet(x, T_BATCH, model.state_dict(), model.config, **conditions)
    assert_close(model(Tensor(to_device(x)), T_BATCH, **moved), expected, rtol=1e-11)


def test_in_float32_too():
    x, _ = inputs(SMALL)
    model = made(SMALL, np.float32)
    weights = {name: w.astype(np.float64) for name, w in model.state_dict().items()}
    expected = reference.unet(x, T_BATCH, weights, SMALL).astype(np.float32)
    assert_close(model(Tensor(x.astype(np.float32)), T_BATCH), expected, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients(name):
    model, (x, conditions) = made(CONFIGS[name]), inputs(CONFIGS[name])
    label, mask = (conditions.get(key) for key in ("label", "mask"))
    names = [name for name in conditions if name not in ("label", "mask")]
    given = [conditions[name] for name in names]

    def call(x, *others):
        return model(x, T_BATCH, label, mask=mask, **dict(zip(names, others, strict=True)))

    error = layer_gradcheck(model, x, *given, call=call)
    assert error <= 1e-6


def test_gradients_on_every_device(device):
    model, (x, _) = made(SMALL), inputs(SMALL)
    assert layer_gradcheck(model, x, call=lambda x: model(x, T_BATCH)) <= 1e-6


# --------------------------------------------------------------------------------------- against PyTorch


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-4), (np.float64, 1e-10)])
@pytest.mark.parametrize(
    ("config", "size"),
    [
        (UNetConfig(base=16, blocks=1, attention=(1, 2), heads=2), (16, 16)),
        (UNetConfig(channels=3, base=16, multipliers=(1, 2), attention=(), groups=4), (8, 12)),
        (UNetConfig(channels=3, base=16, multipliers=(1, 2), blocks=1, attention=(), classes=3, patch=2), (8, 12)),
    ],
)
def test_forward_and_every_gradient_equal_those_of_pytorch(config, size, dtype, bound):
    torch = pytest.importorskip("torch", reason="PyTorch, which tinydiff does not need, is not installed")
    from tests.torch_unet import to_torch_layout, torch_name, twin

    model = made(config, dtype)
    peer = twin(model, torch.float32 if dtype is np.float32 else torch.float64)
    images, g = draw(3, *size, config.channels, dtype=dtype), draw(3, *size, config.channels, seed=1, dtype=dtype)
    label = np.array([2, -1, 0]) if config.classes else None
    x = Tensor(images, requires_grad=True)
    y = model(x, T_BATCH, label)
    y.backward(g)

    def channels_first(a):
        return torch.from_numpy(a).permute(0, 3, 1, 2)

    peer_x = channels_first(images).requires_grad_()
    peer_y = peer(peer_x, torch.from_numpy(T_BATCH), None if label is None else torch.from_numpy(label))
    peer_y.backward(channels_first(g))
    assert_close(y, peer_y.detach().permute(0, 2, 3, 1).numpy(), rtol=bound)
    assert_close(x.grad, peer_x.grad.permute(0, 2, 3, 1).numpy(), rtol=bound)
    theirs = {name: p.grad for name, p in peer.named_parameters()}
    assert len(theirs) == len(model.parameters())
    for name, p in model.parameters().items():
        assert_close(to_torch_layout(name, p.grad).numpy(), theirs[torch_name(name)].numpy(), rtol=bound)


# ----------------------------------------------------------------------------------- shapes and numbers


def test_the_shape_of_every_level(monkeypatch):
    table = []
    for kind in (Stage, Downsample, Upsample):

        def call(layer, x, *others, plain=kind.__call__):
            y = plain(layer, x, *others)
            table.append((type(layer).__name__, x.shape[1:], y.shape[1:]))
            return y

        monkeypatch.setattr(kind, "__call__", call)
    with autograd.no_grad():
        y = UNet(UNetConfig(), Rng())(draw(2, 32, 32, 1, dtype=np.float32), np.array([1, 9]))
    assert y.shape == (2, 32, 32, 1)
    assert table == [
        ("Stage", (32, 32, 32), (32, 32, 32)),
        ("Stage", (32, 32, 32), (32, 32, 32)),
        ("Downsample", (32, 32, 32), (16, 16, 32)),
        ("Stage", (16, 16, 32), (16, 16, 64)),
        ("Stage", (16, 16, 64), (16, 16, 64)),
        ("Downsample", (16, 16, 64), (8, 8, 64)),
        ("Stage", (8, 8, 64), (8, 8, 128)),
        ("Stage", (8, 8, 128), (8, 8, 128)),
        ("Stage", (8, 8, 128), (8, 8, 128)),  # the middle
        ("Stage", (8, 8, 128), (8, 8, 128)),
        ("Stage", (8, 8, 128 + 128), (8, 8, 128)),
        ("Stage", (8, 8, 128 + 128), (8, 8, 128)),
        ("Stage", (8, 8, 128 + 64), (8, 8, 128)),
        ("Upsample", (8, 8, 128), (16, 16, 128)),
        ("Stage", (16, 16, 128 + 64), (16, 16, 64)),
        ("Stage", (16, 16, 64 + 64), (16, 16, 64)),
        ("Stage", (16, 16, 64 + 32), (16, 16, 64)),
        ("Upsample", (16, 16, 64), (32, 32, 64)),
        ("Stage", (32, 32, 64 + 32), (32, 32, 32)),
        ("Stage", (32, 32, 32 + 32), (32, 32, 32)),
        ("Stage", (32, 32, 32 + 32), (32, 32, 32)),
    ]


def test_the_number_of_parameters():
    """Counted from the table above: a k x k convolution has k² i o + o, a matrix i o + o, a norm 2 c."""

    def matrix(i, o, k=1):
        return k * k * i * o + o

    def block(i, o):
        skip = matrix(i, o) if i != o else 0
        return 2 * i + matrix(i, o, 3) + matrix(128, o) + 2 * o + matrix(o, o, 3) + skip

    def attention(c):
        return 2 * c + matrix(c, 3 * c) + matrix(c, c)

    ends = matrix(32, 128) + matrix(128, 128) + matrix(1, 32, 3) + 2 * 32 + matrix(32, 1, 3)
    down = [(32, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)]
    up = [(256, 128), (256, 128), (192, 128), (192, 64), (128, 64), (96, 64), (96, 32), (64, 32), (64, 32)]
    resize = matrix(32, 32, 3) + matrix(64, 64, 3) + matrix(128, 128, 3) + matrix(64, 64, 3)
    blocks = sum(block(*channels) for channels in [*down, (128, 128), (128, 128), *up])
    expected = ends + blocks + resize + 6 * attention(128)
    assert UNet(UNetConfig(), Rng()).count_parameters() == expected == 3_939_393


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(4, 4), (12, 8)])
def test_it_starts_at_zero_in_the_shape_of_its_input(name, size):
    config, (x, conditions) = CONFIGS[name], inputs(CONFIGS[name], size)
    given = {key: a.astype(np.float32) if a.dtype == np.float64 else a for key, a in conditions.items()}
    y = UNet(config, Rng())(Tensor(x.astype(np.float32)), T_BATCH, **given)
    assert_close(y, np.zeros((3, *size, config.outputs or config.channels), np.float32))


def test_equal_seeds_give_equal_weights():
    one, same, other = (UNet(SMALL, Rng(seed)).state_dict() for seed in (1, 1, 2))
    assert all((one[name] == same[name]).all() for name in one)
    assert (one["conv_in.weight"] != other["conv_in.weight"]).any()


# ------------------------------------------------------------------------------------------- conditions


def difference(one, other):
    return np.abs(one.data - other.data).max(axis=(1, 2, 3))


def test_the_time_counts_for_each_image_alone():
    model, (x, _) = made(SMALL), inputs(SMALL)
    changed = difference(model(Tensor(x), T_BATCH), model(Tensor(x), np.array([1, 701, 3])))
    assert changed[1] > 1e-6 and changed[0] == changed[2] == 0


def test_times_may_be_fractions():
    """As the continuous-time models have them."""
    model, (x, _) = made(SMALL), inputs(SMALL)
    whole = model(Tensor(x), T_BATCH.astype(np.float64))
    assert not difference(whole, model(Tensor(x), T_BATCH)).any()
    assert difference(whole, model(Tensor(x), T_BATCH + 0.5)).all()


def test_images_do_not_see_each_other():
    model, (x, _) = made(SMALL), inputs(SMALL)
    together = model(Tensor(x), T_BATCH).data
    alone = np.concatenate([model(Tensor(x[i : i + 1]), T_BATCH[i : i + 1]).data for i in range(3)])
    assert_close(together, alone, rtol=1e-12)


def test_the_label_counts_and_minus_one_is_no_label():
    model, (x, _) = made(CONFIGS["label"]), inputs(CONFIGS["label"])
    none = model(Tensor(x), T_BATCH)
    assert not difference(none, model(Tensor(x), T_BATCH, np.array([-1, -1, -1]))).any()
    changed = difference(none, model(Tensor(x), T_BATCH, np.array([-1, 0, 2])))
    assert changed[0] == 0 and (changed[1:] > 1e-6).all()


def test_the_context_counts_and_its_padding_does_not():
    config = CONFIGS["context"]
    model, (x, conditions) = made(config), inputs(config)
    context = conditions["context"]
    y = model(Tensor(x), T_BATCH, context=Tensor(context), mask=MASK)
    padded = np.where(MASK[..., None], context, 1e3)
    assert not difference(y, model(Tensor(x), T_BATCH, context=Tensor(padded), mask=MASK)).any()
    other = np.where(MASK[..., None], context + 1, context)
    assert (difference(y, model(Tensor(x), T_BATCH, context=Tensor(other), mask=MASK)) > 1e-6).all()
    assert (difference(y, model(Tensor(x), T_BATCH, context=Tensor(context)))[[0, 2]] > 1e-6).all()


def test_the_vector_counts_for_each_image_alone():
    config = CONFIGS["vector"]
    model, (x, conditions) = made(config), inputs(config)
    other = conditions["vector"] * np.array([[1], [2], [1]])
    changed = difference(*(model(Tensor(x), T_BATCH, vector=Tensor(v)) for v in (conditions["vector"], other)))
    assert changed[1] > 1e-6 and changed[0] == changed[2] == 0


@pytest.mark.parametrize("mask", [None, MASK])
def test_the_mean_of_the_tokens_that_are_there(mask):
    tokens = draw(3, 4, 5)
    there = [range(4)] * 3 if mask is None else [np.flatnonzero(row) for row in mask]
    expected = np.stack([tokens[i, rows].mean(axis=0) for i, rows in enumerate(there)])
    assert_close(mean_token(Tensor(tokens), mask).data, expected, rtol=1e-12)


def test_pooled_tokens_count_where_nothing_attends():
    """Only by their mean: the order of the tokens and the padding do not matter."""
    config = dataclasses.replace(CONFIGS["pooled"], multipliers=(1,))
    model, (x, conditions) = made(config), inputs(config)
    model.middle = model.middle[1:]  # the stage that attends
    context = conditions["context"]

    def drawn(context, mask=MASK):
        return model(Tensor(x), T_BATCH, context=Tensor(context), mask=mask)

    y = drawn(context)
    assert difference(y, drawn(context[:, ::-1], MASK[:, ::-1])).max() < 1e-12
    assert not difference(y, drawn(np.where(MASK[..., None], context, 1e3))).any()
    changed = difference(y, drawn(context + np.array([0, 1, 0])[:, None, None]))
    assert changed[1] > 1e-6 and changed[0] == changed[2] == 0


def test_dropout_only_in_training():
    config = UNetConfig(base=4, multipliers=(1, 2), blocks=1, attention=(), groups=2, dropout=0.3)
    model, x = made(config), Tensor(draw(3, 4, 4, 1))
    still = model.eval()(x, T_BATCH)
    assert not difference(still, model(x, T_BATCH)).any()
    model.train()
    assert difference(still, model(x, T_BATCH, rng=Rng(1))).all()
    assert not difference(model(x, T_BATCH, rng=Rng(1)), model(x, T_BATCH, rng=Rng(1))).any()
    with pytest.raises(ValueError, match="needs an Rng"):
        model(x, T_BATCH)


def test_a_stage_that_is_computed_twice_has_the_same_gradients():
    """autograd.checkpoint around a stage: less memory, the same numbers."""
    stage = randomised(Stage(SMALL, 1, 6, Rng()))
    x, emb = Tensor(draw(2, 4, 4, 6), requires_grad=True), Tensor(draw(2, 16, seed=1), requires_grad=True)

    def gradients(call):
        stage.zero_grad()
        x.grad = emb.grad = None
        y = call(x, emb, None, None, None)
        ops.mse_loss(y, Tensor(np.ones(y.shape))).backward()
        return [y.data, x.grad, emb.grad, *(p.grad for p in stage.parameters().values())]

    plain = gradients(stage)
    for one, other in zip(plain, gradients(lambda *args: autograd.checkpoint(stage, *args)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert stage.attention is not None and all(g.any() for g in plain)


# ----------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "shape", [(3, 6, 8, 1), (3, 8, 6, 1), (3, 8, 8, 3), (8, 8, 1), (3, 1, 8, 8)], ids=lambda shape: str(shape)
)
def test_images_that_cannot_be_halved_are_refused(shape):
    model = UNet(UNetConfig(base=4, multipliers=(1, 1, 1), groups=2), Rng())
    with pytest.raises(
        ValueError, match=r"images \(B, H, W, 1\) with H and W divisible by 4, got \(" + str(shape)[1:-1]
    ):
        model(Tensor(draw(*shape, dtype=np.float32)), T_BATCH)


def test_a_patch_must_divide_too():
    model = UNet(CONFIGS["patch"], Rng())
    with pytest.raises(ValueError, match="divisible by 4"):
        model(Tensor(draw(3, 6, 8, 3, dtype=np.float32)), T_BATCH)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("plain", {"t": np.array([1])}, r"times must be an array \(3,\), one for each image, got \[1\]"),
        ("plain", {"t": 5}, r"times must be an array \(3,\), one for each image, got 5"),
        ("plain", {"label": T_BATCH}, "a label was given to a U-Net without classes"),
        ("label", {"label": np.array([0, 1])}, r"labels must be an array \(3,\)"),
        ("label", {"label": np.array([0, 3, 1])}, r"labels must be in -1\.\.2, got \[0 3 1\]"),
        ("label", {"label": np.array([0, -2, 1])}, r"labels must be in -1\.\.2, got \[ 0 -2  1\]"),
        ("plain", {"context": Tensor(draw(3, 4, 5))}, "context has width None, got 5"),
        ("context", {}, "context has width 5, got None"),
        ("context", {"context": Tensor(draw(3, 4, 6))}, "context has width 5, got 6"),
        ("plain", {"extra": Tensor(draw(3, 4, 4, 2))}, r"second image has 0 channels .*, got \(3, 4, 4, 2\)"),
        ("extra", {}, r"second image has 3 channels and the size of \(3, 4, 4, 2\), got None"),
        ("extra", {"extra": Tensor(draw(3, 8, 4, 3))}, r"second image has 3 channels .*, got \(3, 8, 4, 3\)"),
        ("plain", {"vector": Tensor(draw(3, 5))}, r"vectors of None numbers, .* got \(3, 5\)"),
        ("vector", {}, r"vectors of 5 numbers, .* got None"),
        ("vector", {"vector": Tensor(draw(2, 5))}, r"vectors of 5 numbers, .* got \(2, 5\)"),
        ("vector", {"vector": Tensor(draw(3, 6))}, r"vectors of 5 numbers, .* got \(3, 6\)"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(name, arguments, message):
    config = CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        made(config)(Tensor(draw(3, 4, 4, config.channels)), **{"t": T_BATCH} | arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": 5, "groups": 5}, r"base \(5\) must be even"),
        ({"base": 12}, r"groups \(8\) must divide base \(12\)"),
        ({"attention": (3,)}, r"levels that attend must be in 0\.\.2, got \(3,\)"),
        ({"attention": (-1,)}, r"levels that attend must be in 0\.\.2, got \(-1,\)"),
        ({"multipliers": ()}, "at least one level"),
        ({"blocks": 0}, "sizes of at least 1"),
        ({"patch": 0}, "sizes of at least 1"),
        ({"outputs": -1}, "sizes of at least 1"),
        ({"vector": 0}, "sizes of at least 1"),
        ({"pooled": True}, "without a context there are no tokens"),
        ({"extra": -1}, "sizes of at least 1"),
        ({"multipliers": (1, 0)}, "sizes of at least 1"),
    ],
)
def test_bad_configurations_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**settings)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="heads must divide the number of channels, got 3 and 128"):
        UNet(UNetConfig(heads=3), Rng())
