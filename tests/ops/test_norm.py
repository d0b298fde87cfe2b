"""GroupNorm and LayerNorm against loops over images and groups."""

import numpy as np
import pytest

from tests.helpers import assert_close
from tests.ops.case import Case, check_gradients, check_values, each
from tinydiff import Tensor, backend, ops


def group_normed(x, gamma, beta, groups, eps=1e-5, silu=False):
    y, width = np.empty_like(x), x.shape[-1] // groups
    for b in range(len(x)):
        for start in range(0, x.shape[-1], width):
            part = slice(start, start + width)
            members = x[b, ..., part]
            y[b, ..., part] = (members - members.mean()) / np.sqrt(members.var() + eps) * gamma[part] + beta[part]
    return y / (1 + np.exp(-y)) if silu else y


def layer_normed(x, gamma, beta, eps=1e-5):
    y = np.empty_like(x)
    for place in np.ndindex(x.shape[:-1]):
        y[place] = (x[place] - x[place].mean()) / np.sqrt(x[place].var() + eps) * gamma + beta
    return y


CASES = [
    *(
        Case(
            "group_norm",
            (shape, shape[-1:], shape[-1:]),
            lambda *a, g=groups, s=silu: group_normed(*a, groups=g, silu=s),
            settings={"groups": groups, "silu": silu},
            terms=30,
        )
        for shape, groups in [
            ((1, 3, 2, 4), 2), ((2, 5, 3, 6), 3), ((3, 2, 2, 4), 4), ((2, 4, 4, 8), 1), ((4, 7, 6), 2), ((5, 8), 2),
            ((3, 40, 31, 32), 8),
        ]
        for silu in (False, True)
    ),
    Case(
        "group_norm", ((2, 3, 3, 4), (4,), (4,)), lambda *a: group_normed(*a, groups=2, eps=0.1),
        settings={"groups": 2, "eps": 0.1}, terms=30,
    ),
    *(
        Case("layer_norm", (shape, shape[-1:], shape[-1:]), layer_normed, terms=30)
        for shape in [(5,), (1, 4), (3, 2, 7), (200, 33)]
    ),
    Case("layer_norm", ((2, 3), (3,), (3,)), lambda *a: layer_normed(*a, eps=0.5), settings={"eps": 0.5}, terms=30),
]  # fmt: skip


@each(CASES)
def test_value(case, device):
    check_values(case)


@each(CASES)
def test_gradient(case, device):
    check_gradients(case)


@pytest.mark.parametrize("offset", [0.0, 100.0, -1000.0])
@pytest.mark.parametrize(
    ("op", "settings", "reference"), [("group_norm", {"groups": 2}, group_normed), ("layer_norm", {}, layer_normed)]
)
def test_a_large_mean_costs_no_accuracy(op, settings, reference, offset, device):
    """A variance taken as E[x²] − E[x]² would lose all digits here."""
    x = (np.random.default_rng(0).normal(size=(2, 8, 8, 4)) + offset).astype(np.float32)
    y = getattr(ops, op)(
        backend.to_device(x),
        backend.to_device(np.ones(4, np.float32)),
        backend.to_device(np.zeros(4, np.float32)),
        **settings,
    )
    expected = reference(x.astype(np.float64), np.ones(4), np.zeros(4), **settings).astype(np.float32)
    assert_close(y, expected, atol=1e-6 * max(1, abs(offset)))


@pytest.mark.parametrize(
    ("op", "gamma", "beta", "settings", "message"),
    [
        (ops.group_norm, 6, 6, {"groups": 4}, r"\(2, 3, 6\).*4 groups must divide the 6 channels"),
        (ops.group_norm, 3, 6, {"groups": 3}, r"group_norm\(\(2, 3, 6\), \(3,\), \(6,\)\)"),
        (ops.group_norm, 6, 1, {"groups": 3}, r"group_norm\(\(2, 3, 6\), \(6,\), \(1,\)\)"),
        (ops.layer_norm, 6, 3, {}, r"layer_norm\(\(2, 3, 6\), \(6,\), \(3,\)\): .*\(6,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(op, gamma, beta, settings, message):
    with pytest.raises(ValueError, match=message):
        op(np.zeros((2, 3, 6)), np.zeros(gamma), np.zeros(beta), **settings)


@pytest.mark.filterwarnings("error")
def test_silu_of_what_is_far_out():
    """Its limits are 0 and z, its slopes 0 and 1, and nothing overflows with a warning."""
    x = Tensor(np.ones((1, 4, 2), np.float32))
    beta = Tensor(np.array([-500, 500], np.float32), requires_grad=True)
    y = ops.group_norm(x, np.ones(2, np.float32), beta, groups=2, silu=True)
    y.backward(np.ones_like(y.data))
    assert_close(y.data[0, 0], np.array([0, 500], np.float32), atol=1e-6)
    assert_close(beta.grad, np.array([0, 4], np.float32), atol=1e-6)
