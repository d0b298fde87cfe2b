"""Ops that work on each element by itself, with NumPy's broadcasting.

The gradients of broadcast arguments are summed by the engine. Where an argument is often a constant, its gradient is
given as a function, which the engine calls only if it is wanted.
"""

from __future__ import annotations

import math
from typing import Any

from tinydiff.autograd import op
from tinydiff.backend import Array, array_module
from tinydiff.formula import elementwise

STEP = 0.65
"""How far apart `_scaled_tail` takes its midpoints."""

# ------------------------------------------------------------------------------------------- arithmetic


@op
def add(a: Array, b: Array) -> Any:
    """a + b, broadcast."""
    return a + b, lambda g: (g, g)


@op
def sub(a: Array, b: Array) -> Any:
    """a - b, broadcast."""
    return a - b, lambda g: (g, lambda: -g)


@op
def mul(a: Array, b: Array) -> Any:
    """a b, element by element, broadcast."""
    return a * b, lambda g: (lambda: g * b, lambda: g * a)


@op
def div(a: Array, b: Array) -> Any:
    """a / b, element by element, broadcast."""
    return a / b, lambda g: (lambda: g / b, lambda: -g * a / (b * b))


@op
def neg(x: Array) -> Any:
    """-x."""
    return -x, lambda g: -g


@op
def power(x: Array, *, exponent: float) -> Any:
    """x to a constant power; x must be positive unless the exponent is a whole number."""
    return x**exponent, lambda g: g * (exponent * x ** (exponent - 1))


# ------------------------------------------------------------------------------ exponentials and roots


@op
def exp(x: Array) -> Any:
    """e to the power x."""
    y = array_module(x).exp(x)
    return y, lambda g: g * y


@op
def log(x: Array) -> Any:
    """The natural logarithm of x > 0."""
    return array_module(x).log(x), lambda g: g / x


@op
def sqrt(x: Array) -> Any:
    """The square root of x >= 0; its gradient at 0 is infinite."""
    y = array_module(x).sqrt(x)
    return y, lambda g: g / (2 * y)


@op
def sin(x: Array) -> Any:
    """sin x, x in radians."""
    xp = array_module(x)
    return xp.sin(x), lambda g: g * xp.cos(x)


@op
def cos(x: Array) -> Any:
    """cos x, x in radians."""
    xp = array_module(x)
    return xp.cos(x), lambda g: -g * xp.sin(x)


# ------------------------------------------------------------------------------------------ activations
# The sigmoid is 1/(1 + e^-x) = (1 + tanh(x/2))/2, which neither overflows nor divides.


@op
def tanh(x: Array) -> Any:
    """The hyperbolic tangent of x."""
    y = array_module(x).tanh(x)
    return y, lambda g: g * (1 - y * y)


@op
def sigmoid(x: Array) -> Any:
    """1 / (1 + e^-x)."""
    y = _sigmoid(x)
    return y, lambda g: g * y * (1 - y)


@op
def relu(x: Array) -> Any:
    """max(x, 0); the gradient at 0 is 0."""
    return array_module(x).maximum(x, 0), lambda g: g * (x > 0)


@op
def silu(x: Array) -> Any:
    """x sigmoid(x), also called swish (Elfwing et al. 2017)."""
    return _silu(x), lambda g: _silu_vjp(g, x)


@op
def gelu(x: Array) -> Any:
    """x Φ(x) in the tanh approximation: x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))) (Hendrycks & Gimpel 2016)."""
    return _gelu(x), lambda g: _gelu_vjp(g, x)


@op
def log_normal_cdf(x: Array) -> Any:
    """log Φ(x) for the standard normal distribution function Φ, to rounding error even where Φ itself underflows."""
    xp = array_module(x)
    scaled, half_square = _scaled_tail(x), 0.5 * x * x
    tail = xp.log(scaled) - half_square  # log Φ(−|x|)
    y = xp.where(x < 0, tail, xp.log1p(-xp.exp(tail)))
    return y, lambda g: g * xp.where(x < 0, 1 / scaled, xp.exp(-half_square - y)) / math.sqrt(2 * math.pi)


def _scaled_tail(x: Array) -> Array:
    """Φ(−|x|) e^{x²/2} = |x|/π ∫ e^{−u²/2}/(u² + x²) du over u > 0, which neither overflows nor underflows.

    By the midpoint rule, whose one error, from the poles at u = ±ix, is known in closed form and added: 13 midpoints,
    STEP apart, are then right to 14 digits (Chiarella & Reichel 1968).
    """
    xp = array_module(x)
    distance, square = xp.abs(x), x * x
    total = xp.zeros_like(x)
    for u in (STEP * (n + 0.5) for n in range(13)):
        total += math.exp(-u * u / 2) / (square + u * u)
    total *= distance * (STEP / math.pi)
    nearby = xp.minimum(distance, 9)  # beyond, the poles are too far away to matter
    return total + xp.exp(0.5 * nearby * nearby) / (1 + xp.exp((2 * math.pi / STEP) * nearby))


@elementwise
def _sigmoid(xp: Any, x: Array) -> Array:
    s = xp.tanh(0.5 * x)
    s *= 0.5
    s += 0.5
    return s


@elementwise
def _silu(xp: Any, x: Array) -> Array:
    half = 0.5 * x
    y = xp.tanh(half)
    y *= half
    y += half
    return y


@elementwise
def _silu_vjp(xp: Any, g: Array, x: Array) -> Array:
    """g s (1 + x (1 − s)) with s the sigmoid."""
    s = xp.tanh(0.5 * x)
    s *= 0.5
    s += 0.5
    slope = 1.0 - s
    slope *= x
    slope += 1.0
    slope *= s
    slope *= g
    return slope


# The derivative of gelu's u = √(2/π) (x + 0.044715 x³) is √(2/π) (1 + 3 · 0.044715 x²); here are the products.


@elementwise
def _gelu(xp: Any, x: Array) -> Array:
    u = x * x
    u *= 0.035677408136300125
    u += 0.7978845608028654
    u *= x
    y = xp.tanh(u)
    y += 1.0
    y *= x
    y *= 0.5
    return y


@elementwise
def _gelu_vjp(xp: Any, g: Array, x: Array) -> Array:
    """g/2 (1 + t) (1 + x (1 − t) u') with t = tanh u, as 1 − t² = (1 + t) (1 − t)."""
    square = x * x
    u = 0.035677408136300125 * square
    u += 0.7978845608028654
    u *= x
    t = xp.tanh(u)
    slope = 0.10703222440890038 * square
    slope += 0.7978845608028654
    slope *= x
    slope *= 1.0 - t
    slope += 1.0
    t += 1.0
    slope *= t
    slope *= 0.5
    slope *= g
    return slope


# -------------------------------------------------------------------------------- choosing and limiting


@op
def absolute(x: Array) -> Any:
    """|x|; the gradient at 0 is 0."""
    xp = array_module(x)
    return xp.abs(x), lambda g: g * xp.sign(x)


@op
def maximum(a: Array, b: Array) -> Any:
    """The larger of a and b; where they are equal the gradient goes to a."""
    return array_module(a, b).maximum(a, b), lambda g: (g * (a >= b), g * (a < b))


@op
def minimum(a: Array, b: Array) -> Any:
    """The smaller of a and b; where they are equal the gradient goes to a."""
    return array_module(a, b).minimum(a, b), lambda g: (g * (a <= b), g * (a > b))


@op
def clip(x: Array, *, low: float, high: float) -> Any:
    """x limited to [low, high]; no gradient passes where it was limited."""
    return array_module(x).clip(x, low, high), lambda g: g * ((x >= low) & (x <= high))


@op
def where(condition: Array, a: Array, b: Array) -> Any:
    """a where the condition (boolean) holds, b elsewhere, broadcast."""
    xp = array_module(condition, a, b)
    return xp.where(condition, a, b), lambda g: (None, g * condition, g * ~condition)
