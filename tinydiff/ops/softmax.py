"""Softmax, its logarithm, and attention."""

from __future__ import annotations

import math
from typing import Any

from tinydiff.autograd import Tensor, op
from tinydiff.backend import Array, array_module, each_block, product


@op
def softmax(x: Array, *, axis: int = -1) -> Any:
    """e^x_i / Σ_j e^x_j along an axis; the largest x is subtracted first, so that nothing overflows."""
    xp = array_module(x)
    y = x - x.max(axis=axis, keepdims=True)
    xp.exp(y, out=y)
    y /= y.sum(axis=axis, keepdims=True)

    def vjp(g: Array) -> Array:
        gy = g * y
        gy -= y * gy.sum(axis=axis, keepdims=True)
        return gy

    return y, vjp


@op
def log_softmax(x: Array, *, axis: int = -1) -> Any:
    """x_i − log Σ_j e^x_j along an axis, without overflow."""
    xp = array_module(x)
    y = x - x.max(axis=axis, keepdims=True)
    y -= xp.log(xp.exp(y).sum(axis=axis, keepdims=True))
    return y, lambda g: g - xp.exp(y) * g.sum(axis=axis, keepdims=True)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Array | None = None) -> Tensor:
    """softmax(Q Kᵀ / √d) V (E27; Vaswani et al. 2017, eq. 1).

    q: (..., N, d), k: (..., M, d), v: (..., M, e); gives (..., N, e). mask: boolean, broadcast to (..., N, M); where
    it is False, the key has no influence on the query. A query must see at least one key. Raises ValueError for shapes
    that do not fit.
    """
    return _attention(q, k, v, mask)


def self_attention(qkv: Tensor, mask: Array | None = None, *, heads: int) -> Tensor:
    """attention(Q, K, V) in several heads, with Q, K and V side by side in one array, whose parts are never copied.

    qkv: (B, N, 3 heads d), for each token its queries, keys and values, each (heads d); gives (B, N, heads d).
    mask: boolean, broadcast to (B, heads, N, N), as in `attention`. Raises ValueError for shapes that do not fit.
    """
    return _self_attention(qkv, mask, heads=heads)


@op
def _attention(q: Array, k: Array, v: Array, mask: Array | None) -> Any:
    if q.shape[:-2] != k.shape[:-2] or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise ValueError("attention needs queries (..., N, d), keys (..., M, d) and values (..., M, e)")
    xp, shape = array_module(q), (*q.shape[:-1], v.shape[-1])
    if q.ndim == 2:
        q, k, v = q[None], k[None], v[None]  # a batch of one; the engine takes the axis off the gradients
    y = xp.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
    log_z = _attend(q, k, v, mask, out=y)

    def vjp(g: Array) -> tuple[Any, ...]:
        gradients = xp.empty_like(q), xp.empty_like(k), xp.empty_like(v)
        _attend_vjp(g.reshape(y.shape), q, k, v, mask, y, log_z, out=gradients)
        return *gradients, None

    return y.reshape(shape), vjp


@op
def _self_attention(qkv: Array, mask: Array | None, *, heads: int) -> Any:
    if qkv.ndim != 3 or qkv.shape[2] % (3 * heads):
        raise ValueError(f"self_attention needs the queries, keys and values of {heads} heads, (B, N, 3 heads d)")
    B, N, C = qkv.shape
    xp = array_module(qkv)
    y = xp.empty((B, N, C // 3), qkv.dtype)
    (q, k, v), (y_heads,) = _by_heads(qkv, 3, heads), _by_heads(y, 1, heads)
    log_z = _attend(q, k, v, mask, out=y_heads)

    def vjp(g: Array) -> tuple[Any, ...]:
        d_qkv, (g_heads,) = xp.empty((B, N, C), qkv.dtype), _by_heads(g, 1, heads)
        _attend_vjp(g_heads, q, k, v, mask, y_heads, log_z, out=_by_heads(d_qkv, 3, heads))
        return d_qkv, None

    return y, vjp


def _by_heads(x: Array, parts: int, heads: int) -> Array:
    """(B, N, parts heads d) -> (parts, B, heads, N, d), a view where x has no gaps."""
    B, N, C = x.shape
    return x.reshape(B, N, parts, heads, C // (parts * heads)).transpose(2, 0, 3, 1, 4)


def _attend(q: Array, k: Array, v: Array, mask: Array | None, out: Array) -> Array:
    """Write softmax(Q Kᵀ/√d) V to `out`; gives log Σ_j e^score_j of each query, from which backward has the weights.

    The scores of a few items at a time are made, used and forgotten within the cache (Dao et al. 2022).
    """
    xp, penalty = array_module(q), _penalty(q, k, mask)
    log_z, ones = xp.empty((*q.shape[:-1], 1), q.dtype), xp.ones((k.shape[-2], 1), q.dtype)

    def work(block: slice) -> None:
        weights = _scores(q[block], k[block], penalty, block)
        largest = weights.max(axis=-1, keepdims=True)
        weights -= largest
        xp.exp(weights, out=weights)
        total = product(weights, ones)
        xp.divide(product(weights, v[block]), total, out=out[block])
        log_z[block] = largest + xp.log(total)

    each_block(work, len(q), _bytes_per_item(q, k), on=q)
    return log_z


def _attend_vjp(g: Array, q: Array, k: Array, v: Array, mask: Array | None, y: Array, log_z: Array, out: Any) -> None:
    """dV = Pᵀ g; dS = P (g Vᵀ − Σ g y); dQ = dS K/√d; dK = dSᵀ Q/√d, with P = e^(S − log_z) made again."""
    xp, penalty, scale = array_module(q), _penalty(q, k, mask), 1 / math.sqrt(q.shape[-1])
    (dq, dk, dv), ones = out, xp.ones((v.shape[-1], 1), v.dtype)

    def work(block: slice) -> None:
        weights = _scores(q[block], k[block], penalty, block)
        weights -= log_z[block]
        xp.exp(weights, out=weights)
        dv[block] = product(weights.swapaxes(-1, -2), g[block])
        d_scores = product(g[block], v[block].swapaxes(-1, -2))
        d_scores -= product(g[block] * y[block], ones)
        d_scores *= weights
        d_scores *= scale
        dq[block] = product(d_scores, k[block])
        dk[block] = product(d_scores.swapaxes(-1, -2), q[block])

    each_block(work, len(q), _bytes_per_item(q, k), on=q)


def _scores(q: Array, k: Array, penalty: Array | None, block: slice) -> Array:
    """Q Kᵀ/√d of one block, where a masked key has −1e30 for its score."""
    scores = product(q * (1 / math.sqrt(q.shape[-1])), k.swapaxes(-1, -2))
    if penalty is not None:
        scores += penalty[block]
    return scores


def _penalty(q: Array, k: Array, mask: Array | None) -> Array | None:
    """What to add to the scores: 0, and −1e30 where the mask is False."""
    if mask is None:
        return None
    xp = array_module(mask)
    return xp.broadcast_to(xp.where(mask, 0.0, -1e30).astype(q.dtype), (*q.shape[:-1], k.shape[-2]))


def _bytes_per_item(q: Array, k: Array) -> int:
    """What a block passes over: two arrays of scores, and Q, K, V and the like."""
    return (2 * q[0].size * k.shape[-2] // q.shape[-1] + 4 * q[0].size) * q.itemsize
