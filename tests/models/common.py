"""What the tests of models that are told a text share."""

import numpy as np

from tinydiff import Rng, Tensor, backend
from tinydiff.models import Condition
from tinydiff.nn import Module


def stirred(model):
    """The model with no weights left at the zeros that many start from."""
    for i, p in enumerate(model.parameters().values()):
        p[...] = p.data + 0.1 * Rng(1).at(i).normal(p.shape)
    return model


def texts(n, seed=0, width=6):
    """n texts of three tokens, of which the last is there in every second."""
    mask = np.ones((n, 3), bool)
    mask[1::2, 2] = False
    return Condition(Rng(seed).normal((n, 3, width)), backend.to_device(mask))


class Stub(Module):
    """Stands for the U-Net: outputs 0 and remembers what it was told."""

    def __init__(self):
        self.asked = []

    def __call__(self, x, t, context=None, mask=None, extra=None, vector=None):
        told = (x, t, context, mask, extra, vector)
        arrays = [a.data if isinstance(a, Tensor) else a for a in told]
        self.asked.append([None if a is None else backend.to_numpy(a) for a in arrays])
        return Tensor(x.data * 0)


def different(one, other):
    """For each image the largest difference."""
    one, other = (backend.to_numpy(a.data if isinstance(a, Tensor) else a) for a in (one, other))
    return np.abs(one - other).reshape(len(one), -1).max(axis=1)
