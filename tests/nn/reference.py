"""The layers, U-Net and transformer again: NumPy in float64, loops and sums as the equations have them, no tinydiff.

A layer's weights are a dict by name, as Module.state_dict gives them.
"""

import math

import numpy as np


def part(weights, name):
    """The weights of one module inside."""
    return {key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")}


def linear(x, w):
    return np.einsum("...i,io->...o", x, w["weight"]) + w.get("bias", 0)


def silu(x):
    return x / (1 + np.exp(-x))


def conv(x, w, stride=1, padding=None):
    """y[i, j] = bias + sum_uv x[s i + u - p, s j + v - p] weight[u, v], p = (k - 1)/2."""
    k = w["weight"].shape[0]
    p = (k - 1) // 2 if padding is None else padding
    x = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
    rows, columns = ((n - k) // stride + 1 for n in x.shape[1:3])
    y = np.empty((len(x), rows, columns, w["weight"].shape[3]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * stride : i * stride + k, j * stride : j * stride + k]
            y[:, i, j] = np.einsum("buvi,uvio->bo", window, w["weight"]) + w["bias"]
    return y


def group_norm(x, w, groups):
    y = np.empty(x.shape)
    size = x.shape[-1] // groups
    for b in range(len(x)):
        for c in range(0, x.shape[-1], size):
            group = x[b, ..., c : c + size]
            y[b, ..., c : c + size] = (group - group.mean()) / math.sqrt(group.var() + 1e-5)
    return y * w["gamma"] + w["beta"]


def layer_norm(x, w):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * w["gamma"] + w["beta"]


def sinusoidal(t, channels):
    half = channels // 2
    angles = [[float(s) / 10_000 ** (i / half) for i in range(half)] for s in t]
    return np.array([[*map(math.sin, row), *map(math.cos, row)] for row in angles])


def attention(q, k, v, heads, mask=None):
    """softmax(Q K^T / sqrt(d)) V for each head, one query after the other: (B, N, C), (B, M, C), (B, M, C)."""
    y, d = np.empty(q.shape), q.shape[-1] // heads
    for b in range(len(q)):
        seen = np.ones(k.shape[1], bool) if mask is None else mask[b]
        for head in range(heads):
            piece = slice(head * d, (head + 1) * d)
            for n in range(q.shape[1]):
                weight = np.exp(k[b, seen, piece] @ q[b, n, piece] / math.sqrt(d))
                y[b, n, piece] = weight / weight.sum() @ v[b, seen, piece]
    return y


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def transformer_block(x, w, heads, causal=False, mask=None, activation=gelu):
    """Causal attention is done token by token: each is the only query, and what is up to it are all the keys."""
    q, k, v = np.split(linear(layer_norm(x, part(w, "norm1")), part(w, "qkv")), 3, axis=-1)
    if causal:
        seen = np.ones(x.shape[:2], bool) if mask is None else mask
        tokens = ((slice(n, n + 1), slice(n + 1)) for n in range(x.shape[1]))
        h = [attention(q[:, at], k[:, upto], v[:, upto], heads, seen[:, upto]) for at, upto in tokens]
        h = np.concatenate(h, axis=1)
    else:
        h = attention(q, k, v, heads, mask)
    x = x + linear(h, part(w, "out"))
    return x + linear(activation(linear(layer_norm(x, part(w, "norm2")), part(w, "inner"))), part(w, "outer"))


def transformer(x, w, config, mask=None):
    for i in range(config.layers):
        activation = {"gelu": gelu, "quick-gelu": lambda h: h / (1 + np.exp(-1.702 * h))}[config.activation]
        x = transformer_block(x, part(w, f"blocks.{i}"), config.heads, config.causal, mask, activation)
    return layer_norm(x, part(w, "norm"))


def self_attention(x, w, heads, groups):
    rows = group_norm(x, part(w, "norm"), groups).reshape(len(x), -1, x.shape[-1])
    q, k, v = np.split(linear(rows, part(w, "qkv")), 3, axis=-1)
    return x + linear(attention(q, k, v, heads), part(w, "out")).reshape(x.shape)


def cross_attention(x, context, w, heads, mask=None):
    q, k, v = linear(x, part(w, "q")), linear(context, part(w, "k")), linear(context, part(w, "v"))
    return linear(attention(q, k, v, heads, mask), part(w, "out"))


def spatial_transformer(x, context, w, heads, groups, mask=None):
    h = linear(group_norm(x, part(w, "norm"), groups).reshape(len(x), -1, x.shape[-1]), part(w, "inner"))
    block = part(w, "block")
    q, k, v = np.split(linear(layer_norm(h, part(block, "norm1")), part(block, "qkv")), 3, axis=-1)
    h = h + linear(attention(q, k, v, heads), part(block, "out"))
    h = h + cross_attention(layer_norm(h, part(block, "norm2")), context, part(block, "cross"), heads, mask)
    a, b = np.split(linear(layer_norm(h, part(block, "norm3")), part(block, "widen")), 2, axis=-1)
    h = h + linear(a * gelu(b), part(block, "narrow"))
    return x + linear(h, part(w, "outer")).reshape(x.shape)


def res_block(x, emb, w, groups):
    h = conv(silu(group_norm(x, part(w, "norm1"), groups)), part(w, "conv1"))
    if emb is not None:
        h = h + linear(emb, part(w, "emb"))[:, None, None, :]
    h = conv(silu(group_norm(h, part(w, "norm2"), groups)), part(w, "conv2"))
    return h + (conv(x, part(w, "skip")) if part(w, "skip") else x)


def time_embedding(t, w):
    channels = w["inner.weight"].shape[0]
    return linear(silu(linear(sinusoidal(t, channels), part(w, "inner"))), part(w, "outer"))


def downsample(x, w):
    return conv(x, part(w, "conv"), stride=2)


def upsample(x, w):
    return conv(x.repeat(2, axis=1).repeat(2, axis=2), part(w, "conv"))


def unet(x, t, w, config, label=None, context=None, mask=None, extra=None, vector=None):
    """E20, its blocks told apart by the names of their weights."""

    def layer(name, h):
        own = part(w, name)
        if "conv.weight" in own:
            return upsample(h, own) if name.startswith("up") else downsample(h, own)
        h = res_block(h, emb, part(own, "block"), config.groups)
        if part(own, "attention"):
            h = self_attention(h, part(own, "attention"), config.heads, config.groups)
        if part(own, "text"):
            h = spatial_transformer(h, context, part(own, "text"), config.heads, config.groups, mask)
        return h

    def names(side):
        return [f"{side}.{i}" for i in range(len({key.split(".")[1] for key in part_names(w, side)}))]

    emb = time_embedding(t, part(w, "time"))
    if config.classes:
        emb = emb + w["label.weight"][np.zeros(len(x), int) if label is None else label + 1]
    if config.vector:
        emb = emb + linear(vector, part(w, "vector"))
    if config.pooled:
        there = np.ones(context.shape[:2], bool) if mask is None else mask
        mean = np.stack([tokens[rows].mean(axis=0) for tokens, rows in zip(context, there, strict=True)])
        emb = emb + linear(mean, part(w, "pooled"))
    emb, p = silu(emb), config.patch
    shown = [x] if extra is None else [x, extra]
    shown += [wave(2**n * np.pi * x) for n in config.fourier for wave in (np.sin, np.cos)]
    shown = np.concatenate(shown, axis=-1)
    B, H, W, C = shown.shape
    patches = shown.reshape(B, H // p, p, W // p, p, C).transpose(0, 1, 3, 2, 4, 5)
    h = conv(patches.reshape(B, H // p, W // p, p * p * C), part(w, "conv_in"))
    skips = [h]
    for name in names("down"):
        h = layer(name, h)
        skips.append(h)
    for name in names("middle"):
        h = layer(name, h)
    for name in names("up"):
        is_block = f"{name}.block.conv1.weight" in w
        h = layer(name, np.concatenate([h, skips.pop()], axis=-1) if is_block else h)
    h = conv(silu(group_norm(h, part(w, "norm_out"), config.groups)), part(w, "conv_out"))
    return h.reshape(B, H // p, W // p, p, p, -1).transpose(0, 1, 3, 2, 4, 5).reshape(B, H, W, -1)


def part_names(weights, name):
    return [key for key in weights if key.startswith(f"{name}.")]
