"""What this machine offers tinydiff: python -m tinydiff doctor."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import re
import shutil
import subprocess
import sys

import numpy as np

import tinydiff
from tinydiff import Rng, Tensor, backend, ops

OPTIONAL = ("pillow", "matplotlib", "tqdm", "cupy-cuda12x", "cupy-cuda13x", "numba", "pytest", "hypothesis")


def report() -> bool:
    """Print versions, threads, and which device works or why not; give whether the CPU does."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    cores = len(backend.parallel(lambda start, stop: None, 1 << 20))
    print(f"tinydiff  {tinydiff.__version__}")
    print(f"Python    {platform.python_version()} ({sys.executable}) on {platform.platform()}")
    print(f"NumPy     {np.__version__}, BLAS: {blas['name']} {blas['version']}, {cores} threads (TINYDIFF_THREADS)")
    for name in OPTIONAL:
        print(f"{name:<13} {version(name)}")
    problems = {name: device_problem(name) for name in ("cpu", "cuda")}
    for name, problem in problems.items():
        print(f"device {name:<6} {problem or 'works'}")
    return problems["cpu"] is None


def version(package: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device_problem(name: str) -> str | None:
    """Why a device ("cpu" or "cuda") cannot be used and what to do, or None if its kernels give the right results."""
    if problem := backend.device_problem(name):
        return f"does not work: {problem}. {_driver()}"
    with backend.use_device(name):
        worst = max(_matmul_error(), _conv_error())
    return None if worst < 1e-3 else f"gives wrong results: an error of {worst:.1e} in a convolution or matrix product"


def _matmul_error() -> float:
    """The largest error of a matrix product, against NumPy's sum of products in float64."""
    a, b = Rng(0).at(1).normal((64, 96)), Rng(0).at(2).normal((96, 32))
    exact = np.einsum("ij,jk->ik", *(backend.to_numpy(x).astype(np.float64) for x in (a, b)))
    return float(np.abs(ops.matmul(Tensor(a), Tensor(b)).numpy() - exact).max())


def _conv_error() -> float:
    """The largest error of a 3 x 3 convolution, against its plain formula, one pixel and tap at a time."""
    x, w = Rng(0).at(3).normal((2, 6, 5, 3)), Rng(0).at(4).normal((3, 3, 3, 4))
    padded = np.pad(backend.to_numpy(x).astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel, exact = backend.to_numpy(w), np.zeros((2, 6, 5, 4))
    for i, j, di, dj in itertools.product(range(6), range(5), range(3), range(3)):
        exact[:, i, j] += padded[:, i + di, j + dj] @ kernel[di, dj]
    bias = backend.to_device(np.zeros(4, np.float32))
    return float(np.abs(ops.conv2d(Tensor(x), Tensor(w), Tensor(bias), stride=1, padding=1).numpy() - exact).max())


def _driver() -> str:
    """What NVIDIA's own tool says of the graphics card, and which CuPy fits it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "No NVIDIA driver was found (nvidia-smi): without an NVIDIA GPU, use the CPU."
    said = subprocess.run([tool], capture_output=True, text=True, timeout=30, check=False).stdout
    found = re.search(r"CUDA Version: (\d+)", said)
    if not found:
        return "nvidia-smi finds no working GPU: look at the driver first."
    extra = "cuda13" if int(found[1]) >= 13 else "cuda12"
    return f"The driver supports CUDA {found[1]}: pip install -e '.[{extra}]'"
