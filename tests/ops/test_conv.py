"""Convolution against loops over pixels and the kernel's taps."""

import itertools

import numpy as np
import pytest

from tests.ops.case import Case, check_gradients, check_values, each
from tinydiff import Tensor, ops
from tinydiff.ops._correlation import _AT, _BT, _G, Windows, Winograd, choose_way


def convolved(x, weight, bias=None, stride=1, padding=0):
    """Each output pixel sums over the kernel's taps the input pixel that it falls on times its matrix."""
    (B, H, W, _), (kh, kw, _, Co) = x.shape, weight.shape
    Ho, Wo = (H + 2 * padding - kh) // stride + 1, (W + 2 * padding - kw) // stride + 1
    y = np.zeros((B, Ho, Wo, Co))
    for i, j, u, v in itertools.product(range(Ho), range(Wo), range(kh), range(kw)):
        row, column = i * stride + u - padding, j * stride + v - padding
        if 0 <= row < H and 0 <= column < W:
            y[:, i, j] += np.einsum("bc,cd->bd", x[:, row, column], weight[u, v])
    return y + per_image(bias)


def per_image(bias):
    """A bias of all images (C',) or of each (B, C'), to be added to each pixel."""
    return 0 if bias is None else bias if bias.ndim == 1 else bias[:, None, None, :]


def transposed(x, weight, bias=None, stride=1, padding=0):
    """Each input pixel adds its multiple of the kernel around its place in the output."""
    (B, H, W, _), (kh, kw, Co, _) = x.shape, weight.shape
    whole = np.zeros((B, (H - 1) * stride + kh, (W - 1) * stride + kw, Co))
    for i, j, u, v in itertools.product(range(H), range(W), range(kh), range(kw)):
        whole[:, i * stride + u, j * stride + v] += np.einsum("bc,dc->bd", x[:, i, j], weight[u, v])
    y = whole[:, padding : whole.shape[1] - padding, padding : whole.shape[2] - padding]
    return y + per_image(bias)


# images, kernel (kh, kw), channels out, stride, padding, with a bias: none, one for all images, or one for each
WAYS = [
    ((1, 1, 1, 1), (1, 1), 1, 1, 0, True),
    ((2, 4, 5, 3), (1, 1), 4, 1, 0, True),
    ((2, 4, 5, 3), (1, 1), 4, 2, 0, "each"),
    ((1, 5, 4, 2), (2, 2), 3, 1, 0, False),
    ((3, 4, 6, 2), (2, 2), 3, 2, 0, True),
    ((2, 5, 7, 3), (3, 3), 4, 1, 1, True),
    ((2, 5, 7, 3), (3, 3), 4, 1, 1, False),
    ((1, 8, 6, 2), (3, 3), 3, 2, 1, True),
    ((2, 7, 5, 1), (3, 3), 2, 2, 1, True),
    ((2, 7, 6, 2), (3, 3), 2, 3, 0, True),
    ((1, 3, 3, 2), (3, 3), 2, 1, 0, True),
    ((2, 6, 5, 2), (3, 3), 1, 1, 2, True),
    ((2, 6, 5, 2), (3, 2), 3, 1, 1, True),
    ((2, 9, 6, 2), (4, 4), 3, 2, 1, True),
    ((1, 6, 7, 1), (5, 5), 2, 1, 2, True),
    ((2, 6, 7, 2), (5, 3), 2, 2, 2, False),
    ((5, 8, 8, 16), (3, 3), 8, 1, 1, True),
    ((7, 16, 16, 4), (3, 3), 8, 1, 1, True),
    ((2, 13, 22, 9), (3, 3), 17, 1, 1, True),
    ((2, 5, 4, 3), (1, 1), 2, 1, 1, True),
    ((2, 6, 7, 2), (3, 3), 3, 2, 4, True),
    ((2, 5, 6, 2), (2, 3), 2, 1, 2, False),
    ((2, 6, 7, 2), (3, 2), 2, 3, 3, True),
    ((2, 4, 5, 3), (1, 1), 4, 1, 0, "each"),
    ((3, 5, 4, 2), (3, 3), 3, 1, 1, "each"),
    ((5, 9, 6, 2), (3, 3), 3, 2, 1, "each"),
    # these are Winograd's in float32 on the CPU
    ((8, 1, 1, 16), (3, 3), 16, 1, 1, True),
    ((3, 6, 8, 16), (3, 3), 17, 1, 1, "each"),
    ((5, 5, 7, 17), (3, 3), 16, 1, 0, False),
    ((2, 4, 6, 16), (3, 3), 16, 1, 2, True),
    ((2, 8, 16, 16), (3, 3), 16, 1, 1, True),
    ((2, 6, 8, 16), (3, 3), 16, 1, 3, True),
    ((9, 20, 21, 16), (3, 3), 16, 1, 1, True),
]  # fmt: skip


def inputs(images, kernel, channels, bias, swapped):
    """The shapes of images, kernel and bias; a transposed convolution has the kernel's channels the other way."""
    biases = [(images[0], channels) if bias == "each" else (channels,)] if bias else []
    channel_axes = (channels, images[3]) if swapped else (images[3], channels)
    return (images, (*kernel, *channel_axes), *biases)


CASES = [
    Case(
        op,
        inputs(images, kernel, channels, bias, swapped=op == "conv_transpose2d"),
        lambda *a, r=reference, s=stride, p=padding: r(*a, stride=s, padding=p),
        settings={"stride": stride, "padding": padding},
        terms=50,
    )
    for op, reference in [("conv2d", convolved), ("conv_transpose2d", transposed)]
    for images, kernel, channels, stride, padding, bias in WAYS
]


def convolved_1d(x, weight, bias=None, dilation=1, padding=0):
    """Each output sums over the taps the sample that each falls on times its matrix."""
    (B, L, _), (k, _, Co) = x.shape, weight.shape
    y = np.zeros((B, L + 2 * padding - (k - 1) * dilation, Co))
    for i, u in itertools.product(range(y.shape[1]), range(k)):
        if 0 <= (place := i + dilation * u - padding) < L:
            y[:, i] += x[:, place] @ weight[u]
    return y + (0 if bias is None else bias if bias.ndim == 1 else bias[:, None])


CASES += [
    Case(
        "conv1d",
        (shape, (taps, shape[2], 3), *([(shape[0], 3) if bias == "each" else (3,)] if bias else [])),
        lambda *a, d=dilation, p=padding: convolved_1d(*a, dilation=d, padding=p),
        settings={"dilation": dilation, "padding": padding},
        terms=50,
    )
    for shape, taps, dilation, padding, bias in [
        ((1, 1, 1), 1, 1, 0, True),
        ((2, 7, 2), 1, 3, 0, "each"),
        ((2, 7, 2), 3, 1, 1, True),
        ((3, 8, 2), 3, 2, 2, False),
        ((2, 9, 4), 3, 4, 4, "each"),
        ((2, 9, 4), 3, 4, 0, True),
        ((2, 5, 2), 3, 8, 8, True),  # both outer taps fall outside
        ((2, 6, 2), 2, 3, 1, True),
        ((1, 12, 3), 5, 2, 4, "each"),
        ((2, 6, 2), 3, 1, 4, True),  # more zeros than the kernel spans
        ((5, 40, 20), 3, 5, 5, True),
    ]
]


@each(CASES)
def test_value(case, device):
    check_values(case)


@each(CASES)
def test_gradient(case, device):
    check_gradients(case)


def test_the_transposed_convolution_is_the_adjoint():
    """<conv(x), y> = <x, conv_transpose(y)> with the same kernel."""
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(2, 9, 7, 3)), rng.normal(size=(2, 5, 4, 4)), rng.normal(size=(3, 3, 3, 4))
    there = (ops.conv2d(x, w, stride=2, padding=1).numpy() * y).sum()
    back = (x * ops.conv_transpose2d(y, w, stride=2, padding=1).numpy()).sum()
    assert abs(there - back) < 1e-10


@pytest.mark.parametrize("op", [ops.conv2d, ops.conv_transpose2d])
@pytest.mark.parametrize(
    ("x", "weight", "settings", "message"),
    [
        ((4, 4, 3), (3, 3, 3, 3), {}, r"\(4, 4, 3\), \(3, 3, 3, 3\).*\(B, H, W, C\)"),
        ((1, 4, 4, 2), (3, 3, 3, 3), {}, r"\(1, 4, 4, 2\).*takes 3 channels, the images have 2"),
        ((1, 4, 4, 3), (3, 3, 3, 3), {"stride": 0}, "stride must be >= 1.*got 0"),
        ((1, 4, 4, 3), (3, 3, 3, 3), {"padding": -1}, "padding"),
    ],
)
def test_shapes_that_do_not_fit_are_named(op, x, weight, settings, message):
    with pytest.raises(ValueError, match=message):
        op(Tensor(np.zeros(x)), Tensor(np.zeros(weight)), **settings)


@pytest.mark.parametrize(
    ("x", "weight", "settings", "message"),
    [
        ((4, 3), (3, 3, 3), {}, r"\(B, L, C\).*got \(4, 3\)"),
        ((1, 4, 3), (3, 2, 3), {}, r"got \(1, 4, 3\) and \(3, 2, 3\)"),
        ((1, 4, 3), (3, 3, 3), {"dilation": 0}, "dilation must be >= 1.*got 0"),
        ((1, 4, 3), (3, 3, 3), {"padding": -1}, "padding >= 0, got 1 and -1"),
        ((1, 4, 3), (3, 3, 3), {"dilation": 2}, "a sequence of 4 is too short for a kernel that spans 5"),
    ],
)
def test_sequences_that_do_not_fit_are_named(x, weight, settings, message):
    with pytest.raises(ValueError, match=message):
        ops.conv1d(Tensor(np.zeros(x)), Tensor(np.zeros(weight)), **settings)


def test_a_padding_that_leaves_nothing_is_named():
    with pytest.raises(ValueError, match=r"conv_transpose2d\(\(1, 4, 4, 3\), .*padding of 3 leaves nothing"):
        ops.conv_transpose2d(np.zeros((1, 4, 4, 3)), np.zeros((3, 3, 3, 3)), padding=3)


def test_an_image_smaller_than_the_kernel_is_named():
    with pytest.raises(ValueError, match=r"conv2d\(\(1, 2, 5, 1\), .*2 x 5 is too small.*3 x 3"):
        ops.conv2d(np.zeros((1, 2, 5, 1)), np.zeros((3, 3, 1, 1)))


def test_a_bias_of_another_length_is_named():
    with pytest.raises(ValueError, match=r"conv2d\(\(1, 4, 4, 1\), \(3, 3, 1, 2\), \(3,\)\)"):
        ops.conv2d(np.zeros((1, 4, 4, 1)), np.zeros((3, 3, 1, 2)), np.zeros(3))


@pytest.mark.parametrize("shape", [(3, 8, 8, 64), (2, 7, 14, 32), (1, 32, 32, 16), (8, 8, 8, 256)])
def test_winograds_way_is_as_exact_as_the_direct_one(shape):
    """Against float64, which always goes the direct way: value and both gradients to 5e-5 of the largest element."""
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=shape), rng.normal(size=(3, 3, shape[3], 48)), rng.normal(size=(*shape[:3], 48))
    results = []
    for dtype, way in [(np.float32, Winograd), (np.float64, Windows)]:
        x, weight, g = (a.astype(dtype) for a in arrays)
        assert choose_way(x, weight.shape, shape[1:3], 1, 1) is way
        x, weight = Tensor(x, requires_grad=True), Tensor(weight, requires_grad=True)
        y = ops.conv2d(x, weight, padding=1)
        y.backward(g)
        results.append((y.data, x.grad, weight.grad))
    for ours, exact in zip(*results, strict=True):
        assert np.abs(ours - exact).max() < 5e-5 * np.abs(exact).max()


def test_the_matrices_are_those_of_winograds_formula():
    """Aᵀ [(G w) ⊙ (Bᵀ d)] is d filtered by w, for every d and w, since it is for all of a basis."""
    for d, w in itertools.product(np.eye(6, dtype=np.float32), np.eye(3, dtype=np.float32)):
        assert np.allclose(_AT @ ((_G @ w) * (_BT @ d)), np.correlate(d, w), atol=1e-6)


def test_a_few_tiles_go_the_direct_way():
    """Winograd's larger kernel is not worth making for them; nor is float64 ever anything but exact."""
    x = np.zeros((1, 8, 8, 16), np.float32)
    assert choose_way(x, (3, 3, 16, 16), (8, 8), 1, 1) is Windows
    assert choose_way(np.repeat(x, 2, axis=0), (3, 3, 16, 16), (8, 8), 1, 1) is Winograd
