"""The ops: functions of tensors that can be differentiated. Each gives forward and derivative on one screen."""

from tinydiff.autograd import Tensor
from tinydiff.ops.conv import conv1d, conv2d, conv_transpose2d
from tinydiff.ops.elementwise import (
    absolute,
    add,
    clip,
    cos,
    div,
    exp,
    gelu,
    log,
    log_normal_cdf,
    maximum,
    minimum,
    mul,
    neg,
    power,
    relu,
    sigmoid,
    silu,
    sin,
    sqrt,
    sub,
    tanh,
    where,
)  # fmt: skip
from tinydiff.ops.index import getitem, take_rows
from tinydiff.ops.loss import cross_entropy, kl_standard_normal, mse_loss
from tinydiff.ops.matmul import linear, matmul
from tinydiff.ops.norm import group_norm, layer_norm
from tinydiff.ops.random import dropout
from tinydiff.ops.reduce import max, mean, sum, variance
from tinydiff.ops.shape import (
    broadcast_to,
    concat,
    depth_to_space,
    downsample_average,
    pad,
    reshape,
    space_to_depth,
    stack,
    transpose,
    upsample_nearest,
)  # fmt: skip
from tinydiff.ops.softmax import attention, log_softmax, self_attention, softmax

__all__ = [
    "absolute", "add", "attention", "broadcast_to", "clip", "concat", "conv1d", "conv2d", "conv_transpose2d", "cos",
    "cross_entropy", "depth_to_space", "div", "downsample_average", "dropout", "exp", "gelu", "getitem",
    "group_norm", "kl_standard_normal", "layer_norm", "linear", "log", "log_normal_cdf", "log_softmax", "matmul",
    "max", "maximum", "mean", "minimum", "mse_loss", "mul", "neg", "pad", "power", "relu", "reshape",
    "self_attention", "sigmoid", "silu", "sin", "softmax", "space_to_depth", "sqrt", "stack", "sub", "sum",
    "take_rows", "tanh", "transpose", "upsample_nearest", "variance", "where",
]  # fmt: skip


def _attach_operators() -> None:
    """Give Tensor NumPy's operators and methods; the engine itself knows no mathematics."""
    operators = {
        "neg": neg, "add": add, "sub": sub, "mul": mul, "truediv": div, "matmul": matmul, "getitem": getitem,
    }  # fmt: skip
    for name, function in operators.items():
        setattr(Tensor, f"__{name}__", function)
    for name in ("add", "sub", "mul", "truediv", "matmul"):
        setattr(Tensor, f"__r{name}__", _swapped(operators[name]))
    Tensor.__pow__ = lambda self, exponent: power(self, exponent=exponent)  # type: ignore[method-assign]
    for method in (sum, mean, reshape, transpose):
        setattr(Tensor, method.__name__, method)


def _swapped(function):
    return lambda self, other: function(other, self)


_attach_operators()
