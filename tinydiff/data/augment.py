"""Random changes of images that leave what they show as it is: more to learn from than there is."""

from __future__ import annotations

import numpy as np

from tinydiff import backend
from tinydiff.rng import Rng


def random_shift(images: np.ndarray, most: int, rng: Rng) -> np.ndarray:
    """Move each image by -most..most pixels down and across, drawn uniformly; what comes in from outside is 0.

    images: (B, H, W), any dtype, on the host (MNIST: uint8, 0 is the background). Returns the same shape and dtype.
    """
    B, H, W = images.shape
    padded = np.pad(images, ((0, 0), (most, most), (most, most)))
    down, across = backend.to_numpy(rng.integers(0, 2 * most + 1, (2, B, 1)))
    rows, columns = np.arange(H) + down, np.arange(W) + across  # (B, H) and (B, W)
    return padded[np.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]]
