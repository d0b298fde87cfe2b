"""The losses against their definitions."""

import math

import numpy as np
import pytest

from tests.ops.case import Case, check_gradients, check_values, each
from tinydiff import Tensor, backend, ops

LARGE = (2, backend.BLOCK // 2 + 3)


def mse(a, b):
    return sum((p - t) ** 2 for p, t in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True)) / a.size


def cross_entropy(labels):
    def reference(logits):
        probabilities = [math.exp(row[n]) / sum(map(math.exp, row)) for row, n in zip(logits, labels, strict=True)]
        return -sum(map(math.log, probabilities)) / len(labels)

    return reference


def weighted(labels):
    def reference(logits, weights):
        losses = (cross_entropy([label])(row[None]) for row, label in zip(logits, labels, strict=True))
        return sum(w * loss for w, loss in zip(weights, losses, strict=True))

    return reference


def kl(mean, log_variance):
    """The divergence of N(m, e^s) from N(0, 1) in one dimension, ½ (m² + e^s − s − 1), summed over an item."""
    total = sum(0.5 * (m**2 + math.exp(s) - s - 1) for m, s in zip(mean.ravel(), log_variance.ravel(), strict=True))
    return total / len(mean)


def with_labels(labels, classes):
    return Case(
        "cross_entropy", ((len(labels), classes),), cross_entropy(labels), settings={"labels": np.array(labels)},
        call=lambda op, x, labels: op(x, labels), terms=4,
    )  # fmt: skip


CASES = [
    *(Case("mse_loss", (shape, shape), mse, terms=10) for shape in [(), (1,), (3, 4), (2, 3, 3, 1)]),
    with_labels([0], 1),
    with_labels([2, 0, 2, 1], 3),
    with_labels([9], 10),
    Case(
        "cross_entropy",
        ((3, 4), (3,)),
        weighted([1, 0, 3]),
        settings={"labels": np.array([1, 0, 3])},
        call=lambda op, x, weights, labels: op(x, labels, weights),
        terms=4,
    ),
    *(Case("kl_standard_normal", (shape, shape), kl, terms=10) for shape in [(1, 1), (3, 4), (2, 3, 3, 2)]),
]


@each(CASES)
def test_value(case, device):
    check_values(case)


@each(CASES)
def test_gradient(case, device):
    check_gradients(case)


def test_more_than_one_block():
    case = Case("mse_loss", (LARGE, LARGE), lambda a, b: np.mean((a - b) ** 2), terms=50)
    check_values(case)
    check_gradients(case)


def test_kl_against_numerical_integration():
    m, s, x = 0.7, -0.4, np.linspace(-12, 12, 20001)
    p = np.exp(-((x - m) ** 2) / (2 * np.exp(s))) / np.sqrt(2 * np.pi * np.exp(s))
    q = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    inside = p > 0
    integral = np.sum(p[inside] * np.log(p[inside] / q[inside])) * (x[1] - x[0])
    assert abs(ops.kl_standard_normal(Tensor(np.array([[m]])), Tensor(np.array([[s]]))).item() - integral) < 1e-9


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: ops.mse_loss(Tensor(np.zeros((2, 3))), np.zeros((3, 2))), r"mse_loss\(\(2, 3\), \(3, 2\)\)"),
        (lambda: ops.mse_loss(Tensor(np.zeros((2, 3))), np.zeros(3)), r"mse_loss\(\(2, 3\), \(3,\)\)"),
        (lambda: ops.cross_entropy(Tensor(np.zeros((2, 3))), np.array([0, 1, 2])), r"\(B, K\).*\(2, 3\) and \(3,\)"),
        (lambda: ops.cross_entropy(Tensor(np.zeros(3)), np.array([0, 1, 2])), r"\(3,\) and \(3,\)"),
        (lambda: ops.cross_entropy(Tensor(np.zeros((2, 3))), np.array([0, 3])), r"0\.\.2, got 0\.\.3"),
        (lambda: ops.cross_entropy(Tensor(np.zeros((2, 3))), np.array([-1, 1])), r"0\.\.2, got -1\.\.1"),
        (lambda: ops.cross_entropy(Tensor(np.zeros((1, 3))), np.zeros(1, int), np.ones(2)), r"\(1,\), got \(2,\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(use, message):
    with pytest.raises(ValueError, match=message):
        use()
