"""CUDA graphs, streams, memory pools and cuBLAS of the strict double: what `cupy.cuda` is, as far as the double has it.

While a stream captures, nothing runs. Each operation is remembered as a function without arguments, and its result is
an array that holds nothing yet: NaN, or 0 where that does not exist. A launch runs what was remembered, in order, on
the same arrays. So all is as in a CUDA graph: a Python number stays what it was, what the host decided is decided, and
results are overwritten by the next launch. Refused, as CUDA or CuPy would:

- whatever makes the host wait for a value, and moves between host and device; the capture is then spoilt;
- CuPy's matrix products, whose library is called in a way that CuPy does not allow during a capture.

Stricter than CUDA, which would only go wrong later: random numbers, a capture whose memory has no pool of its own, a
launch after that pool is gone, and a matrix product by cuBLAS that was given no workspace.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np


class _Capture:
    """What is being recorded: the operations so far, and whether something spoilt it."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], Any]] = []
        self.spoilt = False


_now = SimpleNamespace(capture=None, streams=[], allocators=[])
"""The capture, if there is one; the streams and allocators of the contexts that are open, the innermost last."""


def run(compute: Callable[[], Any], reads: Sequence[np.ndarray], in_place: bool = False) -> Any:
    """Run an operation, or remember it if a stream captures.

    compute() gives an array, a number, or several; with `in_place` it writes to arrays that are there. reads: the
    arrays that it uses; what shares memory with one of them is a view, which takes no operation.
    """
    capture = _now.capture
    if capture is None:
        return compute()
    if in_place:
        capture.steps.append(compute)
        return None
    with np.errstate(all="ignore"):
        result = compute()
    values = [np.asarray(v) for v in result] if isinstance(result, (list, tuple)) else [np.asarray(result)]
    if any(v.size for v in values) and not any(np.may_share_memory(v, x) for v in values for x in reads):
        if not _now.allocators:
            raise RuntimeError("the memory of this graph is not reserved: capture within using_allocator(pool.malloc)")
        capture.steps.append(lambda: _fill(values, compute()))
        for v in values:
            v.fill(np.nan if v.dtype.kind == "f" else 0)
    return type(result)(values) if isinstance(result, (list, tuple)) else values[0]


def _fill(values: list[np.ndarray], result: Any) -> None:
    for v, r in zip(values, result if isinstance(result, (list, tuple)) else [result], strict=True):
        v[...] = r


def refuse(what: str, error: type[Exception] = RuntimeError) -> None:
    """Raise if a stream captures; all but what CuPy itself forbids spoils the capture, too."""
    if _now.capture is not None:
        _now.capture.spoilt |= error is RuntimeError
        raise error(f"{what} during stream capture")


class Stream:
    """cupy.cuda.Stream: what runs in its context can be captured."""

    def __init__(self, null: bool = False, non_blocking: bool = False):
        self.ptr = 0 if null else id(self)
        self._non_blocking = non_blocking

    def __enter__(self) -> Stream:
        _now.streams.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        assert _now.streams.pop() is self

    def begin_capture(self, mode: int | None = None) -> None:
        if not self._non_blocking or get_current_stream() is not self:
            raise RuntimeError("cannot capture on the default (legacy) stream, nor on one that is not in use")
        refuse("another capture")
        _now.capture = _Capture()

    def end_capture(self) -> Graph:
        capture, _now.capture = _now.capture, None
        if capture is None or capture.spoilt:
            raise RuntimeError("cudaErrorStreamCaptureInvalidated")
        return Graph(capture.steps)


class Graph:
    """cupy.cuda.Graph."""

    def __init__(self, steps: list[Callable[[], Any]]):
        self._steps, self._pool = steps, weakref.ref(_now.allocators[-1].__self__) if _now.allocators else None

    def launch(self, stream: Stream | None = None) -> None:
        refuse("a launch")
        if self._pool is not None and self._pool() is None:
            raise RuntimeError("the graph's memory was given back")
        for step in self._steps:
            step()


class MemoryPool:
    """cupy.cuda.MemoryPool, which here only has to live as long as the graphs that use it."""

    def malloc(self, size: int) -> Any:
        raise NotImplementedError("the double's arrays are NumPy's")

    def free_all_blocks(self) -> None:
        refuse("giving memory back")


@contextlib.contextmanager
def using_allocator(allocator: Callable[[int], Any]) -> Iterator[None]:
    """cupy.cuda.using_allocator."""
    _now.allocators.append(allocator)
    try:
        yield
    finally:
        _now.allocators.pop()


_null = Stream(null=True)


def get_current_stream() -> Stream:
    """cupy.cuda.get_current_stream."""
    return _now.streams[-1] if _now.streams else _null


class Cublas:
    """The three functions of cuBLAS that the backend calls, on addresses, with the checks that cuBLAS makes.

    COMPUTE_32F_FAST_TF32 (77) rounds float32 factors to 10 bits.
    """

    def __init__(self) -> None:
        self._stream, self._workspace = -1, 0

    def cublasSetStream_v2(self, handle: int, stream: int) -> None:
        self._stream, self._workspace = stream, 0

    def cublasSetWorkspace_v2(self, handle: int, workspace: int, size: int) -> None:
        self._workspace = size

    def cublasGemmStridedBatchedEx(
        self, handle, op_a, op_b, m, n, k, alpha, a, a_type, lda, a_step, b, b_type, ldb, b_step,
        beta, c, c_type, ldc, c_step, batch, compute_type, algorithm,
    ) -> None:  # fmt: skip
        """C = alpha op(A) op(B) + beta C, all with the numbers of a column side by side."""
        assert a_type == b_type == c_type and algorithm == -1 and self._stream == get_current_stream().ptr
        dtype = {(0, 68): np.float32, (0, 77): np.float32, (1, 70): np.float64}[c_type, compute_type]
        assert type(alpha._obj) is type(beta._obj) is (ctypes.c_double if c_type else ctypes.c_float)
        assert min(m, n, k, batch) > 0 and min(a_step, b_step, c_step) >= 0 and self._workspace > 0
        assert lda >= (k if op_a else m) and ldb >= (n if op_b else k) and ldc >= m
        A = _columns(a, (m, k), op_a, lda, a_step, batch, dtype)
        B = _columns(b, (k, n), op_b, ldb, b_step, batch, dtype)
        C = _columns(c, (m, n), 0, ldc, c_step, batch, dtype)
        round_off = _to_tf32 if compute_type == 77 else np.asarray
        alpha, beta = dtype(alpha._obj.value), beta._obj.value
        assert beta == 0

        def compute() -> None:
            C[...] = alpha * (round_off(A) @ round_off(B))

        run(compute, (), in_place=True)


def _columns(
    address: int, shape: tuple[int, int], turned: int, pitch: int, step: int, batch: int, dtype: type
) -> np.ndarray:
    """The matrices (batch, *shape) at an address."""
    size = np.dtype(dtype).itemsize
    rows, columns = shape[::-1] if turned else shape
    length = (batch - 1) * step + (columns - 1) * pitch + rows
    memory = np.frombuffer((ctypes.c_char * (length * size)).from_address(address), dtype)
    seen = np.lib.stride_tricks.as_strided(memory, (batch, rows, columns), (step * size, size, pitch * size))
    return seen.swapaxes(1, 2) if turned else seen


def _to_tf32(x: np.ndarray) -> np.ndarray:
    """Keep 10 of the 23 bits after the point."""
    return ((x.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32) if x.flags.c_contiguous else _to_tf32(x.copy())


def make_cuda() -> SimpleNamespace:
    """What the double has as `cupy.cuda`."""
    return SimpleNamespace(
        Device=lambda: SimpleNamespace(cublas_handle=1),
        MemoryPool=MemoryPool,
        Stream=Stream,
        get_current_stream=get_current_stream,
        using_allocator=using_allocator,
    )
