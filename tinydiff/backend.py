"""NumPy or CuPy: which library an array belongs to, where it lives, and how the processor's cores share the work.

The only file that imports cupy. What the rest of the package asks of it:

    array_module(*arrays)        numpy or cupy, inferred from the arrays; mixing the two is an error
    device(), use_device(name)   the device for new arrays: "cpu" or "cuda"
    to_device, to_numpy          the explicit moves between them; nothing else moves an array
    product                      a matrix product on one core, or on the device, also where it is captured
    matmul, parallel, ...        matrix products and loops over a batch, shared among the cores
    random_generator             the device's generator of random numbers
    captured, value_range        a function that a GPU replays in one launch; a look at values, which it must not take

On the CPU a large array costs more to move than to compute with. Work therefore goes block by block, each block
small enough to stay in a core's cache while every step of a formula passes over it, and the blocks are spread over a
few threads: NumPy releases the interpreter lock inside each call.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import math
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""numpy.ndarray or cupy.ndarray."""

BLOCK = 1 << 18
"""Elements in a block of an elementwise formula: few enough to stay in the cache, yet so many that two threads, each
busy inside a NumPy call, seldom meet at the interpreter lock."""


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
    if os.environ.get("TINYDIFF_TF32", "0") != "0":
        os.environ["CUPY_TF32"] = "1"  # which CuPy reads at its first matrix product
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
    for foreign in arrays:
        if type(foreign) is not np.ndarray and _is_foreign(foreign):
            break
    else:
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


def beside(array: Array | None, x: Array) -> Array | None:
    """An array, if there is one, on the device of another; no copy if it is there already."""
    return None if array is None else to_device(array, device_of(x))


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


def product(a: Array, b: Array, out: Array | None = None) -> Array:
    """a @ b on the core that calls, or on the device, written to `out` if that is given.

    The way to multiply matrices in an op: a captured function cannot hold CuPy's own products.
    """
    if _in_captured.get() and _is_foreign(a) and a.dtype.kind == b.dtype.kind == "f":
        xp = array_module(a, b)
        return _cublas_matmul(a, b, out) if _cublas_works(xp) else xp.matmul(a, b, out=out)
    return a @ b if out is None else array_module(a, b).matmul(a, b, out=out)


def matmul(a: Array, b: Array) -> Array:
    """The product of matrices, batched over leading axes as NumPy does, its rows shared among the cores."""
    if array_module(a, b) is not np or a.ndim < 2 or b.shape[-1] * a.size < 2 * _SHARED_PRODUCTS:
        return product(a, b)
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
    parts = parallel(lambda start, stop: product(a[start:stop].T, b[start:stop]), len(a), grain, on=a)
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


def widened(v: Array, width: int) -> Array:
    """Vectors (..., C) repeated along the last axis to the width of wide pixels, as what is combined with them."""
    *lead, C = v.shape
    wide = array_module(v).empty((*lead, width // C, C), v.dtype)
    wide[...] = v[..., None, :]
    return wide.reshape(*lead, width)


# ------------------------------------------------------------------------ one launch for a thousand kernels


_in_captured: contextvars.ContextVar[bool] = contextvars.ContextVar("in_captured", default=False)


def captured(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of arrays one launch: on a CUDA device its kernels become a CUDA graph, which is replayed.

    A kernel takes the host several microseconds to launch, and one of a small network takes the device fewer to run.
    The first call with arrays of some shapes and dtypes runs as it is, and compiles what there is to compile; the
    second records the graph; each from then on copies its arrays to the graph's own and launches it. On the CPU a call
    is only a call.

    function(*arrays) takes arrays, or None, and gives an array, or several in a tuple; it may write to arrays that live
    as long as it does. The next call overwrites the results. What the host does happens once, while the graph is
    recorded: a number of Python's is baked in, and so all that changes from call to call must be an argument, random
    numbers too. Where the host would wait for a value, or move an array to the device or back, recording fails: a
    RuntimeWarning says why, and the calls run as they are.
    """
    replays: dict[Any, Callable[..., Any] | None] = {}

    @functools.wraps(function)
    def run(*arrays: Array | None) -> Any:
        xp = array_module(*arrays)
        if xp is np or _in_captured.get():
            return function(*arrays)
        token = _in_captured.set(True)
        try:
            key = tuple(None if a is None else (a.shape, a.dtype.str) for a in arrays)
            if key not in replays:
                value = function(*arrays)
                replays[key] = None
                return value
            replay = replays[key] = replays[key] or _record(xp, function, arrays)
            return replay(*arrays)
        finally:
            _in_captured.reset(token)

    return run


def value_range(x: Array) -> tuple[int, int] | None:
    """The smallest and the largest of some whole numbers, for a check.

    None where there are none, and on a CUDA device inside of a captured function, where the host sees no values.
    """
    return None if not x.size or (_in_captured.get() and _is_foreign(x)) else (int(x.min()), int(x.max()))


@dataclass(frozen=True)
class _Replay:
    """A CUDA graph with the arrays that it reads and writes, and the pool that keeps its memory from other uses."""

    graph: Any
    inputs: list[Array | None]
    outputs: Any
    pool: Any

    def __call__(self, *arrays: Array | None) -> Any:
        for target, a in zip(self.inputs, arrays, strict=True):
            if target is not None:
                target[...] = a
        self.graph.launch()
        return self.outputs


def _record(xp: ModuleType, function: Callable[..., Any], arrays: tuple[Array | None, ...]) -> Callable[..., Any]:
    """Record the kernels of function(*arrays), which do not run meanwhile; the function itself where that fails."""
    xp.get_default_memory_pool().free_all_blocks()  # the first call's, or the two would take the memory twice
    inputs = [None if a is None else xp.empty_like(a) for a in arrays]
    pool, stream = xp.cuda.MemoryPool(), xp.cuda.Stream(non_blocking=True)
    try:
        with xp.cuda.using_allocator(pool.malloc), stream:
            stream.begin_capture()
            try:
                outputs = function(*inputs)
            except BaseException:
                with contextlib.suppress(Exception):  # what failed may have spoilt the graph, too
                    stream.end_capture()
                raise
            return _Replay(stream.end_capture(), inputs, outputs, pool)
    except Exception as error:
        name = getattr(function, "__name__", "a function")
        warnings.warn(f"{name} runs without a CUDA graph, more slowly: {error}", RuntimeWarning, stacklevel=3)
        return function


@functools.cache
def _cublas(xp: ModuleType) -> tuple[Any, Array]:
    """The cuBLAS library that CuPy has loaded, and memory for it to work in: a graph needs it in one place."""
    xp.cuda.Device().cublas_handle  # noqa: B018 (loads the library)
    major = xp.cuda.runtime.runtimeGetVersion() // 1000
    library = ctypes.CDLL(f"cublas64_{major}.dll" if sys.platform == "win32" else f"libcublas.so.{major}")
    pointer, number = ctypes.c_void_p, ctypes.c_int
    matrices = [pointer, number, number, ctypes.c_longlong]
    factors, result = [pointer, *matrices, *matrices], [pointer, *matrices]
    for name, kinds in {
        "cublasSetStream_v2": [pointer, pointer],
        "cublasSetWorkspace_v2": [pointer, pointer, ctypes.c_size_t],
        "cublasGemmStridedBatchedEx": [pointer, *[number] * 5, *factors, *result, *[number] * 3],
    }.items():
        function = getattr(library, name)
        function.argtypes, function.errcheck = kinds, _raise_failure
    return library, xp.empty(32 << 20, xp.uint8)


@functools.cache
def _cublas_works(xp: ModuleType) -> bool:
    """Whether our own call of cuBLAS gives the products that CuPy gives; tried once, on small whole numbers."""
    a, b = xp.arange(6, dtype=xp.float32).reshape(2, 3), xp.arange(12, dtype=xp.float32).reshape(2, 2, 3)
    try:
        return bool((_cublas_matmul(a, b.swapaxes(1, 2)) == xp.matmul(a, b.swapaxes(1, 2))).all())
    except (OSError, AttributeError, RuntimeError) as error:
        warnings.warn(f"cuBLAS cannot be called directly, as CUDA graphs need: {error}", RuntimeWarning, stacklevel=2)
        return False


def _raise_failure(status: int, function: Any, arguments: Any) -> None:
    if status:
        raise RuntimeError(f"{function.__name__} gave the status {status} for {arguments}")


def _cublas_matmul(a: Array, b: Array, out: Array | None = None) -> Array:
    """a @ b by a direct call of cuBLAS, which a CUDA graph can record, while CuPy refuses to call it then.

    cuBLAS has the numbers of a column side by side, where our rows are. What it sees is the transpose of each matrix,
    so that it is asked for (a b)ᵀ = bᵀ aᵀ.
    """
    xp, dtype = array_module(a, b), np.result_type(a.dtype, b.dtype)
    rounded = os.environ.get("CUPY_TF32", "0") != "0"
    number, kind, precision = {
        np.float32: (ctypes.c_float, 0, 77 if rounded else 68),  # CUDA_R_32F, CUBLAS_COMPUTE_32F(_FAST_TF32)
        np.float64: (ctypes.c_double, 1, 70),  # CUDA_R_64F, CUBLAS_COMPUTE_64F
    }[dtype.type]
    (n, k), m = a.shape[-2:], b.shape[-1]
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    out = xp.empty((*lead, n, m), dtype) if out is None else out
    if not out.flags.c_contiguous:
        out[...] = _cublas_matmul(a, b)
        return out
    if not k or not out.size:
        out.fill(0)
        return out

    a, a_turned, a_pitch, a_step = _for_cublas(a.astype(dtype, copy=False), lead)
    b, b_turned, b_pitch, b_step = _for_cublas(b.astype(dtype, copy=False), lead)
    library, workspace = _cublas(xp)
    handle = xp.cuda.Device().cublas_handle
    library.cublasSetStream_v2(handle, xp.cuda.get_current_stream().ptr)
    library.cublasSetWorkspace_v2(handle, workspace.data.ptr, workspace.nbytes)  # which setting a stream takes away
    library.cublasGemmStridedBatchedEx(
        handle, b_turned, a_turned, m, n, k,
        ctypes.byref(number(1)), b.data.ptr, kind, b_pitch, b_step, a.data.ptr, kind, a_pitch, a_step,
        ctypes.byref(number(0)), out.data.ptr, kind, m, n * m, len(a), precision, -1,
    )  # fmt: skip
    return out


def _for_cublas(x: Array, lead: tuple[int, ...]) -> tuple[Array, int, int, int]:
    """Matrices (..., N, M) broadcast to (lead, N, M), as cuBLAS takes them: copied only if their layout is another.

    Gives them as (B, N, M), whether cuBLAS must turn what it sees (1) or not (0), and how many elements lie between
    two rows (columns if turned) and between two matrices.
    """
    xp, (rows, columns) = array_module(x), x.shape[-2:]
    x = xp.broadcast_to(x, (*lead, rows, columns)).reshape(-1, rows, columns)
    step, row, column = (stride // x.itemsize for stride in x.strides)
    rows_run = (column == 1 or columns == 1) and (row >= columns or rows == 1)
    columns_run = (row == 1 or rows == 1) and (column >= rows or columns == 1)
    if step < 0 or not (rows_run or columns_run):
        return xp.ascontiguousarray(x), 0, columns, rows * columns
    if rows_run:
        return x, 0, columns if rows == 1 else row, step
    return x, 1, rows if columns == 1 else column, step
