"""The U-Net of nn/unet.py as plain functions in JAX, on a dictionary of our parameters, to compare speed with.

Their layouts are the same: kernels (kh, kw, in, out), matrices (in, out), images channels last. Needs jax, which
tinydiff itself never does. No patches, classes or context.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tinydiff.nn import UNetConfig

Parameters = dict[str, Any]
"""Arrays by the names that Module.state_dict gives them."""


def unet(p: Parameters, config: UNetConfig, x: jax.Array, t: jax.Array) -> jax.Array:
    """x (B, H, W, C) and t (B,) -> (B, H, W, C)."""
    half = config.base // 2
    angles = t[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    emb = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)
    emb = jax.nn.silu(linear(p, "time.outer", jax.nn.silu(linear(p, "time.inner", emb))))
    h = conv(p, "conv_in", x)
    skips = [h]
    for name in parts(p, "down"):
        h = stage(p, name, config, h, emb) if is_stage(p, name) else conv(p, f"{name}.conv", h, stride=2)
        skips.append(h)
    for name in parts(p, "middle"):
        h = stage(p, name, config, h, emb)
    for name in parts(p, "up"):
        if is_stage(p, name):
            h = stage(p, name, config, jnp.concatenate([h, skips.pop()], -1), emb)
        else:
            h = conv(p, f"{name}.conv", h.repeat(2, 1).repeat(2, 2))
    return conv(p, "conv_out", jax.nn.silu(norm(p, "norm_out", config, h)))


def parts(p: Parameters, where: str) -> list[str]:
    """The names "down.0", "down.1", ... of the parts that have parameters."""
    return [f"{where}.{i}" for i in sorted({int(name.split(".")[1]) for name in p if name.startswith(f"{where}.")})]


def is_stage(p: Parameters, name: str) -> bool:
    """Whether this part is a Stage, and not a change of resolution."""
    return f"{name}.block.emb.weight" in p


def stage(p: Parameters, name: str, config: UNetConfig, x: jax.Array, emb: jax.Array) -> jax.Array:
    """A ResBlock, and self-attention where there is some."""
    block = f"{name}.block"
    h = conv(p, f"{block}.conv1", jax.nn.silu(norm(p, f"{block}.norm1", config, x)))
    h = h + linear(p, f"{block}.emb", emb)[:, None, None]
    h = conv(p, f"{block}.conv2", jax.nn.silu(norm(p, f"{block}.norm2", config, h)))
    h = h + (conv(p, f"{block}.skip", x) if f"{block}.skip.weight" in p else x)
    return attention(p, f"{name}.attention", config, h) if f"{name}.attention.qkv.weight" in p else h


def attention(p: Parameters, name: str, config: UNetConfig, x: jax.Array) -> jax.Array:
    """Every pixel looks at every other."""
    B, H, W, C = x.shape
    qkv = linear(p, f"{name}.qkv", norm(p, f"{name}.norm", config, x)).reshape(B, H * W, 3, config.heads, -1)
    h = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
    return x + linear(p, f"{name}.out", h.reshape(B, H, W, C))


def norm(p: Parameters, name: str, config: UNetConfig, x: jax.Array) -> jax.Array:
    """GroupNorm."""
    grouped = x.reshape(len(x), -1, config.groups, x.shape[-1] // config.groups)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    return ((grouped - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape) * p[f"{name}.gamma"] + p[f"{name}.beta"]


def conv(p: Parameters, name: str, x: jax.Array, stride: int = 1) -> jax.Array:
    """A convolution that keeps the size, or halves it."""
    kernel = p[f"{name}.weight"]
    pad = (kernel.shape[0] - 1) // 2
    layouts = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=layouts)
    return y + p[f"{name}.bias"]


def linear(p: Parameters, name: str, x: jax.Array) -> jax.Array:
    """x W + b."""
    return x @ p[f"{name}.weight"] + p[f"{name}.bias"]


def adam(p: Parameters, m: Parameters, v: Parameters, g: Parameters, n: Any, lr: float) -> tuple[Parameters, ...]:
    """The n-th step of Adam: new parameters, m and v."""
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
    rate, root = lr / (1 - 0.9**n), jnp.sqrt(1 - 0.999**n)
    return jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) / root + 1e-8), p, m, v), m, v
