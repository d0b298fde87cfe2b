"""Softmax, its logarithm, and attention, against loops over rows."""

import math

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.ops.case import Case, check_gradients, check_values, each
from tinydiff import Tensor, backend, ops


def softmaxed(x, axis=-1):
    def row(v):
        weights = [math.exp(e) for e in v]
        return [w / sum(weights) for w in weights]

    return np.apply_along_axis(row, axis, x)


def attended(q, k, v, mask=None):
    """For each query: its products with the keys, their softmax over those it may see, the mean of the values."""
    batch = q.shape[:-2]
    mask = np.broadcast_to(True if mask is None else mask, (*batch, q.shape[-2], k.shape[-2]))
    y = np.zeros((*batch, q.shape[-2], v.shape[-1]))
    for b in np.ndindex(batch):
        for i in range(q.shape[-2]):
            seen = [j for j in range(k.shape[-2]) if mask[(*b, i, j)]]
            weights = softmaxed(np.array([q[b][i] @ k[b][j] / math.sqrt(q.shape[-1]) for j in seen]))
            y[b][i] = sum(w * v[b][j] for w, j in zip(weights, seen, strict=True))
    return y


CAUSAL = np.tril(np.ones((3, 3), bool))
PADDING = np.array([[[True, False, True, False]], [[True, True, True, True]]])


def attention(*shapes, mask=None):
    settings = {} if mask is None else {"mask": mask}
    return Case("attention", shapes, lambda *arrays: attended(*arrays, mask), settings=settings, terms=10)


def self_attention(shape, heads, mask=None):
    """Each head by itself, from its own columns of the array in which all queries, keys and values stand."""

    def reference(qkv):
        q, k, v = np.split(qkv, 3, axis=-1)
        d = q.shape[-1] // heads
        pieces = [slice(i * d, (i + 1) * d) for i in range(heads)]
        own = [
            None if mask is None else np.broadcast_to(mask, (len(qkv), heads, *[shape[1]] * 2))[:, i]
            for i in range(heads)
        ]
        return np.concatenate(
            [attended(*(a[..., p] for a in (q, k, v)), m) for p, m in zip(pieces, own, strict=True)], -1
        )

    settings = {"heads": heads} | ({} if mask is None else {"mask": mask})
    return Case("self_attention", (shape,), reference, settings=settings, terms=10)


CASES = [
    *(
        Case(op, (shape,), lambda x, r=reference, a=axis: r(x, a), settings={"axis": axis}, terms=4)
        for op, reference in [("softmax", softmaxed), ("log_softmax", lambda x, axis: np.log(softmaxed(x, axis)))]
        for shape, axis in [((3,), -1), ((1, 1), -1), ((2, 5), 0), ((2, 3, 4), 1), ((2, 3, 4), -1), ((300, 11), -1)]
    ),
    attention((3, 2), (3, 2), (3, 4)),
    attention((2, 3, 4), (2, 5, 4), (2, 5, 1)),
    attention((1, 2, 3, 4), (1, 2, 6, 4), (1, 2, 6, 4)),
    attention((2, 3, 4), (2, 3, 4), (2, 3, 4), mask=CAUSAL),
    attention((2, 3, 5), (2, 4, 5), (2, 4, 2), mask=PADDING),
    self_attention((1, 1, 3), 1),
    self_attention((2, 3, 24), 2),
    self_attention((5, 4, 12), 4),
    self_attention((2, 3, 12), 2, mask=CAUSAL),
    self_attention((2, 4, 12), 2, mask=PADDING[:, None]),
    self_attention((40, 16, 96), 2),
]  # fmt: skip


@each(CASES)
def test_value(case, device):
    check_values(case)


@each(CASES)
def test_gradient(case, device):
    check_gradients(case)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_softmax_does_not_overflow(dtype, device):
    x = Tensor(backend.to_device(np.array([[1e4, 0, -1e4], [-1e4, -1e4, -1e4]], dtype)), requires_grad=True)
    with np.errstate(over="raise", invalid="raise"):
        y, log_y = ops.softmax(x), ops.log_softmax(x)
        (y.sum() + log_y.sum()).backward()
    assert_close(y, np.array([[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]], dtype), atol=1e-6)
    assert_close(log_y, np.array([[0, -1e4, -2e4], [-math.log(3)] * 3], dtype), atol=1e-3)
    assert np.isfinite(backend.to_numpy(x.grad)).all()


@pytest.mark.filterwarnings("error")
def test_attention_does_not_overflow(device):
    """Where one key outweighs all others, its value comes out."""
    q, k = 100 * np.eye(3, dtype=np.float32), 100 * np.eye(3, dtype=np.float32)[[2, 0, 1]]
    v = np.arange(6, dtype=np.float32).reshape(3, 2)
    tensors = [Tensor(backend.to_device(a), requires_grad=True) for a in (q, k, v)]
    y = ops.attention(*tensors)
    y.sum().backward()
    assert_close(y, v[[1, 2, 0]])
    assert_close(tensors[2].grad, np.ones_like(v))


@pytest.mark.parametrize("shape", [(1, 7), (4, 3, 9)])
def test_rows_of_softmax_sum_to_one(shape):
    x = np.random.default_rng(1).normal(scale=5, size=shape)
    assert_close(ops.softmax(x).sum(axis=-1), np.ones(shape[:-1]), rtol=1e-14)


def test_a_masked_key_has_no_influence(device):
    """E27: whatever stands in a padded place, not even an enormous value, changes the result or gets a gradient."""
    rng = np.random.default_rng(2)
    q, k, v = (rng.normal(size=(2, n, 4)) for n in (3, 5, 5))
    mask = np.array([True, True, False, True, False])
    results = []
    for filler in (0.0, 1e6):
        k[:, ~mask] = v[:, ~mask] = filler
        tensors = [Tensor(backend.to_device(a), requires_grad=True) for a in (q, k, v)]
        y = ops.attention(*tensors, mask=backend.to_device(mask))
        y.sum().backward()
        results.append([backend.to_numpy(a) for a in (y.data, *(t.grad for t in tensors))])
    for first, second in zip(*results, strict=True):
        assert_close(second, first)
    assert not results[0][2][:, ~mask].any() and not results[0][3][:, ~mask].any()


@pytest.mark.parametrize(
    ("op", "shapes", "settings", "message"),
    [
        (
            ops.attention,
            [(2, 3, 4), (2, 3, 5), (2, 3, 4)],
            {},
            r"attention\(\(2, 3, 4\), \(2, 3, 5\).*keys \(..., M, d\)",
        ),
        (ops.attention, [(2, 3, 4), (2, 3, 4), (2, 2, 4)], {}, r"values \(..., M, e\)"),
        (ops.attention, [(2, 3, 4), (1, 3, 4), (1, 3, 4)], {}, r"queries \(..., N, d\)"),
        (
            ops.self_attention,
            [(2, 3, 8)],
            {"heads": 2},
            r"self_attention\(\(2, 3, 8\).* of 2 heads, \(B, N, 3 heads d\)",
        ),
        (ops.self_attention, [(3, 6)], {"heads": 2}, r"\(B, N, 3 heads d\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(op, shapes, settings, message):
    with pytest.raises(ValueError, match=message):
        op(*map(np.zeros, shapes), **settings)
