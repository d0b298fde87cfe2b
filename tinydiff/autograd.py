"""Reverse-mode automatic differentiation: a Tensor remembers how it was computed, and backward applies the chain rule.

An op is a function of raw arrays that gives its value and its vector-Jacobian product (vjp), the function that turns
the gradient with respect to the value into the gradients with respect to the arguments:

    @op
    def mul(a, b):
        return a * b, lambda g: (g * b, g * a)

The engine does the rest, once for all ops: it unwraps tensors, records the computation, sums gradients over axes that
were broadcast, adds up the gradients of a tensor that was used more than once, and frees the graph as it goes.
Gradients are first-order only: a gradient is an array, not a Tensor, and cannot be differentiated again.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from tinydiff import backend
from tinydiff.backend import Array, DeviceError

_recording: contextvars.ContextVar[bool] = contextvars.ContextVar("recording", default=True)
_order = itertools.count()


class Tensor:
    """An array that takes part in differentiation.

    data: an array of NumPy or CuPy, a list or a number (lists of numbers become float32). requires_grad: whether
    backward should leave the gradient with respect to this tensor in `.grad` (an array like data; None before).

    Write to a Tensor with `x[...] = value`, which backward notices; it cannot notice a write to `x.data` itself.
    Raises TypeError for data that is not numeric, or if a gradient is asked of whole numbers.
    """

    __slots__ = ("__weakref__", "_changes", "_node", "data", "grad", "requires_grad")
    __array_ufunc__ = None  # so that `array * tensor` asks the Tensor and does not make an array of Tensors

    def __init__(self, data: Any, requires_grad: bool = False):
        if not backend.is_array(data):
            widened = not isinstance(data, np.generic) and np.asarray(data).dtype == np.float64
            data = backend.to_device(np.asarray(data, np.float32 if widened else None))
        if data.dtype.kind not in "fiub" or (requires_grad and data.dtype.kind != "f"):
            wanted = "floating-point data" if requires_grad else "numbers"
            raise TypeError(f"a Tensor{' with gradient' * requires_grad} needs {wanted}, got {data.dtype}")
        self.data: Array = data
        self.grad: Array | None = None
        self.requires_grad = requires_grad
        self._node: Node | None = None
        self._changes = [0]  # how often the data was written to; a list, so that nodes can share it

    # What it is

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def device(self) -> str:
        """Where the data lives: "cpu" or "cuda"."""
        return backend.device_of(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        made_by = f", made by {self._node.name}" if self._node else ", requires_grad=True" * self.requires_grad
        return f"Tensor({self.data!r}{made_by})"

    def item(self) -> float:
        """The value of a tensor of one element, as a number."""
        return self.data.item()

    def numpy(self) -> np.ndarray:
        """The data on the host; shares memory where it is there already."""
        return backend.to_numpy(self.data)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Refuse the silent conversion that NumPy and matplotlib would do, which would lose the gradient."""
        raise TypeError("a Tensor does not turn into a NumPy array by itself; use .numpy()")

    def detach(self) -> Tensor:
        """The same data, cut off from the computation that made it; backward notices writes through either."""
        result = Tensor(self.data)
        result._changes = self._changes
        return result

    def __bool__(self) -> bool:
        return bool(self.data)

    # Differentiation

    def backward(self, grad: Array | None = None) -> None:
        """Add to `.grad` of every tensor this one was computed from, and free the graph.

        grad: the gradient with respect to this tensor, an array of its shape; may be left out for a scalar (then 1).
        Raises RuntimeError if there is nothing to differentiate, if a graph was freed by an earlier backward, or if a
        tensor that the gradient needs was written to since; ValueError if grad is missing or of another shape.
        """
        if not self.requires_grad:
            raise RuntimeError("backward needs a tensor computed from one with requires_grad=True; this one was not")
        if grad is None and self.size != 1:
            raise ValueError(f"backward from a tensor of shape {self.shape} needs its gradient; only a scalar has 1")
        if grad is not None and getattr(grad, "shape", None) != self.shape:
            got = getattr(grad, "shape", repr(grad))
            raise ValueError(f"the gradient must be an array of the tensor's shape {self.shape}, got {got}")
        seed = backend.array_module(self.data).ones_like(self.data) if grad is None else _unwrap(grad)
        seed = _fit(seed, self.shape, self.dtype)
        if self._node is None:
            _accumulate(self, seed)
        else:
            _backpropagate(self._node, seed)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Write to the data in place; raises RuntimeError for a tensor that an op computed with gradients."""
        if self._node is not None:
            raise RuntimeError(f"a tensor made by {self._node.name} cannot be changed in place: its gradient is needed")
        self.data[index] = value.data if isinstance(value, Tensor) else value
        self.mark_changed()

    def mark_changed(self) -> None:
        """Tell backward that the data was written to directly (optimisers do)."""
        self._changes[0] += 1

    if TYPE_CHECKING:  # tinydiff.ops, which knows the mathematics, attaches these

        def __neg__(self) -> Tensor: ...
        def __add__(self, other: Any) -> Tensor: ...
        def __radd__(self, other: Any) -> Tensor: ...
        def __sub__(self, other: Any) -> Tensor: ...
        def __rsub__(self, other: Any) -> Tensor: ...
        def __mul__(self, other: Any) -> Tensor: ...
        def __rmul__(self, other: Any) -> Tensor: ...
        def __truediv__(self, other: Any) -> Tensor: ...
        def __rtruediv__(self, other: Any) -> Tensor: ...
        def __matmul__(self, other: Any) -> Tensor: ...
        def __rmatmul__(self, other: Any) -> Tensor: ...
        def __pow__(self, exponent: float) -> Tensor: ...
        def __getitem__(self, index: Any) -> Tensor: ...
        def sum(self, axis: Any = None, keepdims: bool = False) -> Tensor: ...
        def mean(self, axis: Any = None, keepdims: bool = False) -> Tensor: ...
        def reshape(self, *shape: Any) -> Tensor: ...
        def transpose(self, *axes: int) -> Tensor: ...


class Node:
    """One application of an op: where its gradient goes, and how to compute it.

    parents: for each argument the node or leaf tensor that receives its gradient, its shape and dtype; or None.
    """

    __slots__ = ("name", "order", "parents", "versions", "vjp")

    def __init__(self, name: str, vjp: Callable[[Array], Any], args: tuple[Any, ...]):
        self.name, self.vjp, self.order = name, vjp, next(_order)
        self.parents = [
            (a._node or a, a.shape, a.dtype) if isinstance(a, Tensor) and a.requires_grad else None for a in args
        ]
        self.versions = [(a._changes, a._changes[0]) for a in args if isinstance(a, Tensor)]

    def __lt__(self, other: Node) -> bool:
        """The later of two nodes is visited first: it cannot be needed by the earlier one."""
        return self.order > other.order


def op(rule: Callable[..., Any]) -> Callable[..., Tensor]:
    """Turn a rule, arrays -> (value, vjp), into an op, tensors -> Tensor.

    Positional arguments are what can be differentiated: tensors, arrays or numbers (or None); settings are
    keyword-only. vjp(g) gives one gradient for each positional argument, None for one that has none; an entry may be
    a function without arguments, which is called only if that gradient is wanted. A vjp returns fresh arrays, or g
    itself, or views of g; it writes to none of its inputs.
    """
    name = rule.__name__.lstrip("_")  # sum's rule is called _sum, since sum itself has other arguments

    @functools.wraps(rule)
    def apply(*args: Any, **settings: Any) -> Tensor:
        arrays, settings = [_unwrap(a) for a in args], {key: _unwrap(s) for key, s in settings.items()}
        try:
            backend.array_module(*arrays)
            value, vjp = rule(*arrays, **settings)
        except (ValueError, IndexError, DeviceError) as error:
            shapes = ", ".join(str(tuple(a.shape)) if backend.is_array(a) else repr(a) for a in arrays)
            raise type(error)(f"{name}({shapes}): {error}") from error
        result = Tensor(np.asarray(value) if isinstance(value, np.generic) else value)  # NumPy's sums are numbers
        if _recording.get() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            result.requires_grad, result._node = True, Node(name, vjp, args)
        return result

    return apply


def _unwrap(a: Any) -> Any:
    """The raw array of a tensor; a NumPy number becomes Python's, which does not widen a float32 array to float64."""
    return a.data if isinstance(a, Tensor) else a.item() if isinstance(a, np.generic) else a


def _backpropagate(last: Node, seed: Array) -> None:
    """Visit the nodes from the last to the first, handing each its summed gradient and passing on what its vjp gives.

    A loop over a heap and not a recursion: a deep network outruns Python's recursion limit.
    """
    gradients: dict[Node, tuple[Array, bool]] = {last: (seed, False)}  # whether the array is ours to add to
    heap = [last]
    while heap:
        node = heapq.heappop(heap)
        _check_usable(node)
        gradient, _ = gradients.pop(node)
        pieces = node.vjp(gradient)
        for parent, piece in zip(node.parents, pieces if isinstance(pieces, tuple) else (pieces,), strict=True):
            if parent is None or piece is None:
                continue
            target, shape, dtype = parent
            piece = _fit(piece() if callable(piece) else piece, shape, dtype)
            if isinstance(target, Tensor):
                _accumulate(target, piece)
            elif target in gradients:
                gradients[target] = _add(*gradients[target], piece), True
            else:
                gradients[target] = piece, False
                heapq.heappush(heap, target)
        node.vjp, node.parents = _freed, []


def _freed(g: Array) -> Any:
    """Stands for the vjp of a node that backward has been through."""


def _check_usable(node: Node) -> None:
    if node.vjp is _freed:
        raise RuntimeError(
            f"backward went through {node.name} before and freed its graph; compute the result again first"
        )
    if any(changes[0] != seen for changes, seen in node.versions):
        raise RuntimeError(f"an argument of {node.name} was changed in place after {node.name} used it")


def _fit(gradient: Array, shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Sum a gradient over the axes along which its argument was broadcast, and give it the argument's dtype."""
    if gradient.shape != shape:
        extra = gradient.ndim - len(shape)
        kept = tuple(extra + i for i, n in enumerate(shape) if n == 1 and gradient.shape[extra + i] != 1)
        gradient = gradient.sum(axis=(*range(extra), *kept), keepdims=True).reshape(shape)
    return gradient if gradient.dtype == dtype else gradient.astype(dtype)


def _add(total: Array, ours: bool, piece: Array) -> Array:
    if ours:
        total += piece
        return total
    return total + piece


def _accumulate(leaf: Tensor, gradient: Array) -> None:
    """Add to a leaf's gradient, which never shares memory with another array: clipping writes to it."""
    if leaf.grad is None:
        leaf.grad = backend.array_module(leaf.data).array(gradient, order="C")
    else:
        leaf.grad += gradient


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Within this context nothing is recorded, so that arrays are freed as soon as they are used."""
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


def checkpoint(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Compute function(*args) without keeping its intermediate arrays; backward computes it a second time.

    This trades time for memory (Chen et al. 2016). Tensors that the function uses without being handed them, such as
    a layer's parameters, receive their gradients too. The function must give the same value both times: let one that
    draws random numbers name its stream inside (`rng.at(...)`).
    """
    with no_grad():
        value = function(*args).data

    def vjp(g: Array) -> tuple[Array | None, ...]:
        copies = [Tensor(a.data, a.requires_grad) if isinstance(a, Tensor) else a for a in args]
        token = _recording.set(True)
        try:
            again = function(*copies)
        finally:
            _recording.reset(token)
        if again.requires_grad:
            again.backward(g)
        return tuple(c.grad if isinstance(c, Tensor) else None for c in copies)

    result = Tensor(value)
    if _recording.get():
        result.requires_grad, result._node = True, Node("checkpoint", vjp, args)
    return result
