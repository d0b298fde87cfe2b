"""A strict double of CuPy: arrays that behave as CuPy's do, with NumPy underneath, for machines without a GPU.

`install` puts the double in CuPy's place, and "cuda" becomes a device that works. What goes wrong on a GPU then goes
wrong here:

- Nothing converts an array to NumPy's silently; an operator or function that meets a NumPy array raises TypeError.
- There are only the functions, methods and keywords of the tables below. Each exists in CuPy 14 under the same name
  as in NumPy; test_strict_double.py holds the tables against CuPy's wheel where that is installed. Code that calls
  something new adds it to the tables, after a look at CuPy.
- A reduction, and picking one element, give an array of no axes and not a number; it cannot be used as an index of a
  list (`__index__` is missing), only after int().
- Assigning takes an array or a number: not a tuple, a list or a NumPy array.
- A function given to `fuse` sees stand-ins that know operators and elementwise functions, and no shape or index; it
  computes with numbers only beside an array (CuPy 14 takes 1.0 - beta, of numbers alone, in half precision).
- A CUDA graph holds kernels, and nothing that the host does (double_graph.py).

What it cannot show: kernels that do not compile, rounding, races between threads (add.at, repeated indices in an
assignment), an index out of range (CuPy wraps it around and says nothing).
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from tests import double_graph
from tests.double_graph import refuse

UFUNCS = [
    "abs", "absolute", "add", "arctan2", "bitwise_and", "bitwise_or", "bitwise_xor", "ceil", "cos", "cosh",
    "divide", "equal", "exp", "expm1", "floor", "floor_divide", "greater", "greater_equal", "invert",
    "isfinite", "isinf", "isnan", "less", "less_equal", "log", "log1p", "log2", "logaddexp", "logical_and",
    "logical_not", "logical_or", "maximum", "minimum", "multiply", "negative", "not_equal", "power",
    "remainder", "rint", "sign", "sin", "sinh", "sqrt", "square", "subtract", "tan", "tanh", "true_divide",
]  # fmt: skip
"""Elementwise functions; each takes `out` and `dtype`, and works inside a fused function."""

FUNCTIONS = {
    # making arrays
    "arange": "dtype", "array": "dtype copy order", "asarray": "dtype", "ascontiguousarray": "dtype", "empty": "dtype",
    "empty_like": "dtype", "eye": "dtype", "full": "dtype", "full_like": "dtype", "linspace": "dtype endpoint",
    "ones": "dtype", "ones_like": "dtype", "tri": "dtype", "tril": "k", "triu": "k", "zeros": "dtype",
    "zeros_like": "dtype",
    # shapes
    "broadcast_to": "", "concatenate": "axis out", "expand_dims": "axis", "flip": "axis", "moveaxis": "", "pad": "mode",
    "repeat": "axis", "reshape": "", "roll": "axis", "split": "axis", "squeeze": "axis", "stack": "axis out",
    "swapaxes": "", "tile": "", "transpose": "",
    # products and reductions
    "all": "axis keepdims", "any": "axis keepdims", "argmax": "axis", "argmin": "axis", "argsort": "axis",
    "bincount": "weights minlength", "cumprod": "axis", "cumsum": "axis", "dot": "out", "einsum": "",
    "matmul": "out", "max": "axis keepdims", "mean": "axis dtype keepdims", "min": "axis keepdims",
    "percentile": "axis", "prod": "axis keepdims", "sort": "axis", "std": "axis keepdims", "sum": "axis dtype keepdims",
    "tensordot": "axes", "var": "axis keepdims", "vdot": "",
    # choosing
    "clip": "out", "copyto": "where", "interp": "", "searchsorted": "side", "take": "axis out",
    "take_along_axis": "axis", "where": "",
}  # fmt: skip
"""Other functions and the keywords that both CuPy and NumPy take; what has no default is given by its place."""

METHODS = {
    "all": "axis keepdims", "any": "axis keepdims", "argmax": "axis", "argmin": "axis", "argsort": "axis",
    "astype": "copy", "clip": "min max out", "copy": "", "cumsum": "axis", "dot": "out", "fill": "", "flatten": "",
    "max": "axis keepdims", "mean": "axis dtype keepdims", "min": "axis keepdims", "prod": "axis keepdims",
    "ravel": "", "repeat": "axis", "reshape": "", "round": "", "sort": "axis", "squeeze": "axis",
    "std": "axis keepdims", "sum": "axis dtype keepdims", "swapaxes": "", "take": "axis out", "transpose": "",
    "var": "axis keepdims", "view": "",
}  # fmt: skip
"""Methods of an array and the keywords that both take."""

ATTRIBUTES = ["dtype", "flags", "itemsize", "nbytes", "ndim", "shape", "size", "strides"]
DTYPES = [
    "bool_", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
]  # fmt: skip
CONSTANTS = ["e", "inf", "nan", "newaxis", "pi"]
GENERATOR_METHODS = {
    "binomial": "size", "integers": "size dtype endpoint", "random": "size dtype out",
    "standard_normal": "size dtype out", "uniform": "size",
}  # fmt: skip
IN_PLACE = {"copyto", "ndarray.fill", "ndarray.sort"}
FUSED_FUNCTIONS = {*UFUNCS, "where", "clip"}

_INDEXLESS = (int, float, complex, np.generic)


def _unwrap(x: Any) -> Any:
    """The NumPy arrays inside of arguments; a NumPy array among them is refused as CuPy refuses it."""
    if isinstance(x, ndarray):
        return x._array
    if isinstance(x, (np.ndarray, _Traced)):
        raise TypeError(f"Unsupported type {type(x)}")
    if isinstance(x, (list, tuple)):
        return type(x)(_unwrap(item) for item in x)
    return x


def _wrap(x: Any) -> Any:
    """Arrays of the double for NumPy's arrays and for the numbers that NumPy gives for arrays of no axes."""
    if isinstance(x, (np.ndarray, np.generic)):
        return ndarray(np.asarray(x))
    return type(x)(_wrap(item) for item in x) if isinstance(x, (list, tuple)) else x


def _call(name: str, function: Callable[..., Any], keywords: str, args: Any, settings: dict[str, Any]) -> Any:
    """Call a NumPy function on the arrays inside, if its keywords are allowed."""
    if unknown := set(settings) - set(keywords.split()):
        raise TypeError(f"{name} of the strict double takes no {sorted(unknown)}; does CuPy's?")
    plain, plain_settings = _unwrap(args), {key: _unwrap(value) for key, value in settings.items()}
    reads = [*_arrays(plain), *_arrays(plain_settings.values()), *_arrays([getattr(function, "__self__", None)])]
    _refuse_what_a_graph_cannot_hold(name, reads)
    in_place = settings.get("out") is not None or name in IN_PLACE
    result = double_graph.run(lambda: function(*plain, **plain_settings), reads, in_place)
    return settings["out"] if settings.get("out") is not None else _wrap(result)


def _arrays(values: Any) -> list[np.ndarray]:
    """The NumPy arrays among values, and in the lists and tuples among them."""
    found = [_arrays(v) if isinstance(v, (list, tuple)) else [v] for v in values]
    return [v for some in found for v in some if isinstance(v, np.ndarray)]


def _refuse_what_a_graph_cannot_hold(name: str, reads: list[np.ndarray]) -> None:
    name = name.removeprefix("ndarray.")
    if name in ("matmul", "dot", "tensordot", "einsum") and max(x.ndim for x in reads) > 1:
        refuse("calling cuBLAS API", NotImplementedError)
    if name in ("concatenate", "stack") and len(reads) > 8:
        refuse("moving the addresses of many arrays to the device")  # CuPy then joins them in one kernel
    if name == "bincount" or name.startswith("Generator."):
        refuse(name)


class ndarray:  # noqa: N801 (CuPy's name)
    """An array of the double."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, array: np.ndarray):
        self._array = array

    # Moves to the host: by name only

    def _on_host(self) -> np.ndarray:
        refuse("waiting for a value")
        return self._array

    def __array__(self, *args: Any, **settings: Any) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def get(self) -> np.ndarray:
        return self._on_host().copy()

    def item(self) -> Any:
        return self._on_host().item()

    def tolist(self) -> Any:
        return self._on_host().tolist()

    def __bool__(self) -> bool:
        return bool(self._on_host())

    def __int__(self) -> int:
        return int(self._on_host())

    def __float__(self) -> float:
        return float(self._on_host())

    def __repr__(self) -> str:
        return repr(self._on_host())

    def __format__(self, spec: str) -> str:
        return format(self._on_host(), spec)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (0, False), "version": 3}

    @property
    def data(self) -> Any:
        return SimpleNamespace(ptr=self._array.ctypes.data)

    # What NumPy asks when it meets one

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **settings: Any) -> Any:
        if method != "__call__" or ufunc.__name__ not in UFUNCS:
            return NotImplemented
        if "out" in settings:
            (settings["out"],) = settings["out"]
        return getattr(module, ufunc.__name__)(*inputs, **settings)

    def __array_function__(self, function: Any, types: Any, args: Any, settings: Any) -> Any:
        if function.__name__ not in FUNCTIONS:
            return NotImplemented
        return getattr(module, function.__name__)(*args, **settings)

    # A container

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> ndarray:
        parts = _index(index)
        if any(p.dtype == bool for p in _arrays(parts)):
            refuse("counting what a mask picks")
        return _wrap(double_graph.run(lambda: self._array[parts], [self._array]))

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(value, np.ndarray) and value.ndim:
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        if not isinstance(value, (ndarray, np.ndarray, *_INDEXLESS)):
            raise TypeError(f"Unsupported type {type(value)}")
        parts, plain = _index(index), value._array if isinstance(value, ndarray) else value
        double_graph.run(lambda: self._array.__setitem__(parts, plain), (), in_place=True)

    def copy(self) -> ndarray:
        return _wrap(double_graph.run(self._array.copy, [self._array]))

    __copy__ = copy

    def __deepcopy__(self, memo: Any) -> ndarray:
        return self.copy()

    T = property(lambda self: ndarray(self._array.T))
    mT = property(lambda self: ndarray(self._array.mT))  # noqa: N815 (NumPy's name)


def _index(index: Any) -> Any:
    """An index of the array inside; with an ellipsis at its end NumPy too gives a view where one element is picked.

    CuPy takes lists and NumPy arrays of whole numbers as indices (it copies them to the device).
    """
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(p, (list, np.ndarray)) for p in parts):
        refuse("moving an index to the device")
    parts = tuple(p._array if isinstance(p, ndarray) else p for p in parts)
    return parts if any(p is Ellipsis for p in parts) else (*parts, ...)


def _method(name: str, keywords: str) -> Callable[..., Any]:
    def method(self: ndarray, *args: Any, **settings: Any) -> Any:
        return _call(f"ndarray.{name}", getattr(self._array, name), keywords, args, settings)

    return method


_OPERATORS = {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "true_divide", "floordiv": "floor_divide",
    "mod": "remainder", "pow": "power", "matmul": "matmul", "and": "bitwise_and", "or": "bitwise_or",
    "xor": "bitwise_xor",
}  # fmt: skip
_COMPARISONS = {
    "eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal",
}  # fmt: skip
_UNARY = {"neg": "negative", "abs": "absolute", "invert": "invert"}


def _give_operators(cls: type, without: tuple[str, ...] = ()) -> None:
    """Give a class Python's operators, each through the function of the module that does the same."""

    def binary(function: str, swapped: bool = False) -> Callable[..., Any]:
        def apply(self: Any, other: Any) -> Any:
            if not isinstance(other, (ndarray, _Traced, np.ndarray, *_INDEXLESS)):
                return NotImplemented
            return getattr(module, function)(*((other, self) if swapped else (self, other)))

        return apply

    def in_place(function: str) -> Callable[..., Any]:
        return lambda self, other: getattr(module, function)(self, other, out=self)

    for name, function in _OPERATORS.items():
        if name not in without:
            setattr(cls, f"__{name}__", binary(function))
            setattr(cls, f"__r{name}__", binary(function, swapped=True))
            if name != "matmul":  # CuPy has no __imatmul__
                setattr(cls, f"__i{name}__", in_place(function))
    for name, function in _COMPARISONS.items():
        setattr(cls, f"__{name}__", binary(function))
    for name, function in _UNARY.items():
        setattr(cls, f"__{name}__", lambda self, function=function: getattr(module, function)(self))


class _Traced:
    """What a fused function is given for an argument, array or number, while CuPy compiles it: no shape, no index."""

    __hash__ = None  # type: ignore[assignment]
    __array_ufunc__ = None

    def __init__(self, value: Any):
        self._value = value

    @property
    def dtype(self) -> np.dtype:
        return np.result_type(self._value)

    def __bool__(self) -> bool:
        raise TypeError("Cannot convert to Python scalar in cupy.fuse")

    __int__ = __float__ = __bool__  # type: ignore[assignment]


def _fuse(*args: Any, **settings: Any) -> Any:
    """cupy.fuse, a decorator: as it is, or with the name of the kernel, but not both at once."""
    if len(args) == 1 and not settings and callable(args[0]):
        return _fused(args[0])
    return lambda function: _fused(function, *args, **settings)


def _fused(function: Callable[..., Any], kernel_name: str | None = None) -> Callable[..., Any]:
    """Run the function on stand-ins for its arguments, and unwrap what it gives."""
    if kernel_name is not None and not kernel_name.isidentifier():
        raise ValueError(f"the kernel's name must be an identifier, got {kernel_name!r}")

    @functools.wraps(function)
    def fused(*args: Any) -> Any:
        if any(isinstance(a, _Traced) for a in args) or not any(isinstance(a, ndarray) for a in args):
            return function(*args)
        if not all(a is None or isinstance(a, (ndarray, *_INDEXLESS)) for a in args):
            raise TypeError(f"Invalid argument type for {kernel_name!r}: {[type(a) for a in args]}")
        return _wrap(double_graph.run(lambda: _fused_values(function, args), [_unwrap(a) for a in _doubles(args)]))

    return fused


def _doubles(args: Any) -> list[ndarray]:
    return [a for a in args if isinstance(a, ndarray)]


def _fused_values(function: Callable[..., Any], args: Any) -> Any:
    result = function(*(a if a is None else _Traced(_unwrap(a)) for a in args))
    if not all(isinstance(r, _Traced) for r in (result if isinstance(result, tuple) else (result,))):
        raise TypeError(f"Fusion function can't return {type(result)}")
    values = tuple(np.asarray(r._value).copy() for r in (result if isinstance(result, tuple) else (result,)))
    return values if isinstance(result, tuple) else values[0]


def _function(name: str, keywords: str) -> Callable[..., Any]:
    """A function of the module: on arrays of the double, and inside a fused function on stand-ins if CuPy fuses it."""
    in_numpy = getattr(np, name)

    def function(*args: Any, **settings: Any) -> Any:
        if not any(isinstance(a, _Traced) for a in (*args, *settings.values())):
            return _call(name, in_numpy, keywords, args, settings)
        if name not in FUSED_FUNCTIONS or set(settings) - {"out"}:
            raise TypeError(f"{name}({', '.join(settings)}) cannot be part of a fused function")
        values = [a._value if isinstance(a, _Traced) else _unwrap(a) for a in args]
        if all(type(value) in (bool, int, float) for value in values):  # NumPy makes its own of an array without axes
            raise TypeError(f"{name} of numbers alone: a fused function computes it in half precision")
        out = settings.get("out")
        if isinstance(out, _Traced) and not isinstance(out._value, np.ndarray):
            return _Traced(in_numpy(*values))  # a number: `x += y` gives a new one
        return _Traced(in_numpy(*values, **({"out": out._value} if out is not None else {})))

    function.__name__ = name
    return function


class _Generator:
    """cupy.random.Generator, with its few methods."""

    def __init__(self, bits: np.random.Philox):
        if not isinstance(bits, np.random.Philox):
            raise TypeError(f"a bit generator is needed, got {type(bits)}")
        refuse("making a generator")
        self._generator = np.random.Generator(bits)


def _generator_method(name: str, keywords: str) -> Callable[..., Any]:
    def method(self: _Generator, *args: Any, **settings: Any) -> Any:
        return _call(f"Generator.{name}", getattr(self._generator, name), keywords, args, settings)

    return method


def _from_host(name: str) -> Callable[..., Any]:
    """array and asarray take a NumPy array, a list or a number, too: the explicit moves to the device."""

    def function(x: Any, dtype: Any = None, **settings: Any) -> ndarray:
        if unknown := set(settings) - set(FUNCTIONS[name].split()):
            raise TypeError(f"{name} of the strict double takes no {sorted(unknown)}; does CuPy's?")
        if not isinstance(x, ndarray):
            refuse("moving an array to the device")
        plain = x._array if isinstance(x, ndarray) else np.array(x)
        return _wrap(double_graph.run(lambda: getattr(np, name)(plain, dtype, **settings), [plain]))

    return function


def _as_strided(x: ndarray, shape: Any = None, strides: Any = None) -> ndarray:
    return ndarray(np.lib.stride_tricks.as_strided(x._array, shape, strides))


def _sliding_window_view(x: ndarray, window_shape: Any, axis: Any = None) -> ndarray:
    return ndarray(np.lib.stride_tricks.sliding_window_view(x._array, window_shape, axis))


def _add_at(a: ndarray, indices: Any, b: Any = None) -> None:
    if not isinstance(b, (ndarray, *_INDEXLESS)):
        raise TypeError(f"Unsupported type {type(b)}")
    parts, plain = _index(indices), _unwrap(b)
    double_graph.run(lambda: np.add.at(a._array, parts, plain), (), in_place=True)


def _build_module() -> ModuleType:
    """The module `cupy`, as far as the double has it."""
    cupy = ModuleType("cupy", "The strict double of CuPy.")
    cupy.__version__ = "14.strict.double"
    for name in UFUNCS:
        setattr(cupy, name, _function(name, "out dtype"))
    for name, keywords in FUNCTIONS.items():
        setattr(cupy, name, _function(name, keywords))
    for name in ("array", "asarray", "ascontiguousarray"):
        setattr(cupy, name, _from_host(name))
    for name in (*DTYPES, *CONSTANTS, "dtype", "iinfo", "finfo", "result_type", "broadcast_shapes", "generic"):
        setattr(cupy, name, getattr(np, name))
    cupy.add.at = _add_at
    cupy.cuda, cupy.get_default_memory_pool = double_graph.make_cuda(), double_graph.MemoryPool
    cupy.ndarray, cupy.fuse = ndarray, _fuse
    cupy.random = SimpleNamespace(Generator=_Generator, Philox4x3210=np.random.Philox)
    cupy.lib = SimpleNamespace(
        stride_tricks=SimpleNamespace(as_strided=_as_strided, sliding_window_view=_sliding_window_view)
    )
    return cupy


for _name, _keywords in METHODS.items():
    if _name not in vars(ndarray):
        setattr(ndarray, _name, _method(_name, _keywords))
for _name, _keywords in GENERATOR_METHODS.items():
    setattr(_Generator, _name, _generator_method(_name, _keywords))
for _name in ATTRIBUTES:
    setattr(ndarray, _name, property(operator.attrgetter(f"_array.{_name}")))
_give_operators(ndarray)
_give_operators(_Traced, without=("matmul",))
ndarray.__module__ = "cupy"  # by which backend.array_module finds the library of an array
module = _build_module()


def install(monkeypatch: Any) -> None:
    """Put the double in CuPy's place for one test: `import cupy` gives the double, and "cuda" works."""
    from tinydiff import backend

    library, workspace = double_graph.Cublas(), module.empty(16, module.uint8)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setattr(backend, "_cublas", lambda xp: (library, workspace))
    for name in ("_cuda_problem", "_cublas_works"):  # not their remembered answers
        monkeypatch.setattr(backend, name, functools.cache(getattr(backend, name).__wrapped__))
