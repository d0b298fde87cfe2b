"""What the tests of both priors share: small captions, and the tokens they begin with, written again in float64."""

import numpy as np

from tests.nn import reference
from tinydiff.backend import to_device, to_numpy
from tinydiff.models import Condition
from tinydiff.nn import TransformerConfig

SIZES = {"transformer": TransformerConfig(8, 2, 2, 2, causal=True), "context": 6, "embedding": 5}


def unit(x):
    return x / np.sqrt((x**2).sum(axis=-1, keepdims=True))


def captions(n, seed=0, dtype=np.float64, d=5):
    """n captions of up to four tokens, of which some have fewer."""
    rng = np.random.default_rng(seed)
    mask = np.arange(4) < 1 + np.arange(n)[:, None] % 4
    states, z_t = rng.normal(size=(n, 4, 6)).astype(dtype), unit(rng.normal(size=(n, d))).astype(dtype)
    return Condition(to_device(states), to_device(mask), to_device(z_t))


def embeddings(n, seed=1, dtype=np.float64, d=5):
    """n unit vectors on the host."""
    return unit(np.random.default_rng(seed).normal(size=(n, d))).astype(dtype)


def told(text):
    """Of each caption, what is there: the states of its own tokens alone, and z_t, as host arrays."""
    states, mask, z_t = (to_numpy(a) for a in (text.states, text.mask, text.vector))
    return [(s[m], z) for s, m, z in zip(states, mask, z_t, strict=True)]


def prefix(weights, states, z_t):
    """The tokens that stand for one caption without padding: (m + 1, width)."""
    own = reference.part(weights, "prefix")
    rows = [reference.linear(s, reference.part(own, "states")) for s in states]
    return [*rows, reference.linear(len(z_t) ** 0.5 * z_t, reference.part(own, "z_t"))]
