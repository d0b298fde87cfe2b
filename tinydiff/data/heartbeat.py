"""The heartbeat of Sohl-Dickstein et al. 2015, section 3.1.2: bits with a pulse in every fifth place (E21)."""

from __future__ import annotations

import numpy as np


def heartbeats(bits: int = 20, period: int = 5) -> np.ndarray:
    """Every sequence there is: one for each place of the first pulse. Data that are one of them, each as often as the
    others, have exactly log2(period) bits of information a sequence, 2.32, which a perfect model needs to name one.

    Returns (period, bits) float32, 0 or 1. Raises ValueError unless 1 <= period <= bits.
    """
    if not 1 <= period <= bits:
        raise ValueError(f"the period must lie in 1..{bits}, the number of bits, got {period}")
    return (np.arange(bits) % period == np.arange(period)[:, None]).astype(np.float32)
