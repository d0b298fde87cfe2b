"""Losses, each a mean over the batch: squared error, cross-entropy, the divergence of a Gaussian from the normal."""

from __future__ import annotations

from typing import Any

from tinydiff.autograd import Tensor, op
from tinydiff.backend import Array, array_module, value_range
from tinydiff.formula import elementwise
from tinydiff.ops.elementwise import exp
from tinydiff.ops.reduce import mean
from tinydiff.ops.softmax import log_softmax


@op
def mse_loss(prediction: Array, target: Array) -> Any:
    """The mean of (prediction − target)² over all elements; the two have one shape."""
    if prediction.shape != target.shape:
        raise ValueError("prediction and target must have one shape")
    difference = _difference(prediction, target)
    flat = difference.reshape(-1)

    def vjp(g: Array) -> tuple[Any, Any]:
        scale = g * (2 / difference.size)
        return (lambda: difference * scale), (lambda: difference * -scale)

    return (flat @ flat) / flat.size, vjp


@elementwise
def _difference(xp: Any, a: Array, b: Array) -> Array:
    return a - b


@op
def _pick(x: Array, *, labels: Array) -> Any:
    xp = array_module(x, labels)
    rows = xp.arange(len(x))

    def vjp(g: Array) -> Array:
        dx = xp.zeros_like(x)
        dx[rows, labels] = g
        return dx

    return x[rows, labels], vjp


def cross_entropy(logits: Tensor, labels: Array, weights: Array | None = None) -> Tensor:
    """The mean of −log softmax(logits)[label]; with weights w their weighted sum, Σ_i w_i (−log softmax(...)[label])_i.

    logits: (B, K); labels: (B,) whole numbers in 0..K-1; weights: (B,), in the precision of the logits. Raises
    ValueError for labels of another shape or range, or weights of another shape.
    """
    K = logits.shape[-1]
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"cross_entropy needs logits (B, K) and labels (B,), got {logits.shape} and {labels.shape}")
    if (found := value_range(labels)) and not (0 <= found[0] and found[1] < K):
        raise ValueError(f"labels must be in 0..{K - 1}, got {found[0]}..{found[1]}")
    log_p = _pick(log_softmax(logits), labels=labels)
    if weights is None:
        return -mean(log_p)
    if weights.shape != labels.shape:
        raise ValueError(f"there must be a weight for each of the labels {labels.shape}, got {weights.shape}")
    return -(log_p * weights).sum()


def kl_standard_normal(mean_: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(m, e^s I) to N(0, I)) = ½ Σ (m² + e^s − s − 1), summed over an item, averaged over the batch (axis 0)."""
    terms = mean_ * mean_ + exp(log_variance) - log_variance - 1
    return mean(terms.reshape(terms.shape[0], -1).sum(axis=1)) * 0.5
