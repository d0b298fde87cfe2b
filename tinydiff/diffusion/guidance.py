"""Guidance: pushing the network's output towards a condition (E35)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tinydiff import ops


def guided(conditional: Any, unconditional: Any, scale: float) -> Any:
    """eps_u + s (eps_c - eps_u): the unconditional output, moved s times the way to the conditional one.

    conditional, unconditional: outputs of one network, (B, ...), for any target: eps, x_0 and v differ only by
    a linear map. scale: s; 0 ignores the condition, 1 is no guidance, more than 1 exaggerates the condition.
    Returns the same shape. Raises ValueError if the two shapes differ.
    (E35; Ho & Salimans 2022, eq. 6, whose w is s - 1)
    """
    if conditional.shape != unconditional.shape:
        shapes = f"{tuple(conditional.shape)} and {tuple(unconditional.shape)}"
        raise ValueError(f"the two outputs must have one shape, got {shapes}")
    return unconditional + scale * (conditional - unconditional)


def classifier_free(
    conditional: Callable[[Any, Any], Any],
    unconditional: Callable[[Any, Any], Any],
    scale: float,
    learned_variance: bool = False,
) -> Callable[[Any, Any], Any]:
    """Make a model(x_t, t) whose output is `guided`: a network that guides itself.

    conditional, unconditional: the network as functions (x_t, t) -> output, with the condition and without it.
    At scale 1 and 0 only the one that counts is called. learned_variance: whether the second half of the output's last
    axis is a variance (E13), which is taken from the conditional output and not exaggerated with the rest.
    (E35; Ho & Salimans 2022)
    """

    def model(x_t: Any, t: Any) -> Any:
        if scale == 1:
            return conditional(x_t, t)
        if scale == 0:
            return unconditional(x_t, t)
        c, u = conditional(x_t, t), unconditional(x_t, t)
        if not learned_variance:
            return guided(c, u, scale)
        half = c.shape[-1] // 2
        return ops.concat([guided(c[..., :half], u[..., :half], scale), c[..., half:]])

    return model
