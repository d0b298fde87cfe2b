"""NumPy or CuPy: which library an array belongs to, where it lives, and how the processor's cores share the work.

The only file that imports cupy. What the rest of the package asks of it:

    array_module(*arrays)        numpy or cupy, inferred from the arrays; mixing the two is an error
    device(), use_device(name)   the device for new arrays: "cpu" or "cuda"
    to_device, to_numpy          the explicit moves between them; nothing else moves an array
    elementwise(formula)         one formula, evaluated in cache-sized blocks (NumPy), compiled (Numba), or fused (CuPy)
    matmul, parallel, ...        matrix products and loops over a batch, shared among the cores
    random_generator             the device's generator of random numbers

On the CPU a large array costs more to move than to compute with. Work therefore goes block by block, each block
small enough to stay in a core's cache while every step of a formula passes over it, and the blocks are spread over a
few threads: NumPy releases the interpreter lock inside each call.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import importlib.util
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""numpy.ndarray or cupy.ndarray."""

BLOCK = 1 << 18
"""Elements in a block of an elementwise formula: few enough to stay in the cache, yet so many that two threads, each
busy inside a NumPy call, seldom meet at the interpreter lock."""


SMALLEST_COMPILED = 1 << 13
"""Elements of a formula below which calling compiled code costs more than it saves."""


class DeviceError(RuntimeError):
    """A device that was asked for is not there, or arrays of two devices met in one operation."""


# ---------------------------------------------------------------------------------------------- devices


@functools.cache
def _cuda_problem() -> str | None:
    """Why CUDA cannot be used here, or None when a kernel really ran on it."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy is not installed ({error}); install it with: pip install -e '.[cuda12]' (or cuda13)"
    try:
        if int((cupy.arange(3) + 1).sum()) == 6:
            return None
        return "a CUDA kernel ran but gave a wrong result"
    except Exception as error:  # CuPy raises many kinds where the driver or the device is missing
        return f"CuPy {cupy.__version__} is installed but no CUDA device works: {error}"


def device_problem(name: str) -> str | None:
    """Why device `name` ("cpu" or "cuda") cannot be used, or None if a real kernel runs on it."""
    return None if name == "cpu" else _cuda_problem()


def resolve_device(name: str | None = None) -> str:
    """Turn "cpu", "cuda", "auto" or None into a device that works; None is the device in use.

    "auto" is CUDA where it works and the CPU elsewhere. Raises ValueError for another name and DeviceError for
    "cuda" where CUDA does not work, with the reason.
    """
    if name is None:
        return device()
    if name not in ("cpu", "cuda", "auto"):
        raise ValueError(f"a device is 'cpu', 'cuda' or 'auto', got {name!r}")
    if name == "auto":
        return "cpu" if _cuda_problem() else "cuda"
    if name == "cuda" and (problem := _cuda_problem()):
        raise DeviceError(f"device 'cuda' cannot be used: {problem}")
    return name


_device: contextvars.ContextVar[str] = contextvars.ContextVar("device")


def device() -> str:
    """The device for new arrays: set by use_device, else by the variable TINYDIFF_DEVICE, else "cpu"."""
    return _device.get(None) or resolve_device(os.environ.get("TINYDIFF_DEVICE", "cpu"))


@contextlib.contextmanager
def use_device(name: str) -> Iterator[str]:
    """Within this context new arrays are made on device `name`: "cpu", "cuda" or "auto"."""
    token = _device.set(resolve_device(name))
    try:
        yield _device.get()
    finally:
        _device.reset(token)


# ------------------------------------------------------------------------------- arrays and their moves


def _is_foreign(x: Any) -> bool:
    """Whether x is an array of another library than NumPy, told without importing that library."""
    return hasattr(x, "__cuda_array_interface__")


def is_array(x: Any) -> bool:
    """Whether x is an array of NumPy or CuPy (a NumPy scalar is not)."""
    return isinstance(x, np.ndarray) or _is_foreign(x)


def array_module(*arrays: Any) -> ModuleType:
    """The library the arrays belong to: numpy or cupy. Plain numbers belong to either.

    Raises DeviceError when arrays of both are given.
    """
    foreign = next((x for x in arrays if _is_foreign(x)), None)
    if foreign is None:
        return np
    if any(isinstance(x, np.ndarray) for x in arrays):
        raise DeviceError(
            "arrays of two devices met in one operation: "
            + ", ".join(f"{device_of(x)} {tuple(x.shape)}" for x in arrays if is_array(x))
            + "; move one with to_device"
        )
    return sys.modules[type(foreign).__module__.split(".")[0]]


def device_of(x: Array) -> str:
    """The device an array lives on: "cpu" or "cuda"."""
    return "cuda" if _is_foreign(x) else "cpu"


def module_of(name: str) -> ModuleType:
    """The array library of a device: numpy for "cpu", cupy for "cuda"."""
    if name == "cpu":
        return np
    import cupy

    return cupy


def to_numpy(x: Any) -> np.ndarray:
    """Copy an array to the host if it is not there yet."""
    return x.get() if _is_foreign(x) else np.asarray(x)


def to_device(x: Any, name: str | None = None) -> Array:
    """Move an array (or list, or number) to a device, or to the device in use; no copy if it is there already."""
    target = resolve_device(name)
    if is_array(x) and device_of(x) == target:
        return x
    return module_of(target).asarray(to_numpy(x))


def random_generator(seed: np.random.SeedSequence, name: str) -> Any:
    """A generator of random numbers on a device: NumPy's PCG64 or CuPy's Philox."""
    if name == "cpu":
        return np.random.Generator(np.random.PCG64(seed))
    cupy = module_of(name)
    return cupy.random.Generator(cupy.random.Philox4x3210(int(seed.generate_state(1, np.uint64)[0])))


# --------------------------------------------------------------------------------- the processor's cores


def _available_cores() -> int:
    """How many threads to use: the user's own setting wins, else the cores this process may run on."""
    for variable in ("TINYDIFF_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        if os.environ.get(variable, "").isdigit():
            return max(1, int(os.environ[variable]))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _pool() -> tuple[int, ThreadPoolExecutor | None]:
    """The number of workers, and the threads beside the calling one; made at the first use, BLAS set to one thread.

    With one BLAS thread a worker, each worker's matrix product stays in its own core's cache, and no idle BLAS
    thread spins on a core that another worker needs.
    """
    workers = _available_cores()
    _keep_freed_memory()
    _set_blas_threads(1)
    return workers, ThreadPoolExecutor(workers - 1, thread_name_prefix="tinydiff") if workers > 1 else None


def _set_blas_threads(n: int) -> None:
    """Set the number of threads of the OpenBLAS inside NumPy's wheel; other BLAS libraries are left as they are."""
    folder = pathlib.Path(np.__file__).parent
    for library in [*folder.parent.glob("numpy.libs/*openblas*"), *folder.glob(".dylibs/*openblas*")]:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(str(library)).scipy_openblas_set_num_threads64_(ctypes.c_int(n))


def _keep_freed_memory() -> None:
    """Ask the GNU C library to keep freed memory for the next array instead of giving it back to the system.

    A training step frees and makes the same arrays again; getting fresh pages from the system each time costs more
    than most elementwise work on them.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(m_mmap_threshold, 32 << 20)  # the most it takes
            libc.mallopt(m_trim_threshold, (1 << 31) - 1)


_alone: contextvars.ContextVar[bool] = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within this context all work stays on the calling thread: for one of several processes that share the cores."""
    cores()
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def cores() -> int:
    """How many of the processor's cores work is shared among."""
    return _pool()[0]


def parallel(
    work: Callable[[int, int], Any], n: int, grain: int = 1, on: Array | None = None, pieces_per_core: int = 1
) -> list[Any]:
    """Call work(start, stop) on consecutive pieces of range(n), shared among the cores; gives the results in order.

    grain: a core gets no fewer than this many items, so that small jobs stay on one. on: an array the work is done on;
    a CUDA device takes the whole range as one piece. pieces_per_core: with more than one, a core that is slowed down
    leaves pieces to the others. The pieces depend only on n, grain and the number of cores, so that sums over them are
    the same from run to run.
    """
    alone = _alone.get() or (on is not None and _is_foreign(on))
    workers, pool = (1, None) if alone else _pool()
    workers = max(1, min(workers, n // grain))
    if workers == 1 or pool is None:
        return [work(0, n)]
    pieces = min(n, workers * pieces_per_core)
    results, numbers = [None] * pieces, iter(range(pieces))

    def take_pieces() -> None:
        with one_thread():  # a piece that waited for other pieces of its own could wait for ever
            for i in numbers:
                results[i] = work(n * i // pieces, n * (i + 1) // pieces)

    futures = [pool.submit(take_pieces) for _ in range(workers - 1)]
    take_pieces()
    for future in futures:
        future.result()
    return results


def items_per_block(x: Array, bytes_per_item: int) -> int:
    """How many items of a batch to work on at once: what a core's cache holds; on a CUDA device 256 MB."""
    return max(1, (1 << 28 if _is_foreign(x) else 1 << 21) // bytes_per_item)


def each_block(work: Callable[[slice], Any], n: int, bytes_per_item: int, on: Array, grain: int | None = None) -> list:
    """Call work(block) on runs of range(n) that stay in a core's cache, shared among the cores; gives the results.

    bytes_per_item: how much memory the work passes over for each item; grain: how many items are worth a second core;
    on: an array the work is done on.
    """
    step = items_per_block(on, bytes_per_item)

    def runs(start: int, stop: int) -> list:
        return [work(slice(i, min(i + step, stop))) for i in range(start, stop, step)]

    grain = grain or max(1, BLOCK * on.itemsize // bytes_per_item)
    return [result for results in parallel(runs, n, grain, on) for result in results]


_SHARED_PRODUCTS = 1 << 23
"""Multiplications that make it worth waking another core, which takes a tenth of a millisecond."""


def items_per_core(products_per_item: int) -> int:
    """The fewest items of a batch worth handing to another core, each of so many multiplications."""
    return max(1, _SHARED_PRODUCTS // max(1, products_per_item))


def matmul(a: Array, b: Array) -> Array:
    """The product of matrices, batched over leading axes as NumPy does, its rows shared among the cores."""
    xp = array_module(a, b)
    if xp is not np or a.ndim < 2 or b.shape[-1] * a.size < 2 * _SHARED_PRODUCTS:
        return xp.matmul(a, b)
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    out = np.empty(shape, np.result_type(a, b))
    along = [m.ndim == len(shape) and m.shape[0] == shape[0] for m in (a, b)]
    split_b = along[1] and len(shape) > 2

    def work(start: int, stop: int) -> None:
        piece = slice(start, stop)
        np.matmul(a[piece] if along[0] else a, b[piece] if split_b else b, out=out[piece])

    parallel(work, shape[0] if along[0] or split_b else 1)
    return out


def matmul_transposed(a: Array, b: Array) -> Array:
    """aᵀ b for a (N, K) and b (N, M): the sum over rows of their outer products, rows shared among the cores."""
    grain = items_per_core(a.shape[1] * b.shape[1])
    parts = parallel(lambda start, stop: a[start:stop].T @ b[start:stop], len(a), grain, on=a)
    return functools.reduce(lambda total, part: total + part, parts)


def sum_rows(x: Array) -> Array:
    """The sum of x (..., C) over all axes but the last, as a product with a row of ones: (C,)."""
    flat = x.reshape(-1, x.shape[-1])
    return matmul_transposed(array_module(x).ones((len(flat), 1), x.dtype), flat)[0]


def wide_pixels(x: Array) -> Array:
    """x (B, ..., C) as (B, N/f, f C) for the N pixels of each image, f a power of two that makes rows of about 256.

    NumPy is slow at combining short rows with a common row.
    """
    B, C = len(x), x.shape[-1]
    pixels, f = math.prod(x.shape[1:-1]), 1
    while pixels % (2 * f) == 0 and 2 * f * C <= 256:
        f *= 2
    return x.reshape(B, pixels // f, f * C)


# ----------------------------------------------------------------------- one formula, three ways to run


def elementwise(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Turn formula(xp, *arrays, *numbers) into a function of them that makes one pass through memory.

    The formula is written once, with operators and with functions of xp (exp, tanh, sqrt), and gives one array or a
    tuple of arrays in the broadcast shape of its arguments. NumPy evaluates it block by block in the cache, the blocks
    spread over the cores; Numba, where it is installed, compiles it (compiled.py); CuPy makes it one fused kernel.
    The function takes `out=`, an array or a tuple of arrays to write to, which may be among the arguments. A formula
    may work in place on what it has made itself, and on arguments that are always among `out` too. It writes numbers
    as 1.0, not as 1. Overflow gives infinity, without a warning.
    """

    @functools.cache
    def fused(xp: ModuleType) -> Callable[..., Any]:
        return xp.fuse(lambda *args: formula(xp, *args), kernel_name=formula.__name__)

    @functools.wraps(formula)
    def run(*args: Any, out: Any = None) -> Any:
        xp = array_module(*args)
        if xp is not np:
            return _write(out, fused(xp)(*args))
        shape = np.broadcast_shapes(*(a.shape for a in args if isinstance(a, np.ndarray)))
        compiles = _compiles(args, out, shape)
        if math.prod(shape) <= BLOCK and not compiles:
            return _write(out, _evaluated(formula, args))
        outs = _as_tuple(out) if out is not None else _empty_results(formula, args, shape)
        (_run_compiled if compiles else _run_blocked)(formula, args, outs, shape)
        return out if out is not None else outs if len(outs) > 1 else outs[0]

    return run


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _evaluated(formula: Callable[..., Any], args: Any) -> Any:
    with np.errstate(over="ignore"):
        return formula(np, *args)


def _empty_results(formula: Callable[..., Any], args: Any, shape: tuple[int, ...]) -> tuple[Array, ...]:
    """Arrays for what a formula will give, as many and of such dtypes as it gives for empty arrays."""
    values = formula(np, *(np.empty(0, a.dtype) if isinstance(a, np.ndarray) else a for a in args))
    return tuple(np.empty(shape, v.dtype) for v in _as_tuple(values))


def _write(out: Any, value: Any) -> Any:
    """Copy the results of a formula to the arrays that were given for them, if any, unless it worked there in place."""
    if out is None:
        return value
    for target, v in zip(_as_tuple(out), _as_tuple(value), strict=True):
        if not isinstance(v, np.ndarray) or v.ctypes.data != target.ctypes.data or v.strides != target.strides:
            target[...] = v
    return out


def _pieces(arrays: Any, shape: tuple[int, ...]) -> tuple[int, Callable[[int, int], list[Any]]]:
    """How many rows there are to share, and a function that gives each array's rows start..stop.

    A row is a single element where all arrays have the full shape and no gaps, else an item of the leading axis; what
    is broadcast along that is given whole.
    """
    if all(np.ndim(a) == 0 or (a.shape == shape and a.flags.c_contiguous) for a in arrays):
        arrays, shape = [a.reshape(-1) if np.ndim(a) else a for a in arrays], (math.prod(shape),)
    cut = [np.ndim(a) == len(shape) and a.shape[0] == shape[0] for a in arrays]
    return shape[0], lambda start, stop: [a[start:stop] if c else a for a, c in zip(arrays, cut, strict=True)]


def _run_blocked(formula: Callable[..., Any], args: Any, outs: tuple[Array, ...], shape: tuple[int, ...]) -> None:
    """Evaluate a formula by NumPy, over blocks that stay in the cache."""
    rows, pieces = _pieces((*args, *outs), shape)
    step = max(1, BLOCK * rows // math.prod(shape))

    def work(start: int, stop: int) -> None:
        for i in range(start, stop, step):
            arrays = pieces(i, min(i + step, stop))
            _write(tuple(arrays[len(args) :]), _evaluated(formula, arrays[: len(args)]))

    parallel(work, rows, 2 * step)


@functools.cache
def _compiler() -> ModuleType | None:
    """tinydiff.compiled, if Numba is installed and the variable TINYDIFF_COMPILED is not 0."""
    if os.environ.get("TINYDIFF_COMPILED") == "0" or importlib.util.find_spec("numba") is None:
        return None
    return importlib.import_module("tinydiff.compiled")


def _compiles(args: Any, out: Any, shape: tuple[int, ...]) -> bool:
    """Whether a formula of these arguments can be compiled: float32 without gaps, of one shape or (N or 1, R or 1, W),
    numbers last, and enough of them."""
    if math.prod(shape) < SMALLEST_COMPILED or _compiler() is None:
        return False
    arrays = [a for a in args if isinstance(a, np.ndarray)]
    given = [*arrays, *(() if out is None else _as_tuple(out))]
    return (
        all(a.dtype == np.float32 and a.flags.c_contiguous for a in given)
        and all(isinstance(a, (int, float)) for a in args[len(arrays) :])
        and all(a.shape == shape or (len(shape) == a.ndim == 3 and a.shape[2] == shape[2]) for a in given)
    )


def _run_compiled(formula: Callable[..., Any], args: Any, outs: tuple[Array, ...], shape: tuple[int, ...]) -> None:
    """Evaluate a formula by its compiled loop, one range of elements or images a core."""
    arrays = [a for a in args if isinstance(a, np.ndarray)]
    inputs, numbers, places = len(arrays), tuple(map(np.float32, args[len(arrays) :])), []
    for target in outs:
        same = [i for i, a in enumerate(arrays) if a is target]
        places.append(same[0] if same else len(arrays))
        arrays += [] if same else [target]
    loop = importlib.import_module("tinydiff.compiled").loop_of(formula, inputs, tuple(places))
    rows, pieces = _pieces(arrays, shape)

    def work(start: int, stop: int) -> None:
        loop(tuple(a.reshape((1,) * (3 - a.ndim) + a.shape) for a in pieces(start, stop)), numbers)

    parallel(work, rows, max(1, 2 * BLOCK * rows // math.prod(shape)))
