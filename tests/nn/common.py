"""What the layer tests share: weights that are nowhere zero, and the gradient check of a whole layer."""

import numpy as np

from tinydiff import Tensor
from tinydiff.backend import to_device
from tinydiff.gradcheck import gradcheck
from tinydiff.rng import Rng


def randomised(layer, seed=1, dtype=np.float64):
    """The layer in this dtype, all its parameters drawn anew: also those that start at zero or one count."""
    layer.to(dtype)
    for i, p in enumerate(layer.parameters().values()):
        p[...] = to_device(0.4 * np.random.default_rng((seed, i)).normal(size=p.shape).astype(dtype))
    return layer


def draw(*shape, seed=0, dtype=np.float64):
    """A draw from N(0, I) on the host."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def run(layer, *inputs):
    """The layer's value at these host arrays, and its weights on the host, for the reference."""
    return layer(*(Tensor(to_device(x)) for x in inputs)), layer.state_dict()


def layer_gradcheck(layer, *inputs, call=None):
    """The relative error of the layer's gradient with respect to its inputs (host arrays) and all its parameters.

    call: what to do with the inputs, if not layer(*inputs).
    """
    names = list(layer.parameters())

    def function(*tensors):
        for name, value in zip(names, tensors[len(inputs) :], strict=True):
            _put(layer, name, value)
        return (call or layer)(*tensors[: len(inputs)])

    arrays = [to_device(x) for x in inputs] + [p.data for p in layer.parameters().values()]
    return gradcheck(function, *arrays, rng=Rng(3))


def _put(layer, name, value):
    *path, last = name.split(".")
    for step in path:
        layer = layer[int(step)] if step.isdigit() else getattr(layer, step)
    setattr(layer, last, value)
