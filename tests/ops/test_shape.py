"""Ops that rearrange, and those that change an image's resolution."""

import itertools

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.ops.case import Case, check_gradients, check_values, each
from tinydiff import Tensor, backend, ops


def padded(x, widths):
    y = np.zeros([n + before + after for n, (before, after) in zip(x.shape, widths, strict=True)])
    for place in np.ndindex(x.shape):
        y[tuple(p + before for p, (before, _) in zip(place, widths, strict=True))] = x[place]
    return y


def upsampled(x, f=2):
    B, H, W, C = x.shape
    y = np.empty((B, H * f, W * f, C))
    for i, j in itertools.product(range(H * f), range(W * f)):
        y[:, i, j] = x[:, i // f, j // f]
    return y


def downsampled(x, f=2):
    B, H, W, C = x.shape
    y = np.zeros((B, H // f, W // f, C))
    for i, j in itertools.product(range(H), range(W)):
        y[:, i // f, j // f] += x[:, i, j] / f**2
    return y


def to_depth(x, f=2):
    B, H, W, C = x.shape
    y = np.empty((B, H // f, W // f, f * f * C))
    for i, j, c in itertools.product(range(H), range(W), range(C)):
        y[:, i // f, j // f, ((i % f) * f + j % f) * C + c] = x[:, i, j, c]
    return y


def to_space(y, f=2):
    B, H, W, C = y.shape
    x = np.empty((B, H * f, W * f, C // f**2))
    for i, j, c in itertools.product(range(H * f), range(W * f), range(C // f**2)):
        x[:, i, j, c] = y[:, i // f, j // f, ((i % f) * f + j % f) * (C // f**2) + c]
    return x


def joined(op, axis, shapes, reference):
    """A case of concat or stack, which take a list of tensors."""
    return Case(op, shapes, reference, settings={"axis": axis}, call=lambda op, *tensors, axis: op(list(tensors), axis))


def pad(shape, widths):
    return Case("pad", (shape,), lambda x: padded(x, widths), settings={"widths": widths})


CASES = [
    Case("reshape", ((2, 3, 4),), lambda x: np.array(x.ravel().tolist()).reshape(4, 6), call=lambda op, x: op(x, 4, 6)),
    Case("reshape", ((2, 6),), lambda x: x.reshape(3, 1, 4), call=lambda op, x: op(x, (3, -1, 4))),
    Case("reshape", ((),), lambda x: x.reshape(1, 1), call=lambda op, x: op(x, 1, 1)),
    Case("reshape", ((3, 1),), lambda x: x.reshape(-1), call=lambda op, x: op(x, -1)),
    Case("transpose", ((2, 3, 4),), lambda x: np.moveaxis(x, 2, 0), call=lambda op, x: op(x, 2, 0, 1)),
    Case("transpose", ((2, 3, 1),), lambda x: x.T, call=lambda op, x: op(x)),
    Case("transpose", ((1, 2, 3, 4),), lambda x: x.swapaxes(1, 3), call=lambda op, x: op(x, 0, -1, 2, 1)),
    Case("broadcast_to", ((3, 1),), lambda x: x + np.zeros((2, 3, 4)), settings={"shape": (2, 3, 4)}),
    Case("broadcast_to", ((),), lambda x: x + np.zeros((2, 2)), settings={"shape": (2, 2)}),
    joined("concat", -1, ((2, 3), (2, 1)), lambda a, b: np.array([[*r, *s] for r, s in zip(a, b, strict=True)])),
    joined("concat", 0, ((1, 2), (3, 2), (2, 2)), lambda *arrays: np.array([row for a in arrays for row in a])),
    joined("concat", -2, ((2, 1, 3), (2, 4, 3)), lambda a, b: np.array([[*r, *s] for r, s in zip(a, b, strict=True)])),
    joined("stack", 0, ((2, 3), (2, 3)), lambda a, b: np.array([a, b])),
    joined("stack", -1, ((2, 3), (2, 3), (2, 3)), lambda *arrays: np.moveaxis(np.array(arrays), 0, 2)),
    pad((2, 3), ((1, 0), (2, 3))),
    pad((1, 2, 3, 1), ((0, 0), (1, 1), (0, 2), (0, 0))),
    *(
        Case(op, (shape,), lambda x, r=reference, f=factor: r(x, f), settings={"factor": factor})
        for op, reference, shape, factor in [
            ("upsample_nearest", upsampled, (2, 3, 4, 5), 2),
            ("upsample_nearest", upsampled, (1, 2, 1, 3), 3),
            ("downsample_average", downsampled, (2, 4, 6, 3), 2),
            ("downsample_average", downsampled, (1, 3, 6, 1), 3),
            ("space_to_depth", to_depth, (2, 4, 6, 3), 2),
            ("space_to_depth", to_depth, (1, 3, 6, 1), 3),
            ("depth_to_space", to_space, (2, 2, 3, 12), 2),
            ("depth_to_space", to_space, (1, 1, 2, 9), 3),
        ]
    ),
]  # fmt: skip


@each(CASES)
def test_value(case, device):
    check_values(case)


@each(CASES)
def test_gradient(case, device):
    check_gradients(case)


def test_depth_and_space_undo_each_other(device):
    x = np.arange(48.0).reshape(1, 4, 4, 3)
    there = ops.space_to_depth(Tensor(backend.to_device(x)))
    assert there.shape == (1, 2, 2, 12)
    assert_close(ops.depth_to_space(there), x)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: ops.reshape(Tensor(np.zeros((2, 3))), 4), r"reshape\(\(2, 3\)\).*into shape \(4,\)"),
        (lambda: ops.downsample_average(Tensor(np.zeros((1, 3, 4, 1)))), r"\(1, 3, 4, 1\).*2 must divide.*3 x 4"),
        (lambda: ops.space_to_depth(Tensor(np.zeros((1, 4, 5, 1)))), r"2 must divide.*4 x 5"),
        (lambda: ops.depth_to_space(Tensor(np.zeros((1, 4, 4, 6)))), r"4, must divide.*6"),
        (lambda: ops.concat([Tensor(np.zeros((2, 3))), Tensor(np.zeros((3, 3)))]), r"concat\(\(2, 3\), \(3, 3\)\)"),
        (lambda: ops.broadcast_to(Tensor(np.zeros((2, 3))), shape=(3, 3)), r"broadcast_to\(\(2, 3\)\)"),
        (lambda: ops.upsample_nearest(Tensor(np.zeros((4, 4, 3)))), r"upsample_nearest\(\(4, 4, 3\)\)"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_named(use, message):
    with pytest.raises(ValueError, match=message):
        use()
